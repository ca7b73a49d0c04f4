"""Ctrl-C at any time: nothing half written, one line with the way on, exit code 130."""
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from sample_runs import EPOCHS, ROUNDS, folder_after, resume, same

import experiment
import train
import train_pruning
from engine import checkpoint, commandline, files

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ctrl_c_twice_is_one_line_with_the_way_on(interrupted):
    assert interrupted.code == 130
    assert interrupted.errors.count("\n") == 1, interrupted.errors
    line = interrupted.errors.strip()
    epochs = len(checkpoint.read(interrupted.out / "last.pt")["history"])
    assert line == (f"error: interrupted; {interrupted.out}/last.pt holds {epochs} whole epochs, go on with: "
                    f"python train_pruning.py --resume --out {interrupted.out}")
    assert not (interrupted.out / "model.pt").exists()


def test_ctrl_c_before_the_first_save_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="nothing was saved before the first epoch's end"):
        train_pruning.main([*ROUNDS, "--out", str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("*.pt"))


def test_ctrl_c_during_a_save_waits_and_names_it(finished, tmp_path, monkeypatch):
    out, real = folder_after(finished, 4, tmp_path / "run"), os.fsync

    def fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("last.pt.partial"):
            os.kill(os.getpid(), signal.SIGINT)
        return real(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="last.pt holds 5 whole epochs, go on with: python train_pruning"):
            resume(out)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same(checkpoint.read(out / "last.pt")["weights"], finished.states[4]["weights"])
    assert same(checkpoint.read(out / "previous.pt")["weights"], finished.states[3]["weights"])


def test_ctrl_c_just_before_a_save_counts_what_the_file_holds(finished, tmp_path, monkeypatch):
    out, real = folder_after(finished, 4, tmp_path / "run"), experiment.state_of

    def state_of(run):
        os.kill(os.getpid(), signal.SIGINT)
        return real(run)
    monkeypatch.setattr(experiment, "state_of", state_of)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            resume(out)
    finally:
        signal.signal(signal.SIGINT, handler)
    epochs = len(checkpoint.read(out / "last.pt")["history"])
    assert f"last.pt holds {epochs} whole epochs" in str(stopped.value)


@pytest.mark.parametrize("epochs, place", [(2, "prune"), (EPOCHS, "finish")])
def test_ctrl_c_between_rounds_names_the_checkpoint(finished, tmp_path, monkeypatch, epochs, place):
    out = folder_after(finished, epochs, tmp_path / "run")
    monkeypatch.setattr(train_pruning, place, lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match=f"last.pt holds {epochs} whole epochs, go on with: python train_prun"):
        resume(out)


def test_second_ctrl_c_cannot_spoil_the_way_out(shell, monkeypatch):
    real = commandline.report

    def press_again(problem, code):
        os.kill(os.getpid(), signal.SIGINT)
        return real(problem, code)
    monkeypatch.setattr(commandline, "report", press_again)

    def interrupted(argv):
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")
    assert shell(interrupted) == (130, "interrupted")


def test_second_ctrl_c_after_one_during_a_save(shell, monkeypatch, tmp_path):
    real = commandline.report

    def press_again(problem, code):
        os.kill(os.getpid(), signal.SIGINT)
        return real(problem, code)
    monkeypatch.setattr(commandline, "report", press_again)

    def saving(argv):
        with files.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            (tmp_path / "saved").touch()
        pytest.fail("it went on")
    assert shell(saving) == (130, "interrupted")
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("script", ["train.py", "train_pruning.py", "test.py", "profil.py", "export.py", "predict.py",
                                    "report.py", "study.py", "benchmark.py"])
def test_ctrl_c_while_the_libraries_load_is_one_line(script):
    """The signal comes from within the first library that is imported, before any of it is there."""
    first = ("import os, signal, sys, runpy\n"
             "class Interrupt:\n"
             "    def find_spec(self, name, path=None, target=None):\n"
             "        if name.split('.')[0] in ('torch', 'numpy', 'cifar10', 'importlib_metadata', 'json'):\n"
             "            os.kill(os.getpid(), signal.SIGINT)\n"
             "for name in ('json', 'numpy', 'torch'):\n"
             "    sys.modules.pop(name, None)\n"
             "sys.meta_path.insert(0, Interrupt())\n"
             f"sys.argv = [{str(ROOT / script)!r}]\n"
             f"sys.path.insert(0, {str(ROOT)!r})\n"
             f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (130, "error: interrupted\n", "")


def test_a_program_that_imports_a_script_keeps_its_own_ctrl_c():
    program = "import signal, train; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr
