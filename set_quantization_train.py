"""Training with quantized weights: what the line WEIGHTS does to the weights in each step.

`train.py` runs forward and backward within `step_weights`, calls `after_step`
after the optimizer's step, and evaluates within `evaluation_weights`. Quantized layers
("lsq") round their weights and inputs in their own forward pass (`quantization.py`).
"""
from contextlib import nullcontext

import binaryconnect
import quantization
from binaryconnect import BINARY
from engine.settings import Setting, line
from filter_pruning import SHRINKING

CHOICES = ("float", *BINARY, "lsq")
SETTINGS = {
    "weights": line("float", CHOICES, clashes=(
        (("lsq",), "recipe", ("published",), "which trains with floats; leave one out"),
        (("lsq",), "pruning", SHRINKING, "which removes channels: shrink a network of floats first, then --start from "
                                         "it"))),
    "binary_scale": Setting("glorot", "H of binary weights", choices=("one", "glorot"), only=(("weights", BINARY),)),
    "weight_bits": Setting(2, "of weights with --weights lsq, except first and last layer", low=1, high=8,
                           only=(("weights", ("lsq",)),)),
    "activation_bits": Setting(4, "of activations with --weights lsq, except first and last layer", low=1, high=8,
                               only=(("weights", ("lsq",)),)),
    "layer_bits": Setting([], "of single layers (first convolution and last linear layer: 8/8)", form=str,
                          many="+", shown="LAYER=W/A", only=(("weights", ("lsq",)),)),
}


def step_weights(model, weights, scale, generator, masks):
    """A context in which `model` has the weights of a training step.

    weights: "float" and "lsq" (unchanged), "binary" (their signs) or "binary-stochastic"
    (drawn from `generator`); scale: H, "one" or "glorot"; masks: of pruned weights.
    Raises ValueError for any other value.
    """
    check_weights(weights)
    if weights not in BINARY:
        return nullcontext(model)
    drawn = generator if weights == "binary-stochastic" else None
    return binaryconnect.binarized(model, scale, drawn, masks)


def after_step(model, weights, scale):
    """Correct the weights after an update: binary training clips them to [-H, H], lsq keeps its steps above 0."""
    check_weights(weights)
    if weights in BINARY:
        binaryconnect.BC(model, scale).clip()
    elif weights == "lsq":
        quantization.keep_positive(model)


def evaluation_weights(model, weights, scale, masks):
    """A context in which `model` is evaluated and saved: with "binary" its weights are the signs, else unchanged.

    After stochastic training the real weights are used (arXiv:1511.00363, section 2.6, second method).
    """
    check_weights(weights)
    return step_weights(model, "binary" if weights == "binary" else "float", scale, None, masks)


def check_weights(weights):
    """Raise ValueError for an unknown value of the line WEIGHTS, which would otherwise train in float32."""
    if weights not in CHOICES:
        raise ValueError(f"weights {weights!r}: choose from {', '.join(CHOICES)}")
