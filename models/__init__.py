"""Small networks for small images: LeNet-5, Cifar-quick, MobileNetV1, ResNets of 20 to 110 layers, wide ResNets.

    from models import build
    model = build("resnet56", shortcut="A")      # 853,018 parameters, 125,485,696 MACs at 32x32
    model = build("lenet5", in_channels=1, size=28, activation="tanh", pooling="average")

`NETWORKS` names them; `build` also takes any wrn-d-k of 6 n + 4 layers, any ResNet of
6 n + 2 layers with the widths of its stages, such as resnet20-12-28-64, and the networks
of vgg.py. `arguments_of` says which arguments a network has; any other one is refused,
not ignored.

Every network has `channels()`: which layers make, normalise and read each set of
channels that can be removed together (`resnet_factorized.space`). Networks with
removed channels run without changes, since widths are read from the layers.
"""
import re

from models import vgg
from models.activations import ACTIVATIONS, POOLINGS
from models.plain import MobileNet, Plain
from models.residual import BasicBlock, Pad, ResNet, WideBlock, WideResNet  # noqa: F401  (blocks are named from here)

PLAIN = {      # filters, hidden linear layers, padding: None pads the images to 32x32
    "lenet5": ((6, 16), (120, 84), None),
    "lenet5-student": ((3, 8), (50,), None),
    "cifar-quick": ((32, 32, 64), (64,), (2, 2, 2)),
}
RESIDUAL = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
NETWORKS = {   # the arguments besides num_classes and in_channels
    "lenet5": ("size", "activation", "pooling"), "lenet5-student": ("size", "activation", "pooling"),
    "cifar-quick": ("activation", "pooling"), "mobilenet": ("activation",),
    **dict.fromkeys(RESIDUAL, ("activation", "shortcut")),
    "wrn-16-4": ("activation",), "wrn-28-10": ("activation",),
}
CHOICES = {    # the default first
    "size": (32, 28), "activation": tuple(ACTIVATIONS), "pooling": tuple(POOLINGS), "shortcut": ("B", "A"),
}


def wide(name):
    """(depth, k) of a name like wrn-16-4; None for any other name, or without 6 n + 4 layers."""
    match = re.fullmatch(r"wrn-([1-9][0-9]{0,2})-([1-9][0-9]?)", name)
    depth, factor = map(int, match.groups()) if match else (0, 0)
    return (depth, factor) if depth >= 10 and depth % 6 == 4 else None


def residual(name):
    """(depth, widths of the stages) of resnet20 to 110, or of a name like resnet20-12-28-64; None for others.

    Such names have 6 n + 2 layers, and widths that do not decrease.
    """
    match = re.fullmatch(r"resnet([1-9][0-9]{0,2})((?:-[1-9][0-9]{0,3}){3})", name)
    if not match:
        return (int(name.removeprefix("resnet")), (16, 32, 64)) if name in RESIDUAL else None
    depth, widths = int(match[1]), tuple(map(int, match[2].split("-")[1:]))
    return (depth, widths) if depth >= 8 and depth % 6 == 2 and list(widths) == sorted(widths) else None


def arguments_of(name):
    """The arguments of `build` that a network has besides num_classes and in_channels; ValueError if unknown."""
    if name not in NETWORKS and not wide(name) and not residual(name) and not vgg.family(name):
        raise ValueError(f"no network is called {name!r}; choose from {', '.join(NETWORKS)}, "
                         "wrn-d-k with d = 10, 16, 22, ... layers, k times as wide, resnetd-a-b-c with d = 8, 14, "
                         "20, ... layers, their widths a <= b <= c by stage, or vgg6-a-b-c and vgg9-a-b-c, which pool "
                         "early")
    return NETWORKS.get(name, ("activation", "shortcut") if residual(name) else ("activation",))


def build(name, num_classes=10, in_channels=3, size=32, activation="relu", pooling="max", shortcut="B"):
    """The network called `name`, freshly initialised from torch's global generator.

    size: image side in pixels, 28 or 32, for the LeNets; Cifar-quick takes 32, all others
    any size. shortcut: of ResNets, see `basic_shortcut`. Raises ValueError
    with the choices for an unknown name or argument, and for an argument other than
    the default that the network does not have.
    """
    own = arguments_of(name)
    given = {"size": size, "activation": activation, "pooling": pooling, "shortcut": shortcut}
    for argument, value in given.items():
        if argument not in own and value != CHOICES[argument][0]:
            others = f", only {' and '.join(own)}" if own else ""
            raise ValueError(f"{name} has no {argument} to choose{others}; {argument} was {value!r}")
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
