"""How a network computes: compiled where that pays, grouped convolutions in the faster form; timed before a run.

    forward, speed, note = choose_forward(model, "auto", images, (64, 3, 32, 32), torch.float32, device)

Nothing here leaves a trace in what a model holds: its weights, buffers and
gradients, and every random generator, are afterwards as they were.
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

WORTH_COMPILING = 30_000      # training images, below which compiling costs more time than it saves


def choose_forward(model, wanted, images, shape, autocast, device, layout=torch.channels_last):
    """(what to call in place of the model, training images a second, a note for people).

    wanted: "on", "off" or "auto", which compiles where a C++ compiler is there
    and the run trains on enough `images`. shape, layout: (N, C, H, W) of a batch
    and how it lies in memory. autocast: a context manager for the forward pass.
    ValueError for "on" without a compiler, RuntimeError where compiling then fails.
    """
    # a small batch would tell a GPU's launches alone
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
    except Exception as problem:          # its backends fail in many types
        reason = f"torch.compile failed: {(str(problem).strip() or type(problem).__name__).splitlines()[0]}"
        if wanted == "on":
            raise RuntimeError(reason) from None
        return model, time_steps(model, model, tried, *how), f"eager ({reason})"


def again(model, forward):
    """What to call in place of a model whose shapes have changed: compiled anew where it was compiled."""
    if forward is model:
        return model
    torch._dynamo.reset()                 # the graphs of the old shapes are of no more use
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
    """torch.bfloat16 or torch.float32: what forward and backward passes compute in. Weights stay float32.

    wanted: "float32", "bfloat16", or "auto": bfloat16 on CUDA, and on a CPU that has
    instructions for it where the run trains on enough `images`; depthwise convolutions
    are slower so without AMX, and with it faster (engine/separable.py). began: of a run
    that goes on, what it computed in so far; auto stays there, unless this CPU would only
    simulate it.
    """
    if wanted == "auto" and began and (began == "float32" or device.type != "cpu" or has_bfloat16()):
        wanted = began
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16
    depthwise = any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in model.modules())
    pays = device.type == "cpu" and images >= WORTH_COMPILING and (has_amx() if depthwise else has_bfloat16())
    return torch.bfloat16 if pays else torch.float32


def has_bfloat16():
    """Whether this CPU multiplies in bfloat16; one that only simulates it is slow."""
    return any(cpu_instructions().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_amx():
    """Whether this CPU multiplies matrices in bfloat16."""
    return bool(cpu_instructions().get("amx_bf16"))


def retype(model, kinds, kind_of):
    """Where the CPU has AMX, make each plain convolution of a model, and each of `kinds`, what `kind_of` says it is.

    kinds: classes of convolutions; kind_of(layer): one of them, or nn.Conv2d. Weights keep their names and shapes. A
    layer that has lost channels since is of the kind that it would be in a resumed run.
    """
    if has_amx():
        for layer in model.modules():
            if type(layer) in (nn.Conv2d, *kinds):
                layer.__class__ = kind_of(layer)


def trains_in_bfloat16(layer, images):
    """Whether this pass is one of training, in bfloat16, on a CPU, and the layer's weight learns."""
    return (images.is_cpu and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
            and layer.weight.requires_grad)


def cpu_instructions():
    """{name: whether this CPU has them} of sets of instructions; {} where torch is too old to tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


# ---- grouped convolutions

class BlockDiagonalConv2d(nn.Conv2d):
    """A grouped convolution that computes as a dense one; its weight and all that is read of it stay grouped."""

    def forward(self, images):
        return F.conv2d(images, block_diagonal(self.weight, self.groups), self.bias, self.stride, self.padding,
                        self.dilation)


def block_diagonal(weight, groups):
    """The weight of a grouped convolution, (O, I / groups, H, W), as that of the dense one it is, (O, I, H, W).

    It lies in memory as channels_last, in which the run that computes so has its images.
    """
    outputs, inside, *kernel = weight.shape
    blocks = weight.permute(0, 2, 3, 1).reshape(groups, -1, *kernel, 1, inside)
    own = torch.eye(groups, dtype=weight.dtype, device=weight.device).view(groups, 1, 1, 1, groups, 1)
    return (blocks * own).reshape(outputs, *kernel, -1).permute(0, 3, 1, 2)


def grouped_layers(model):
    """Its convolutions of floats with groups, the depthwise ones apart."""
    return [layer for layer in model.modules()
            if type(layer) in (nn.Conv2d, BlockDiagonalConv2d) and 1 < layer.groups < layer.in_channels
            and layer.padding_mode == "zeros"]


def compute_as(model, form):
    """Let the grouped convolutions of `model` compute in a form: "grouped", or "dense", with `groups` times the MACs.

    Dense ones do more in fewer and larger products, which a GPU is better at.
    Outputs and gradients agree to rounding; weights keep their names and shapes.
    """
    for layer in model.modules():              # one that has shrunk to a channel a group is depthwise now
        if type(layer) is BlockDiagonalConv2d:
            layer.__class__ = nn.Conv2d
    for layer in grouped_layers(model):
        layer.__class__ = {"dense": BlockDiagonalConv2d, "grouped": nn.Conv2d}[form]


def fastest_form(speeds, margin=1.05):
    """Of {form: images a second} the fastest; another than "grouped" must be faster by more than noise."""
    return max(speeds, key=lambda form: speeds[form] * (margin if form == "grouped" else 1))


def forms_of(wanted, model, device):
    """The forms to choose between by time: the `wanted` one, or for "auto" both, where there is a GPU to do more on."""
    if not grouped_layers(model):
        return ["grouped"]
    if wanted != "auto":
        return [wanted]
    return ["grouped", "dense"] if device.type == "cuda" else ["grouped"]


class UncountedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that does not count its batches in training: nothing reads that while a momentum is set."""

    def forward(self, images):
        if not self.training or self.momentum is None:
            return super().forward(images)
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum,
                            self.eps)


def lay_out(model, layout, form):
    """Make `model` compute in a `form` (`compute_as`), in a memory layout, without counting batches; returns it.

    Again after layers were replaced or cut: fresh ones are plain and contiguous.
    """
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = UncountedBatchNorm2d
    compute_as(model, form)
    return model.to(memory_format=layout)


def set_up(device):
    """How torch computes on a device from now on, in every script: exact sums, and memory that is kept.

    On CUDA convolutions in float32 would otherwise take TF32, of 10 bits, and kernels whose sums differ from call to
    call. On a CPU see `keep_freed_memory`.
    """
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory():
    """Let glibc keep what is freed for the next step, instead of giving it back and faulting it in anew.

    On Linux CPUs the activations of every step otherwise cost some hundred
    thousand page faults. Returns whether the C library took the setting.
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
    """Images a second of a forward and backward pass on noise, after one that compiles and warms up.

    On a GPU the fastest of three rows of steps without a wait between them: one
    step alone would tell its latency, which is not what a run is made of. RuntimeError
    where what is called in place of `model` computes something else, see `refuse_wrong`.
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
    finally:                              # also where compiling has failed in the backward pass
        model.zero_grad(set_to_none=True)
        model.load_state_dict(kept)


def take_gradient(model):
    """The Euclidean norm of all gradients together, which are then gone."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    model.zero_grad(set_to_none=True)
    return norm


def refuse_wrong(found, expected):
    """RuntimeError where a compiled step's (loss an image, norm of its gradients) are not finite, or far from eager's.

    torch 2.14 compiles some networks with GELU in bfloat16 to gradients that are NaN. Norms are compared, because
    rounding to bfloat16 alone turns a gradient: MobileNet's by more than its length, while its norm changes by 5 %.
    """
    (loss, gradient), (eager_loss, eager_gradient) = found, expected
    if not math.isfinite(eager_loss + eager_gradient):
        return                            # the network itself is broken, which training tells
    if not math.isfinite(loss + gradient):
        raise RuntimeError(f"its {'loss is' if math.isfinite(gradient) else 'gradients are'} not finite")
    if abs(loss - eager_loss) > 0.25 * (1 + abs(eager_loss)):
        raise RuntimeError(f"its loss is {loss:.4g} where eager's is {eager_loss:.4g}")
    if not eager_gradient / 2 <= gradient <= 2 * eager_gradient:
        raise RuntimeError(f"its gradients have a norm of {gradient:.4g} where eager's have {eager_gradient:.4g}")


# ---- the time of anything that is called again and again

def time_repeats(forward, images, repeats, seconds, device):
    """(calls in a repeat, the seconds that a call takes in each of so many repeats of about `seconds`), warmed up.

    A call that takes more than four times `seconds` is repeated twice and no more.
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
    """Seconds that so many calls take."""
    synchronise(device)
    begun = time.perf_counter()
    for _ in range(calls):
        forward(images)
    synchronise(device)
    return time.perf_counter() - begun


def synchronise(device):
    """Wait for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values):
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
