"""Gradients of filters by plain products, against autograd's own; where a layer takes them, and where it does not."""
import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import gradients
from torch import nn

from engine import compiling, small_images
from engine.small_images import SmallImageConv2d, filter_gradient

AMX = {"amx_bf16": True}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_gradient_is_that_of_autograd(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    kernel, padding = (draw(1, 4), draw(1, 4)), (draw(0, 2), draw(0, 2))
    images = torch.randn(draw(1, 4), draw(1, 5), draw(4, 7), draw(4, 7), dtype=torch.float64)
    weight = torch.randn(draw(1, 5), images.shape[1], *kernel, dtype=torch.float64, requires_grad=True)
    outputs = nn.functional.conv2d(images, weight, padding=padding)
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = filter_gradient(images.contiguous(memory_format=layout), gradient, kernel, padding)
        torch.testing.assert_close(found, weight.grad, rtol=1e-10, atol=1e-10)


def pair(monkeypatch, capabilities=AMX):
    """A small network with a layer that takes the products, and the same network as torch has it."""
    monkeypatch.setattr(compiling, "cpu_instructions", lambda: capabilities)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1, bias=False), nn.ReLU(),
                          nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.ReLU(),
                          nn.Conv2d(256, 8, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    small_images.use_products(ours)
    return plain, ours


@pytest.fixture
def called(monkeypatch):
    """How often the products are taken."""
    calls, real = [], small_images.filter_gradient
    monkeypatch.setattr(small_images, "filter_gradient", lambda *given: calls.append(given) or real(*given))
    return calls


def test_a_network_trains_to_the_same_outputs_and_gradients(monkeypatch, called):
    plain, ours = pair(monkeypatch)
    assert [type(layer) for layer in ours[::2]] == [nn.Conv2d, SmallImageConv2d, nn.Conv2d]
    (expected, known), (outputs, found) = gradients(plain, 5), gradients(ours, 5)
    assert len(called) == 1 and torch.equal(outputs, expected)
    for one, other in zip(found, known, strict=True):
        assert (one - other).norm() < 0.01 * other.norm() and one.dtype == other.dtype == torch.float32


@pytest.mark.parametrize("side, dtype", [(8, torch.bfloat16), (5, torch.float32)])
def test_larger_images_and_other_arithmetic_are_left_to_torch(side, dtype, monkeypatch, called):
    plain, ours = pair(monkeypatch)
    (_, known), (_, found) = gradients(plain, side, dtype), gradients(ours, side, dtype)
    assert not called and all(map(torch.equal, found, known))


def test_a_cpu_without_amx_is_left_alone(monkeypatch):
    assert {type(layer) for layer in pair(monkeypatch, {"avx512_bf16": True})[1]} == {nn.Conv2d, nn.ReLU}


def test_frozen_filters_get_no_gradient_and_their_images_do(monkeypatch, called):
    _, ours = pair(monkeypatch)
    ours[2].weight.requires_grad_(False)
    _, (images, _, frozen, _) = gradients(ours, 5)
    assert not called and frozen is None and images.abs().sum() > 0


@pytest.mark.parametrize("layer", [
    nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(256, 256, 3, 2, 1, bias=False),
    nn.Conv2d(256, 256, 3, padding=1, groups=8, bias=False), nn.Conv2d(256, 256, 1, bias=False),
    nn.Conv2d(255, 256, 3, padding=1, bias=False), nn.Conv2d(256, 256, 3, dilation=2, bias=False),
    nn.Conv2d(256, 256, 3, padding="same", bias=False),
    nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect", bias=False)])
def test_layers_of_another_form_are_left_alone(layer, monkeypatch):
    monkeypatch.setattr(compiling, "cpu_instructions", lambda: AMX)
    small_images.use_products(layer)
    assert type(layer) is nn.Conv2d


def test_weights_keep_their_names_and_the_layer_its_copies(monkeypatch):
    plain, ours = pair(monkeypatch)
    assert list(ours.state_dict()) == list(plain.state_dict())
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again[2].weight, plain[2].weight) and type(again[2]) is SmallImageConv2d
