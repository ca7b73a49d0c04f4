"""Train one network on one data set: `python train.py --epochs 30`.

Edit a technique line below, or pass the flag of the same name. Writes
runs/<name>/ with config.json, history.csv, last.pt and model.pt; then
`python test.py` and `python profil.py`. The one training loop (`fit`) and the
one `evaluate` of the project live here; `train_pruning.py` adds the rounds.
"""
import copy
import csv
import json
import math
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import cifar10
import commandline
import compiling
import pruning
import resnet_factorized
from set_cutmix_train import cutmix

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
# MIXING = "none"
SCHEDULE = "one-cycle"        # up for a quarter, down to zero, arXiv:1708.07120
# SCHEDULE = "cosine"         # short warm-up, then half a cosine, arXiv:1608.03983
# SCHEDULE = "plateau"        # a tenth when the validation loss stalls
AVERAGING = "ema"             # exponential moving average of the weights
# AVERAGING = "none"

DEFAULTS = {
    "dataset": "cifar10", "data": "data", "epochs": [30], "sparsity": [], "minimum_density": 0.01,
    "batch_size": 64, "lr": 0.15, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
    "label_smoothing": 0.1, "mix_probability": 0.5, "mix_alpha": 1.0, "ema_decay": 0.998,
    "recipe": "ours", "compile": "auto", "device": "auto", "seed": 0, "limit": None,
    "out": None, "resume": False, "force": False, "dry_run": False, "debug": False,
}
PUBLISHED = {    # the run that this project started from; see measure() for its four passes an epoch
    "shuffle": False, "mixing": "cutmix", "mix_probability": 1.0, "schedule": "plateau", "averaging": "none",
    "batch_size": 32, "lr": 0.01, "momentum": 0.5, "nesterov": False, "weight_decay": 1e-5,
    "label_smoothing": 0.0, "compile": "off",
}
SHIPPED = Path(__file__).resolve().parent / "pretrained" / "resnet18_groups8_cifar10.pt.gz"


@dataclass
class Run:
    """A run in progress: everything that a checkpoint holds, and where it trains."""

    settings: dict
    out: Path
    device: torch.device
    architecture: dict
    model: torch.nn.Module
    generator: torch.Generator
    train: object
    validation: object
    masks: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    round: int = 0
    epoch: int = 0
    average: torch.nn.Module = None
    optimizer: torch.optim.Optimizer = None
    schedule: object = None
    forward: object = None        # the model, or the model compiled


# ---- starting, resuming, saving

def start(script, description, defaults, argv, more_flags=lambda parser: None):
    """The run that flags and technique lines ask for, fresh or resumed; None after --dry-run.

    Flags come over the recipe, the recipe over technique lines, lines over
    `defaults`, those over DEFAULTS; a resumed run keeps what it was started with.
    """
    lines, choices = commandline.read_lines(script)
    parser = commandline.training_parser(description, choices, list(cifar10.KINDS))
    more_flags(parser)
    given, state = vars(parser.parse_args(argv)), None
    if given.get("resume"):
        given["out"] = str(given.get("out") or newest("last.pt").parent)
        state = checkpoint.read(Path(given["out"]) / "last.pt")
        settings = commandline.settings_to_resume(state, lines, given)
    else:
        recipe = PUBLISHED if given.get("recipe") == "published" else {}
        settings = {**DEFAULTS, **defaults, **lines, **recipe, **given, "lines": lines}
    settings["sparsity"] = [pruning.check_sparsity(value) for value in settings["sparsity"]]
    commandline.check_settings(settings)
    run = prepare(settings, state)
    announce(run, script)
    return None if settings["dry_run"] else run


def newest(name, folder="runs"):
    """The newest runs/<run>/<name>; FileNotFoundError where there is none."""
    found = sorted(Path(folder).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"there is no {folder}/*/{name}; train first, or name one")
    return found[-1]


def prepare(settings, state):
    """A `Run` with its data loaded and its network built; folder and data are checked before any training."""
    out = Path(settings["out"] or f"runs/{settings['dataset']}-{settings['model']}-{time.strftime('%Y%m%d-%H%M%S')}")
    if state is None and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds another run; --resume continues it, another --out starts a new one")
    settings["out"] = str(out)
    device = commandline.pick_device(settings["device"])
    data, kind = cifar10.load(settings["dataset"], settings["data"]), cifar10.KINDS[settings["dataset"]]
    if not settings["dry_run"]:
        cifar10.check_folder(out)
        checkpoint.remove_partial(out)
    torch.manual_seed(settings["seed"])
    generator = torch.Generator(device).manual_seed(settings["seed"])
    train, validation = make_batches(data, kind, settings, device, generator)
    architecture = {"name": settings["model"], "groups": settings["groups"], "shuffle": settings["shuffle"],
                    "num_classes": len(kind.classes), "in_channels": kind.shape[-1]}
    model = resnet_factorized.build(**architecture).to(device)
    if device.type == "cpu":
        compiling.keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        model = model.to(memory_format=torch.channels_last)
    run = Run(settings, out, device, architecture, model, generator, train, validation, forward=model)
    if state is not None:
        restore(run, state)
    return run


def make_batches(data, kind, settings, device, generator):
    """Training and validation batches; the published recipe takes torchvision's transforms and a DataLoader."""
    if settings["recipe"] == "published":
        return cifar10.loaders(data, settings["dataset"], settings["batch_size"], limit=settings["limit"])[:2]
    train, validation = cifar10.split(data, limit=settings["limit"])
    return (cifar10.Batches(data.x_train, data.y_train, settings["batch_size"], kind, device, generator, chosen=train),
            cifar10.Batches(data.x_train, data.y_train, 500, kind, device, chosen=validation))


def state_of(run):
    """Everything that continues `run` bit for bit, as plain types and tensors."""
    return {**checkpoint.network_of(run.model, run.architecture), "settings": run.settings,
            "masks": run.masks, "round": run.round, "epoch": run.epoch, "history": run.history,
            "average": checkpoint.weights_of(run.average) if run.average else None,
            "optimizer": run.optimizer.state_dict(), "schedule": run.schedule.state_dict(),
            "random": {"generator": run.generator.get_state(), "torch": torch.get_rng_state()}}


def restore(run, state):
    """Put a state of `state_of` back into a freshly prepared run."""
    checkpoint.load_weights(run.model, run.architecture, state)
    run.round, run.epoch, run.history = state["round"], state["epoch"], state["history"]
    run.masks = {name: mask.to(run.device) for name, mask in state["masks"].items()}
    begin_round(run)
    if run.average:
        run.average.load_state_dict(state["average"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    run.generator.set_state(state["random"]["generator"])
    torch.set_rng_state(state["random"]["torch"])


def save(run):
    """history.csv, then last.pt with the one before it kept as previous.pt."""
    with open(run.out / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, run.history[0])
        writer.writeheader()
        writer.writerows(run.history)
    checkpoint.save(run.out / "last.pt", state_of(run), run.out / "previous.pt")


def finish(run):
    """Write the result, runs/<name>/model.pt: the weights with their architecture."""
    network = checkpoint.network_of(run.model, run.architecture)
    checkpoint.save(run.out / "model.pt", {**network, "dataset": run.settings["dataset"]})
    print(f"{run.out}/model.pt: {100 * pruning.sparsity_of(run.model):.2f} % zeros, validation accuracy "
          f"{run.history[-1]['validation_accuracy']:.2f} %; next: python test.py --checkpoint {run.out}/model.pt")


# ---- the loop

def fit(run):
    """Train the current round to its end, from wherever `run` stands; a checkpoint at each epoch's end.

    Raises RuntimeError for a loss or gradient that is not finite (no update, no
    save) and for memory that runs out; KeyboardInterrupt says how to resume.
    """
    from tqdm import tqdm
    if run.optimizer is None:
        begin_round(run)
    epochs = run.settings["epochs"][run.round]
    images = len(run.train) * run.settings["batch_size"]
    try:
        with tqdm(total=epochs * images, initial=run.epoch * images, unit="image", unit_scale=True,
                  desc=f"round {run.round + 1}", disable=not sys.stderr.isatty()) as bar:
            while run.epoch < epochs:
                row = run_epoch(run, bar)
                if bar.disable:
                    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint(run)) from None
    except RuntimeError as problem:
        if "out of memory" in str(problem) or "can't allocate memory" in str(problem):
            raise RuntimeError(f"out of memory with --batch-size {run.settings['batch_size']}; "
                               f"try {max(1, run.settings['batch_size'] // 2)}") from None
        raise
    if run.average:
        run.model.load_state_dict(run.average.state_dict())


def begin_round(run):
    """A fresh optimizer, schedule and weight average for the round that `run` stands at."""
    settings, steps = run.settings, run.settings["epochs"][run.round] * len(run.train)
    run.optimizer = torch.optim.SGD(run.model.parameters(), settings["lr"], settings["momentum"],
                                    weight_decay=settings["weight_decay"], nesterov=settings["nesterov"])
    if settings["schedule"] == "plateau":
        run.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer)
    else:
        shape = one_cycle if settings["schedule"] == "one-cycle" else warm_cosine
        run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: shape(step / steps))
    run.average = copy.deepcopy(run.model).eval() if settings["averaging"] == "ema" else None


def one_cycle(progress, peak=0.25):
    """Share of the largest learning rate after `progress` in [0, 1] of a round: up to `peak`, down to zero, linear."""
    return min((progress + 1e-3) / peak, (1 - progress) / (1 - peak), 1.0)


def warm_cosine(progress, warm=0.05):
    """The same for a linear warm-up followed by half a cosine."""
    return min((progress + 1e-3) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - warm) / (1 - warm)))


def run_epoch(run, bar):
    """One epoch: train, validate, record, save. Returns the row of history.csv."""
    begun, rate = time.perf_counter(), run.optimizer.param_groups[0]["lr"]
    loss, accuracy = train_epoch(run, bar)
    trained = time.perf_counter() - begun
    validation_loss, validation_accuracy = measure(run)
    if run.settings["schedule"] == "plateau":
        run.schedule.step(validation_loss)
    run.epoch += 1
    row = {"round": run.round + 1, "epoch": len(run.history) + 1, "lr": round(rate, 6),
           "train_loss": round(loss, 4), "train_accuracy": round(accuracy, 2),
           "validation_loss": round(validation_loss, 4), "validation_accuracy": round(validation_accuracy, 2),
           "sparsity": round(pruning.sparsity_of(run.model), 5),
           "images_per_second": round(len(run.train) * run.settings["batch_size"] / trained, 1),
           "seconds": round(time.perf_counter() - begun, 1)}
    run.history.append(row)
    save(run)
    return row


def train_epoch(run, bar):
    """All training batches once. Returns mean loss and accuracy in % under augmentation and mixing."""
    run.model.train()
    totals, seen = torch.zeros(2, device=run.device), 0
    for step, (images, labels) in enumerate(run.train):
        images, labels = images.to(run.device), labels.to(run.device)
        if run.device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        loss, correct = train_step(run, images, labels, step)
        totals += torch.stack([loss * len(images), correct])
        seen += len(images)
        bar.update(len(images))
        if not bar.disable and step % 20 == 0:
            bar.set_postfix(loss=f"{totals[0] / seen:.3f}", accuracy=f"{100 * totals[1] / seen:.1f}", refresh=False)
    loss, correct = (totals / seen).tolist()
    return loss, 100 * correct


def train_step(run, images, labels, step):
    """Mix, forward, backward, update, mask, average. Returns the loss and the number of right answers, on device."""
    settings = run.settings
    targets = F.one_hot(labels, run.architecture["num_classes"]).to(images.dtype)
    if settings["mixing"] == "cutmix":
        images, targets = cutmix(images, targets, run.generator, settings["mix_alpha"], settings["mix_probability"])
    with autocast(run.device):
        logits = run.forward(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings["label_smoothing"])
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    pruning.mask_gradients(run.model, run.masks)
    refuse_nonfinite(run, loss, step)
    run.optimizer.step()
    pruning.apply_masks(run.model, run.masks)
    if settings["schedule"] != "plateau":
        run.schedule.step()
    if run.average:
        update_average(run.average, run.model, settings["ema_decay"], run.epoch * len(run.train) + step)
    return loss.detach(), (logits.argmax(1) == targets.argmax(1)).sum().float()


def autocast(device, enabled=True):
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and device.type == "cuda")


def refuse_nonfinite(run, loss, step):
    """RuntimeError before the update where the loss or a gradient is NaN or infinite."""
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    if not torch.isfinite(loss + torch.nn.utils.get_total_norm(gradients)):
        last = run.out / "last.pt"
        raise RuntimeError(f"loss {loss.item():.3g} or its gradient is not finite: epoch {len(run.history) + 1}, "
                           f"step {step + 1}, learning rate {run.optimizer.param_groups[0]['lr']:.4g}; last good "
                           f"checkpoint: {last if last.exists() else 'none yet'}; try a smaller --lr")


@torch.no_grad()
def update_average(average, model, decay, step):
    """average <- d average + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)); integers are copied."""
    old, new = average.state_dict().values(), model.state_dict().values()
    floats = [(a, b) for a, b in zip(old, new, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - min(decay, (1 + step) / (10 + step)))
    for a, b in zip(old, new, strict=True):
        if not a.is_floating_point():
            a.copy_(b)


def measure(run):
    """Validation loss and accuracy in %, of the averaged weights where there are some.

    The published run took four passes over data an epoch: it trained, then
    measured training accuracy, loss and accuracy, each in a pass of its own.
    """
    if run.settings["recipe"] == "published":
        evaluate(run.model, run.train, run.device)
        return evaluate(run.model, run.validation, run.device)[0], evaluate(run.model, run.validation, run.device)[1]
    return evaluate(run.average or run.model, run.validation, run.device)


def evaluate(model, batches, device):
    """Mean cross-entropy and accuracy in % over `batches`, each image counted once."""
    logits, labels = predict(model, batches, device)
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def predict(model, batches, device, mixed=True):
    """(logits, labels) of all images of `batches`, (N, K) float and (N,), in evaluation mode, which is undone.

    mixed: autocast where the device trains with it; without, arithmetic is in the images' own precision.
    """
    training = model.training
    model.eval()
    try:
        results = []
        for images, labels in batches:
            with autocast(device, mixed):
                results.append((model(images.to(device)).float(), labels.to(device)))
        return torch.cat([logits for logits, _ in results]), torch.cat([labels for _, labels in results])
    finally:
        model.train(training)


# ---- before the first step

def announce(run, script):
    """Compile where it pays, say what will run and for about how long, write config.json."""
    settings = run.settings
    height, width, channels = cifar10.KINDS[settings["dataset"]].shape
    images = len(run.train) * settings["batch_size"]
    run.forward, speed, note = compiling.choose_forward(
        run.model, settings["compile"], sum(settings["epochs"]) * images,
        (settings["batch_size"], channels, height, width), autocast(run.device), run.device)
    seconds = sum(settings["epochs"]) * (images + 0.3 * len(run.validation) * 500) / speed
    print(f"{settings['model']}, groups {settings['groups']}, on {settings['dataset']}: {images:,} images an epoch, "
          f"{' + '.join(map(str, settings['epochs']))} epochs, {commandline.device_name(run.device)}; {note}")
    print(f"estimated time for all rounds: {seconds / 60:.1f} min at {speed:.0f} images/s; writes {run.out}",
          flush=True)
    if settings["dry_run"]:
        print(json.dumps(settings, indent=1))
    else:
        write_config(run, script)


def write_config(run, script):
    """config.json: the resolved settings, the sources, the versions, the device."""
    here = Path(__file__).resolve().parent
    config = {"script": Path(script).name, "settings": run.settings, "architecture": run.architecture,
              "device": commandline.device_name(run.device), "started": time.strftime("%Y-%m-%d %H:%M:%S"),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
              "source": {path.name: path.read_text() for path in sorted(here.glob("*.py"))}}
    (run.out / "config.json").write_text(json.dumps(config, indent=1))


def hint(run):
    """What to type to go on with an interrupted run."""
    if not (run.out / "last.pt").exists():
        return "nothing was saved before the first epoch's end"
    script = "train_pruning.py" if run.settings["sparsity"] else "train.py"
    return (f"{run.out}/last.pt holds {len(run.history)} whole epochs, go on with: "
            f"python {script} --resume --out {run.out}")


# ---- for the scripts that read a trained network

def load_network(path, device="cpu"):
    """(model in evaluation mode, the checkpoint's dictionary); the structure is read from the file."""
    state = checkpoint.read(path)
    if not isinstance(state.get("architecture"), dict) or not isinstance(state.get("weights"), dict):
        raise ValueError(f"{path} holds no network: architecture or weights are missing")
    model = resnet_factorized.build(**state["architecture"])
    checkpoint.load_weights(model, state["architecture"], state)
    return model.eval().to(device), state


def find_checkpoint(given=None):
    """The checkpoint to read: the one given, else the newest run's model.pt, else the model that ships."""
    if given:
        return Path(given)
    try:
        return newest("model.pt")
    except FileNotFoundError:
        return SHIPPED


def main(argv):
    """One round, no pruning."""
    run = start(__file__, __doc__.splitlines()[0], {}, argv)
    if run is None:
        return
    if len(run.settings["epochs"]) != 1:
        raise ValueError("train.py trains one round: give --epochs one number; train_pruning.py takes several")
    fit(run)
    finish(run)


if __name__ == "__main__":
    commandline.command(main)
