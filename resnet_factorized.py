"""ResNets for 32x32 images whose convolutions are factorized into groups.

    from resnet_factorized import build
    model = build("resnet18", groups=8)      # 1,411,146 parameters, 70,980,608 MACs

He et al. 2015 (arXiv:1512.03385) with the CIFAR stem: one 3x3 convolution of
stride 1, no max-pool. Every convolution but the stem has `groups` groups,
shortcuts too, which divides its parameters and MACs by `groups`; `groups=1` is
the dense reference (11,173,962 parameters, 555,422,720 MACs).

With the same groups everywhere the network is `groups` thin networks that meet
only at the classifier. `shuffle=True` interleaves the groups' channels between
the two convolutions of a block (Zhang et al. 2017, arXiv:1707.01083); it costs
no parameter and no MAC.
"""
import torch
import torch.nn.functional as F
from torch import nn


def shuffle_channels(images, groups):
    """Interleave the channels of `groups` groups.

    images: (N, C, H, W), C a multiple of groups. Channel k of group g moves to
    position k * groups + g, so that each new group holds channels of every old
    one, where there are at least as many channels in a group as groups. ShuffleNet, arXiv:1707.01083, section 3.1.
    """
    n, c, h, w = images.shape
    return images.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def convolution(inputs, outputs, kernel, stride, groups):
    """A square convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Shortcut(nn.Sequential):
    """Nothing where the shape stays, else a 1x1 convolution and batch norm (option B)."""

    def __init__(self, inputs, outputs, stride, groups):
        if stride == 1 and inputs == outputs:
            super().__init__()
        else:
            super().__init__(convolution(inputs, outputs, 1, stride, groups), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut: ResNet-18 and 34."""

    expansion = 1

    def __init__(self, inputs, width, stride, groups, shuffle):
        super().__init__()
        self.conv1 = convolution(inputs, width, 3, stride, groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, 1, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = Shortcut(inputs, width, stride, groups)
        self.mixed_groups = groups if shuffle and groups > 1 else 0

    def forward(self, images):
        hidden = F.relu(self.bn1(self.conv1(images)))
        if self.mixed_groups:
            hidden = shuffle_channels(hidden, self.mixed_groups)
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and the shortcut: ResNet-50, 101 and 152."""

    expansion = 4

    def __init__(self, inputs, width, stride, groups, shuffle):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = convolution(inputs, width, 1, 1, groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, outputs, 1, 1, groups)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = Shortcut(inputs, outputs, stride, groups)
        self.mixed_groups = groups if shuffle and groups > 1 else 0

    def forward(self, images):
        hidden = F.relu(self.bn1(self.conv1(images)))
        if self.mixed_groups:
            hidden = shuffle_channels(hidden, self.mixed_groups)
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return F.relu(self.bn3(self.conv3(hidden)) + self.shortcut(images))


class ResNet(nn.Module):
    """Stem, four stages of 64/128/256/512 channels, global average pool, linear.

    images: (N, in_channels, H, W) float, normalised -> logits: (N, num_classes).
    """

    def __init__(self, block, depths, groups=8, shuffle=True, num_classes=10, in_channels=3):
        super().__init__()
        if not 1 <= groups <= 64 or 64 % groups:
            raise ValueError(f"groups {groups} does not divide the 64 channels of the first stage; "
                             "choose 1, 2, 4, 8, 16, 32 or 64")
        self.conv1 = convolution(in_channels, 64, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(64)
        inputs, stages = 64, []
        for depth, width, stride in zip(depths, (64, 128, 256, 512), (1, 2, 2, 2), strict=True):
            blocks = []
            for position in range(depth):
                blocks.append(block(inputs, width, stride if position == 0 else 1, groups, shuffle))
                inputs = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, images):
        hidden = F.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = stage(hidden)
        return self.linear(hidden.mean((2, 3)))


def initialise(model):
    """He et al. 2015 (arXiv:1502.01852), fan-out, for convolutions; torch's default elsewhere."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            with torch.no_grad():
                module.weight.normal_(0.0, (2.0 / fan_out) ** 0.5)


NETWORKS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def build(name="resnet18", groups=8, shuffle=True, num_classes=10, in_channels=3):
    """The network called `name`, freshly initialised from torch's global generator.

    Raises ValueError for an unknown name or for groups that do not divide 64.
    """
    if name not in NETWORKS:
        raise ValueError(f"no network is called {name!r}; choose from {', '.join(NETWORKS)}")
    block, depths = NETWORKS[name]
    return ResNet(block, depths, groups, shuffle, num_classes, in_channels)
