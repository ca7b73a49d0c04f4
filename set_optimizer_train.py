"""Optimizers: SGD for every weight, or Muon for filters and SGD for the rest.

    optimizer = make_optimizer(model, settings)

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the momentum of each
matrix orthogonal before the step, by Newton-Schulz iterations, so that all of its
singular directions get similar steps. A filter bank is a matrix of outputs x (inputs x
kernel), and each group of a grouped convolution is a matrix of its own. Batch norm,
biases, depthwise filters and the classifier are trained with SGD, biases with a learning
rate of their own (--bias-lr). Batch norm can have a weight decay of its own, for either
optimizer (--norm-weight-decay).
"""
import torch
from torch import nn

import quantization
from binaryconnect import BINARY
from engine import compiling, shrinking
from engine.settings import Setting, line, only

SETTINGS = {
    "optimizer": line("sgd", ("sgd", "muon"), fixed=True),
    "lr": Setting(0.15, "learning rate", low=1e-12, high=1e30),
    "momentum": Setting(0.9, "of SGD", low=0, high=1),
    "nesterov": Setting(True),
    "weight_decay": Setting(5e-4, "of SGD", low=0, high=1e30),
    "norm_weight_decay": Setting(None, "of scales and biases of batch norm (as --weight-decay)", low=0, high=1e30,
                                 form=float, fixed=True),
    "bias_lr": Setting(1.0, "learning rate of biases, as a multiple of --lr", low=1e-6, high=1e6, fixed=True),
    **only("optimizer", ("muon",), {
        "muon_lr": Setting(0.02, "learning rate of the filters", low=1e-12, high=1e30),
        "muon_momentum": Setting(0.9, "of the filters", low=0, below=1),
        "muon_decay": Setting(0.1, "weight decay of the filters, times their learning rate", low=0, high=1e30,
                              only=(("optimizer", ("muon",)), ("keep_norm", (False,)))),
        "keep_norm": Setting(False, "Muon: fix the norm of each filter bank, in place of weight decay", clashes=(
            ((True,), "weights", BINARY, "whose weights are clipped below that norm; leave one out"),)),
    }),
}
COEFFICIENTS = 3.4445, -4.7750, 2.0315      # of the quintic iteration; singular values end between 0.7 and 1.2
ITERATIONS = 5


def make_optimizer(model, settings, moved=None):
    """Return the optimizer of the line OPTIMIZER: torch.optim.SGD or `Muon`; moved: see `parameter_groups`."""
    return {"muon": Muon, "sgd": torch.optim.SGD}[settings["optimizer"]](parameter_groups(model, settings, moved))


def moved_by_muon(state):
    """Names of the weights that Muon updates, from an optimizer's `state_dict`; None if it does not hold them."""
    return next((group["names"] for group in state["param_groups"] if "names" in group), None)


def parameter_groups(model, settings, moved=None):
    """The parameter groups of an optimizer, each with its own learning rate, momentum and weight decay.

    With Muon the filters come first; `blocks` says how many matrices each of them is. Biases have a group of their
    own if --bias-lr is not 1, batch norm if --norm-weight-decay is given; quantization steps have one without weight
    decay. moved: names of the weights that Muon updated when the round began (a layer may have become depthwise
    since); None: chosen from the network as it is.
    """
    filters = filters_of(model, moved) if settings["optimizer"] == "muon" else {}
    norms, steps, others = norms_of(model), [], {(1.0, None): []}     # by --bias-lr and --norm-weight-decay
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] in quantization.STEPS:
            steps.append(parameter)
        elif name not in filters:
            rate = settings["bias_lr"] if name.endswith("bias") else 1.0
            decay = settings["norm_weight_decay"] if name in norms else None
            others.setdefault((rate, decay), []).append(parameter)
    rates = {"momentum": settings["momentum"], "lr": settings["lr"], "weight_decay": settings["weight_decay"],
             "nesterov": settings["nesterov"] and settings["momentum"] > 0}         # Nesterov needs momentum
    groups = [{"params": parameters, **rates, "lr": settings["lr"] * rate,
               "weight_decay": (settings["weight_decay"] if decay is None else decay) / rate}
              for (rate, decay), parameters in others.items()]
    groups.append({"params": steps, **rates, "weight_decay": 0.0})
    if filters:
        groups.insert(0, {"params": [weight for weight, _ in filters.values()], "names": list(filters),
                          "blocks": [count for _, count in filters.values()],
                          "rate": "muon_lr", "lr": settings["muon_lr"], "momentum": settings["muon_momentum"],
                          "weight_decay": settings["muon_decay"], "keep_norm": settings["keep_norm"]})
    return [group for group in groups if group["params"]]


def norms_of(model):
    """Names of the scales and biases of batch norm."""
    return {f"{name}.{own}" for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)
            for own, _ in layer.named_parameters(recurse=False)}


def filters_of(model, moved=None):
    """{name: (weight, matrices it holds)} of what Muon updates: hidden linear layers, convolutions not depthwise.

    moved: the names, if they are known.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    last = next((name for name in reversed(layers) if isinstance(layers[name], nn.Linear)), None)
    return {f"{name}.weight": (layer.weight, getattr(layer, "groups", 1)) for name, layer in layers.items()
            if (name != last and not shrinking.is_depthwise(layer) and layer.weight.requires_grad if moved is None
                else f"{name}.weight" in moved)}


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have `blocks`, SGD for the others, as in torch.optim.Muon and torch.optim.SGD.

    With keep_norm each filter bank is scaled to a norm of sqrt(outputs) before the
    step, as in airbench: lr is then the size of a step relative to it, and weight
    decay is not used. A batch norm after the layer cancels the scale.
    """

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters that have a gradient; the others stay. Closures are not supported."""
        for group in self.param_groups:
            moved = [weight for weight in group["params"] if weight.grad is not None]
            for weight in moved:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            if "blocks" not in group:
                self.follow(moved, group)
                continue
            for weight, blocks in zip(group["params"], group["blocks"], strict=True):
                if weight.grad is not None:
                    self.turn(weight, blocks, group)

    def turn(self, weight, blocks, group):
        """Muon's update of one filter bank."""
        held = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
        direction = weight.grad.lerp(held, group["momentum"])
        matrices = direction.reshape(blocks, len(weight) // blocks, -1)
        rows, columns = matrices.shape[1:]
        update = orthogonal(matrices).reshape(weight.shape).to(weight.dtype)
        if group["keep_norm"]:
            weight.mul_(len(weight) ** 0.5 / weight.norm().clamp_min(1e-7))
        else:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def follow(self, weights, group):
        """SGD's update of some tensors of a group."""
        if not weights:
            return
        gradients = [weight.grad for weight in weights]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        gradients = torch._foreach_add(gradients, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        torch._foreach_add_(weights, gradients, alpha=-group["lr"])


def orthogonal(matrices):
    """Replace each of (B, R, C) matrices by approximately the nearest orthogonal one; zeros stay zeros.

    Computed in bfloat16, which is precise enough, or in float32 on CPUs that only simulate bfloat16, 20 times slower.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    turned = matrices.float() if matrices.is_cpu and not compiling.has_bfloat16() else matrices.bfloat16()
    turned = turned.mT if tall else turned
    turned = turned / turned.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = turned @ turned.mT
        turned = torch.baddbmm(turned, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), turned, beta=a)
    return turned.mT if tall else turned
