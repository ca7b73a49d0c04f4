"""Small networks for small images: LeNet-5, Cifar-quick, MobileNetV1, ResNets of 20 to 110 layers, wide ResNets.

    from models import build
    model = build("resnet56", shortcut="A")      # 853,018 parameters, 125,485,696 MACs at 32x32
    model = build("lenet5", in_channels=1, size=28, activation="tanh", pooling="average")

`NETWORKS` names them; any wrn-d-k of 6 n + 4 layers is built too, any ResNet of
6 n + 2 layers with the widths of its stages, as resnet20-12-28-64, and the networks of
vgg.py. `arguments_of` says which arguments a network has; another one is refused, not
ignored.

Every network has `channels()`: which layers make, normalise and read each set of
channels that can be removed together (`resnet_factorized.space`). Layers that were
sliced run as they are, since widths are read from the layers.
"""
import re

import torch.nn.functional as F
from torch import nn

import vgg
from resnet_factorized import add, convolution, initialise, space

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU,
               "hardswish": nn.Hardswish, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
POOLINGS = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


# ---- convolutions and linear layers in a row

class Plain(nn.Module):
    """5x5 convolutions, each with activation and 2x2 pooling of stride 2, then linear layers; biases, no batch norm.

    LeNet-5 (LeCun et al. 1998) as it is built now, without its RBF outputs, or
    Caffe's Cifar-quick, with this pooling and an activation after linear1.
    images: (N, in_channels, size, size) float, normalised -> logits: (N, num_classes).
    filters: of conv1, conv2, ...; hidden: widths of the linear layers before the
    classifier; padding: of each convolution, None for what makes images 32x32.
    """

    def __init__(self, filters, hidden, padding, activation, pooling, num_classes, in_channels, size=32):
        super().__init__()
        padding = padding or ((32 - size) // 2, 0)
        self.convolutions = [f"conv{k + 1}" for k in range(len(filters))]
        self.linears = [f"linear{k + 1}" for k in range(len(hidden) + 1)]
        inputs = in_channels
        for name, outputs, border in zip(self.convolutions, filters, padding, strict=True):
            self.add_module(name, nn.Conv2d(inputs, outputs, 5, padding=border))
            inputs, size = outputs, (size + 2 * border - 4) // 2
        inputs *= size ** 2
        for name, outputs in zip(self.linears, (*hidden, num_classes), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs))
            inputs = outputs
        self.activation, self.pooling = ACTIVATIONS[activation](), POOLINGS[pooling](2)

    def forward(self, hidden):
        for name in self.convolutions:
            hidden = self.pooling(self.activation(getattr(self, name)(hidden)))
        hidden = hidden.flatten(1)
        for name in self.linears[:-1]:
            hidden = self.activation(getattr(self, name)(hidden))
        return getattr(self, self.linears[-1])(hidden)

    def channels(self):
        """One `space` a layer, the classifier's excepted; the last convolution's is read flattened."""
        names = self.convolutions + self.linears
        spaces = [space(maker, [maker], readers=[reader]) for maker, reader in zip(names, names[1:], strict=False)]
        flattened = spaces[len(self.convolutions) - 1]
        flattened["unfold"] = self.linear1.in_features // getattr(self, flattened["name"]).out_channels
        return spaces


# ---- MobileNetV1

class Separable(nn.Module):
    """A depthwise 3x3 convolution, then a pointwise 1x1 one, each with batch norm and activation."""

    def __init__(self, inputs, outputs, stride, activation):
        super().__init__()
        self.depthwise = convolution(inputs, inputs, 3, stride, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = convolution(inputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, images):
        hidden = self.activation(self.bn1(self.depthwise(images)))
        return self.activation(self.bn2(self.pointwise(hidden)))


class MobileNet(nn.Module):
    """MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) with a stem of stride 1: 32x32 images end as 2x2.

    images: (N, in_channels, H, W) float, normalised -> logits: (N, num_classes).
    """

    def __init__(self, activation, num_classes, in_channels):
        super().__init__()
        self.conv1, self.bn1 = convolution(in_channels, 32, 3), nn.BatchNorm2d(32)
        self.activation = ACTIVATIONS[activation]()
        widths = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
        strides = (1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1)
        self.layers = nn.Sequential(*[Separable(inputs, outputs, stride, activation) for inputs, outputs, stride
                                      in zip(widths[:-1], widths[1:], strides, strict=True)])
        self.linear = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, images):
        hidden = self.layers(self.activation(self.bn1(self.conv1(images))))
        return self.linear(hidden.mean((2, 3)))

    def channels(self):
        """One `space` for the stem and for each pointwise convolution; the depthwise one that follows belongs to it."""
        maker, norm, spaces = "conv1", "bn1", []
        for name in (f"layers.{k}" for k in range(len(self.layers))):
            spaces.append(space(maker, [maker], [norm, f"{name}.bn1"], [f"{name}.pointwise"], [f"{name}.depthwise"]))
            maker, norm = f"{name}.pointwise", f"{name}.bn2"
        return spaces + [space(maker, [maker], [norm], ["linear"])]


# ---- residual networks

class Pad(nn.Module):
    """Shortcut A: every stride-th pixel, and `extra` channels of zeros after those that are there."""

    def __init__(self, stride, extra):
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, images):
        return F.pad(images[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.extra))


def basic_shortcut(inputs, outputs, stride, option):
    """Nothing where the shape stays, else `Pad` (option A), or a 1x1 convolution and batch norm (option B)."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    if option == "A":
        return Pad(stride, outputs - inputs)
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the shortcut, then the activation (He et al. 2015).

    positions: None, or where in the shortcut the branch's channels are added; see `add`.
    """

    # channels(): what reads the incoming stream, what makes another, and the norms of each; names within the block
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
        """Leave the shortcut and the activation alone."""
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
    positions: None, or where in the shortcut the branch's channels are added; see `add`.
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
        """Leave the shortcut alone; bn1 stays where the shortcut is a convolution, which reads it."""
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
        """Two `space`s a block, inner and branch; with shortcut B one for each stage's stream too."""
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
        """Two `space`s a block, inner and branch, one for each stage's stream, and one for the stem where k > 1."""
        return residual_channels(self, [], ["bn"], True)


def stages(block, widths, depth, **arguments):
    """Three stages of `depth` blocks; widths: the stem's and the stages'. The second and third halve the sides."""
    def stage(inputs, width, stride):
        return nn.Sequential(block(inputs, width, stride, **arguments),
                             *[block(width, width, 1, **arguments) for _ in range(depth - 1)])
    return [stage(*each) for each in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True)]


def residual_channels(model, stem_norms, head_norms, tied):
    """The `space`s of a residual network: inner and branch of each block, then the streams where they are `tied`.

    A stream is what is handed from sum to sum: its makers are the stem or the
    shortcut's convolution and every conv2 up to the next such shortcut. Those of a
    block with `positions` make just these channels of it. Removed branches are left out.
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


# ---- by name

PLAIN = {      # filters, hidden linear layers, padding: None pads the images to 32x32
    "lenet5": ((6, 16), (120, 84), None),
    "lenet5-student": ((3, 8), (50,), None),
    "cifar-quick": ((32, 32, 64), (64,), (2, 2, 2)),
}
RESIDUAL = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
NETWORKS = {   # the arguments beside num_classes and in_channels
    "lenet5": ("size", "activation", "pooling"), "lenet5-student": ("size", "activation", "pooling"),
    "cifar-quick": ("activation", "pooling"), "mobilenet": ("activation",),
    **dict.fromkeys(RESIDUAL, ("activation", "shortcut")),
    "wrn-16-4": ("activation",), "wrn-28-10": ("activation",),
}
CHOICES = {    # the default first
    "size": (32, 28), "activation": tuple(ACTIVATIONS), "pooling": tuple(POOLINGS), "shortcut": ("B", "A"),
}


def wide(name):
    """(depth, k) of a name like wrn-16-4, or None where it is none of 6 n + 4 layers."""
    match = re.fullmatch(r"wrn-([1-9][0-9]*)-([1-9][0-9]*)", name)
    depth, factor = map(int, match.groups()) if match else (0, 0)
    return (depth, factor) if depth >= 10 and depth % 6 == 4 else None


def residual(name):
    """(depth, widths of the stages) of resnet20 to 110, or of a name like resnet20-12-28-64; None for others.

    Such names have 6 n + 2 layers, and widths that do not fall.
    """
    match = re.fullmatch(r"resnet([1-9][0-9]*)((?:-[1-9][0-9]*){3})", name)
    if not match:
        return (int(name.removeprefix("resnet")), (16, 32, 64)) if name in RESIDUAL else None
    depth, widths = int(match[1]), tuple(map(int, match[2].split("-")[1:]))
    return (depth, widths) if depth >= 8 and depth % 6 == 2 and list(widths) == sorted(widths) else None


def arguments_of(name):
    """The arguments of `build` that a network has beside num_classes and in_channels; ValueError for unknown names."""
    if name not in NETWORKS and not wide(name) and not residual(name) and not vgg.family(name):
        raise ValueError(f"no network is called {name!r}; choose from {', '.join(NETWORKS)}, "
                         "wrn-d-k with d = 10, 16, 22, ... layers, k times as wide, resnetd-a-b-c with d = 8, 14, "
                         "20, ... layers, their widths a <= b <= c by stage, or vgg6-a-b-c and vgg9-a-b-c, which pool "
                         "early")
    return NETWORKS.get(name, ("activation", "shortcut") if residual(name) else ("activation",))


def build(name, num_classes=10, in_channels=3, size=32, activation="relu", pooling="max", shortcut="B"):
    """The network called `name`, freshly initialised from torch's global generator.

    size: pixels a side, 28 or 32, for the LeNets; Cifar-quick takes 32, all others
    any size. shortcut: of ResNets, see `basic_shortcut`. Raises ValueError
    with the choices for an unknown name or argument, and for an argument other than
    the default that the network does not have.
    """
    own = arguments_of(name)
    given = {"size": size, "activation": activation, "pooling": pooling, "shortcut": shortcut}
    for argument, value in given.items():
        if argument not in own and value != CHOICES[argument][0]:
            raise ValueError(f"{name} has no {argument} to choose, only {' and '.join(own)}; {argument} was {value!r}")
        if argument in own and value not in CHOICES[argument]:
            choices = ", ".join(map(str, CHOICES[argument]))
            raise ValueError(f"{name} takes no {argument} {value!r}; choose from {choices}")
    chosen = {argument: given[argument] for argument in own} | {"num_classes": num_classes, "in_channels": in_channels}
    if name in PLAIN:
        return Plain(*PLAIN[name], **chosen)
    if name == "mobilenet":
        return MobileNet(**chosen)
    if vgg.family(name):
        return vgg.build(name, **{**chosen, "activation": ACTIVATIONS[activation]()})
    return WideResNet(*wide(name), **chosen) if wide(name) else ResNet(*residual(name), **chosen)
