"""Depthwise separable convolutions in bfloat16 on a CPU, computed so that they train faster than in float32.

    use_separable(model)

In bfloat16 on CPUs with AMX, oneDNN is quick at most of what such a network computes, and
very slow at three things: the gradient of a strided depthwise convolution's images, the
gradient of depthwise filters on the smallest images, and both gradients of 1x1 filters there.
Each is computed as something that it is quick at.
"""
import torch
import torch.nn.functional as F
from torch import nn

from engine import compiling

SMALLEST = 4           # pixels of a row, up to which the gradients of filters are computed here
CHANNELS = 256         # of inputs and of outputs of 1x1 filters, below which nothing is gained


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution that keeps the size of images, or takes every n-th row and column of that."""

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
    """The depthwise convolution of images (N, C, H, W) with an odd kernel (C, 1, K, L), zeros around them."""
    return F.conv2d(images, weight, None, stride, half(weight), 1, len(weight))


def half(weight):
    """How many rows and columns of zeros keep the size of images under an odd kernel."""
    return weight.shape[2] // 2, weight.shape[3] // 2


def image_gradient(gradient, weight, stride, images):
    """The gradient of the images: that of the outputs, with zeros between, through the kernel turned round."""
    if tuple(stride) != (1, 1):
        outputs, gradient = gradient, torch.zeros_like(images)
        gradient[:, :, ::stride[0], ::stride[1]] = outputs
    return convolved(gradient, weight.flip(2, 3))


def filter_gradient(images, gradient, weight, stride):
    """The gradient of the filters, (C, 1, K, L); on the smallest images one sum of products for each place of them."""
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
    """A depthwise convolution that takes the gradients above while it trains in bfloat16."""

    def forward(self, images):
        if not compiling.trains_in_bfloat16(self, images):
            return super().forward(images)
        return _Depthwise.apply(images.bfloat16(), self.weight.bfloat16(), self.stride)


class PointwiseConv2d(nn.Conv2d):
    """A convolution of 1x1 filters that trains as the product of matrices that it is, on the smallest images."""

    def forward(self, images):
        if images.shape[-1] > SMALLEST or not compiling.trains_in_bfloat16(self, images):
            return super().forward(images)
        return F.linear(images.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


def use_separable(model):
    """Let depthwise convolutions and wide ones of 1x1 filters compute as above where the CPU has AMX.

    Outputs and gradients agree to rounding.
    """
    compiling.retype(model, (DepthwiseConv2d, PointwiseConv2d), kind_of)


def kind_of(layer):
    """The class of a convolution: one of those above, or torch's own."""
    if layer.bias is not None or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return nn.Conv2d
    if 1 < layer.groups == layer.in_channels == layer.out_channels:
        odd = all(size % 2 for size in layer.kernel_size)
        return DepthwiseConv2d if odd and layer.padding == half(layer.weight) else nn.Conv2d
    wide = min(layer.in_channels, layer.out_channels) >= CHANNELS
    plain = layer.groups == 1 and layer.kernel_size == layer.stride == (1, 1) and layer.padding in ((0, 0), "valid")
    return PointwiseConv2d if plain and wide else nn.Conv2d
