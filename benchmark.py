"""How fast networks train and infer, side by side: `python benchmark.py inference`, `python benchmark.py training`.

inference: images a second of several networks, eager and compiled, in ONNX
Runtime in float32 and int8, in other precisions, one image at a time and many.
training: the loop of train.py, with `--resize 20` the same with smaller images at
first, against the published run's (`--recipe published`: batch 32, a DataLoader,
four passes over data an epoch, of which one trains), in turns, so that a slow
minute hits all. Everything runs in a process of its own,
warms up first, and is a median with its range; --json writes the numbers.
"""
import json
import multiprocessing
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

import checkpoint
import cifar10
import commandline
import compiling
import experiment
import networks
import onnx_files
import train

NETWORKS = {      # for 32x32 images in three channels, freshly initialised: speed does not depend on the weights
    "ResNet-18 dense": {"name": "resnet18", "groups": 1, "shuffle": False},
    "ResNet-18 groups 8": {"name": "resnet18", "groups": 8, "shuffle": True},
    "MobileNetV1": {"name": "mobilenet"},
    "ResNet-20": {"name": "resnet20"},
    "ResNet-20 GELU": {"name": "resnet20", "activation": "gelu"},
    "LeNet-5": {"name": "lenet5"},
}
WAYS = ("eager", "compiled", "onnx", "onnx int8", "eager float64", "eager bfloat16", "eager half")
SHAPE = (3, 32, 32)


# ---- training

def make_run(changes, arguments):
    """A run that is ready to train, with the settings that train.py would resolve; nothing is written."""
    lines, _ = commandline.read_lines(train.__file__)
    recipe = changes.get("recipe", "ours")
    settings = {**train.DEFAULTS, **lines, **train.RECIPES.get(recipe, {}), **changes, "lines": lines,
                "dataset": arguments.dataset, "data": arguments.data, "device": arguments.device,
                "out": "unused", "dry_run": True}
    run = experiment.prepare(settings, None)
    height, width, channels = cifar10.kind_of(arguments.dataset).shape
    shape = (settings["batch_size"], channels, height, width)
    wanted = "off" if recipe == "published" else "auto"
    _, note = experiment.choose_computing(run, wanted, compiling.WORTH_COMPILING, shape)
    experiment.begin_round(run)
    return run, f"{run.arithmetic}, {note}"


def time_training(run, batches, images):
    """Seconds an image of training, loading included: the mean over a round whose images may grow."""
    until = run.settings["resize_until"] if run.settings["resize"] is not None else 0.0
    return sum(share * time_part(run, batches, images, all_small)
               for share, all_small in ((until, 1.0), (1 - until, 0.0)) if share > 0)


def time_part(run, batches, images, resize_until):
    """Seconds an image over about `images` images of training steps, with images resized in all of them or in none."""
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
    """Seconds an image over about `images` images of evaluation, loading included."""
    size = run.settings["batch_size"] if run.settings["recipe"] == "published" else run.validation.batch_size
    chosen = list(range(max(1, images // size)))
    begun = time.perf_counter()
    logits, _ = train.predict(run.model, islice(batches, len(chosen)), run.device, run.dtype)
    compiling.synchronise(run.device)
    return (time.perf_counter() - begun) / len(logits)


def endless(batches):
    """Batches without end, epoch after epoch."""
    while True:
        yield from batches


def serve(loop, arguments, pipe):
    """A process that holds one loop and times a part of it whenever it is asked, so that neither helps the other."""
    try:
        run, note = make_run(loop, arguments)
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


def measure_training(arguments):
    """The rows of the table: median and range over the repeats, by loop."""
    loops = {"ours": {}}
    for name in ("resize", "convolutions"):
        if getattr(arguments, name) is not None:
            loops[f"ours, --{name} {getattr(arguments, name)}"] = {name: getattr(arguments, name)}
    loops["published"] = {"recipe": "published"}
    context, pipes, facts = multiprocessing.get_context("spawn"), {}, {}
    times = {name: [] for name in loops}
    for name, loop in loops.items():
        pipes[name], far = context.Pipe()
        context.Process(target=serve, args=(loop, arguments, far), daemon=True).start()
        facts[name] = ask(pipes[name])    # it compiles and chooses alone on the device, then the next one begins
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
    """How many times the images a second of the published loop each of ours does, {loop: {part: ratio}}."""
    return {name: {part: row[part]["median"] / rows["published"][part]["median"] for part in ("training", "epoch")}
            for name, row in rows.items() if name != "published"}


def print_training(rows, where):
    """The table."""
    print(f"images a second, median (least to greatest), {where}\n")
    print(f"{'loop':20}{'batch':>6}  {'training steps':24}{'evaluation':24}{'whole epoch':24}how")
    for name, row in rows.items():
        cells = "".join(f"{row[part]['median']:6.0f} ({row[part]['min']:.0f} to {row[part]['max']:.0f})".ljust(24)
                        for part in ("training", "evaluation", "epoch"))
        print(f"{name:20}{row['batch_size']:6}  {cells}{row['how']}")
    for name, ratios in ratios_of(rows).items():
        print(f"\n{name} / published: {ratios['training']:.2f} in training steps, {ratios['epoch']:.2f} in whole "
              "epochs")


# ---- inference

def prepare(way, model, batch, device):
    """A function from images to logits, and the seconds that making it took; ValueError where it cannot be made."""
    begun, images = time.perf_counter(), torch.randn(batch, *SHAPE)
    if way.startswith("onnx"):
        if device.type != "cpu":
            raise ValueError("ONNX Runtime is compared on the CPU")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx_files.write_onnx(model, path, SHAPE)
            if way == "onnx int8":
                onnx_files.quantize_onnx(path, path, [torch.randn(32, *SHAPE)])
            forward = onnx_files.open_onnx(path)
    else:
        dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16, "half": torch.float16}.get(way.split()[-1])
        model, images = model.to(device, dtype or torch.float32), images.to(device, dtype or torch.float32)
        if way == "compiled" and device.type == "cpu" and not compiling.find_compiler():
            raise ValueError("no C++ compiler found")
        forward = torch.compile(model) if way == "compiled" else model
    with torch.inference_mode():
        forward(images)
    return forward, images, time.perf_counter() - begun


def time_inference(network, way, batch, device_, repeats, seconds):
    """A row of the table: images a second and milliseconds a call, over `repeats` of about `seconds` each."""
    device = commandline.pick_device(device_)
    row = {"network": network, "way": way, "batch": batch, "device": commandline.device_name(device)}
    compiling.set_up(device)
    try:
        model = networks.build(**NETWORKS[network]).eval()
        forward, images, row["setup_seconds"] = prepare(way, model, batch, device)
    except (ImportError, ValueError, RuntimeError) as problem:
        return row | {"not_run": str(problem).strip().splitlines()[0]}
    with torch.inference_mode():
        calls, taken = compiling.time_repeats(forward, images, repeats, seconds, device)
    return row | {"calls": calls, "repeats": len(taken),
                  "milliseconds": compiling.spread([1000 * each for each in taken]),
                  "images_per_second": compiling.spread([batch / each for each in taken])}


def measure_inference(arguments):
    """All rows, each from a process of its own, with the speed relative to eager dense ResNet-18 at the same batch."""
    rows = []
    for network in arguments.networks:
        for way in arguments.ways:
            for batch in arguments.batches:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(time_inference, (network, way, batch, arguments.device, arguments.repeats,
                                                            arguments.seconds)))
                print_inference(rows[-1:], header=len(rows) == 1)
    base = {row["batch"]: row["milliseconds"]["median"] for row in rows
            if (row["network"], row["way"]) == ("ResNet-18 dense", "eager") and "milliseconds" in row}
    for row in rows:
        if "milliseconds" in row and row["batch"] in base:
            row["times_faster"] = base[row["batch"]] / row["milliseconds"]["median"]
    return rows


def print_inference(rows, header=True):
    """Rows of the table; one that was not run says why."""
    if header:
        print(f"{'network':20}{'way':16}{'batch':>6}{'ms a call':>12}{'images/s':>10}{'least to greatest':>22}"
              f"{'setup s':>9}")
    for row in rows:
        start = f"{row['network']:20}{row['way']:16}{row['batch']:6}"
        if "not_run" in row:
            print(f"{start}  not run: {row['not_run']}", flush=True)
            continue
        speed = row["images_per_second"]
        print(f"{start}{row['milliseconds']['median']:12.2f}{speed['median']:10.0f}"
              f"{speed['min']:14.0f} to {speed['max']:.0f}{row['setup_seconds']:9.1f}", flush=True)


def markdown_of(rows):
    """The table for a README: a line a network and way, a column a batch."""
    batches = sorted({row["batch"] for row in rows})
    lines = ["| network | way | " + " | ".join(f"images/s, batch {batch}" for batch in batches)
             + " | times faster, batch 1 | seconds to set up |", "|---" * (len(batches) + 4) + "|"]
    for network, way in dict.fromkeys((row["network"], row["way"]) for row in rows):
        found = {row["batch"]: row for row in rows if (row["network"], row["way"]) == (network, way)}
        cells = [f"{found[batch]['images_per_second']['median']:.0f}" if "milliseconds" in found.get(batch, {})
                 else "not run" for batch in batches]
        faster, setup = found.get(1, {}).get("times_faster"), next(iter(found.values())).get("setup_seconds")
        cells += ["" if number is None else f"{number:.1f}" for number in (faster, setup)]
        lines.append(f"| {network} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_inference(path, rows):
    """Images a second by network and way, one panel a batch, on a logarithmic axis."""
    from matplotlib.figure import Figure
    run = [row for row in rows if "milliseconds" in row]
    batches, ways = sorted({row["batch"] for row in run}), list(dict.fromkeys(row["way"] for row in run))
    networks = list(dict.fromkeys(row["network"] for row in run))
    figure = Figure(figsize=(6 * len(batches), 0.8 + 0.16 * len(networks) * len(ways)), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], batches, strict=True):
        for place, way in enumerate(ways):
            speeds = {row["network"]: row["images_per_second"]["median"] for row in run
                      if (row["way"], row["batch"]) == (way, batch)}
            axes.barh([networks.index(name) + (place + 0.5) / len(ways) * 0.8 for name in speeds], speeds.values(),
                      0.8 / len(ways), label=way)
        axes.set_yticks([place + 0.4 for place in range(len(networks))], networks)
        axes.set(xscale="log", xlabel="images a second", title=f"batch {batch}")
        axes.grid(axis="x", alpha=0.4)
    figure.axes[0].invert_yaxis()
    figure.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    checkpoint.save_figure(path, figure)


# ---- the command

def write(path, content):
    """The numbers as JSON; of inference a table and a plot beside them."""
    if "rows" in content:
        with checkpoint.noted():
            checkpoint.write(path.with_suffix(".md"), markdown_of(content["rows"]).encode())
        with checkpoint.noted():
            draw_inference(path.with_suffix(".png"), content["rows"])
    checkpoint.write(path, (json.dumps(content, indent=1) + "\n").encode())


def parse(argv):
    """The flags of this script."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["inference", "training"])
    parser.add_argument("--dataset", default="cifar10", help="that training reads")
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--images", type=int, default=1500, help="training: images a repeat and a part (1500)")
    parser.add_argument("--resize", type=int, metavar="PIXELS",
                        help="training: our loop also with images of so many pixels for half of a round")
    parser.add_argument("--convolutions", choices=["grouped", "dense"],
                        help="training: our loop also with grouped convolutions computed so")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256], help="inference: images a call (1 256)")
    parser.add_argument("--seconds", type=float, default=0.5, help="inference: of a repeat (0.5)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats that count (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--json", help="write the numbers to this file, such as results/benchmark_training.json; "
                                       "inference adds a table (.md) and a plot (.png) beside it")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if min(arguments.images, arguments.repeats, *arguments.batches) < 1 or not arguments.seconds > 0:
        raise ValueError("--images, --repeats and --batches must be at least 1, --seconds above 0")
    return arguments


def main(argv):
    """Measure, print, write."""
    arguments = parse(argv)
    where = commandline.device_name(commandline.pick_device(arguments.device))
    content = {"device": where, "torch": torch.__version__, "repeats": arguments.repeats}
    if arguments.json:
        cifar10.check_folder(Path(arguments.json).parent)         # before minutes of measuring
    if arguments.what == "inference":
        content["rows"] = measure_inference(arguments)
    else:
        rows = measure_training(arguments)
        print_training(rows, where)
        content |= {"dataset": arguments.dataset, "images": arguments.images, "ratios": ratios_of(rows), "loops": rows}
    if arguments.json:
        write(Path(arguments.json), content)


if __name__ == "__main__":
    commandline.command(main)
