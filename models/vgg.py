"""A dense network for high accuracy per operation: a VGG that pools early, after a whitening stem.

    model = build("vgg6-64-256-256", activation="gelu")       # 1.97 M parameters, 118 M MACs at 32x32
    model = build("vgg9-128-512-512", activation="gelu")      # three convolutions a stage, two of them with a shortcut

After airbench (Jordan 2024, arXiv:2404.00498). Each of three stages is convolution, 2x2
max-pooling, batch norm, activation, then one or two more convolutions on the
smaller image, so that only the first convolution works at 32x32. The stem is a 2x2
convolution whose filters are the principal components of the training images' patches,
scaled to unit variance, and their negatives; they are set once and never trained.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from engine.doubles import in_double
from resnet_factorized import convolution, space

LOGITS = 1 / 16      # factor on the classifier's inputs, so that its outputs start small and it learns fast
SMALLEST_VARIANCE = 5e-4


def family(name):
    """(convolutions a stage, widths of the stages) of a name like vgg6-64-256-256 or vgg9-128-512-512, else None."""
    match = re.fullmatch(r"vgg(6|9)((?:-[1-9][0-9]{0,3}){3})", name)
    return (int(match[1]) // 3, tuple(map(int, match[2].split("-")[1:]))) if match else None


class Stage(nn.Module):
    """Convolution, pooling, norm, activation, then `depth` - 1 more convolutions, two of them with a shortcut.

    images: (N, inputs, H, W) -> (N, width, H // 2, W // 2).
    """

    def __init__(self, inputs, width, depth, activation):
        super().__init__()
        self.depth, self.activation = depth, activation
        for place in range(1, depth + 1):
            self.add_module(f"conv{place}", convolution(inputs if place == 1 else width, width, 3))
            self.add_module(f"bn{place}", nn.BatchNorm2d(width, momentum=0.4))
            getattr(self, f"bn{place}").weight.requires_grad_(False)

    def forward(self, images):
        first = self.activation(self.bn1(F.max_pool2d(self.conv1(images), 2)))
        hidden = self.bn2(self.conv2(first))
        if self.depth == 3:
            hidden = self.bn3(self.conv3(self.activation(hidden))) + first
        return self.activation(hidden)


class PoolingVGG(nn.Module):
    """The network of the module's docstring.

    images: (N, in_channels, H, W) float, normalised, H and W at least 9 -> logits: (N, num_classes).
    """

    def __init__(self, depth, widths, activation, num_classes, in_channels):
        super().__init__()
        stem = 2 * 4 * in_channels
        self.conv1, self.activation = nn.Conv2d(in_channels, stem, 2), activation
        self.conv1.weight.requires_grad_(False)
        self.layer1, self.layer2, self.layer3 = (
            Stage(inputs, width, depth, activation)
            for inputs, width in zip((stem, *widths[:-1]), widths, strict=True))
        self.linear = nn.Linear(widths[-1], num_classes)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Initialise the filters to pass their inputs on (dirac), and the classifier close to zero."""
        self.conv1.bias.zero_()
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv1:
                kept = min(module.weight.shape[:2])
                nn.init.dirac_(module.weight[:kept])
        self.linear.weight.mul_(LOGITS)
        self.linear.bias.zero_()

    @torch.no_grad()
    def whiten(self, images):
        """Set the stem's filters from training images, (N, C, H, W) float, normalised; a few thousand suffice."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        patches = in_double(patches)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + SMALLEST_VARIANCE).sqrt()).T.flip(0).view(-1, *self.conv1.weight.shape[1:])
        self.conv1.weight.copy_(torch.cat([filters, -filters]).to(self.conv1.weight.dtype))

    def forward(self, images):
        hidden = self.layer3(self.layer2(self.layer1(self.activation(self.conv1(images)))))
        return self.linear(hidden.amax((2, 3)) * LOGITS)

    def channels(self):
        """One `space` for the stem and each convolution; with a shortcut, the first and last of a stage are tied."""
        stages, spaces = ("layer1", "layer2", "layer3"), [space("conv1", ["conv1"], readers=["layer1.conv1"])]
        for stage, following in zip(stages, ("layer2.conv1", "layer3.conv1", "linear"), strict=True):
            first, second, third = ((f"{stage}.conv{place}", f"{stage}.bn{place}") for place in (1, 2, 3))
            if self.layer1.depth == 2:
                spaces += [space(first[0], [first[0]], [first[1]], [second[0]]),
                           space(second[0], [second[0]], [second[1]], [following])]
            else:
                spaces += [space(second[0], [second[0]], [second[1]], [third[0]]),
                           space(f"stream{stage[-1]}", [first[0], third[0]], [first[1], third[1]],
                                 [second[0], following])]
        return spaces


def build(name, activation, num_classes, in_channels):
    """The network called `name`, see `family`; activation: a module."""
    return PoolingVGG(*family(name), activation, num_classes, in_channels)
