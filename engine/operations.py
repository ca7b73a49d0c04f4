"""Operations of training: the cost of a run, independent of the machine.

    spent += step_pflop(macs_of(model, (3, 32, 32)), images=64, teacher_macs=0)

1 PFLOP is 10^15 floating-point operations. A multiply-add counts two; each image counts
a forward pass, a backward pass of twice that, at the size it was shown, and the teacher's
forward pass. Batch norm, activations, the optimizer and validation are not counted.
"""
import math

import torch
from torch import nn

from engine.modes import in_mode


def zero_image(model, shape):
    """An image of zeros, (1, C, H, W), with the device and type of the first floating-point tensor of `model`."""
    some = next((tensor for tensor in model.state_dict().values() if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *shape, device=some.device, dtype=some.dtype)


@torch.no_grad()
def layers_run(model, shape):
    """[(name, layer, shape of its input, of its output)] of convolutions and linear layers, in the order they run.

    Takes one pass over a zero image of (C, H, W) in evaluation mode: the shapes are for a batch of one. A layer that
    runs twice is listed twice. The model's modes, buffers and all generators stay as they are.
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
    """Multiply-adds of one image's forward pass through convolutions and linear layers; groups are accounted for.

    shape: (C, H, W) of the image; the model is not changed.
    """
    return sum(output.numel() * (math.prod(layer.kernel_size) * layer.in_channels // layer.groups
                                 if isinstance(layer, nn.Conv2d) else layer.in_features)
               for _, layer, _, output in layers_run(model, shape))


def step_pflop(macs, images, teacher_macs=0):
    """PFLOP of a training step on `images` images; macs, teacher_macs: of one image at the size it is shown."""
    return 2 * images * (3 * macs + teacher_macs) / 1e15
