"""Progressive resizing: sizes by progress, torchvision's pixels, what refuses it, and the loop that shows them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import run_in_parts, same
from torchvision.transforms import v2

import train
import train_pruning
from engine import checkpoint
from networks import build
from set_resizing_train import SMALLEST, check_resize, resized, share_of_work, side_of

FLAGS = ["--dataset", "digits", "--limit", "96", "--batch-size", "32", "--compile", "off"]


def test_images_are_small_until_their_share_of_the_round():
    assert [side_of(progress, 32, 20, 0.5) for progress in (0.0, 0.49, 0.5, 0.99)] == [20, 20, 32, 32]
    assert side_of(0.0, 32, None, 0.5) == 32


@given(st.integers(4, 31), st.floats(0, 1))
def test_work_is_the_mean_area_over_the_round(small, until):
    steps = 1000
    mean = sum((side_of(step / steps, 32, small, until) / 32) ** 2 for step in range(steps)) / steps
    assert share_of_work(32, small, until) == pytest.approx(mean, abs=1 / steps)
    assert share_of_work(32, None, until) == 1


def test_resizing_is_torchvisions():
    images = torch.rand(4, 3, 32, 32)
    assert torch.allclose(resized(images, 20), v2.functional.resize(images, [20, 20], antialias=True), atol=1e-6)
    assert resized(images, 32) is images


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "wrn-16-4", "mobilenet"])
def test_networks_that_average_take_small_images(name):
    more = {"groups": 8, "shuffle": True} if name == "resnet18" else {}
    model = build(name=name, **more).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_resize(model, (3, 32, 32), 20)
    assert model.training and same(before, dict(model.state_dict()))      # batch norm has not seen the zeros


@pytest.mark.parametrize("name", ["lenet5", "cifar-quick"])
def test_networks_that_flatten_are_refused(name):
    with pytest.raises(ValueError, match="32 x 32 pixels alone"):
        check_resize(build(name=name), (3, 32, 32), 20)


def test_the_smallest_size_that_a_network_takes_is_told():
    model = build(name="vgg6-4-4-4").train()
    check_resize(model, (3, 32, 32), 9)
    with pytest.raises(ValueError, match="takes images of 9 pixels at least"):
        check_resize(model, (3, 32, 32), 8)
    assert model.training


def test_a_size_that_is_not_smaller_is_refused(tmp_path):
    with pytest.raises(ValueError, match="below the 32 pixels"):
        train.main([*FLAGS, "--epochs", "1", "--resize", "32", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="at least 8"):
        train.main([*FLAGS, "--epochs", "1", "--resize", "7", "--out", str(tmp_path / "run")])
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet"])
def test_gradients_in_bfloat16_read_no_memory_that_nobody_wrote(name):
    """At 4 pixels they do, in oneDNN's strided grouped convolution of 1x1 maps; MALLOC_PERTURB_ fills such memory."""
    program = f"""
import hashlib, torch
from networks import build
torch.set_num_threads(1)
torch.manual_seed(0)
model = build(name="{name}", **({{"groups": 8, "shuffle": True}} if "{name}" == "resnet18" else {{}}))
images = torch.randn(64, 3, {SMALLEST}, {SMALLEST})
with torch.autocast("cpu", torch.bfloat16):
    loss = torch.nn.functional.cross_entropy(model(images), torch.arange(64) % 10)
loss.backward()
gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
print(bool(torch.isfinite(gradients).all()), hashlib.sha256(gradients.numpy().tobytes()).hexdigest())
"""
    told = [subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], text=True, check=True,
                           capture_output=True, env={**os.environ, "MALLOC_PERTURB_": fill}).stdout
            for fill in ("1", "128")]
    assert told[0].startswith("True") and told[0] == told[1]


def test_the_network_sees_small_images_then_whole_ones_in_every_round(tmp_path, monkeypatch):
    seen, real = [], train.resized

    def resize(images, side):
        seen.append(side)
        return real(images, side)
    monkeypatch.setattr(train, "resized", resize)
    train_pruning.main([*FLAGS, "--epochs", "2", "1", "--sparsity", "0.5", "--resize", "12", "--resize-until", "0.5",
                        "--out", str(tmp_path / "run")])
    steps = 96 // 32
    assert seen == [12] * steps + [32] * steps + [12] * 2 + [32] * (steps - 2)


def test_the_teacher_sees_whole_images(trained, tmp_path, monkeypatch):
    seen, real = [], train.teach

    def teach(teacher, images):
        seen.append(images.shape[-1])
        return real(teacher, images)
    monkeypatch.setattr(train, "teach", teach)
    train.main([*FLAGS, "--epochs", "1", "--resize", "12", "--teacher", str(trained / "model.pt"),
                "--out", str(tmp_path / "run")])
    assert seen == [32, 32, 32]


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    flags = [*FLAGS, "--epochs", "2", "1", "--sparsity", "0.5", "--resize", "12"]
    train_pruning.main([*flags, "--out", str(tmp_path / "one")])
    parts = tmp_path / "parts"
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(parts)]), parts, 3)
    one, other = (checkpoint.read(folder / "model.pt") for folder in (tmp_path / "one", parts))
    assert same(one["weights"], other["weights"])
