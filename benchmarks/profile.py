"""Profile training: `python benchmark.py profile` shows where the time of a train.py step goes (torch.profiler).

Prints the time by kind of kernel, the slowest kernels by name, and the throughput of the
convolutions next to that of a large matrix product in the same arithmetic. On a GPU also
the share of the time in which it computes; the rest of the time it waits for the host.
--json writes the numbers. Recording slows training down; `benchmark.py training` measures
the speed without it.
"""
import json
import os
import re
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import cifar10
import profil
import train
from benchmarks import training
from engine import commandline, compiling, files, run_files

KINDS = {         # the first pattern that matches a kernel's name decides
    "batch norm, activations, additions": r"cpp_fused|triton_|batch_norm|relu|clamp_min|threshold_backward",
    "convolutions and products": r"conv|gemm|cutlass|xmma|fprop|[dw]grad|addmm|::mm$",
    "update of weights and average": r"Optimizer|foreach|multi_tensor|lerp",
}
REST = "images, loss, Python and the rest"
SIDE = 2048       # rows and columns of the matrices multiplied for comparison


def kind_of(name):
    """The kind in KINDS that a kernel or operator belongs to, or REST."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def record(run, steps):
    """(seconds, kernels) of `steps` training steps after five for warm-up; kernels: {name: seconds without callees}.

    On a GPU its kernels, elsewhere the CPU's operators.
    """
    batches, cuda = training.endless(run.train), run.device.type == "cuda"
    run.model.train()
    take_steps(run, batches, 5)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        begun = time.perf_counter()
        take_steps(run, batches, steps)
        seconds = time.perf_counter() - begun
    kernels = {}
    for event in profiler.key_averages():
        if not cuda:
            taken = event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            taken = event.self_device_time_total
        else:
            continue
        kernels[event.key] = kernels.get(event.key, 0) + taken / 1e6
    return seconds, kernels


def take_steps(run, batches, steps):
    """Train for `steps` steps and wait for the device."""
    for step, (images, labels) in enumerate(islice(batches, steps)):
        train.train_step(run, *train.as_step_takes(run, images, labels), step)
    compiling.synchronise(run.device)


def product_speed(dtype, device):
    """Operations per second of a product of two square matrices, the median of at most five repeats."""
    one, other = torch.randn(2, SIDE, SIDE, device=device).to(dtype)
    _, seconds = compiling.time_repeats(one.matmul, other, 5, 0.2, device)
    return 2 * SIDE ** 3 / statistics.median(seconds)


def summary_of(run, seconds, kernels, images, macs):
    """The summary of a recording that --json writes. images: of all its steps; macs: of one image's forward pass.

    A training step runs each convolution three times: forward, and backward for inputs and for weights.
    """
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    for name, taken in kernels.items():
        kinds[kind_of(name)] += taken
    busy = sum(kinds.values()) / seconds
    if run.device.type != "cuda":
        kinds[REST] += max(0.0, seconds - sum(kinds.values()))
    convolutions = kinds["convolutions and products"]
    speed, reference = 3 * 2 * macs * images / convolutions, product_speed(run.dtype, run.device)
    return {"kind": run.device.type, "images_per_second": images / seconds, "busy": busy,
            "shares": {kind: taken / seconds for kind, taken in kinds.items()},
            "convolutions_gflops": speed / 1e9, "product_gflops": reference / 1e9,
            "slowest": {name: kernels[name] / seconds for name in sorted(kernels, key=kernels.get, reverse=True)[:10]},
            "bound": bound_of(run.device, busy, kinds)}


def bound_of(device, busy, kinds):
    """The part of a step that limits the speed most."""
    if device.type == "cuda" and busy < 0.8:
        return "the host, which launches kernels more slowly than the GPU computes them"
    return max(kinds, key=kinds.get)


def print_summary(summary):
    """Print the summary."""
    print(f"{summary['images_per_second']:.0f} images a second while recorded, {summary['how']}, {summary['device']}\n")
    for title in ("shares", "slowest"):
        for name, share in summary[title].items():
            print(f"{share:7.1%}  {name[:100]}")
        print()
    print(f"convolutions: {summary['convolutions_gflops']:.0f} GFLOP/s; a matrix product of {SIDE} x {SIDE}: "
          f"{summary['product_gflops']:.0f} GFLOP/s")
    if summary["kind"] == "cuda":
        print(f"the GPU computes {summary['busy']:.0%} of the time")
    print(f"bound by: {summary['bound']}")


def parse(argv):
    """The flags of this benchmark."""
    parser = commandline.Parser(prog="benchmark.py profile", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=cifar10.named, default="cifar10", help="data set to train on (cifar10)")
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--steps", type=int, default=20, help="number of training steps to record (20)")
    parser.add_argument("--recipe", choices=["ours", *train.RECIPES], default="ours")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--json", help="write the numbers to this file, such as results/training_profile.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        raise ValueError("--steps must be at least 1")
    return arguments


def main(argv):
    """Train a few steps, record, print, write."""
    arguments = parse(argv)
    if arguments.json:
        run_files.check_target(arguments.json)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                # else the recorder warns of every missing GPU
    if commandline.pick_device(arguments.device).type == "cpu":
        from torch._inductor import config
        config.cpp.enable_kernel_profile = True                    # records compiled kernels by name
    run, how = training.make_run({"recipe": arguments.recipe}, arguments)
    height, width, channels = cifar10.kind_of(arguments.dataset).shape
    macs = sum(row["macs"] for row in profil.count_layers(run.model, (channels, height, width)))
    seconds, kernels = record(run, arguments.steps)
    summary = {"device": commandline.device_name(run.device), "torch": torch.__version__, "how": how,
               "steps": arguments.steps, "batch_size": run.settings["batch_size"],
               **summary_of(run, seconds, kernels, arguments.steps * run.settings["batch_size"], macs)}
    print_summary(summary)
    if arguments.json:
        files.write(Path(arguments.json), (json.dumps(summary, indent=1) + "\n").encode())

