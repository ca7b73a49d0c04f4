"""What every script shares on its command line: technique lines, flags, settings, one-line errors.

A training script opens with a block of technique lines. A line is a default and
the flag of the same name overrides it, so both mean the same.
"""
import argparse
import ast
import io
import math
import shlex
import signal
import subprocess
import sys
import tokenize
import traceback
import warnings
from pathlib import Path

import torch

from engine import streams

FREE = {"data", "device", "out", "resume", "force", "dry_run", "debug"}       # may differ on resuming
FIXED = ("seed", "start", "cycle", "recipe", "optimizer", "bias_lr", "teacher_views",
         "all_images")       # not even --force changes them afterwards
# of runs that are older than these settings
BEFORE = {"optimizer": "sgd", "flips": "random", "bias_lr": 1.0, "all_images": False}
GRADUAL = ("polynomial", "constant")      # weights pruned while training, by a schedule; otherwise between rounds
SHRINKING = ("filters", "l1_cycle", "morphnet")       # whole channels leave the network
BOUNDS = {"pad": (0, 16), "batch_size": (1, math.inf), "limit": (2, math.inf), "lr": (1e-12, math.inf),
          "momentum": (0, 1), "weight_decay": (0, math.inf), "label_smoothing": (0, 1), "mix_probability": (0, 1),
          "mix_alpha": (0, math.inf), "temperature": (1e-3, 1e3), "distillation_weight": (0, 1),
          "ema_decay": (0, 1), "minimum_density": (0, 1), "prune_begin": (0, 1), "prune_end": (0, 1),
          "prune_frequency": (1, math.inf), "filter_threshold": (0, math.inf), "filter_interval": (1, math.inf),
          "morph_strength": (0, math.inf), "morph_threshold": (0, math.inf), "morph_budget": (1e-6, math.inf),
          "morph_round_to": (1, math.inf), "filter_stop": (0, 1), "stop_loss": (0, math.inf), "seed": (0, 2**63 - 1),
          "teacher_views": (1, 1000), "bias_lr": (1e-6, math.inf), "muon_lr": (1e-12, math.inf),
          "muon_momentum": (0, 1), "muon_decay": (0, math.inf), "peak": (0, 0.99),
          "weight_bits": (1, 8), "activation_bits": (1, 8), "resize_until": (0, 1)}


# ---- technique lines

GROUPS = {"model": str, "groups": int, "shuffle": (True, False), "mixing": ("cutmix", "mixup", "cutout", "none"),
          "weights": ("float", "binary", "binary-stochastic", "lsq"),
          "pruning": ("rounds", "polynomial", "constant", "filters", "l1_cycle", "morphnet"),
          "score": ("l1", "lamp"), "schedule": ("one-cycle", "cosine", "plateau"), "averaging": ("ema", "none"),
          "optimizer": ("sgd", "muon"), "flips": ("random", "alternating")}
CHOICES = {**GROUPS, "recipe": ("ours", "published"), "binary_scale": ("one", "glorot"),
           "compile": ("auto", "on", "off"), "arithmetic": ("auto", "float32", "bfloat16"),
           "convolutions": ("auto", "grouped", "dense")}
ARITHMETIC = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Not,
              ast.USub, ast.UAdd)


def read_lines(path):
    """({group: value} of the active technique lines of a script, {group: [values]} of all its lines).

    The block goes from the comment `# ---- techniques` to the next `# ----`; within it
    stand GROUP = value, such lines as comments, other comments, and blank lines.
    ValueError with the group and its choices unless exactly one line of each group
    is active and has a value of the group.
    """
    name, active, choices = Path(path).name, {}, {}
    for number, group, value, is_active in technique_lines(path):
        if group.lower() not in GROUPS:
            if is_active:
                raise ValueError(f"{name}, line {number}: no group is called {group}; there are "
                                 f"{', '.join(known.upper() for known in GROUPS)}")
            continue
        choices.setdefault(group, []).append(value)
        active.setdefault(group, []).extend([(number, value)] * is_active)
    for group, found in active.items():
        if len(found) != 1:
            raise ValueError(f"{name} has {len(found)} active {group} lines; leave one of "
                             f"{', '.join(map(repr, choices[group]))} without its #")
        check_choice(group.lower(), found[0][1], f"{name}, line {found[0][0]}: {group} = {found[0][1]!r}")
    return {group.lower(): found[0][1] for group, found in active.items()}, choices


def technique_lines(path):
    """[(line number, group, value, whether it is active)] of the block, in order; ValueError for another statement."""
    name = Path(path).name
    try:
        with tokenize.open(path) as file:
            text = file.read()
        statements = ast.parse(text).body
    except (SyntaxError, ValueError) as problem:          # UnicodeDecodeError is a ValueError
        where = f", line {problem.lineno}" if getattr(problem, "lineno", None) else ""
        raise ValueError(f"{name}{where}: Python cannot read it: {getattr(problem, 'msg', problem)}") from None
    comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")}
    heads = [number for number, comment in comments.items() if comment.startswith("# ----")]
    first = next((number for number in heads if comments[number].startswith("# ---- techniques")), None)
    if first is None:
        raise ValueError(f"{name} has no line that starts with '# ---- techniques', above its technique lines")
    last = next((number for number in heads if number > first), math.inf)
    found = [(node.lineno, *read_line(node, f"{name}, line {node.lineno}"), True) for node in statements
             if first < node.lineno < last]
    for number, comment in comments.items():
        if first < number < last:
            found += commented_line(number, comment)
    return sorted(found, key=lambda line: line[0])


def commented_line(number, comment):
    """[(line number, group, value, False)] of a comment that is a technique line, [] of any other comment."""
    try:
        (node,) = ast.parse(comment.lstrip("# \t")).body
        return [(number, *read_line(node, ""), False)]
    except (SyntaxError, ValueError):
        return []


def read_line(node, where):
    """(group, value) of one statement; ValueError that begins with `where` unless it reads GROUP = value."""
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id.isupper()):
        raise ValueError(f"{where}: {shortened(ast.unparse(node))} is no technique line; one reads GROUP = value, "
                         "and the block ends at the next line that starts with '# ----'")
    group, parts = node.targets[0].id, list(ast.walk(node.value))
    words = [part.id for part in parts if isinstance(part, ast.Name)]
    try:
        if not all(isinstance(part, ARITHMETIC) for part in parts):
            raise ValueError(f"write {words[0]!r} with quotation marks, or True or False with a capital" if words
                             else "it must be a text, a whole number, True or False")
        return group, eval(compile(ast.Expression(node.value), group, "eval"), {"__builtins__": {}})
    except (ArithmeticError, MemoryError, TypeError, ValueError) as problem:
        raise ValueError(f"{where}: {group} = {shortened(ast.unparse(node.value))}: {problem}") from None


def shortened(text, length=60):
    """A text on one line, cut where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + "..."


def check_choice(name, value, told):
    """ValueError that begins with `told` unless `value` is one of what the setting `name` may be."""
    choices = CHOICES[name]
    if choices is int and type(value) is not int:        # which ones, the network says
        raise ValueError(f"{told}: it must be a whole number, such as 8")
    if choices is str and type(value) is not str:
        raise ValueError(f"{told}: it must be a name in quotation marks")
    if isinstance(choices, tuple) and not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{told} is unknown; choose from {', '.join(map(repr, choices))}")


# ---- flags and settings

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, raised as ValueError."""

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def training_parser(description, choices, datasets):
    """The flags of a training script; one that is not given is absent from the result."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    for group in choices:
        known = CHOICES[group.lower()]
        form = {"choices": known} if isinstance(known, tuple) else {"type": known}
        if known is str:                  # networks.py knows them all, with families that no line can list
            form = {"metavar": "NETWORK"}
        if known == (True, False):
            form = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + group.lower(), help="overrides the technique line", **form)
    parser.add_argument("--dataset", help=datasets)
    parser.add_argument("--data", help="folder of the data set's files (data)")
    parser.add_argument("--epochs", type=int, nargs="+", help="of each round")
    parser.add_argument("--recipe", choices=["ours", "published"], help="published: as the original run trained")
    for name, what in (("batch-size", "images a step"), ("limit", "at most so many images in each split"),
                       ("pad", "pixels by which a crop may be off (4)"),
                       ("seed", "of weights, shuffling, augmentation and mixing")):
        parser.add_argument("--" + name, type=int, help=what)
    for name in ("lr", "momentum", "weight-decay", "label-smoothing", "mix-probability", "mix-alpha", "ema-decay"):
        parser.add_argument("--" + name, type=float)
    for name, what in (("bias-lr", "learning rate of biases, as a multiple of --lr (1)"),
                       ("muon-lr", "of the filters (0.02)"), ("muon-momentum", "of the filters (0.9)"),
                       ("muon-decay", "weight decay of the filters, times their rate (0.1)"),
                       ("peak", "share of a round at which the rate is highest (0.25 of one-cycle, 0.05 of cosine)")):
        parser.add_argument("--" + name, type=float, help=what)
    parser.add_argument("--keep-norm", action=argparse.BooleanOptionalAction,
                        help="Muon: each filter bank keeps one norm, in place of weight decay (no)")
    parser.add_argument("--all-images", action="store_true",
                        help="train on the validation images too, to compare with those who do")
    parser.add_argument("--mix-per-sample", action="store_true", help="each image is mixed with its own draw")
    parser.add_argument("--recalibrate", action="store_true",
                        help="recompute batch norm's statistics on training images after pruning and each round")
    for name, what in (("activation", "of the small networks: relu, gelu, tanh, ..."),
                       ("pooling", "of LeNet-5: max or average"),
                       ("shortcut", "of ResNet-20 to 110: A (pad) or B (1x1 convolution)")):
        parser.add_argument("--" + name, help=what)
    parser.add_argument("--binary-scale", choices=["one", "glorot"], help="H of binary weights (glorot)")
    for name, default in (("weight", 2), ("activation", 4)):
        parser.add_argument(f"--{name}-bits", type=int,
                            help=f"of {name}s with --weights lsq, 1 to 8, first and last layer apart ({default})")
    parser.add_argument("--layer-bits", nargs="+", metavar="LAYER=W/A",
                        help="of single layers (the first convolution and the last linear layer 8/8)")
    parser.add_argument("--resize", type=int, metavar="PIXELS",
                        help="side of the training images at the start of each round, smaller for speed")
    parser.add_argument("--resize-until", type=float, help="share of a round after which images are whole (0.5)")
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="auto: where it pays and a compiler is there")
    parser.add_argument("--arithmetic", choices=["auto", "float32", "bfloat16"],
                        help="of training; auto: bfloat16 on CUDA and where a CPU has instructions for it")
    parser.add_argument("--convolutions", choices=["auto", "grouped", "dense"],
                        help="how grouped ones compute: as such, or dense with zeros; auto: the faster one on CUDA")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--teacher", metavar="CHECKPOINT", help="learn from this network too (distillation)")
    parser.add_argument("--teacher-views", type=int, metavar="N",
                        help="ask the teacher once, about N crops and mirrorings of each training image")
    parser.add_argument("--temperature", type=float, help="of the distillation (4)")
    parser.add_argument("--distillation-weight", type=float, help="of the teacher's part in the loss (0.9)")
    parser.add_argument("--start", metavar="CHECKPOINT", help="begin with the weights of this checkpoint")
    parser.add_argument("--out", help="folder of the run (runs/<data set>-<model>-<time>)")
    for name, what in (("resume", "continue the run in --out, or the newest one"),
                       ("force", "resume although settings differ; take a teacher or --start of another data set"),
                       ("dry-run", "show settings and estimated time, then stop"), ("debug", "show tracebacks")):
        parser.add_argument("--" + name, action="store_true", help=what)
    return parser


def check_settings(settings):
    """ValueError with the accepted range or the choices for the first setting that is out of them."""
    for name, (low, high) in BOUNDS.items():
        value = settings[name]
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least {low:g}{upper}")
    for name in CHOICES:
        if name not in settings:
            raise ValueError(f"there is no {name.upper()} line; one is needed, or the flag --{name}")
        if (name, settings[name]) != ("pruning", "none"):      # as train.py has it
            check_choice(name, settings[name], f"{name} {settings[name]!r}")
    epochs, sparsity = settings["epochs"], settings["sparsity"]
    if settings["all_images"] and settings["recipe"] == "published":
        raise ValueError("--all-images does not go with --recipe published, which keeps its own batches; leave one out")
    if settings["teacher_views"] and (not settings["teacher"] or settings["recipe"] == "published"):
        raise ValueError("--teacher-views needs a --teacher to ask, and does not go with --recipe published")
    if settings["pruning"] == "none" and sparsity:
        raise ValueError(f"there is no PRUNING line, and sparsity {sparsity}; without pruning, train.py trains")
    if settings.get("weights") == "lsq" and settings["recipe"] == "published":
        raise ValueError("--weights lsq does not go with --recipe published, which trains with floats; leave one out")
    if settings.get("weights") == "lsq" and settings["pruning"] in SHRINKING:
        raise ValueError(f"--weights lsq does not go with --pruning {settings['pruning']}, which removes channels: "
                         "shrink a network of floats first, then --start from it")
    if not epochs or min(epochs) < 1:
        raise ValueError(f"--epochs {' '.join(map(str, epochs))}: each round needs at least 1")
    if settings["pruning"] in SHRINKING:
        if sparsity or not epochs or len(epochs) > 1 and settings["pruning"] == "filters":
            raise ValueError(f"epochs {epochs} and sparsity {sparsity} do not fit: pruning {settings['pruning']!r} "
                             "removes channels, so it takes one number of epochs and no --sparsity")
        if settings["pruning"] == "morphnet" and len(epochs) < 2:
            raise ValueError(f"epochs {epochs}: MorphNet takes two numbers or more, rounds that search for widths and "
                             "one that trains the structure")
        check_morphnet(settings)
        if settings["filter_relative"] and settings["filter_threshold"] >= 1:
            raise ValueError(f"--filter-threshold {settings['filter_threshold']}: as a share of a layer's largest "
                             "norm it must be below 1; --no-filter-relative takes a norm")
    elif settings["pruning"] in GRADUAL:
        if len(epochs) != 1 or len(sparsity) != 1:
            raise ValueError(f"epochs {epochs} and sparsity {sparsity} do not fit: gradual pruning takes one of each, "
                             "or as many as the rounds do, which it adds up")
        if settings["prune_end"] <= settings["prune_begin"]:
            raise ValueError(f"--prune-end {settings['prune_end']} must come after --prune-begin "
                             f"{settings['prune_begin']}")
    elif len(epochs) != len(sparsity) + 1:
        raise ValueError(f"epochs {epochs} and sparsity {sparsity} do not fit: pruning comes between two rounds, "
                         "so there must be one more number of epochs than of sparsities")


def check_morphnet(settings):
    """ValueError unless the device of a latency cost is two numbers above 0."""
    device = settings["morph_device"]
    if settings["morph_cost"] == "latency" and (not device or min(device) <= 0):
        raise ValueError("--morph-cost latency needs --morph-device: MACs a second and bytes a second, both above 0")


def settings_to_resume(state, lines, given):
    """The settings stored in a checkpoint, with what may differ taken from the flags.

    Raises ValueError that lists what must not differ, unless --force is given.
    """
    stored = {**BEFORE, **state["settings"]}
    held = {**BEFORE, **stored["lines"]}
    changed = {name: (stored.get(name), value) for name, value in given.items()
               if name not in FREE and stored.get(name) != value}
    changed |= {name: (held.get(name), value) for name, value in lines.items()
                if held.get(name) != value and name not in given}
    fixed = [name for name in FIXED if name in changed]
    if fixed:
        old, new = changed[fixed[0]]
        raise ValueError(f"the run in {given['out']} began with {fixed[0]} {old}; --{fixed[0]} {new} comes too late, "
                         "with --force too: start a new run with another --out")
    if changed and not given.get("force"):
        listed = "; ".join(f"{name}: {old} then, {new} now" for name, (old, new) in changed.items())
        raise ValueError(f"the run in {given['out']} has other settings ({listed}); --force accepts the new ones")
    accepted = {name: new for name, (_, new) in changed.items()}
    free = {name: given[name] for name in FREE if name in given}
    return {**stored, "dry_run": False, "debug": False, **accepted, **free, "lines": {**held, **lines}}


def check_position(settings, state):
    """ValueError where a run that goes on has come further than its `settings` let it, or by another way.

    state: round, epoch and settings are those of its checkpoint.
    """
    rounds, epochs, before = state["round"], settings["epochs"], state["settings"]
    for name in ("epochs", "sparsity"):
        if settings[name][:rounds] != before[name][:rounds]:
            raise ValueError(f"{name} {settings[name]}: {rounds} rounds with {before[name][:rounds]} are over and "
                             "cannot change; start a new run with another --out")
    if len(epochs) <= rounds or epochs[rounds] < state["epoch"]:
        raise ValueError(f"epochs {epochs}: the run has trained {state['epoch']} in its round {rounds + 1} already; "
                         "give that round as many or more, or start a new run with another --out")


def pick_device(name):
    """The torch.device called `name`; "auto" is CUDA, then MPS, then the CPU. ValueError names those present."""
    with warnings.catch_warnings(record=True) as told:          # of a driver that is too old for this torch
        usable = torch.cuda.is_available()
    present = [f"cuda:{index}" for index in range(torch.cuda.device_count() if usable else 0)]
    present += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in present and f"{name}:0" not in present:
        reason = f" ({str(told[0].message).split(' (')[0]})" if told else ""
        raise ValueError(f"device {name!r} is absent; present: {', '.join(present)}{reason}")
    return torch.device(name)


def device_name(device):
    """What a number was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def call(command, show=False):
    """Run a script of this project. Returns what it prints, or shows it.

    RuntimeError that names the script where it fails, with its error line where that was not shown.
    """
    done = subprocess.run([sys.executable, str(Path(__file__).resolve().parents[1] / command[0]), *command[1:]],
                          capture_output=not show, text=True)
    if done.returncode:
        error = "" if show else "; " + "".join(done.stderr.strip().splitlines()[-1:])
        raise RuntimeError(f"python {shlex.join(command)} failed with exit code {done.returncode}{error}")
    return done.stdout


def command(main):
    """Run a script's main(argv) and exit: 0, or 2 for bad input, 1 for a failed run, 130 for Ctrl-C.

    The one place that decides what becomes of an exception of any type: one line
    on stderr; with --debug its traceback comes first. The first Ctrl-C is the last one
    heard, so that a second cannot spoil the way out. Where standard output is closed
    or full the work goes on, its files are whole, and the exit code is 1 for a full one.
    """
    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, interrupt)
    with streams.guarded() as (output, _):
        code = code_of(main)
        output.flush()
        if output.problem is not None and not isinstance(output.problem, BrokenPipeError):
            code = code or report(f"standard output could not be written ({output.problem}): what was printed from "
                                  "there on is lost, files are whole", 1)
        code = code or (0 if output.problem is None else 1)
    if code:
        sys.exit(code)


def code_of(main):
    """The exit code of main(sys.argv[1:]), its error told."""
    try:
        main(sys.argv[1:])
    except SystemExit as end:             # --help
        return end.code or 0
    except KeyboardInterrupt as problem:
        return report(f"interrupted{'; ' if str(problem) else ''}{problem}", 130)
    except (ValueError, OSError) as problem:
        return report(problem, 2)
    except RuntimeError as problem:
        return report(problem, 1)
    except Exception as problem:
        return report(f"{type(problem).__name__}: {problem}; this is a fault of the program, --debug shows where", 1)
    return 0


def report(problem, code):
    """Print one error line, after the traceback where --debug asks for it. Returns the exit code."""
    if "--debug" in sys.argv:
        traceback.print_exc()
    text = " ".join(str(problem).split()) or type(problem).__name__
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code
