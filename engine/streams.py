"""Protect the work of a script from a closed or full standard output or error: only what is printed is lost.

    with guarded() as (output, errors):
        ...                               # print as usual
    output.problem                        # None, or the error after which nothing was written
"""
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress


class Stream:
    """A text stream that stores its first failure instead of raising it, and drops everything written after that."""

    def __init__(self, stream):
        self.stream, self.problem = stream, None

    def write(self, text):
        """Write `text` if possible; returns the number of characters, as files do."""
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        """Flush the stream if possible."""
        self.attempt(lambda: self.stream.flush())

    def attempt(self, action):
        """Run an action on the stream, unless it has failed before; store the error if it fails now."""
        if self.stream is None or self.problem is not None:
            return
        try:
            action()
        except (OSError, ValueError) as problem:        # ValueError: the stream was closed
            self.problem = problem
            with suppress(OSError, ValueError):         # discard what its buffer still holds
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def isatty(self):
        """Whether the stream is a working terminal."""
        return self.stream is not None and self.problem is None and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def guarded():
    """A block in which printing never fails: yields the two `Stream`s that replace standard output and error."""
    for number in range(3):             # a newly opened file must not get the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    for stream in before:
        with suppress(AttributeError, OSError, ValueError):      # a character that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    streams = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = streams
    try:
        yield streams
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def run_shown(command):
    """Run a command and show what it prints. Returns its exit code.

    On a terminal the command prints directly. Otherwise this process relays its output, so that a full or closed
    stream affects this process and not the command's work.
    """
    shown = {"stdout": sys.stdout, "stderr": sys.stderr}
    pipes = {name: None if stream is not None and stream.isatty() else subprocess.PIPE
             for name, stream in shown.items()}
    with subprocess.Popen(command, text=True, errors="backslashreplace", **pipes) as process:
        relays = [threading.Thread(target=relay, args=(getattr(process, name), shown[name]))
                  for name, pipe in pipes.items() if pipe is not None]
        for each in relays:
            each.start()
        try:
            return process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            for each in relays:
                each.join()


def relay(source, target):
    """Print each line of `source` to `target` as it arrives, until the end."""
    for line in source:
        print(line, end="", file=target, flush=True)
