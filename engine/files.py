"""Files: written durably, by one process at a time; JSON that is checked when read.

    write("results/table.md", content)            # whole or not at all
    merge_json("runs/a/profile.json", values)
"""
import hashlib
import io
import json
import os
import signal
import sys
import threading
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

# ---- writing

def write(path, content, previous=None):
    """Write bytes to `path`, whole or not at all; the file that was there moves to `previous`.

    A temporary file in the same folder is written, flushed, synced, read back and
    renamed; then the folder is synced. Ctrl-C is handled after that, and a second process
    waits. Raises RuntimeError with the bytes needed if the disk is full; the old file stays.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with uninterrupted():
        try:
            with locked(partial, create=True):
                write_synced(partial, content)
                if previous and path.exists():
                    replace_by_link(path, Path(previous))
                os.replace(partial, path)
                sync_folder(path.parent)
        except OSError as problem:
            with suppress(OSError):       # the folder may not exist
                partial.unlink(missing_ok=True)
            kept = f"; the previous {path.name} is intact" if path.exists() else ""
            raise RuntimeError(f"{path} could not be written ({problem.strerror or problem}): "
                          f"{len(content):,} bytes are needed{kept}") from None


@contextmanager
def locked(path, create=False):
    """A block that one process at a time enters: it holds a lock on the file at `path`; others wait.

    The block may rename or replace the file. create: create the file if it is missing. Without the file, or if the
    system has no locks, nobody waits.
    """
    handle = lock(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def lock(path, flags):
    """The locked handle of the file that is at `path` once the lock is free; None if it cannot be opened."""
    with suppress(ImportError, OSError):
        import fcntl
        while True:
            handle = os.open(path, flags, 0o666)
            with suppress(OSError):       # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
            os.close(handle)              # the process that held the lock has replaced or renamed the file: try again
    return None


def write_synced(path, content):
    """Write, flush and sync a file, then read it back."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if zlib.crc32(path.read_bytes()) != zlib.crc32(content):
        raise OSError(0, "what was read back differs from what was written")


def replace_by_link(path, previous):
    """Make `previous` a second name (hard link) of the file at `path`, or a copy; `path` exists at every moment."""
    spare = previous.with_name(previous.name + ".partial")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:                       # a file system without hard links
        try:
            write_synced(spare, path.read_bytes())
        except OSError:
            spare.unlink(missing_ok=True)
            raise
    os.replace(spare, previous)


def sync_folder(folder):
    """Make a rename survive a power failure, on systems that can sync a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def uninterrupted():
    """A block that delays Ctrl-C until it has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)       # to the previous handler, which may ignore it


def remove_partial(folder):
    """Delete the partial files that a killed save left behind."""
    for stale in Path(folder).glob("*.partial"):
        stale.unlink()


@contextmanager
def noted():
    """A block that writes secondary files: if one cannot be written, this is a note on stderr, not an error."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as problem:
        print(f"note: {' '.join(str(problem).split())}", file=sys.stderr, flush=True)


def save_figure(path, figure):
    """Save a matplotlib figure as an image file, whole or not at all; the ending sets the format (none: PNG)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:] or "png", dpi=120)
    write(path, buffer.getvalue())


# ---- JSON

def read_json(path):
    """The JSON object in a file; ValueError that names the file if it holds none."""
    try:
        held = parse_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is damaged, it is no JSON: {problem}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(held).__name__}, not a JSON object")
    return held


def parse_json(text):
    """The value of a JSON text; ValueError also if an object has a key twice, since one value would be lost."""
    def once(pairs):
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise ValueError(f"{twice[:40]!a} stands in it twice")
        return dict(pairs)
    return json.loads(text, object_pairs_hook=once)


def merge_json(path, values):
    """Add `values` to the JSON object at `path`, in a run's folder, and keep its other keys.

    If two processes do so at once, the second waits for the first.
    """
    path = Path(path)
    with locked(path.with_name("config.json")):
        held = read_json(path) if path.exists() else {}
        write(path, (json.dumps(held | values, indent=1) + "\n").encode())


def sha256_of(path):
    """The SHA-256 of a file as text; measurements of a file are valid for files with the same SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
