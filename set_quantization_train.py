"""Training with quantized weights: what the line WEIGHTS does to the weights of one step.

`train.py` runs forward and backward within `step_weights`, calls `after_step`
behind the optimizer, and evaluates within `evaluation_weights`. Layers of few bits
("lsq") round their own weights and inputs as they run (`quantization.py`).
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
    "weight_bits": Setting(2, "of weights with --weights lsq, first and last layer apart", low=1, high=8,
                           only=(("weights", ("lsq",)),)),
    "activation_bits": Setting(4, "of activations with --weights lsq, first and last layer apart", low=1, high=8,
                               only=(("weights", ("lsq",)),)),
    "layer_bits": Setting([], "of single layers (the first convolution and the last linear layer 8/8)", form=str,
                          many="+", shown="LAYER=W/A", only=(("weights", ("lsq",)),)),
}


def step_weights(model, weights, scale, generator, masks):
    """A context in which `model` has the weights of a training step.

    weights: "float" and "lsq" (as they are), "binary" (their signs) or "binary-stochastic"
    (drawn from `generator`); scale: H, "one" or "glorot"; masks: of pruned weights.
    ValueError for another word.
    """
    check_weights(weights)
    if weights not in BINARY:
        return nullcontext(model)
    drawn = generator if weights == "binary-stochastic" else None
    return binaryconnect.binarized(model, scale, drawn, masks)


def after_step(model, weights, scale):
    """What follows an update: binary training clips the real weights to [-H, H], lsq keeps its steps above 0."""
    check_weights(weights)
    if weights in BINARY:
        binaryconnect.BC(model, scale).clip()
    elif weights == "lsq":
        quantization.keep_positive(model)


def evaluation_weights(model, weights, scale, masks):
    """A context in which `model` is evaluated and saved: the signs, where it trains deterministically with them.

    After stochastic training the real weights are the result (arXiv:1511.00363, section 2.6, third method).
    """
    check_weights(weights)
    return step_weights(model, "binary" if weights == "binary" else "float", scale, None, masks)


def check_weights(weights):
    """ValueError for a word that the line WEIGHTS does not know: it must not train as floats."""
    if weights not in CHOICES:
        raise ValueError(f"weights {weights!r}: choose from {', '.join(CHOICES)}")
