"""Quantized networks for deployment: integers packed to their bits, and inference in integer arithmetic.

    save_packed(path, model, network)                   # see `packed`
    load_packed(model, checkpoint.read(path), path)     # then model(images) as always

Each convolution and linear layer rounds its inputs to integers, multiplies and
adds only integers, and converts each sum to float32 with one scale and one shift per
output channel, into which the following batch norm is folded. Everything between these
layers (sums of residual blocks, activations, pooling) is computed in float32.

The sums equal those of 32-bit integer arithmetic exactly: when a file is written or
read, it is checked that no input can make them overflow. They are computed in float64,
whose 53 bits hold integers below 2^31 with room to spare, and rounded, so that the choice
of a convolution algorithm cannot change them.
"""
import gzip
import io

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from engine import checkpoint, files, packing
from engine.doubles import in_double
from engine.widths import resize

FLOATS = "a packed file holds a network of few bits, this one has floats; --weights lsq trains one"

# ---- integers packed to their bits

def pack_integers(codes, bits):
    """Unsigned integers below 2^bits, any shape -> uint8 tensor, ceil(N bits / 8) bytes; the first in the high bits."""
    each = np.unpackbits(codes.numpy().astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits:]
    return torch.from_numpy(np.packbits(each))


def unpack_integers(packed, bits, count):
    """The `count` integers packed by `pack_integers`, (count,) uint8; ValueError for a wrong number of bytes."""
    flags = packing.unpack_bits(packed, count * bits).numpy().reshape(count, bits)
    return torch.from_numpy(np.packbits(np.pad(flags, ((0, 0), (8 - bits, 0))), axis=1)[:, 0].copy())


def pack_weights(weight, bits):
    """Integer weights, int8 -> a dictionary: `shape`, and `codes` of `bits` bits each, offset so that the lowest is 0.

    If that is smaller, or if 1-bit weights contain zeros: also `kept`, one bit per entry,
    and codes of the nonzero entries only.
    """
    kept, packed = weight != 0, {"shape": list(weight.shape)}
    if sparse(weight.numel(), int(kept.sum()), bits):
        packed["kept"], weight = packing.pack_bits(kept), weight[kept]
    codes = (weight.to(torch.int16) + 1) // 2 if bits == 1 else weight.to(torch.int16) + 2 ** (bits - 1)
    return packed | {"codes": pack_integers(codes, bits)}


def sparse(count, nonzero, bits):
    """Whether `count` weights take fewer bytes as a bitmask with codes of the nonzero ones only."""
    as_mask, whole = -(-count // 8) - (-nonzero * bits // 8), -(-count * bits // 8)
    return nonzero < count and (bits == 1 or as_mask < whole)


def unpack_weights(packed, bits):
    """The int8 tensor packed by `pack_weights`; ValueError where shape, bits and bytes contradict each other."""
    shape = packed["shape"]
    count = int(np.prod(shape, dtype=object))
    kept = packing.unpack_bits(packed["kept"], count) if "kept" in packed else torch.ones(count, dtype=torch.bool)
    codes = unpack_integers(packed["codes"], bits, int(kept.sum())).to(torch.int16)
    weight = torch.zeros(count, dtype=torch.int8)
    weight[kept] = (2 * codes - 1 if bits == 1 else codes - 2 ** (bits - 1)).to(torch.int8)
    return weight.view(shape)


# ---- from a network to a file

class Tracer(fx.Tracer):
    """Traces a network layer by layer."""

    def is_leaf_module(self, module, name):
        return not any(module.children())


def folded_norms(model):
    """{layer: batch norm} for the quantized layers whose output is read by one batch norm and nothing else."""
    modules, pairs = dict(model.named_modules()), {}
    for node in Tracer().trace(model).nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            maker = node.args[0]
            if maker.op == "call_module" and hasattr(modules[maker.target], "integers") and len(maker.users) == 1:
                pairs[maker.target] = node.target
    return pairs


@torch.no_grad()
def packed_layer(layer, norm=None):
    """One quantized layer, with the batch norm folded into it, as a dictionary of plain types and tensors.

    bits: [of weights, of activations]; folded: whether a batch norm is included; shape, codes
    and kept: see `pack_weights`; scale, and shift if there is a bias or a norm: (outputs,)
    float32; step, a number, and low: the inputs' integers are round(x / step), from low to
    low + 2^b - 1.
    """
    step, scale = layer.activation_step.double(), layer.activation_step.double() * layer.weight_step.double()
    shift = None if layer.bias is None else layer.bias.double()
    if norm is not None:
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() + ((0 if shift is None else shift) - norm.running_mean.double()) * factor
        scale = scale * factor
    low = int((layer.activation_offset / layer.activation_step).round()) if layer.signed else 0
    entry = {"bits": [layer.weight_bits, layer.activation_bits], "folded": norm is not None, "scale": scale.float(),
             "step": step.float(), "low": low, **pack_weights(layer.integers().cpu(), layer.weight_bits)}
    return entry | ({} if shift is None else {"shift": shift.float()})


def packed(model, network):
    """A quantized network as the dictionary of a packed file.

    model: on the CPU, in evaluation mode; network: its architecture, widths and
    dataset. Added are "integers", {layer: `packed_layer`}, "folded", the names of the
    folded batch norms, and "weights": all other tensors. ValueError for a float32 network,
    values that are not finite, or sums that 32 bits cannot hold.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_step")}
    if not layers:
        raise ValueError(FLOATS)
    norms = folded_norms(model)
    inside = tuple(f"{name}." for name in (*layers, *norms.values()))
    packing.refuse_overflow(model.state_dict(), torch.float32)
    entries = {name: packed_layer(layer, model.get_submodule(norms[name]) if name in norms else None)
               for name, layer in layers.items()}
    for name, entry in entries.items():
        refuse_large_sums(name, unpack_weights(entry, entry["bits"][0]), entry)
    others = {name: tensor for name, tensor in checkpoint.weights_of(model).items() if not name.startswith(inside)}
    return {**network, "integers": entries, "folded": list(norms.values()), "weights": others}


def packed_bytes(model, network):
    """The bytes of a packed file: the dictionary of `packed`, saved by torch and compressed by gzip."""
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, **packed(model, network)}, buffer)
    return gzip.compress(buffer.getvalue(), 9, mtime=0)


def save_packed(path, model, network):
    """Write a quantized network to `path`, whole or not at all; see `packed`."""
    files.write(path, packed_bytes(model, network))


# ---- from a file to a network that computes with integers

def refuse_large_sums(name, weight, entry):
    """ValueError if some input could overflow 32 bits in this layer; the bound is sum |weights| times largest input."""
    largest = max(abs(entry["low"]), abs(entry["low"] + 2 ** entry["bits"][1] - 1))
    bound = int(weight.flatten(1).long().abs().sum(1).max()) * largest
    if bound >= 2**31:
        raise ValueError(f"{name}: its sums may reach {bound:,}, beyond integers of 32 bits; "
                         "fewer bits keep them small")


def integer_sums(layer, inputs):
    """Inputs (N, ...) float -> exact integer sums, (N, outputs, ...) int32."""
    codes = (inputs.float() / layer.step).round().clamp(layer.low, layer.low + 2 ** layer.activation_bits - 1)
    codes, weight = in_double(codes), in_double(layer.weight)
    if weight.dim() == 2:
        sums = F.linear(codes, weight)
    else:
        sums = F.conv2d(codes, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return sums.round().to(torch.int32).to(inputs.device)


def integer_forward(layer, inputs):
    """Inputs (N, ...) float -> outputs (N, outputs, ...) float32: each sum times its scale, plus its shift."""
    sums = integer_sums(layer, inputs)
    shape = (1, -1, *[1] * (sums.dim() - 2))
    outputs = sums.float() * layer.scale.view(shape)
    return outputs if layer.shift is None else outputs + layer.shift.view(shape)


class IntegerConv2d(nn.Conv2d):
    """A convolution whose weight is an int8 tensor; `integer_layer` converts a plain layer to one."""

    forward = integer_forward

    def integers(self):
        """The weights, int8."""
        return self.weight

    @property
    def bias(self):
        """The bias of each output; None if the shift contains a folded batch norm."""
        return None if self.folded else self.shift


class IntegerLinear(nn.Linear):
    """A linear layer whose weight is an int8 tensor."""

    forward, integers, bias = integer_forward, IntegerConv2d.integers, IntegerConv2d.bias


def integer_layer(layer, name, entry):
    """Convert a plain or quantized layer to an integer layer of the same widths, in place, from its entry in a file.

    ValueError where the entry does not fit the layer or contradicts itself.
    """
    bits, low, step = entry["bits"], entry["low"], float(entry["step"])
    if [type(each) is int and 1 <= each <= 8 for each in bits] != [True] * 2 or type(low) is not int or not step > 0:
        raise ValueError(f"{name} has {bits} bits, integers from {low} and the step {step}")
    if entry["shape"] != list(layer.weight.shape):
        raise ValueError(f"{name} is {entry['shape']} in the file, {list(layer.weight.shape)} in the network")
    weight, values = unpack_weights(entry, bits[0]), {word: entry.get(word) for word in ("scale", "shift")}
    refuse_large_sums(name, weight, entry)
    for word, tensor in values.items():
        if (word == "scale" or tensor is not None) and (
                tensor.shape != weight.shape[:1] or tensor.dtype != torch.float32 or not tensor.isfinite().all()):
            raise ValueError(f"the {word} of {name} must be {len(weight)} finite numbers")
    layer.__class__ = IntegerConv2d if weight.dim() > 2 else IntegerLinear
    layer._parameters.clear()
    layer._buffers.clear()
    for word, tensor in {"weight": weight, **values, "step": entry["step"].float().clone()}.items():
        layer.register_buffer(word, tensor)
    layer.low, layer.folded, (layer.weight_bits, layer.activation_bits) = low, bool(entry["folded"]), bits
    return layer


def load_packed(model, state, path):
    """Convert a network, built from the architecture in `state`, to integer arithmetic in place.

    state: from `checkpoint.read`; path: named in errors. ValueError where the file
    contradicts itself or the network.
    """
    try:
        shapes = {f"{name}.weight": torch.empty(entry["shape"], device="meta")
                  for name, entry in state["integers"].items()}
        resize(model, state["widths"], shapes | state["weights"])
        for name, entry in state["integers"].items():
            integer_layer(model.get_submodule(name), name, entry)
        for name in state["folded"]:
            model.set_submodule(name, nn.Identity())
        ours = {name for name in model.state_dict() if name.rpartition(".")[0] not in state["integers"]}
        if ours != state["weights"].keys():
            raise ValueError(f"{sorted(ours ^ state['weights'].keys())[0]} is in the file or in the network alone")
        model.load_state_dict(state["weights"], strict=False)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError, OverflowError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise ValueError(f"{path} is damaged: its integers cannot be unpacked ({reason})") from None
