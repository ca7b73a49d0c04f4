"""Store weights in fewer bytes: half precision or 8 bits, zeros as one bit each, weights of equal magnitude as signs.

    packed = compact(weights)                   # {name: tensor, or a dictionary of what rebuilds it}
    weights = expand({"weights": packed})["weights"]

A compact file is an archive of packed weights, compressed (`checkpoint.save_compact`).
"""
import math

import numpy as np
import torch


def compact(weights, eight_bits=False):
    """{name: tensor} in half precision, with tensors of more than one dimension packed, see `pack`.

    eight_bits: pack these in 8 bits. Raises ValueError with the tensors whose values half
    precision cannot hold.
    """
    return {name: pack(tensor, eight_bits) if is_weight(tensor) else tensor
            for name, tensor in to_half(weights).items()}


def to_half(weights):
    """Round floating-point tensors to half precision; ValueError with the names of those that overflow it."""
    refuse_overflow(weights, torch.float16)
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def to_eight_bits(weights):
    """The weights read back from an 8-bit compact file: `to_half`, tensors of more than one dimension in 8 bits."""
    return {name: from_codes(*codes_of(tensor)) if is_weight(tensor) else tensor
            for name, tensor in to_half(weights).items()}


def is_weight(tensor):
    """Whether a tensor is packed: floating-point with more than one dimension, like the weights of layers."""
    return tensor.is_floating_point() and tensor.dim() > 1


def codes_of(tensor):
    """(int8 from -127 to 127, shaped like the tensor; a float32 step for each row: its largest magnitude / 127).

    A row makes one output of a layer, so its step is a factor of that output.
    """
    rows = tensor.float().flatten(1)
    largest = rows.abs().amax(1) if rows.numel() else torch.zeros(len(rows))
    steps = torch.where(largest > 0, largest / 127, 1.0)
    return (rows / steps[:, None]).round().clamp(-127, 127).to(torch.int8).view(tensor.shape), steps


def from_codes(codes, steps):
    """The tensor encoded by `codes_of`, in half precision."""
    return (codes.float() * by_row(steps, codes)).half()


def by_row(factors, tensor):
    """Reshape factors of a tensor's rows, (rows,), so that they broadcast with it."""
    return factors.view(-1, *[1] * (tensor.dim() - 1))


def refuse_overflow(weights, dtype):
    """ValueError with the floating-point tensors that overflow `dtype` or are not finite, and their largest values."""
    limit = torch.finfo(dtype).max
    large = [f"{name} (largest {tensor.abs().max().item():.3g})" for name, tensor in weights.items()
             if tensor.is_floating_point() and tensor.numel() and not bool((tensor.abs() <= limit).all())]
    if large:
        raise ValueError(f"{str(dtype).split('.')[-1]} holds up to {limit:.5g}; beyond it or not finite: "
                         f"{', '.join(large)}")


def pack(tensor, eight_bits=False):
    """A tensor as a dictionary from which `unpack` rebuilds it exactly, or rounded to 8 bits.

    shape; kept: one bit per entry, if some are zero. The nonzero entries are stored as
    positive, one bit each, and height, if all have the same magnitude; else as values, or
    with `eight_bits` as codes and steps, one for each row (`codes_of`).
    """
    kept = tensor != 0
    values = tensor[kept]
    if values.numel() > 1 and bool((values.abs() == values[0].abs()).all()):
        held = {"height": values[0].abs(), "positive": pack_bits(values > 0)}
    elif eight_bits:
        codes, steps = codes_of(tensor)
        kept = codes != 0                 # small values were rounded to zero
        held = {"codes": codes[kept], "steps": steps}
    else:
        held = {"values": values}
    packed = {"shape": list(tensor.shape)}
    if not bool(kept.all()):
        packed["kept"] = pack_bits(kept)
    return packed | held


def unpack(packed):
    """The tensor packed by `pack`; ValueError if the counts of bits and values contradict each other."""
    shape, count = packed["shape"], math.prod(packed["shape"])
    kept = unpack_bits(packed["kept"], count) if "kept" in packed else torch.ones(count, dtype=torch.bool)
    if "height" in packed:
        height = packed["height"]
        values = torch.where(unpack_bits(packed["positive"], int(kept.sum())), height, -height)
    else:
        values = packed["codes" if "codes" in packed else "values"].flatten()
    if len(values) != int(kept.sum()):
        raise ValueError(f"{len(values)} values for {int(kept.sum())} places")
    tensor = torch.zeros(count, dtype=values.dtype)
    tensor[kept] = values
    if "codes" not in packed:
        return tensor.view(shape)
    steps = packed["steps"]
    if values.dtype != torch.int8 or steps.dtype != torch.float32 or list(steps.shape) != shape[:1]:
        raise ValueError(f"codes of {values.dtype} with steps of {steps.dtype} {list(steps.shape)} for shape {shape}")
    return from_codes(tensor.view(shape), steps)


def pack_bits(flags):
    """Bool tensor of any shape -> uint8 tensor, eight flags per byte, the first in the highest bit."""
    return torch.from_numpy(np.packbits(flags.flatten().numpy()))


def unpack_bits(packed, count):
    """The `count` flags packed by `pack_bits`, as a 1-d bool tensor; ValueError for a wrong number of bytes."""
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise ValueError(f"{packed.numel()} bytes of {packed.dtype} for {count} bits")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool))


def expand(state):
    """A checkpoint with its packed tensors unpacked; ValueError if a weight is no tensor."""
    if "weights" not in state:
        return state
    weights = {name: unpack(tensor) if isinstance(tensor, dict) else tensor
               for name, tensor in state["weights"].items()}
    wrong = [name for name, tensor in weights.items() if not isinstance(tensor, torch.Tensor)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no tensor")
    return {**state, "weights": weights}
