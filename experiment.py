"""A training run: set up from its flags, ready to train, saved to files and restored from them.

    run = start(__file__, "what the script does", table_of_settings, recipes, argv)
    ...                                        # train.fit and pruning change it
    save(run); finish(run)

`Run` holds everything that a checkpoint holds; `state_of` turns it into a checkpoint's
dictionary, `restore` does the reverse. The training loop is not here but in train.py (`fit`).
"""
import copy
import csv
import importlib
import inspect
import io
import json
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import cifar10
import filter_pruning
import networks
import pruning
import quantization
from engine import board, checkpoint, commandline, compiling, files, folders, parallel, run_files, schedules
from engine.averages import average_pairs
from engine.computing import choose_computing
from engine.endings import enough_memory, resumable
from engine.notes import note, refuse_changes, refuse_over, tell_changes
from engine.separable import use_separable
from engine.settings import alone, check, check_each, defaults_of, differing, flag_of, idle, only, to_resume
from engine.small_images import use_products
from networks import architecture_of, begin_bits, build, check_batch, image_shape, load_start, load_teacher
from set_distillation_train import share_of_teacher
from set_optimizer_train import make_optimizer, moved_by_muon, norms_of
from set_pruning_train import (
    as_joined,
    check_position,
    check_pruning,
    is_over,
    join_rounds,
    never_reduces,
    rate_of_round,
    removes_strong,
    start_search,
)
from set_quantization_train import after_step, evaluation_weights
from set_resizing_train import check_resize, share_of_work

# {name: module} of the files set_<name>_train.py; MIXING = "<name>" calls the function <name> of that module
TECHNIQUES = {path.stem[len("set_"):-len("_train")]: importlib.import_module(path.stem)
              for path in sorted(Path(__file__).resolve().parent.glob("set_*_train.py"))}
MIXINGS = {name: function for name, module in TECHNIQUES.items()
           if inspect.isfunction(function := getattr(module, name, None))}
TABLES = [networks.SETTINGS, schedules.SETTINGS,
          *(only("mixing", (name,), getattr(module, "SETTINGS", {})) if name in MIXINGS
            else getattr(module, "SETTINGS", {}) for name, module in TECHNIQUES.items())]


@dataclass
class Run:
    """A run in progress: everything that a checkpoint holds, with its device, data and output folder."""

    settings: dict
    out: Path
    device: torch.device
    architecture: dict
    model: torch.nn.Module
    generator: torch.Generator
    train: object
    validation: object
    calibration: object = None    # training images without augmentation, for batch norm's statistics
    masks: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    round: int = 0
    epoch: int = 0
    pflop: float = 0.0            # operations so far, see engine/operations.py; None for a run older than this count
    counted: dict = field(default_factory=dict)      # {shape: multiply-adds of one image}, for this epoch
    planned: int = 0              # training images of the run as it began; compiling and arithmetic depend on it
    average: torch.nn.Module = None
    averaged: tuple = None        # the tensors of average and model in pairs, see `average_pairs`
    masked: tuple = None          # masks and the tensors they apply to, see `masked_weights`
    optimizer: torch.optim.Optimizer = None
    finite_steps: torch.Tensor = None     # on CUDA: number of steps in this epoch before the first non-finite one
    schedule: object = None
    forward: object = None        # the model, or the model compiled
    dtype: torch.dtype = torch.float32    # arithmetic of forward and backward passes
    computed: str = None          # of a resumed run: the arithmetic it began with
    compiled: bool = None         # whether its training steps are compiled; of a resumed run, whether they were
    form: str = None              # how its grouped convolutions compute, see `compiling.compute_as`
    layout: torch.memory_format = torch.contiguous_format     # of images and weights in memory
    teacher: torch.nn.Module = None
    teacher_sha256: str = None
    pictures_sha256: str = None   # of the user's own pictures and their classes, in order; None for other data sets
    board: object = None          # TensorBoard's writer, created with the first row that is written
    search: dict = None           # what MorphNet's penalty needs, in a round that searches
    made: list = None             # folders created for it, removed if it fails before its first step; then None
    kind: object = None           # `cifar10.Kind` of its images when they were loaded

    def __post_init__(self):
        self.kind = self.kind or cifar10.kind_of(self.settings["dataset"])

    @property
    def arithmetic(self):
        """Data type of the forward and backward passes as text: "float32" or "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def measuring_dtype(self):
        """Data type of evaluation passes: float32 for quantized networks, where it keeps integer sums exact."""
        return torch.float32 if self.settings["weights"] == "lsq" else self.dtype


# ---- before the first step

def start(script, description, table, recipes, argv):
    """The run that flags and technique lines ask for, new or resumed; None after --dry-run.

    Flags override the recipe, the recipe overrides technique lines, and these override
    the defaults in `table` (see engine/settings.py); a resumed run keeps the settings it
    was started with. recipes: {name: settings}.
    """
    lines = commandline.lines_of(script, table)
    given, state = vars(commandline.training_parser(description, table).parse_args(argv)), None
    given |= {name: str(checkpoint.find(given[name])) for name in ("teacher", "start") if given.get(name)}
    if given.get("resume"):
        given["out"], state = folders.state_to_resume(given, Path(script).name)
        cycle = given.get("cycle") or state["settings"].get("cycle")
        if state["settings"].get("pruning") == "l1_cycle" and cycle and Path(cycle).exists():      # it may have changed
            given["cycle_settings"] = filter_pruning.read_given(cycle)
        settings = to_resume(table, state, lines, as_joined(table, state["settings"], given))
        if settings["tensorboard"] and not given.get("tensorboard"):      # its package may be gone
            with files.noted():
                settings["tensorboard"] = False
                board.check(True)
                settings["tensorboard"] = True
    else:
        settings = fresh_settings(script, table, lines, recipes, given)
    check_settings(table, settings)
    changed = differing(table, state["settings"], settings) if state is not None else {}
    if state is not None:
        check_position(settings, state)
        if is_over(settings, state):
            refuse_over(changed, settings["out"])
    parallel.refuse(settings["batch_size"], alone(table, settings))
    run = prepare(settings, state, bool(given.get("force")))
    tell_changes(changed, run.out)
    tell_idle(run, table, given)
    with resumable(run, ends=settings["dry_run"]), enough_memory(settings):
        announce(run)
    return None if settings["dry_run"] else run


def fresh_settings(script, table, lines, recipes, given):
    """The settings of a new run, before they are checked."""
    settings = {**defaults_of(table), **lines, **recipes.get(given.get("recipe"), {}), **given, "lines": lines,
                "script": Path(script).name}
    check_each(table, settings, ["epochs"])                  # `join_rounds` may add them up
    settings["sparsity"] = [pruning.check_sparsity(value) for value in settings["sparsity"]]
    settings["cycle_settings"] = filter_pruning.read_given(settings["cycle"] or {})
    if settings["pruning"] != "l1_cycle":      # --cycle has no effect then
        settings["cycle_settings"] = {}
    join_rounds(settings, "sparsity" in given)
    return settings


def tell_idle(run, table, given):
    """A note for each flag that changes nothing, because the technique it belongs to is off."""
    found = idle(table, run.settings, given)
    found += [f"{flag_of(name, given[name])} changes nothing: {run.settings['model']} has no {name}"
              for name in ("groups", "shuffle") if name in given and name not in run.architecture]
    whole = run.settings["teacher"] and run.settings["distillation_weight"] == 1
    unnormed = not norms_of(run.model), f"{run.settings['model']} has no batch norm"
    reasons = {        # (flag, value or None for any): (whether it changes nothing, why)
        ("recalibrate", True): unnormed,
        ("norm_weight_decay", None): unnormed,
        ("flips", "alternating"): (not run.kind.flip, f"images of {run.settings['dataset']} are not mirrored"),
        ("shuffle", False): (run.architecture.get("groups") == 1, "one group has nothing to interleave"),
        ("convolutions", "dense"): (not compiling.grouped_layers(run.model), "no convolution of floats has groups"),
        ("mix_alpha", None): (run.settings["mixing"] == "cutout" and run.settings["mix_alpha"] > 0,
                              "Cutout mixes no two images"),
        ("label_smoothing", None): (whole, "with --distillation-weight 1 the labels have no part in the loss"),
    }
    found += [f"{flag_of(name, given[name])} changes nothing: {why}" for (name, value), (off, why) in reasons.items()
              if off and name in given and value in (None, given[name])]
    parameters = sum(weight.numel() for weight in run.model.parameters())
    if not run.history:
        found += filter(None, (never_reduces(run.settings, parameters), removes_strong(run.settings)))
    for sentence in found:
        note(sentence)


def check_settings(table, settings):
    """ValueError for the first setting that its table refuses, or that contradicts another one of its technique."""
    check(table, settings)
    board.check(settings["tensorboard"])
    for module in TECHNIQUES.values():
        getattr(module, "check_settings", lambda settings: None)(settings)


def prepare(settings, state, forced=False):
    """A `Run` with its data loaded and its network built; checks all that can be checked before training.

    forced: --force is given now, not when the run began: it continues with pictures or a teacher that have changed.
    Writes nothing, but removes the partial files that a killed save left in the folder of a resumed run.
    """
    name = f"runs/{Path(settings['dataset']).resolve().name}-{settings['model']}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(parallel.agreed(settings["out"] or name))
    if state is None and parallel.leads():
        folders.refuse_used(out)
    settings["out"] = str(out)
    filter_pruning.check_files(settings, out, state is None)
    architecture, kind = architecture_of(settings), cifar10.kind_of(settings["dataset"])
    device = parallel.own_device(commandline.pick_device(settings["device"]), settings["device"])
    folders.refuse_other_kind(out, device, state)
    with parallel.leader_first():
        data = cifar10.load(settings["dataset"], settings["data"])
    pictures = None if settings["dataset"] in cifar10.KINDS else cifar10.sha256_of(data)
    if state is not None:
        refuse_changes(cifar10.changes(settings["dataset"], (state.get("kind"), state.get("pictures")),
                                       (kind, pictures)), forced, is_over(settings, state))
    if parallel.leads() and state is not None and not settings["dry_run"]:
        cifar10.check_folder(out)
        files.remove_partial(out)
    torch.manual_seed(settings["seed"])
    generator = torch.Generator(device).manual_seed(settings["seed"])
    train, validation, calibration = make_batches(data, kind, settings, device, generator)
    model = build(**quantization.without_bits(architecture)).to(device)
    start_from = run_files.start_of(settings)
    if state is None and start_from:
        start_from = checkpoint.find(start_from)
        load_start(model, architecture, start_from, settings["dataset"], kind, settings["force"])
        zeros = pruning.sparsity_of(model)
        if zeros > 0.005:
            note(f"{100 * zeros:.0f} % of the weights in {start_from} are zero; they train as the others do, until "
                 "this run prunes them")
    elif state is None and hasattr(model, "whiten"):
        model.whiten(torch.cat([images for images, _ in calibration]))
    check_resize(model, image_shape(kind), settings["resize"])
    if "bits" in architecture:
        begin_bits(model, architecture["bits"], calibration if state is None else None)
    run = Run(settings, out, device, architecture, model, generator, train, validation, calibration, kind=kind,
              forward=model, pictures_sha256=pictures)
    if settings["recipe"] != "published":       # which keeps torch's default layout
        run.layout = torch.channels_last
    if device.type != "cpu" or settings["recipe"] != "published":
        compiling.set_up(device)
    lay_out(run)
    if settings["teacher"] and settings["distillation_weight"] > 0:
        run.teacher = load_teacher(settings["teacher"], settings["dataset"], kind, device, settings["force"]).to(
            memory_format=run.layout)
        run.teacher_sha256 = files.sha256_of(settings["teacher"])
        began = (state or {}).get("teacher")              # absent in older runs
        if began not in (None, run.teacher_sha256):
            refuse_changes(f"the teacher in {settings['teacher']} is not the one that the run in {out} began with",
                           forced)
    if state is not None:
        restore(run, state)
    check_training(run)
    return run


def check_training(run):
    """ValueError where a training step, or the pruning after a round, would fail."""
    settings, shape = run.settings, image_shape(run.kind)
    sides = {settings["resize"] or shape[1], shape[1]}
    for side in sorted(sides):
        check_batch(run.model, settings["model"], settings["batch_size"], (shape[0], side, side))
    check_pruning(settings, run.model, run.masks, run.round, len(run.train), shape)


def lay_out(run):
    """Give the network of `run` and its average the run's memory layout and form; call it again when layers change.

    This may reallocate weights, even some in that layout already (1x1 filters of one input, whose layout is ambiguous).
    """
    for model in (run.model, run.average):
        if model is not None:
            use_products(compiling.lay_out(model, run.layout, run.form or "grouped"))
            use_separable(model)
    look_up(run)


def make_batches(data, kind, settings, device, generator):
    """Batches for training, for validation, and of 5,000 training images without augmentation, for batch norm.

    With --all-images the network also trains on the validation images, so its accuracy on them means nothing.
    The published recipe uses torchvision's transforms and a DataLoader for the first two.
    """
    train, validation = cifar10.split(data, limit=settings["limit"])
    calibration = cifar10.Batches(data.x_train, data.y_train, 500, kind, device, chosen=train[:5_000])
    if settings["all_images"]:
        train = np.concatenate([train, validation])
    if settings["recipe"] == "published":
        shuffled, plain, _ = cifar10.loaders(data, settings["dataset"], settings["batch_size"],
                                             limit=settings["limit"])
        return shuffled, plain, calibration
    return (cifar10.Batches(data.x_train, data.y_train, settings["batch_size"], kind, device, generator,
                            settings["pad"], train, {"alternating": True, "random": False}[settings["flips"]]),
            cifar10.Batches(data.x_train, data.y_train, 500, kind, device, chosen=validation), calibration)


def announce(run):
    """Compile where it pays, print what will run and for about how long, write config.json."""
    settings = run.settings
    height, width, channels = run.kind.shape
    shape = (settings["batch_size"], channels, height, width)
    images = len(run.train) * settings["batch_size"]
    done, whole = len(run.history), sum(settings["epochs"])
    # a resumed run keeps the number it began with: compiling and bfloat16, chosen by it, change the results
    run.planned = run.planned or whole * images
    alone = parallel.ranks() == 1
    speed, how = choose_computing(run, settings["compile"] if alone else "off", run.planned, shape, lay_out)
    if not alone:
        speed, how = speed * parallel.ranks(), f"eager, {parallel.ranks()} processes"
    work = share_of_work(height, settings["resize"], settings["resize_until"])
    taught, asked = share_of_teacher(run.teacher, run.model, image_shape(run.kind), settings["teacher_views"])
    seconds = ((whole - done) * ((work + taught) * images + 0.3 * measured_images(run))
               + asked * images * (not done)) / speed
    which = "the first round" if settings["pruning"] == "l1_cycle" and not run.round else "all rounds"
    groups = f", groups {run.architecture['groups']}" if "groups" in run.architecture else ""
    print(f"{settings['model']}{groups}, on {settings['dataset']}: {images:,} images an epoch, "
          f"{' + '.join(map(str, settings['epochs']))} epochs, {commandline.device_name(run.device)}, "
          f"{run.arithmetic}{', grouped convolutions as dense ones' if run.form == 'dense' else ''}; {how}")
    print(f"{f'goes on after {done} of {whole} epochs; ' if done else ''}"
          f"estimated time for {which}: {seconds / 60:.1f} min at {speed:.0f} images/s; writes {run.out}",
          flush=True)
    if settings["dry_run"]:
        print(json.dumps(settings, indent=1))
    elif parallel.leads():
        if run.optimizer is None:         # a new run
            run.made = folders.take(run.out)
        run_files.write_config(run, run_files.sources_of(Path(__file__).resolve().parent))


def measured_images(run):
    """Images that `run` evaluates in an epoch; with the published recipe all training images and validation twice."""
    count = len(run.validation.chosen if isinstance(run.validation, cifar10.Batches) else run.validation.dataset)
    return 2 * count + len(run.train.dataset) if run.settings["recipe"] == "published" else count


def begin_round(run, moved=None):
    """Give `run` a new optimizer, schedule and weight average for its round; moved: names of Muon's weights or None."""
    settings, steps = run.settings, run.settings["epochs"][run.round] * len(run.train)
    run.optimizer = make_optimizer(run.model, settings, moved)
    for group in run.optimizer.param_groups:
        group["share"] = rate_of_round(settings, run.round)
        group["lr"] *= group["share"]
    run.schedule = schedules.make_schedule(run.optimizer, settings["schedule"], steps, settings["peak"])
    height, width, channels = run.kind.shape
    run.search = start_search(settings, run.round, run.model, (channels, height, width))
    after_step(run.model, settings["weights"], settings["binary_scale"])      # binary training starts within [-H, H]
    run.average = {"ema": lambda: copy.deepcopy(run.model).eval(), "none": lambda: None}[settings["averaging"]]()
    look_up(run)
    run.finite_steps = torch.zeros((), dtype=torch.int64, device=run.device) if run.device.type == "cuda" else None


def look_up(run):
    """Look up the tensors that each step averages and masks; call it again when they were replaced, see `lay_out`."""
    run.averaged = average_pairs(run.average, run.model) if run.average is not None else None
    run.masked = None


def masked_weights(run):
    """(weights, masks as numbers): two lists, looked up again only when `run.masks` is another dictionary."""
    if run.masked is None or run.masked[0] is not run.masks:
        run.masked = run.masks, *pruning.mask_pairs(run.model, run.masks)
    return run.masked[1:]


# ---- files

def state_of(run):
    """Everything needed to resume `run` bit for bit, as plain types and tensors."""
    return {**checkpoint.network_of(run.model, run.architecture), "settings": run.settings,
            "kind": cifar10.plain(run.kind),
            "masks": run.masks, "round": run.round, "epoch": run.epoch, "planned": run.planned, "form": run.form,
            "arithmetic": run.arithmetic, "compiled": run.compiled,
            "device": run.device.type, "teacher": run.teacher_sha256, "pictures": run.pictures_sha256,
            "history": run.history,
            "average": checkpoint.weights_of(run.average) if run.average is not None else None,
            "optimizer": run.optimizer.state_dict(), "schedule": run.schedule.state_dict(),
            "random": {"generator": run.generator.get_state(), "torch": torch.get_rng_state()}}


def restore(run, state):
    """Restore a newly prepared run to a state from `state_of`."""
    try:
        checkpoint.load_weights(run.model, run.architecture, state)
    except ValueError as problem:
        raise ValueError(f"{problem}; a run's network stays, with --force too: start a new run with another --out, and "
                         "--start for its weights") from None
    run.round, run.epoch, run.history = state["round"], state["epoch"], state["history"]
    run.planned, run.form = state.get("planned", 0), state.get("form")
    run.computed, run.compiled = state.get("arithmetic"), state.get("compiled")
    run.masks = {name: mask.to(run.device) for name, mask in state["masks"].items()}
    lay_out(run)
    begin_round(run, moved_by_muon(state["optimizer"]))
    if run.average is not None and state["average"] is not None:
        run.average.load_state_dict(state["average"])
    schedules.restore(run, state)
    run.generator.set_state(state["random"]["generator"])
    torch.set_rng_state(state["random"]["torch"])


def save(run):
    """Write history.csv, then last.pt (the old one is kept as previous.pt), then TensorBoard's files.

    With several processes only rank 0 writes.
    """
    if not parallel.leads():
        return
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, dict.fromkeys(name for row in run.history for name in row))
    writer.writeheader()
    writer.writerows(run.history)
    files.write(run.out / "history.csv", table.getvalue().encode())
    checkpoint.save(run.out / "last.pt", state_of(run), run.out / "previous.pt")
    if run.settings["tensorboard"]:
        with files.noted():              # history.csv holds the same
            run.board = run.board or board.opened(run.out / "tensorboard", len(run.history))
            board.add(run.board, run.history[-1])


def finish(run):
    """Write the result, runs/<name>/model.pt: the weights and their architecture."""
    if not parallel.leads():
        return
    with evaluation_weights(run.model, run.settings["weights"], run.settings["binary_scale"], run.masks):
        network = checkpoint.network_of(run.model, run.architecture)
    for path in (run.out / "model.pt", run.settings["cycle_settings"].get("output_model_path")):
        if path:
            checkpoint.save(path, {**network, "dataset": run.settings["dataset"], "kind": cifar10.plain(run.kind),
                                   "epochs": len(run.history)})
    print(f"{run.out}/model.pt: {100 * pruning.sparsity_of(run.model):.2f} % zeros, validation accuracy "
          f"{run.history[-1]['validation_accuracy']:.2f} %; next: python test.py --checkpoint "
          f"{shlex.quote(f'{run.out}/model.pt')}")
