"""Test a trained network on all test images: `python test.py`, in half precision by default.

Prints which checkpoint it reads, the accuracy, a table by class, and the bytes
of the network on disk; writes confusion.png and report.json beside a run's
checkpoint. No test-time augmentation.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import json
import os
import time
from itertools import islice

import torch
import torch.nn.functional as F

import cifar10
import quantization
from deploy import integer_inference
from engine import checkpoint, commandline, compiling, files, packing, run_files
from networks import data_of, load_network, trim
from train import find_checkpoint, predict


def test_network(model, data, kind, precision, device, batch_size=500, limit=None):
    """Test `model` in `precision` ("float", "half", "bfloat16"); it is converted in place.

    Returns a dictionary: accuracy in %, loss, images, seconds, precision (a note on
    how it was computed), classes (name, images, correct, accuracy) and confusion,
    a (K, K) list: number of images of class row predicted as class column.
    """
    dtype, note = quantization.set_precision(model, precision, device)
    batches = cifar10.Batches(*cifar10.some(data.x_test, data.y_test, limit), batch_size, kind, device)
    model.to(memory_format=torch.channels_last)            # as the batches are
    predict(model, ((images.to(dtype), labels) for images, labels in islice(batches, 1)), device)     # warms up
    compiling.synchronise(device)
    begun = time.perf_counter()
    logits, labels = predict(model, ((images.to(dtype), labels) for images, labels in batches), device)
    compiling.synchronise(device)
    seconds = time.perf_counter() - begun
    broken = int((~torch.isfinite(logits)).any(1).sum())
    if broken:
        raise ValueError(f"the network's outputs for {broken:,} of {len(labels):,} images are NaN or infinite: its "
                         f"numbers overflow ({note}); try --precision float, or train it again with a smaller --lr")
    count = len(kind.classes)
    confusion = torch.bincount(labels * count + logits.argmax(1), minlength=count * count).view(count, count)
    correct, images = confusion.diag(), confusion.sum(1)
    classes = [{"name": name, "images": n, "correct": k, "accuracy": 100 * k / n if n else None}
               for name, n, k in zip(kind.classes, images.tolist(), correct.tolist(), strict=True)]
    return {"accuracy": 100 * correct.sum().item() / len(labels), "loss": F.cross_entropy(logits, labels).item(),
            "images": len(labels), "seconds": round(seconds, 3), "precision": note,
            "classes": classes, "confusion": confusion.tolist()}


def bytes_of(path, network):
    """Sizes of a network in bytes: `sizes_of`, "packed" if it is quantized, and "file" of an exported file.

    A packed file has "packed" alone, its own size. Compressed and packed are as export.py writes them.
    """
    if "integers" in network:
        return {"packed": os.path.getsize(path)}
    structure = {name: network[name] for name in ("architecture", "widths", "dataset", "kind") if name in network}
    model, _ = load_network(path)        # loaded again: the tested one was converted to another precision
    trim(model)
    exported = {**structure, **checkpoint.network_of(model, network["architecture"])}
    sizes = sizes_of({**structure, "weights": network["weights"]}, exported)
    if quantization.bits_of(model):
        with files.noted():          # sums may overflow their integers: a note, and the other sizes stay
            del exported["weights"]
            sizes["packed"] = len(integer_inference.packed_bytes(model, exported))
    return sizes if str(path).endswith(".pt") else {"file": os.path.getsize(path), **sizes}


def sizes_of(network, exported):
    """Bytes of the network as a file on disk: in float32, in half precision, and compressed as export.py does."""
    singles = {name: tensor.float() if tensor.is_floating_point() else tensor
               for name, tensor in network["weights"].items()}
    sizes = {"float32": len(checkpoint.bytes_of({**network, "weights": singles}))}
    with files.noted():              # a weight may overflow half precision: a note, and the other sizes stay
        halves = packing.to_half(network["weights"])
        sizes |= {"half": len(checkpoint.bytes_of({**network, "weights": halves})),
                  "compressed": len(checkpoint.compact_bytes(exported))}
    return sizes


def draw_confusion(path, result):
    """Draw the confusion matrix as an image file; rows are the true classes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = [row["name"] for row in result["classes"]]
    matrix = torch.tensor(result["confusion"]).float()
    share = 100 * matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    picture = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="% of the images of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{result['accuracy']:.2f} % of "
             f"{result['images']:,} test images")
    if len(names) <= 20:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row in range(len(names)):
            for column in range(len(names)):
                if matrix[row, column]:
                    axes.text(column, row, f"{int(matrix[row, column])}", ha="center", va="center", fontsize=8,
                              color="white" if share[row, column] > 50 else "black")
    files.save_figure(path, figure)
    plt.close(figure)


def print_result(result):
    """Print the accuracy, the table by class, and the sizes."""
    width = max(14, *(len(row["name"]) + 2 for row in result["classes"]))
    print(f"accuracy {result['accuracy']:.2f} % of {result['images']:,} test images, loss {result['loss']:.4f}, "
          f"{result['seconds']:.1f} s on {result['device']}")
    print(f"{result['precision']}\n\n{'class':{width}}{'images':>8}{'correct':>9}{'accuracy':>10}")
    for row in result["classes"]:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2f} %"
        print(f"{row['name']:{width}}{row['images']:8,}{row['correct']:9,}{accuracy:>10}")
    print("\nbytes on disk: " + ", ".join(f"{name} {size:,}" for name, size in result["bytes"].items()))


def parse(argv):
    """The flags of this script."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run's folder or file, or a compact file (the newest "
                        "run's, else the ResNet-18 that ships)")
    parser.add_argument("--precision", choices=list(quantization.DTYPES), default="half")
    parser.add_argument("--dataset", type=cifar10.named, help="data set (the one the network was trained on)")
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--limit", type=int, help="use at most this many test images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--picture", help="file of the confusion matrix (confusion.png beside a run's checkpoint)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: at least 1 test image is needed")
    return arguments


def main(argv):
    """Test one checkpoint, then print and save the results."""
    arguments = parse(argv)
    device, path = commandline.pick_device(arguments.device), find_checkpoint(arguments.checkpoint)
    compiling.set_up(device)
    if arguments.picture:
        checkpoint.refuse_same(path, arguments.picture, "--picture")
        run_files.refuse_own("--picture", arguments.picture)
    sha256 = files.sha256_of(path) if path.is_file() else None
    model, network = load_network(path, device)
    dataset, kind = data_of(path, network, arguments.dataset)
    if not arguments.json:
        print(f"network: {path}, trained on {network['dataset']}")
    data = cifar10.load(dataset, arguments.data, kind.classes)
    result = {"checkpoint": str(path), "dataset": dataset, "device": commandline.device_name(device),
              **test_network(model, data, kind, arguments.precision, device, arguments.batch_size, arguments.limit),
              "bytes": bytes_of(path, network)}
    print(json.dumps(result)) if arguments.json else print_result(result)
    of_run = run_files.is_result(path) and dataset == network["dataset"] and not arguments.limit
    picture = arguments.picture or (path.parent / "confusion.png" if of_run else None)
    if picture:
        with files.noted():
            draw_confusion(picture, result)
    if of_run:
        run_files.keep_measured(path, sha256, network, "test", result)


if __name__ == "__main__":
    commandline.command(main)
