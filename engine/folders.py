"""The folder of a run: checked, claimed by one process, removed again if nothing was trained.

    refuse_used(out)                 # before any work: refuses other files, or another run
    made = take(out)                 # atomic: if two runs start at once, the second is refused
    give_back(out, made)             # if the run failed before its first step: removes everything
"""
import json
import os
from pathlib import Path

import torch

from engine import checkpoint, parallel

STATE = {"settings": dict, "masks": dict, "history": list, "round": int, "epoch": int, "optimizer": dict,
         "schedule": dict, "random": dict}       # what last.pt holds besides its network
FORMS = {"settings": {"lines": dict, "epochs": list}, "random": {"generator": torch.Tensor, "torch": torch.Tensor}}
HELD = {}      # {(device, inode) of a folder: the handle by which this process locks it}


def refuse_used(out):
    """ValueError if `out` is not empty: it holds a run of this project, or other files."""
    out = Path(out)
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if "last.pt" in names:
        raise ValueError(f"{out} holds another run; --resume continues it, another --out starts a new one")
    if is_run(out):
        raise ValueError(f"{out} holds another run, which has no last.pt to resume from; choose another --out")
    if names:
        raise ValueError(f"{out} is no run of this project: it holds {', '.join(names[:3])}"
                         f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; choose another --out")


def is_run(folder):
    """Whether `folder` has a config.json that a training script wrote."""
    try:
        return "settings" in json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def take(out):
    """Create `out` if it is missing and claim it by creating its config.json, which only one process can do.

    Returns the folders that were created, innermost first. ValueError if another run has
    claimed it, OSError with path and reason if it cannot be created or written in.
    """
    out = Path(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        hold(out)
        os.close(os.open(out / "config.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as problem:
        let_go(out)
        remove_empty(made)
        if (out / "config.json").exists():
            raise ValueError(f"{out} holds another run, which has just begun; choose another --out") from None
        raise OSError(f"cannot write in {out}: {problem.strerror}; choose another folder") from None
    return made


def give_back(out, made):
    """Undo `take` for a run that has trained nothing: remove config.json, the teacher's views.pt and partial files."""
    for path in (Path(out) / "config.json", Path(out) / "views.pt", *Path(out).glob("*.partial")):
        path.unlink(missing_ok=True)
    remove_empty(made)


def remove_empty(folders):
    """Remove folders, innermost first, up to one that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:                   # another process has put something there
            return


def hold(out):
    """Lock `out` until `let_go` or the end of this process, so that no other process trains in it.

    ValueError if another process holds the lock. On file systems without locks, such as some network file systems,
    this does nothing; only `take` then protects against two starts.
    """
    if os.name != "posix" or not Path(out).is_dir():
        return
    import fcntl
    handle = os.open(out, os.O_RDONLY)
    try:
        if key_of(out) not in HELD:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            HELD[key_of(out)], handle = handle, None
    except BlockingIOError:
        raise ValueError(f"another process trains in {out}; wait for its end, or choose another --out") from None
    except OSError:
        pass
    finally:
        if handle is not None:
            os.close(handle)


def let_go(out):
    """Unlock `out` if `hold` locked it."""
    handle = HELD.pop(key_of(out), None) if Path(out).is_dir() else None
    if handle is not None:
        os.close(handle)


def key_of(folder):
    """(device, inode): identifies a folder independently of its path."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def refuse_overwriting(reads, writes):
    """ValueError if a run would overwrite a file that it reads.

    reads: {flag: path or None} of files; writes: files, and folders in which any file may be written.
    """
    written = [Path(path).resolve() for path in writes]
    for flag, path in reads.items():
        if path and any(own in (Path(path).resolve(), Path(path).resolve().parent) for own in written):
            raise ValueError(f"{flag} {path} would be written over by this run; choose another --out, or copy the file")


def refuse_target(flag, path):
    """ValueError if it is already known that a file cannot be written at `path`."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent} that can be written in"
        raise ValueError(f"{flag} {path}: {reason}; name a file in a folder that is there")


# ---- resuming a run

def newest(name, folder="runs"):
    """The newest runs/<run>/<name>; FileNotFoundError if there is none."""
    found = sorted(Path(folder).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"there is no {folder}/*/{name}; train first, or name one")
    return found[-1]


def state_to_resume(given, script):
    """(folder, contents of its last.pt) of the run that --resume continues; locks the folder.

    ValueError for a file that holds no run, or a run of another script.
    """
    out = Path(given.get("out") or newest("last.pt").parent)
    out = Path(parallel.agreed(str(out.parent if out.name == "last.pt" and out.is_file() else out)))
    if parallel.leads() and not given.get("dry_run"):
        hold(out)
    state = checkpoint.read(out / "last.pt")
    if not {"settings", "optimizer", "schedule", "random"} <= state.keys():
        raise ValueError(f"{out}/last.pt holds a network alone, not the state of a run: it cannot be resumed")
    refuse_other_form(f"{out}/last.pt", state)
    if state["settings"].get("script") != script:
        raise ValueError(f"{out} is a run of {state['settings'].get('script')}; that script resumes it")
    return str(out), state


def refuse_other_form(path, state):
    """ValueError for a part of a run's state that is missing or of the wrong type."""
    for where, held, forms in (("", state, STATE), *((f"{name}.", state[name], FORMS[name]) for name in FORMS)):
        for name, form in forms.items():
            value = held.get(name) if isinstance(held, dict) else None
            if not isinstance(value, form) or isinstance(value, bool):
                raise ValueError(f"{path} holds no whole run: {where + name!r} must be a {form.__name__}, not "
                                 f"{str(value)[:40]!r}; previous.pt beside it may")
    if not all(isinstance(row, dict) for row in state["history"]):
        raise ValueError(f"{path} holds no whole run: 'history' must be a list of rows; previous.pt beside it may")


def refuse_other_kind(out, device, state):
    """ValueError if the run in `out` began on another type of device, whose random generator differs."""
    if state is None:
        return
    generator = state["random"]["generator"]
    began = state.get("device") or ("cuda" if generator.numel() == 16 else device.type)    # older files do not say
    if began != device.type:
        raise ValueError(f"the run in {out} began on {began} and cannot go on bit for bit on {device.type}, which "
                         f"draws other random numbers: resume it with --device {began}")
