"""Data sets of other packages: torchvision's original files, checked and downloaded if missing; scikit-learn's digits.

    x_train, y_train, x_test, y_test = read_originals("mnist", kind, Path("data"))
"""
import contextlib
import hashlib
import math
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def read_originals(dataset, kind, root):
    """The four arrays of a data set, read by torchvision's class `kind.reader`; see `cifar10.Data`.

    A read-only folder can be used if it holds all original files. Raises ValueError for a
    file that was altered, FileNotFoundError if one is missing and cannot be downloaded,
    OSError if the folder cannot be used.
    """
    reader = getattr(import_torchvision().datasets, kind.reader)
    check_originals(reader, kind, root)
    flag, parts = ("split", ("train", "test")) if hasattr(reader, "split_list") else ("train", (True, False))
    with place_for(reader, root) as place:
        try:
            train, test = (reader(place, **{flag: part}, download=True) for part in parts)
        except (OSError, RuntimeError) as problem:
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise FileNotFoundError(
                f"{dataset} is neither at {root / (dataset + '.npz')} nor in {root} as torchvision's files, and the "
                f"download failed ({reason}); put {original_names(reader)} into {root}, "
                "or try --dataset digits, which needs no download") from None
    return [array for part in (train, test) for array in arrays_of(part, kind.shape)]


def read_digits():
    """The four arrays of scikit-learn's 1,797 digits, scaled to 32x32 and three equal channels; 360 for the test."""
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=32, mode="bilinear").round().to(torch.uint8)
    images = large.permute(0, 2, 3, 1).expand(-1, 32, 32, 3).contiguous().numpy()
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:1_437], order[1_437:]
    return images[train], labels[train], images[test], labels[test]


def arrays_of(part, shape):
    """(images (N, H, W, C), labels (N,)) of one of torchvision's data sets."""
    images = np.asarray(part.data)
    if hasattr(part, "split_list"):                # SVHN: channels first, and another name for labels
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), np.asarray(part.labels)
    return images.reshape(-1, *shape), np.asarray(part.targets)


def import_torchvision():
    """Import torchvision; RuntimeError with both versions if it is missing or does not fit the installed torch."""
    try:
        import torchvision.transforms.v2
        return torchvision
    except (ImportError, RuntimeError) as problem:
        from importlib.metadata import PackageNotFoundError, version
        try:
            found = version("torchvision")
        except PackageNotFoundError:
            found = "absent"
        raise RuntimeError(f"torch {torch.__version__} and torchvision {found} do not fit "
                           f"({str(problem).splitlines()[0]}); "
                           "mend it with: pip install --upgrade torch torchvision") from None


# ---- the files

def ways_of(reader):
    """Lists of files below the data folder, each list a complete set: packed, and unpacked if that differs."""
    if hasattr(reader, "split_list"):
        return [[reader.split_list[part][1] for part in ("train", "test")]]
    if hasattr(reader, "filename"):
        return [[reader.filename], [f"{reader.base_folder}/{part}" for part, _ in checked_parts(reader)]]
    packed = [f"{reader.__name__}/raw/{name}" for name, _ in reader.resources]
    return [packed, [name.removesuffix(".gz") for name in packed]]


def checked_parts(reader):
    """(name, md5) of every unpacked file of CIFAR."""
    return [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]


def original_names(reader):
    """The files to put into the data folder by hand when the download is impossible, for an error message."""
    if hasattr(reader, "filename"):
        return f"{reader.filename} (md5 {reader.tgz_md5})"
    if hasattr(reader, "split_list"):
        return " and ".join(f"{reader.split_list[part][1]} (md5 {reader.split_list[part][2]})"
                            for part in ("train", "test"))
    return f"{reader.__name__}/raw/ with " + ", ".join(name for name, _ in reader.resources)


def check_originals(reader, kind, root):
    """ValueError for an altered original file, before anything is unpickled: by torchvision's md5, MNIST's by size."""
    if hasattr(reader, "split_list"):
        expected = [reader.split_list[part][1:] for part in ("train", "test")]
    elif hasattr(reader, "filename"):
        expected = [(reader.filename, reader.tgz_md5),
                    *((f"{reader.base_folder}/{part}", md5) for part, md5 in checked_parts(reader))]
    else:
        check_idx_sizes(kind, root / reader.__name__ / "raw")
        return
    for part, md5 in expected:
        path = root / part
        if path.exists():
            found = hashlib.md5(path.read_bytes()).hexdigest()
            if found != md5:
                raise ValueError(f"{path} is truncated or altered: expected md5 {md5}, found {found} "
                                 f"({path.stat().st_size:,} bytes); delete it or put the right file there")


def check_idx_sizes(kind, folder):
    """Check header and size of MNIST's unpacked files, one byte per pixel or label; torchvision has no checksums."""
    for part, count in zip(("train", "t10k"), kind.counts, strict=True):
        for name, sides in (("images-idx3", kind.shape[:2]), ("labels-idx1", ())):
            path = folder / f"{part}-{name}-ubyte"
            if not path.exists():
                continue
            header = struct.pack(f">{2 + len(sides)}I", 0x801 + len(sides), count, *sides)
            size = len(header) + count * math.prod(sides)
            if path.stat().st_size != size:
                raise ValueError(f"{path} is truncated or altered: expected {size:,} bytes, found "
                                 f"{path.stat().st_size:,}; delete it or put the right file there")
            with open(path, "rb") as file:
                found = file.read(len(header))
            if found != header:
                raise ValueError(f"{path} is altered: expected a header of {header.hex()}, found {found.hex()}; delete "
                                 "it or put the right file there")


@contextlib.contextmanager
def place_for(reader, root):
    """A folder that the reader may write in: `root`, or if that is read-only a temporary one of links to its files."""
    whole = [way for way in ways_of(reader) if all((root / name).exists() for name in way)]
    try:
        check_folder(root)
    except OSError:
        if not whole:
            raise
    else:
        whole = []
    if not whole:
        yield root
        return
    with tempfile.TemporaryDirectory() as spare:
        for name in {name for way in whole for name in way}:
            (Path(spare) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(spare) / name).symlink_to((root / name).resolve())
        yield Path(spare)


def check_folder(folder):
    """Create `folder` if missing; OSError with path and reason if that fails or it is not writable."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise OSError(f"cannot write in {folder}: {problem.strerror}; choose another folder") from None
