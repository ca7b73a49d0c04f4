"""Runs that end early: blocks that turn running out of memory, and Ctrl-C, into a message that says what to do.

    with resumable(run), enough_memory(run.settings):
        ...
"""
import shlex
from contextlib import contextmanager

from engine import folders


@contextmanager
def enough_memory(settings):
    """A block in which running out of memory is an error that names the batch size and suggests a smaller one."""
    try:
        yield
    except RuntimeError as problem:
        if "out of memory" in str(problem) or "can't allocate memory" in str(problem):
            raise RuntimeError(f"out of memory with --batch-size {settings['batch_size']}; "
                               f"try {max(1, settings['batch_size'] // 2)}") from None
        raise


@contextmanager
def resumable(run, ends=True):
    """A block in which Ctrl-C reports which checkpoint resumes the run, and with which command.

    A run that fails before its first step leaves no folder. ends: no later block continues
    the run, so its folder is unlocked for other processes.
    """
    try:
        yield
    except BaseException as problem:
        folders.let_go(run.out)
        if run.made is not None:
            folders.give_back(run.out, run.made)
        if not isinstance(problem, KeyboardInterrupt):
            raise
        if not (run.out / "last.pt").exists():
            raise KeyboardInterrupt("nothing was saved before the first epoch's end") from None
        raise KeyboardInterrupt(f"{run.out}/last.pt holds {len(run.history)} whole epochs, go on with: python "
                                f"{run.settings['script']} --resume --out {shlex.quote(str(run.out))}") from None
    finally:
        if ends:
            folders.let_go(run.out)
