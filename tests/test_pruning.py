"""Global magnitude pruning: against torch's, exact counts, and zeros that stay."""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import small_model, to_prune, two_rounds
from torch import nn
from torch.nn.utils import prune

import experiment
import pruning
import train

WEIGHTS = ("0.weight", "3.weight", "6.weight")
TOTAL = 216 + 288 + 640


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


# ---- parity and counts

def test_masks_are_those_of_torch_over_two_rounds():
    ours, theirs = small_model(), small_model()
    masks = None
    for sparsity in (0.7, 0.5):
        masks = pruning.global_masks(ours, sparsity, masks, minimum_density=0)
        prune.global_unstructured(to_prune(theirs), prune.L1Unstructured, amount=sparsity)
        for name, (module, _) in zip(WEIGHTS, to_prune(theirs), strict=True):
            assert masks[name].dtype == torch.bool
            assert torch.equal(masks[name], module.weight_mask.bool()), name


def test_two_rounds_of_seventy_percent_leave_nine():
    model = nn.Linear(100, 100)
    masks = two_rounds(model, 0.7)
    assert kept(masks) == 900
    assert pruning.sparsity_of(model) == 0.91


def test_counts_are_exact_where_all_weights_are_equal():
    model = small_model()
    for name in WEIGHTS:
        nn.init.constant_(model.get_parameter(name), -0.25)
    masks = pruning.global_masks(model, 0.7)
    assert kept(masks) == TOTAL - round(0.7 * TOTAL)
    again = pruning.global_masks(model, 0.7, masks)
    assert kept(again) == kept(masks) - round(0.7 * kept(masks))
    assert all(bool((masks[name] | ~again[name]).all()) for name in WEIGHTS)


def test_only_convolution_and_linear_weights_are_pruned():
    masks = pruning.global_masks(small_model(), 0.5)
    assert tuple(masks) == WEIGHTS
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "0.weight": (8, 3, 3, 3), "3.weight": (16, 2, 3, 3), "6.weight": (10, 64)}


def test_sparsity_zero_keeps_everything():
    assert kept(pruning.global_masks(small_model(), 0)) == kept(pruning.global_masks(small_model(), 0.0)) == TOTAL


def test_half_precision_weights_are_ranked():
    assert kept(pruning.global_masks(small_model().bfloat16(), 0.7)) == TOTAL - round(0.7 * TOTAL)


def test_ranking_ignores_what_is_already_dropped():
    model = small_model()
    masks = pruning.global_masks(model, 0.5)
    with torch.no_grad():
        for name in WEIGHTS:                       # not applied, and grown: a dropped weight must not come back
            model.get_parameter(name).masked_fill_(~masks[name], 100.0)
    again = pruning.global_masks(model, 0.5, masks)
    assert kept(again) == kept(masks) - round(0.5 * kept(masks))
    assert not any(bool((again[name] & ~masks[name]).any()) for name in WEIGHTS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), first=st.floats(0, 0.95), second=st.floats(0, 0.95),
       minimum=st.sampled_from([0.0, 0.01, 0.1]), decimals=st.sampled_from([0, 1, 6]))
def test_rounds_are_nested_exact_and_keep_the_largest(seed, first, second, minimum, decimals):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(7, 11))
    with torch.no_grad():
        for position, layer in enumerate(model):
            layer.weight.normal_(0, 10.0 ** (position - 1)).round_(decimals=decimals)     # many ties, uneven layers
    floors = {name: max(1, math.ceil(minimum * weight.numel())) for name, weight in pruning.prunable(model).items()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in pruning.prunable(model).items()}
    for sparsity in (first, second):
        remaining, before = kept(masks), masks
        removed = round(sparsity * remaining)
        assume(remaining - removed >= sum(floors.values()))
        masks = pruning.global_masks(model, sparsity, masks, minimum_density=minimum)
        assert kept(masks) == remaining - removed
        assert not any(bool((masks[name] & ~before[name]).any()) for name in masks)
        pruning_took = [model.get_parameter(name).abs()[before[name] & ~masks[name]] for name in masks]
        largest_dropped = torch.cat(pruning_took).max() if removed else 0
        for name, mask in masks.items():
            assert int(mask.sum()) >= floors[name]
            smallest_kept = model.get_parameter(name).abs()[mask].min()
            assert smallest_kept >= largest_dropped or int(mask.sum()) == floors[name], name
        pruning.apply_masks(model, masks)


# ---- bad input

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_with_tensor_and_count(value):
    model = small_model()
    with torch.no_grad():
        model[3].weight[5, 1, 0] = value
    with pytest.raises(ValueError, match="^3.weight has 3 weights that are NaN or infinite"):
        pruning.global_masks(model, 0.7)


@pytest.mark.parametrize(("value", "message"), [
    (1, "sparsity 1 is ambiguous"), (1.0, "ambiguous"), (-0.1, r"outside \[0, 1\)"), (1.5, "outside"), (70, "outside"),
    (math.nan, "outside"), (math.inf, "outside"), ("0.7", "no number"), (None, "no number"), (True, "no number"),
    (False, "no number"), ([0.7], "no number")])
def test_sparsity_outside_its_range_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        pruning.check_sparsity(value)
    with pytest.raises(ValueError, match=message):
        pruning.global_masks(small_model(), value)


@pytest.mark.parametrize("value", [0, 0.0, 0.7, 1 - 1e-9, np.float64(0.7)])
def test_sparsity_within_its_range_is_a_float(value):
    assert pruning.check_sparsity(value) == value
    assert type(pruning.check_sparsity(value)) is float


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_minimum_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match="minimum density"):
        pruning.global_masks(small_model(), 0.5, minimum_density=density)


# ---- minimum density and exclusion

def faint_layer():
    """A model whose second convolution is far smaller than the rest, so that ranking alone would empty it."""
    model = small_model()
    with torch.no_grad():
        model[3].weight.mul_(1e-4)
    return model


def test_minimum_density_holds_in_each_layer_and_keeps_its_largest():
    model = faint_layer()
    masks = two_rounds(model, 0.7, minimum_density=0.05)
    floor = math.ceil(0.05 * 288)
    assert int(masks["3.weight"].sum()) == floor
    assert all(int(mask.sum()) >= math.ceil(0.05 * mask.numel()) for mask in masks.values())
    expected = faint_layer()[3].weight.abs().flatten().topk(floor).indices.sort().values
    assert torch.equal(masks["3.weight"].flatten().nonzero().flatten(), expected)
    remaining = TOTAL - round(0.7 * TOTAL)
    assert kept(masks) == remaining - round(0.7 * remaining)       # the others give what it keeps
    assert pruning.held_layers(masks, 0.05) == ["3.weight"]


def test_every_layer_keeps_at_least_one_weight():
    masks = pruning.global_masks(faint_layer(), 0.95, minimum_density=0)
    assert int(masks["3.weight"].sum()) == 1


def test_density_that_cannot_be_held_is_refused():
    with pytest.raises(ValueError, match=r"sparsity 0.9 leaves 114 weights.*0.2 by layer holds 230"):
        pruning.global_masks(small_model(), 0.9, minimum_density=0.2)


def test_excluded_layers_are_neither_pruned_nor_counted():
    model = small_model()
    masks = pruning.global_masks(model, 0.7, exclude=("0", "6"))
    assert tuple(masks) == ("3.weight",) and kept(masks) == 288 - round(0.7 * 288)
    pruning.apply_masks(model, masks)
    assert pruning.sparsity_of(model, exclude=("0", "6")) == 1 - kept(masks) / 288
    assert bool((model[0].weight != 0).all())


def test_unknown_layer_to_exclude_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'conv9'; there are 0, 3, 6"):
        pruning.global_masks(small_model(), 0.7, exclude=("conv9",))


def test_layer_excluded_later_keeps_the_mask_it_has():
    model = small_model()
    first = pruning.global_masks(model, 0.5)
    second = pruning.global_masks(model, 0.5, first, exclude=("6",))
    assert torch.equal(second["6.weight"], first["6.weight"])


def test_layer_included_later_starts_whole():
    model = small_model()
    first = pruning.global_masks(model, 0.5, exclude=("6",))
    remaining = kept(first) + 640
    assert kept(pruning.global_masks(model, 0.5, first)) == remaining - round(0.5 * remaining)


# ---- what is written, and zeros that stay

def test_ranking_changes_nothing_in_the_model_nor_in_the_masks():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    outer = torch.get_rng_state()
    masks = pruning.global_masks(model, 0.5)
    kept_masks = copy.deepcopy(masks)
    pruning.global_masks(model, 0.5, masks)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(masks[name], kept_masks[name]) for name in masks)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(outer, torch.get_rng_state())


def test_apply_masks_zeroes_what_is_dropped_and_nothing_else():
    model, plain = small_model(), small_model()
    masks = pruning.global_masks(model, 0.7)
    weight = model[0].weight
    pruning.apply_masks(model, masks)
    assert model[0].weight is weight and weight.requires_grad
    for name, tensor in plain.state_dict().items():
        expected = torch.where(masks[name], tensor, 0.0) if name in masks else tensor
        assert torch.equal(model.state_dict()[name], expected), name
    assert pruning.sparsity_of(model) == round(0.7 * TOTAL) / TOTAL


def test_mask_gradients_zeroes_those_of_dropped_weights():
    model = small_model()
    masks = pruning.global_masks(model, 0.7)
    pairs = pruning.mask_pairs(model, masks)
    pruning.mask_gradients(*pairs)                                   # no gradient yet: nothing to do
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    pruning.mask_gradients(*pairs)
    for name, parameter in model.named_parameters():
        expected = torch.where(masks[name], whole[name], 0.0) if name in masks else whole[name]
        assert torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize("nesterov", [True, False])
def test_dropped_weights_stay_exactly_zero_through_fifty_steps_and_the_average(tmp_path, nesterov):
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))] * 50
    options = {**train.DEFAULTS, "epochs": [1], "mixing": "cutmix", "weights": "float", "schedule": "one-cycle",
               "averaging": "ema", "optimizer": "sgd", "lr": 0.1, "nesterov": nesterov, "weight_decay": 1e-2,
               "ema_decay": 0.9}
    run = experiment.Run(options, tmp_path, torch.device("cpu"), {"num_classes": 10}, model, generator, batches, None,
                         forward=model)
    experiment.begin_round(run)
    for step, (images, labels) in enumerate(batches[:5]):            # momentum of weights that are dropped later
        train.train_step(run, images, labels, step)
    run.masks = pruning.global_masks(model, 0.8)
    pruning.apply_masks(model, run.masks)
    run.average = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    for step, (images, labels) in enumerate(batches[:45]):
        train.train_step(run, images, labels, step)
        for network in (model, run.average):
            for name, mask in run.masks.items():
                assert bool((network.get_parameter(name)[~mask] == 0).all()), (step, name)
    assert pruning.sparsity_of(model) == pruning.sparsity_of(run.average) == round(0.8 * TOTAL) / TOTAL
    for name, mask in run.masks.items():
        assert bool((model.get_parameter(name)[mask] != start[name][mask]).all())      # the others did train


def test_dropped_weights_gather_no_momentum(tmp_path):
    model, generator = small_model(), torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))] * 3
    options = {**train.DEFAULTS, "epochs": [1], "mixing": "none", "weights": "float",
               "schedule": "one-cycle", "averaging": "none", "optimizer": "sgd"}
    run = experiment.Run(options, tmp_path, torch.device("cpu"), {"num_classes": 10}, model, generator, batches, None,
                         forward=model)
    run.masks = pruning.global_masks(model, 0.8)
    pruning.apply_masks(model, run.masks)
    experiment.begin_round(run)
    for step, (images, labels) in enumerate(batches):
        train.train_step(run, images, labels, step)
    for name, mask in run.masks.items():
        slot = run.optimizer.state[model.get_parameter(name)]["momentum_buffer"]
        assert bool((slot[~mask] == 0).all()) and bool((slot[mask] != 0).any()), name


# ---- scores of one's own

@pytest.mark.parametrize("score", [lambda weight: weight.detach().abs().log(), lambda weight: weight.detach().abs() - 9,
                                   lambda weight: -1 / weight.detach().abs()])
def test_scores_below_zero_rank_as_others_do(score, monkeypatch):
    """Each rises with the magnitude, so the masks are those of the magnitude, round after round."""
    monkeypatch.setitem(pruning.SCORES, "own", score)
    by_magnitude, by_own = small_model(), small_model()
    for model in (by_magnitude, by_own):
        with torch.no_grad():
            model[0].weight.flatten()[:5] = 0          # whose logarithm is minus infinity
    expected = two_rounds(by_magnitude, 0.6)
    found = two_rounds(by_own, 0.6, score="own")
    assert all(torch.equal(found[name], expected[name]) for name in WEIGHTS)


def test_a_signed_score_takes_the_lowest(monkeypatch):
    monkeypatch.setitem(pruning.SCORES, "signed", lambda weight: weight.detach())
    model = small_model()
    masks = pruning.global_masks(model, 0.5, minimum_density=0, score="signed")
    values = torch.cat([model.get_parameter(name).flatten() for name in WEIGHTS])
    mask = torch.cat([masks[name].flatten() for name in WEIGHTS])
    assert values[mask].min() > values[~mask][values[~mask] < values.median()].max()
    assert kept(masks) == TOTAL // 2


def test_a_score_that_is_no_number_is_refused_by_its_layer(monkeypatch):
    monkeypatch.setitem(pruning.SCORES, "own", lambda weight: weight.detach().sqrt())
    with pytest.raises(ValueError, match="scores of 0.weight are NaN"):
        pruning.global_masks(small_model(), 0.5, score="own")
