"""Standard streams that are closed or full, and exceptions of any type: one line, the right exit code, whole files."""
import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from engine import checkpoint, commandline, streams

TINY = shlex.split("--dataset digits --limit 64 --epochs 1 --model lenet5 --mixing none --compile off --batch-size 32 "
                   "--device cpu")
QUICK = {"profil.py": "--model lenet5", "study.py": "--help", "report.py": "--help", "predict.py": "--help",
         "test.py": "--help", "export.py": "--help", "benchmark.py": "--help",
         "train.py": "--dry-run --dataset digits --model lenet5 --compile off"}


def shell(script, flags, redirect):
    """A script under a redirection of the shell."""
    program = f"{shlex.quote(sys.executable)} {script} {shlex.join(map(str, flags))} {redirect}"
    return subprocess.run(["sh", "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("redirect", "code", "told"), [
    (">&-", 0, ""), ("2>&-", 0, ""), ("<&-", 0, ""), (">&- 2>&- <&-", 0, ""), ("2> /dev/full", 0, ""),
    ("> /dev/full", 1, "error: standard output could not be written"), ("> /dev/full 2>&1", 1, ""),
])
def test_a_training_run_goes_on_and_its_files_are_whole(redirect, code, told, tmp_path):
    done = shell("train.py", [*TINY, "--out", tmp_path / "run"], redirect)
    assert (done.returncode, done.stderr.count("\n")) == (code, bool(told)), done.stderr
    assert done.stderr.startswith(told)
    for name in ("model.pt", "last.pt"):
        assert checkpoint.read(tmp_path / "run" / name)["weights"]
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 2


def test_a_reader_that_leaves_is_no_failure():
    """So that a study whose reader leaves does not count its runs as failed."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "profil.py", "--model", "lenet5"], cwd=ROOT, stdout=writes,
                          stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("redirect", "code", "told"), [
    ("> /dev/full", 1, "error: standard output could not be written"), ("2> /dev/full", 0, "")])
def test_an_arm_of_a_study_whose_output_is_full_does_not_count_as_failed(redirect, code, told, tmp_path):
    arm = {"group": "g", "name": "a", "run": "train.py"}
    (tmp_path / "small.json").write_text(json.dumps({"flags": shlex.join(TINY), "seeds": [0], "arms": [arm]}))
    program = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'study.py'))} small.json {redirect}"
    done = subprocess.run(["sh", "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code and done.stderr.startswith(told) and done.stderr.count("\n") == bool(told), done
    assert (tmp_path / "runs/small-a-s0/finished").exists()
    assert (tmp_path / "results/small/table.csv").read_text().splitlines()[1].startswith("g,a,1,")


def test_what_a_command_prints_is_shown_where_it_was_printed(capfd):
    code = streams.run_shown([sys.executable, "-c", "import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"])
    assert (code, capfd.readouterr()) == (3, ("a\n", "b\n"))


@pytest.mark.parametrize("script", QUICK)
def test_a_full_output_is_named_by_every_script(script):
    done = shell(script, QUICK[script].split(), "> /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output could not be written ([Errno 28]"), done.stderr
    assert done.stderr.count("\n") == 1


def test_an_error_is_an_error_without_a_place_to_tell_it():
    for redirect in ("2>&-", "2> /dev/full", ">&- 2>&-"):
        assert shell("train.py", ["--lr", "-1"], redirect).returncode == 2


def print_to_both(argv):
    """A script that prints a result, and a note on standard error."""
    print("result")
    print("note: seen", file=sys.stderr)


BOTH = ("-c", "import sys; sys.path[:0] = ['tests', 'tests/engine']; import test_streams as t; "
              "t.commandline.command(t.print_to_both)")


@pytest.mark.parametrize(("flags", "redirect", "code", "told"), [
    ([], "2> /dev/full", 1, "result\nnote: standard error could not be written ([Errno 28] No space left on device): "
                            "what was to be told there is lost, files are whole\n"),
    (["--json"], "2> /dev/full", 1, "result\n"), ([], "2>&-", 0, "result\n"), ([], "> /dev/full 2>&1", 1, ""),
])
def test_a_full_standard_error_is_named_where_it_can_be(flags, redirect, code, told):
    """A result in JSON stays one."""
    script, *rest = BOTH
    done = shell(script, [*rest, *flags], redirect)
    assert (done.returncode, done.stdout, done.stderr) == (code, told, "")


def test_a_reader_that_has_seen_enough_ends_nothing(tmp_path):
    done = shell("train.py", [*TINY, "--out", tmp_path / "run"], "| head -c 1")
    assert done.stderr == "" and len(done.stdout) == 1
    assert checkpoint.read(tmp_path / "run" / "model.pt")["weights"]


class Odd(Exception):
    """None of those that a script expects."""


@pytest.mark.parametrize(("problem", "code", "told"), [
    (ValueError("bad\ninput"), 2, "bad input"), (FileNotFoundError("no file"), 2, "no file"),
    (RuntimeError("failed"), 1, "failed"), (KeyboardInterrupt("later"), 130, "interrupted; later"),
    (KeyError("x"), 1, "KeyError: 'x'; this is a fault of the program, --debug shows where"),
    (AttributeError("a"), 1, "AttributeError: a; this is a fault"), (Odd("b"), 1, "Odd: b; this is a fault"),
    (MemoryError(), 1, "MemoryError"), (AssertionError(), 1, "AssertionError"), (ZeroDivisionError("c"), 1, "Zero"),
])
def test_one_place_decides_what_becomes_of_an_exception(problem, code, told, capsys, monkeypatch):
    def main(argv):
        raise problem
    monkeypatch.setattr(sys, "argv", ["a.py"])
    with pytest.raises(SystemExit) as end:
        commandline.command(main)
    errors = capsys.readouterr().err
    assert end.value.code == code and errors.startswith(f"error: {told}") and errors.count("\n") == 1


def test_the_streams_are_as_they_were_afterwards():
    before = sys.stdout, sys.stderr
    commandline.command(lambda argv: print("seen"))
    assert (sys.stdout, sys.stderr) == before
