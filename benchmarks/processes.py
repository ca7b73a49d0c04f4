"""Processes that measure: each alone with its libraries and its memory, and gone when the one that asks is.

    row = alone(time_inference, network, way)       # what the function returns there
    pipe = begin(serve, loop)                       # or a process to talk to: serve(loop, the pipe's other end)
    answer = ask(pipe)
"""
import contextlib
import multiprocessing
import signal


@contextlib.contextmanager
def deaf():
    """Within it Ctrl-C is not heard, by this process and for good by those that it starts: they end with it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def begin(function, *arguments):
    """Start function(*arguments, pipe) in a process; returns this end of the pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    with deaf():
        context.Process(target=function, args=(*arguments, far), daemon=True).start()
    far.close()                           # the process has its own: without it the end of one is not noticed
    return pipe


def ask(pipe):
    """What the process at the other end sends next; its error is raised here. RuntimeError where it has ended."""
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError("a process that measures has ended without an answer; its memory may not have "
                           "sufficed") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def answer_once(function, arguments, pipe):
    """Send what function(*arguments) returns, or the error that it raises."""
    try:
        pipe.send(function(*arguments))
    except Exception as problem:          # of any type: it is raised where the answer is waited for
        pipe.send(problem)


def alone(function, *arguments):
    """What function(*arguments) returns, called in a process of its own."""
    pipe = begin(answer_once, function, arguments)
    try:
        return ask(pipe)
    finally:
        pipe.close()
