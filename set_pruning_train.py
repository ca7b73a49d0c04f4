"""Pruning while training: what the line PRUNING does after a step, at an epoch's end, and to the loss.

`train.py` calls `prune_on_schedule` after each update (lines "polynomial" and
"constant"), `remove_channels` at each epoch's end (line "filters", and --macs), and
adds `search_penalty` to the loss (line "morphnet"). Pruning between rounds is in
`train_pruning.py`.
"""
import math

import filter_pruning
import morphnet
import pruning
from binaryconnect import BINARY
from engine import parallel
from engine.operations import macs_of
from engine.settings import Setting, check_each, flag_of, joined, line, only
from filter_pruning import ROUNDING, SHRINKING
from pruning import GRADUAL

OF_A_PRUNING = "sparsity", "score", "minimum_density", "exclude", "macs", "macs_layers"      # read when a pruning runs
FINETUNED = "rounds", "l1_cycle"      # choices of the line PRUNING whose later rounds fine-tune the pruned network
SETTINGS = joined({
    "pruning": line("none", ("rounds", *GRADUAL, *SHRINKING), alone=(
        SHRINKING, "shrinks the network, which takes one process: run it without torchrun")),
    "sparsity": Setting([], "share of the remaining weights pruned after a round", low=0, below=1, form=float,
                        many="+"),
    "finetune_lr": Setting(1.0, "learning rates of the rounds after a pruning, as a multiple of the first round's",
                           above=0, high=1e6, only=(("pruning", FINETUNED),)),
}, pruning.SETTINGS, filter_pruning.SETTINGS, only("pruning", ("morphnet",), morphnet.SETTINGS))


# ---- before any training

def join_rounds(settings, sparsity_given):
    """Merge the rounds into one if pruning is not between rounds: sum the epochs, compound the sparsities."""
    if settings["pruning"] in GRADUAL and len(settings["epochs"]) == len(settings["sparsity"]) + 1 > 1:
        settings["sparsity"] = [1 - math.prod(1 - share for share in settings["sparsity"])]
        settings["epochs"] = [sum(settings["epochs"])]
    if settings["pruning"] in SHRINKING and not sparsity_given:
        settings["sparsity"] = []
        if settings["pruning"] != "morphnet":
            settings["epochs"] = [sum(settings["epochs"])]


def as_joined(table, stored, given):
    """Return the flags `given` to a resumed run, with epochs and sparsities merged as `join_rounds` did at its start.

    stored: the run's settings. The epochs of the steps that an L1 cycle has made since are appended, as no flag
    gives them.
    """
    asked = {name: list(given.get(name, table[name].default)) for name in ("epochs", "sparsity")}
    asked["pruning"] = given.get("pruning", stored.get("pruning", table["pruning"].default))
    check_each(table, asked, ["epochs", "sparsity"])
    join_rounds(asked, "sparsity" in given)
    asked["epochs"] += stored["epochs"][1:] if asked["pruning"] == "l1_cycle" else []
    return {**given, **{name: asked[name] for name in ("epochs", "sparsity") if name in given}}


def check_settings(settings):
    """Raise ValueError if rounds and sparsities, or two settings of a pruning, do not fit each other."""
    how, epochs, sparsity = settings["pruning"], settings["epochs"], settings["sparsity"]
    if how == "none" and sparsity:
        raise ValueError(f"sparsity {sparsity} without pruning: train.py trains without, train_pruning.py prunes")
    if how in SHRINKING:
        check_shrinking(settings, epochs, sparsity)
    elif how in GRADUAL:
        if len(epochs) != 1 or len(sparsity) != 1:
            raise ValueError(f"epochs {epochs} and sparsity {sparsity} do not fit: gradual pruning takes one of each, "
                             "or as many as the rounds do, which it adds up")
        if settings["prune_end"] <= settings["prune_begin"]:
            raise ValueError(f"--prune-end {settings['prune_end']} must come after --prune-begin "
                             f"{settings['prune_begin']}")
    elif len(epochs) != len(sparsity) + 1:
        raise ValueError(f"epochs {epochs} and sparsity {sparsity} do not fit: pruning comes between two rounds, "
                         "so there must be one more number of epochs than of sparsities")


def check_shrinking(settings, epochs, sparsity):
    """The part of `check_settings` for pruning that removes channels."""
    if sparsity or not epochs or len(epochs) > 1 and settings["pruning"] == "filters":
        raise ValueError(f"epochs {epochs} and sparsity {sparsity} do not fit: pruning {settings['pruning']!r} "
                         "removes channels, so it takes one number of epochs and no --sparsity")
    if settings["pruning"] == "morphnet" and len(epochs) < 2:
        raise ValueError(f"epochs {epochs}: MorphNet takes two numbers or more, rounds that search for widths and "
                         "one that trains the structure")
    if settings["morph_cost"] == "latency" and not settings["morph_device"]:
        raise ValueError("--morph-cost latency needs --morph-device: MACs a second and bytes a second, both above 0")
    if settings["filter_relative"] and settings["filter_threshold"] >= 1:
        raise ValueError(f"--filter-threshold {settings['filter_threshold']}: as a share of a layer's largest "
                         "norm it must be below 1; --no-filter-relative takes a norm")


def check_position(settings, state):
    """Raise ValueError if a resumed run has come further than its `settings` allow, or with other settings.

    state: its checkpoint, with round, epoch and settings.
    """
    rounds, epochs, before = state["round"], settings["epochs"], state["settings"]
    for name in ("epochs", "sparsity"):
        if settings[name][:rounds] != before[name][:rounds]:
            raise ValueError(f"{name} {settings[name]}: {rounds} rounds with {before[name][:rounds]} are over and "
                             "cannot change; start a new run with another --out")
    if len(epochs) <= rounds or epochs[rounds] < state["epoch"]:
        raise ValueError(f"epochs {epochs}: the run has trained {state['epoch']} in its round {rounds + 1} already; "
                         "give that round as many or more, or start a new run with another --out")
    late = next((name for name in OF_A_PRUNING if settings[name] != before.get(name, settings[name])), None)
    if late and is_pruned(settings, rounds, state["epoch"]):
        raise ValueError(f"{flag_of(late, settings[late])} comes too late: the last pruning of this run is over; start "
                         "a new run with another --out")
    masks = state.get("masks") or {}
    zeros = 1 - sum(int(mask.sum()) for mask in masks.values()) / max(1, sum(mask.numel() for mask in masks.values()))
    lowered = settings["sparsity"] != before["sparsity"]      # if it is unchanged, --macs may leave a few more zeros
    if settings["pruning"] in GRADUAL and masks and lowered and settings["sparsity"][0] < zeros - 0.001:
        raise ValueError(f"sparsity {settings['sparsity'][0]}: the run has pruned {100 * zeros:.1f} % already, which "
                         "stay zero; give as much or more, or start a new run with another --out")


def is_pruned(settings, round_, epoch):
    """Whether the pruning of weights is finished after `epoch` epochs of the round `round_`."""
    if settings["pruning"] == "rounds":
        return round_ + 1 == len(settings["epochs"])
    epochs = settings["epochs"][0]
    return settings["pruning"] in GRADUAL and (epoch > settings["prune_end"] * epochs + ROUNDING or epoch == epochs)


def is_over(settings, state):
    """Whether a run has trained all its epochs; an L1 cycle, which may take another step, never has.

    state: round and epoch are those of its checkpoint.
    """
    return (settings["pruning"] != "l1_cycle" and state["round"] + 1 == len(settings["epochs"])
            and state["epoch"] >= settings["epochs"][-1])


def check_pruning(settings, model, masks, round_, steps, shape):
    """Raise ValueError, before any training, for what would fail in the rounds from `round_` on.

    masks: of weights that are pruned already; steps: of one epoch; shape: (C, H, W) of one image.
    """
    how, sparsity = settings["pruning"], settings["sparsity"]
    if sparsity:
        pruning.check_sparsities(model, sparsity[round_:], masks, settings["minimum_density"], settings["exclude"],
                                 "all" if how in GRADUAL else "remaining")
    if settings["macs"] and how in ("rounds", *GRADUAL):
        check_narrowing(settings, model, shape)
    if how in GRADUAL and settings["epochs"][0] * steps < 2:
        raise ValueError(f"--pruning {how} prunes between the first and the last step, and this run has one; give it "
                         "more --epochs or a smaller --batch-size")
    if how == "filters" and not filter_pruning.trained_spaces(model):
        raise ValueError(f"--pruning filters: {settings['model']} has no layer that can lose filters")
    if how == "filters" and settings["filter_measure"] == "neuron":
        filter_pruning.refuse_fixed_scales(model)
    if how == "l1_cycle":
        pruner = filter_pruning.Pruner(settings["cycle_settings"])
        pruner.check(model) if round_ else pruner.refuse_idle(model)
    if how == "morphnet":
        morphnet.refuse_fixed_scales(model, settings["model"])
        search = start_search(settings, round_, model, shape)
        if search:
            check_budget(settings, model, search, len(settings["epochs"]) - 1 - round_)


def check_narrowing(settings, model, shape):
    """Raise ValueError if --macs has no pruning to run with, several processes, or too few multiply-adds."""
    if not settings["sparsity"]:
        raise ValueError(f"--macs {settings['macs']} comes with the last pruning, and there is none: give --sparsity")
    if parallel.ranks() > 1:
        raise ValueError("--macs shrinks the network, which takes one process: run it without torchrun")
    pruning.check_macs(model, settings["macs"], shape, settings["macs_layers"], settings["exclude"])


def check_budget(settings, model, search, rounds):
    """Raise ValueError if even the smallest widths of `model` exceed MorphNet's budget, in this or a later round.

    rounds: how many still search; the budget of each is a fraction of what the one before it has left.
    """
    removable = morphnet.blocks_of(model)
    least = {space["name"]: 0 if space["name"] in removable else morphnet.groups_of(model, space)
             for space in morphnet.spaces_of(model)}
    share = min(settings["morph_budget"], settings["morph_budget"] ** rounds)
    morphnet.expand(model, least, search["sizes"], settings["morph_cost"], share * search["whole"],
                    settings["morph_round_to"], settings["morph_device"])


# ---- while training

def rate_of_round(settings, round_):
    """Factor on the learning rates of a round, counted from 0: --finetune-lr after a pruning, else 1."""
    return settings["finetune_lr"] if round_ and settings["pruning"] in FINETUNED else 1.0


def prune_on_schedule(settings, step, steps, model, average, masks):
    """Prune gradually after `step` of `steps`. Returns new masks if the schedule fires, else `masks`.

    The masks are applied to the network and to its average, if that is not None.
    """
    (sparsity,), when = settings["sparsity"], when_of(settings, steps)
    schedule, *shares = {"constant": (pruning.constant_schedule, sparsity),
                         "polynomial": (pruning.polynomial_schedule, 0.0, sparsity)}[settings["pruning"]]
    wanted = schedule(step, *shares, *when)
    return masks if wanted is None else rank(settings, wanted, model, average, masks)


def rank(settings, sparsity, model, average, masks):
    """Prune to `sparsity` of all weights. Returns the new masks, applied to the network and to its average."""
    masks = pruning.global_masks(model, sparsity, masks, settings["minimum_density"], settings["exclude"],
                                 settings["score"], of="all")
    for network in (model, average):
        if network is not None:
            pruning.apply_masks(network, masks)
    return masks


def when_of(settings, steps):
    """(first step, last step, steps between) at which gradual pruning ranks the weights, in a round of `steps`."""
    end = max(1, min(round(settings["prune_end"] * steps), steps - 1))
    return min(round(settings["prune_begin"] * steps), end - 1), end, settings["prune_frequency"]


def ranks_at(settings, step, steps):
    """Whether gradual pruning ranks the weights after `step` of `steps`."""
    return pruning.fires(step, *when_of(settings, steps))


def never_reduces(settings, parameters):
    """Why --pruning filters removes nothing in a run with so many parameters, as a sentence; "" if it may."""
    if settings["pruning"] != "filters":
        return ""
    interval, stop, epochs = settings["filter_interval"], settings["filter_stop"], settings["epochs"][-1]
    if interval > stop * epochs + ROUNDING:
        return (f"--pruning filters removes nothing in {epochs} epochs: its first epoch is --filter-interval "
                f"{interval}, its last is {stop} of them (--filter-stop)")
    if not settings["filter_threshold"]:
        return "--pruning filters removes no filter that is not zero already: --filter-threshold is 0"
    if parameters <= settings["filter_until"]:
        return (f"--pruning filters removes nothing: {parameters:,} parameters are no more than --filter-until "
                f"{settings['filter_until']}")
    return ""


def removes_strong(settings):
    """Why filter norms do not rank channels in a run with binary weights, as a sentence; "" in other runs."""
    by_length = (settings["pruning"] == "l1_cycle" or settings["macs"]
                 or settings["pruning"] == "filters" and settings["filter_measure"] == "filter")
    if settings["weights"] not in BINARY or not by_length:
        return ""
    return ("channels leave by the length of their filters, and every filter of binary weights works at full length; "
            "train with floats first, then --start from that")


def removes_channels(settings):
    """Whether `remove_channels` may remove some in this run."""
    return settings["pruning"] == "filters" or settings["pruning"] in GRADUAL and bool(settings["macs"])


def remove_channels(settings, epoch, steps, shape, model, average, optimizer, masks):
    """Remove channels after `epoch` epochs of a round. Returns what was removed, as text; "" if nothing was.

    steps: of one epoch; shape: (C, H, W) of one image. Average, optimizer and masks shrink with it.
    """
    if not removes_channels(settings):
        return ""
    if settings["pruning"] == "filters":
        return reduce_filters(settings, epoch, model, average, optimizer, masks)
    last = when_of(settings, settings["epochs"][0] * steps)[1] // steps      # the epochs before the one that it ends in
    told = narrow(settings, shape, model, average, optimizer, masks) if epoch >= last else ""
    if told and not last:                 # the schedule has ended in the first epoch, and would not rank again
        masks |= rank(settings, settings["sparsity"][0], model, average, masks)
    return told


def narrow(settings, shape, model, average, optimizer, masks):
    """Remove channels until --macs is met. Returns which, as text; "" if it is met already."""
    if macs_of(model, shape) <= settings["macs"]:
        return ""
    left = pruning.narrow(model, settings["macs"], shape, settings["macs_layers"], average, optimizer, masks,
                          settings["exclude"])
    told = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in left.items())
    return f"{told}; {macs_of(model, shape):,} multiply-adds"


def reduce_filters(settings, epoch, model, average, optimizer, masks):
    """Remove weak filters after `epoch` epochs of a round, every --filter-interval epochs.

    None are removed after the epoch of --filter-stop, or once there are no more than --filter-until parameters.
    Average, optimizer and masks shrink with it. Returns what was removed, as text; "" if nothing was.
    """
    small = sum(weight.numel() for weight in model.parameters()) <= settings["filter_until"]
    stop = settings["filter_stop"] * settings["epochs"][-1] + ROUNDING
    if small or epoch % settings["filter_interval"] or epoch > stop:
        return ""
    turn = epoch // settings["filter_interval"] - 1 if settings["filter_one_layer"] else None
    found = filter_pruning.reduce_network(model, threshold_after(settings, epoch), settings["filter_relative"],
                                          settings["filter_columns"], turn, average, optimizer, masks,
                                          settings["filter_measure"])
    return ", ".join(f"{name} {before} -> {after}" + f" ({held} weak ones have to stay)" * bool(held)
                     for name, (before, after, held) in found.items() if after < before)


def threshold_after(settings, epoch):
    """The threshold of Zhou's reduction after `epoch` epochs: --filter-threshold, or less during --filter-warmup."""
    warmup = settings["filter_warmup"] * settings["epochs"][-1]
    return settings["filter_threshold"] * (min(1.0, epoch / warmup) if warmup else 1.0)


def start_search(settings, round_, model, shape):
    """What MorphNet's penalty needs in a round that searches for widths, a dictionary; None in any other round.

    shape: (C, H, W) of one image. The last round trains the structure that was found.
    """
    if settings["pruning"] != "morphnet" or round_ + 1 >= len(settings["epochs"]):
        return None
    sizes = morphnet.sizes_of(model, shape)
    return {"sizes": sizes, "whole": morphnet.cost(model, sizes, settings["morph_cost"], None,
                                                   settings["morph_device"])}


def search_penalty(settings, model, search):
    """MorphNet's penalty of one step, a scalar tensor, times its strength."""
    return settings["morph_strength"] * morphnet.penalty(
        model, search["sizes"], settings["morph_cost"], settings["morph_threshold"], settings["morph_device"],
        search["whole"], hint_of(settings))


def hint_of(settings):
    """The settings to change if a search removes all channels or diverges, as text."""
    return (f"--morph-threshold {settings['morph_threshold']:g}, --morph-strength {settings['morph_strength']:g}, "
            f"--lr {settings['lr']:g}")
