"""Numeric precision: convert a trained network, or train a quantized one (LSQ).

    dtype, note = set_precision(model, "half", device)    # then evaluate as always, inputs in dtype

    bits = layer_bits(model, 2, 4)                 # {layer: [weights, activations]}; first and last layer at 8
    quantize_layers(model, bits, input_ranges(model, batches))
    ...                                            # trains like any network; after each step keep_positive(model)

The second is LSQ: every convolution and linear layer rounds its weights and its
inputs to integers times a step, and the steps are learned with the weights (Esser
et al. 2020, arXiv:1902.08153). There is one weight step per output channel, so that
depthwise filters of different magnitudes fit; at inference it is multiplied into batch
norm's scale. There is one activation step per layer. Inputs that follow a ReLU are
integers from 0; others, such as the image, get a learned offset as in LSQ+ (Bhalgat
et al. 2020, arXiv:2004.09576), rounded to a whole number of steps: then zero is an
integer too, and the zero padding of an image stays exact.
"""
import itertools
import re

import torch
import torch.nn.functional as F
from torch import nn

from engine import packing
from engine.modes import in_mode
from engine.strides import picked

DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
STEPS = ("weight_step", "activation_step", "activation_offset")      # parameters of a quantized layer
SMALLEST = 2.0 ** -16      # lower bound of every step; half precision holds it, and 8-bit multiples of it, exactly


def set_precision(model, precision, device):
    """Convert `model` in place to "float", "half" or "bfloat16". Returns (input dtype, a sentence that says how).

    On CUDA the arithmetic itself then runs in the precision asked for. On a CPU,
    where half and bfloat16 arithmetic is slower than float32, the weights are
    rounded to the precision and the arithmetic stays in float32; the sentence says
    which of the two. A quantized network has its own precision and is not changed.
    Raises ValueError with the tensors that are not finite, or that the precision
    cannot hold, and their largest value.
    """
    bits = bits_of(model)
    if bits:
        few, many = (pick(number for pair in bits.values() for number in pair) for pick in (min, max))
        kind = "computed exactly" if any(hasattr(layer, "scale") for layer in model.modules()) else "simulated"
        return torch.float32, f"weights and activations of {few} to {many} bits, integers {kind}"
    dtype = DTYPES[precision]
    packing.refuse_overflow(model.state_dict(), dtype)
    if device.type == "cuda" or precision == "float":
        model.to(dtype)
        return dtype, f"weights and arithmetic in {precision} precision"
    model.to(dtype).to(torch.float32)
    return torch.float32, f"weights rounded to {precision} precision, arithmetic in float32"


# ---- integers times a step

def straight_through(value, through):
    """`value` unchanged, with the gradient of `through` (straight-through estimator)."""
    return value.detach() + (through - through.detach())


def codes_of(values, step, low, high):
    """round(clip(values / step, low, high)): integers stored as floats; the gradient ignores the rounding.

    step, low, high: tensors that broadcast with `values`, or numbers. Multiplied by
    the step, this is arXiv:1902.08153, equations 1 and 2, and its gradients are equations 3
    and 5: of the step, round(v/s) - v/s within the range and the range's bound outside; of a
    value, 1 within the range and 0 outside.
    """
    clipped = (values / step).clamp(low, high)
    return straight_through(clipped.round(), clipped)


def scaled_gradient(step, scale):
    """`step` unchanged, its gradient multiplied by `scale` (arXiv:1902.08153, section 2.2)."""
    return step.detach() + (step - step.detach()) * scale


def weight_range(bits):
    """(lowest, highest) integer of a weight: -2^(b-1) and 2^(b-1) - 1; with one bit -1 and 1, the signs."""
    return (-1, 1) if bits == 1 else (-2 ** (bits - 1), 2 ** (bits - 1) - 1)


def weight_codes(layer):
    """(integers as floats, shaped like the weight; a step for each output channel, (outputs,), gradients scaled).

    One bit is a special case of LSQ: the sign times a learned step. There is no clipping,
    so every weight receives the gradient. A weight of exactly 0, which only a pruning mask
    produces, is 0 with any number of bits.
    """
    low, high = weight_range(layer.weight_bits)
    step = scaled_gradient(layer.weight_step, (layer.weight[0].numel() * high) ** -0.5)
    each = packing.by_row(step, layer.weight)
    if layer.weight_bits == 1:
        return straight_through(layer.weight.sign(), layer.weight / each.detach()), step
    return codes_of(layer.weight, each, low, high), step


def input_codes(layer, inputs):
    """(integers as floats, shaped like the inputs; the activation step, a scalar, gradients scaled).

    The integers range from 0 to 2^b - 1; for signed inputs from round(offset / step) to that
    plus 2^b - 1. N in the gradients' scale 1 / sqrt(N Q) is the number of features of one image.
    """
    high, inputs = 2 ** layer.activation_bits - 1, inputs.float()
    scale = (inputs[0].numel() * high) ** -0.5
    step, offset = (scaled_gradient(each, scale) for each in (layer.activation_step, layer.activation_offset))
    shift = offset / step
    low = torch.where(layer.signed, straight_through(shift.round(), shift), 0.0)
    return codes_of(inputs, step, low, low + high), step


def rescaled(sums, step, scale, bias):
    """Convert sums of integers, (N, outputs, ...), to outputs: multiply by both steps, add each output's bias."""
    shape = (1, -1, *[1] * (sums.dim() - 2))
    outputs = sums * (step * scale).view(shape)
    return outputs if bias is None else outputs + bias.view(shape)


# ---- layers

class QuantizedConv2d(nn.Conv2d):
    """A quantized convolution: inputs and weights are rounded to integers, the sums are scaled back.

    `quantized` converts a plain layer to this class. Convolving the integers themselves,
    before multiplying by the steps, keeps float32 sums below 2^24 exact, as in
    `integer_inference`. Training may compute it in bfloat16, which represents the integers
    exactly (up to 256) and rounds each sum once.
    """

    def forward(self, images):
        codes, step = input_codes(self, images)
        weight, scale = weight_codes(self)
        codes, stride = picked(self, codes)
        sums = F.conv2d(codes, weight, None, stride, self.padding, self.dilation, self.groups)
        return rescaled(sums, step, scale, self.bias)

    def integers(self):
        """The integer weights that the network computes with, int8."""
        return weight_codes(self)[0].detach().to(torch.int8)

    def like(self, plain):
        """A plain layer, quantized to the bits of this layer."""
        return quantized(plain, [self.weight_bits, self.activation_bits])


class QuantizedLinear(nn.Linear):
    """A quantized linear layer, see `QuantizedConv2d`."""

    integers, like = QuantizedConv2d.integers, QuantizedConv2d.like

    def forward(self, inputs):
        codes, step = input_codes(self, inputs)
        weight, scale = weight_codes(self)
        return rescaled(F.linear(codes, weight), step, scale, self.bias)


def quantized(layer, bits, extent=None):
    """Convert a plain convolution or linear layer to a quantized one, in place: same object, same parameters.

    bits: [of weights, of activations]; extent: (mean magnitude, lowest, highest) of its
    inputs, which initialises the activation step; without it, the step is to be loaded from a file.
    """
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"a convolution of few bits pads with zeros, not with padding_mode {layer.padding_mode!r}")
    layer.__class__ = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
    layer.weight_bits, layer.activation_bits = bits
    layer.weight_step = nn.Parameter(first_weight_step(layer.weight, layer.weight_bits))
    mean, lowest, highest = extent or (1.0, 0.0, 1.0)
    span = 2 ** layer.activation_bits - 1
    step = 2 * mean / span ** 0.5 if lowest >= 0 else (highest - lowest) / span
    device = layer.weight.device
    layer.activation_step = nn.Parameter(torch.tensor(max(step, SMALLEST), device=device))
    layer.activation_offset = nn.Parameter(torch.tensor(min(lowest, 0.0), device=device))
    layer.register_buffer("signed", torch.tensor(lowest < 0, device=device))
    return layer


@torch.no_grad()
def first_weight_step(weight, bits):
    """2 mean|w| / sqrt(Q) for each output channel, (outputs,) (arXiv:1902.08153, section 2.1); mean|w| for one bit.

    The mean is over the nonzero weights, since zeros would make the step of a pruned channel
    too small; an all-zero channel takes the mean of its layer. Where even the largest weight
    of a channel would round to zero, and stay there, that weight is the step.
    """
    flat = weight.flatten(1).abs()
    count = (flat > 0).sum(1)
    mean = torch.where(count > 0, flat.sum(1) / count.clamp_min(1), flat.sum() / count.sum().clamp_min(1))
    step, largest = mean if bits == 1 else 2 * mean / weight_range(bits)[1] ** 0.5, flat.amax(1)
    return torch.where((step >= 2 * largest) & (count > 0), largest, step).clamp_min(SMALLEST)


# ---- a network

def layers_of(model):
    """{name: layer} of every convolution and linear layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def bits_of(model):
    """{layer: [bits of weights, of activations]} of the quantized layers; {} for a float32 network."""
    return {name: [module.weight_bits, module.activation_bits] for name, module in model.named_modules()
            if hasattr(module, "weight_bits")}


def layer_bits(model, weight_bits, activation_bits, given=()):
    """{layer: [bits of weights, of activations]} for every convolution and linear layer.

    The first convolution and the last linear layer have 8 and 8; given: overrides, texts of the
    form layer=weights/activations such as conv1=8/8. ValueError for a text of another form, or an
    unknown layer.
    """
    layers = layers_of(model)
    ends = [next((name for name in names if isinstance(layers[name], kind)), None)
            for names, kind in ((layers, nn.Conv2d), (reversed(layers), nn.Linear))]
    bits = {name: [8, 8] if name in ends else [weight_bits, activation_bits] for name in layers}
    for text in given:
        match = re.fullmatch(r"(.+)=([1-8])/([1-8])", text)
        if not match:
            raise ValueError(f"--layer-bits {text}: it must read layer=weights/activations, each of 1 to 8 bits, "
                             "such as conv1=8/8")
        if match[1] not in bits:
            raise ValueError(f"--layer-bits {text}: no convolution or linear layer is called {match[1]!r}; there are "
                             f"{', '.join(bits)}")
        bits[match[1]] = [int(match[2]), int(match[3])]
    return bits


def quantize_layers(model, bits, ranges=None):
    """Quantize the layers named in `bits`, in place; returns the model.

    bits: from `layer_bits`; ranges: from `input_ranges`. ValueError for an unknown layer
    or for bits outside 1 to 8, which an altered file may contain.
    """
    layers = layers_of(model)
    for name, pair in bits.items():
        if name not in layers or [type(each) is int and 1 <= each <= 8 for each in pair] != [True] * 2:
            raise ValueError(f"bits {pair} of layer {name!r}: the network has {', '.join(layers)}, "
                             "each with two numbers from 1 to 8")
        quantized(layers[name], pair, (ranges or {}).get(name))
    return model


@torch.no_grad()
def input_ranges(model, batches, count=2):
    """{layer: (mean magnitude, lowest, highest)} of the inputs of each convolution and linear layer.

    batches: of images without augmentation; the first `count` are used, with batch statistics
    in batch norm, as in training. The model is unchanged afterwards.
    """
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {name: [] for name in layers_of(model)}

    def watch(name):
        def hook(layer, inputs):
            values = inputs[0].float()
            found[name].append((values.abs().mean().item(), values.min().item(), values.max().item()))
        return hook
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers_of(model).items()]
    try:
        device = next(model.parameters()).device
        with in_mode(model, training=True):
            for images, _ in itertools.islice(batches, count):
                model(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
        model.load_state_dict(kept)
    return {name: (sum(means) / len(means), min(lows), max(highs)) for name, seen in found.items() if seen
            for means, lows, highs in [zip(*seen, strict=True)]}


def parameter_groups(model):
    """The parameter groups of an optimizer: the weights, and the quantization steps, if any, without weight decay.

    A step is a scale, not a weight: weight decay would only shrink it below its best value.
    """
    steps = [parameter for name, parameter in model.named_parameters() if name.split(".")[-1] in STEPS]
    others = [parameter for name, parameter in model.named_parameters() if name.split(".")[-1] not in STEPS]
    return [{"params": others}, {"params": steps, "weight_decay": 0.0}] if steps else [{"params": others}]


@torch.no_grad()
def keep_positive(model):
    """Clamp steps that an update made smaller than SMALLEST, zero or negative, in place."""
    for layer in model.modules():
        if hasattr(layer, "weight_step"):
            layer.weight_step.clamp_(min=SMALLEST)
            layer.activation_step.clamp_(min=SMALLEST)


@torch.no_grad()
def to_grid(model):
    """Replace the weights of quantized layers by their quantized values, in place; the outputs stay the same.

    Rounding these to half precision then changes no integer. Returns the model.
    """
    for layer in model.modules():
        if hasattr(layer, "weight_step"):
            codes, step = weight_codes(layer)
            layer.weight.copy_(codes * packing.by_row(step, codes))
    return model


def without_bits(architecture):
    """The architecture of the float32 network that a quantized one was made from."""
    return {name: value for name, value in architecture.items() if name != "bits"}


def without_steps(state):
    """A checkpoint's dictionary without quantization (no bits, no steps); a float32 network's is returned as is."""
    if "bits" not in (state.get("architecture") or {}):
        return state
    weights = {name: tensor for name, tensor in state["weights"].items()
               if name.split(".")[-1] not in (*STEPS, "signed")}
    return {**state, "architecture": without_bits(state["architecture"]), "weights": weights}
