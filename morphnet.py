"""MorphNet: training finds the width of every layer, for a budget of MACs, weights or seconds.

    sizes = sizes_of(model, (3, 32, 32))
    loss = loss + strength * penalty(model, sizes, "macs", threshold=0.01)      # at each step of any loop
    structure = structure_of(model, threshold=0.01)                             # {channel space: channels alive}
    structure, factor = expand(model, structure, sizes, "macs", budget)         # all wider, up to the budget
    rebuild(model, structure)                                                   # fresh weights: train from scratch

Gordon et al. 2018 (arXiv:1711.06798). A layer costs c A_in A_out, A the channels
alive on its two sides, and each channel pays its r times what it costs while all
others stay as they are. r is the batch norm's |scale| or, without batch norm, the
L2 norm of the filter. Rebuild and start again, with sizes of the new network, for another
iteration.

A network of this project says with `channels()` which layers share channels. A
residual stream is one set: alive together, one r a channel. Ends of branches that
no stream ties (shortcut A) keep their width. At width 0 a block is its shortcut.
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
    "morph_cost": Setting("macs", "what a channel pays for", choices=METRICS),
    "morph_strength": Setting(0.1, "of the penalty, which is about 2 at the start", low=0),
    "morph_threshold": Setting(0.01, "scale of batch norm below which a channel is dead", low=0),
    "morph_budget": Setting(0.5, "cost of the structure, as a share of the network it comes from", low=1e-6,
                            high=100),
    "morph_round_to": Setting(1, "widths are multiples of it", low=1),
    "morph_device": Setting(None, "a second, for --morph-cost latency", above=0, form=float, many=2,
                            shown=("MACS", "BYTES"),
                            only=(("pruning", ("morphnet",)), ("morph_cost", ("latency",)))),
}


# ---- channels: which are alive

def spaces_of(model):
    """The channel spaces whose width can change: `model.channels()` without ends of branches, which streams hold.

    Raises ValueError where branches of a stream are added selectively: they have no common width.
    """
    spaces = [space for space in model.channels() if space["branch"] is None]
    for space in spaces:
        widths = {name: len(model.get_submodule(name).weight) for name in space["makers"]}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{space['name']} has branches that are added selectively ({widths}); "
                             "MorphNet takes a network without them")
    return spaces


def refuse_fixed_scales(model, name):
    """ValueError where batch norm's scales do not train: the penalty, which is on them, would move nothing."""
    fixed = shrinking.fixed_scale(model, spaces_of(model))
    if fixed:
        raise ValueError(f"--pruning morphnet: the scales of {name}'s batch norms are fixed ({fixed}), and it is by "
                         "them that MorphNet searches; choose another --model or --pruning")


def blocks_of(model):
    """{space: residual block} of the spaces within branches, those that may go to width 0."""
    channels = model.channels()
    blocks = [space["branch"] for space in channels if space["branch"] is not None]
    return {space["name"]: block for space in channels if space["branch"] is None for block in blocks
            if all(layer.startswith(f"{block}.") for layer in space["makers"] + space["readers"])}


def importance(model, space):
    """r of each channel of a space, (C,) >= 0, with gradient.

    |scale| of its batch norm, else the L2 norm of the maker's filter or row. Where
    several lie over the same channels, as in a residual stream, r is their maximum:
    a channel dies only when all let it go. Equal ones share the gradient.
    """
    if space["norms"]:
        found = [model.get_submodule(name).weight.abs() for name in space["norms"]]
    else:
        found = [model.get_submodule(name).weight.flatten(1).norm(dim=1) for name in space["makers"]]
    return torch.stack(found).amax(0)


def alive(found, blocks, threshold, hint=""):
    """{space: channels with r above the threshold}, all at None or 0; see `settle`.

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
    """{space: width} with 0 for all spaces of a branch in which one is at 0."""
    cut = {block for name, block in blocks.items() if not widths[name]}
    return {name: 0 if blocks.get(name) in cut else width for name, width in widths.items()}


def way_out(hint):
    """What the error of a run that emptied or exploded advises."""
    return f"; change the threshold, the strength or the learning rate{f' ({hint})' if hint else ''}"


def refuse_explosion(value, hint=""):
    """RuntimeError, which ends with `hint`, unless a loss or penalty, a number or scalar tensor, is finite."""
    value = torch.as_tensor(value).item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss with its penalty is {value}: the run exploded{way_out(hint)}")


# ---- costs

def sizes_of(model, shape):
    """What costs follow from, for one image of `shape` (C, H, W): a dictionary of plain values.

    layers: see `costs.row_of`; spaces, blocks: of `spaces_of` and `blocks_of`. It holds
    until layers are removed or resized. One pass over zeros, in evaluation, leaves
    the model as it was. Raises ValueError for a layer that runs twice.
    """
    spaces, pixels = spaces_of(model), costs.pixels_of(model, shape)
    return {"layers": [costs.row_of(name, model.get_submodule(name), pixels[name], spaces) for name in pixels],
            "spaces": spaces, "blocks": blocks_of(model)}


def cost(model, sizes, what="macs", threshold=None, device=None):
    """The cost of a network's convolutions and linear layers, of the channels that are alive, a float.

    sizes: of `sizes_of`. what: "macs" of one image, "parameters" (weights, no biases
    or batch norm), or "latency" in seconds for one image on device = (peak MACs a
    second, bytes a second): the sum over layers of max(MACs / peak, bytes /
    bandwidth), in float32. threshold None or 0: all channels. Raises ValueError for
    another `what` or device, RuntimeError where r is not finite.
    """
    found = {space["name"]: importance(model, space) for space in sizes["spaces"]}
    return cost_of(sizes, alive(found, sizes["blocks"], threshold), what, device)


def cost_of(sizes, structure, what="macs", device=None):
    """`cost` with the widths of a structure, {space: width}."""
    check_metric(what, device)
    widths = settle(structure, sizes["blocks"])
    return float(sum(price(row, coefficients(row, widths, what, device), widths) for row in sizes["layers"]))


def penalty(model, sizes, what="macs", threshold=None, device=None, whole=None, hint=""):
    """The regulariser, a scalar tensor: over layers the sum of c (A_in sum r_out + A_out sum r_in) / groups, by whole.

    A, the channels with r above the threshold, is held constant. Where a cost grows
    with one side alone (depthwise layers, bytes of activations) the term is i sum
    r_in + o sum r_out, see `coefficients`. whole: the cost of the network at the
    start, None for that of all channels, so that a strength means the same for every
    network and cost. Raises as `cost`; the RuntimeError ends with `hint`.
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
    """What a space's width must be a multiple of: the groups of the layers that make and read it."""
    layers = [model.get_submodule(name) for name in space["makers"] + space["readers"]]
    return math.lcm(*(getattr(layer, "groups", 1) for layer in layers))


def structure_of(model, threshold, hint=""):
    """{space: channels alive}, rounded up to what its groups divide; 0 for all spaces of a block that is removed.

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
    """The structure as the network can take it; ValueError that names what it cannot.

    Where one space of a branch is at 0, all are.
    """
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
    """Whether a value is a whole number, not negative."""
    return isinstance(width, int) and not isinstance(width, bool) and width >= 0


def write_structure(path, structure):
    """Write {space: width} as JSON."""
    files.write(Path(path), (json.dumps(structure, indent=1) + "\n").encode())


def read_structure(path):
    """The {space: width} in a JSON file; ValueError with what is wrong, FileNotFoundError where there is none."""
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
    """(structure, factor): all widths times the largest factor whose cost is within the budget.

    model: where `structure` comes from. Each width is rounded to the nearest
    multiple of its groups and of `round_to`, at least one; 0 stays 0. The factor may
    be below 1. Raises ValueError where even the smallest widths exceed the budget,
    and as `cost`.
    """
    structure = check_structure(model, structure)
    if not 0 < budget < math.inf or not (is_width(round_to) and round_to):
        raise ValueError(f"budget {budget}, widths rounded to {round_to}: both must be above 0, and finite")
    steps = {space["name"]: math.lcm(groups_of(model, space), round_to) for space in spaces_of(model)}

    def wider(factor):
        exact = Fraction(factor)              # so that no rounding error decides which widths a factor gives
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
    """Give every layer the width that the structure says, and all of them fresh weights, in place; returns the model.

    Branches of width 0 are removed. Convolutions start as `resnet_factorized.initialise`
    has it in a network with batch norm; else torch's default. Draws from torch's
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
    """Draw the width of each layer before and after as bars, into an image file. before, after: {space: width}."""
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
