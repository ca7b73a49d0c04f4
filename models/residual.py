"""Residual networks for small images: ResNets of 6 n + 2 layers, wide ResNets."""
import torch.nn.functional as F
from torch import nn

from models.activations import ACTIVATIONS
from resnet_factorized import add, convolution, initialise, space


class Pad(nn.Module):
    """Shortcut A: every stride-th pixel, and `extra` channels of zeros appended."""

    def __init__(self, stride, extra):
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, images):
        return F.pad(images[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.extra))


def basic_shortcut(inputs, outputs, stride, option):
    """Identity if the shape does not change, else `Pad` (option A), or a 1x1 convolution and batch norm (option B)."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    if option == "A":
        return Pad(stride, outputs - inputs)
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the shortcut, then the activation (He et al. 2015).

    positions: the shortcut's channels that the branch is added to, None for all; see `add`.
    """

    # for channels(), by name in the block: what reads the incoming stream, what starts a new one, and their norms
    reads, read_norms, makes, make_norms = ("conv1", "shortcut.0"), (), ("shortcut.0",), ("shortcut.1",)
    inner_norms, branch_norms = ("bn1",), ("bn2",)

    def __init__(self, inputs, width, stride, activation, option):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = basic_shortcut(inputs, width, stride, option)
        self.activation = ACTIVATIONS[activation]()
        self.register_buffer("positions", None)

    def remove_branch(self):
        """Remove the branch, so that only the shortcut and the activation are left."""
        self.conv1 = self.bn1 = self.conv2 = self.bn2 = self.positions = None

    def forward(self, images):
        shortcut = self.shortcut(images)
        if self.conv1 is None:
            return self.activation(shortcut)
        hidden = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(images)))))
        return self.activation(add(shortcut, hidden, self.positions))


class WideBlock(nn.Module):
    """Batch norm and activation before each of two 3x3 convolutions; nothing after the sum (arXiv:1605.07146).

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation.
    positions: the shortcut's channels that the branch is added to, None for all; see `add`.
    """

    reads, read_norms, makes, make_norms = ("conv1", "shortcut"), ("bn1",), ("shortcut",), ()
    inner_norms, branch_norms = ("bn2",), ()

    def __init__(self, inputs, width, stride, activation):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), convolution(width, width, 3)
        self.shortcut = None if stride == 1 and inputs == width else convolution(inputs, width, 1, stride)
        self.activation = ACTIVATIONS[activation]()
        self.register_buffer("positions", None)

    def remove_branch(self):
        """Remove the branch, so that only the shortcut is left, with bn1 if it is a convolution, which reads it."""
        self.conv1 = self.bn2 = self.conv2 = self.positions = None
        if self.shortcut is None:
            self.bn1 = None

    def forward(self, images):
        if self.conv1 is None and self.shortcut is None:
            return images
        hidden = self.activation(self.bn1(images))
        shortcut = images if self.shortcut is None else self.shortcut(hidden)
        if self.conv1 is None:
            return shortcut
        hidden = self.conv2(self.activation(self.bn2(self.conv1(hidden))))
        return add(shortcut, hidden, self.positions)


class ResNet(nn.Module):
    """ResNet of 6 n + 2 layers (He et al. 2015, arXiv:1512.03385, section 4.2): three stages of blocks.

    images: (N, in_channels, H, W) float, normalised -> logits: (N, num_classes).
    widths: of the stages, 16, 32 and 64 in the paper; the stem has the first.
    """

    def __init__(self, depth, widths, activation, shortcut, num_classes, in_channels):
        super().__init__()
        self.conv1, self.bn1 = convolution(in_channels, widths[0], 3), nn.BatchNorm2d(widths[0])
        self.activation, self.tied = ACTIVATIONS[activation](), shortcut == "B"
        self.layer1, self.layer2, self.layer3 = stages(BasicBlock, (widths[0], *widths), (depth - 2) // 6,
                                                       activation=activation, option=shortcut)
        self.linear = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, images):
        hidden = self.activation(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean((2, 3)))

    def channels(self):
        """Two `space`s per block, inner and branch; with shortcut B one for each stage's stream too."""
        return residual_channels(self, ["bn1"], [], self.tied)


class WideResNet(nn.Module):
    """WRN-depth-factor (Zagoruyko and Komodakis 2016, arXiv:1605.07146) without dropout.

    images: (N, in_channels, H, W) float, normalised -> logits: (N, num_classes).
    """

    def __init__(self, depth, factor, activation, num_classes, in_channels):
        super().__init__()
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        self.conv1 = convolution(in_channels, 16, 3)
        self.layer1, self.layer2, self.layer3 = stages(WideBlock, widths, (depth - 4) // 6, activation=activation)
        self.bn, self.activation = nn.BatchNorm2d(widths[-1]), ACTIVATIONS[activation]()
        self.linear = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, images):
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.linear(self.activation(self.bn(hidden)).mean((2, 3)))

    def channels(self):
        """Two `space`s per block, inner and branch, one for each stage's stream, and one for the stem where k > 1."""
        return residual_channels(self, [], ["bn"], True)


def stages(block, widths, depth, **arguments):
    """Three stages of `depth` blocks; widths: the stem's and the stages'. The second and third halve the image side."""
    def stage(inputs, width, stride):
        return nn.Sequential(block(inputs, width, stride, **arguments),
                             *[block(width, width, 1, **arguments) for _ in range(depth - 1)])
    return [stage(*each) for each in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True)]


def residual_channels(model, stem_norms, head_norms, tied):
    """The `space`s of a residual network: inner and branch of each block, then the streams where they are `tied`.

    A stream is what the blocks' sums pass on: its makers are the stem or the
    shortcut's convolution and every conv2 up to the next such shortcut. In a block
    with `positions`, conv2 makes only these channels. Removed branches are left out.
    """
    names, spaces = {name for name, _ in model.named_modules()}, []
    streams = [space("stream1", ["conv1"], norms=stem_norms)]
    for block, module in model.named_modules():
        if isinstance(module, (BasicBlock, WideBlock)):
            def own(layers, block=block):
                return [f"{block}.{layer}" for layer in layers if f"{block}.{layer}" in names]
            streams[-1]["readers"] += own(module.reads)
            streams[-1]["norms"] += own(module.read_norms)
            if own(module.makes):
                stage = block.split(".")[0].removeprefix("layer")
                streams.append(space(f"stream{stage}", own(module.makes), norms=own(module.make_norms)))
            streams[-1]["makers"] += own(["conv2"])
            streams[-1]["norms"] += own(module.branch_norms)
            if module.conv1 is not None:
                first, second = own(["conv1", "conv2"])
                spaces.append(space(first, [first], own(module.inner_norms), [second]))
                spaces.append(space(second, [second], norms=own(module.branch_norms), branch=block))
    streams[-1]["readers"].append("linear")
    streams[-1]["norms"] += head_norms
    for stream in streams:
        stream["name"] = stream["name"] if len(stream["makers"]) > 1 else stream["makers"][0]
    return spaces + streams if tied else spaces
