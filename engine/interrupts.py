"""Ctrl-C while a script still loads its libraries: one line and exit code 130, as at any later time.

Scripts import this before all else, so it imports next to nothing; `commandline.command`
takes over once they begin. A program of one's own that imports a script, and a process
that one has started, are left alone.
"""
import os
import signal
import sys


def leave(number, frame):
    """Say so and end at once: nothing has begun."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def is_script(path):
    """Whether what Python runs is a script of this project."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return os.path.isfile(path) and os.path.dirname(os.path.realpath(path)) == root


if (is_script(sys.argv[0]) and "--multiprocessing-fork" not in sys.orig_argv
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, leave)
