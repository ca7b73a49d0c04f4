"""Runs that tests start, stop, continue and compare, in this process and in others."""
import csv
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import experiment
import train
import train_pruning
from engine import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SMALL = shlex.split("--dataset digits --limit 32 --batch-size 32 --compile off --device cpu")
QUICK = [*SMALL, "--model", "lenet5-student", "--mixing", "none"]
SCRIPTS = {"train.py": train.main, "train_pruning.py": train_pruning.main}
EPOCHS = 5
ROUNDS = shlex.split("--dataset digits --limit 96 --batch-size 32 --compile off --device cpu --seed 3 --epochs 2 1 2 "
                     "--sparsity 0.7 0.7")


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def stop_after_a_save(patch):
    """Make the next epoch of any run end in `Stop` once it is saved."""
    real = train.save

    def save(run):
        real(run)
        raise Stop
    patch.setattr(train, "save", save)


def part_of(out, *flags, epochs=1):
    """A run of train_pruning.py in `out` that was stopped after so many epochs."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        for epoch in range(epochs):
            with pytest.raises(Stop):
                train_pruning.main(["--resume", "--out", str(out)] if epoch else [*QUICK, *flags, "--out", str(out)])
    return out


def run_in_parts(begin, out, epochs):
    """Stop a run of train_pruning.py in `out` after each of its epochs, and resume it until it is finished.

    begin: starts it; each part finds torch's global generator in another state.
    """
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        for epoch in range(epochs):
            torch.manual_seed(1000 + epoch)
            with pytest.raises(Stop):
                train_pruning.main(["--resume", "--out", str(out)]) if epoch else begin()
    train_pruning.main(["--resume", "--out", str(out)])


def same(one, other):
    """Equal in types, keys, dtypes, shapes and every bit of every tensor."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return (one.dtype == other.dtype and one.shape == other.shape
                and one.contiguous().flatten().view(torch.uint8).equal(other.contiguous().flatten().view(torch.uint8)))
    return one == other


def without_times(rows):
    """Rows of a history without what the clock gave."""
    return [{name: value for name, value in row.items() if name not in ("images_per_second", "seconds")}
            for row in rows]


def history_of(out):
    """Rows of history.csv, as text; none while there is no file."""
    path = Path(out) / "history.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def assert_same_run(out, other):
    """Result, checkpoints and history of two runs agree to the bit, times and folder aside."""
    assert same(checkpoint.read(out / "model.pt"), checkpoint.read(other / "model.pt"))
    for name in ("last.pt", "previous.pt"):
        one, two = checkpoint.read(out / name), checkpoint.read(other / name)
        for state in (one, two):
            state["history"] = without_times(state["history"])
            del state["settings"]
        assert [key for key in one if not same(one[key], two[key])] == [], name
    assert without_times(history_of(out)) == without_times(history_of(other))


def start_rounds(*flags):
    """A run of train_pruning.py, about to train."""
    return experiment.start(train_pruning.__file__, "", train_pruning.SETTINGS, train.RECIPES, list(map(str, flags)))


def resume(out, *flags):
    """Go on with the run in `out`, to its end."""
    train_pruning.main(["--resume", "--out", str(out), *flags])


def start_training(out, *flags):
    """A run of train.py, about to train."""
    return experiment.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                            [*SMALL, "--out", str(out), *map(str, flags)])


def folder_after(finished, epochs, folder):
    """A copy of the run's folder as it was after so many epochs."""
    folder.mkdir()
    for number in range(max(1, epochs - 1), epochs + 1):
        checkpoint.save(folder / "last.pt", finished.states[number - 1], folder / "previous.pt")
    return folder


def launch(*arguments):
    """train_pruning.py in a process of its own, on one thread."""
    return subprocess.Popen([sys.executable, "train_pruning.py", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})


def wait_for(process, condition):
    """Return as soon as `condition()` holds, within a quarter of an hour and while the process runs."""
    deadline = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def one_line(errors):
    """The single line on stderr, without its `error: `."""
    line, = errors.splitlines()
    assert line.startswith("error: ") and line.count("error: ") == 1
    return line.removeprefix("error: ")


def run_script(script, *flags, folder=ROOT, **environment):
    """(exit code, its one error line) of a script in a process of its own."""
    done = subprocess.run([sys.executable, script, *map(str, flags)], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, one_line(done.stderr)
