"""1x1 convolutions with a stride: a workaround for oneDNN's unsafe weight gradient on some CPUs.

On a CPU with AVX2 but without AVX-512, oneDNN 3.12 (torch 2.14) writes the weight
gradient of such a convolution of fewer than 8 channels, in channels_last, beyond the end
of its buffer: the process crashes, or continues with corrupted memory (uxlfoundation/oneDNN
issue 6035; with AVX-512 a block has 16 channels). When gradients are computed, the pixels
that the stride reads are therefore selected first; the rest is the same convolution
without a stride.
"""
import torch
import torch.nn.functional as F
from torch import nn

SAFE = 16     # input channels from which it is safe: a whole block, the largest of all CPUs


def picked(layer, images):
    """(images, stride) to pass to F.conv2d for the convolution `layer` of images (N, C, H, W), safely."""
    if layer.kernel_size != (1, 1) or layer.in_channels >= SAFE or not torch.is_grad_enabled():
        return images, layer.stride
    down, right = layer.stride
    return images[:, :, ::down, ::right], 1


class StridedConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride and without padding, computed safely, see above."""

    def forward(self, images):
        images, stride = picked(self, images)
        return F.conv2d(images, self.weight, self.bias, stride, groups=self.groups)

    def like(self, plain):
        """Convert a plain convolution to this class; returns it."""
        plain.__class__ = StridedConv2d
        return plain
