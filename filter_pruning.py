"""Structured pruning: weak neurons and filters are shrunk to zero and removed from the network.

    keep = relative_reduce_layer(layer, 0.1)          # shrinks outputs; returns those that are not zero
    shrink_layer(layer, keep_indexes_output=keep)     # removes the others
    shrink_layer(next_layer, keep_indexes_input=keep)

Zhou, Alvarez and Porikli 2016, "Less is more: towards compact CNNs", equation 1:
after an epoch the norm of every neuron (a row of a linear layer, a filter of a
convolution) is reduced by a threshold, and those at zero are removed, so that training
gets faster too. These functions fit into any loop; `reduce_network` handles a whole
network of this project. `Pruner` works by another criterion: it removes the filters of
smallest L1 norm, fine-tunes, and repeats while the validation loss stays within a limit.
"""
import math
import time
from pathlib import Path

import torch

from engine import checkpoint, files, folders, run_files, shrinking
from engine.settings import Setting, check_value, defaults_of, only
from engine.shrinking import (  # noqa: F401  (published together)
    made_weights,
    read_weights,
    reducible,
    shrink_layer,
    shrink_slots,
    shrink_tensor,
    shrink_vector,
    trained_spaces,
)

SHRINKING = ("filters", "l1_cycle", "morphnet")      # values of PRUNING that remove whole channels
ROUNDING = 1e-9       # added to shares of a count: 0.7 of 90 epochs is 62.99999999999999 in binary floating point
SETTINGS = only("pruning", ("filters",), {
    "filter_threshold": Setting(0.1, "what is taken off a filter's norm: a share of its layer's largest, or a norm",
                                low=0),
    "filter_relative": Setting(True, "the threshold is a share of each layer's largest norm"),
    "filter_columns": Setting(False, "use the weights that read a channel instead of its filter"),
    "filter_measure": Setting("filter", "what is shrunk: the filter, or the neuron, a filter with its batch norm",
                              choices=("filter", "neuron"),
                              clashes=((("neuron",), "filter_columns", (True,), "which count what reads a neuron"),)),
    "filter_one_layer": Setting(False, "remove filters from one layer at a time, in turn"),
    "filter_interval": Setting(2, "epochs from one removal to the next", low=1),
    "filter_stop": Setting(0.6, "share of the training after which no more filters are removed", low=0, high=1),
    "filter_warmup": Setting(0.0, "share of the training in which the threshold grows from 0 to its value", low=0,
                             high=1),
    "filter_until": Setting(0, "remove no more filters once the network has at most so many parameters", low=0),
    "cycle": Setting(None, "settings of the L1 cycle, see filter_pruning.CYCLE", form=str, shown="JSON", fixed=True,
                     only=(("pruning", ("l1_cycle",)),)),
    "cycle_settings": Setting({}, only=(("pruning", ("l1_cycle",)),)),
    "stop_loss": Setting(None, "validation loss that ends the L1 cycle (a tenth above that before the first removal)",
                         above=0, form=float, only=(("pruning", ("l1_cycle",)),)),
})


# ---- for a loop of one's own: weak outputs are shrunk to zero

@torch.no_grad()
def absolute_reduce(weights, threshold, norm):
    """w <- max(||w|| - threshold, 0) w / ||w|| for each output, in place: equation 1.

    weights: (N, ...), one row per output; norm: (N,), the L2 norm of each row. Returns
    the outputs to keep, those that are not zero, as a LongTensor. ValueError for a
    threshold below 0 or weights that are not finite.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold {threshold}: it must be at least 0")
    if not bool(torch.isfinite(norm).all()):
        raise ValueError(f"{int((~torch.isfinite(norm)).sum()):,} of {len(norm):,} outputs have weights that are NaN "
                         "or infinite")
    share = (norm - threshold).clamp_min(0) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    weights.mul_(share.view(-1, *[1] * (weights.dim() - 1)))
    return (share > 0).nonzero().flatten()


def relative_reduce(weights, threshold_ratio, norm):
    """`absolute_reduce` with a threshold relative to the largest norm, a ratio in [0, 1): no layer can vanish."""
    if not 0 <= threshold_ratio < 1:
        raise ValueError(f"threshold ratio {threshold_ratio} is outside [0, 1)")
    if not len(norm):
        return absolute_reduce(weights, 0.0, norm)
    largest = norm.max()                  # a ratio near 1 must not be rounded up to it
    below = torch.nextafter(largest, torch.zeros_like(largest)).item()
    keep = absolute_reduce(weights, min(threshold_ratio * largest.item(), below), norm)
    return keep if len(keep) else norm.argmax().view(1)            # in a layer of zeros


def relative_reduce_1D(weights, threshold_ratio):      # noqa: N802  (the published name)
    """`relative_reduce` of a linear layer's weights, (outputs, inputs), by the norm of each row."""
    return relative_reduce(weights, threshold_ratio, weights.norm(dim=1))


def relative_reduce_2D(weights, threshold_ratio):      # noqa: N802
    """`relative_reduce` of a convolution's weights, (outputs, inputs, kh, kw), by each filter's Frobenius norm."""
    return relative_reduce(weights, threshold_ratio, weights.flatten(1).norm(dim=1))


def relative_reduce_layer(layer, threshold_ratio):
    """`relative_reduce` of a linear layer or a convolution, told apart by the dimensions of the weight."""
    weights = layer.weight.detach()
    reduce = {2: relative_reduce_1D, 4: relative_reduce_2D}.get(weights.dim())
    if reduce is None:
        raise ValueError(f"a {type(layer).__name__} has weights of shape {tuple(weights.shape)}; "
                         "linear layers and 2-d convolutions can be reduced")
    return reduce(weights, threshold_ratio)


# ---- a whole network that names its channel spaces

@torch.no_grad()
def reduce_network(model, threshold, relative=True, columns=False, turn=None, average=None, optimizer=None,
                   masks=None, measure="filter"):
    """Apply equation 1 to every hidden layer, then physically remove the channels at zero.

    threshold: an L2 norm, or with `relative` a share of the largest norm of each layer;
    columns: use the weights that read a channel instead of those that make it; measure:
    "neuron" takes a filter together with the batch norm after it, see `neurons`; turn: reduce
    only one space, number `turn` modulo their count (layer by layer). average, optimizer,
    masks: see `shrinking.remove`. A layer keeps at least one channel; a grouped layer keeps at
    least one in each group, and the same number in all. Weak channels that must be kept are not
    shrunk: at zero, batch norm would make their gradient extremely large. Returns {space:
    (channels before, channels after, weak ones that were kept)}.
    """
    spaces, found = trained_spaces(model), {}
    if measure == "neuron":
        refuse_fixed_scales(model)
    for space in spaces if turn is None else [spaces[turn % len(spaces)]]:
        parts = ([part for reader in space["readers"] for part in read_weights(model, space, reader)] if columns
                 else []) or made_weights(model, space)
        norms = torch.zeros(len(model.get_submodule(space["makers"][0]).weight))
        for channels, weights in parts:
            norms[channels] = torch.hypot(norms[channels], weights.flatten(1).norm(dim=1).float().cpu())
        if measure == "neuron" and space["norms"]:
            parts, gains = neurons(model.get_submodule(space["norms"][0]))
            norms *= gains
        limit = threshold * norms.max().item() if relative else threshold
        weak = ~(norms > limit)
        keep = shrinking.balanced(weak, norms, *shrinking.partitions(model, space))
        held = weak & torch.isin(torch.arange(len(norms)), keep)
        shorten(parts, limit, norms, held)
        found[space["name"]] = len(norms), len(keep), int(held.sum())
        if len(keep) < len(norms):
            shrinking.remove(model, space, keep, average, optimizer, masks)
    return found


def shorten(parts, limit, norms, held):
    """Apply equation 1 to a layer's `parts`, pairs (channels, weights), in place; leave the channels `held` unchanged.

    limit: the threshold; norms: (C,); held: (C,) bool.
    """
    for channels, weights in parts:
        rows = held[channels].to(weights.device)
        before = weights[rows].clone()
        absolute_reduce(weights, limit, norms[channels].to(weights.device))
        weights[rows] = before


def refuse_fixed_scales(model):
    """ValueError where batch norm's scales are not trained: those that `neurons` shrinks could never grow again."""
    fixed = shrinking.fixed_scale(model, trained_spaces(model))
    if fixed:
        raise ValueError(f"--filter-measure neuron shortens batch norm's scales, and those of {fixed} are fixed; take "
                         "--filter-measure filter")


def neurons(norm):
    """([(channels, parameters that equation 1 shrinks)], (C,) gains) of the batch norm after a layer.

    The norm of a filter w before batch norm says nothing: the output of its neuron is
    gamma / sigma (w x - mean) + beta. So the neuron's norm is |gamma| / sigma times that of w,
    and equation 1 is applied to gamma and beta, which scales the neuron's output by the same factor.
    """
    gains = (norm.weight.abs() / (norm.running_var + norm.eps).sqrt()).float().cpu()
    channels = torch.arange(len(gains))
    return [(channels, norm.weight), (channels, norm.bias)], gains


# ---- the L1 filter cycle: prune, fine-tune, evaluate, while the loss is within the limit

CYCLE = {
    "input_model_path": Setting(None, form=str), "output_model_path": Setting(None, form=str),
    "finetuning_epochs": Setting(10, low=1), "stop_loss": Setting(0.1, above=0),
    "pruning_percent_step": Setting(0.05, low=0, high=1), "pruning_standard_deviation_part": Setting(0.2, low=0),
    "layers": Setting(None, form=str, many="+"), "round_to": Setting(1, low=1),
}
SPELLINGS = {"pruning_standart_deviation_part": "pruning_standard_deviation_part"}       # the published spelling


def read_given(config):
    """The settings given in a dictionary or a JSON file, without defaults, under their right names; or ValueError."""
    try:
        given = config if isinstance(config, dict) else files.parse_json(Path(config).read_text())
        named = {SPELLINGS.get(name, name): value for name, value in given.items()}
    except (ValueError, AttributeError, RecursionError) as problem:
        raise ValueError(f"{config} is no JSON object of settings: {problem}") from None
    if len(named) < len(given):
        both = " and ".join(name for pair in SPELLINGS.items() for name in pair)
        raise ValueError(f"{config}: {both} are one setting; leave one out")
    given, unknown = named, sorted(set(named) - set(CYCLE))
    if unknown:
        raise ValueError(f"no setting is called {unknown[0]!r}; there are {', '.join(CYCLE)}")
    for name, value in given.items():
        check_value(CYCLE[name], value, f"{name} {value!r}")
    return given


def check_files(settings, out, begins):
    """ValueError where a run would overwrite a file that it reads, or cannot write its result."""
    cycle = settings["cycle_settings"]
    weights = cycle.get("input_model_path")
    first = {"--start": settings["start"], "--cycle": settings["cycle"],
             "input_model_path of --cycle": weights and checkpoint.meant(weights)}
    reads, target = {"--teacher": settings["teacher"], **(first if begins else {})}, cycle.get("output_model_path")
    if begins and first["--start"] and weights:
        raise ValueError(f"--start {settings['start']} and input_model_path {weights} of --cycle both say where the "
                         "weights begin; leave one out")
    if target:
        folders.refuse_target("output_model_path of --cycle", target)
        folders.refuse_overwriting({"output_model_path of --cycle": target}, [out / name for name in (
            "last.pt", "previous.pt", "history.csv", "config.json")])
    folders.refuse_overwriting(reads, [out, *[target] * bool(target)])
    if target and Path(target).resolve().parent != out.resolve():
        run_files.refuse_own("output_model_path of --cycle", target)


class Pruner:
    """Removes the filters of smallest L1 norm step by step, until the validation loss exceeds `stop_loss`.

    config: a dictionary or the path of a JSON file, see `CYCLE`. Each step removes from
    every layer at most the share `pruning_percent_step` of its filters (none from a layer of
    fewer than 1 / `pruning_percent_step`), and only filters whose norm is below
    mean - pruning_standard_deviation_part * standard deviation. layers: names, or None for all
    hidden layers; round_to: widths stay multiples of it.
    """

    def __init__(self, config):
        self.settings = {**defaults_of(CYCLE), **read_given(config)}
        self.history = []

    def prune(self, model, finetune, evaluate, save=None, plots=None, **companions):
        """Run the cycle on `model`, in place. Returns its history, a dictionary per step; row 0 is before any removal.

        finetune(model, epochs) trains; evaluate(model) gives the validation loss;
        save(model) stores a model that is within the limit, by default as a checkpoint at
        output_model_path; plots: a folder for norms-<step>.png. companions: average,
        optimizer and masks, see `shrinking.remove`. Also ends when no filter's norm is below
        its limit. ValueError where the loss exceeds the limit before any step.
        """
        self.check(model)
        self.note(model, evaluate, time.perf_counter())
        if not self.history[-1]["loss"] <= self.settings["stop_loss"]:
            raise ValueError(f"the validation loss is {self.history[-1]['loss']:.4g} before any filter is removed, "
                             f"above stop_loss {self.settings['stop_loss']}; raise it, or train longer")
        while self.history[-1]["loss"] <= self.settings["stop_loss"]:
            (save or self.save)(model)
            begun = time.perf_counter()
            if plots:
                with files.noted():
                    draw_norms(Path(plots) / f"norms-{len(self.history)}.png", self.norms(model), self.settings)
            if not self.step(model, **companions):
                break
            finetune(model, self.settings["finetuning_epochs"])
            self.note(model, evaluate, begun)
        return self.history

    def step(self, model, average=None, optimizer=None, masks=None):
        """One removal. Returns {layer: (filters before, after)} of the layers that changed, empty if none did.

        Layers are pruned in order: the norms of a layer are those after the layers before it have lost filters.
        """
        changed = {}
        for space in self.check(model):
            norms = l1_norms(model, space)
            keep = shrinking.balanced(self.weak(norms), norms, *shrinking.partitions(model, space),
                                      round_to=self.settings["round_to"])
            if len(keep) < len(norms):
                changed[space["name"]] = len(norms), len(keep)
                shrinking.remove(model, space, keep, average, optimizer, masks)
        return changed

    def weak(self, norms):
        """Which filters may be removed in this step, (C,) bool."""
        lowest = norms.argsort()[:self.most(len(norms))]
        weak = torch.zeros(len(norms), dtype=torch.bool)
        weak[lowest] = norms[lowest] < limit_of(norms, self.settings)
        return weak

    def most(self, filters):
        """How many of a layer's filters a step may remove; 0.29 of 100 are 29, not the 28.99... of floating point."""
        return int(self.settings["pruning_percent_step"] * filters + ROUNDING)

    def refuse_idle(self, model):
        """ValueError where no step can remove a filter of any layer, whatever the norms are.

        A step removes the same number of filters from each group of a layer and keeps its width a multiple of round_to.
        """
        share, round_to = self.settings["pruning_percent_step"], self.settings["round_to"]
        widths = {space["name"]: len(model.get_submodule(space["name"]).weight) for space in self.check(model)}
        for space in self.check(model):
            width, groups = widths[space["name"]], int(shrinking.partitions(model, space)[0].max()) + 1
            unit = math.lcm(round_to, groups)
            if (width % unit or unit) <= self.most(width) and width > unit:
                return
        raise ValueError(f"pruning_percent_step {share} and round_to {round_to} of --cycle remove nothing: no layer of "
                         f"{', '.join(f'{name} ({width})' for name, width in widths.items())} can lose so many filters "
                         "in a step; raise the first, or lower the second")

    def norms(self, model):
        """{layer: (C,) L1 norms of its filters} for the layers that are pruned."""
        return {space["name"]: l1_norms(model, space) for space in self.check(model)}

    def check(self, model):
        """The channel spaces to prune; ValueError that names a layer which cannot be pruned."""
        if not hasattr(model, "channels"):
            raise ValueError(f"a {type(model).__name__} does not say which layers share channels: it needs channels()")
        spaces = {space["name"]: space for space in trained_spaces(model)}
        chosen = self.settings["layers"]
        if chosen == []:
            raise ValueError(f"layers [] of --cycle names none: leave it out, or choose from {', '.join(spaces)}")
        refused = [name for name in chosen or () if name not in spaces]
        if refused:
            raise ValueError(f"{refused[0]!r} cannot lose filters: its outputs are classes or a sum that other layers "
                             f"read, or there is no such layer; these can: {', '.join(spaces)}")
        for name in spaces:
            if not bool(torch.isfinite(model.get_submodule(name).weight).all()):
                raise ValueError(f"{name} has weights that are NaN or infinite; they cannot be ranked")
        return [space for name, space in spaces.items() if chosen is None or name in chosen]

    def note(self, model, evaluate, begun):
        """Append a row to the history."""
        self.history.append({"step": len(self.history), "parameters": sum(p.numel() for p in model.parameters()),
                             "loss": evaluate(model), "seconds": time.perf_counter() - begun})

    def save(self, model):
        """Save the weights and widths at output_model_path, if one is given."""
        if self.settings["output_model_path"]:
            checkpoint.save(self.settings["output_model_path"], checkpoint.network_of(model, None))


def l1_norms(model, space):
    """(C,) L1 norms of the filters of one layer, on the CPU."""
    return shrinking.magnitudes(made_weights(model, space))


def limit_of(norms, settings):
    """The L1 norm below which filters may be removed; a millionth lower, so rounding does not split equal norms."""
    exact = norms.double()
    return float(exact.mean() * (1 - 1e-6) - settings["pruning_standard_deviation_part"] * exact.std(correction=0))


def draw_norms(path, norms, settings):
    """Plot the L1 norms of the filters of each layer as dots, with the limit below which they may be removed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(max(6, 0.5 * len(norms)), 4), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(norms.values()):
        limit = limit_of(values, settings)
        axes.plot([place] * len(values), values, ".", alpha=0.4, color="tab:blue", label="filters" * (not place))
        axes.plot([place - 0.35, place + 0.35], [limit] * 2, color="tab:red", label="limit" * (not place))
    axes.set_xticks(range(len(norms)), norms, rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="L1 norm of a filter")
    axes.legend()
    files.save_figure(path, figure)


def draw_cycle(path, history):
    """Plot size, loss and time over the steps of a cycle, each relative to its first value."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in history]
    for name in ("parameters", "loss", "seconds"):
        first = history[0][name]
        axes.plot(steps, [row[name] / first if first else 0 for row in history], marker=".", label=name)
    axes.set(xlabel="step", ylabel="relative to the first value", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    files.save_figure(path, figure)
