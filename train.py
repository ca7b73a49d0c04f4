"""Train one network on one data set: `python train.py --epochs 30`.

Edit a technique line below, or pass the flag of the same name. Writes
runs/<name>/ with config.json, history.csv, last.pt and model.pt; then run
`python test.py` and `python profil.py`. The project's only training loop (`fit`)
and its only `evaluate` are in this file; `train_pruning.py` adds pruning rounds.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import cifar10
import experiment
import pruning
import set_pruning_train
from engine import checkpoint, commandline, compiling, files, operations, parallel
from engine.averages import update_average
from engine.computing import autocast
from engine.endings import enough_memory, resumable
from engine.finite import count_finite, refuse_counted, refuse_immense, refuse_nonfinite, refuse_nonfinite_state
from engine.folders import newest
from engine.modes import in_mode
from engine.settings import Setting, defaults_of, joined, line, only, without_flags
from experiment import (
    MIXINGS,
    begin_round,
    finish,
    lay_out,
    masked_weights,
    save,
    start,
)
from networks import image_shape
from set_distillation_train import distilled, take_views, teach
from set_pruning_train import (
    GRADUAL,
    prune_on_schedule,
    ranks_at,
    remove_channels,
    removes_channels,
    search_penalty,
)
from set_quantization_train import after_step, evaluation_weights, step_weights
from set_resizing_train import resized, side_of

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
OPTIMIZER = "sgd"             # one rate for all weights
# OPTIMIZER = "muon"          # filters move by orthogonal matrices, kellerjordan.github.io/posts/muon
SCHEDULE = "one-cycle"        # up for a quarter, down to zero, arXiv:1708.07120
# SCHEDULE = "cosine"         # short warm-up, then half a cosine, arXiv:1608.03983
# SCHEDULE = "plateau"        # a tenth when the validation loss stalls
AVERAGING = "ema"             # exponential moving average of the weights
# AVERAGING = "none"
FLIPS = "random"              # an image is mirrored by a draw
# FLIPS = "alternating"       # in every second epoch, arXiv:2404.00498

# ---- settings of the run; techniques declare theirs in their own files, train_pruning.py has those of pruning
UNMIXED = (("mix_probability", 0), ("mix_alpha", 0))
SETTINGS = joined({
    "dataset": Setting("cifar10", cifar10.HELP, reads=cifar10.named),
    "data": Setting("data", "folder of the data set's files", free=True),
    "epochs": Setting([30], "of each round", low=1, high=10**6, many="+", form=int),
    "recipe": Setting("ours", "published: the settings of the original run", choices=("ours", "published"), fixed=True),
    "batch_size": Setting(64, "images per step", low=1, high=10**6),
    "limit": Setting(None, "use at most this many images of each split", low=2, form=int),
    "all_images": Setting(False, "train on the validation images too, to compare with those who do", fixed=True,
                          clashes=(((), "recipe", ("published",), "which keeps its own batches; leave one out"),)),
    "seed": Setting(0, "random seed of weights, shuffling, augmentation and mixing", low=0, high=2**63 - 1, fixed=True),
    "mixing": line("cutmix", (*MIXINGS, "none"), unless=UNMIXED),
    **only("mixing", MIXINGS, {
        "mix_probability": Setting(0.5, "fraction of the batches, or images, that are mixed", low=0, high=1,
                                   unless=UNMIXED[1:]),
        "mix_alpha": Setting(1.0, "mixing ratio of two images is drawn from Beta(alpha, alpha)", low=0,
                             unless=UNMIXED[:1]),
        "mix_per_sample": Setting(False, "draw for each image, not once per batch", unless=UNMIXED),
    }),
    "averaging": line("ema", ("ema", "none")),
    "ema_decay": Setting(0.998, "EMA decay of the weights per step", low=0, high=1, only=(("averaging", ("ema",)),)),
    "flips": line("random", ("random", "alternating"), clashes=(
        (("alternating",), "recipe", ("published",), "which mirrors images by a draw; leave one out"),)),
    "pad": Setting(4, "random crops: largest shift in pixels", low=0, high=16, clashes=(
        ((), "recipe", ("published",), "which crops by 4; leave one out"),)),
    "label_smoothing": Setting(0.1, "of the cross-entropy", low=0, high=1),
    "recalibrate": Setting(False, "recompute batch norm's statistics on training images after pruning and each round"),
    "compile": Setting("auto", "auto: if it saves time and a compiler is installed", choices=("auto", "on", "off"),
                       alone=(("on",), "takes one process: several train without compiling")),
    "arithmetic": Setting("auto", "of training; auto: bfloat16 on CUDA and on CPUs that are faster in it",
                          choices=("auto", "float32", "bfloat16")),
    "convolutions": Setting("auto", "compute grouped ones as such, or as dense ones filled with zeros; auto: the "
                            "faster one on CUDA", choices=("auto", "grouped", "dense")),
    "device": Setting("auto", "auto, cpu, cuda, cuda:1 or mps", free=True),
    "start": Setting(None, "begin with the weights of this checkpoint", form=str, shown="CHECKPOINT", fixed=True),
    "out": Setting(None, "folder of the run (runs/<data set>-<model>-<time>)", form=str, free=True),
    "resume": Setting(False, "continue the run in --out, or the newest one", free=True),
    "force": Setting(False, "resume although settings differ; take a teacher or --start of another data set",
                     free=True),
    "dry_run": Setting(False, "show settings and estimated time, then stop", free=True),
    "tensorboard": Setting(False, "write the rows of history.csv for TensorBoard, too: tensorboard --logdir runs",
                           free=True),
    "debug": Setting(False, "show tracebacks", free=True),
}, *experiment.TABLES) | without_flags(set_pruning_train.SETTINGS)
DEFAULTS = defaults_of(SETTINGS)
RECIPES = {"published": {    # the original run of this project; `measure` makes its four passes per epoch
    "shuffle": False, "mixing": "cutmix", "mix_probability": 1.0, "schedule": "plateau", "averaging": "none",
    "batch_size": 32, "lr": 0.01, "momentum": 0.5, "nesterov": False, "weight_decay": 1e-5,
    "label_smoothing": 0.0, "weights": "float", "compile": "off", "arithmetic": "float32",
    "convolutions": "grouped", "optimizer": "sgd", "flips": "random",
}}
READ_EVERY = 50      # on CUDA: steps between two checks that loss and gradients are finite
SHIPPED = Path(__file__).resolve().parent / "pretrained" / "resnet18_groups8_cifar10.pt.gz"


# ---- the loop

def fit(run):
    """Train the current round from the state of `run` to its end; save a checkpoint after each epoch.

    Raises RuntimeError if a loss or gradient is not finite (nothing is saved; off CUDA
    nothing is updated either) and if memory runs out.
    """
    from tqdm import tqdm
    if run.optimizer is None:
        begin_round(run)
    begun = time.perf_counter()
    if has_views(run):
        take_views(run, autocast(run.device, run.dtype))
    asking = time.perf_counter() - begun
    epochs = run.settings["epochs"][run.round]
    images = len(run.train) * run.settings["batch_size"]
    with enough_memory(run.settings), tqdm(
            total=epochs * images, initial=run.epoch * images, unit="image", unit_scale=True,
            desc=f"round {run.round + 1}", disable=not (sys.stderr.isatty() and parallel.leads())) as bar:
        while run.epoch < epochs:
            row, asking = run_epoch(run, bar, asking), 0.0
            if bar.disable:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if run.average is not None:
        run.model.load_state_dict(run.average.state_dict())


def run_epoch(run, bar, asking=0.0):
    """Train, validate, record and save one epoch. Returns its row of history.csv; its seconds include `asking`."""
    begun, rate = time.perf_counter(), run.optimizer.param_groups[0]["lr"]
    run.counted, run.pflop = {}, pflop_so_far(run)
    if run.settings.get("flips") == "alternating":
        run.train.epoch = len(run.history)
    loss, accuracy = train_epoch(run, bar)
    trained = time.perf_counter() - begun
    if removes_channels(run.settings):
        refuse_immense(run)
    left = remove_channels(run.settings, run.epoch + 1, len(run.train), image_shape(run.kind), run.model, run.average,
                           run.optimizer, run.masks)
    if left:
        lay_out_again(run)
        print(f"removed: {left}", flush=True)
    if run.settings["recalibrate"] and run.epoch + 1 == run.settings["epochs"][run.round]:
        recalibrate(run, networks_of(run)[-1])
    validation_loss, validation_accuracy = parallel.agreed(measure(run))
    if run.settings["schedule"] == "plateau":
        run.schedule.step(validation_loss)
    refuse_nonfinite_state(run, networks_of(run), validation_loss)
    parallel.refuse_drift(networks_of(run))
    row = {"round": run.round + 1, "epoch": len(run.history) + 1, "lr": float(f"{rate:.6g}"),
           "train_loss": round(loss, 4), "train_accuracy": round(accuracy, 2),
           "validation_loss": round(validation_loss, 4), "validation_accuracy": round(validation_accuracy, 2),
           "sparsity": round(pruning.sparsity_of(run.model), 5),
           "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
           "pflop": run.pflop if run.pflop is None else round(run.pflop, 9),
           "images_per_second": round(len(run.train) * run.settings["batch_size"] / trained, 1),
           "seconds": round(time.perf_counter() - begun + asking, 1)}
    with files.uninterrupted():      # an epoch that counts as done is on disk
        run.epoch += 1
        run.history.append(row)
        save(run)
    return row


def lay_out_again(run):
    """Set the memory layout of the network of `run` and compile it again after its layers have changed."""
    lay_out(run)
    run.forward = compiling.again(run.model, run.forward)


def train_epoch(run, bar):
    """Train on every batch once. Returns mean loss and accuracy in %, with augmentation and mixing."""
    run.model.train()
    totals, seen = torch.zeros(2, device=run.device), 0
    steps, done = run.settings["epochs"][run.round] * len(run.train), run.epoch * len(run.train)
    read_every = 1 if "binary" in run.settings["weights"] else READ_EVERY     # binary weights must be finite
    if run.finite_steps is not None:
        run.finite_steps.zero_()
    for step, (images, labels) in enumerate(run.train):
        images, labels = as_step_takes(run, images, labels)
        loss, correct = train_step(run, images, labels, step)
        run.made = None                   # after the first step the run keeps its folder
        ranks = run.settings["pruning"] in GRADUAL and ranks_at(run.settings, done + step, steps)
        if run.finite_steps is not None and (ranks or (step + 1) % read_every == 0 or step + 1 == len(run.train)):
            refuse_counted(run, step)     # only finite weights can be ranked
        if ranks:
            run.masks = prune_on_schedule(run.settings, done + step, steps, run.model, run.average, run.masks)
        totals += torch.stack([loss * len(images), correct])
        seen += len(images)
        bar.update(len(images))
        if not bar.disable and step % 20 == 0:
            validated = {"validation": run.history[-1]["validation_accuracy"]} if run.history else {}
            bar.set_postfix(loss=f"{totals[0] / seen:.3f}", accuracy=f"{100 * totals[1] / seen:.1f}", **validated,
                            refresh=False)
    loss, correct = (totals / seen).tolist()
    return loss, 100 * correct


def as_step_takes(run, images, labels):
    """Move a batch to the device of `run`, its images in the memory layout that `train_step` takes."""
    return images.to(run.device).contiguous(memory_format=run.layout), labels.to(run.device)


def train_step(run, images, labels, step):
    """Mix, resize, forward, backward, update, mask, average. Returns loss and number correct, on the device."""
    settings = run.settings
    classes = run.architecture["num_classes"]
    targets = F.one_hot(labels, classes).to(images.dtype)
    if has_views(run):                                 # the teacher's logits are mixed as the labels are
        targets = torch.cat([targets, run.train.answer], 1)
    if settings["mixing"] != "none":
        images, targets = mixed(settings, images, targets, run.generator)
    images, targets = parallel.own_part(images, targets)
    targets, answers = targets[:, :classes], targets[:, classes:]
    shown = resized(images, side_of(progress_of(run, step), images.shape[-1], settings["resize"],
                                    settings["resize_until"]))
    count_operations(run, shown, images)
    run.optimizer.zero_grad(set_to_none=True)
    with step_weights(run.model, settings["weights"], settings["binary_scale"], run.generator, run.masks):
        with autocast(run.device, run.dtype), parallel.whole_batch():
            logits = run.forward(shown)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings["label_smoothing"])
        if run.teacher is not None:
            with autocast(run.device, run.dtype):
                taught = answers if has_views(run) else teach(run.teacher, images)
            loss = distilled(loss, logits.float(), taught, settings["temperature"], settings["distillation_weight"])
        if run.search is not None:
            loss = loss + search_penalty(settings, run.model, run.search)
        loss.backward()
    correct = (logits.argmax(1) == targets.argmax(1)).sum().float()
    loss, correct = parallel.average_gradients(run.model, loss.detach(), correct)
    weights, masks = masked_weights(run)
    pruning.mask_gradients(weights, masks)
    (refuse_nonfinite if run.finite_steps is None else count_finite)(run, loss, step)
    run.optimizer.step()
    after_step(run.model, settings["weights"], settings["binary_scale"])
    pruning.mask_weights(weights, masks)
    if settings["schedule"] != "plateau":
        run.schedule.step()
    if run.average is not None:
        update_average(run.averaged, settings["ema_decay"], run.epoch * len(run.train) + step)
    return loss, correct


def mixed(settings, images, targets, generator):
    """Mix a batch with the function that the line MIXING names; it also gets the settings of its own file."""
    name = settings["mixing"]
    own = {setting: settings[setting] for setting in getattr(experiment.TECHNIQUES[name], "SETTINGS", {})}
    return MIXINGS[name](images, targets, generator, settings["mix_alpha"], settings["mix_probability"],
                         settings["mix_per_sample"], **own)


def progress_of(run, step):
    """Fraction of the round that is done before step `step` of its current epoch."""
    return (run.epoch + step / len(run.train)) / run.settings["epochs"][run.round]


def has_views(run):
    """Whether the teacher of `run` runs once, on --teacher-views, and not in each step."""
    return run.teacher is not None and bool(run.settings["teacher_views"])


def pflop_so_far(run):
    """PFLOP spent before the next epoch: from the history or, before it, on --teacher-views; None if unknown."""
    if run.history:
        return run.history[-1].get("pflop")              # missing in runs older than this column
    asked = run.settings["teacher_views"] * len(run.train.chosen) if has_views(run) else 0
    return operations.step_pflop(0, asked, operations.macs_of(run.teacher, image_shape(run.kind))) if asked else 0.0


def count_operations(run, shown, images):
    """Add a step's PFLOP to the run's. shown, images: the batch at the network's and at the teacher's image size."""
    if run.pflop is None:
        return
    shape, asks = shown.shape[1:], run.teacher is not None and not has_views(run)
    if shape not in run.counted:
        run.counted[shape] = (operations.macs_of(run.model, shape),
                              operations.macs_of(run.teacher, images.shape[1:]) if asks else 0)
    macs, teacher_macs = run.counted[shape]
    run.pflop += operations.step_pflop(macs, len(shown) * parallel.ranks(), teacher_macs)


def networks_of(run):
    """The trained network and, if there is one, its weight average."""
    return [run.model] if run.average is None else [run.model, run.average]


def measure(run):
    """Validation loss and accuracy in %, with the averaged weights if there are any.

    The published run made four passes over data per epoch: training, then one
    each for training accuracy, validation loss and validation accuracy.
    """
    model = networks_of(run)[-1]
    with evaluation_weights(model, run.settings["weights"], run.settings["binary_scale"], run.masks):
        if run.settings["recipe"] == "published":
            evaluate(model, run.train, run.device, run.measuring_dtype)
            return tuple(evaluate(model, run.validation, run.device, run.measuring_dtype)[part] for part in (0, 1))
        return evaluate(model, run.validation, run.device, run.measuring_dtype)


def recalibrate(run, model):
    """Recompute batch norm's statistics of `model`, with its evaluation weights, on unaugmented training images."""
    with evaluation_weights(model, run.settings["weights"], run.settings["binary_scale"], run.masks):
        pruning.recalibrate(model, run.calibration)


def evaluate(model, batches, device, dtype=torch.float32):
    """Mean cross-entropy and accuracy in % over `batches`, each image counted once; dtype: see `predict`."""
    logits, labels = predict(model, batches, device, dtype)
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def predict(model, batches, device, dtype=torch.float32):
    """Return (logits, labels) of all images of `batches`, (N, K) float32 and (N,), computed in evaluation mode.

    The model's mode is restored. dtype: bfloat16 arithmetic, or with float32 that of the images' dtype.
    """
    results = []
    with in_mode(model):
        for images, labels in batches:
            with autocast(device, dtype):
                results.append((model(images.to(device)).float(), labels.to(device)))
    return torch.cat([logits for logits, _ in results]), torch.cat([labels for _, labels in results])


# ---- for the scripts that read a trained network

def find_checkpoint(given=None):
    """Path of the checkpoint: the given one (model.pt in a folder), else the newest run's, else the shipped one."""
    if given is not None:
        return checkpoint.find(given)
    try:
        return newest("model.pt")
    except FileNotFoundError:
        return SHIPPED


def main(argv):
    """Train one round, without pruning."""
    run = start(__file__, __doc__.splitlines()[0], SETTINGS, RECIPES, argv)
    if run is not None:
        with resumable(run):
            fit(run)
            finish(run)


if __name__ == "__main__":
    commandline.command(parallel.together(main))
