"""Global magnitude pruning: the weights of the whole network are ranked together.

    masks = global_masks(model, 0.7)                  # 70 % of all weights
    apply_masks(model, masks)                         # exact zeros
    masks = global_masks(model, 0.7, masks)           # 70 % of what remains: 91 %

Built on `torch.nn.utils.prune`, used on copies of the weights: the model stays a
plain network that can be copied, compiled, averaged and saved. A mask is a bool
tensor that the training loop applies after every step, so that neither momentum
nor weight decay brings a weight back. Zeros alone save no operation: `narrow` removes the
weakest channels of the network, until it has at most a given number of multiply-adds.
"""
import copy
import math
import numbers

import torch
from torch import nn
from torch.nn.utils import prune

from engine import shrinking
from engine.doubles import back, in_double
from engine.modes import in_mode
from engine.operations import macs_of
from engine.settings import Setting, line, only

# ---- scores of a weight tensor, in its shape; the largest are kept. SCORE = "l1" calls l1_scores, and so on

def l1_scores(weight):
    """Magnitudes, of the shape of `weight`."""
    return weight.detach().abs()


def lamp_scores(weight):
    """Layer-adaptive magnitudes, of the shape of `weight`: w_u^2 over the sum of w_v^2 of all v not smaller than u.

    Lee et al. 2021 (arXiv:2010.07611), equation 4: the largest weight of each
    layer scores 1, so narrow layers lose less, without extra settings.
    """
    squares, order = in_double(weight.detach()).flatten().square().sort()
    tails = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / tails.clamp_min(torch.finfo(squares.dtype).tiny)
    return back(scores.view(weight.shape), weight.device)


SCORES = {name.removesuffix("_scores"): score for name, score in list(globals().items()) if name.endswith("_scores")}
GRADUAL = ("polynomial", "constant")      # choices of the line PRUNING that prune weights while training, by a schedule
SETTINGS = only("pruning", ("rounds", *GRADUAL), {
    "score": line("l1", tuple(SCORES)),
    "minimum_density": Setting(0.01, "fraction of each layer that is never pruned", low=0, high=1),
    "exclude": Setting([], "layers that are never pruned, such as conv1", form=str, many="+", shown="LAYER"),
    "prune_begin": Setting(0.1, "fraction of the training at which gradual pruning begins", low=0, high=1,
                           only=(("pruning", GRADUAL),)),
    "prune_end": Setting(0.6, "fraction at which gradual pruning ends", low=0, high=1, only=(("pruning", GRADUAL),)),
    "prune_frequency": Setting(100, "gradual pruning: steps between two prunings", low=1, only=(("pruning", GRADUAL),)),
    "macs": Setting(None, "the last pruning also removes channels within blocks, the weakest first, until one "
                    "image takes at most N multiply-adds", low=1, form=int, shown="N", clashes=(
                        ((), "weights", ("lsq",), "whose layers keep their widths; leave one out"),)),
    "macs_layers": Setting([], "layers that --macs removes channels from, such as layer1.0.conv1; all that can, if "
                           "none is named", form=str, many="+", shown="LAYER", only=(("macs", ()),)),
})


# ---- which weights stay

def prunable(model, exclude=()):
    """{name: weight} of every convolution and linear layer whose name is not in `exclude`."""
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear))}
    unknown = [name for name in exclude if name not in layers]
    if unknown:
        raise ValueError(f"no convolution or linear layer is called {unknown[0]!r}; there are {', '.join(layers)}")
    if not set(layers) - set(exclude):
        raise ValueError(f"every layer is excluded ({', '.join(layers)}): there is none to prune")
    return {f"{name}.weight": module.weight for name, module in layers.items() if name not in exclude}


def check_sparsity(value):
    """`value` as a float in [0, 1), or ValueError.

    1 is refused with a message of its own: torch's pruning reads 1 as one weight and
    1.0 as all of them.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"sparsity {value!r} is no number; give a fraction in [0, 1), such as 0.7")
    if value == 1:
        raise ValueError("sparsity 1 is ambiguous: one weight, or all of them? Give a fraction in [0, 1), such as 0.7")
    if not 0 <= value < 1:
        raise ValueError(f"sparsity {value} is outside [0, 1)")
    return float(value)


def global_masks(model, sparsity, masks=None, minimum_density=0.01, exclude=(), score="l1", of="remaining"):
    """Return masks that keep the weights with the largest scores, ranked over the whole network.

    sparsity: the fraction to remove of the weights that `masks` still keeps, so
    that rounds compound (0.7 twice leaves 9 %), or with of="all" the fraction of
    all weights that are then removed. minimum_density: the fraction of each
    layer that is kept whatever its scores, at least one weight, so that no layer is
    emptied. score: a key of `SCORES`. Returns {name: bool tensor of the weight's
    shape}; the model is not changed. Counts are exact even with ties. Raises
    ValueError for a sparsity outside [0, 1), weights that are not finite, a minimum
    density that cannot be kept, or another score or `of`.
    """
    if score not in SCORES:
        raise ValueError(f"score {score!r}: choose from {', '.join(SCORES)}")
    if of not in ("remaining", "all"):
        raise ValueError(f"sparsity of {of!r}; choose 'remaining' or 'all'")
    sparsity = check_sparsity(sparsity)
    weights = prunable(model, exclude)
    refuse_nonfinite(weights)
    masks = {**{name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}, **(masks or {})}
    remaining = sum(int(masks[name].sum()) for name in weights)
    whole = sum(weight.numel() for weight in weights.values())
    removed = to_remove(sparsity, remaining, whole, of)
    protected = {name: floor_of(weight, masks[name], minimum_density) for name, weight in weights.items()}
    held = sum(int(mask.sum()) for mask in protected.values())
    refuse_thinner(sparsity, remaining - removed, held, minimum_density)
    scores = {name: SCORES[score](weight) for name, weight in weights.items()}
    return {**masks, **ranked(scores, masks, protected, removed)}


def check_sparsities(model, sparsities, masks=None, minimum_density=0.01, exclude=(), of="remaining"):
    """Raise ValueError if `global_masks`, for one sparsity after the other, cannot keep the minimum density.

    Only counts are used: model may be on torch's meta device, since no weight is read.
    """
    weights, masks = prunable(model, exclude), masks or {}
    counts = {name: int(masks[name].sum()) if name in masks else weight.numel() for name, weight in weights.items()}
    whole, remaining = sum(weight.numel() for weight in weights.values()), sum(counts.values())
    held = sum(floor_count(weight, minimum_density, counts[name]) for name, weight in weights.items())
    for sparsity in sparsities:
        remaining -= to_remove(sparsity, remaining, whole, of)
        refuse_thinner(sparsity, remaining, held, minimum_density)


def to_remove(sparsity, remaining, whole, of):
    """How many of the `remaining` weights `global_masks` removes; whole: including those already removed."""
    return round(sparsity * remaining) if of == "remaining" else max(0, round(sparsity * whole) - whole + remaining)


def refuse_thinner(sparsity, left, held, minimum_density):
    """Raise ValueError if fewer weights would be `left` than the minimum density keeps."""
    if left < held:
        raise ValueError(f"sparsity {sparsity} leaves {left:,} weights, but a minimum density of {minimum_density} by "
                         f"layer holds {held:,}; lower one of them")


def ranked(scores, masks, protected, removed):
    """Return the masks after removing `removed` more weights: those with the smallest scores, except protected ones.

    All tensors are made contiguous: torch's pruning cannot rank weights in channels_last, their layout on CUDA.
    """
    holders, importance = {}, {}
    for name, score in in_order(scores, masks).items():
        score, holder = score.contiguous(), nn.Module()
        holder.weight = nn.Parameter(score.clone())
        prune.custom_from_mask(holder, "weight", masks[name].contiguous())
        holders[name] = holder
        importance[holder, "weight"] = score.masked_fill(protected[name], math.inf)
    prune.global_unstructured([(holder, "weight") for holder in holders.values()], prune.L1Unstructured,
                              importance_scores=importance, amount=removed)
    return {name: holder.weight_mask.bool() for name, holder in holders.items()}


def in_order(scores, masks):
    """Return the scores or, if any is negative, their ranks over all layers: torch's pruning ranks by magnitude.

    Raises ValueError for a NaN score of a weight that `masks` keeps.
    """
    wrong = {name: int(torch.isnan(score[masks[name]]).sum()) for name, score in scores.items()}
    for name, count in wrong.items():
        if count:
            raise ValueError(f"{count:,} scores of {name} are NaN; they cannot be ranked")
    if not any(bool((score < 0).any()) for score in scores.values()):
        return scores
    order = torch.cat([score.flatten().cpu() for score in scores.values()]).argsort(stable=True)
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(len(order), dtype=torch.float64)
    parts = ranks.split([score.numel() for score in scores.values()])
    return {name: back(part.view(score.shape), score.device)
            for (name, score), part in zip(scores.items(), parts, strict=True)}


def floor_of(weight, mask, density):
    """Mark the largest weights of one layer, at least one and at least the fraction `density`, in a bool tensor."""
    if not 0 <= density <= 1:
        raise ValueError(f"minimum density {density} is outside [0, 1]")
    count = floor_count(weight, density, int(mask.sum()))
    magnitude = weight.detach().abs().masked_fill(~mask, -1.0).flatten()
    kept = torch.zeros_like(magnitude, dtype=torch.bool)
    kept[magnitude.topk(count).indices] = True
    return kept.view_as(weight)


def floor_count(weight, density, kept):
    """How many of a layer's `kept` weights stay whatever their scores."""
    return min(max(1, math.ceil(density * weight.numel())), kept)


def refuse_nonfinite(weights):
    """Raise ValueError that names the first tensor with a NaN or infinity and counts them."""
    for name, weight in weights.items():
        wrong = int((~torch.isfinite(weight)).sum())
        if wrong:
            raise ValueError(f"{name} has {wrong:,} weights that are NaN or infinite; they cannot be ranked")


def held_layers(masks, minimum_density):
    """Names of the layers at their minimum density: global ranking alone would prune them further."""
    return [name for name, mask in masks.items()
            if int(mask.sum()) <= max(1, math.ceil(minimum_density * mask.numel()))]


@torch.no_grad()
def apply_masks(model, masks):
    """Set the weights that `masks` prunes to exactly zero, in place."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


def mask_pairs(model, masks):
    """Return (weights, masks as numbers of their dtype and layout), two lists for `mask_weights` and `mask_gradients`.

    In each step one call for all layers is faster than one per layer, and multiplying by numbers than by bools.
    """
    weights = [model.get_parameter(name) for name in masks]
    return weights, [torch.zeros_like(weight.detach()).copy_(mask)
                     for weight, mask in zip(weights, masks.values(), strict=True)]


@torch.no_grad()
def mask_weights(weights, masks):
    """`apply_masks` with the lists of `mask_pairs`."""
    if weights:
        torch._foreach_mul_(weights, masks)


def mask_gradients(weights, masks):
    """Zero the gradients of pruned weights, so that gradient norms and momentum ignore them.

    weights, masks: from `mask_pairs`.
    """
    found = [(weight.grad, mask) for weight, mask in zip(weights, masks, strict=True) if weight.grad is not None]
    if found:
        torch._foreach_mul_(*map(list, zip(*found, strict=True)))


def sparsity_of(model, exclude=()):
    """The fraction of exact zeros among the convolution and linear weights."""
    weights = prunable(model, exclude).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# ---- channels removed to reach a number of multiply-adds

def narrow(model, macs, shape, layers=(), average=None, optimizer=None, masks=None, exclude=()):
    """Remove the weakest channels within the blocks of `model` until an image takes at most `macs` multiply-adds.

    A channel's strength is the magnitude of the weights that make it times that of the
    weights that read it, each relative to the mean of its layer. One limit applies to
    the whole network; residual streams are not narrowed, and channels are kept where
    groups must stay equally wide. shape: (C, H, W) of one image; layers: names of the
    layers that may lose channels, all if empty; exclude: names of those that stay
    unchanged. average, optimizer, masks: see `shrinking.remove`.
    Returns {layer: (channels before, after)} of what changed. Raises ValueError, with
    the fewest multiply-adds that are possible, if `macs` cannot be reached.
    """
    strengths = {space["name"]: strength_of(model, space) for space in inner_spaces(model, layers, exclude)}
    limits = torch.cat([torch.tensor([-1.0]), *strengths.values()]).unique()      # ascending; the first removes none
    low, high = 0, len(limits) - 1
    refuse_wider(macs, narrowed_macs(model, strengths, limits[high], shape))
    while low < high:                     # binary search: the lowest limit that is enough
        middle = (low + high) // 2
        enough = narrowed_macs(model, strengths, limits[middle], shape) <= macs
        low, high = (low, middle) if enough else (middle + 1, high)
    return remove_weak(model, strengths, limits[low], average, optimizer, masks)


def check_macs(model, macs, shape, layers=(), exclude=()):
    """Raise ValueError if `narrow` cannot reach `macs` multiply-adds, or for a layer that cannot lose channels."""
    every = {space["name"]: torch.zeros(len(model.get_submodule(space["makers"][0]).weight))
             for space in inner_spaces(model, layers, exclude)}
    refuse_wider(macs, narrowed_macs(model, every, 0.0, shape))


def refuse_wider(macs, least):
    """Raise ValueError if the `least` possible number of multiply-adds is above `macs`."""
    if least > macs:
        raise ValueError(f"--macs {macs}: without any channel that can leave the network still has {least:,} "
                         "multiply-adds; give as many or more")


def inner_spaces(model, layers=(), exclude=()):
    """The trained channel spaces within blocks, or between consecutive layers; only those of `layers`, if any.

    Spaces that a layer of `exclude` makes or reads are left out. Raises ValueError for a layer without a space.
    """
    spaces = {space["name"]: space for space in shrinking.trained_spaces(model) if not space["branch"]
              and not set(exclude) & {*space["makers"], *space["readers"]}}
    unknown = [name for name in layers if name not in spaces]
    if unknown:
        raise ValueError(f"{unknown[0]!r} cannot lose channels by --macs; these can: {', '.join(spaces) or 'none'}")
    return [space for name, space in spaces.items() if not layers or name in layers]


@torch.no_grad()
def strength_of(model, space):
    """(C,) strengths of a space's channels: making times reading magnitudes, each scaled to a mean of 1."""
    made = shrinking.magnitudes(shrinking.made_weights(model, space))
    read = sum(shrinking.magnitudes(shrinking.read_weights(model, space, reader)) for reader in space["readers"])
    return made / made.mean().clamp_min(1e-30) * read / read.mean().clamp_min(1e-30)


def remove_weak(model, strengths, limit, average=None, optimizer=None, masks=None):
    """Remove the channels no stronger than `limit`, as far as groups stay equally wide. Returns what `narrow` does."""
    changed = {}
    for space in inner_spaces(model, strengths) if strengths else ():
        strength = strengths[space["name"]]
        keep = shrinking.balanced(strength <= limit, strength, *shrinking.partitions(model, space))
        if len(keep) < len(strength):
            changed[space["name"]] = len(strength), len(keep)
            shrinking.remove(model, space, keep, average, optimizer, masks)
    return changed


def narrowed_macs(model, strengths, limit, shape):
    """The multiply-adds of one image in a copy of `model` without the channels no stronger than `limit`."""
    smaller = copy.deepcopy(model)
    remove_weak(smaller, strengths, limit)
    return macs_of(smaller, shape)


# ---- sparsity over time: the sparsity to reach at a step, or None if nothing is pruned there

def constant_schedule(step, sparsity, begin, end, frequency):
    """`sparsity` at step `begin`, every `frequency` steps after it, and at `end`; else None."""
    check_schedule([sparsity], begin, end, frequency)
    return sparsity if fires(step, begin, end, frequency) else None


def polynomial_schedule(step, initial, final, begin, end, frequency):
    """final + (initial - final) (1 - p)^3 with p = (step - begin) / (end - begin), when it fires; else None.

    Zhu and Gupta 2017 (arXiv:1710.01878), equation 1. It fires at `begin`, every
    `frequency` steps after it, and at `end`, where it gives `final` exactly.
    """
    check_schedule([initial, final], begin, end, frequency)
    if not fires(step, begin, end, frequency):
        return None
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


def fires(step, begin, end, frequency):
    """Whether a schedule prunes at `step`."""
    return begin <= step <= end and ((step - begin) % frequency == 0 or step == end)


def check_schedule(sparsities, begin, end, frequency):
    """Raise ValueError unless 0 <= s < 1, begin >= 0, end > begin and frequency > 0."""
    for sparsity in sparsities:
        check_sparsity(sparsity)
    if begin < 0 or end <= begin or frequency <= 0:
        raise ValueError(f"a pruning schedule from step {begin} to {end} every {frequency} steps: "
                         "begin must be at least 0, end after it, and the frequency at least 1")


def recalibrate(model, batches):
    """Recompute batch norm's running statistics as plain averages over `batches` of images, in place.

    After pruning the activations have other means and variances than the running
    ones. batches: an iterable of (N, C, H, W), or of tuples that begin with it.
    """
    with in_mode(model, training=True):
        torch.optim.swa_utils.update_bn(batches, model)
