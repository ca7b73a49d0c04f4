"""A teacher asked once: its views, its answers, what they cost, and that a run with them resumes."""
import shlex

import pytest
import torch
from sample_runs import assert_same_run, history_of, run_in_parts
from samples import SMALL, random_data

import cifar10
import models
import set_distillation_train
import train
import train_pruning
from engine import operations
from set_distillation_train import ask, teach

FLAGS = shlex.split("--dataset digits --limit 64 --batch-size 32 --compile off --device cpu --mixing mixup "
                    "--mix-probability 1 --epochs 2 1 --sparsity 0.5 --model resnet8-4-4-4 --teacher-views 3")


def batches_of(kind=SMALL, generator=0, **arguments):
    data = random_data(kind)
    return cifar10.Batches(data.x_train, data.y_train, 10, kind, pad=2,
                           generator=torch.Generator().manual_seed(generator), **arguments)


class Mean(torch.nn.Module):
    """A teacher that tells images apart: the mean of their left half by channel, and which channel is brightest."""

    def forward(self, images):
        return images[:, :, :, :5].mean((2, 3))


@pytest.mark.parametrize("alternating", [False, True])
def test_answers_are_of_the_views_that_are_shown(alternating):
    batches = batches_of(alternating=alternating)
    found = ask(Mean(), batches, 4, torch.autocast("cpu", enabled=False))
    assert found["views"].shape == (40, 4, 3) and found["answers"].shape == (40, 4, 3)
    batches.views, batches.answers = found["views"], found["answers"]
    for images, labels in batches:
        torch.testing.assert_close(teach(Mean(), images), batches.answer, rtol=0, atol=2e-3)
        assert len(labels) == len(images) == 10
    moved = found["views"].flatten(0, 1)
    assert moved[:, :2].abs().max() == 2 and set(moved[:, 2].tolist()) == {0, 1}
    if alternating:
        assert torch.equal(found["views"][:, :, 2].sum(1), torch.full((40,), 2))


def test_only_chosen_images_are_asked_about():
    batches = batches_of(chosen=torch.arange(0, 40, 2).numpy())
    assert not ask(Mean(), batches, 2, torch.autocast("cpu", enabled=False))["answers"][1::2].any()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train.main("--dataset digits --limit 64 --batch-size 32 --epochs 1 --model lenet5 --mixing none --compile off "
               f"--device cpu --out {folder}".split())
    return folder / "model.pt"


def test_a_run_asks_once_and_resumes_to_the_bit(teacher, tmp_path, monkeypatch):
    calls, real = [], set_distillation_train.teach
    monkeypatch.setattr(set_distillation_train, "teach", lambda *given: calls.append(given) or real(*given))
    monkeypatch.setattr(train, "teach", None)                # no step may ask
    whole, parts, flags = tmp_path / "whole", tmp_path / "parts", [*FLAGS, "--teacher", str(teacher)]
    train_pruning.main([*flags, "--out", str(whole)])
    assert len(calls) == 3
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(parts)]), parts, 3)
    assert len(calls) == 6
    assert_same_run(whole, parts)
    macs, asked = (operations.macs_of(models.build(name), (3, 32, 32)) for name in ("resnet8-4-4-4", "lenet5"))
    spent = [float(row["pflop"]) for row in history_of(whole)]
    first = operations.step_pflop(macs, 64) + operations.step_pflop(0, 3 * 64, asked)
    assert spent == pytest.approx([first + number * operations.step_pflop(macs, 64) for number in range(3)], abs=2e-6)


def test_logits_are_mixed_as_the_images_are(teacher, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "distilled", lambda loss, logits, taught, *rest: seen.update(taught=taught) or loss)
    monkeypatch.setitem(train.MIXINGS, "mixup", lambda images, targets, *rest: (images, 0.25 * targets))
    train_pruning.main([*FLAGS, "--teacher", str(teacher), "--out", str(tmp_path / "a"), "--epochs", "1", "1"])
    answers = torch.load(tmp_path / "a" / "views.pt", weights_only=True)["answers"].float()
    known = {tuple(row) for row in (0.25 * answers.flatten(0, 1)).tolist()}
    assert {tuple(row) for row in seen["taught"].tolist()} <= known


@pytest.mark.parametrize("flags", [[], ["--teacher", "x", "--recipe", "published"]])
def test_views_need_a_teacher_and_our_own_batches(flags):
    with pytest.raises((ValueError, FileNotFoundError), match="teacher"):
        train.main([*["--dataset", "digits", "--teacher-views", "4"], *flags])
