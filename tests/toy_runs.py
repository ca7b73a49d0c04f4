"""Runs of a few batches of random images, built by hand, that tests step through."""
from types import SimpleNamespace

import torch
from torch import nn

import experiment
import train

CPU = torch.device("cpu")
BAR = SimpleNamespace(update=lambda count: None, disable=True)      # a progress bar that shows nothing


def start_run(out, model, batches, classes=10, **settings):
    """A run of `model` over a list of batches, at the start of its first round."""
    lines = {"mixing": "none", "weights": "float", "schedule": "one-cycle", "averaging": "none",
             "optimizer": "sgd"}
    run = experiment.Run({**train.DEFAULTS, **lines, "epochs": [1], **settings}, out, CPU, {"num_classes": classes},
                         model, torch.Generator().manual_seed(0), batches, None, forward=model)
    experiment.begin_round(run)
    return run


def linear_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))


def random_batches(count=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 2, 2, generator=generator), torch.randint(10, (size,), generator=generator))
            for _ in range(count)]
