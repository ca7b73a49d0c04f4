"""Data-parallel training: several processes train one network, each on its part of every batch.

    torchrun --nproc-per-node 2 train_pruning.py --batch-size 128        # the global batch: 64 images in each process
    commandline.command(together(main))                                  # the last line of a script

Every rank holds the same network and the same generator, so that all draw, augment
and mix the same whole batch. Each then trains on its slice; batch norm uses the
statistics of the whole batch, and gradients are averaged. All ranks thus make the same
update as a single process would, up to rounding, whatever their number: a run can be
resumed with another number of processes. Only rank 0 prints and writes. Without torchrun
this module has no effect.
"""
import os
import signal
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def ranks():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def leads():
    """Whether this process is the one that prints and writes."""
    return ranks() == 1 or dist.get_rank() == 0


# ---- from start to end

def together(main):
    """`main(argv)` for the processes of torchrun: joins them in a group; only rank 0 prints, only one reports an error.

    Uses gloo on a CPU, nccl between GPUs. Without torchrun, or with one process, returns `main` itself.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or os.environ["WORLD_SIZE"] == "1":
        return main

    def joined(argv):
        """`main` between joining and leaving the other processes."""
        import torch.distributed.nn  # noqa: F401  imported later, its defaults would keep the group beyond its end
        store, rank, count = next(dist.rendezvous("env://"))      # torchrun's store, which outlives all ranks
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                                world_size=count)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank else nullcontext():
                main(argv)
            wait()
        except (Exception, KeyboardInterrupt) as problem:
            if not first_to_fail(store, rank, problem):
                sys.exit(1)
            raise
        dist.destroy_process_group()
    return joined


def first_to_fail(store, rank, problem):
    """Whether this rank is the first to fail and reports its error; errors of later ranks follow from the first.

    Ctrl-C is reported by rank 0, after it has finished saving.
    """
    if rank and isinstance(problem, KeyboardInterrupt):
        with suppress(RuntimeError):                     # no answer in five seconds: rank 0 hangs or has ended
            store.wait(["failed"], timedelta(seconds=5))
    if store.add("failed", 1) > 1:
        return False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)        # torchrun terminates all ranks as soon as one has ended
    return True


def refuse(batch_size, reasons):
    """ValueError for settings that several processes cannot train with; reasons: from `settings.alone`."""
    if ranks() == 1:
        return
    if batch_size % ranks():
        raise ValueError(f"--batch-size {batch_size} is no multiple of {ranks()} processes, "
                         "which share each batch evenly")
    if reasons:
        raise ValueError(reasons[0])


def own_device(device, wanted):
    """The device of this rank, if all are to train on `device`; wanted: the value of --device.

    ValueError if there are fewer GPUs than processes, or for a device that cannot be shared.
    """
    if ranks() == 1 or device.type == "cpu":
        return device
    own, present = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if wanted not in ("auto", "cuda") or device.type != "cuda":
        raise ValueError(f"--device {wanted}: several processes train with cuda, one GPU each, or with cpu")
    if int(os.environ["LOCAL_WORLD_SIZE"]) > present:
        raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes need as many GPUs; present: {present}; "
                         "--device cpu needs none")
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


# ---- agreement

def wait():
    """Barrier: wait until all ranks are here."""
    if ranks() > 1:
        dist.all_reduce(torch.zeros(1))


def agreed(value):
    """Rank 0's `value`, of plain types, so that all ranks decide alike."""
    if ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


@contextmanager
def leader_first():
    """A block that the other ranks enter after rank 0 has left it, so that they find the files it wrote."""
    if not leads():
        wait()
    yield
    if leads():
        wait()


def refuse_drift(models):
    """RuntimeError if the ranks no longer hold the same weights and buffers."""
    if ranks() == 1:
        return
    sums = torch.stack([tensor.double().sum() for model in models for tensor in model.state_dict().values()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError("the processes hold different weights; all need the same GPUs and versions")


# ---- one step

def own_part(*tensors):
    """This rank's slice of each tensor along the first dimension, which is divided evenly among the ranks."""
    if ranks() == 1:
        return tensors
    count = len(tensors[0]) // ranks()
    begin = dist.get_rank() * count
    return tuple(tensor[begin:begin + count] for tensor in tensors)


@torch.no_grad()
def average_gradients(model, loss, correct):
    """Average the gradients over the ranks, in place. Returns the mean of `loss` and the sum of `correct`, scalars.

    A single all_reduce: the results are the same on every rank, and so is whether they are finite.
    """
    if ranks() == 1:
        return loss, correct
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([tensor.reshape(-1) for tensor in (*gradients, loss, correct)])
    dist.all_reduce(flat)
    flat[:-1] /= ranks()
    parts = flat.split([tensor.numel() for tensor in (*gradients, loss, correct)])
    torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=False)])
    return flat[-2], flat[-1]


def whole_batch():
    """A context in which batch norm, in training, uses the statistics over the batches of all ranks.

    The layers are not replaced. (nn.SyncBatchNorm would replace them, and needs CUDA.)
    """
    return nullcontext() if ranks() == 1 else WholeBatch()


class WholeBatch(TorchFunctionMode):
    """Redirects each call of `F.batch_norm` to `batch_norm`."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        return (batch_norm if function is F.batch_norm else function)(*arguments, **(named or {}))


def batch_norm(images, running_mean, running_var, weight, bias, training, momentum, eps):
    """`F.batch_norm` with mean and variance over the equally large batches of all ranks; images: (N, C, ...) float.

    One all_reduce in the forward and one in the backward pass, of a mean and a mean square per channel.
    """
    if not training:
        return F.batch_norm(images, running_mean, running_var, weight, bias, training, momentum, eps)
    dimensions, shape = [0, *range(2, images.dim())], [1, -1] + [1] * (images.dim() - 2)
    variance, mean = (part.double() for part in torch.var_mean(images.float(), dimensions, correction=0))
    mean, square = MeanOfRanks.apply(torch.stack([mean, variance + mean.square()]))
    variance = square - mean.square()
    count = ranks() * images.numel() // images.shape[1]
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    scale = weight * (variance + eps).rsqrt().float()
    return ((images.float() - mean.float().view(shape)) * scale.view(shape) + bias.view(shape)).to(images.dtype)


class MeanOfRanks(torch.autograd.Function):
    """The mean of a tensor over the ranks; its gradient is the mean of the gradients over the ranks."""

    @staticmethod
    def forward(context, tensor):
        return mean_of_ranks(tensor)

    @staticmethod
    def backward(context, gradient):
        return mean_of_ranks(gradient)


def mean_of_ranks(tensor):
    """The mean of a tensor over the ranks, as a new tensor."""
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total / ranks()
