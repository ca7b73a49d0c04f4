import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pruning
from binaryconnect import BC, binarize, binarized, scale_of


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_deterministic_is_the_sign_with_zero_positive():
    binary = binarize(torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0]), 0.5)
    assert binary.tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5]


@given(st.floats(-2, 2), st.sampled_from([0.25, 1.0]))
def test_stochastic_follows_the_hard_sigmoid(weight, height):
    drawn = binarize(torch.full((4000,), weight), height, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) <= {height, -height}
    chance = min(max((weight / height + 1) / 2, 0), 1)
    assert (drawn > 0).float().mean().item() == pytest.approx(chance, abs=0.04)


def test_only_convolutions_and_linear_weights_become_binary():
    model = small()
    before = values(model)
    with binarized(model):
        for name, tensor in model.state_dict().items():
            if name in ("0.weight", "4.weight"):
                assert torch.equal(tensor, torch.where(before[name] >= 0, 1.0, -1.0))
            else:
                assert torch.equal(tensor, before[name])
    assert same(before, values(model))


def test_real_weights_are_back_after_an_error():
    model = small()
    before = values(model)
    with pytest.raises(RuntimeError, match="on purpose"), binarized(model):
        raise RuntimeError("on purpose")
    assert same(before, values(model))


def test_nested_and_repeated_binarization_keep_the_real_weights():
    model = small()
    before = values(model)
    with binarized(model), binarized(model):
        pass
    assert same(before, values(model))
    connect = BC(model)
    connect.save_params()
    connect.binarization()
    connect.binarization()
    connect.restore()
    connect.restore()
    assert same(before, values(model))


def test_masked_weights_are_zero_and_the_others_binary():
    model = small()
    masks = pruning.global_masks(model, 0.7)
    with binarized(model, masks=masks):
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert torch.equal(weight == 0, ~mask) and set(weight[mask].abs().tolist()) == {1.0}


def test_glorot_scale_counts_fans_by_hand():
    assert scale_of(torch.empty(8, 3, 5, 5), "glorot") == pytest.approx((1.5 / (3 * 25 + 8 * 25)) ** 0.5)
    assert scale_of(torch.empty(10, 84), "glorot") == pytest.approx((1.5 / 94) ** 0.5)
    with pytest.raises(ValueError, match="two"):
        scale_of(torch.empty(2, 2), "two")


def test_a_step_is_algorithm_one():
    """Gradient at the binary weights, update on the real ones, clip: by hand for one linear layer."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.9, -0.2, 0.1], [-0.95, 0.5, -0.3]]))
    images, labels, real = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), model.weight.detach().clone()
    sign = torch.where(real >= 0, 1.0, -1.0).requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(images @ sign.T, labels), sign)
    optimizer, connect = torch.optim.SGD(model.parameters(), 0.5), BC(model)
    connect.binarization()
    F.cross_entropy(connect.forward(images), labels).backward()
    connect.restore()
    optimizer.step()
    connect.clip()
    assert torch.allclose(model.weight, (real - 0.5 * gradient).clamp(-1, 1), atol=1e-6)


def test_weights_that_are_not_finite_have_no_sign():
    model = small()
    with torch.no_grad():
        model[4].weight[0, :2] = float("nan")
    before = copy.deepcopy(model[0].weight)
    with pytest.raises(ValueError, match="2 weights"), binarized(model):
        pass
    assert torch.equal(model[0].weight, before)
