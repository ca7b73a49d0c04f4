"""Depthwise separable convolutions in bfloat16 on a CPU, computed so that they train faster than in float32.

    use_separable(model)

In bfloat16 on CPUs with AMX, oneDNN is fast at most of what such a network computes, but
very slow at three things: the input gradient of a strided depthwise convolution, the filter
gradient of depthwise convolutions on the smallest images, and both gradients of 1x1
convolutions there. Each is replaced by equivalent operations that are fast.
"""
import torch
import torch.nn.functional as F
from torch import nn

from engine import compiling

SMALLEST = 4           # image width up to which filter gradients are computed here
CHANNELS = 256         # input and output channels of 1x1 convolutions, below which nothing is gained


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution with padding that keeps the image size; with a stride, every n-th row and column."""

    @staticmethod
    def forward(context, images, weight, stride):
        context.save_for_backward(images, weight)
        context.stride = stride
        return convolved(images, weight, stride)

    @staticmethod
    def backward(context, gradient):
        images, weight = context.saved_tensors
        back = filters = None
        if context.needs_input_grad[0]:
            back = image_gradient(gradient, weight, context.stride, images)
        if context.needs_input_grad[1]:
            filters = filter_gradient(images, gradient, weight, context.stride)
        return back, filters, None


def convolved(images, weight, stride=(1, 1)):
    """The depthwise convolution of images (N, C, H, W) with an odd kernel (C, 1, K, L) and zero padding."""
    return F.conv2d(images, weight, None, stride, half(weight), 1, len(weight))


def half(weight):
    """(rows, columns) of zero padding that keep the image size for an odd kernel."""
    return weight.shape[2] // 2, weight.shape[3] // 2


def image_gradient(gradient, weight, stride, images):
    """The gradient of the images: the outputs' gradient, spread by the stride, convolved with the flipped kernel."""
    if tuple(stride) != (1, 1):
        outputs, gradient = gradient, torch.zeros_like(images)
        gradient[:, :, ::stride[0], ::stride[1]] = outputs
    return convolved(gradient, weight.flip(2, 3))


def filter_gradient(images, gradient, weight, stride):
    """The gradient of the filters, (C, 1, K, L); on the smallest images one sum of products per kernel position."""
    rows, columns = half(weight)
    if images.shape[-1] > SMALLEST:
        return torch.ops.aten.convolution_backward(gradient, images, weight, None, stride, [rows, columns], [1, 1],
                                                   False, [0, 0], len(weight), [False, True, False])[1]
    around, outputs = F.pad(images.float(), (columns, columns, rows, rows)), gradient.float()
    height, width = ((size - 1) * step + 1 for size, step in zip(gradient.shape[2:], stride, strict=True))
    sums = [(around[:, :, row:row + height:stride[0], column:column + width:stride[1]] * outputs).sum((0, 2, 3))
            for row in range(weight.shape[2]) for column in range(weight.shape[3])]
    return torch.stack(sums, 1).view(weight.shape).to(weight.dtype)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that uses the gradients above when it trains in bfloat16."""

    def forward(self, images):
        if not compiling.trains_in_bfloat16(self, images):
            return super().forward(images)
        return _Depthwise.apply(images.bfloat16(), self.weight.bfloat16(), self.stride)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that is computed as a matrix product when it trains on the smallest images in bfloat16."""

    def forward(self, images):
        if images.shape[-1] > SMALLEST or not compiling.trains_in_bfloat16(self, images):
            return super().forward(images)
        return F.linear(images.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


def use_separable(model):
    """Let depthwise convolutions and wide 1x1 convolutions compute as above if the CPU has AMX.

    Outputs and gradients agree to rounding.
    """
    compiling.retype(model, (DepthwiseConv2d, PointwiseConv2d), kind_of)


def kind_of(layer):
    """The class that a convolution should have: one of those above, or nn.Conv2d."""
    if layer.bias is not None or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return nn.Conv2d
    if 1 < layer.groups == layer.in_channels == layer.out_channels:
        odd = all(size % 2 for size in layer.kernel_size)
        return DepthwiseConv2d if odd and layer.padding == half(layer.weight) else nn.Conv2d
    wide = min(layer.in_channels, layer.out_channels) >= CHANNELS
    plain = layer.groups == 1 and layer.kernel_size == layer.stride == (1, 1) and layer.padding in ((0, 0), "valid")
    return PointwiseConv2d if plain and wide else nn.Conv2d
