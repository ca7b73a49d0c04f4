"""Networks of few bits as they ship: integers packed to their bits, and the inference that computes with them.

    save_packed("model.packed.gz", {"model": ...})         # see `packed`
    load_packed(model, checkpoint.read("model.packed.gz"))   # then model(images) as always

Each convolution and linear layer rounds its inputs to integers, multiplies and
adds integers alone, and turns each sum into a number with one scale and one shift
of its output channel, into which the batch norm behind it is folded. What lies
between layers (sums of residual blocks, activations, pooling) stays in float32.

The sums are those of 32-bit integers, exactly: that no input can take them beyond
is checked when a file is written and when it is read. They are computed as float64
products of integers below 2^31, far within its 53 bits, and rounded, so that no
algorithm for convolutions can change one.
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
    """Unsigned integers below 2^bits, of any shape -> uint8 tensor, ceil(N bits / 8) bytes; the first one highest."""
    each = np.unpackbits(codes.numpy().astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits:]
    return torch.from_numpy(np.packbits(each))


def unpack_integers(packed, bits, count):
    """The `count` integers of `pack_integers`, (count,) uint8; ValueError where the number of bytes is another."""
    flags = packing.unpack_bits(packed, count * bits).numpy().reshape(count, bits)
    return torch.from_numpy(np.packbits(np.pad(flags, ((0, 0), (8 - bits, 0))), axis=1)[:, 0].copy())


def pack_weights(weight, bits):
    """Integer weights, int8 -> their shape, and `codes`, `bits` each, counted from the lowest one.

    Where it is smaller, or where signs have zeros among them: `kept`, one bit an entry,
    and the codes of those that are not zero.
    """
    kept, packed = weight != 0, {"shape": list(weight.shape)}
    if sparse(weight.numel(), int(kept.sum()), bits):
        packed["kept"], weight = packing.pack_bits(kept), weight[kept]
    codes = (weight.to(torch.int16) + 1) // 2 if bits == 1 else weight.to(torch.int16) + 2 ** (bits - 1)
    return packed | {"codes": pack_integers(codes, bits)}


def sparse(count, nonzero, bits):
    """Whether `count` weights, of which some are zero, take fewer bytes as a bitmask and the others' codes."""
    as_mask, whole = -(-count // 8) - (-nonzero * bits // 8), -(-count * bits // 8)
    return nonzero < count and (bits == 1 or as_mask < whole)


def unpack_weights(packed, bits):
    """The int8 tensor that `pack_weights` took; ValueError where shape, bits and bytes contradict each other."""
    shape = packed["shape"]
    count = int(np.prod(shape, dtype=object))
    kept = packing.unpack_bits(packed["kept"], count) if "kept" in packed else torch.ones(count, dtype=torch.bool)
    codes = unpack_integers(packed["codes"], bits, int(kept.sum())).to(torch.int16)
    weight = torch.zeros(count, dtype=torch.int8)
    weight[kept] = (2 * codes - 1 if bits == 1 else codes - 2 ** (bits - 1)).to(torch.int8)
    return weight.view(shape)


# ---- from a network to a file

class Tracer(fx.Tracer):
    """Follows a network from layer to layer."""

    def is_leaf_module(self, module, name):
        return not any(module.children())


def folded_norms(model):
    """{layer: batch norm} of the quantized layers whose outputs a batch norm reads, and nothing else."""
    modules, pairs = dict(model.named_modules()), {}
    for node in Tracer().trace(model).nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            maker = node.args[0]
            if maker.op == "call_module" and hasattr(modules[maker.target], "integers") and len(maker.users) == 1:
                pairs[maker.target] = node.target
    return pairs


@torch.no_grad()
def packed_layer(layer, norm=None):
    """One quantized layer, and the batch norm that is folded into it, as a dictionary of plain types and tensors.

    bits; folded, whether there is a norm within; shape, codes and kept: see
    `pack_weights`; scale, and shift where there is a bias or a norm, (outputs,) float32;
    step, a number, and low: the inputs' integers are round(x / step) from low to
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
    dataset. Has "integers", {layer: `packed_layer`}, "folded", the batch norms within
    them, and "weights": all other tensors. ValueError for a network of floats, values
    that are not finite, or sums that 32 bits cannot hold.
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
    """The bytes of a packed file: `packed`, as an archive, through gzip."""
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, **packed(model, network)}, buffer)
    return gzip.compress(buffer.getvalue(), 9, mtime=0)


def save_packed(path, model, network):
    """Write a quantized network to `path`, whole or not at all; see `packed`."""
    files.write(path, packed_bytes(model, network))


# ---- from a file to a network that computes with integers

def refuse_large_sums(name, weight, entry):
    """ValueError where some input could take a sum of this layer beyond 32 bits: |weights| times the largest input."""
    largest = max(abs(entry["low"]), abs(entry["low"] + 2 ** entry["bits"][1] - 1))
    bound = int(weight.flatten(1).long().abs().sum(1).max()) * largest
    if bound >= 2**31:
        raise ValueError(f"{name}: its sums may reach {bound:,}, beyond integers of 32 bits; "
                         "fewer bits keep them small")


def integer_sums(layer, inputs):
    """Inputs (N, ...) float -> sums of integers, (N, outputs, ...) int32, exact."""
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
    """A convolution whose weight is an int8 tensor; `integer_layer` makes one of a plain layer."""

    forward = integer_forward

    def integers(self):
        """The weights, int8."""
        return self.weight

    @property
    def bias(self):
        """What is added to each output, where it is not a batch norm's part."""
        return None if self.folded else self.shift


class IntegerLinear(nn.Linear):
    """A linear layer whose weight is an int8 tensor."""

    forward, integers, bias = integer_forward, IntegerConv2d.integers, IntegerConv2d.bias


def integer_layer(layer, name, entry):
    """A plain or quantized layer made an integer one of the same widths, in place, from what a file says of it.

    ValueError where the entry does not fit the layer or itself.
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
    """Make a network that was built from the architecture in `state` compute with its integers, in place.

    state: of `checkpoint.read`; path: for errors. ValueError where the file contradicts
    itself or the network.
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
