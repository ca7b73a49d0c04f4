"""Two processes of torchrun are one with the same batches: within rounding, with one set of files and one error line.

This file is also the program that torchrun starts: `torchrun --nproc-per-node 2 tests/test_parallel.py FOLDER`.
"""
import atexit
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT
from sample_runs import Stop, same, stop_after_a_save

import experiment
import train
import train_pruning
from engine import checkpoint, commandline, parallel

pytestmark = pytest.mark.usefixtures("one_thread")
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])      # a script in a folder finds neither by itself
SMALL = shlex.split("--dataset digits --limit 64 --batch-size 16 --compile off --device cpu --lr 0.05")
RUNS = {
    "rounds": "--model lenet5 --epochs 2 1 2 --sparsity 0.7 0.7",
    "gradual": "--model lenet5 --epochs 3 --pruning polynomial --prune-frequency 1 --sparsity 0.8 --schedule plateau "
               "--mixing mixup --mix-per-sample",
    "stochastic": "--model lenet5 --epochs 1 1 --sparsity 0.5 --weights binary-stochastic --averaging none",
    "batch norm": "--model resnet20 --limit 32 --epochs 1 1 --sparsity 0.7 --recalibrate --mix-probability 1 "
                  "--lr 0.0002",            # small steps: rounding differs by processor and grows with every one
    "Muon": "--model lenet5 --epochs 1 1 --sparsity 0.5 --optimizer muon --keep-norm --muon-lr 0.001 --lr 0.001 "
            "--flips alternating",      # its updates have 8 bits, so rounding is larger
}
RESUMED = "--model lenet5 --epochs 2 1 --sparsity 0.7"
ENDLESS = "--model lenet5 --epochs 30 1 --sparsity 0.7 --lr 0.002"
REFUSED = {"--batch-size 15": "--batch-size 15 is no multiple of 2 processes",
           "--pruning filters --epochs 2": "--pruning filters shrinks the network, which takes one process",
           "--pruning l1_cycle --epochs 2": "--pruning l1_cycle shrinks the network",
           "--pruning morphnet --epochs 1 1": "--pruning morphnet shrinks the network",
           "--compile on": "--compile on takes one process"}


def trained(flags, out):
    """The state of a run of train_pruning.py after its last round, with what its files do not hold."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pruning, "finish", lambda run: (runs.append(run), experiment.finish(run)))
        train_pruning.main([*flags, "--out", str(out)])
    run, = runs
    return {name: part for name, part in experiment.state_of(run).items() if name not in ("settings", "history")}


# ---- what each of the two processes does

def everything(folder):
    """Train and refuse; each rank writes what it found to rank0.pt or rank1.pt, and what threads it ends with."""
    rank = dist.get_rank()
    atexit.register(lambda: (folder / f"threads{rank}").write_text(" ".join(names_of_threads())))
    found = {name: trained([*SMALL, *shlex.split(flags)], folder / name) for name, flags in RUNS.items()}
    found["resumed"] = trained(["--resume"], folder / "resumed")
    found["refused"] = {flags: refusal(train_pruning.main, [*SMALL, *shlex.split(flags), "--out", f"{folder}/never"])
                        for flags in REFUSED}
    found["another run"] = refusal(train_pruning.main, [*SMALL, "--out", f"{folder}/rounds"], agree=True)
    found["poisoned"] = refusal(poisoned, folder / "poisoned")
    found["threads"] = names_of_threads()
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, 1.0)
    torch.nn.init.constant_(layer.bias, 0.0)
    found["no drift"] = refusal(parallel.refuse_drift, [layer])
    torch.nn.init.constant_(layer.bias, 1e-6 * rank)
    found["drift"] = refusal(parallel.refuse_drift, [layer])
    found["layer"] = batch_norm_of(*parallel.own_part(*layer_batch()))
    torch.save(found, folder / f"rank{rank}.pt")


def names_of_threads():
    """The names of this process's threads, those of libraries too; nothing where there is no /proc."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def refusal(function, argument, agree=False):
    """The message of the ValueError or RuntimeError that `function` raises; agree: rank 0's, where it alone checks."""
    if agree and dist.get_rank():
        return parallel.agreed(None) and parallel.agreed(None)
    try:
        function(argument)
        message = ""
    except (ValueError, RuntimeError) as problem:
        message = str(problem)
    return parallel.agreed(message) if agree else message


def poisoned(out):
    """Train where one pixel of the second rank's part is not a number."""
    run = experiment.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                           [*SMALL, "--model", "lenet5", "--mixing", "none", "--out", str(out)])
    experiment.begin_round(run)
    images, labels = next(iter(run.train))
    images[-1, 0, 0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    try:
        train.train_step(run, images, labels, 0)
    finally:
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.named_parameters()), "no update"


def layer_batch():
    """A batch whose halves have other means, and the weights of a sum of its normalised values."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 4, 4, generator=draws) * 3 + torch.arange(8.0).view(8, 1, 1, 1)
    return images, torch.randn(8, 3, 4, 4, generator=draws)


def batch_norm_of(images, slopes):
    """What batch norm makes of this part of a batch, its gradients and its running statistics."""
    layer = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
    images.requires_grad_()
    with parallel.whole_batch():
        output = layer(images)
    (output * slopes).sum().backward()
    evaluated = layer.eval()(images).detach()
    return {"output": output.detach(), "gradient": images.grad, "weight": layer.weight.grad, "bias": layer.bias.grad,
            "mean": layer.running_mean, "variance": layer.running_var, "count": layer.num_batches_tracked,
            "evaluated": evaluated}


def fail_alone(out):
    """Train, with an error in the second step of the second rank."""
    real = train.train_step

    def step(run, images, labels, number):
        if number == 1 and dist.get_rank() == 1:
            raise RuntimeError("a broken second process")
        return real(run, images, labels, number)
    train.train_step = step
    train_pruning.main([*SMALL, *shlex.split(RESUMED), "--out", str(out)])


# ---- fixtures

def torchrun(*arguments, folder=ROOT):
    """Two processes of a script, through torchrun."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             *map(str, arguments)], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH})


@pytest.fixture(scope="module")
def both(tmp_path_factory, one_thread):
    """What the two ranks found, the folder of their runs, what they printed."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(Stop):
            train_pruning.main([*SMALL, *shlex.split(RESUMED), "--out", str(folder / "resumed")])
    process = torchrun(__file__, "everything", folder)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return SimpleNamespace(ranks=[torch.load(folder / f"rank{rank}.pt") for rank in range(2)], folder=folder,
                           output=output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_thread):
    """The same runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {**RUNS, "resumed": RESUMED}
    return SimpleNamespace(folder=folder, runs={name: trained([*SMALL, *shlex.split(flags)], folder / name)
                                                for name, flags in runs.items()})


def history_of(out):
    return list(csv.DictReader((out / "history.csv").read_text().splitlines()))


def largest_difference(one, other):
    """The largest difference of two networks' tensors, as a share of each tensor's largest value or of 1."""
    return max(float((tensor.double() - other[name].double()).abs().max() / tensor.double().abs().max().clamp_min(1))
               for name, tensor in one.items())


# ---- two are one

@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_ranks_hold_the_same_bits(both, name):
    one, other = (found[name] for found in both.ranks)
    assert [part for part in one if not same(one[part], other[part])] == []
    assert one["masks"], "it has been pruned"


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_two_processes_are_one_within_rounding(both, alone, name):
    two, one = both.ranks[0][name], alone.runs[name]
    limit = 1e-4 if name in ("batch norm", "Muon") else 2e-5
    assert largest_difference(one["weights"], two["weights"]) < limit
    assert one["average"] is None or largest_difference(one["average"], two["average"]) < limit
    assert same(one["random"], two["random"]) and (one["round"], one["epoch"]) == (two["round"], two["epoch"])
    for ours, theirs in zip(history_of(both.folder / name), history_of(alone.folder / name), strict=True):
        for column in ("round", "epoch", "lr", "sparsity", "parameters"):
            assert ours[column] == theirs[column]
        for column in ("train_loss", "validation_loss"):
            assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=max(2e-4, limit))


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_masks_are_those_of_one_process(both, alone, name):
    assert same(both.ranks[1][name]["masks"], alone.runs[name]["masks"])


def test_batch_norm_is_that_of_the_whole_batch(both):
    images, slopes = layer_batch()
    whole, parts = batch_norm_of(images, slopes), [found["layer"] for found in both.ranks]
    for name in ("output", "gradient", "evaluated"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-5, atol=1e-5)
    for name in ("mean", "variance", "count"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-6, atol=1e-6)
    halves = [F.batch_norm(half, None, None, training=True) for half in images.detach().chunk(2)]
    assert not torch.allclose(torch.cat(halves), F.batch_norm(images.detach(), None, None, training=True), atol=0.1)


def test_one_process_of_many_prints_and_writes(both):
    for name in RUNS:
        assert sorted(os.listdir(both.folder / name)) == ["config.json", "history.csv", "last.pt", "model.pt",
                                                          "previous.pt"]
        assert both.output.count(f"{both.folder / name}/model.pt") == 2        # in one line, twice
    assert json.loads((both.folder / "rounds" / "config.json").read_text())["processes"] == 2
    assert both.output.count("pruned 70 % of the remaining weights") == 4      # rounds, resumed, batch norm
    assert "eager, 2 processes" in both.output


def test_no_thread_of_the_group_outlives_it(both):
    """One that ends while Python does aborts the process, now and then: what torchrun then reports is a failure."""
    for rank, found in enumerate(both.ranks):
        assert any("gloo" in name for name in found["threads"]) == os.path.exists("/proc/self/task")
        assert "gloo" not in (both.folder / f"threads{rank}").read_text()


# ---- refused, or ended by an error

@pytest.mark.parametrize("flags", REFUSED)
def test_refused_on_every_rank_before_anything_is_written(both, flags):
    for found in both.ranks:
        assert found["refused"][flags].startswith(REFUSED[flags])
    assert not (both.folder / "never").exists()


def test_folder_of_another_run_is_refused(both):
    assert "rounds holds another run" in both.ranks[0]["another run"]


def test_loss_that_is_not_finite_in_one_part_stops_all(both):
    messages = [found["poisoned"] for found in both.ranks]
    assert messages[0] == messages[1] and "not finite: epoch 1, step 1" in messages[0]


def test_ranks_that_drift_apart_are_told(both):
    for found in both.ranks:
        assert "different weights" in found["drift"] and found["no drift"] == ""


@pytest.mark.parametrize("device, wanted, local, count, told", [
    ("cuda", "auto", 1, 2, "2 processes need as many GPUs; present: 1; --device cpu"),
    ("cuda:1", "cuda:1", 0, 1, "--device cuda:1: several processes"), ("mps", "auto", 0, 1, "several processes train")])
def test_devices_that_cannot_be_shared(monkeypatch, device, wanted, local, count, told):
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    with pytest.raises(ValueError, match=told):
        parallel.own_device(torch.device(device), wanted)


def test_without_torchrun_nothing_is_done(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert parallel.together(train.main) is train.main
    model, loss, right = torch.nn.Linear(2, 2), torch.tensor(1.0), torch.tensor(2.0)
    assert parallel.average_gradients(model, loss, right) == (loss, right)
    images, labels = layer_batch()
    assert parallel.own_part(images, labels)[0] is images and parallel.leads() and parallel.ranks() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.together(train.main) is train.main


def error_lines(errors):
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def test_error_of_one_process_ends_all_with_one_line(tmp_path):
    process = torchrun(__file__, "fail_alone", tmp_path / "run")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert error_lines(errors) == ["error: a broken second process"]
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_interrupted_run_of_two_goes_on_in_one(tmp_path):
    """Ctrl-C as torchrun passes it on; the whole is what one process would have trained."""
    out = tmp_path / "run"
    process = torchrun("train_pruning.py", *SMALL, *shlex.split(ENDLESS), "--out", out)
    deadline = time.monotonic() + 300
    while not (out / "last.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    done = len(checkpoint.read(out / "last.pt")["history"])
    assert process.returncode == 1 and done < 31
    assert error_lines(errors) == [f"error: interrupted; {out}/last.pt holds {done} whole epochs, go on with: "
                                   f"python train_pruning.py --resume --out {out}"]
    two = trained(["--resume"], out)
    one = trained([*SMALL, *shlex.split(ENDLESS)], tmp_path / "alone")
    assert largest_difference(one["weights"], two["weights"]) < 1e-4
    assert same(one["random"], two["random"]) and len(history_of(out)) == 31


if __name__ == "__main__":
    commandline.command(parallel.together(lambda argv: globals()[argv[0]](Path(argv[1]))))
