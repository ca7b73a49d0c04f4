"""Training speed against the published run's loop, side by side: `python benchmark.py`.

Both train the same network on the same images, each in a process of its own, in
turns, so that a slow minute hits both. Ours: batches cut on the device, compiled where a compiler is there.
The published loop (`--recipe published`): batch 32, a DataLoader, and four passes
over data an epoch, of which one trains. Prints images a second of the training
steps and of whole epochs, and their ratios; --json writes them to a file.
"""
import json
import multiprocessing
import statistics
import time
from itertools import islice
from pathlib import Path

import torch

import checkpoint
import cifar10
import commandline
import compiling
import experiment
import train


def make_run(recipe, arguments):
    """A run that is ready to train, with the settings that train.py would resolve; nothing is written."""
    lines, _ = commandline.read_lines(train.__file__)
    settings = {**train.DEFAULTS, **lines, **train.RECIPES.get(recipe, {}), "lines": lines,
                "recipe": recipe, "dataset": arguments.dataset, "data": arguments.data, "device": arguments.device,
                "out": "unused", "dry_run": True}
    run = experiment.prepare(settings, None)
    height, width, channels = cifar10.KINDS[arguments.dataset].shape
    shape = (settings["batch_size"], channels, height, width)
    wanted = "off" if recipe == "published" else "auto"
    run.forward, _, note = compiling.choose_forward(run.model, wanted, compiling.WORTH_COMPILING, shape,
                                                    experiment.autocast(run.device), run.device)
    experiment.begin_round(run)
    return run, note


def time_training(run, batches, images):
    """Seconds an image over about `images` images of training steps, loading included."""
    count = max(2, images // run.settings["batch_size"])
    run.model.train()
    begun = time.perf_counter()
    for step, (pictures, labels) in enumerate(islice(batches, count)):
        train.train_step(run, pictures.to(run.device), labels.to(run.device), step)
    synchronise(run.device)
    return (time.perf_counter() - begun) / (count * run.settings["batch_size"])


def time_evaluation(run, batches, images):
    """Seconds an image over about `images` images of evaluation, loading included."""
    size = run.settings["batch_size"] if run.settings["recipe"] == "published" else run.validation.batch_size
    chosen = list(range(max(1, images // size)))
    begun = time.perf_counter()
    logits, _ = train.predict(run.model, islice(batches, len(chosen)), run.device)
    synchronise(run.device)
    return (time.perf_counter() - begun) / len(logits)


def synchronise(device):
    """Wait for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def endless(batches):
    """Batches without end, epoch after epoch."""
    while True:
        yield from batches


def serve(recipe, arguments, pipe):
    """A process that holds one loop and times a part of it whenever it is asked, so that neither helps the other."""
    try:
        run, note = make_run(recipe, arguments)
        training, validation = endless(run.train), endless(run.validation)
        pipe.send((note, run.settings["batch_size"]))
        for _ in iter(pipe.recv, None):
            pipe.send((time_training(run, training, arguments.images),
                       time_evaluation(run, validation, arguments.images)))
    except EOFError:
        return                            # the other end is gone
    except (ValueError, OSError, RuntimeError) as problem:
        pipe.send(problem)


def ask(pipe):
    """What a process of `serve` sends next; its error is raised here."""
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def measure(arguments):
    """The rows of the table: median and range over the repeats, for both loops."""
    context, pipes, times = multiprocessing.get_context("spawn"), {}, {"ours": [], "published": []}
    for recipe in times:
        pipes[recipe], far = context.Pipe()
        context.Process(target=serve, args=(recipe, arguments, far), daemon=True).start()
    facts = {recipe: ask(pipe) for recipe, pipe in pipes.items()}
    for repeat in range(arguments.repeats + 1):       # the first one warms up
        for recipe, pipe in pipes.items():
            pipe.send(True)
            taken = ask(pipe)
            if repeat:
                times[recipe].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    data = cifar10.KINDS[arguments.dataset].counts[0]
    sizes = {"train": data - data // 10, "validation": data // 10}
    rows = {}
    for recipe, taken in times.items():
        measured = sizes["train"] + 2 * sizes["validation"] if recipe == "published" else sizes["validation"]
        epochs = [step * sizes["train"] + look * measured for step, look in taken]
        rows[recipe] = {"how": facts[recipe][0], "batch_size": facts[recipe][1],
                        "training": spread([1 / step for step, _ in taken]),
                        "evaluation": spread([1 / look for _, look in taken]),
                        "epoch": spread([sizes["train"] / seconds for seconds in epochs])}
    return rows


def spread(values):
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_rows(rows, ratios, where):
    """The table."""
    print(f"images a second, median (least to greatest), {where}\n")
    print(f"{'loop':12}{'batch':>6}  {'training steps':24}{'evaluation':24}{'whole epoch':24}how")
    for recipe, row in rows.items():
        cells = "".join(f"{row[name]['median']:6.0f} ({row[name]['min']:.0f} to {row[name]['max']:.0f})".ljust(24)
                        for name in ("training", "evaluation", "epoch"))
        print(f"{recipe:12}{row['batch_size']:6}  {cells}{row['how']}")
    print(f"\nours / published: {ratios['training']:.2f} in training steps, {ratios['epoch']:.2f} in whole epochs")


def main(argv):
    """Measure, print, write."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(cifar10.KINDS), default="cifar10")
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--images", type=int, default=1500, help="images a repeat and a part (1500)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats that count, in turns (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--json", help="write the numbers to this file, such as results/benchmark_training.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.images < 1 or arguments.repeats < 1:
        raise ValueError("--images and --repeats must be at least 1")
    rows = measure(arguments)
    ratios = {name: rows["ours"][name]["median"] / rows["published"][name]["median"] for name in ("training", "epoch")}
    where = commandline.device_name(commandline.pick_device(arguments.device))
    print_rows(rows, ratios, where)
    if arguments.json:
        content = {"dataset": arguments.dataset, "device": where, "torch": torch.__version__,
                   "repeats": arguments.repeats, "images": arguments.images, "ratios": ratios, "loops": rows}
        checkpoint.write(Path(arguments.json), (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    commandline.command(main)
