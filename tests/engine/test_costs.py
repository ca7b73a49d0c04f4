"""What a layer costs, against values worked out by hand and PyTorch's own counter."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine import costs


class Small(nn.Module):
    """A convolution of two groups, a depthwise one of stride 2, and a linear layer over flattened images."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(6, 6, 3, 2, 1, groups=6)
        self.last = nn.Linear(6 * 16, 5)

    def forward(self, images):
        return self.last(self.second(self.first(images)).flatten(1))


SPACES = [{"name": "first", "makers": ["first"], "readers": ["last"], "depthwise": ["second"], "unfold": 16}]


def rows_of(model):
    pixels = costs.pixels_of(model, (4, 8, 8))
    assert list(pixels.items()) == [("first", (64, 64)), ("second", (64, 16)), ("last", (1, 1))]
    return [costs.row_of(name, model.get_submodule(name), pixels[name], SPACES) for name in pixels]


def test_whole_widths_cost_what_torch_counts():
    model = Small()
    macs = sum(costs.price(row, costs.coefficients(row, {"first": 6}, "macs", None), {"first": 6})
               for row in rows_of(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 4, 8, 8))
    assert macs == counter.get_total_flops() / 2


@pytest.mark.parametrize("width", [0, 2, 6])
def test_each_layer_by_hand(width):
    widths = {"first": width}
    found = {what: [costs.price(row, costs.coefficients(row, widths, what, (1e9, 1e9)), widths)
                    for row in rows_of(Small())] for what in costs.METRICS}
    assert found["parameters"] == [4 * width * 9 / 2, 9 * width, 16 * width * 5]
    assert found["macs"] == [64 * 4 * width * 9 / 2, 16 * 9 * width, 16 * width * 5]
    # a multiply-add and a byte take as long here: bytes decide where a layer moves more of them
    moved = [4 * (each + reads + makes) for each, reads, makes in zip(
        found["parameters"], (64 * 4, 64 * width, 16 * width), (64 * width, 16 * width, 5), strict=True)]
    expected = [max(work, traffic) / 1e9 for work, traffic in zip(found["macs"], moved, strict=True)]
    assert found["latency"] == pytest.approx(expected if width else [0, 0, 0])


def test_a_cost_or_device_that_is_none_is_refused():
    for what, device in (("flops", None), ("latency", None), ("latency", (1e9, 0))):
        with pytest.raises(ValueError, match="no cost is called|latency on device"):
            costs.check_metric(what, device)
