"""1x1 convolutions with a stride, for which oneDNN has no safe weight gradient on every CPU.

On a CPU with AVX2 and without AVX-512, oneDNN 3.12 (torch 2.14) computes the weight
gradient of such a convolution of fewer than 8 channels, in channels_last, beyond the end
of its buffer: the process dies, or computes on with broken memory (uxlfoundation/oneDNN
issue 6035; with AVX-512 a block has 16). Where gradients are taken, the pixels that the
stride reads are therefore picked first: the same convolution, without a stride.
"""
import torch
import torch.nn.functional as F
from torch import nn

SAFE = 16     # input channels: a whole block of them, of the widest kernel


def picked(layer, images):
    """(images, stride): what F.conv2d takes for a convolution `layer` of images (N, C, H, W), safely."""
    if layer.kernel_size != (1, 1) or layer.in_channels >= SAFE or not torch.is_grad_enabled():
        return images, layer.stride
    down, right = layer.stride
    return images[:, :, ::down, ::right], 1


class StridedConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride, without padding; see above."""

    def forward(self, images):
        images, stride = picked(self, images)
        return F.conv2d(images, self.weight, self.bias, stride, groups=self.groups)

    def like(self, plain):
        """A plain convolution, made one of this kind."""
        plain.__class__ = StridedConv2d
        return plain
