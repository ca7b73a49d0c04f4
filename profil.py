"""Count parameters and MACs of a network: `python profil.py`, or `python profil.py --model resnet18 --groups 8`.

Prints a table by layer, totals, reductions against dense ResNet-18 and three
scores. Everything is counted from the network itself: its real zeros and real
widths. One multiply-add is one MAC; three columns are never mixed: dense (the
reference), physical (what the network computes) and nominal (what hardware that
skips zeros would compute).

Each layer of a quantized network (`--weights lsq`, or a packed file) counts at the
bit widths stored in the file: a nonzero weight at q_w bits, a MAC at the larger of
q_w and q_a. Batch norm's scale and shift and the biases count as parameters at
`--bits`, 16 by default, as in a float32 network; the quantization steps do not count,
since they can be merged into such a scale. The strict score counts more: a zero
weight takes its integer code or one bit of a bitmask, whichever is smaller for the
layer (both, if 1-bit weights have zeros); batch norm, biases and steps take the 32
bits that they are stored in; and besides the MACs it counts one 32-bit operation for
each element that a layer reads and rounds, and for each that a layer or a batch norm
scales. Residual additions, average pooling and activations are not counted.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import csv
import io
import json
import math
from pathlib import Path

import torch
from torch import nn

import cifar10
import quantization
from deploy import integer_inference
from engine import checkpoint, commandline, files, run_files
from engine.modes import in_mode
from engine.operations import zero_image
from networks import architecture_of, build, check_batch, data_of, image_shape, load_network
from train import DEFAULTS, find_checkpoint

DENSE_PARAMETERS, DENSE_MACS = 11_173_962, 555_422_720    # ResNet-18, groups 1, 10 classes, 32x32
WRN_PARAMETERS, WRN_MACS = 36_479_194, 5_243_328_768      # WRN-28-10, MicroNet's reference for CIFAR-100
PROFILER_PARAMETERS, PROFILER_OPERATIONS = 5_586_981, 834_362_880    # the earlier profiler's reference
COUNTED_AGAIN = {"macs", "nominal_macs", "multiplies", "adds", "scaled"}      # columns summed if a layer runs twice


@torch.no_grad()
def count_layers(model, shape):
    """Return one row per layer that has parameters or counts in a score, in the order of execution.

    shape: (C, H, W) of one image. A layer that runs twice has one row, with the
    operations of both runs. A row has name, kind, parameters, nonzero, sparsity,
    macs, nominal_macs and what the scores need. Only zeros among convolution and
    linear weights count as removed.
    """
    rows, hooks = [], []
    kinds = {nn.Conv2d: convolution_row, nn.Linear: linear_row, nn.BatchNorm2d: norm_row,
             nn.ReLU: activation_row, nn.AvgPool2d: pool_row}
    for name, module in model.named_modules():
        kind = next((row for kind, row in kinds.items() if isinstance(module, kind)), None)
        if kind is None and next(module.parameters(recurse=False), None) is not None:
            kind = other_row
        if kind:
            def hook(layer, inputs, output, name=name, kind=kind):
                row = row_of(name, layer, kind(layer, output), output) | few_bits(layer, inputs[0], output)
                again = next((each for each in rows if each["name"] == name), None)
                if again is None:
                    rows.append(row)
                for counted in COUNTED_AGAIN & row.keys() if again else ():     # its parameters count once
                    again[counted] += row[counted]
            hooks.append(module.register_forward_hook(hook))
    try:
        with in_mode(model):
            model(zero_image(model, shape))
    finally:
        for handle in hooks:
            handle.remove()
    return rows


def row_of(name, layer, specific, output):
    """A layer's row: the columns of every layer, and its `specific` ones (macs, the earlier profiler's terms)."""
    prunable = isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = torch.empty(0) if not prunable else layer.integers() if hasattr(layer, "integers") else layer.weight
    weights, zeros = weight.numel(), int((weight == 0).sum())
    others = others_of(layer) if prunable or hasattr(layer, "integers") else layer.parameters(recurse=False)
    parameters = weight.numel() + sum(tensor.numel() for tensor in others)
    magnitudes = weight[weight != 0].abs() if not hasattr(layer, "integers") else torch.empty(0)
    binary = len(magnitudes) > 1 and bool((magnitudes == magnitudes[0]).all())
    row = {"name": name, "kind": type(layer).__name__, "output": tuple(output.shape[1:]), "parameters": parameters,
           "nonzero": parameters - zeros, "weights": weights, "zero_weights": zeros,
           "binary": binary, "sparsity": zeros / weights if weights else 0.0,
           "macs": 0, "multiplies": 0.0, "adds": 0.0, **specific}
    row["nominal_macs"] = round(row["macs"] * (1 - row["sparsity"]))
    return row


def others_of(layer):
    """A layer's parameters other than weights and quantization steps; of an integer layer, shift and folded scale."""
    if isinstance(getattr(layer, "scale", None), torch.Tensor):
        return ([] if layer.shift is None else [layer.shift]) + ([layer.scale] if layer.folded else [])
    return [tensor for name, tensor in layer.named_parameters(recurse=False)
            if name not in quantization.STEPS and (name != "weight" or tensor.dim() == 1)]


def few_bits(layer, inputs, output):
    """What the strict score needs of a layer: `scaled` elements, `stored` bits and, of a quantized layer, its `bits`.

    {} for a layer that is neither quantized nor a batch norm.
    """
    if isinstance(layer, nn.BatchNorm2d):
        return {"scaled": output.numel(), "stored": 32 * 2 * layer.num_features}
    if not hasattr(layer, "integers"):
        return {}
    weight, bits = layer.integers(), layer.weight_bits
    count, left = weight.numel(), int((weight != 0).sum())
    masked = integer_inference.sparse(count, left, bits)
    others = [tensor for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
              if name not in ("weight", "signed")]
    offset = 1 if hasattr(layer, "low") else 0           # of integer layers it is a plain attribute, not in `others`
    return {"bits": [bits, layer.activation_bits], "scaled": inputs.numel() + output.numel(),
            "stored": (count + left * bits if masked else count * bits)
            + 32 * (offset + sum(tensor.numel() for tensor in others))}


def convolution_row(layer, output):
    """MACs = output elements x kernel elements of one group; the earlier profiler's K = kh kw C_in."""
    each = math.prod(layer.kernel_size) * layer.in_channels
    return {"macs": output.numel() * each // layer.groups, "multiplies": output.numel() * each / layer.groups,
            "adds": output.numel() * ((each - 1) / layer.groups + (layer.bias is not None))}


def linear_row(layer, output):
    """MACs = inputs x outputs, times the number of positions the layer is applied to."""
    macs = layer.in_features * output.numel()
    return {"macs": macs, "multiplies": macs, "adds": macs - (0 if layer.bias is not None else output.numel())}


def other_row(layer, output):
    """Any other layer with parameters: the parameters count, its operations do not."""
    return {}


def norm_row(layer, output):
    """Batch norm: three operations per element in the earlier profiler, no MAC."""
    return {"adds": 3 * output.numel()}


def activation_row(layer, output):
    """A ReLU module: one operation per element in the earlier profiler."""
    return {"adds": output.numel()}


def pool_row(layer, output):
    """Average pooling: k operations per output in the earlier profiler, k the side of the window."""
    size = layer.kernel_size
    return {"adds": output.numel() * (size if isinstance(size, int) else math.prod(size))}


def totals_of(rows, weight_bits=16, activation_bits=16, dataset="cifar10"):
    """All totals and scores as one dictionary.

    Weights of one magnitude (-H, 0, +H) count at one bit, all else at `weight_bits`.
    Reductions are against dense ResNet-18 with 10 classes. score_course: nonzero
    q_w/32 / 5.6e6 + MACs max(q_w, q_a)/32 / 2.8e8 (Efficient Deep Learning, IMT
    Atlantique). score_profiler: its earlier form, with grouped operations counted
    as such. micronet_bytes: MicroNet 2019, one bit per entry of a tensor with
    zeros and q_w bits per stored value. Quantized layers count at their own bits; the
    result then has layer_bits and score_course_strict too, see the top of this file.
    """
    total = {name: sum(row[name] for row in rows)
             for name in ("parameters", "nonzero", "weights", "zero_weights", "macs", "nominal_macs")}
    bits = [weight_bits_of(row, weight_bits) for row in rows]
    value_bits = sum(values_bits(row, weight_bits) for row in rows)
    storage = (value_bits + sum(row["weights"] for row in rows if row["zero_weights"])) / 8
    operations = sum(row["multiplies"] * each / 32 + row["adds"] for row, each in zip(rows, bits, strict=True))
    mac_bits = sum(row["macs"] * (max(row["bits"]) if "bits" in row else max(each, activation_bits))
                   for row, each in zip(rows, bits, strict=True))
    course = value_bits / 32 / 5.6e6, mac_bits / 32 / 2.8e8
    profiler = value_bits / 32 / PROFILER_PARAMETERS, operations / PROFILER_OPERATIONS
    micronet = (storage / (4 * WRN_PARAMETERS), total["macs"] / WRN_MACS)
    result = {"parameters": total["parameters"], "nonzero": total["nonzero"],
              "sparsity": total["zero_weights"] / total["weights"],
              "binary_weights": sum(row["weights"] for row in rows if row["binary"]), "macs": total["macs"],
              "nominal_macs": total["nominal_macs"], "weight_bits": weight_bits, "activation_bits": activation_bits,
              "parameters_removed": 1 - total["nonzero"] / DENSE_PARAMETERS,
              "macs_removed": 1 - total["macs"] / DENSE_MACS,
              "nominal_macs_removed": 1 - total["nominal_macs"] / DENSE_MACS,
              "score_course": sum(course), "score_course_terms": course,
              "score_profiler": sum(profiler), "score_profiler_terms": profiler, "profiler_operations": operations,
              "micronet_bytes": math.ceil(storage)}
    if any("bits" in row for row in rows):
        strict = (sum(row.get("stored", 0) for row in rows) / 32 / 5.6e6,
                  (mac_bits + 32 * sum(row.get("scaled", 0) for row in rows)) / 32 / 2.8e8)
        result |= {"layer_bits": {row["name"]: row["bits"] for row in rows if "bits" in row},
                   "score_course_strict": sum(strict), "score_course_strict_terms": strict}
    if dataset == "cifar100":
        result |= {"score_micronet": sum(micronet), "score_micronet_terms": micronet}
    return result


def weight_bits_of(row, bits):
    """Bits of one layer's weights: its own if it is quantized, one if they are binary, else `bits`."""
    return row["bits"][0] if "bits" in row else 1 if row["binary"] else bits


def values_bits(row, bits):
    """Total bits of one layer's nonzero weights, at their own bits, and other parameters, at `bits` each."""
    left = row["weights"] - row["zero_weights"]
    return left * weight_bits_of(row, bits) + (row["parameters"] - row["weights"]) * bits


def print_table(rows, totals):
    """Print the table by layer, then totals, reductions and scores with their terms."""
    print(f"{'layer':28}{'parameters':>12}{'share':>7}{'nonzero':>11}{'sparsity':>10}{'MACs':>14}{'share':>7}"
          + f"{'bits w/a':>10}" * ("layer_bits" in totals))
    for row in rows:
        if row["parameters"]:
            print(f"{row['name']:28}{row['parameters']:12,}{row['parameters'] / totals['parameters']:7.1%}"
                  f"{row['nonzero']:11,}{row['sparsity']:10.2%}{row['macs']:14,}{row['macs'] / totals['macs']:7.1%}"
                  + (f"{'/'.join(map(str, row['bits'])):>10}" if "bits" in row else ""))
    bits = f"{totals['weight_bits']}-bit weights, {totals['activation_bits']}-bit activations"
    bits += f", {totals['binary_weights']:,} weights of one bit" if totals["binary_weights"] else ""
    if "layer_bits" in totals:
        bits = f"bits by layer as above, batch norm and biases {totals['weight_bits']}"
    first, second = totals["score_course_terms"], totals["score_profiler_terms"]
    print(f"""
                              dense ResNet-18       this network    removed
parameters, physical     {DENSE_PARAMETERS:20,} {totals['parameters']:18,} \
{1 - totals['parameters'] / DENSE_PARAMETERS:10.2%}
parameters, nonzero      {DENSE_PARAMETERS:20,} {totals['nonzero']:18,} {totals['parameters_removed']:10.2%}
MACs, physical           {DENSE_MACS:20,} {totals['macs']:18,} {totals['macs_removed']:10.2%}
MACs, nominal            {DENSE_MACS:20,} {totals['nominal_macs']:18,} {totals['nominal_macs_removed']:10.2%}
sparsity {totals['sparsity']:.2%} of convolution and linear weights; {bits}

score, course    {totals['score_course']:.4f} = {first[0]:.4f} parameters + {first[1]:.4f} MACs
score, profiler  {totals['score_profiler']:.4f} = {second[0]:.4f} parameters + {second[1]:.4f} operations
MicroNet storage {totals['micronet_bytes']:,} bytes, bitmasks included""")
    if "layer_bits" in totals:
        first, second = totals["score_course_strict_terms"]
        print(f"score, strict    {totals['score_course_strict']:.4f} = {first:.4f} parameters + {second:.4f} MACs, "
              "with bitmasks, batch norm, biases, steps and scaling")
    if "score_micronet" in totals:
        third = totals["score_micronet_terms"]
        print(f"score, MicroNet  {totals['score_micronet']:.4f} = {third[0]:.4f} storage + {third[1]:.4f} MACs, "
              "against WRN-28-10")


def write_rows(path, rows):
    """Write the table by layer to `path` as CSV."""
    names = ["name", "kind", "output", "parameters", "nonzero", "sparsity", "macs", "nominal_macs"]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "output": "x".join(map(str, row["output"]))} for row in rows)
    files.write(path, table.getvalue().encode())


def parse(argv):
    """The flags of this script."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run's folder or file, or a compact file (the newest "
                        "run's, else the ResNet-18 that ships)")
    parser.add_argument("--model", metavar="NETWORK", help="count an untrained network of this name instead")
    parser.add_argument("--dataset", type=cifar10.named,
                        help="data set whose images it takes (the one it was trained on; untrained: cifar10)")
    parser.add_argument("--groups", type=int, help="groups of the untrained network (8)")
    parser.add_argument("--classes", type=int, help="classes of the untrained network (the data set's)")
    parser.add_argument("--bits", type=int, nargs="+", default=[16], help="bits of weights, and of activations (16)")
    parser.add_argument("--csv", help="write the table by layer to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if not 1 <= len(arguments.bits) <= 2 or not all(1 <= bits <= 32 for bits in arguments.bits):
        raise ValueError(f"--bits {' '.join(map(str, arguments.bits))}: one or two numbers from 1 to 32")
    if arguments.classes is not None and arguments.classes < 1:
        raise ValueError(f"--classes {arguments.classes}: a network tells one class apart at least")
    if arguments.model and arguments.checkpoint:
        raise ValueError("--model and --checkpoint exclude each other: one network is profiled")
    for name in ("groups", "classes"):
        if getattr(arguments, name) is not None and not arguments.model:
            raise ValueError(f"--{name} is of an untrained network: give its name with --model, or leave it out")
    if arguments.model:
        arguments.dataset = arguments.dataset or "cifar10"
    return arguments


def untrained(arguments):
    """The network that --model names, for images and classes of --dataset."""
    architecture = architecture_of({**DEFAULTS, "dataset": arguments.dataset, "model": arguments.model,
                                    "groups": 8 if arguments.groups is None else arguments.groups, "shuffle": True})
    if arguments.groups is not None and "groups" not in architecture:
        raise ValueError(f"--groups {arguments.groups}: {arguments.model} has no groups; leave it out")
    model = build(**architecture | ({"num_classes": arguments.classes} if arguments.classes else {}))
    check_batch(model, arguments.model, 2, image_shape(cifar10.kind_of(arguments.dataset)))
    with torch.no_grad():                 # zeros of the initialisation must not count as removed
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.normal_()
    return model


def main(argv):
    """Profile a checkpoint or an untrained network."""
    arguments = parse(argv)
    if arguments.csv:
        run_files.refuse_own("--csv", arguments.csv)
        if Path(arguments.csv).is_dir():
            raise ValueError(f"--csv {arguments.csv} is a folder; name a file")
        cifar10.check_folder(Path(arguments.csv).parent)
    if arguments.model:
        model, source = untrained(arguments), "untrained"
        dataset = "cifar100" if (arguments.dataset, arguments.classes) == ("cifar10", 100) else arguments.dataset
        kind = cifar10.kind_of(dataset)
    else:
        source = find_checkpoint(arguments.checkpoint)
        if arguments.csv:
            checkpoint.refuse_same(source, arguments.csv, "--csv")
        sha256 = files.sha256_of(source) if Path(source).is_file() else None
        model, state = load_network(source)
        dataset, kind = data_of(source, state, arguments.dataset)
    height, width, channels = kind.shape
    rows = count_layers(model, (channels, height, width))
    totals = totals_of(rows, arguments.bits[0], arguments.bits[-1], dataset)
    if arguments.json:
        print(json.dumps({"network": arguments.model or str(source), **totals}))
    else:
        print(f"network: {f'{arguments.model}, ' if arguments.model else ''}{source}")
        print_table(rows, totals)
    if not arguments.model and set(arguments.bits) == {16} and run_files.is_result(source):
        layers = [{name: row[name] for name in ("name", "weights", "zero_weights")} for row in rows if row["weights"]]
        run_files.keep_measured(source, sha256, state, "profile",
                                {**totals, "layers": layers, "checkpoint": str(source)})
    if arguments.csv:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    commandline.command(main)
