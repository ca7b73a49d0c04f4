"""BinaryConnect: forward and backward with weights of -H and +H, updates on real weights.

    with binarized(model):                    # -H or +H inside, real weights again at the end
        loss = criterion(model(images), targets)
        loss.backward()
    optimizer.step()
    BC(model).clip()                          # real weights stay within [-H, H]

Courbariaux et al. 2015 (arXiv:1511.00363), algorithm 1. Every convolution and
linear weight that is trained is binary; batch norm, biases and a whitening stem, which
is set once, stay real. With pruning masks the values are -H, 0 and +H. `BC` offers the
same with the usual method names.
"""
from contextlib import contextmanager

import torch
from torch import nn

BINARY = ("binary", "binary-stochastic")      # choices of the line WEIGHTS with binary weights


def binary_weights(model):
    """{name: weight} of every trained convolution and linear layer; a whitening stem is not trained."""
    return {f"{name}.weight": module.weight for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.requires_grad}


def scale_of(weight, scale):
    """H of one weight tensor: 1 for "one", sqrt(1.5 / (fan_in + fan_out)) for "glorot".

    The fans are those of torch.nn.init: of a grouped layer fan_in counts one group, fan_out all outputs.
    """
    if scale == "one":
        return 1.0
    if scale != "glorot":
        raise ValueError(f"scale {scale!r}; choose 'one' or 'glorot'")
    field = weight[0, 0].numel() if weight.dim() > 2 else 1
    return (1.5 / (weight.shape[1] * field + weight.shape[0] * field)) ** 0.5


@torch.no_grad()
def binarize(weight, height, generator=None, mask=None):
    """A tensor of -H and +H (0 where `mask` is False), of the shape of `weight`.

    Deterministic: +H where the weight is at least 0. With `generator`, stochastic:
    +H with probability clip((w / H + 1) / 2, 0, 1). Raises ValueError for weights
    that are not finite.
    """
    wrong = int((~torch.isfinite(weight)).sum())
    if wrong:
        raise ValueError(f"{wrong:,} weights are NaN or infinite; they have no sign")
    if generator is None:
        positive = weight >= 0
    else:
        chance = ((weight / height + 1) / 2).clamp(0, 1)
        positive = torch.rand(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype) < chance
    binary = torch.where(positive, height, -height).to(weight.dtype)
    return binary if mask is None else binary * mask


class BC:
    """BinaryConnect around a model, with the usual method names.

    scale: "one" or "glorot", see `scale_of`; generator: binarizes stochastically;
    masks: {name: bool tensor}, False for pruned weights, which are 0. A step is
    binarization, forward and backward, restore, the optimizer's step, clip.
    """

    def __init__(self, model, scale="one", generator=None, masks=None):
        self.model, self.scale, self.generator, self.masks = model, scale, generator, masks or {}
        self.saved_params = None

    def save_params(self):
        """Save a copy of the real weights, unless one is saved already."""
        if self.saved_params is None:
            self.saved_params = {name: weight.detach().clone() for name, weight in binary_weights(self.model).items()}

    @torch.no_grad()
    def binarization(self):
        """Binarize the weights, always from the saved real ones: a second call does not lose them."""
        self.save_params()
        for name, weight in binary_weights(self.model).items():
            real = self.saved_params[name]
            weight.copy_(binarize(real, scale_of(real, self.scale), self.generator, self.masks.get(name)))

    @torch.no_grad()
    def restore(self):
        """Restore the real weights, in place, so that gradients and optimizer state stay attached to them."""
        for name, real in (self.saved_params or {}).items():
            self.model.get_parameter(name).copy_(real)
        self.saved_params = None

    @torch.no_grad()
    def clip(self):
        """Clip the real weights to [-H, H], in place: beyond it they have no influence on the binary ones."""
        for weight in binary_weights(self.model).values():
            height = scale_of(weight, self.scale)
            weight.clamp_(-height, height)

    def forward(self, images):
        """The model's outputs with its current weights."""
        return self.model(images)


@contextmanager
def binarized(model, scale="one", generator=None, masks=None):
    """A context in which the model has binary weights; at its end, also after an error, the real ones are restored.

    Contexts may be nested: the inner one binarizes weights that are binary already,
    which changes nothing if deterministic, and the outer one restores the real ones.
    """
    connect = BC(model, scale, generator, masks)
    try:
        connect.binarization()
        yield model
    finally:
        connect.restore()
