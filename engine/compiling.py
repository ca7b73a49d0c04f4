"""How a network computes: compiled where that pays, grouped convolutions in the faster form; timed before a run.

    forward, speed, note = choose_forward(model, "auto", images, (64, 3, 32, 32), autocast(device, dtype), device)

The timing here changes nothing in a model: its weights, buffers and gradients, and all
random generators, are afterwards as they were.
"""
import ctypes
import logging
import math
import os
import shutil
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

WORTH_COMPILING = 30_000      # with fewer training images compiling costs more time than it saves


def choose_forward(model, wanted, images, shape, autocast, device, layout=torch.channels_last):
    """(function to call in place of the model, training images a second, a note that says which and why).

    wanted: "on", "off" or "auto", which compiles if there is a C++ compiler and the run
    trains on enough `images`. shape, layout: (N, C, H, W) of a batch and its memory format.
    autocast: a context manager for the forward pass. ValueError for "on" without a
    compiler, RuntimeError for "on" if compiling fails.
    """
    # on a GPU a small batch would only measure the launch of kernels
    tried = shape if device.type == "cuda" else (min(16, shape[0]), *shape[1:])
    how, reason = (autocast, device, layout), why_eager(wanted, images)
    if reason:
        return model, time_steps(model, model, tried, *how), f"eager ({reason})"
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    begun = time.perf_counter()           # importing the compiler counts too
    try:
        forward = torch.compile(model, dynamic=False)
        speed = time_steps(model, forward, shape, *how)
        return forward, speed, f"compiled in {time.perf_counter() - begun - shape[0] / speed:.0f} s"
    except Exception as problem:          # its backends raise many types
        reason = f"torch.compile failed: {(str(problem).strip() or type(problem).__name__).splitlines()[0]}"
        if wanted == "on":
            raise RuntimeError(reason) from None
        return model, time_steps(model, model, tried, *how), f"eager ({reason})"


def again(model, forward):
    """The function to call in place of a model whose shapes have changed, compiled again if it was compiled."""
    if forward is model:
        return model
    torch._dynamo.reset()                 # the graphs of the old shapes are useless now
    return torch.compile(model, dynamic=False)


def why_eager(wanted, images):
    """The reason not to compile, or None. ValueError for "on" without a compiler."""
    if wanted == "off":
        return "asked for"
    if not find_compiler():
        if wanted == "on":
            raise ValueError("--compile on needs a C++ compiler (g++ or clang++, or CXX); none was found")
        return "no C++ compiler found"
    if wanted == "auto" and images < WORTH_COMPILING:
        return "too short a run to compile"
    return None


def choose_arithmetic(wanted, model, images, device, began=None):
    """torch.bfloat16 or torch.float32: the data type of forward and backward passes. Weights stay float32.

    wanted: "float32", "bfloat16", or "auto": bfloat16 on CUDA, and on a CPU that is faster
    in it (`multiplies_bfloat16_faster`) if the run trains on enough `images`; a network with
    depthwise convolutions is faster in bfloat16 only on a CPU with AMX (engine/separable.py).
    began: the data type of a resumed run so far; "auto" keeps it, unless this CPU could only
    simulate it.
    """
    if wanted == "auto" and began and (began == "float32" or device.type != "cpu" or has_bfloat16()):
        wanted = began
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16
    depthwise = any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in model.modules())
    if device.type != "cpu" or images < WORTH_COMPILING or (depthwise and not has_amx()):
        return torch.float32
    return torch.bfloat16 if multiplies_bfloat16_faster() else torch.float32


def multiplies_bfloat16_faster():
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32.

    With AMX it does. With other instructions for bfloat16 some CPUs are slower than in float32, such as a Xeon in a
    virtual machine that hides its AMX; so without AMX a product is timed.
    """
    return has_amx() or (has_bfloat16() and product_seconds(torch.bfloat16) < product_seconds(torch.float32))


def product_seconds(arithmetic, side=512, repeats=8):
    """The fewest seconds that a product of two square matrices of `side` takes in an arithmetic, a torch.dtype."""
    matrix = torch.ones(side, side, dtype=arithmetic)
    return min(time_calls(matrix.matmul, matrix, 1, matrix.device) for _ in range(repeats))


def has_bfloat16():
    """Whether this CPU has bfloat16 instructions; one that only simulates them is slow."""
    return any(cpu_instructions().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_amx():
    """Whether this CPU has instructions for matrix products in bfloat16 (AMX)."""
    return bool(cpu_instructions().get("amx_bf16"))


def retype(model, kinds, kind_of):
    """On CPUs with AMX, set the class of each convolution that is plain or one of `kinds` to `kind_of(layer)`.

    kinds: classes of convolutions; kind_of(layer): one of them, or nn.Conv2d. Weights keep their names and shapes.
    Layers that have lost channels are set again, so that a resumed run has the same classes.
    """
    if has_amx():
        for layer in model.modules():
            if type(layer) in (nn.Conv2d, *kinds):
                layer.__class__ = kind_of(layer)


def trains_in_bfloat16(layer, images):
    """Whether this is a training pass in bfloat16 on a CPU, and the layer's weight is trained."""
    return (images.is_cpu and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
            and layer.weight.requires_grad)


def cpu_instructions():
    """{name of an instruction set: whether this CPU has it}; {} if torch is too old to tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


# ---- grouped convolutions

class BlockDiagonalConv2d(nn.Conv2d):
    """A grouped convolution that computes as a dense one; its weight and attributes stay those of a grouped one."""

    def forward(self, images):
        return F.conv2d(images, block_diagonal(self.weight, self.groups), self.bias, self.stride, self.padding,
                        self.dilation)


def block_diagonal(weight, groups):
    """The weight of a grouped convolution, (O, I / groups, H, W), as that of the equivalent dense one, (O, I, H, W).

    Its memory format is channels_last, like that of the images in runs that use this form.
    """
    outputs, inside, *kernel = weight.shape
    blocks = weight.permute(0, 2, 3, 1).reshape(groups, -1, *kernel, 1, inside)
    own = torch.eye(groups, dtype=weight.dtype, device=weight.device).view(groups, 1, 1, 1, groups, 1)
    return (blocks * own).reshape(outputs, *kernel, -1).permute(0, 3, 1, 2)


def grouped_layers(model):
    """The grouped convolutions of `model`, without quantized and depthwise ones."""
    return [layer for layer in model.modules()
            if type(layer) in (nn.Conv2d, BlockDiagonalConv2d) and 1 < layer.groups < layer.in_channels
            and layer.padding_mode == "zeros"]


def compute_as(model, form):
    """Let the grouped convolutions of `model` compute in a form: "grouped", or "dense", with `groups` times the MACs.

    The dense form computes more, but in fewer and larger products, which suit a GPU.
    Outputs and gradients agree to rounding; weights keep their names and shapes.
    """
    for layer in model.modules():              # one pruned to one channel per group is depthwise now
        if type(layer) is BlockDiagonalConv2d:
            layer.__class__ = nn.Conv2d
    for layer in grouped_layers(model):
        layer.__class__ = {"dense": BlockDiagonalConv2d, "grouped": nn.Conv2d}[form]


def fastest_form(speeds, margin=1.05):
    """The fastest form in {form: images a second}; "dense" must be faster than "grouped" by more than `margin`."""
    return max(speeds, key=lambda form: speeds[form] * (margin if form == "grouped" else 1))


def forms_of(wanted, model, device):
    """The forms to time and choose from: only the `wanted` one, or for "auto" both on a GPU and "grouped" on a CPU."""
    if not grouped_layers(model):
        return ["grouped"]
    if wanted != "auto":
        return [wanted]
    return ["grouped", "dense"] if device.type == "cuda" else ["grouped"]


class UncountedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that does not update num_batches_tracked in training: with a momentum nothing reads it."""

    def forward(self, images):
        if not self.training or self.momentum is None:
            return super().forward(images)
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum,
                            self.eps)


def lay_out(model, layout, form):
    """Set form (`compute_as`) and memory layout of `model`, and use `UncountedBatchNorm2d`; returns the model.

    Call it again after layers were replaced or cut: new layers are plain and contiguous.
    """
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = UncountedBatchNorm2d
    compute_as(model, form)
    return model.to(memory_format=layout)


def set_up(device):
    """Configure torch for a device, in every script: reproducible float32 on CUDA, freed memory kept on a CPU.

    On CUDA float32 convolutions would otherwise use TF32, with a mantissa of 10 bits, and kernels whose sums differ
    from call to call. On a CPU see `keep_freed_memory`.
    """
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory():
    """Let glibc keep freed memory for the next step, instead of returning it to the system.

    On Linux CPUs the activations of every step otherwise cost some hundred
    thousand page faults. Returns whether the C library accepted the setting.
    """
    no_mmap, trim, pad = (-4, 0), (-1, 2**31 - 1), (-2, 2**28)      # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(*option) for option in (no_mmap, trim, pad))


def find_compiler():
    """The C++ compiler that torch.compile would call, or None."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def time_steps(model, forward, shape, autocast, device, layout=torch.channels_last):
    """Images a second of a forward and backward pass on noise, after one pass that compiles and warms up.

    On a GPU the fastest of three series of steps without synchronisation in between: a
    single step would measure latency, not throughput. RuntimeError if `forward` computes
    something else than `model`, see `refuse_wrong`.
    """
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).contiguous(memory_format=layout)
    rows, steps = (3, 30) if device.type == "cuda" else (1, 1)

    def step(images, called=forward):
        with autocast:
            logits = called(images)
        loss = logits.float().logsumexp(1).sum()
        loss.backward()
        return loss.detach() / len(images)
    model.train()
    try:
        loss = step(noise)
        if forward is not model:
            found = loss.item(), take_gradient(model)
            refuse_wrong(found, (step(noise, model).item(), take_gradient(model)))
        return shape[0] * steps / min(time_calls(step, noise, steps, device) for _ in range(rows))
    finally:                              # also if compiling has failed in the backward pass
        model.zero_grad(set_to_none=True)
        model.load_state_dict(kept)


def take_gradient(model):
    """The Euclidean norm of all gradients together; clears the gradients."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    model.zero_grad(set_to_none=True)
    return norm


def refuse_wrong(found, expected):
    """RuntimeError if (loss per image, norm of the gradients) of a compiled step are not finite, or far from eager's.

    torch 2.14 compiles some networks with GELU in bfloat16 to gradients that are NaN. Norms are compared, because
    rounding to bfloat16 alone changes a gradient's direction: the difference is larger than MobileNet's gradient
    itself, while the norm changes by 5 %.
    """
    (loss, gradient), (eager_loss, eager_gradient) = found, expected
    if not math.isfinite(eager_loss + eager_gradient):
        return                            # the network itself is broken; training will report it
    if not math.isfinite(loss + gradient):
        raise RuntimeError(f"its {'loss is' if math.isfinite(gradient) else 'gradients are'} not finite")
    if abs(loss - eager_loss) > 0.25 * (1 + abs(eager_loss)):
        raise RuntimeError(f"its loss is {loss:.4g} where eager's is {eager_loss:.4g}")
    if not eager_gradient / 2 <= gradient <= 2 * eager_gradient:
        raise RuntimeError(f"its gradients have a norm of {gradient:.4g} where eager's have {eager_gradient:.4g}")


# ---- timing of repeated calls

def time_repeats(forward, images, repeats, seconds, device):
    """(calls per repeat, [seconds per call in each repeat]), for repeats of about `seconds`, after a warm-up.

    If one call takes more than four times `seconds`, there are at most two repeats.
    """
    forward(images)
    first = time_calls(forward, images, 1, device)
    calls = max(1, int(seconds / first))
    if first > 4 * seconds:
        repeats = min(repeats, 2)
    else:
        time_calls(forward, images, calls, device)       # warms up
    return calls, [time_calls(forward, images, calls, device) / calls for _ in range(repeats)]


def time_calls(forward, images, calls, device):
    """Seconds that `calls` calls take."""
    synchronise(device)
    begun = time.perf_counter()
    for _ in range(calls):
        forward(images)
    synchronise(device)
    return time.perf_counter() - begun


def synchronise(device):
    """Wait until a GPU has finished all work launched so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values):
    """{"median", "min", "max"} of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
