"""Losses that are not finite, memory and disk that run out: one line, and the last good checkpoint is whole."""
import os
import re
from types import SimpleNamespace

import pytest
import torch
from sample_runs import SMALL, run_script, start_training

import train
from engine import checkpoint, schedules


def test_diverging_validation_is_not_saved(shell, tmp_path):
    """One step an epoch: the first loss is finite, what it leads to is not."""
    code, line = shell("train.py", *SMALL, "--out", tmp_path / "run", "--epochs", 3, "--lr", 1e12)
    assert code == 1 and "not finite" in line and "last good checkpoint: none yet" in line
    assert not list((tmp_path / "run").glob("*.pt"))


def test_diverging_run_from_the_shell(tmp_path):
    code, line = run_script("train.py", *SMALL, "--limit", 64, "--out", tmp_path / "run", "--lr", "1e30", "--epochs", 2)
    assert code == 1
    assert re.search(r"not finite: epoch 1, step 2, learning rate \S+; last good checkpoint: none yet; .*--lr", line)
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, value):
    run, real = start_training(tmp_path / "run", "--epochs", 2, "--lr", 0.125), train.save

    def save_then_poison(run):
        real(run)
        run.model.linear.bias.data[0] = value
        poisoned.update({name: tensor.clone() for name, tensor in run.model.named_parameters()},
                        files={path.name: path.read_bytes() for path in run.out.iterdir()})
    poisoned = {}
    monkeypatch.setattr(train, "save", save_then_poison)
    with pytest.raises(RuntimeError) as problem:
        train.fit(run)
    rate = 0.125 * schedules.one_cycle(1 / 2)
    assert f"not finite: epoch 2, step 1, learning rate {rate:.4g}; last good checkpoint: {run.out}/last.pt" in str(
        problem.value)
    assert poisoned.pop("files") == {path.name: path.read_bytes() for path in run.out.iterdir()}
    assert all(torch.equal(tensor.nan_to_num(), poisoned[name].nan_to_num())
               for name, tensor in run.model.named_parameters()), "no update"


@pytest.mark.parametrize("loss, gradient, refused", [(1.0, 1.0, False), (1.0, float("inf"), True),
                                                     (1.0, float("nan"), True), (float("inf"), 1.0, True)])
def test_gradient_that_is_not_finite_is_refused_too(tmp_path, loss, gradient, refused):
    model = torch.nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 0.5), torch.tensor([0.5, gradient])
    run = SimpleNamespace(model=model, out=tmp_path, history=[], optimizer=torch.optim.SGD(model.parameters(), 0.1))
    if refused:
        with pytest.raises(RuntimeError, match="epoch 1, step 8, learning rate 0.1; last good checkpoint: none yet"):
            train.refuse_nonfinite(run, torch.tensor(loss), 7)
    else:
        train.refuse_nonfinite(run, torch.tensor(loss), 7)


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2.00 GiB",
                                     "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"])
def test_out_of_memory_suggests_half_the_batch(shell, tmp_path, monkeypatch, message):
    monkeypatch.setattr(train, "train_step", lambda *arguments: (_ for _ in ()).throw(RuntimeError(message)))
    code, line = shell("train.py", *SMALL, "--out", tmp_path / "run", "--epochs", 1)
    assert code == 1 and line == "out of memory with --batch-size 32; try 16"


@pytest.mark.parametrize("name", ["last.pt.partial", "history.csv.partial"])
def test_disk_that_fills_up_while_training(shell, tmp_path, monkeypatch, name):
    """The second save finds the disk full; the checkpoint of the first is whole."""
    real = train.save

    def save(run):
        if len(run.history) == 2:
            (run.out / name).unlink(missing_ok=True)
            (run.out / name).symlink_to("/dev/full")
        real(run)
    monkeypatch.setattr(train, "save", save)
    code, line = shell("train.py", *SMALL, "--out", tmp_path / "run", "--epochs", 2)
    assert code == 1, "the run failed: its flags were right"
    assert name.removesuffix(".partial") in line and "No space left on device" in line
    assert len(checkpoint.read(tmp_path / "run" / "last.pt")["history"]) == 1
    assert not list((tmp_path / "run").glob("*.partial"))
