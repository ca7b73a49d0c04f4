"""Measuring in separate processes: each has its own libraries and memory, and ends with its parent.

    row = alone(time_inference, network, way)       # calls the function in a process, returns its result
    pipe = begin(serve, loop)                       # or starts serve(loop, pipe) in a process to talk to
    answer = ask(pipe)
"""
import contextlib
import multiprocessing
import signal


@contextlib.contextmanager
def deaf():
    """A block that ignores Ctrl-C; processes started in it ignore it for good, since they end with their parent."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def begin(function, *arguments):
    """Start function(*arguments, pipe) in a process; returns our end of the pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    with deaf():
        context.Process(target=function, args=(*arguments, far), daemon=True).start()
    far.close()                           # the process has its own copy; with ours open its end would go unnoticed
    return pipe


def ask(pipe):
    """Receive the next answer of the process at the other end; raises its error, or RuntimeError if it has ended."""
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
    except Exception as problem:          # of any type: the waiting process raises it
        pipe.send(problem)


def alone(function, *arguments):
    """Call function(*arguments) in a process of its own and return its result."""
    pipe = begin(answer_once, function, arguments)
    try:
        return ask(pipe)
    finally:
        pipe.close()
