"""The folder of a run: free or not, taken by one process alone, given back where nothing was trained.

    refuse_used(out)                 # before any work: somebody's files, or another run
    made = take(out)                 # atomic: of two that start at once, the second is refused
    give_back(out, made)             # it failed before its first step: nothing is left of it
"""
import json
import os
from pathlib import Path

HELD = {}      # (device, inode) of a folder: the handle by which this process holds it


def refuse_used(out):
    """ValueError where `out` holds something: a run of this project, or files that none of its runs wrote."""
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
    """Whether a training script wrote the config.json there."""
    try:
        return "settings" in json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def take(out):
    """Make `out` where it is absent and claim it: its config.json is created, which one process alone can do.

    Returns the folders that were made, innermost first. ValueError where another
    run has it, OSError with path and reason where it cannot be made or written in.
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
    """Undo `take` where the run has written nothing but its config.json."""
    (Path(out) / "config.json").unlink(missing_ok=True)
    remove_empty(made)


def remove_empty(folders):
    """Remove folders, innermost first, up to one that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:                   # somebody else has put something there
            return


def hold(out):
    """Lock `out` until `let_go` or the end of this process, so that no other trains in it; ValueError where one does.

    A file system without locks, as some in networks are, is let pass: there `take` alone tells two starts apart.
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
    """Unlock what `hold` locked, if it did."""
    handle = HELD.pop(key_of(out), None) if Path(out).is_dir() else None
    if handle is not None:
        os.close(handle)


def key_of(folder):
    """What tells one folder from another, whatever its path."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def refuse_overwriting(reads, writes):
    """ValueError where a run would write over what it reads.

    reads: {flag: path or None} of files; writes: files, and folders whose every file may be written.
    """
    written = [Path(path).resolve() for path in writes]
    for flag, path in reads.items():
        if path and any(own in (Path(path).resolve(), Path(path).resolve().parent) for own in written):
            raise ValueError(f"{flag} {path} would be written over by this run; choose another --out, or copy the file")


def refuse_target(flag, path):
    """ValueError where a file cannot be written at `path`, for what can be known of that before."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent} that can be written in"
        raise ValueError(f"{flag} {path}: {reason}; name a file in a folder that is there")


def check_files(settings, out, begins):
    """ValueError where a run would write over a file that it reads, or has nowhere to write its result to."""
    cycle = settings["cycle_settings"]
    first = {"--start": settings["start"], "--cycle": settings["cycle"],
             "input_model_path of --cycle": cycle.get("input_model_path")}
    reads, target = {"--teacher": settings["teacher"], **(first if begins else {})}, cycle.get("output_model_path")
    if begins and first["--start"] and cycle.get("input_model_path"):
        raise ValueError(f"--start {settings['start']} and input_model_path {cycle['input_model_path']} of --cycle "
                         "both say where the weights begin; leave one out")
    if target:
        refuse_target("output_model_path of --cycle", target)
        refuse_overwriting({"output_model_path of --cycle": target}, [out / name for name in (
            "last.pt", "previous.pt", "history.csv", "config.json")])
    refuse_overwriting(reads, [out, *[target] * bool(target)])
