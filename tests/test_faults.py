"""What the user sees of a fault: one line, the way out, the right exit code, and nothing that trained or was saved."""
import csv
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from sample_runs import ROOT, SMALL, run_script, start_training

import experiment
import train
from engine import commandline


@pytest.fixture
def untrained(monkeypatch):
    """Fail where a step of training is made."""
    monkeypatch.setattr(train, "train_step", lambda *arguments: pytest.fail("it trains"))


def is_empty(folder):
    """Whether nothing was written there."""
    return not folder.exists() or not any(folder.iterdir())


# ---- flags out of range

@pytest.mark.parametrize("flags, told", [
    ("--sparsity 1 0.7", ["sparsity 1 is ambiguous", "[0, 1)"]),
    ("--sparsity 0.7 1.0", ["sparsity 1 is ambiguous", "[0, 1)"]),
    ("--sparsity 1.5 0.7", ["sparsity 1.5 is outside [0, 1)"]),
    ("--sparsity 0.7 -0.1", ["sparsity -0.1 is outside [0, 1)"]),
    ("--sparsity nan 0.7", ["sparsity nan is outside [0, 1)"]),
    ("--sparsity inf 0.7", ["sparsity inf is outside [0, 1)"]),
    ("--sparsity much 0.7", ["--sparsity", "'much'"]),
    ("--sparsity", ["--sparsity"]),
    ("--epochs 1 1", ["[1, 1]", "[0.7, 0.7]"]),
    ("--epochs 1 1 1 1", ["[1, 1, 1, 1]", "[0.7, 0.7]"]),
    ("--epochs 1 --sparsity 0.5", ["[1]", "[0.5]"]),
    ("--epochs 1 0 1", ["--epochs 1 0 1", "at least 1"]),
    ("--epochs -2 1 1", ["--epochs -2 1 1", "at least 1"]),
    ("--epochs 1.5 1 1", ["--epochs", "'1.5'"]),
    ("--minimum-density 1.5", ["--minimum-density 1.5", "at least 0 and at most 1"]),
    ("--minimum-density nan", ["--minimum-density nan", "at least 0 and at most 1"]),
])
def test_rounds_out_of_range(shell, untrained, tmp_path, flags, told):
    code, line = shell("train_pruning.py", *SMALL, "--out", tmp_path / "run", *flags.split())
    assert code == 2
    assert all(part in line for part in told), line
    assert is_empty(tmp_path / "run")


@pytest.mark.parametrize("flags, told", [
    ("--epochs 0", ["--epochs 0", "at least 1"]),
    ("--epochs 1 1", ["[1, 1]"]),
    ("--batch-size 0", ["--batch-size 0", "at least 1"]),
    ("--batch-size -8", ["--batch-size -8", "at least 1"]),
    ("--batch-size many", ["--batch-size", "'many'"]),
    ("--batch-size 64", ["64", "32 training images", "at most 32"]),
    ("--batch-size 9999 --limit 9999", ["9999", "training images"]),
    ("--recipe published --limit 16", ["32", "16"]),
    ("--limit 0", ["--limit 0", "at least 2"]),
    ("--limit 1", ["--limit 1", "at least 2"]),
    ("--limit -5", ["--limit -5", "at least 2"]),
    ("--lr 0", ["--lr 0", "at least"]),
    ("--lr -1", ["--lr -1", "at least"]),
    ("--lr nan", ["--lr nan", "at least"]),
    ("--lr inf", ["--lr inf", "at least"]),
    ("--momentum 1.5", ["--momentum 1.5", "at most 1"]),
    ("--weight-decay -1", ["--weight-decay -1", "at least 0"]),
    ("--label-smoothing 1.5", ["--label-smoothing 1.5", "at most 1"]),
    ("--mix-probability -0.5", ["--mix-probability -0.5", "at least 0"]),
    ("--mix-alpha nan", ["--mix-alpha nan"]),
    ("--mix-alpha inf", ["--mix-alpha inf"]),
    ("--ema-decay 1.1", ["--ema-decay 1.1", "at most 1"]),
    ("--seed -1", ["--seed -1", "at least 0"]),
    ("--seed 99999999999999999999", ["--seed", "at most"]),
    ("--groups 3", ["groups 3", "1, 2, 4, 8, 16, 32 or 64"]),
    ("--groups 0", ["groups 0", "1, 2, 4, 8, 16, 32 or 64"]),
    ("--groups -8", ["groups -8", "1, 2, 4, 8, 16, 32 or 64"]),
    ("--model vgg", ["--model", "'vgg'", "resnet18", "resnet152"]),
    ("--mixing cutoff", ["--mixing", "'cutoff'", "cutmix"]),
    ("--dataset imagenet", ["--dataset", "'imagenet'", "cifar10", "digits"]),
    ("--device cuda:99", ["device 'cuda:99' is absent", "cpu"]),
    ("--device toaster", ["device 'toaster' is absent", "cpu"]),
    ("--speed 3", ["--speed 3", "--help"]),
])
def test_flags_out_of_range(shell, untrained, tmp_path, flags, told):
    code, line = shell("train.py", *SMALL, "--out", tmp_path / "run", *flags.split())
    assert code == 2
    assert all(part in line for part in told), line
    assert is_empty(tmp_path / "run")


def test_absent_cuda_is_told_with_what_there_is(shell, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, line = shell("train.py", *SMALL, "--out", tmp_path / "run", "--device", "cuda")
    assert code == 2 and "device 'cuda' is absent; present: " in line and line.endswith("cpu")


def test_a_driver_that_is_too_old_is_no_gpu(shell, untrained, tmp_path, monkeypatch, recwarn, capsys):
    """The driver counts its GPU, torch says that it cannot use it, in a warning of many lines."""
    def is_available():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11080). "
                      "Please update your GPU driver by downloading", stacklevel=2)
        return False
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    code, line = shell("train.py", *SMALL, "--out", tmp_path / "run", "--device", "cuda")
    assert code == 2 and line.endswith("present: cpu (CUDA initialization: The NVIDIA driver on your system is too "
                                       "old)")
    assert commandline.pick_device("auto") == torch.device("cpu") and not recwarn.list
    assert capsys.readouterr().err == ("note: no GPU is used (CUDA initialization: The NVIDIA driver on your system is "
                                       "too old)\n")


def test_compile_on_without_a_compiler(shell, untrained, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    code, line = shell("train.py", *SMALL, "--out", tmp_path / "run", "--compile", "on")
    assert code == 2 and "compiler" in line and "g++" in line


def test_debug_shows_the_traceback_before_the_line(shell, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    with pytest.raises(SystemExit) as ended:
        commandline.command(lambda argv: experiment.check_settings(train.SETTINGS, {**train.DEFAULTS, "lr": 0}))
    errors = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert errors[0].startswith("Traceback") and errors[-1].startswith("error: --lr 0")


def test_a_message_of_many_lines_is_one_line(shell):
    def fail(argv):
        raise RuntimeError("first\n  second\n\nthird")
    assert shell(fail) == (1, "first second third")


def test_an_error_without_a_message_is_named(shell):
    def fail(argv):
        raise NotImplementedError
    assert shell(fail) == (1, "NotImplementedError")


# ---- folders

@pytest.mark.parametrize("place, reason", [("file", "File exists"), ("file/below", "Not a directory"),
                                           ("/proc/nothing/run", "No such file")])
def test_output_that_cannot_be_written(shell, untrained, tmp_path, place, reason):
    (tmp_path / "file").write_text("precious")
    out = tmp_path / place
    code, line = shell("train.py", *SMALL, "--out", out)
    assert code == 2
    assert str(out) in line and reason in line
    assert (tmp_path / "file").read_text() == "precious"


def test_data_folder_that_cannot_be_written(shell, untrained, tmp_path):
    (tmp_path / "file").write_text("")
    code, line = shell("train.py", "--data", tmp_path / "file" / "data", "--out", tmp_path / "run")
    assert code == 2 and str(tmp_path / "file" / "data") in line and "Not a directory" in line
    assert is_empty(tmp_path / "run")


def test_folder_with_a_file_of_somebody_else_is_left_alone(shell, untrained, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    code, line = shell("train.py", *SMALL, "--out", tmp_path)
    assert code == 2 and str(tmp_path) in line
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.fixture
def no_network(monkeypatch):
    """Every download goes to a port of this machine where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield


@pytest.mark.parametrize("dataset, wanted", [
    ("cifar10", ["cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"]),
    ("cifar100", ["cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"]),
    ("mnist", ["train-images-idx3-ubyte.gz"]),
])
def test_no_data_and_no_network(shell, untrained, no_network, tmp_path, dataset, wanted):
    code, line = shell("train.py", "--dataset", dataset, "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert code == 2
    for part in (str(tmp_path / "data" / f"{dataset}.npz"), "download failed", "--dataset digits", *wanted):
        assert part in line, line
    assert is_empty(tmp_path / "run")


# ---- torchvision that does not fit

MISFIT = "operator torchvision::nms does not exist"


def test_misfit_torchvision_names_both_versions_and_the_command(tmp_path):
    (tmp_path / "fake" / "torchvision").mkdir(parents=True)
    (tmp_path / "fake" / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({MISFIT!r})")
    code, line = run_script("train.py", *SMALL, "--recipe", "published", "--out", tmp_path / "run",
                            PYTHONPATH=str(tmp_path / "fake"))
    assert code == 1
    for part in (f"torch {torch.__version__}", "torchvision ", MISFIT, "pip install"):
        assert part in line, line


def test_absent_torchvision_matters_only_where_it_is_used(shell, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, line = shell("train.py", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert code == 1 and "torchvision" in line and "pip install" in line
    assert start_training(tmp_path / "run", "--epochs", 1) is not None


# ---- the way out

def test_nothing_to_resume_from_the_shell(tmp_path):
    code, line = run_script("train_pruning.py", "--resume", "--out", tmp_path / "run")
    assert code == 2 and f"no checkpoint at {tmp_path}/run/last.pt" in line
    assert not (tmp_path / "run").exists()


def test_sparsity_from_the_shell(tmp_path):
    code, line = run_script("train_pruning.py", *SMALL, "--out", tmp_path / "run", "--sparsity", 1, 0.7)
    assert code == 2 and "ambiguous" in line
    assert not (tmp_path / "run").exists()


def test_a_good_run_has_no_error_line(tmp_path):
    done = subprocess.run([sys.executable, "train.py", *SMALL, "--out", str(tmp_path / "run"), "--epochs", "1"],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    rows = list(csv.DictReader((tmp_path / "run" / "history.csv").read_text().splitlines()))
    assert len(rows) == 1 and "model.pt" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    program = [sys.executable, str(ROOT / "profil.py"), "--model", "resnet152"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        shown = process.stderr.read()
    assert process.returncode in (0, 1) and shown == ""
