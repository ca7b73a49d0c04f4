"""Pruning: LAMP's scores, gradual schedules, recalibrated statistics, other memory formats."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pruning
import resnet_factorized


def test_lamp_scores_equal_a_count_by_hand():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    expected = torch.tensor([[9 / 9, 1 / 14], [4 / 13, 0.0]])
    assert torch.allclose(pruning.lamp_scores(weight).float(), expected)


def test_lamp_keeps_the_order_within_a_layer_and_spares_thin_ones():
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 4, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(0.01)
    by_lamp = pruning.global_masks(model, 0.9, minimum_density=0, score="lamp")
    by_size = pruning.global_masks(model, 0.9, minimum_density=0)
    assert int(by_size["1.weight"].sum()) == 1 < int(by_lamp["1.weight"].sum())
    for name, mask in by_lamp.items():
        size = model.get_parameter(name).abs()
        assert size[mask].min() >= size[~mask].max()
    assert sum(int(mask.sum()) for mask in by_lamp.values()) == round(0.1 * 1760)


@given(st.lists(st.floats(0, 0.95), min_size=1, max_size=4))
def test_of_all_counts_over_all_weights(sparsities):
    model, masks = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)), None
    for sparsity in sparsities:
        masks = pruning.global_masks(model, sparsity, masks, of="all")
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert removed == round(max(sparsities) * 800)          # what is gone stays gone


def test_polynomial_schedule_is_equation_one():
    begin, end, every = 10, 110, 7
    fired = {step: value for step in range(200)
             if (value := pruning.polynomial_schedule(step, 0.1, 0.9, begin, end, every)) is not None}
    assert sorted(fired) == sorted({*range(begin, end + 1, every), end})
    assert fired[begin] == pytest.approx(0.1) and fired[end] == 0.9
    assert fired[52] == pytest.approx(0.9 + (0.1 - 0.9) * (1 - 42 / 100) ** 3)
    assert list(fired.values()) == sorted(fired.values())


def test_constant_schedule_fires_as_often():
    fired = [step for step in range(60) if pruning.constant_schedule(step, 0.5, 5, 32, 10) is not None]
    assert fired == [5, 15, 25, 32]
    assert pruning.constant_schedule(5, 0.5, 5, 32, 10) == 0.5


@pytest.mark.parametrize("sparsity, begin, end, frequency", [
    (1.0, 0, 10, 1), (-0.1, 0, 10, 1), (0.5, -1, 10, 1), (0.5, 10, 10, 1), (0.5, 0, 10, 0)])
def test_schedules_refuse_what_cannot_be(sparsity, begin, end, frequency):
    with pytest.raises(ValueError, match="sparsity|begin"):
        pruning.polynomial_schedule(0, 0.0, sparsity, begin, end, frequency)
    with pytest.raises(ValueError, match="sparsity|begin"):
        pruning.constant_schedule(0, sparsity, begin, end, frequency)


def test_recalibration_gives_the_statistics_of_the_images():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval()
    images = torch.randn(40, 3, 8, 8) * 3 + 1
    before, momentum = model[0].weight.clone(), model[1].momentum
    pruning.recalibrate(model, images.split(10))
    with torch.no_grad():
        hidden = model[0](images)
    assert torch.allclose(model[1].running_mean, hidden.mean((0, 2, 3)), atol=1e-4)
    parts = torch.stack([part.var((0, 2, 3)) for part in hidden.split(10)])
    assert torch.allclose(model[1].running_var, parts.mean(0), rtol=1e-4)
    assert not model.training and model[1].momentum == momentum and torch.equal(model[0].weight, before)


@pytest.mark.parametrize("score", ["l1", "lamp"])
def test_weights_in_channels_last_are_pruned_as_others(score):
    """On CUDA weights are in that memory format."""
    torch.manual_seed(0)
    model = resnet_factorized.build("resnet18", 8)
    masks = pruning.global_masks(model, 0.7, {}, score=score)
    model = model.to(memory_format=torch.channels_last)
    found = pruning.global_masks(model, 0.7, {}, score=score)
    assert all(torch.equal(masks[name], found[name]) for name in masks)
    again = pruning.global_masks(model, 0.7, {name: mask.to(memory_format=torch.channels_last) if mask.dim() == 4
                                              else mask for name, mask in found.items()}, score=score)
    assert sum(int(mask.sum()) for mask in again.values()) < sum(int(mask.sum()) for mask in found.values())
