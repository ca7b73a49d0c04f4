"""1x1 convolutions with a stride: the same outputs and gradients as torch's, without the gradient that overflows."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import quantization
from engine import checkpoint
from engine.strides import StridedConv2d


def strided(inputs, outputs, stride):
    torch.manual_seed(0)
    return StridedConv2d(inputs, outputs, 1, stride, bias=False)


@pytest.mark.parametrize("inputs", [1, 4, 7, 8, 12])
@pytest.mark.parametrize("stride", [(2, 2), (2, 1), (3, 2)])
def test_outputs_and_gradients_are_torchs(inputs, stride):
    ours, theirs = strided(inputs, 6, stride), nn.Conv2d(inputs, 6, 1, stride, bias=False)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, inputs, 9, 8)
    mine = images.clone(memory_format=torch.channels_last).requires_grad_()
    plain = images.clone().requires_grad_()
    for layer, given in ((ours, mine), (theirs, plain)):
        layer(given).square().sum().backward()
    torch.testing.assert_close(ours(mine), theirs(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["float", "three bits"])
def test_no_convolution_of_a_narrow_network_has_a_stride_in_training(wanted, monkeypatch):
    """The fault kills the process, or not, by the CPU: so what the kernel is asked for is looked at."""
    model = models.build("resnet8-4-6-8").to(memory_format=torch.channels_last)
    if wanted == "three bits":
        for layer in [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]:
            quantization.quantized(layer, [3, 3])
    asked, real = [], F.conv2d

    def conv2d(images, weight, bias=None, stride=1, *rest, **named):
        asked.append((tuple(weight.shape[1:]), stride))
        return real(images, weight, bias, stride, *rest, **named)
    monkeypatch.setattr(F, "conv2d", conv2d)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model(images).sum().backward()
    assert [stride for shape, stride in asked if shape == (4, 1, 1)] == [1]
    assert [stride for shape, stride in asked if shape == (6, 1, 1)] == [1]
    asked.clear()
    with torch.no_grad():
        model(images)
    assert [stride for shape, stride in asked if shape == (4, 1, 1)] == [(2, 2)]


def test_only_shortcuts_that_need_it_are_of_this_kind():
    kinds = {name: type(layer) for name, layer in models.build("resnet20").named_modules()
             if isinstance(layer, nn.Conv2d)}
    assert [name for name in kinds if kinds[name] is StridedConv2d] == ["layer2.0.shortcut.0", "layer3.0.shortcut.0"]
    assert set(kinds.values()) == {nn.Conv2d, StridedConv2d}


def test_a_layer_of_another_width_is_of_this_kind_too():
    model, narrow = models.build("resnet8-8-8-8"), models.build("resnet8-4-6-8")
    architecture = {"name": "resnet8"}
    checkpoint.load_weights(model, architecture, checkpoint.network_of(narrow, architecture))
    layers = [layer for layer in model.modules() if type(layer) is StridedConv2d]
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == [(4, 6), (6, 8)]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), narrow.eval()(images))


def test_operations_are_counted_as_before():
    counted = []
    for layer in (strided(4, 6, 2), nn.Conv2d(4, 6, 1, 2, bias=False)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 4, 8, 8))
        counted.append(counter.get_total_flops())
    assert counted == [2 * 4 * 6 * 16] * 2
