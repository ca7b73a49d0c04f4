"""Learning-rate schedules over a round, as shares of the largest rate, and their position in a resumed run."""
import math

import torch

from engine.settings import Setting, line

SETTINGS = {
    "schedule": line("one-cycle", ("one-cycle", "cosine", "plateau")),
    "peak": Setting(None, "share of a round at which the learning rate peaks (0.25 for one-cycle, 0.05 for cosine)",
                    low=0, high=0.99, form=float, only=(("schedule", ("one-cycle", "cosine")),)),
}


def one_cycle(progress, peak=0.25):
    """Share of the largest learning rate at `progress` in [0, 1] of a round: linear up to `peak`, then down to zero."""
    rising = (progress + 1e-3) / peak if peak else 1.0
    return max(0.0, min(rising, (1 - progress) / (1 - peak), 1.0))


def warm_cosine(progress, peak=0.05):
    """Share of the largest learning rate for a linear warm-up, up to `peak`, followed by half a cosine."""
    rising = (progress + 1e-3) / peak if peak else 1.0
    fallen = min(max(0.0, progress - peak) / (1 - peak), 1.0)
    return min(rising, 0.5 + 0.5 * math.cos(math.pi * fallen))


SHAPES = {"one-cycle": one_cycle, "cosine": warm_cosine}


def make_schedule(optimizer, name, steps, peak=None):
    """The schedule called `name` over a round of `steps`; peak: share where it is highest, None for its default."""
    if name == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    shape, place = SHAPES[name], [] if peak is None else [peak]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step / steps, *place))


def restore(run, state):
    """Restore the optimizer: its state from a file, its settings from the run, its learning rate from the schedule.

    The position in the schedule follows from the epochs done; the stored step count would be
    wrong if the batch size or the number of epochs has changed. The learning rate of "plateau"
    depends on the losses so far: it is kept, relative to --lr, and starts anew if the run used
    another schedule before.
    """
    schedule, groups = run.schedule, run.optimizer.param_groups
    own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    run.optimizer.load_state_dict(state["optimizer"])
    groups, before = run.optimizer.param_groups, state["settings"]
    stood, shares = [group["lr"] for group in groups], [group.get("share", 1.0) for group in groups]
    bases = [group.get("initial_lr", group["lr"]) for group in own]
    by_losses = run.settings["schedule"] == "plateau"
    if by_losses == (before["schedule"] == "plateau"):
        schedule.load_state_dict(state["schedule"])
    if by_losses:
        names = [group.get("rate", "lr") for group in own]      # the setting that holds the group's learning rate
        rates = bases if before["schedule"] != "plateau" else [
            rate * (run.settings[name] / before[name]) * (group.get("share", 1.0) / share)
            for rate, name, share, group in zip(stood, names, shares, own, strict=True)]
    else:
        schedule.last_epoch, schedule.base_lrs = run.epoch * len(run.train), bases
        rates = [base * schedule.lr_lambdas[0](schedule.last_epoch) for base in bases]
        schedule._last_lr = list(rates)
    for group, settings, rate in zip(groups, own, rates, strict=True):
        group |= {**settings, "lr": rate}
    if rates != stood:
        print(f"the schedule goes on at learning rate {rates[0]:.4g}, {run.epoch} of "
              f"{run.settings['epochs'][run.round]} epochs into its round; it stood at {stood[0]:.4g}", flush=True)
