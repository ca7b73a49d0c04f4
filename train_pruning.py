"""The whole job: train, prune, train, prune, train: `python train_pruning.py`.

Trains 100 epochs, prunes 70 % of the weights, trains 25 epochs, prunes 70 % of the
rest, trains 125 epochs: a ResNet-18 with 8 groups keeps 9 % of its weights. Edit a
technique line below, or pass the flag of the same name.
`--epochs 8 2 6 --sparsity 0.7 0.7` is a short run, `--dry-run` says how long a run
will take.
"""
import engine.interrupts  # isort: skip  # noqa: F401
from itertools import groupby

import filter_pruning
import morphnet
import pruning
import set_pruning_train
import train
from engine import commandline, files, parallel
from engine.endings import resumable
from engine.settings import with_defaults
from experiment import finish, start
from networks import image_shape
from set_pruning_train import hint_of, narrow
from train import RECIPES, fit, lay_out_again, recalibrate

commandline.check_lines(__file__)      # reports a mistake in a line below as one error line, before Python runs it

# ---- techniques: in each group one line is active; --mixing and the like override
MODEL = "resnet18"            # 11.2 M parameters when dense, arXiv:1512.03385
# MODEL = "resnet34"          # 21.3 M
# MODEL = "resnet50"          # 23.5 M, bottlenecks
# MODEL = "resnet101"         # 42.5 M
# MODEL = "resnet152"         # 58.2 M
# MODEL = "resnet20"          # 0.27 M, for 32x32 images; GROUPS and SHUFFLE are of the five above alone
# MODEL = "resnet56"          # 0.86 M
# MODEL = "resnet110"         # 1.7 M
# MODEL = "wrn-16-4"          # 2.7 M, wide, arXiv:1605.07146
# MODEL = "wrn-28-10"         # 36.5 M
# MODEL = "mobilenet"         # 3.2 M, depthwise separable, arXiv:1704.04861
# MODEL = "vgg6-64-256-256"   # 2.0 M, pools early: accuracy for few operations, arXiv:2404.00498
# MODEL = "cifar-quick"       # 0.15 M, no batch norm
# MODEL = "lenet5"            # 0.06 M, no batch norm, LeCun et al. 1998
# MODEL = "lenet5-student"    # 0.01 M
GROUPS = 8                    # factorized: an eighth of the parameters and MACs
# GROUPS = 4
# GROUPS = 1                  # dense
SHUFFLE = True                # interleave the groups' channels, free, arXiv:1707.01083
# SHUFFLE = False
MIXING = "cutmix"             # two images share one picture, arXiv:1905.04899
# MIXING = "mixup"            # two images averaged, arXiv:1710.09412
# MIXING = "cutout"           # a square of each image is blanked, arXiv:1708.04552
# MIXING = "none"
WEIGHTS = "float"
# WEIGHTS = "binary"          # -H or +H, by sign, arXiv:1511.00363
# WEIGHTS = "binary-stochastic"  # -H or +H, drawn
# WEIGHTS = "lsq"             # few bits, of activations too; their steps are learned, arXiv:1902.08153
PRUNING = "rounds"            # train, prune, train: between rounds
# PRUNING = "polynomial"      # while training, fast at first, arXiv:1710.01878
# PRUNING = "constant"        # while training, all at once and again every so often
# PRUNING = "filters"         # whole filters leave while training, Zhou et al. 2016
# PRUNING = "l1_cycle"        # train, then remove filters of small L1 norm and fine-tune while the loss allows
# PRUNING = "morphnet"        # rounds search for widths, the last trains them from scratch, arXiv:1711.06798
SCORE = "l1"                  # weights ranked by magnitude
# SCORE = "lamp"              # by magnitude relative to their layer, arXiv:2010.07611
OPTIMIZER = "sgd"             # one rate for all weights
# OPTIMIZER = "muon"          # filters move by orthogonal matrices, kellerjordan.github.io/posts/muon
SCHEDULE = "one-cycle"        # in each round: up for a quarter, down to zero, arXiv:1708.07120
# SCHEDULE = "cosine"         # short warm-up, then half a cosine, arXiv:1608.03983
# SCHEDULE = "plateau"        # a tenth when the validation loss stalls
AVERAGING = "ema"             # exponential moving average of the weights
# AVERAGING = "none"
FLIPS = "random"              # an image is mirrored by a draw
# FLIPS = "alternating"       # in every second epoch, arXiv:2404.00498

# ---- settings
# gradual pruning makes one round of these: the sum of the epochs, and the sparsity that they compound to
SETTINGS = with_defaults({**train.SETTINGS, **set_pruning_train.SETTINGS}, epochs=[100, 25, 125], sparsity=[0.7, 0.7])


def next_round(run):
    """Go to the next round, with a new optimizer and a new weight average."""
    run.round, run.epoch, run.optimizer, run.average = run.round + 1, 0, None, None


def prune(run):
    """Prune the network of `run` once and go to the next round, with a new optimizer."""
    sparsity, floor = run.settings["sparsity"][run.round], run.settings["minimum_density"]
    if run.settings["macs"] and run.round + 1 == len(run.settings["sparsity"]):
        left = narrow(run.settings, image_shape(run.kind), run.model, run.average, run.optimizer, run.masks)
        if left:
            lay_out_again(run)
            print(f"removed: {left}", flush=True)
    run.masks = pruning.global_masks(run.model, sparsity, run.masks, floor, run.settings["exclude"],
                                     run.settings["score"])
    pruning.apply_masks(run.model, run.masks)
    if run.settings["recalibrate"]:
        recalibrate(run, run.model)
    next_round(run)
    held = pruning.held_layers(run.masks, floor)
    print(f"pruned {100 * sparsity:.0f} % of the remaining weights: {100 * pruning.sparsity_of(run.model):.2f} % zeros"
          + (f"; held at the minimum density of {floor}: {', '.join(held)}" if held else ""), flush=True)


def morph(run):
    """Rebuild the network between two MorphNet rounds: live channels only, widened to the budget, with new weights."""
    settings, sizes = run.settings, run.search["sizes"]
    limits = settings["morph_cost"], settings["morph_budget"] * run.search["whole"]
    alive = morphnet.structure_of(run.model, settings["morph_threshold"], hint_of(settings))
    try:
        wide, factor = morphnet.expand(run.model, alive, sizes, *limits, settings["morph_round_to"],
                                       settings["morph_device"])
    except ValueError as problem:
        raise ValueError(f"{problem}; --resume --force with a smaller --morph-round-to or a larger --morph-budget goes "
                         "on") from None
    before = {space["name"]: len(run.model.get_submodule(space["makers"][0]).weight)
              for space in morphnet.spaces_of(run.model)}
    morphnet.write_structure(run.out / f"structure-{run.round + 1}.json", wide)
    with files.noted():
        morphnet.draw_widths(run.out / f"widths-{run.round + 1}.png", before, wide)
    # initialised on the CPU, whose random state every checkpoint holds
    morphnet.rebuild(run.model.cpu(), wide).to(run.device)
    next_round(run)
    lay_out_again(run)
    print(f"alive: {sum(alive.values()):,} of {sum(before.values()):,} channels; all {factor:.3f} times as wide: "
          f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {run.out}/structure-{run.round}.json",
          flush=True)


def l1_cycle(run):
    """Remove filters and fine-tune, step by step, until the validation loss exceeds its limit.

    The limit: --stop-loss, else that of --cycle, else a tenth above the loss before
    the first removal. model.pt is the last network within the limit.
    """
    first = [row["validation_loss"] for row in run.history if row["round"] == 1][-1]
    settings = {"stop_loss": 1.1 * first, **run.settings["cycle_settings"]}
    if run.settings["stop_loss"] is not None:
        settings["stop_loss"] = run.settings["stop_loss"]
    pruner = filter_pruning.Pruner(settings)
    pruner.history = steps_of(run)[:-1]

    def finetune(model, epochs):
        run.settings["epochs"].append(epochs)
        next_round(run)
        lay_out_again(run)
        fit(run)
    if run.round == 0 or run.history[-1]["validation_loss"] <= settings["stop_loss"]:
        pruner.prune(run.model, finetune, lambda model: run.history[-1]["validation_loss"], lambda model: finish(run),
                     run.out, masks=run.masks)
    with files.noted():
        filter_pruning.draw_cycle(run.out / "cycle.png", steps_of(run))
    print(f"{run.round} steps, limit {settings['stop_loss']:.4f}: {run.out}/model.pt is the last within it, "
          "cycle.png and norms-*.png show the way", flush=True)


def steps_of(run):
    """The history of an L1 cycle, one row per round, as in `filter_pruning.Pruner`; seconds are per epoch."""
    rounds = [list(rows) for _, rows in groupby(run.history, key=lambda row: row["round"])]
    return [{"step": step, "parameters": rows[-1]["parameters"], "loss": rows[-1]["validation_loss"],
             "seconds": sum(row["seconds"] for row in rows) / len(rows)} for step, rows in enumerate(rounds)]


def main(argv):
    """Train in rounds with pruning between them; a resumed run continues from its saved state."""
    run = start(__file__, __doc__.splitlines()[0], SETTINGS, RECIPES, argv)
    if run is None:
        return
    with resumable(run):
        fit(run)
        if run.settings["pruning"] == "l1_cycle":
            return l1_cycle(run)
        while run.round + 1 < len(run.settings["epochs"]):
            {"rounds": prune, "morphnet": morph}[run.settings["pruning"]](run)
            fit(run)
        finish(run)


if __name__ == "__main__":
    commandline.command(parallel.together(main))
