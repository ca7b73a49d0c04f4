"""MorphNet: find the width of every layer by training, within a budget of MACs, weights or seconds.

    sizes = sizes_of(model, (3, 32, 32))
    loss = loss + strength * penalty(model, sizes, "macs", threshold=0.01)      # at each step of any loop
    structure = structure_of(model, threshold=0.01)                             # {channel space: channels alive}
    structure, factor = expand(model, structure, sizes, "macs", budget)         # all widths scaled to the budget
    rebuild(model, structure)                                                   # fresh weights: train from scratch

Gordon et al. 2018 (arXiv:1711.06798). A layer costs c A_in A_out, where A_in and A_out
are the numbers of channels alive on its two sides; the penalty of a channel is its r times
its cost while all other channels stay as they are. r is the batch norm's |scale| or,
without batch norm, the L2 norm of the filter. For another iteration repeat this with the
sizes of the rebuilt network.

The method `channels()` of a network says which layers share channels. The channels of a
residual stream form one set, with one r each: they are alive or dead in all its layers at
once. Branch outputs outside such a set (shortcut A) keep their width. A block of width 0
is its shortcut alone.
"""
import json
import math
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from engine import costs, files, shrinking
from engine.costs import METRICS, check_metric, coefficients, price, sides
from engine.settings import Setting
from engine.widths import layer_like, widths_of
from resnet_factorized import initialise

SETTINGS = {
    "morph_cost": Setting("macs", "cost that the penalty and the budget measure", choices=METRICS),
    "morph_strength": Setting(0.1, "weight of the penalty in the loss; the penalty is about 2 at the start", low=0),
    "morph_threshold": Setting(0.01, "scale of batch norm at or below which a channel is dead", low=0),
    "morph_budget": Setting(0.5, "cost of the new structure, as a share of the network it comes from", low=1e-6,
                            high=100),
    "morph_round_to": Setting(1, "widths are multiples of this number", low=1),
    "morph_device": Setting(None, "the device's MACs and bytes a second, for --morph-cost latency", above=0, form=float,
                            many=2, shown=("MACS", "BYTES"),
                            only=(("pruning", ("morphnet",)), ("morph_cost", ("latency",)))),
}


# ---- channels: which are alive

def spaces_of(model):
    """The channel spaces whose width can change: `model.channels()` without the ends of residual branches.

    Raises ValueError where a stream has branches that are added selectively: they have no common width.
    """
    spaces = [space for space in model.channels() if space["branch"] is None]
    for space in spaces:
        widths = {name: len(model.get_submodule(name).weight) for name in space["makers"]}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{space['name']} has branches that are added selectively ({widths}); "
                             "MorphNet takes a network without them")
    return spaces


def refuse_fixed_scales(model, name):
    """ValueError where batch norm's scales are not trained: the penalty acts on them and would have no effect."""
    fixed = shrinking.fixed_scale(model, spaces_of(model))
    if fixed:
        raise ValueError(f"--pruning morphnet: the scales of {name}'s batch norms are fixed ({fixed}), and it is by "
                         "them that MorphNet searches; choose another --model or --pruning")


def blocks_of(model):
    """{space: residual block} for the spaces within branches, which may have width 0."""
    channels = model.channels()
    blocks = [space["branch"] for space in channels if space["branch"] is not None]
    return {space["name"]: block for space in channels if space["branch"] is None for block in blocks
            if all(layer.startswith(f"{block}.") for layer in space["makers"] + space["readers"])}


def importance(model, space):
    """r of each channel of a space, (C,) >= 0, with gradient.

    |scale| of its batch norm, else the L2 norm of the maker's filter or row. Where
    several layers make the same channels, as in a residual stream, r is their maximum: a
    channel is dead only when it is dead in all of them. Equal maxima share the gradient.
    """
    if space["norms"]:
        found = [model.get_submodule(name).weight.abs() for name in space["norms"]]
    else:
        found = [model.get_submodule(name).weight.flatten(1).norm(dim=1) for name in space["makers"]]
    return torch.stack(found).amax(0)


def alive(found, blocks, threshold, hint=""):
    """{space: number of channels with r above the threshold}, all channels for None or 0; see `settle`.

    found: {space: r}. Raises RuntimeError where an r is not finite, ValueError for a threshold below 0.
    """
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold {threshold}: it must be at least 0")
    counts = [torch.stack(((r > (threshold or -1)).sum(), (~torch.isfinite(r)).sum())) for r in found.values()]
    counts = dict(zip(found, torch.stack(counts).tolist() if counts else [], strict=True))     # one transfer
    for name, (_, wrong) in counts.items():
        if wrong:
            raise RuntimeError(f"r of {name} is NaN or infinite in {wrong} channels: the run exploded{way_out(hint)}")
    return settle({name: above for name, (above, _) in counts.items()}, blocks)


def settle(widths, blocks):
    """{space: width} where all spaces of a branch have width 0 if one of them has."""
    cut = {block for name, block in blocks.items() if not widths[name]}
    return {name: 0 if blocks.get(name) in cut else width for name, width in widths.items()}


def way_out(hint):
    """The advice at the end of the error for a run that lost all channels or diverged."""
    return f"; change the threshold, the strength or the learning rate{f' ({hint})' if hint else ''}"


def refuse_explosion(value, hint=""):
    """RuntimeError, which ends with `hint`, unless a loss or penalty (number or scalar tensor) is finite."""
    value = torch.as_tensor(value).item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss with its penalty is {value}: the run exploded{way_out(hint)}")


# ---- costs

def sizes_of(model, shape):
    """The sizes that costs are computed from, for one image of `shape` (C, H, W): a dictionary of plain values.

    layers: see `costs.row_of`; spaces, blocks: from `spaces_of` and `blocks_of`. It is valid
    until layers are removed or resized. Takes one forward pass over zeros in evaluation mode,
    which leaves the model as it was. Raises ValueError for a layer that runs twice.
    """
    spaces, pixels = spaces_of(model), costs.pixels_of(model, shape)
    return {"layers": [costs.row_of(name, model.get_submodule(name), pixels[name], spaces) for name in pixels],
            "spaces": spaces, "blocks": blocks_of(model)}


def cost(model, sizes, what="macs", threshold=None, device=None):
    """The cost of a network's convolutions and linear layers, counting channels that are alive; a float.

    sizes: from `sizes_of`. what: "macs" of one image, "parameters" (weights, no biases
    or batch norm), or "latency" in seconds for one image on device = (peak MACs per
    second, bytes per second): the sum over layers of max(MACs / peak, bytes /
    bandwidth), in float32. threshold None or 0: all channels. Raises ValueError for
    another `what` or device, RuntimeError where r is not finite.
    """
    found = {space["name"]: importance(model, space) for space in sizes["spaces"]}
    return cost_of(sizes, alive(found, sizes["blocks"], threshold), what, device)


def cost_of(sizes, structure, what="macs", device=None):
    """`cost` for the widths of a structure, {space: width}."""
    check_metric(what, device)
    widths = settle(structure, sizes["blocks"])
    return float(sum(price(row, coefficients(row, widths, what, device), widths) for row in sizes["layers"]))


def penalty(model, sizes, what="macs", threshold=None, device=None, whole=None, hint=""):
    """The regulariser: the sum over layers of c (A_in sum r_out + A_out sum r_in) / groups / whole, a scalar tensor.

    A, the number of channels with r above the threshold, is held constant. Where a cost
    grows with one side only (depthwise layers, bytes of activations) the term is
    i sum r_in + o sum r_out, see `coefficients`. whole: the cost of the network at the start,
    None for that of all channels; dividing by it makes a strength comparable across networks
    and costs. Raises as `cost` does; the RuntimeError ends with `hint`.
    """
    check_metric(what, device)
    found = {space["name"]: importance(model, space) for space in sizes["spaces"]}
    widths, prices = alive(found, sizes["blocks"], threshold, hint), dict.fromkeys(found, 0.0)
    whole = whole or cost_of(sizes, {name: len(r) for name, r in found.items()}, what, device)
    for row in sizes["layers"]:
        (product, reading, making), (inputs, outputs) = coefficients(row, widths, what, device), sides(row, widths)
        if row["reads"] is not None:
            prices[row["reads"]] += (product * outputs / row["groups"] + reading) * row["unfold"]
        if row["makes"] is not None:
            prices[row["makes"]] += product * inputs / row["groups"] + making
    start = torch.zeros((), device=next(model.parameters()).device)
    return sum((r.sum() * (prices[name] / whole) for name, r in found.items()), start)


# ---- structures: {space: width}

def groups_of(model, space):
    """The number that a space's width must be a multiple of: the lcm of the groups of its makers and readers."""
    layers = [model.get_submodule(name) for name in space["makers"] + space["readers"]]
    return math.lcm(*(getattr(layer, "groups", 1) for layer in layers))


def structure_of(model, threshold, hint=""):
    """{space: channels alive}, rounded up to a multiple of its groups; 0 for all spaces of a block that is removed.

    Raises RuntimeError, which ends with `hint`, where a space outside the branches,
    or the whole network, has no channel alive, or where an r is not finite.
    """
    spaces, removable = spaces_of(model), blocks_of(model)
    widths = alive({space["name"]: importance(model, space) for space in spaces}, removable, threshold, hint)
    for space in spaces:
        name, groups = space["name"], groups_of(model, space)
        if not widths[name] and (name not in removable or not any(widths.values())):
            raise RuntimeError(f"no channel of {name} ({', '.join(space['makers'])}) is alive{way_out(hint)}")
        widths[name] = -(-widths[name] // groups) * groups
    return widths


def check_structure(model, structure):
    """The structure with branches settled (see `settle`); ValueError where the network cannot have it."""
    spaces, removable = {space["name"]: space for space in spaces_of(model)}, blocks_of(model)
    for name in [*spaces, *structure]:
        if (name in spaces) != (name in structure):
            raise ValueError(f"{name} is in the {'network' if name in spaces else 'structure'} but not in the "
                             f"{'structure' if name in spaces else 'network'}")
        width, groups = structure[name], groups_of(model, spaces[name])
        if not is_width(width) or width % groups or (width == 0 and name not in removable):
            raise ValueError(f"{name} cannot have width {width!r}: it takes a multiple of {groups}"
                             f"{' or 0' if name in removable else ''}")
    return settle({name: structure[name] for name in spaces}, removable)


def is_width(width):
    """Whether a value is an integer of at least 0."""
    return isinstance(width, int) and not isinstance(width, bool) and width >= 0


def write_structure(path, structure):
    """Write {space: width} as JSON."""
    files.write(Path(path), (json.dumps(structure, indent=1) + "\n").encode())


def read_structure(path):
    """The {space: width} in a JSON file; ValueError where it is damaged, FileNotFoundError where there is no file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no structure at {path}")
    try:
        structure = files.parse_json(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is no JSON: {problem}") from None
    if not isinstance(structure, dict) or not structure:
        raise ValueError(f"{path} is no structure: it must hold one object of layers and widths")
    for name, width in structure.items():
        if not is_width(width):
            raise ValueError(f"{path}: the width of {name} is {width!r}; it must be a whole number, 0 or more")
    return structure


def expand(model, structure, sizes, what, budget, round_to=1, device=None):
    """(structure, factor): all widths multiplied by the largest factor whose cost is within the budget.

    model: the network that `structure` comes from. Each width is rounded to the nearest
    multiple of its groups and of `round_to`, the smallest one at least; 0 stays 0. The factor
    may be below 1. Raises ValueError where even the smallest widths exceed the budget, and
    as `cost` does.
    """
    structure = check_structure(model, structure)
    if not 0 < budget < math.inf or not (is_width(round_to) and round_to):
        raise ValueError(f"budget {budget}, widths rounded to {round_to}: both must be above 0, and finite")
    steps = {space["name"]: math.lcm(groups_of(model, space), round_to) for space in spaces_of(model)}

    def wider(factor):
        exact = Fraction(factor)              # exact arithmetic: no rounding error decides the widths
        return {name: max(1, (2 * exact * width + steps[name]) // (2 * steps[name])) * steps[name] if width else 0
                for name, width in structure.items()}

    def fits(factor):
        return cost_of(sizes, wider(factor), what, device) <= budget

    if not fits(0.0):
        least = cost_of(sizes, wider(0.0), what, device)
        raise ValueError(f"a budget of {budget:,} ({what}) is below {least:,}, the cost of the smallest widths")
    if not any(structure.values()):
        return structure, 1.0
    low, high = 0.0, 1.0
    while fits(high):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fits(middle) else (low, middle)
    return wider(low), low


# ---- the network of a structure

def rebuild(model, structure):
    """Give every layer the width in the structure and newly initialised weights, in place; returns the model.

    Branches of width 0 are removed. In a network with batch norm convolutions are initialised
    by `resnet_factorized.initialise`, otherwise by torch's default. Draws from torch's
    global generator. Raises ValueError for a structure that does not fit the model.
    """
    structure, removable = check_structure(model, structure), blocks_of(model)
    spaces, widths = spaces_of(model), widths_of(model)
    for space in spaces:
        width = structure[space["name"]]
        for name in space["makers"]:
            widths[name][-1] = width
        for name in space["readers"]:
            widths[name][0] = width * space["unfold"]
        widths |= {name: [width] for name in space["norms"]} | {name: [width, width] for name in space["depthwise"]}
        if space["shuffled"]:
            model.get_submodule(space["shuffled"]).order = None
    for block in {removable[name] for name, width in structure.items() if not width}:
        model.get_submodule(block).remove_branch()
    depthwise, layers = {name for space in spaces for name in space["depthwise"]}, dict(model.named_modules())
    for name in [name for name in widths if name in layers]:
        weight = layers[name].weight if name in depthwise else None
        model.set_submodule(name, layer_like(layers[name], widths[name], weight))
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        initialise(model)
    return model


def draw_widths(path, before, after):
    """Plot the width of each layer before and after as bars, into an image file. before, after: {space: width}."""
    from matplotlib.figure import Figure  # no pyplot: the canvas is Agg, and no state is left behind

    names = list(before)
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(names)), layout="constrained")
    axes, places = figure.subplots(), range(len(names))
    axes.barh([place - 0.2 for place in places], list(before.values()), 0.38, color="#b8c4d0", label="before")
    bars = axes.barh([place + 0.2 for place in places], [after.get(name, 0) for name in names], 0.38, color="#1f5f99",
                     label="after")
    axes.bar_label(bars, [str(after.get(name) or "removed") for name in names], padding=3, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("channels")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    files.save_figure(path, figure)
