"""Dense convolutions of small images, whose filter gradient is computed by matrix products where that is faster.

    use_products(model)

oneDNN computes the filter gradient row by row of an image. On CPUs with AMX, whose
products take 32 pixels at once, rows of 3 or 7 pixels leave most of each product empty:
for a 3x3 convolution of 512 channels at 3x3 pixels it takes six times as long as nine
matrix products, one for each kernel position, which give the same result.
"""
import torch
import torch.nn.functional as F
from torch import nn

from engine import compiling

WIDEST = 7             # image width above which oneDNN is as fast
CHANNELS = 256         # input and output channels, below which the copies cost more than is saved


class _Convolution(torch.autograd.Function):
    """A convolution with stride 1, without bias or groups, whose filter gradient comes from `filter_gradient`."""

    @staticmethod
    def forward(context, images, weight, padding):
        context.save_for_backward(images, weight)
        context.padding = padding
        return F.conv2d(images, weight, None, 1, padding)

    @staticmethod
    def backward(context, gradient):
        images, weight = context.saved_tensors
        back = filters = None
        if context.needs_input_grad[0]:
            back = torch.ops.aten.convolution_backward(gradient, images, weight, None, [1, 1], context.padding, [1, 1],
                                                       False, [0, 0], 1, [True, False, False])[0]
        if context.needs_input_grad[1]:
            filters = filter_gradient(images, gradient, weight.shape[2:], context.padding)
        return back, filters, None


def filter_gradient(images, gradient, kernel, padding):
    """The filter gradient of a convolution with stride 1, by one matrix product for each kernel position.

    images: (N, I, H, W); gradient: (N, O, H', W') of the outputs; kernel, padding: (rows, columns) ->
    (O, I, *kernel), of the images' type. Fastest if images and gradient are in channels_last.
    """
    (rows, columns), (outputs, height, width) = kernel, gradient.shape[1:]
    lying = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    turned = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).T
    places = images.new_empty(rows, columns, outputs, images.shape[1])
    for row in range(rows):
        for column in range(columns):
            shifted = lying[:, row:row + height, column:column + width].reshape(-1, images.shape[1])
            torch.mm(turned, shifted, out=places[row, column])
    return places.permute(2, 3, 0, 1)


class SmallImageConv2d(nn.Conv2d):
    """A convolution that uses `filter_gradient` when it trains on small images in bfloat16, outside torch.compile."""

    def forward(self, images):
        small = images.shape[-1] <= WIDEST and not torch.compiler.is_compiling()
        if not small or not compiling.trains_in_bfloat16(self, images):
            return super().forward(images)
        kind = torch.get_autocast_dtype("cpu")
        return _Convolution.apply(images.to(kind), self.weight.to(kind), self.padding)


def use_products(model):
    """Make dense convolutions of `model` with many channels `SmallImageConv2d`, if the CPU has AMX.

    Outputs are the same, gradients agree to rounding.
    """
    compiling.retype(model, (SmallImageConv2d,),
                     lambda layer: SmallImageConv2d if takes_products(layer) else nn.Conv2d)


def takes_products(layer):
    """Whether `filter_gradient` suits a layer: stride 1, no groups, bias or dilation, no 1x1 kernel, many channels."""
    return (layer.stride == layer.dilation == (1, 1) and layer.groups == 1 and layer.bias is None
            and layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and layer.kernel_size != (1, 1)
            and min(layer.in_channels, layer.out_channels) >= CHANNELS)
