"""ResNets for 32x32 images whose convolutions are factorized into groups.

    from resnet_factorized import build
    model = build("resnet18", groups=8)      # 1,411,146 parameters, 70,980,608 MACs

He et al. 2015 (arXiv:1512.03385) with the CIFAR stem: one 3x3 convolution of
stride 1, no max-pool. Every convolution except the stem has `groups` groups,
shortcuts included, which divides its parameters and MACs by `groups`; `groups=1` is
the dense reference (11,173,962 parameters, 555,422,720 MACs).

With the same groups everywhere the network is `groups` narrow networks, joined
only at the classifier. `shuffle=True` interleaves the groups' channels between
the two convolutions of a block (Zhang et al. 2017, arXiv:1707.01083); it costs
no parameter and no MAC.
"""
import torch
import torch.nn.functional as F
from torch import fx, nn

from engine.strides import StridedConv2d


def shuffle_channels(images, groups):
    """Interleave the channels of `groups` groups.

    images: (N, C, H, W), C a multiple of groups. Channel k of group g moves to
    position k * groups + g, so that each new group holds channels of every old
    one, if a group has at least as many channels as there are groups. ShuffleNet, arXiv:1707.01083, section 3.1.
    """
    if moves_by_products(images):
        return MovedChannels.apply(images, torch.arange(images.shape[1]).view(groups, -1).T.flatten(), groups)
    return interleaved(images, groups)


def interleaved(images, groups):
    """Compute `shuffle_channels` with views and a copy."""
    n, c, h, w = images.shape
    if images.is_contiguous(memory_format=torch.channels_last):         # the result is, too
        by_pixel = images.permute(0, 2, 3, 1).reshape(n, h, w, groups, c // groups)
        return by_pixel.transpose(3, 4).reshape(n, h, w, c).permute(0, 3, 1, 2)
    return images.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def take_channels(images, order):
    """Return the channels `order`, (K,) int64, of (N, C, H, W) images, in the memory layout of the images."""
    if moves_by_products(images):
        return MovedChannels.apply(images, order, None)
    if images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1)[..., order].permute(0, 3, 1, 2)
    return images[:, order]


class MovedChannels(torch.autograd.Function):
    """`take_channels` of images in bfloat16 and channels_last, as a product with a matrix of zeros and ones.

    For finite numbers it is exact, since at most one term of each sum is nonzero, and on a CPU it is faster than
    gathering and scattering 2-byte numbers.
    groups: of `shuffle_channels`, if `order` is its order; then only the gradient is computed as a product.
    """

    @staticmethod
    def forward(context, images, order, groups):
        moves = (torch.arange(images.shape[1])[:, None] == order).to(images.dtype)
        context.save_for_backward(moves)
        if groups is not None:
            return interleaved(images, groups)
        return (images.permute(0, 2, 3, 1) @ moves).permute(0, 3, 1, 2)

    @staticmethod
    def backward(context, gradient):
        moves, = context.saved_tensors
        return (gradient.permute(0, 2, 3, 1) @ moves.T).permute(0, 3, 1, 2), None, None


def moves_by_products(images):
    """Whether images need a gradient and are bfloat16, on a CPU, in channels_last."""
    return (images.is_cpu and images.dtype == torch.bfloat16 and images.requires_grad
            and images.is_contiguous(memory_format=torch.channels_last))


fx.wrap("shuffle_channels")      # they read memory layouts, which do not exist while a network is traced
fx.wrap("take_channels")


def convolution(inputs, outputs, kernel, stride=1, groups=1):
    """A square convolution without bias that keeps the size at stride 1."""
    kind = StridedConv2d if kernel == 1 < stride and groups == 1 else nn.Conv2d
    return kind(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def add(shortcut, hidden, positions):
    """Add the branch's outputs to the shortcut's channels, or only to those at `positions` (selective addition).

    shortcut: (N, C, H, W); hidden: (N, K, H, W); positions: None where K = C, else
    (K,) int64, distinct, on the same device. Zhou, Alvarez and Porikli 2016.
    """
    if positions is None:
        return shortcut + hidden
    return torch.index_add(shortcut, 1, positions, hidden.to(shortcut.dtype))


class Shortcut(nn.Sequential):
    """Identity if the shape does not change, else a 1x1 convolution and batch norm (option B)."""

    def __init__(self, inputs, outputs, stride, groups):
        if stride == 1 and inputs == outputs:
            super().__init__()
        else:
            super().__init__(convolution(inputs, outputs, 1, stride, groups), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Base of both kinds of block: the shuffle within, and the channels that the branch is added to.

    order: after channels were removed, the (C,) channels of the first convolution
    in the order in which the second reads them; None while `shuffle_channels`
    gives the order. positions: the (C,) channels of the shortcut that the branch
    is added to (selective addition); None if it is added to all. If conv1 is
    None, the branch was removed and the block is its shortcut.
    """

    def __init__(self, groups, shuffle):
        super().__init__()
        self.mixed_groups = groups if shuffle and groups > 1 else 0
        self.register_buffer("order", None)
        self.register_buffer("positions", None)

    def shuffle(self, hidden):
        """Interleave the channels between the first two convolutions, if the network is built with a shuffle."""
        if self.order is not None:
            return take_channels(hidden, self.order)
        return shuffle_channels(hidden, self.mixed_groups) if self.mixed_groups else hidden

    def remove_branch(self):
        """Remove the branch, so that only the shortcut is left."""
        for convolution, norm in self.branch:
            setattr(self, convolution, None)
            setattr(self, norm, None)
        self.order = self.positions = None


class BasicBlock(Block):
    """Two 3x3 convolutions and the shortcut: ResNet-18 and 34."""

    expansion = 1
    branch = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, inputs, width, stride, groups, shuffle):
        super().__init__(groups, shuffle)
        self.conv1 = convolution(inputs, width, 3, stride, groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, 1, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = Shortcut(inputs, width, stride, groups)

    def forward(self, images):
        if self.conv1 is None:
            return F.relu(self.shortcut(images))
        hidden = self.shuffle(F.relu(self.bn1(self.conv1(images))))
        return F.relu(add(self.shortcut(images), self.bn2(self.conv2(hidden)), self.positions))


class Bottleneck(Block):
    """1x1, 3x3, 1x1 and the shortcut: ResNet-50, 101 and 152."""

    expansion = 4
    branch = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, inputs, width, stride, groups, shuffle):
        super().__init__(groups, shuffle)
        outputs = width * self.expansion
        self.conv1 = convolution(inputs, width, 1, 1, groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, outputs, 1, 1, groups)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = Shortcut(inputs, outputs, stride, groups)

    def forward(self, images):
        if self.conv1 is None:
            return F.relu(self.shortcut(images))
        hidden = self.shuffle(F.relu(self.bn1(self.conv1(images))))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return F.relu(add(self.shortcut(images), self.bn3(self.conv3(hidden)), self.positions))


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

    def channels(self):
        """The channel spaces, a list of `space`: within the branches, at their ends, and the residual streams."""
        stream, streams, spaces = space("stream0", ["conv1"], ["bn1"]), [], []
        for number, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1):
            for position, block in enumerate(stage):
                name = f"layer{number}.{position}"
                if len(block.shortcut):
                    streams.append(stream)
                    stream["readers"].append(f"{name}.shortcut.0")
                    previous, stream = stream, space(f"stream{number}", [f"{name}.shortcut.0"], [f"{name}.shortcut.1"])
                else:
                    previous = stream
                if block.conv1 is None:
                    continue
                previous["readers"].append(f"{name}.conv1")
                spaces += branch_spaces(name, block)
                stream["makers"].append(spaces[-1]["makers"][0])
                stream["norms"].append(spaces[-1]["norms"][0])
        stream["readers"].append("linear")
        return spaces + [*streams, stream]


def space(name, makers, norms=(), readers=(), depthwise=(), unfold=1, shuffled=None, branch=None):
    """Describe a channel space, channels that can be removed together, as a dictionary of layer names.

    name: that of the layer that makes the channels, or stream0, stream1, ... where
    the sums of a stage tie the outputs of several layers together. makers: the layers
    that output the channels. norms: the batch norms of exactly these channels.
    readers: the layers that take them as inputs. depthwise: convolutions over them
    with one filter per channel. unfold: H W where a linear layer reads flattened
    images (channel k is its inputs k unfold to k unfold + unfold - 1). shuffled: the
    block that rearranges them between maker and reader. branch: the block whose
    branch ends in them and adds them to its shortcut; removing some sets its
    `positions` and changes no reader.
    """
    return {"name": name, "makers": list(makers), "norms": list(norms), "depthwise": list(depthwise),
            "readers": list(readers), "unfold": unfold, "shuffled": shuffled, "branch": branch}


def branch_spaces(name, block):
    """The spaces within a block: between its convolutions, and last the one that ends its branch."""
    layers = [(f"{name}.{convolution}", f"{name}.{norm}") for convolution, norm in block.branch]
    inner = [space(maker, [maker], [norm], [reader], shuffled=name if place == 0 and block.mixed_groups else None)
             for place, ((maker, norm), (reader, _)) in enumerate(zip(layers, layers[1:], strict=False))]
    maker, norm = layers[-1]
    return [*inner, space(maker, [maker], [norm], branch=name)]


def initialise(model):
    """Initialise convolutions as He et al. 2015 (arXiv:1502.01852), fan-out; other layers keep torch's default."""
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
