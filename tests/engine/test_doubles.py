"""Where a device has no float64, as a Mac's GPU, what needs it is computed on the CPU; here a CPU counts as one."""
import pytest
import torch
from conftest import ROOT

import models
import networks
import pruning
from engine import doubles, draws

CPU = torch.device("cpu")


@pytest.fixture
def without(monkeypatch):
    """A CPU that counts as a device without float64."""
    for module in (doubles, draws):
        monkeypatch.setattr(module, "WITHOUT", ("cpu",))


def test_scores_rank_as_with_float64(monkeypatch):
    weight = torch.randn(16, 8, 3, 3)
    exact = pruning.lamp_scores(weight)
    monkeypatch.setattr(doubles, "WITHOUT", ("cpu",))
    found = pruning.lamp_scores(weight)
    assert (exact.dtype, found.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(found, exact.float())


def test_a_stem_is_whitened(without):
    model, images = models.build("vgg6-8-8-8"), torch.randn(64, 3, 8, 8)
    model.whiten(images)
    white = torch.nn.functional.conv2d(images, model.conv1.weight[:len(model.conv1.weight) // 2])
    covariance = torch.cov(white.transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, torch.eye(len(covariance)), atol=0.15, rtol=0)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 5.0])
def test_shares_come_from_the_generator_alone(alpha, without):
    def drawn(seed, outer):
        torch.manual_seed(outer)
        return draws.draw_beta(alpha, 2_000, torch.Generator().manual_seed(seed), CPU)
    shares = drawn(3, 0)
    assert torch.equal(shares, drawn(3, 1)) and not torch.equal(shares, drawn(4, 0))
    assert shares.dtype == torch.float32 and bool(((shares >= 0) & (shares <= 1)).all())
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_integers_sum_to_the_same(monkeypatch):
    model = networks.load_network(ROOT / "pretrained/resnet20_12_24_48_3bits_cifar10.packed.gz")[0].eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
        monkeypatch.setattr(doubles, "WITHOUT", ("cpu",))
        assert torch.equal(model(images), exact)
