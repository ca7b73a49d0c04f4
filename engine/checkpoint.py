"""Checkpoints: written durably, checked when read, and never able to run code.

    save("runs/a/last.pt", state, "runs/a/previous.pt")       # the old last.pt becomes previous.pt
    state = read("runs/a/last.pt")                            # plain types and tensors, or one clear error
    load_weights(model, architecture, state)

A file holds one dictionary of plain types and tensors. `packing.compact` packs a network
for distribution: half precision, zeros as one bit each, everything compressed.
"""
import gzip
import io
import shlex
import sys
import zipfile
import zlib
from pathlib import Path

import torch

from engine import files, packing, tensor_files
from engine.widths import resize, widths_of

FORMAT = 1
LARGEST = 2**31      # bytes that a compressed file may expand to


# ---- writing

def save(path, state, previous=None):
    """Write `state` to `path`, whole or not at all; the file that was there moves to `previous`; see `files.write`."""
    files.write(path, bytes_of(state), previous)


def bytes_of(state):
    """The bytes of a checkpoint that holds `state`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getvalue()


# ---- reading

def meant(path):
    """The checkpoint file for `path`, which need not exist: `path` itself, or model.pt if it is a folder."""
    path = Path(path)
    return path / "model.pt" if path.is_dir() else path


def find(path):
    """The checkpoint file for `path`: itself, or model.pt if it is a run's folder, with a note on stderr.

    FileNotFoundError for a folder without model.pt.
    """
    path, found = Path(path), meant(path)
    if not path.is_dir():
        return found
    if not found.is_file():
        way = f"{path}/last.pt holds an unfinished run" if (path / "last.pt").is_file() else "name a checkpoint"
        raise FileNotFoundError(f"there is no checkpoint at {found}, and {path} is a folder; {way}")
    print(f"note: {path} is a folder; its {found.name} is read: {found}", file=sys.stderr)
    return found


def refuse_same(source, target, flag):
    """ValueError if the output file `target` of `flag` is the checkpoint `source` itself, under any name."""
    source, target = Path(source), Path(target)
    if source.exists() and target.exists() and source.samefile(target):
        raise ValueError(f"{flag} {target} is the checkpoint itself ({source}), which would be lost; name another file")


def read(path):
    """The dictionary in a checkpoint, plain or compressed, with tensors on the CPU in their stored types.

    Raises FileNotFoundError, or ValueError that says what is wrong: damaged (and in
    which member), no checkpoint at all, contains code objects, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    content = inflate(path, path.read_bytes())
    state = tensor_files.read(path, content) if content[8:10] == b'{"' else read_archive(path, content)
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{path} is not a checkpoint of this project: it names no format")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}; this version reads up to {FORMAT}: update the project")
    try:
        return packing.expand(state)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as problem:
        raise ValueError(f"{path} is damaged: its weights cannot be unpacked ({problem}){offer(path)}") from None


def read_archive(path, content):
    """Load an archive with torch.load, after checking its members and that it contains no code."""
    check_archive(path, content)
    refuse_code(path, content)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as problem:
        raise ValueError(f"{path} is damaged: {str(problem).splitlines()[0]}{offer(path)}") from None


def inflate(path, content):
    """The archive inside a compressed file, or the content unchanged if it is not compressed."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            inner = stream.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as problem:
        raise ValueError(f"{path} is damaged: {problem} ({len(content):,} bytes){offer(path)}") from None
    if len(inner) > LARGEST:
        raise ValueError(f"{path} expands to more than {LARGEST:,} bytes and is refused")
    return inner


def check_archive(path, content):
    """Check every member's checksum, which torch.load does not."""
    if not content:
        raise ValueError(f"{path} is damaged: it is empty{offer(path)}")
    if not content.startswith(b"PK"):
        start = content[:40].decode("ascii", "replace").splitlines()[0]
        raise ValueError(f"{path} is no checkpoint: it starts with {start!r}{offer(path)}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            member = archive.testzip()
            names = archive.namelist()
            # torch writes no attributes, but would read a member flagged as a folder as zeros
            member = member or next((info.filename for info in archive.infolist() if info.external_attr), None)
    except Exception as problem:          # zipfile reports damage in many types
        raise ValueError(f"{path} is damaged or truncated ({len(content):,} bytes): {problem}{offer(path)}") from None
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} is no checkpoint but another kind of archive")
    if member:
        raise ValueError(f"{path} is damaged in its member {member}{offer(path)}")


def refuse_code(path, content):
    """ValueError for a file that contains code objects; none of them is run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except Exception as problem:
        raise ValueError(f"{path} is no checkpoint: {str(problem).splitlines()[0]}") from None
    if names:
        raise ValueError(f"{path} holds code objects ({', '.join(sorted(names))}) and is refused; none of it ran")


def offer(path):
    """The end of an error message: how to resume from previous.pt beside a damaged last.pt; "" if it is not intact."""
    previous = path.with_name("previous.pt")
    if path.name != "last.pt" or not previous.exists():
        return ""
    try:
        read(previous)
    except ValueError:
        return ""
    return f"; the one before it is whole, go on from it with: {shlex.join(['cp', str(previous), str(path)])}"


# ---- weights

def weights_of(model):
    """{name: tensor} of a model's parameters and buffers, copied to the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def network_of(model, architecture):
    """The description of a network in a checkpoint: a dictionary of architecture, widths and weights."""
    return {"architecture": architecture, "widths": widths_of(model), "weights": weights_of(model)}


def load_weights(model, architecture, state):
    """Load a checkpoint's weights into `model`, which was built from `architecture`.

    Layers are resized to the widths in the file, and layers it does not list are removed;
    index buffers of removed channels are loaded too. Half precision is converted to the
    model's type. Raises ValueError with both architectures and the first tensors that differ.
    """
    if state.get("architecture") == architecture:
        resize(model, state.get("widths", {}), state["weights"])
    theirs, ours = state["weights"], model.state_dict()
    wrong = [f"{name} is {describe(theirs.get(name))} in the file, {describe(ours.get(name))} in the network"
             for name in {**ours, **theirs} if describe(theirs.get(name)) != describe(ours.get(name))]
    if wrong or state.get("architecture") != architecture:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the checkpoint is of {state.get('architecture')}, not of {architecture}: "
                         f"{'; '.join(wrong[:3]) or 'no shape differs'}{more}")
    model.load_state_dict(theirs)


def describe(tensor):
    """A tensor's shape as text."""
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "one number"


# ---- compact files

def save_compact(path, network, eight_bits=False):
    """Write a network in half precision or 8 bits, zeros as one bit each, compressed; see `packing.compact`."""
    files.write(path, compact_bytes(network, eight_bits))


def compact_bytes(network, eight_bits=False):
    """The bytes of a compact file: weights packed by `packing.compact`, saved by torch and compressed by gzip."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **network, "weights": packing.compact(network["weights"], eight_bits)}, buffer)
    return gzip.compress(buffer.getvalue(), 9, mtime=0)
