"""Training speed of our loop and the published run's: `python benchmark.py training`.

Measures the loop of train.py, with `--resize 20` also with smaller images at first,
against the published run's (`--recipe published`: batch 32, a DataLoader, four passes over
data per epoch, of which one trains). The loops take turns, so that a slow minute affects
all of them. Each runs in a process of its own, warms up first, and gives a median with its
range; --json writes the numbers.
"""
import json
import time
from itertools import islice
from pathlib import Path

import torch

import cifar10
import experiment
import train
from benchmarks.processes import ask, begin
from engine import commandline, compiling, files, run_files
from engine.computing import choose_computing


def make_run(changes, arguments):
    """(a run that is ready to train, with the settings train.py would use; how it computes); writes nothing."""
    lines = commandline.lines_of(train.__file__, train.SETTINGS)
    recipe = changes.get("recipe", "ours")
    settings = {**train.DEFAULTS, **lines, **train.RECIPES.get(recipe, {}), **changes, "lines": lines,
                "dataset": arguments.dataset, "data": arguments.data, "device": arguments.device,
                "out": "unused", "dry_run": True}
    run = experiment.prepare(settings, None)
    height, width, channels = cifar10.kind_of(arguments.dataset).shape
    shape = (settings["batch_size"], channels, height, width)
    wanted = "off" if recipe == "published" else "auto"
    _, note = choose_computing(run, wanted, compiling.WORTH_COMPILING, shape, experiment.lay_out)
    experiment.begin_round(run)
    return run, f"{run.arithmetic}, {note}"


def time_training(run, batches, images):
    """Seconds per image of training, loading included: the mean over a round, in which image sizes may grow."""
    until = run.settings["resize_until"] if run.settings["resize"] is not None else 0.0
    return sum(share * time_part(run, batches, images, all_small)
               for share, all_small in ((until, 1.0), (1 - until, 0.0)) if share > 0)


def time_part(run, batches, images, resize_until):
    """Seconds per image over about `images` training images; resize_until: 1 resizes them in all steps, 0 in none."""
    settings, count = run.settings, max(2, images // run.settings["batch_size"])
    run.model.train()
    run.settings = {**settings, "resize_until": resize_until}
    begun = time.perf_counter()
    for step, (pictures, labels) in enumerate(islice(batches, count)):
        train.train_step(run, *train.as_step_takes(run, pictures, labels), step)
    compiling.synchronise(run.device)
    seconds = time.perf_counter() - begun
    run.settings = settings
    return seconds / (count * settings["batch_size"])


def time_evaluation(run, batches, images):
    """Seconds per image over about `images` images of evaluation, loading included."""
    size = run.settings["batch_size"] if run.settings["recipe"] == "published" else run.validation.batch_size
    chosen = list(range(max(1, images // size)))
    begun = time.perf_counter()
    logits, _ = train.predict(run.model, islice(batches, len(chosen)), run.device, run.dtype)
    compiling.synchronise(run.device)
    return (time.perf_counter() - begun) / len(logits)


def endless(batches):
    """Yield batches without end, epoch after epoch."""
    while True:
        yield from batches


def serve(loop, arguments, pipe):
    """Hold one loop in this process and time it on each request through `pipe`, so that loops share no caches."""
    try:
        run, note = make_run(loop, arguments)
        training, validation = endless(run.train), endless(run.validation)
        pipe.send((note, run.settings["batch_size"]))
        for _ in iter(pipe.recv, None):
            pipe.send((time_training(run, training, arguments.images),
                       time_evaluation(run, validation, arguments.images)))
    except EOFError:
        return                            # the parent has closed the pipe
    except (ValueError, OSError, RuntimeError) as problem:
        pipe.send(problem)


def measure_training(arguments):
    """The rows of the table, {loop: row}: median and range over the repeats."""
    loops = {"ours": {}}
    for name in ("resize", "convolutions"):
        if getattr(arguments, name) is not None:
            loops[f"ours, --{name} {getattr(arguments, name)}"] = {name: getattr(arguments, name)}
    loops["published"] = {"recipe": "published"}
    pipes, facts = {}, {}
    times = {name: [] for name in loops}
    for name, loop in loops.items():
        pipes[name] = begin(serve, loop, arguments)
        facts[name] = ask(pipes[name])    # compiles and times while no other loop uses the device
    for repeat in range(arguments.repeats + 1):       # the first one warms up
        for name, pipe in pipes.items():
            pipe.send(True)
            taken = ask(pipe)
            if repeat:
                times[name].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    data = cifar10.kind_of(arguments.dataset).counts[0]
    sizes = {"train": data - data // 10, "validation": data // 10}
    rows = {}
    for name, taken in times.items():
        measured = sizes["train"] + 2 * sizes["validation"] if name == "published" else sizes["validation"]
        epochs = [step * sizes["train"] + look * measured for step, look in taken]
        rows[name] = {"how": facts[name][0], "batch_size": facts[name][1],
                      "training": compiling.spread([1 / step for step, _ in taken]),
                      "evaluation": compiling.spread([1 / look for _, look in taken]),
                      "epoch": compiling.spread([sizes["train"] / seconds for seconds in epochs])}
    return rows


def ratios_of(rows):
    """{loop: {part: ratio}}: the images per second of each of our loops, divided by the published loop's."""
    return {name: {part: row[part]["median"] / rows["published"][part]["median"] for part in ("training", "epoch")}
            for name, row in rows.items() if name != "published"}


def print_training(rows, where):
    """Print the table."""
    print(f"images a second, median (least to greatest), {where}\n")
    print(f"{'loop':20}{'batch':>6}  {'training steps':24}{'evaluation':24}{'whole epoch':24}how")
    for name, row in rows.items():
        cells = "".join(f"{row[part]['median']:6.0f} ({row[part]['min']:.0f} to {row[part]['max']:.0f})".ljust(24)
                        for part in ("training", "evaluation", "epoch"))
        print(f"{name:20}{row['batch_size']:6}  {cells}{row['how']}")
    for name, ratios in ratios_of(rows).items():
        print(f"\n{name} / published: {ratios['training']:.2f} in training steps, {ratios['epoch']:.2f} in whole "
              "epochs")


def parse(argv):
    """The flags of this benchmark."""
    parser = commandline.Parser(prog="benchmark.py training", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=cifar10.named, default="cifar10", help=cifar10.HELP)
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--images", type=int, default=1500, help="images per repeat of training and evaluation (1500)")
    parser.add_argument("--resize", type=int, metavar="PIXELS",
                        help="also time our loop with images of this size for the first half of a round")
    parser.add_argument("--convolutions", choices=["grouped", "dense"],
                        help="also time our loop with grouped convolutions computed in this form")
    parser.add_argument("--repeats", type=int, default=5, help="number of repeats, after one for warm-up (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--json", help="write the numbers to this file, such as results/benchmark_training.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if min(arguments.images, arguments.repeats) < 1:
        raise ValueError("--images and --repeats must be at least 1")
    return arguments


def main(argv):
    """Measure, print, write."""
    arguments = parse(argv)
    where = commandline.device_name(commandline.pick_device(arguments.device))
    if arguments.json:
        run_files.check_target(arguments.json)         # before minutes of measuring
    rows = measure_training(arguments)
    print_training(rows, where)
    if arguments.json:
        content = {"device": where, "torch": torch.__version__, "repeats": arguments.repeats,
                   "dataset": arguments.dataset, "images": arguments.images, "ratios": ratios_of(rows), "loops": rows}
        files.write(Path(arguments.json), (json.dumps(content, indent=1) + "\n").encode())
