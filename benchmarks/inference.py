"""Inference speed of several networks: `python benchmark.py inference`.

Images a second in eager and compiled PyTorch, in ONNX Runtime in float32 and int8, in
other precisions, one image at a time and in batches. Each measurement runs in a process
of its own, warms up first, and gives a median with its range; --json writes the numbers,
with a table (.md) and a plot (.png) beside them.
"""
import json
import tempfile
import time
from pathlib import Path

import torch

import networks
from benchmarks.processes import alone
from deploy import onnx_files
from engine import commandline, compiling, files, run_files

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


def prepare(way, model, batch, device):
    """(function from images to logits, a batch, seconds of setup); ValueError if this machine cannot run it."""
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
    """A row of the table: images a second and milliseconds per call, over `repeats` of about `seconds` each."""
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
    """All rows, each from its own process, with the speed relative to eager dense ResNet-18 at the same batch size."""
    rows = []
    for network in arguments.networks:
        for way in arguments.ways:
            for batch in arguments.batches:
                rows.append(alone(time_inference, network, way, batch, arguments.device, arguments.repeats,
                                  arguments.seconds))
                print_inference(rows[-1:], header=len(rows) == 1)
    base = {row["batch"]: row["milliseconds"]["median"] for row in rows
            if (row["network"], row["way"]) == ("ResNet-18 dense", "eager") and "milliseconds" in row}
    for row in rows:
        if "milliseconds" in row and row["batch"] in base:
            row["times_faster"] = base[row["batch"]] / row["milliseconds"]["median"]
    return rows


def print_inference(rows, header=True):
    """Print rows of the table; for one that was not run, the reason."""
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
    """The table in Markdown: a line per network and way, a column per batch size."""
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
    """Plot images a second by network and way, one panel per batch size, on a logarithmic axis."""
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
    files.save_figure(path, figure)


def parse(argv):
    """The flags of this benchmark."""
    parser = commandline.Parser(prog="benchmark.py inference", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256], help="batch sizes (1 256)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds per repeat (0.5)")
    parser.add_argument("--repeats", type=int, default=5, help="number of repeats (5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--json", help="write the numbers to this file, a table (.md) and a plot (.png) beside it")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if min(arguments.repeats, *arguments.batches) < 1 or not 0 < arguments.seconds < 3600:
        raise ValueError("--repeats and --batches must be at least 1, --seconds above 0 and below 3600")
    return arguments


def main(argv):
    """Measure, print, write."""
    arguments = parse(argv)
    where = commandline.device_name(commandline.pick_device(arguments.device))
    if arguments.json:
        run_files.check_target(arguments.json, beside=(".md", ".png"))         # before minutes of measuring
    rows = measure_inference(arguments)
    if arguments.json:
        path, content = Path(arguments.json), {"device": where, "torch": torch.__version__,
                                               "repeats": arguments.repeats, "rows": rows}
        with files.noted():
            files.write(path.with_suffix(".md"), markdown_of(rows).encode())
        with files.noted():
            draw_inference(path.with_suffix(".png"), rows)
        files.write(path, (json.dumps(content, indent=1) + "\n").encode())
