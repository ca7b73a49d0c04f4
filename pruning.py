"""Global magnitude pruning: which weights stay, over the whole network at once.

    masks = global_masks(model, 0.7)                  # 70 % of all weights
    apply_masks(model, masks)                         # exact zeros
    masks = global_masks(model, 0.7, masks)           # 70 % of what remains: 91 %

Built on `torch.nn.utils.prune`, used on copies of the weights: the model stays a
plain network that can be copied, compiled, averaged and saved. A mask is a bool
tensor that the training loop applies after every step, so that neither momentum
nor weight decay brings a weight back.
"""
import math

import torch
from torch import nn
from torch.nn.utils import prune


def prunable(model, exclude=()):
    """{name: weight} of every convolution and linear layer whose name is not in `exclude`."""
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear))}
    unknown = [name for name in exclude if name not in layers]
    if unknown:
        raise ValueError(f"no convolution or linear layer is called {unknown[0]!r}; there are {', '.join(layers)}")
    return {f"{name}.weight": module.weight for name, module in layers.items() if name not in exclude}


def check_sparsity(value):
    """`value` as a float in [0, 1), or ValueError.

    An integer 1 is refused apart: torch's pruning reads it as one weight and 1.0
    as all of them.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"sparsity {value!r} is no number; give a fraction in [0, 1), such as 0.7")
    if value == 1:
        raise ValueError("sparsity 1 is ambiguous: one weight, or all of them? Give a fraction in [0, 1), such as 0.7")
    if not 0 <= value < 1:
        raise ValueError(f"sparsity {value} is outside [0, 1)")
    return float(value)


def global_masks(model, sparsity, masks=None, minimum_density=0.01, exclude=()):
    """Keep the weights of largest magnitude, ranked over the whole network.

    sparsity: the fraction to remove of the weights that `masks` still keeps, so
    that rounds compound (0.7 twice leaves 9 %). minimum_density: the share of
    each layer that is kept whatever its magnitudes, at least one weight, so that
    no layer is emptied. Returns {name: bool tensor of the weight's shape}; the
    model is not changed. Counts are exact under ties. Raises ValueError for a
    sparsity outside [0, 1), weights that are not finite, or densities that
    cannot be held.
    """
    sparsity = check_sparsity(sparsity)
    weights = prunable(model, exclude)
    refuse_nonfinite(weights)
    masks = masks or {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    remaining = sum(int(masks[name].sum()) for name in weights)
    protected = {name: floor_of(weight, masks[name], minimum_density) for name, weight in weights.items()}
    held = sum(int(mask.sum()) for mask in protected.values())
    removed = round(sparsity * remaining)
    if remaining - removed < held:
        raise ValueError(f"sparsity {sparsity} leaves {remaining - removed:,} weights, but a minimum density of "
                         f"{minimum_density} by layer holds {held:,}; lower one of them")
    return ranked(weights, masks, protected, removed)


def ranked(weights, masks, protected, removed):
    """The masks after `removed` more weights, the smallest that are not protected, are taken out."""
    holders, scores = {}, {}
    for name, weight in weights.items():
        holder = nn.Module()
        holder.weight = nn.Parameter(weight.detach().clone())
        prune.custom_from_mask(holder, "weight", masks[name])
        holders[name] = holder
        scores[holder, "weight"] = weight.detach().abs().masked_fill(protected[name], math.inf)
    prune.global_unstructured([(holder, "weight") for holder in holders.values()], prune.L1Unstructured,
                              importance_scores=scores, amount=removed)
    return {name: holder.weight_mask.bool() for name, holder in holders.items()}


def floor_of(weight, mask, density):
    """The largest entries of one layer, at least one and at least the share `density`, as a bool tensor."""
    if not 0 <= density <= 1:
        raise ValueError(f"minimum density {density} is outside [0, 1]")
    count = min(max(1, math.ceil(density * weight.numel())), int(mask.sum()))
    magnitude = weight.detach().abs().masked_fill(~mask, -1.0).flatten()
    kept = torch.zeros_like(magnitude, dtype=torch.bool)
    kept[magnitude.topk(count).indices] = True
    return kept.view_as(weight)


def refuse_nonfinite(weights):
    """ValueError that names the first tensor with a NaN or infinity and counts them."""
    for name, weight in weights.items():
        wrong = int((~torch.isfinite(weight)).sum())
        if wrong:
            raise ValueError(f"{name} has {wrong:,} weights that are NaN or infinite; they cannot be ranked")


def held_layers(masks, minimum_density):
    """Names of the layers that stand at their minimum density: global ranking alone would thin them further."""
    return [name for name, mask in masks.items()
            if int(mask.sum()) <= max(1, math.ceil(minimum_density * mask.numel()))]


@torch.no_grad()
def apply_masks(model, masks):
    """Set the weights that `masks` drops to exactly zero, in place."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


def mask_gradients(model, masks):
    """Zero the gradients of dropped weights, so that norms and momentum see the network that is trained."""
    for name, mask in masks.items():
        gradient = model.get_parameter(name).grad
        if gradient is not None:
            gradient.mul_(mask)


def sparsity_of(model, exclude=()):
    """The fraction of exact zeros among the convolution and linear weights."""
    weights = prunable(model, exclude).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
