"""Small data and networks that several test modules share."""
import numpy as np
import torch

import cifar10

SMALL = cifar10.Kind((12, 11, 3), (40, 8), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), tuple("abcd"), True, "CIFAR10")


def random_data(kind, seed=0):
    """Random images and labels of the form that `kind` asks for."""
    random = np.random.default_rng(seed)
    parts = [(random.integers(0, 256, (count, *kind.shape), dtype=np.uint8),
              random.integers(0, len(kind.classes), count)) for count in kind.counts]
    return cifar10.Data(*parts[0], *parts[1])


def assert_same(found, expected):
    for name, one, other in zip(cifar10.Data._fields, found, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def small_network():
    """A network's part of a checkpoint, small enough to damage at every byte."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 5, generator=generator) * (torch.rand(3, 5, generator=generator) > 0.5)
    return {"architecture": {"name": "x", "groups": 2}, "widths": {"a": [3, 5]},
            "weights": {"a.weight": kernel, "steps": torch.tensor(7), "bias": torch.randn(4, generator=generator)}}
