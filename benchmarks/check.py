"""Check that every technique runs on a GPU, and find what is slow: `python benchmark.py check`.

Each technique is tested by a whole run on digits, two rounds of three steps: trained,
pruned, evaluated, saved. Then a step is timed, and it is counted how often the host waits
for the GPU in a step; with default settings it never waits. One run is resumed and must
end with the same bits. Last, the convolutions of each stage are timed in every form, memory
layout and choice of kernels; training uses grouped, channels_last, not benchmarked. Needs
no data set. Exit code 1 if something fails.
"""
import contextlib
import io
import json
import shlex
import shutil
import tempfile
import warnings
from itertools import product
from pathlib import Path

import torch
from torch import nn

import experiment
import pruning
import set_pruning_train
import train
import train_pruning
from engine import checkpoint, commandline, compiling, computing, files, run_files

COMMON = "--dataset digits --limit 192 --batch-size 64 --epochs 1 1 --compile off"
PRUNED = "--sparsity 0.5"
TECHNIQUES = {    # flags of train_pruning.py; {folder} holds cycle.json and the run of the first technique
    "rounds": PRUNED,
    "dense form": f"{PRUNED} --convolutions dense",
    "mixup, one draw an image": f"{PRUNED} --mixing mixup --mix-alpha 0.4 --mix-per-sample",
    "cutout, alternating flips, cosine": f"{PRUNED} --mixing cutout --flips alternating --schedule cosine",
    "Muon": f"{PRUNED} --optimizer muon",
    "smaller images, recalibrated": f"{PRUNED} --resize 20 --recalibrate",
    "a teacher": f"{PRUNED} --teacher {{folder}}/rounds/model.pt",
    "polynomial, LAMP": f"{PRUNED} --pruning polynomial --epochs 2 --score lamp --prune-frequency 1",
    "constant, no average": f"{PRUNED} --pruning constant --epochs 2 --averaging none --prune-frequency 1",
    "filters": "--pruning filters --epochs 2 --filter-threshold 0.9 --filter-interval 1 --filter-stop 1",
    "L1 cycle": "--pruning l1_cycle --cycle {folder}/cycle.json",
    "MorphNet": "--pruning morphnet --epochs 1 1 1",
    "binary": f"{PRUNED} --weights binary",
    "binary, drawn": f"{PRUNED} --weights binary-stochastic",
    "few bits": f"{PRUNED} --weights lsq",
    "ResNet-20, shortcut A": f"{PRUNED} --model resnet20 --shortcut A",
    "MobileNet": f"{PRUNED} --model mobilenet",
    "wide, float32": f"{PRUNED} --model wrn-10-2 --arithmetic float32",
    "LeNet, plateau": f"{PRUNED} --model lenet5 --schedule plateau",
    "published": f"{PRUNED} --recipe published",
    "compiled": f"{PRUNED} --model resnet8-16-32-64 --compile on",
}
CYCLE = {"finetuning_epochs": 1, "stop_loss": 1e9, "pruning_percent_step": 0.9, "layers": ["layer1.0.conv1"]}
STAGES, GROUPS, BATCHES = ((64, 32), (128, 16), (256, 8), (512, 4)), 8, (64, 512)      # channels and side of ResNet-18
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


# ---- techniques

def check_technique(name, folder, device):
    """A row of the table: milliseconds and waits of a step, or the reason as `failed`; the run is in folder/<name>."""
    flags = [*shlex.split(COMMON), *shlex.split(TECHNIQUES[name].format(folder=folder)), "--device", str(device)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train_pruning.main([*flags, "--out", str(folder / name)])
            run = experiment.start(train_pruning.__file__, "", train_pruning.SETTINGS, train.RECIPES,
                                   [*flags, "--out", str(folder / f"{name}, its steps")])
            return {"technique": name, **time_step(run)}
    except Exception as problem:          # kernels and compilers raise many types; the other techniques follow
        return {"technique": name, "failed": (str(problem).strip() or type(problem).__name__).splitlines()[0]}


def time_step(run):
    """Milliseconds of a training step, the mean of three after two warm-up steps, and the waits in the second one."""
    experiment.begin_round(run)
    if run.settings["pruning"] not in set_pruning_train.SHRINKING:
        run.masks = pruning.global_masks(run.model, 0.5)
    run.model.train()
    batch = train.as_step_takes(run, *next(iter(run.train)))

    def step(_=None):
        train.train_step(run, *batch, 0)
    step()
    waits = count_waits(step, run.device)
    return {"milliseconds": 1000 * compiling.time_calls(step, None, 3, run.device) / 3, "waits": waits}


def count_waits(act, device):
    """How often the host waits for the GPU while it runs `act()`; 0 on a CPU."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in told)


def check_resume(whole, folder):
    """RuntimeError unless the run in `whole`, resumed in `folder` after its first epoch, ends with the same bits."""
    folder.mkdir()
    shutil.copy(whole / "previous.pt", folder / "last.pt")
    with contextlib.redirect_stdout(io.StringIO()):
        train_pruning.main(["--resume", "--out", str(folder)])
    one, two = (checkpoint.read(each / "model.pt")["weights"] for each in (whole, folder))
    wrong = [name for name in one if not torch.equal(one[name], two[name])]
    if wrong:
        raise RuntimeError(f"a resumed run differs in {len(wrong)} of {len(one)} tensors, the first is {wrong[0]}")


# ---- convolutions

def time_convolutions(device, dtype=torch.bfloat16):
    """Rows of {channels, side, batch, times}; times: {way: milliseconds of one 3x3 layer, forward and backward}."""
    searched, rows = (False, True) if device.type == "cuda" else (False,), []
    for (channels, side), batch in product(STAGES, BATCHES):
        times = {}
        for form, layout, search in product(("grouped", "dense"), LAYOUTS, searched):
            with torch.backends.cudnn.flags(enabled=True, benchmark=search, deterministic=True, allow_tf32=False):
                way = f"{form} {layout}{' benchmarked' if search else ''}"
                times[way] = time_convolution(channels, side, batch, form, LAYOUTS[layout], device, dtype)
        rows.append({"channels": channels, "side": side, "batch": batch, "times": times})
    return rows


def time_convolution(channels, side, batch, form, layout, device, dtype):
    """Milliseconds of a forward and backward pass of one layer with `GROUPS` groups, the fastest of three repeats."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=GROUPS, bias=False).to(device)
    compiling.lay_out(nn.Sequential(layer), layout, form)
    images = torch.randn(batch, channels, side, side, device=device).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(images.shape, device=device).to(dtype).contiguous(memory_format=layout)

    def both(images):
        with computing.autocast(device, dtype):
            outputs = layer(images)
        torch.autograd.grad(outputs, (images, layer.weight), upstream)
    return 1000 * min(compiling.time_repeats(both, images, 3, 0.02, device)[1])


# ---- the output

def print_techniques(rows):
    """Print the table: failed techniques first, then the others by time, slowest first."""
    print(f"\n{'technique':36}{'ms a step':>10}{'waits':>7}")
    for row in sorted(rows, key=lambda row: -row.get("milliseconds", float("inf"))):
        told = f"  failed: {row['failed']}" if "failed" in row else f"{row['milliseconds']:10.2f}{row['waits']:7}"
        print(f"{row['technique']:36}{told}")


def print_convolutions(rows):
    """Print a line per stage and batch: the time of the form used in training, and which form would be faster."""
    print("\na 3x3 convolution, forward and backward")
    for row in rows:
        (taken, usual), best = next(iter(row["times"].items())), min(row["times"], key=row["times"].get)
        faster = f"{usual / row['times'][best]:.1f} times as long as {best}" if best != taken else "the fastest way"
        print(f"{row['channels']:4} channels, {row['side']:2} x {row['side']:<2}, batch {row['batch']:3}: "
              f"{usual:8.3f} ms {taken}, {faster}")


def parse(argv):
    """The flags of this benchmark."""
    parser = commandline.Parser(prog="benchmark.py check", description=__doc__.splitlines()[0])
    parser.add_argument("--techniques", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES), metavar="NAME",
                        help=f"only these, of {', '.join(TECHNIQUES)}")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the check itself (cuda)")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv):
    """Run, resume, time, print, write."""
    arguments = parse(argv)
    if arguments.json:
        run_files.check_target(arguments.json)
    device = commandline.pick_device(arguments.device)
    compiling.set_up(device)
    names, rows = list(dict.fromkeys(["rounds", *arguments.techniques])), []
    print(f"{commandline.device_name(device)}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        files.write(folder / "cycle.json", json.dumps(CYCLE).encode())
        for name in names:
            rows.append(check_technique(name, folder, device))
            print(f"{name}: {rows[-1].get('failed', 'runs')}", flush=True)
        if "failed" not in rows[0]:
            try:
                check_resume(folder / "rounds", folder / "resumed")
            except RuntimeError as problem:
                rows.append({"technique": "resuming", "failed": str(problem)})
    convolutions = time_convolutions(device)
    print_techniques(rows)
    print_convolutions(convolutions)
    if arguments.json:
        files.write(Path(arguments.json), (json.dumps({
            "device": commandline.device_name(device), "torch": torch.__version__, "techniques": rows,
            "convolutions": convolutions}, indent=1) + "\n").encode())
    failed = [row for row in rows if "failed" in row]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(rows)} fail on {device}; {failed[0]['technique']}: "
                           f"{failed[0]['failed']}")
