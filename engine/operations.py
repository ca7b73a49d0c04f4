"""Operations of training: what a run costs, whatever machine it is on.

    spent += step_pflop(macs_of(model, (3, 32, 32)), images=64, teacher_macs=0)

1 PFLOP is 10^15 floating-point operations: two a multiply-add, a forward pass and
twice that backward for each image at the size it was shown, and a teacher's forward
passes. Batch norm, activations, the optimizer and validation are not counted.
"""
import math

import torch
from torch import nn


@torch.no_grad()
def macs_of(model, shape):
    """Multiply-adds of one image's forward pass through convolutions and linear layers, groups as such.

    shape: (C, H, W) of the image. The model's mode, buffers and all generators stay as they are.
    """
    counted, hooks = [], []

    def count(layer, inputs, output):
        each = (math.prod(layer.kernel_size) * layer.in_channels // layer.groups if isinstance(layer, nn.Conv2d)
                else layer.in_features)
        counted.append(output.numel() * each)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            hooks.append(layer.register_forward_hook(count))
    training, device = model.training, next(iter(model.state_dict().values())).device
    try:
        model.eval()(torch.zeros(1, *shape, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return sum(counted)


def step_pflop(macs, images, teacher_macs=0):
    """PFLOP of a training step on so many images; macs, teacher_macs: of one image at the sizes they are shown."""
    return 2 * images * (3 * macs + teacher_macs) / 1e15
