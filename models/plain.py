"""Networks of consecutive layers: LeNet-5, Cifar-quick, MobileNetV1."""
from torch import nn

from models.activations import ACTIVATIONS, POOLINGS
from resnet_factorized import convolution, initialise, space


class Plain(nn.Module):
    """5x5 convolutions, each with activation and 2x2 pooling of stride 2, then linear layers; biases, no batch norm.

    LeNet-5 (LeCun et al. 1998) as it is built today, without its RBF outputs, or
    Caffe's Cifar-quick, with this pooling and an activation after linear1.
    images: (N, in_channels, size, size) float, normalised -> logits: (N, num_classes).
    filters: of conv1, conv2, ...; hidden: widths of the linear layers before the
    classifier; padding: of each convolution, None pads images to 32x32.
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
        """One `space` per layer except the classifier; the last convolution's channels are read flattened."""
        names = self.convolutions + self.linears
        spaces = [space(maker, [maker], readers=[reader]) for maker, reader in zip(names, names[1:], strict=False)]
        flattened = spaces[len(self.convolutions) - 1]
        flattened["unfold"] = self.linear1.in_features // getattr(self, flattened["name"]).out_channels
        return spaces


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
