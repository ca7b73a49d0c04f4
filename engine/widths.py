"""The widths of all layers: read them from a network, and resize another network to them.

    widths = widths_of(model)            # {"conv1": [3, 64], "bn1": [64], ...}
    resize(other, widths, weights)       # then `other` can load the weights of `model`
"""
import torch
from torch import nn


def widths_of(model):
    """{layer: [inputs, outputs]} for convolutions and linear layers, {layer: [channels]} for batch norms."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            widths[name] = [module.in_channels, module.out_channels]
        elif isinstance(module, nn.Linear):
            widths[name] = [module.in_features, module.out_features]
        elif isinstance(module, nn.BatchNorm2d):
            widths[name] = [module.num_features]
    return widths


def resize(model, widths, weights):
    """Give every layer its width in a file, and remove layers that the file does not list.

    The weights of a resized layer are undefined afterwards. weights: the file's tensors; their
    shapes give the groups of a convolution. A buffer that is None in `model` and a tensor in
    the file is created.
    """
    for name, width in widths_of(model).items() if widths else ():
        if name not in widths:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, None)
        elif widths[name] != width:
            layer = model.get_submodule(name)
            model.set_submodule(name, layer_like(layer, widths[name], weights.get(f"{name}.weight")))
    for parent, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            made = weights.get(f"{parent}.{leaf}")
            if buffer is None and made is not None:
                setattr(module, leaf, torch.zeros_like(made, device=next(module.parameters()).device))


def layer_like(layer, width, weight=None):
    """A new layer like `layer` except for its width; the shape of `weight`, if given, sets a convolution's groups."""
    if isinstance(layer, nn.Conv2d):
        groups = layer.groups if weight is None else width[0] // max(1, weight.shape[1])
        fresh = nn.Conv2d(*width, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups,
                          layer.bias is not None, layer.padding_mode)
    elif isinstance(layer, nn.Linear):
        fresh = nn.Linear(*width, bias=layer.bias is not None)
    else:
        fresh = nn.BatchNorm2d(*width, layer.eps, layer.momentum)
    fresh = fresh.to(layer.weight.device, layer.weight.dtype).train(layer.training)
    for own, given in zip(fresh.parameters(), layer.parameters(), strict=False):
        own.requires_grad_(given.requires_grad)
    return layer.like(fresh) if hasattr(layer, "like") else fresh      # quantized layers: QuantizedConv2d.like
