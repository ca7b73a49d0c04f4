"""Distillation: the loss by hand, the teacher untouched, and a student that learns from it alone."""
import math
import shlex

import pytest
import torch
import torch.nn.functional as F
from sample_runs import run_in_parts, same
from torch import nn

import experiment
import networks
import train
import train_pruning
from engine import checkpoint
from set_distillation_train import distilled, teach

SHORT = shlex.split("--dataset digits --device cpu --compile off --mixing none --model lenet5-student --lr 0.03 "
                    "--batch-size 32")


@pytest.mark.parametrize("temperature, weight", [(1.0, 1.0), (4.0, 0.9), (2.5, 0.0)])
def test_the_loss_is_hintons(temperature, weight):
    logits, teacher = torch.randn(6, 10), torch.randn(6, 10)
    p, q = (torch.softmax(x / temperature, 1) for x in (teacher, logits))
    divergence = sum((p[n, k] * math.log(p[n, k] / q[n, k])).item() for n in range(6) for k in range(10)) / 6
    expected = weight * temperature**2 * divergence + (1 - weight) * 1.25
    assert distilled(torch.tensor(1.25), logits, teacher, temperature, weight).item() == pytest.approx(expected,
                                                                                                      rel=1e-5)


def test_matching_the_teacher_alone_has_the_gradient_of_its_probabilities():
    logits, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    distilled(torch.tensor(0.0), logits, teacher, 1.0, 1.0).backward()
    torch.testing.assert_close(logits.grad, (torch.softmax(logits, 1) - torch.softmax(teacher, 1)).detach() / 4)


def test_the_teacher_gives_no_gradient_and_keeps_its_statistics():
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).train()
    before = teacher[1].running_mean.clone()
    found = teach(teacher, torch.randn(5, 3, 2, 2))
    assert not found.requires_grad and torch.equal(teacher[1].running_mean, before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """LeNet-5, trained on digits."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train.main([*SHORT, "--model", "lenet5", "--epochs", "8", "--out", str(out)])
    return out / "model.pt"


def test_a_student_learns_from_the_teacher_alone(teacher, tmp_path):
    """Labels without weight: what it knows of the digits it has from the teacher, mixed images included."""
    train.main([*SHORT, "--epochs", "8", "--teacher", str(teacher), "--distillation-weight", "1", "--mixing", "cutmix",
                "--out", str(tmp_path / "run")])
    state = checkpoint.read(tmp_path / "run" / "last.pt")
    assert state["history"][-1]["validation_accuracy"] > 80
    assert not any("teacher" in name for name in state["weights"])


def test_a_step_mixes_both_losses_and_leaves_the_teacher(teacher, tmp_path):
    losses = {}
    for weight in ("0", "0.5", "1"):
        run = experiment.start(train.__file__, "", train.SETTINGS, train.RECIPES, [
            *SHORT, "--epochs", "1", "--teacher", str(teacher), "--distillation-weight", weight, "--out",
            str(tmp_path / weight)])
        experiment.begin_round(run)
        before = checkpoint.weights_of(run.teacher) if weight != "0" else None
        images, labels = next(iter(run.validation))
        losses[weight] = train.train_step(run, images[:32], labels[:32], 0)[0].item()
        assert same(before, checkpoint.weights_of(run.teacher)) if before else run.teacher is None
    assert losses["0.5"] == pytest.approx((losses["0"] + losses["1"]) / 2, rel=1e-4)
    model, _ = networks.load_network(teacher)
    torch.manual_seed(0)
    student = networks.build("lenet5-student")
    with torch.no_grad():
        alone = F.cross_entropy(student(images[:32]), labels[:32], label_smoothing=0.1).item()
    assert losses["0"] == pytest.approx(alone, rel=1e-4) and not model.training


def test_it_goes_on_bit_for_bit(teacher, tmp_path):
    flags = [*SHORT, "--limit", "64", "--teacher", str(teacher), "--epochs", "1", "1", "--sparsity", "0.5"]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(tmp_path / "parts")]), tmp_path / "parts", 2)
    assert same(*(checkpoint.read(tmp_path / out / "model.pt") for out in ("whole", "parts")))


def test_a_teacher_that_does_not_fit_is_refused(teacher, tmp_path):
    flags = [*SHORT, "--epochs", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at nowhere.pt"):
        train.main([*flags, "--teacher", "nowhere.pt"])
    architecture = {"name": "lenet5-student", "num_classes": 7}
    checkpoint.save(tmp_path / "seven.pt", checkpoint.network_of(networks.build(**architecture), architecture))
    with pytest.raises(ValueError, match="seven.pt tells 7 classes apart, digits has 10"):
        train.main([*flags, "--teacher", str(tmp_path / "seven.pt")])
    with pytest.raises(ValueError, match="--temperature 0"):
        train.main([*flags, "--teacher", str(teacher), "--temperature", "0"])
