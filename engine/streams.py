"""Standard output and error that may be closed or full: what is printed may be lost, the work is not.

    with guarded() as (output, errors):
        ...                               # print as usual
    output.problem                        # None, or the OSError that ended it
"""
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress


class Stream:
    """A text stream whose failures are kept and not raised; what is written after the first is dropped."""

    def __init__(self, stream):
        self.stream, self.problem = stream, None

    def write(self, text):
        """Write what can be written; the number of characters, as files have it."""
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        """Flush what can be flushed."""
        self.attempt(lambda: self.stream.flush())

    def attempt(self, action):
        """Do something with the stream, unless it has failed before; keep the problem where it fails now."""
        if self.stream is None or self.problem is not None:
            return
        try:
            action()
        except (OSError, ValueError) as problem:        # ValueError: closed by somebody
            self.problem = problem
            with suppress(OSError, ValueError):         # what its buffer still holds goes nowhere, silently
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def isatty(self):
        """Whether a person watches."""
        return self.stream is not None and self.problem is None and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def guarded():
    """A block in which printing never fails: yields what stands for standard output and error, two `Stream`s."""
    for number in range(3):             # a file that is opened must not get the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    for stream in before:
        with suppress(AttributeError, OSError, ValueError):      # a name that the terminal cannot show is no error
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

    A terminal becomes the command's own. Anything else is written by this process, so that a full or closed
    stream is a problem of this process and not of the command's work.
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
    """Print each line of `source` on `target` as it comes, to the end."""
    for line in source:
        print(line, end="", file=target, flush=True)
