"""Pruning while training: what the line PRUNING does after a step, at an epoch's end, and to the loss.

`train.py` calls `prune_on_schedule` behind each update (lines "polynomial" and
"constant"), `reduce_filters` at each epoch's end (line "filters"), and adds
`search_penalty` to the loss (line "morphnet"). Pruning between rounds is in
`train_pruning.py`.
"""
import filter_pruning
import morphnet
import pruning


def check_pruning(settings, model, masks, round_, steps, shape):
    """ValueError, before any training, for what the rounds from `round_` on would fail at.

    masks: of weights that are pruned already; steps: of one epoch; shape: (C, H, W) of one image.
    """
    how, sparsity = settings["pruning"], settings["sparsity"]
    if sparsity:
        pruning.check_sparsities(model, sparsity[round_:], masks, settings["minimum_density"], settings["exclude"],
                                 "all" if how in ("polynomial", "constant") else "remaining")
    if how in ("polynomial", "constant") and settings["epochs"][0] * steps < 2:
        raise ValueError(f"--pruning {how} prunes between the first and the last step, and this run has one; give it "
                         "more --epochs or a smaller --batch-size")
    if how == "filters" and not filter_pruning.reducible(model):
        raise ValueError(f"--pruning filters: {settings['model']} has no layer that can lose filters")
    if how == "l1_cycle":
        filter_pruning.Pruner(settings["cycle_settings"]).check(model)
    if how == "morphnet" and start_search(settings, round_, model, shape):
        check_budget(settings, model, start_search(settings, round_, model, shape))


def check_budget(settings, model, search):
    """ValueError where not even the smallest widths of `model` are within MorphNet's budget."""
    removable = morphnet.blocks_of(model)
    least = {space["name"]: 0 if space["name"] in removable else morphnet.groups_of(model, space)
             for space in morphnet.spaces_of(model)}
    morphnet.expand(model, least, search["sizes"], settings["morph_cost"], settings["morph_budget"] * search["whole"],
                    settings["morph_round_to"], settings["morph_device"])


def prune_on_schedule(settings, step, steps, model, average, masks):
    """Gradual pruning after `step` of `steps`: new masks where the schedule fires, else those that were.

    The masks are applied to the network and to its average, if that is not None.
    """
    (sparsity,), when = settings["sparsity"], when_of(settings, steps)
    schedule, *shares = {"constant": (pruning.constant_schedule, sparsity),
                         "polynomial": (pruning.polynomial_schedule, 0.0, sparsity)}[settings["pruning"]]
    wanted = schedule(step, *shares, *when)
    if wanted is None:
        return masks
    masks = pruning.global_masks(model, wanted, masks, settings["minimum_density"], settings["exclude"],
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
    """Whether gradual pruning ranks the weights behind `step` of `steps`."""
    return pruning.fires(step, *when_of(settings, steps))


def reduce_filters(settings, epoch, model, average, optimizer, masks):
    """After `epoch` epochs, every so often and until the stop: weak filters go to zero and leave the network.

    Average, optimizer and masks shrink with it. Returns what left, as text; "" where nothing did.
    """
    if epoch % settings["filter_interval"] or epoch > settings["filter_stop"] * settings["epochs"][-1]:
        return ""
    turn = epoch // settings["filter_interval"] - 1 if settings["filter_one_layer"] else None
    found = filter_pruning.reduce_network(model, settings["filter_threshold"], settings["filter_relative"],
                                          settings["filter_columns"], turn, average, optimizer, masks)
    return ", ".join(f"{name} {before} -> {after}" + f" ({held} weak ones held by groups)" * bool(held)
                     for name, (before, after, held) in found.items() if after < before)


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
    """The settings that a search which empties or explodes could change."""
    return (f"--morph-threshold {settings['morph_threshold']:g}, --morph-strength {settings['morph_strength']:g}, "
            f"--lr {settings['lr']:g}")
