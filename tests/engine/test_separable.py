"""Depthwise convolutions and 1x1 filters in bfloat16, against autograd's own; which layers compute so, and when."""
import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import gradients
from torch import nn

from engine import compiling, separable
from engine.separable import DepthwiseConv2d, PointwiseConv2d

AMX = {"amx_bf16": True, "avx512_bf16": True}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gradients_are_those_of_autograd(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    kernel, stride, channels = (2 * draw(0, 2) + 1, 2 * draw(0, 2) + 1), (draw(1, 3), draw(1, 3)), draw(2, 5)
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    images = torch.randn(draw(1, 4), channels, draw(1, 7), draw(1, 7)).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(channels, 1, *kernel, requires_grad=True)
    outputs = separable.convolved(images, weight, stride)
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    found = separable._Depthwise.apply(images.detach().requires_grad_(), weight.detach().requires_grad_(), stride)
    assert torch.equal(found, outputs)
    torch.testing.assert_close(separable.image_gradient(gradient, weight, stride, images), images.grad,
                               rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(separable.filter_gradient(images, gradient, weight, stride), weight.grad,
                               rtol=1e-4, atol=1e-4)


def pair(monkeypatch, capabilities=AMX):
    """A small separable network that computes as this file says, and the same network as torch has it."""
    monkeypatch.setattr(compiling, "cpu_instructions", lambda: capabilities)
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 256, 1, bias=False), nn.ReLU(), nn.Conv2d(256, 256, 3, 2, 1, groups=256, bias=False), nn.ReLU(),
        nn.Conv2d(256, 256, 1, bias=False), nn.ReLU(), nn.Conv2d(256, 256, 3, 1, 1, groups=256, bias=False), nn.ReLU(),
        nn.Conv2d(256, 8, 1, bias=False)).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    separable.use_separable(ours)
    return plain, ours


@pytest.fixture
def called(monkeypatch):
    """The gradients that are computed here, by name."""
    calls = []

    def watched(name):
        real = getattr(separable, name)
        return lambda *given: calls.append(name) or real(*given)

    for name in ("image_gradient", "filter_gradient"):
        monkeypatch.setattr(separable, name, watched(name))
    return calls


@pytest.mark.parametrize("side", [3, 8, 13])
def test_a_network_trains_to_the_same_outputs_and_gradients(side, monkeypatch, called):
    plain, ours = pair(monkeypatch)
    assert [type(layer) for layer in ours[::2]] == [nn.Conv2d, DepthwiseConv2d, PointwiseConv2d, DepthwiseConv2d,
                                                    nn.Conv2d]
    (expected, known), (outputs, found) = gradients(plain, side), gradients(ours, side)
    assert sorted(called) == ["filter_gradient"] * 2 + ["image_gradient"] * 2
    assert (outputs - expected).float().norm() < 0.01 * expected.float().norm()
    for one, other in zip(found, known, strict=True):
        assert (one - other).norm() < 0.02 * other.norm() and one.dtype == other.dtype == torch.float32
        assert one.shape == other.shape


def test_other_arithmetic_and_passes_that_measure_are_left_to_torch(monkeypatch, called):
    plain, ours = pair(monkeypatch)
    (_, known), (_, found) = gradients(plain, 4, torch.float32), gradients(ours, 4, torch.float32)
    assert not called and all(map(torch.equal, found, known))
    images = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(images), plain(images))


def test_frozen_filters_get_no_gradient_and_their_images_do(monkeypatch, called):
    _, ours = pair(monkeypatch)
    ours[2].weight.requires_grad_(False)
    _, (images, _, frozen, *_) = gradients(ours, 8)
    assert len(called) == 2 and frozen is None and images.abs().sum() > 0


@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": True}])
def test_a_cpu_without_amx_is_left_alone(capabilities, monkeypatch):
    assert {type(layer) for layer in pair(monkeypatch, capabilities)[1]} == {nn.Conv2d, nn.ReLU}


@pytest.mark.parametrize("layer", [
    nn.Conv2d(256, 256, 3, padding=1, groups=256), nn.Conv2d(256, 256, 3, padding=0, groups=256, bias=False),
    nn.Conv2d(256, 512, 3, padding=1, groups=256, bias=False), nn.Conv2d(256, 256, 3, padding=1, bias=False),
    nn.Conv2d(256, 256, 2, padding=1, groups=256, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False),
    nn.Conv2d(256, 256, 3, padding=2, dilation=2, groups=256, bias=False),
    nn.Conv2d(256, 256, 3, padding="same", groups=256, bias=False),
    nn.Conv2d(256, 256, 3, padding=1, groups=256, padding_mode="reflect", bias=False),
    nn.Conv2d(256, 256, 1), nn.Conv2d(255, 256, 1, bias=False), nn.Conv2d(256, 256, 1, 2, bias=False),
    nn.Conv2d(256, 256, 1, groups=8, bias=False), nn.Conv2d(256, 256, 1, padding=1, bias=False)])
def test_layers_of_another_form_are_left_alone(layer, monkeypatch):
    monkeypatch.setattr(compiling, "cpu_instructions", lambda: AMX)
    separable.use_separable(layer)
    assert type(layer) is nn.Conv2d


def test_a_layer_that_lost_its_channels_is_of_the_kind_of_its_width(monkeypatch):
    _, ours = pair(monkeypatch)
    ours[4].weight = nn.Parameter(ours[4].weight[:200])
    ours[4].out_channels = 200
    separable.use_separable(ours)
    assert type(ours[4]) is nn.Conv2d and type(ours[2]) is DepthwiseConv2d


def test_weights_keep_their_names_and_the_layers_their_copies(monkeypatch):
    plain, ours = pair(monkeypatch)
    assert list(ours.state_dict()) == list(plain.state_dict())
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again[2].weight, plain[2].weight) and type(again[2]) is DepthwiseConv2d
