"""Remove channels from a network physically: smaller tensors, less computation, the same outputs.

    shrink_layer(layer, keep_indexes_output=keep)           # single layers, in any loop
    shrink_layer(next_layer, keep_indexes_input=keep)

    for space in model.channels():                          # or a network of this project
        keep = balanced(weak, scores, *partitions(model, space))
        remove(model, space, keep, average, optimizer, masks)

`shrink_layer` and its arguments are named as in the LIMutils report. The method
`channels()` of a network says which layers make, normalise and read the same channels.
At the end of a residual branch a selective addition replaces the sum, so that the
shortcut keeps its width. In grouped layers every group keeps the same number of channels,
not necessarily the same ones.
"""
import math

import numpy as np
import torch
from torch import nn


def shrink_vector(vector, keep_indexes, unfold_factor=1):
    """The kept entries of a bias or a batch norm parameter, (N,) -> (len(keep_indexes) * unfold_factor,).

    unfold_factor: u = H W if channels were flattened before the layer, so that
    channel k has the entries k u ... k u + u - 1.
    """
    return vector[unfold(keep_indexes, unfold_factor).to(vector.device)]


def unfold(keep_indexes, factor):
    """Indices of flattened channels: channel k -> k u ... k u + u - 1 with u = factor, as one LongTensor."""
    return (keep_indexes[:, None] * factor + torch.arange(factor, device=keep_indexes.device)).flatten()


def shrink_tensor(tensor, keep_indexes_input=None, keep_indexes_output=None, unfold_factor=1, groups=1):
    """A weight tensor, (outputs, inputs / groups, ...), with only the given inputs and outputs.

    Indexes count the channels of the whole layer. With `groups`, every group must keep the
    same number of channels, not necessarily the same ones; otherwise ValueError.
    """
    outputs = len(tensor)
    if keep_indexes_input is not None:
        keep = unfold(keep_indexes_input, unfold_factor).to(tensor.device)
        inside = keep.view(groups, -1) if groups == 1 else split_by_group(keep, groups, tensor.shape[1], "inputs")
        tensor = torch.cat([part[:, own] for part, own in zip(tensor.chunk(groups), inside, strict=True)])
    if keep_indexes_output is not None:
        if groups > 1:
            split_by_group(keep_indexes_output, groups, outputs // groups, "outputs")
        tensor = tensor[keep_indexes_output.to(tensor.device)]
    return tensor


def split_by_group(keep, groups, size, what):
    """(groups, n) indices within each group of `size` channels; ValueError unless all groups keep equally many."""
    counts = torch.bincount(keep // size, minlength=groups)
    if len(counts) != groups or counts.min() != counts.max() or counts.min() < 1:
        raise ValueError(f"{what} of {groups} groups: {counts.tolist()} would stay; each group must keep as many, "
                         "at least one")
    if bool((keep.diff() <= 0).any()):
        raise ValueError(f"{what} to keep must be in rising order in a layer of groups")
    return (keep % size).view(groups, -1)


@torch.no_grad()
def shrink_layer(layer, keep_indexes_input=None, keep_indexes_output=None, unfold_factor=1):
    """Remove all but the given inputs and outputs of a linear layer, convolution or batch norm, in place.

    Batch norm and depthwise convolutions, whose inputs and outputs are the same channels,
    accept either. The parameters stay the same objects, so that an optimizer still holds
    them; call `shrink_slots` before to cut its state, too. Returns the layer. ValueError if
    groups would keep different numbers of channels.
    """
    indexes = keep_indexes_input, keep_indexes_output, unfold_factor
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.dim():
            tensor.data, tensor.grad = cut(tensor.data, layer, name, *indexes), None
    keep = keep_indexes_output if keep_indexes_output is not None else keep_indexes_input
    set_widths(layer, len(keep) * (unfold_factor if is_norm(layer) else 1))
    return layer


def cut(tensor, layer, name, keep_indexes_input, keep_indexes_output, unfold_factor=1):
    """The kept part of `tensor`, the layer's parameter or buffer `name`, or its optimizer slot or mask."""
    if is_norm(layer) or is_depthwise(layer):
        keep = keep_indexes_output if keep_indexes_output is not None else keep_indexes_input
        return shrink_vector(tensor, keep, unfold_factor if is_norm(layer) else 1)
    if name == "weight":
        return shrink_tensor(tensor, keep_indexes_input, keep_indexes_output, unfold_factor,
                             getattr(layer, "groups", 1))
    return tensor if keep_indexes_output is None else shrink_vector(tensor, keep_indexes_output)


def is_norm(layer):
    """Whether a layer is a batch norm, with or without affine parameters."""
    return layer.weight is None or layer.weight.dim() == 1


def is_depthwise(layer):
    """Whether each channel of a convolution has a filter of its own."""
    return 1 < getattr(layer, "groups", 1) == layer.in_channels == layer.out_channels


def set_widths(layer, kept):
    """Update a layer's width attributes after its tensors were cut; kept: its number of outputs or inputs now."""
    if is_norm(layer):
        layer.num_features = kept
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif is_depthwise(layer):
        layer.in_channels = layer.out_channels = layer.groups = kept
    else:
        layer.out_channels, layer.in_channels = len(layer.weight), layer.weight.shape[1] * layer.groups


def shrink_slots(optimizer, layer, keep_indexes_input=None, keep_indexes_output=None, unfold_factor=1):
    """Cut an optimizer's slots (momentum and the like) for a layer; call it before `shrink_layer` cuts the layer."""
    for name, parameter in layer.named_parameters(recurse=False):
        slots = optimizer.state.get(parameter, {})
        for slot, tensor in slots.items():
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape == parameter.shape:
                slots[slot] = cut(tensor, layer, name, keep_indexes_input, keep_indexes_output, unfold_factor)


# ---- a whole network that names its channel spaces

def remove(model, space, keep, average=None, optimizer=None, masks=None):
    """Remove all but the channels `keep` of one space of `model.channels()`, physically.

    keep: ascending LongTensor of channel indices of the maker; for grouped layers use
    `balanced`. The weight average, the optimizer's slots and the pruning masks are cut, too.
    In evaluation mode the network then gives exactly the outputs that it gives with the
    removed channels set to zero after their batch norm.
    """
    if space["branch"] is None and len(space["makers"]) > 1:
        refuse_selective(model, space)
    reads, order = keep, None
    if space["shuffled"]:
        order = order_of(model.get_submodule(space["shuffled"]), len(model.get_submodule(space["makers"][0]).weight))
        stays = torch.isin(order, keep)
        reads, order = stays.nonzero().flatten(), torch.searchsorted(keep, order[stays])
    networks = [network for network in (model, average) if network is not None]
    outputs = [(name, None, keep, 1) for name in space["makers"] + space["norms"] + space["depthwise"]]
    inputs = [(name, reads, None, space["unfold"]) for name in space["readers"]]
    for name, *indexes in outputs + inputs:
        layer = model.get_submodule(name)
        if optimizer is not None:
            shrink_slots(optimizer, layer, *indexes)
        if masks and f"{name}.weight" in masks:
            masks[f"{name}.weight"] = cut(masks[f"{name}.weight"], layer, "weight", *indexes)
        for network in networks:
            shrink_layer(network.get_submodule(name), *indexes)
    for network in networks:
        rearrange(network, space, keep, order)


def rearrange(model, space, keep, order):
    """Store the channels left in the residual block: `order` for its shuffle, `positions` for its sum."""
    device = next(model.parameters()).device
    if space["shuffled"]:
        model.get_submodule(space["shuffled"]).order = order.to(device)
    if space["branch"]:
        block = model.get_submodule(space["branch"])
        keep = keep.to(device)
        block.positions = keep if block.positions is None else block.positions[keep]


def order_of(block, channels):
    """(C,) indices of the first convolution's output channels, in the order in which the second one reads them."""
    if block.order is not None:
        return block.order.cpu()
    numbers = torch.arange(channels, dtype=torch.float32).view(1, -1, 1, 1)
    return block.shuffle(numbers).flatten().long()


def refuse_selective(model, space):
    """ValueError if a residual stream to shrink has a branch that is already added selectively."""
    for name, block in model.named_modules():
        if getattr(block, "positions", None) is not None and any(maker.startswith(f"{name}.")
                                                                 for maker in space["makers"]):
            raise ValueError(f"{space['name']} cannot shrink: the branch of {name} is added selectively already")


def partitions(model, space):
    """(rows, columns): for each channel of a space its group where it is made and where it is read, both (C,).

    ValueError if both sides are grouped, but differently: channels could not be removed evenly from both.
    """
    layers = {kind: [model.get_submodule(name) for name in space[kind]] for kind in ("makers", "readers")}
    count = len(layers["makers"][0].weight)
    rows, columns = (max((getattr(layer, "groups", 1) for layer in layers[kind]), default=1)
                     for kind in ("makers", "readers"))
    if 1 < min(rows, columns) < max(rows, columns):
        raise ValueError(f"channels of {space['name']} are made in {rows} groups and read in {columns}; they cannot "
                         "leave in equal numbers")
    channels = torch.arange(count)
    made, read = channels // max(1, count // rows), channels // max(1, count // columns)
    if space["shuffled"]:
        places = torch.empty(count, dtype=torch.long)
        places[order_of(model.get_submodule(space["shuffled"]), count)] = channels
        read = places // max(1, count // columns)
    return (made if rows > 1 else read), (read if columns > 1 else made)


def balanced(weak, scores, rows, columns, round_to=1):
    """The channels to keep: all but as many of the `weak` ones as can be removed evenly from all groups.

    weak: (C,) bool; scores: (C,), lowest removed first; rows, columns: (C,), the group of
    each channel where it is made and where it is read (`partitions`). Each removal takes one
    channel of every row and column, the choice with the lowest sum of scores; at least one
    channel stays in each group, and the new width is a multiple of the groups and of
    `round_to`. Returns an ascending LongTensor.
    """
    from scipy.optimize import linear_sum_assignment
    groups, scores = int(rows.max()) + 1, scores.tolist()
    waiting, removals = {}, []            # {(row, column): its weak channels, the next one to leave last}
    for channel in sorted(weak.nonzero().flatten().flip(0).tolist(), key=scores.__getitem__, reverse=True):
        waiting.setdefault((int(rows[channel]), int(columns[channel])), []).append(channel)
    while len(removals) < len(weak) // groups - 1:
        cost = np.full((groups, groups), math.inf)
        for place, channels in waiting.items():
            cost[place] = scores[channels[-1]] if channels else math.inf
        ceiling = 1 + groups * np.abs(cost[np.isfinite(cost)]).max(initial=0.0)
        chosen = list(zip(*linear_sum_assignment(np.nan_to_num(cost, posinf=2 * ceiling)), strict=True))
        if not all(waiting.get(place) for place in chosen):
            break
        removals.append([waiting[place].pop() for place in chosen])
    while removals and (len(weak) - groups * len(removals)) % max(1, round_to // math.gcd(round_to, groups) * groups):
        removals.pop()
    stays = torch.ones(len(weak), dtype=torch.bool)
    stays[[channel for gone in removals for channel in gone]] = False
    return stays.nonzero().flatten()


def reducible(model):
    """The channel spaces that can be reduced one by one: within blocks and at the ends of branches, no streams."""
    return [space for space in model.channels() if len(space["makers"]) == 1 and (space["readers"] or space["branch"])
            and not space["name"].startswith("stream")]


def trained_spaces(model):
    """`reducible` without spaces whose filters are not trained (a whitening stem), as their norms mean nothing."""
    return [space for space in reducible(model) if model.get_submodule(space["makers"][0]).weight.requires_grad]


def fixed_scale(model, spaces):
    """The name of the first batch norm in `spaces` whose scale is not trained; None if all are."""
    return next((norm for space in spaces for norm in space["norms"]
                 if not model.get_submodule(norm).weight.requires_grad), None)


def made_weights(model, space):
    """[(channels, weights)]: the weights that make each channel of a space, one row per channel."""
    weight = model.get_submodule(space["makers"][0]).weight
    return [(torch.arange(len(weight)), weight)]


def magnitudes(parts):
    """(C,) sums of weight magnitudes per channel, on the CPU; parts: [(channels, weights, one row per channel)]."""
    sums = torch.zeros(sum(len(channels) for channels, _ in parts))
    for channels, weights in parts:
        sums[channels] = weights.detach().flatten(1).abs().sum(1).float().cpu()
    return sums


def read_weights(model, space, reader):
    """[(channels, weights)]: views of the weights with which the layer `reader` reads each channel, one row each.

    The list has one entry for each of the layer's groups.
    """
    layer = model.get_submodule(reader)
    channels = torch.arange(len(model.get_submodule(space["makers"][0]).weight))
    if space["shuffled"]:
        channels = order_of(model.get_submodule(space["shuffled"]), len(channels))
    groups = getattr(layer, "groups", 1)
    views = [part.view(len(part), len(channels) // groups, space["unfold"], *part.shape[2:]).transpose(0, 1)
             for part in layer.weight.chunk(groups)]
    return list(zip(channels.chunk(groups), views, strict=True))


# ---- dead channels

def remove_dead(model):
    """Remove dead channels, which change no output, physically; returns how many were removed.

    A channel is dead if all weights that read it are zero, or if its filter is zero and batch
    norm and activation turn that into zero. In grouped layers only as many are removed as
    leave every group the same number. `model` must be in evaluation mode.
    """
    removed, before = 0, None
    while removed != before:              # a removed channel may have been the last to read another one
        before = removed
        for space in reducible(model):
            if space["branch"]:
                continue
            weak = dead(model, space)
            keep = balanced(weak, torch.zeros(len(weak)), *partitions(model, space))
            if len(keep) < len(weak):
                removed += len(weak) - len(keep)
                remove(model, space, keep)
    return removed


@torch.no_grad()
def dead(model, space):
    """Which channels of a space within a branch or a chain of layers are dead (change no output), (C,) bool."""
    maker = model.get_submodule(space["makers"][0])
    unread = torch.ones(len(maker.weight), dtype=torch.bool, device=maker.weight.device)
    for name in space["readers"]:
        for channels, weights in read_weights(model, space, name):
            unread[channels.to(unread.device)] &= weights.flatten(1).abs().sum(1) == 0
    silent = maker.weight.flatten(1).abs().sum(1) == 0
    level = maker.bias if maker.bias is not None else torch.zeros(len(maker.weight), device=unread.device)
    if len(space["norms"]) == 1:
        norm = model.get_submodule(space["norms"][0])
        level = (level - norm.running_mean) * norm.weight / (norm.running_var + norm.eps).sqrt() + norm.bias
    simple = len(space["norms"]) < 2 and not space["depthwise"] and all_relu(model)
    return (unread | (silent & (level <= 0) if simple else unread)).cpu()


def all_relu(model):
    """Whether all activations of a network turn negative numbers into zero, as ReLU does."""
    others = (nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid)
    return not any(isinstance(module, others) for module in model.modules())
