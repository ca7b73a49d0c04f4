"""What does not fit is refused before training: teachers, starting weights, images, batches, numbers at an end."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_runs import SMALL, start_training
from samples import Tiny

import experiment
import networks
import pruning
import train
import train_pruning
from engine import checkpoint, folders

STUDENT = [*SMALL, "--model", "lenet5-student", "--epochs", "1"]


@pytest.fixture
def untrained(monkeypatch):
    """Fail where a step of training is made."""
    monkeypatch.setattr(train, "train_step", lambda *arguments: pytest.fail("it trains"))


def saved(path, dataset, **architecture):
    """The path of a network of this architecture, as a run on `dataset` would write it."""
    checkpoint.save(path, {**checkpoint.network_of(networks.build(**architecture), architecture), "dataset": dataset})
    return path


GREY = {"num_classes": 10, "in_channels": 1}
MISFITS = [("mnist", {"name": "resnet8-4-6-9", **GREY}, ["1 channels", "3 channels"]),
           ("mnist", {"name": "lenet5", "size": 28, **GREY}, ["1 channels", "28 x 28", "32 x 32"]),
           ("digits", {"name": "lenet5", "size": 28}, ["28 x 28", "32 x 32"]),
           ("cifar100", {"name": "resnet8-4-6-9", "num_classes": 100}, ["100 classes", "10"]),
           ("cifar10", {"name": "lenet5-student"}, ["cifar10", "digits", "--force"])]


@pytest.mark.parametrize("flag", ["--teacher", "--start"])
@pytest.mark.parametrize(("dataset", "architecture", "told"), MISFITS)
def test_a_network_that_does_not_fit_is_refused(shell, untrained, tmp_path, flag, dataset, architecture, told):
    path = saved(tmp_path / "other.pt", dataset, **architecture)
    code, line = shell("train.py", *STUDENT, "--out", tmp_path / "run", flag, path)
    assert code == 2 and all(part in line for part in (str(path), "digits", *told)), line
    assert not (tmp_path / "run").exists()


def test_another_data_set_is_taken_where_it_is_forced(tmp_path):
    arguments = networks.architecture_of({**train.DEFAULTS, "dataset": "cifar10", "model": "lenet5-student"})
    path = saved(tmp_path / "other.pt", "cifar10", **arguments)
    run = start_training(tmp_path / "run", "--model", "lenet5-student", "--teacher", path, "--start", path, "--force")
    folders.let_go(run.out)
    assert run.teacher is not None and run.settings["force"]


def test_a_forced_teacher_is_taken_again_on_resuming(tmp_path, monkeypatch):
    path, real, taken = saved(tmp_path / "other.pt", "cifar10", name="lenet5-student"), experiment.load_teacher, []

    def load(given, *rest):
        taken.append(str(given))
        return real(given, *rest)
    monkeypatch.setattr(experiment, "load_teacher", load)
    train.main([*STUDENT, "--teacher", str(path), "--force", "--out", str(tmp_path / "run")])
    train.main(["--resume", "--out", str(tmp_path / "run")])
    assert taken == [str(path)] * 2


def test_images_that_the_network_does_not_take_are_refused():
    """Cifar-quick is of 32 pixels; batch norm cannot tell a variance of one number."""
    with pytest.raises(ValueError, match="cifar-quick cannot train on batches of 4 images of 1x28x28"):
        networks.check_batch(networks.build("cifar-quick", in_channels=1), "cifar-quick", 4, (1, 28, 28))
    model = networks.build("resnet18", groups=8)
    before = checkpoint.weights_of(model)
    with pytest.raises(ValueError, match="resnet18 cannot train on batches of 1 images of 3x8x8.*--batch-size"):
        networks.check_batch(model, "resnet18", 1, (3, 8, 8))
    networks.check_batch(model, "resnet18", 2, (3, 8, 8))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items()), "nor is it run"


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "wrn-10-1", "mobilenet", "cifar-quick", "lenet5",
                                  "lenet5-student"])
def test_a_batch_that_fits_is_let_pass(name):
    networks.check_batch(networks.build(name), name, 2, (3, 32, 32))


# ---- pruning that could not be

ROUNDS = [*SMALL, "--model", "lenet5-student", "--epochs", "1", "1", "--batch-size", "16"]


@pytest.mark.parametrize("flags, told", [
    ("--sparsity 0.99 --minimum-density 0.5", ["sparsity 0.99", "minimum density of 0.5", "lower one of them"]),
    ("--epochs 1 1 1 --sparsity 0.4 0.4 --minimum-density 0.5", ["sparsity 0.4", "minimum density of 0.5"]),
    ("--sparsity 0.5 --minimum-density 1", ["minimum density of 1"]),
    ("--sparsity 0.8 --minimum-density 0.5 --pruning polynomial", ["sparsity 0.8", "minimum density of 0.5"]),
    ("--sparsity 0.8 --minimum-density 0.5 --pruning constant", ["sparsity 0.8", "minimum density of 0.5"]),
    ("--sparsity 0.5 --exclude ALL", ["every layer is excluded"]),
    ("--epochs 1 --sparsity 0.5 --pruning polynomial --batch-size 32", ["--pruning polynomial", "one"]),
    ("--pruning morphnet --morph-budget 1e-6 --model resnet8-4-6-9", ["budget", "below"]),
    ("--epochs 1 --pruning l1_cycle --cycle CYCLE", ["'nowhere' cannot lose filters"]),
])
def test_pruning_that_would_fail_is_refused_before_training(shell, untrained, tmp_path, flags, told):
    (tmp_path / "cycle.json").write_text(json.dumps({"layers": ["nowhere"]}))
    layers = [name for name, module in networks.build("lenet5-student").named_modules() if hasattr(module, "weight")]
    given = [word for flag in flags.split() for word in {"ALL": layers, "CYCLE": [tmp_path / "cycle.json"]}.get(
        flag, [flag])]
    code, line = shell("train_pruning.py", *ROUNDS, "--out", tmp_path / "run", *given)
    assert code == 2 and all(part in line for part in told), line
    assert not (tmp_path / "run").exists()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 0.99), min_size=1, max_size=3), st.floats(0, 1), st.sampled_from(["remaining", "all"]),
       st.sets(st.sampled_from(["conv1", "depth", "conv2"])))
def test_counting_refuses_exactly_what_ranking_refuses(sparsities, density, of, exclude):
    model, masks = Tiny(), None

    def refusal(function):
        try:
            function()
        except ValueError as problem:
            return str(problem)

    def rank():
        nonlocal masks
        for sparsity in sparsities:
            masks = pruning.global_masks(model, sparsity, masks, density, exclude, of=of)
    with torch.device("meta"):
        counted = Tiny()
    assert refusal(lambda: pruning.check_sparsities(counted, sparsities, None, density, exclude, of)) == refusal(rank)


@pytest.mark.parametrize("name, value", [("finetuning_epochs", 1.5), ("round_to", 2.5), ("finetuning_epochs", 1e400)])
def test_epochs_of_a_cycle_are_whole(shell, untrained, tmp_path, name, value):
    (tmp_path / "cycle.json").write_text(json.dumps({name: value}))
    code, line = shell("train_pruning.py", *ROUNDS, "--pruning", "l1_cycle", "--cycle", tmp_path / "cycle.json",
                       "--out", tmp_path / "run")
    assert code == 2 and name in line and "whole number" in line


# ---- both ends of what is accepted

@pytest.mark.parametrize("flags", [
    "--momentum 0", "--momentum 1", "--batch-size 1", "--batch-size 32", "--lr 1e-12", "--weight-decay 0", "--pad 0",
    "--pad 16", "--label-smoothing 0", "--label-smoothing 1", "--ema-decay 0", "--ema-decay 1",
    "--limit 2 --batch-size 2", "--mixing mixup --mix-alpha 0", "--mixing mixup --mix-alpha 1e-320",
    "--mixing mixup --mix-alpha 1.7e308",
    "--mixing cutmix --mix-alpha 1e-320 --mix-per-sample", "--mixing cutmix --mix-alpha 1.7e308 --mix-per-sample",
    "--mixing cutmix --mix-probability 0", "--mixing cutmix --mix-probability 1", "--seed 9223372036854775807",
    "--temperature 1e-3", "--temperature 1e3", "--distillation-weight 0", "--distillation-weight 1",
    "--weights lsq --weight-bits 1 --activation-bits 1", "--weights lsq --weight-bits 8 --activation-bits 8"])
def test_training_at_an_end_of_the_accepted_range(flags, tmp_path):
    teacher = saved(tmp_path / "teacher.pt", "digits", name="lenet5-student")
    taught = ["--teacher", str(teacher)] if "temperature" in flags or "distillation" in flags else []
    train.main([*STUDENT, "--lr", "0.01", *taught, *flags.split(), "--out", str(tmp_path / "run")])
    state = checkpoint.read(tmp_path / "run" / "last.pt")
    assert len(state["history"]) == 1 and all(tensor.isfinite().all() for tensor in state["weights"].values())


def test_no_momentum_is_plain_descent(tmp_path):
    """One step without momentum, decay or mixing: w - rate g."""
    run = start_training(tmp_path / "run", "--model", "lenet5-student", "--momentum", 0, "--weight-decay", 0,
                         "--mixing", "none", "--lr", 0.5)
    folders.let_go(run.out)
    train.begin_round(run)
    assert [group["nesterov"] for group in run.optimizer.param_groups] == [False]
    before = {name: tensor.detach().clone() for name, tensor in run.model.named_parameters()}
    rate = run.optimizer.param_groups[0]["lr"]
    images, labels = next(iter(run.validation))
    train.train_step(run, images, labels, 0)
    for name, tensor in run.model.named_parameters():
        torch.testing.assert_close(tensor.detach(), before[name] - rate * tensor.grad)


@pytest.mark.parametrize("flags", [
    "--sparsity 0", "--sparsity 0.99 --minimum-density 0", "--sparsity 0 --minimum-density 1",
    "--pruning constant --sparsity 0.5 --prune-begin 0 --prune-end 1",
    "--pruning polynomial --sparsity 0.5 --prune-begin 0 --prune-end 1e-9",
    "--pruning filters --epochs 1 --filter-threshold 0 --filter-interval 1 --filter-stop 0",
    "--pruning filters --epochs 1 --filter-threshold 0.999 --filter-interval 1 --filter-stop 1",
    "--pruning filters --epochs 1 --filter-threshold 1e300 --no-filter-relative --filter-interval 1 --filter-stop 1"])
def test_pruning_at_an_end_of_the_accepted_range(flags, tmp_path):
    train_pruning.main([*ROUNDS, *flags.split(), "--out", str(tmp_path / "run")])
    assert networks.load_network(tmp_path / "run" / "model.pt")
