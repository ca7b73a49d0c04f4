"""Benchmark exported networks: `python benchmark.py deployment runs/a/model.pt small=pretrained/b.pt.gz`.

Each network is exported by export.py, and every file is run as in deployment: the
compact file in PyTorch, eager and compiled, the ONNX files in ONNX Runtime, in float32,
with weights stored in 8 bits, and in int8; a quantized network as a packed file, in exact
integers (a packed file is used as it is). A row holds the file's accuracy on all test
images, its bytes, and the milliseconds for one image, all measured in the same run. The
reference is dense ResNet-18, untrained, in eager PyTorch. --json writes the numbers, with
a table (.md) and a plot (.png) beside them.
"""
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

import cifar10
import networks
from benchmarks.processes import alone
from deploy import onnx_files
from engine import checkpoint, commandline, compiling, files, run_files
from engine.commandline import call
from networks import load_network

FORMS = {"PyTorch": ".pt.gz", "PyTorch compiled": ".pt.gz", "ONNX Runtime": ".onnx",
         "ONNX Runtime, 8-bit weights": ".w8.onnx", "ONNX Runtime int8": ".int8.onnx", "packed integers": ".packed.gz"}
MARKERS = {"PyTorch": "o", "PyTorch compiled": "s", "ONNX Runtime": "D", "ONNX Runtime, 8-bit weights": "^",
           "ONNX Runtime int8": "v", "packed integers": "P"}
OF_FLOATS = ("ONNX Runtime, 8-bit weights", "ONNX Runtime int8")
DENSE = "ResNet-18 dense, untrained"


def named(given):
    """(name, path) from NAME=PATH; a path alone is named after its run's folder or, outside a run, its file."""
    name, found, path = ("", "", given) if Path(given).exists() else given.rpartition("=")
    path = checkpoint.find(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return (name if found else path.parent.name if path.name == "model.pt" else path.name.split(".")[0]), path


def forms_of(source):
    """The forms that a network is exported in: packed integers only if quantized, 8-bit ONNX files only if float32.

    A file that is packed already is used as it is.
    """
    if is_packed(source):
        return ["packed integers"]
    bits = "bits" in load_network(source)[1]["architecture"]
    return [form for form in FORMS if form not in (OF_FLOATS if bits else ("packed integers",))]


def is_packed(source):
    """Whether a file holds packed integers."""
    return "integers" in load_network(source)[1]


def write_form(source, path, data):
    """Export a network to `path`, whose ending names the form, by export.py; a packed file is copied."""
    if is_packed(source):
        shutil.copy(source, path)
    else:
        call(["export.py", "--checkpoint", str(source), "--out", str(path), "--data", data, "--no-compare"])


def write_dense(path, dataset):
    """Write a checkpoint of a dense ResNet-18 for the images of a data set, freshly initialised."""
    kind = cifar10.kind_of(dataset)
    architecture = {"name": "resnet18", "num_classes": len(kind.classes), "in_channels": kind.shape[-1],
                    "groups": 1, "shuffle": False}
    network = checkpoint.network_of(networks.build(**architecture), architecture)
    checkpoint.save(path, {**network, "dataset": dataset})


def open_form(form, path):
    """A function from images to logits, loaded from an exported file; ValueError if this machine cannot run it."""
    if form.startswith("ONNX"):
        return onnx_files.open_onnx(path)
    if form.endswith("compiled") and not compiling.find_compiler():
        raise ValueError("no C++ compiler found")
    model = load_network(path)[0]
    return torch.compile(model) if form.endswith("compiled") else model


def time_form(form, path, shape, repeats, seconds):
    """Milliseconds for one image of `shape`, one image per call: median and range, or why it was not run."""
    compiling.keep_freed_memory()
    images, device = torch.randn(1, *shape), torch.device("cpu")
    try:
        with torch.inference_mode():
            forward = open_form(form, path)
            times = compiling.time_repeats(forward, images, repeats, seconds, device)[1]
    except (ImportError, ValueError, RuntimeError) as problem:
        return {"not_run": str(problem).strip().splitlines()[0]}
    return {"milliseconds": compiling.spread([1000 * each for each in times]), "repeats": len(times)}


@torch.inference_mode()
def test_form(form, path, batches):
    """Accuracy in % of an exported file on all images of `batches`."""
    forward = open_form(form, path)
    right = [forward(images).argmax(1) == labels for images, labels in batches]
    return 100 * torch.cat(right).float().mean().item()


def measure(name, source, folder, data, arguments):
    """The rows of one network, one per form. The untrained reference is not tested."""
    profile = json.loads(call(["profil.py", "--checkpoint", str(source), "--json"]))
    kind, rows, accuracies = networks.data_of(source, load_network(source)[1])[1], [], {}
    for form in forms_of(source):
        ending = FORMS[form]
        path = Path(folder) / f"network{ending}"
        if ending not in accuracies:
            write_form(source, path, arguments.data)
            batches = cifar10.Batches(*cifar10.some(data.x_test, data.y_test, arguments.limit), 250, kind)
            accuracies[ending] = None if name == DENSE else test_form(form, path, batches)
        timed = alone(time_form, form, path, (kind.shape[-1], *kind.shape[:2]), arguments.repeats, arguments.seconds)
        rows.append({"network": name, "form": form, "accuracy": accuracies[ending],
                     "images": len(data.y_test[:arguments.limit]), "bytes": os.path.getsize(path),
                     "parameters": profile["parameters"], "nonzero": profile["nonzero"], "macs": profile["macs"],
                     **timed})
        print_row(rows[-1])
    return rows


def compare(rows, reference_bytes):
    """Add to each row, in place, how many times faster and smaller than the reference it is."""
    base = next(row for row in rows if (row["network"], row["form"]) == (DENSE, "PyTorch"))
    for row in rows:
        row["times_smaller"] = reference_bytes / row["bytes"]
        if "milliseconds" in row:
            row["times_faster"] = base["milliseconds"]["median"] / row["milliseconds"]["median"]


def print_row(row):
    """Print a row as one line."""
    accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f} %"
    speed = f"not run: {row['not_run']}" if "not_run" in row else (
        f"{row['milliseconds']['median']:8.3f} ms ({row['milliseconds']['min']:.3f} to "
        f"{row['milliseconds']['max']:.3f})")
    print(f"{row['network']:32}{row['form']:28}{accuracy:>9}{row['bytes']:>13,} bytes{row['macs']:>14,} MACs  {speed}",
          flush=True)


def markdown_of(rows):
    """The table in Markdown."""
    lines = ["| network | MACs | parameters left | form | test % | bytes | smaller | ms, one image | faster |",
             "|---" * 9 + "|"]
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        speed = ("not run | " if "not_run" in row
                 else f"{row['milliseconds']['median']:.2f} | {row['times_faster']:.1f}")
        lines.append(f"| {row['network']} | {row['macs']:,} | {row['nonzero']:,} | {row['form']} | {accuracy} "
                     f"| {row['bytes']:,} | {row['times_smaller']:.1f} | {speed} |")
    return "\n".join(lines) + "\n"


def draw(path, rows):
    """Plot accuracy against milliseconds: a colour per network, a marker per form, areas by file size."""
    from matplotlib.figure import Figure
    shown = [row for row in rows if row["accuracy"] is not None and "milliseconds" in row]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row["network"] for row in shown))}
    for row in shown:
        axes.scatter(row["milliseconds"]["median"], row["accuracy"], s=20 + row["bytes"] / 20_000, alpha=0.7,
                     marker=MARKERS[row["form"]], color=colours[row["network"]])
    for row in rows:
        if (row["network"], row["form"]) == (DENSE, "PyTorch") and "milliseconds" in row:
            axes.axvline(row["milliseconds"]["median"], color="gray", linestyle=":", label=f"{DENSE}, PyTorch")
    for name, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=5, label=name)
    for form in dict.fromkeys(row["form"] for row in shown):
        axes.plot([], [], MARKERS[form], color="gray", label=form)
    axes.set(xscale="log", xlabel="milliseconds, one image", ylabel="test accuracy (%)")
    axes.grid(alpha=0.4)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    files.save_figure(path, figure)


def parse(argv):
    """The flags of this benchmark."""
    parser = commandline.Parser(prog="benchmark.py deployment", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="trained networks of one data set, each a path or NAME=PATH")
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--limit", type=int, help="number of test images (all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds per repeat (0.5)")
    parser.add_argument("--repeats", type=int, default=5, help="number of repeats (5)")
    parser.add_argument("--json", help="write the numbers to this file, a table (.md) and a plot (.png) beside it")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1 or not 0 < arguments.seconds < 3600:
        raise ValueError("--repeats must be at least 1, --seconds above 0 and below 3600")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: at least 1 test image is needed")
    return arguments


def main(argv):
    """Export, test, time, compare, print, write."""
    arguments = parse(argv)
    given = dict(named(each) for each in arguments.checkpoints)
    states = [(path, load_network(path)[1]) for path in given.values()]
    datasets = {state["dataset"] for _, state in states}
    if len(datasets) > 1 or len(given) < len(arguments.checkpoints):
        raise ValueError(f"networks of {', '.join(sorted(datasets))}, called {', '.join(given)}: "
                         "they must be of one data set and have a name each (NAME=PATH)")
    arguments.dataset = datasets.pop()
    if arguments.json:
        run_files.check_target(arguments.json, given.values(), (".md", ".png"))         # before minutes of measuring
    _, kind = networks.data_of(*states[0])
    data, rows = cifar10.load(arguments.dataset, arguments.data, kind.classes), []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.pt"
        write_dense(dense, arguments.dataset)
        for name, source in {DENSE: dense, **given}.items():
            rows += measure(name, source, folder, data, arguments)
        compare(rows, os.path.getsize(dense))
    print("\n" + markdown_of(rows))
    if arguments.json:
        target, device = Path(arguments.json), commandline.device_name(torch.device("cpu"))
        content = {"device": device, "torch": torch.__version__, "repeats": arguments.repeats,
                   "checkpoints": {name: str(path) for name, path in given.items()}, "rows": rows}
        with files.noted():
            files.write(target.with_suffix(".md"), markdown_of(rows).encode())
        with files.noted():
            draw(target.with_suffix(".png"), rows)
        files.write(target, (json.dumps(content, indent=1) + "\n").encode())

