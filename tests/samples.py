"""Small data and networks that several test modules share, and what torch counts of one."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cifar10
import pruning
from models import BasicBlock, WideBlock

SMALL = cifar10.Kind((12, 11, 3), (40, 8), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), tuple("abcd"), True, "CIFAR10")
NETWORKS = [    # name, arguments, side of an image that is quick to compute
    ("lenet5", {"size": 28}, 28), ("lenet5", {"pooling": "average"}, 32), ("lenet5-student", {}, 32),
    ("cifar-quick", {}, 32), ("mobilenet", {}, 16), ("resnet20", {"shortcut": "A"}, 8), ("resnet20", {}, 8),
    ("resnet8-6-6-9", {}, 8), ("resnet8-4-6-9", {"shortcut": "A"}, 8),
    ("wrn-10-1", {}, 8), ("wrn-10-2", {}, 8), ("wrn-16-1", {}, 8),
    ("vgg6-8-9-10", {}, 12), ("vgg9-8-9-10", {"activation": "gelu"}, 12),
]
small = pytest.mark.parametrize(("name", "arguments", "side"), NETWORKS)
residual = pytest.mark.parametrize(("name", "arguments", "side"), [each for each in NETWORKS if each[0][0] in "rw"])


def random_data(kind, seed=0):
    """Random images and labels of the form that `kind` asks for."""
    random = np.random.default_rng(seed)
    parts = [(random.integers(0, 256, (count, *kind.shape), dtype=np.uint8),
              random.integers(0, len(kind.classes), count)) for count in kind.counts]
    return cifar10.Data(*parts[0], *parts[1])


def assert_same(found, expected):
    for name, one, other in zip(cifar10.Data._fields, found, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def small_network():
    """A network's part of a checkpoint, small enough to damage at every byte."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 5, generator=generator) * (torch.rand(3, 5, generator=generator) > 0.5)
    return {"architecture": {"name": "x", "groups": 2}, "widths": {"a": [3, 5]},
            "weights": {"a.weight": kernel, "steps": torch.tensor(7), "bias": torch.randn(4, generator=generator)}}


def space(name, makers, norms, readers, depthwise=(), unfold=1):
    return {"name": name, "makers": makers, "norms": norms, "readers": readers, "depthwise": list(depthwise),
            "unfold": unfold, "shuffled": None, "branch": None}


class Tiny(nn.Module):
    """Full, depthwise and grouped convolutions, and a linear layer that reads flattened 2x2 images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.depth, self.bn2 = nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn3 = nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.linear = nn.Linear(24, 5)

    def forward(self, images):
        hidden = F.relu(self.bn2(self.depth(F.relu(self.bn1(self.conv1(images))))))
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn3(self.conv2(hidden))), 2).flatten(1))

    def channels(self):
        return [space("a", ["conv1"], ["bn1", "bn2"], ["conv2"], ["depth"]),
                space("b", ["conv2"], ["bn3"], ["linear"], unfold=4)]


class Plain(nn.Module):
    """Without batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.out = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(48, 4), nn.Linear(4, 2)

    def forward(self, images):
        return self.out(F.relu(self.hidden(F.relu(self.conv(images)).flatten(1))))

    def channels(self):
        return [space("conv", ["conv"], [], ["hidden"], unfold=16), space("hidden", ["hidden"], [], ["out"])]


def macs_by_torch(model, shape=(3, 32, 32)):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


def weights_of(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


def images_of(side, count=3, channels=3, dtype=torch.float32):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def lively(model):
    """The model in evaluation, double precision, with random batch norms, so that no scale is 1 and no shift 0."""
    with torch.no_grad():
        for module in model.double().eval().modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.5)
    return model


def layers_of(model, kinds=(nn.Conv2d, nn.Linear)):
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def blocks_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, (BasicBlock, WideBlock))}


def gradients(model, side, dtype=torch.bfloat16):
    """The outputs of a training pass on six images in channels_last, and the gradients of images and parameters."""
    images = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = model(images.contiguous(memory_format=torch.channels_last))
    outputs.float().square().sum().backward()
    return outputs, [images.grad, *(parameter.grad for parameter in model.parameters())]


# ---- networks to prune

def small_model(seed=0):
    """Two convolutions, one grouped, batch norm and a linear layer, for images (N, 3, 8, 8)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                          nn.Linear(64, 10))
    for module in (model[0], model[3], model[6]):
        nn.init.normal_(module.weight, 0, 0.2)          # one scale, so that no layer is emptied
    return model


def two_rounds(model, sparsity, **options):
    """Masks after two rounds, applied each time."""
    masks = pruning.global_masks(model, sparsity, **options)
    pruning.apply_masks(model, masks)
    masks = pruning.global_masks(model, sparsity, masks, **options)
    pruning.apply_masks(model, masks)
    return masks


def to_prune(model):
    """The weights of convolutions and linear layers as torch.nn.utils.prune takes them."""
    return [(module, "weight") for module in layers_of(model).values()]
