"""Ctrl-C while a script still loads its libraries: one line and exit code 130, as later in the script.

Scripts import this module first, so it imports almost nothing; `commandline.command`
takes over when they begin. Other programs that import a script, and processes started by a
script, are not affected.
"""
import os
import signal
import sys


def leave(number, frame):
    """Print one line and exit at once: nothing has begun."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def is_script(path):
    """Whether `path`, the program that Python runs, is a script of this project."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return os.path.isfile(path) and os.path.dirname(os.path.realpath(path)) == root


if (is_script(sys.argv[0]) and "--multiprocessing-fork" not in sys.orig_argv
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, leave)
