"""The arrays of a data set in an `.npz`: read with their checksums and without pickle, written whole or not at all.

    arrays = read("data/cifar10.npz", ("x_train", "y_train", "x_test", "y_test"))
"""
import io
import sys
from pathlib import Path

import numpy as np

from engine import files


def read(path, names):
    """{name: array} of an `.npz`, of any shapes and types; nothing is unpickled.

    Raises ValueError if the file cannot be read, is damaged, holds Python objects or lacks one of `names`.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            found = {name: read_member(archive.zip, name) for name in names if name in archive}
    except (OSError, MemoryError) as problem:
        raise ValueError(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem or 'no memory'}"
                         ) from None
    except Exception as problem:          # zipfile and NumPy report damage in many types
        if "pickle" in str(problem) or isinstance(problem, TypeError):
            raise ValueError(f"{path} is not an .npz of plain arrays; "
                             "delete it or put the right file there") from None
        raise ValueError(f"{path} is damaged ({problem}; {Path(path).stat().st_size:,} bytes); "
                         "delete it, and it is made again from the original files") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} has no array called {missing[0]}; it must hold {', '.join(names)}")
    return found


def read_member(archive, name):
    """Read one array of an `.npz` as a whole: zipfile checks a member's checksum only at its end."""
    content = archive.read(f"{name}.npy")
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns_first, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    array = np.frombuffer(bytearray(content), dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if columns_first else "C")


def write(path, arrays):
    """Write {name: array} for the next start, completely or not at all; a note if that fails."""
    held = io.BytesIO()
    np.savez(held, **arrays)
    try:
        files.write(path, held.getvalue())
    except RuntimeError as problem:
        print(f"note: {problem}; the next start reads the original files again", file=sys.stderr)
