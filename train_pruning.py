"""The whole job: train, prune, train, prune, train: `python train_pruning.py`.

100 epochs, 70 % of the weights pruned, 25 epochs, 70 % of the rest, 125 epochs:
a ResNet-18 of 8 groups keeps 9 % of its weights. Edit a technique line below, or
pass the flag of the same name; `--epochs 8 2 6 --sparsity 0.7 0.7` is a short
run, `--dry-run` says how long a run will take.
"""
import commandline
import pruning
from experiment import finish, resumable, start
from train import DEFAULTS, RECIPES, fit, recalibrate

# ---- techniques: in each group one line is active; --mixing and the like override
MODEL = "resnet18"            # 11.2 M parameters when dense, arXiv:1512.03385
# MODEL = "resnet34"          # 21.3 M
# MODEL = "resnet50"          # 23.5 M, bottlenecks
# MODEL = "resnet101"         # 42.5 M
# MODEL = "resnet152"         # 58.2 M
GROUPS = 8                    # factorized: an eighth of the parameters and MACs
# GROUPS = 4
# GROUPS = 1                  # dense
SHUFFLE = True                # interleave the groups' channels, free, arXiv:1707.01083
# SHUFFLE = False
MIXING = "cutmix"             # two images share one picture, arXiv:1905.04899
# MIXING = "mixup"            # two images averaged, arXiv:1710.09412
# MIXING = "none"
WEIGHTS = "float"
# WEIGHTS = "binary"          # -H or +H, by sign, arXiv:1511.00363
# WEIGHTS = "binary-stochastic"  # -H or +H, drawn
PRUNING = "rounds"            # train, prune, train: between rounds
# PRUNING = "polynomial"      # while training, fast at first, arXiv:1710.01878
# PRUNING = "constant"        # while training, all at once and again every so often
SCORE = "l1"                  # weights ranked by magnitude
# SCORE = "lamp"              # by magnitude relative to their layer, arXiv:2010.07611
SCHEDULE = "one-cycle"        # in each round: up for a quarter, down to zero, arXiv:1708.07120
# SCHEDULE = "cosine"         # short warm-up, then half a cosine, arXiv:1608.03983
# SCHEDULE = "plateau"        # a tenth when the validation loss stalls
AVERAGING = "ema"             # exponential moving average of the weights
# AVERAGING = "none"

# gradual pruning takes the same epochs and zeros in one round: their sum, and what the sparsities compound to
ROUNDS = {**DEFAULTS, "epochs": [100, 25, 125], "sparsity": [0.7, 0.7]}


def add_flags(parser):
    """The flags that only pruning has."""
    parser.add_argument("--sparsity", type=float, nargs="+", help="share of the remaining weights pruned after a round")
    parser.add_argument("--minimum-density", type=float, help="share of each layer that is never pruned (0.01)")
    parser.add_argument("--exclude", nargs="+", metavar="LAYER", help="layers that are never pruned, such as conv1")
    parser.add_argument("--prune-begin", type=float, help="share of the training at which gradual pruning begins (0.1)")
    parser.add_argument("--prune-end", type=float, help="and at which it ends (0.6)")
    parser.add_argument("--prune-frequency", type=int, help="and the steps between (100)")


def prune(run):
    """Prune the network of `run` once and step to the next round, whose optimizer starts afresh."""
    sparsity, floor = run.settings["sparsity"][run.round], run.settings["minimum_density"]
    run.masks = pruning.global_masks(run.model, sparsity, run.masks, floor, run.settings["exclude"],
                                     run.settings["score"])
    pruning.apply_masks(run.model, run.masks)
    if run.settings["recalibrate"]:
        recalibrate(run, run.model)
    run.round, run.epoch, run.optimizer = run.round + 1, 0, None
    held = pruning.held_layers(run.masks, floor)
    print(f"pruned {100 * sparsity:.0f} % of the remaining weights: {100 * pruning.sparsity_of(run.model):.2f} % zeros"
          + (f"; held at the minimum density of {floor}: {', '.join(held)}" if held else ""), flush=True)


def main(argv):
    """Train in rounds with pruning between them; the state of a run says where to begin."""
    run = start(__file__, __doc__.splitlines()[0], ROUNDS, RECIPES, argv, add_flags)
    if run is None:
        return
    with resumable(run):
        fit(run)
        while run.round + 1 < len(run.settings["epochs"]):
            prune(run)
            fit(run)
        finish(run)


if __name__ == "__main__":
    commandline.command(main)
