"""Operations of training: what a run costs, whatever machine it is on.

    spent += step_pflop(macs_of(model, (3, 32, 32)), images=64, teacher_macs=0)

1 PFLOP is 10^15 floating-point operations: two a multiply-add, a forward pass and
twice that backward for each image at the size it was shown, and a teacher's forward
passes. Batch norm, activations, the optimizer and validation are not counted.
"""
import math

import torch
from torch import nn

from engine.modes import in_mode


def zero_image(model, shape):
    """An image of zeros, (1, C, H, W), on the device and of the type of the first floats that `model` holds."""
    some = next((tensor for tensor in model.state_dict().values() if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *shape, device=some.device, dtype=some.dtype)


@torch.no_grad()
def layers_run(model, shape):
    """[(name, layer, shape of its input, of its output)] of convolutions and linear layers, in the order they run.

    One pass over a zero image of (C, H, W), in evaluation: shapes have one image. A layer that runs
    twice is there twice. The model's modes, buffers and all generators stay as they are.
    """
    found, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(
                lambda layer, inputs, output, name=name: found.append((name, layer, inputs[0].shape, output.shape))))
    try:
        with in_mode(model):
            model(zero_image(model, shape))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def macs_of(model, shape):
    """Multiply-adds of one image's forward pass through convolutions and linear layers, groups as such.

    shape: (C, H, W) of the image; the model stays as it is.
    """
    return sum(output.numel() * (math.prod(layer.kernel_size) * layer.in_channels // layer.groups
                                 if isinstance(layer, nn.Conv2d) else layer.in_features)
               for _, layer, _, output in layers_run(model, shape))


def step_pflop(macs, images, teacher_macs=0):
    """PFLOP of a training step on so many images; macs, teacher_macs: of one image at the sizes they are shown."""
    return 2 * images * (3 * macs + teacher_macs) / 1e15
