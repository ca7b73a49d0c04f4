"""Processes that measure: their answers, their errors, their end, and Ctrl-C, which is not theirs to hear."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from benchmarks.processes import alone


def die(number):
    """As the system ends a process whose memory does not suffice."""
    os.kill(os.getpid(), number)


def fail():
    raise ValueError("as it is")


def heard():
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_what_a_function_returns_or_raises_comes_back():
    assert alone(divmod, 7, 3) == (2, 1)
    with pytest.raises(ValueError, match="^as it is$"):
        alone(fail)


def test_a_process_that_dies_is_an_error_and_no_wait():
    with pytest.raises(RuntimeError, match="has ended without an answer"):
        alone(die, signal.SIGKILL)


def test_ctrl_c_is_for_the_one_that_asks():
    before = signal.getsignal(signal.SIGINT)
    assert alone(heard) and signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_ends_all_with_one_line(tmp_path):
    """The whole group of processes hears it, as from a terminal."""
    words = ["benchmark.py", "inference", "--networks", "LeNet-5", "--ways", "eager", "--batches", "1", "--seconds",
             "60", "--repeats", "3", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, start_new_session=True)
    time.sleep(15)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.count("\n") == 1 and "Traceback" not in errors, errors
