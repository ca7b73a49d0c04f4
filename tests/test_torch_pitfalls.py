"""What torch.nn.utils.prune does that surprises, beside what ours does in its place."""
import copy
import math

import pytest
import torch
from samples import small_model, to_prune, two_rounds
from torch import nn
from torch.nn.utils import prune

import pruning


def test_torch_prunes_its_own_zeros_again_after_remove():
    theirs, ours = nn.Linear(100, 100), nn.Linear(100, 100)
    for _ in range(2):
        prune.global_unstructured([(theirs, "weight")], prune.L1Unstructured, amount=0.7)
        prune.remove(theirs, "weight")
    assert pruning.sparsity_of(theirs) == 0.70
    two_rounds(ours, 0.7)
    assert pruning.sparsity_of(ours) == 0.91


@pytest.mark.parametrize("momentum, decay", [(0.9, 0.0), (0.0, 1e-2), (0.9, 1e-2)])
def test_torch_revives_weights_that_are_trained_after_remove(momentum, decay):
    """Its zeros move at the next step; ours stay, with the same optimizer, by mask (as in `train.train_step`)."""
    images, revived = torch.randn(16, 20), {}
    for masked in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(20, 10)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum, weight_decay=decay)
        masks = pruning.global_masks(nn.Sequential(layer), 0.7)
        if not masked:
            prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.7)
            prune.remove(layer, "weight")
        for _ in range(3):
            optimizer.zero_grad()
            layer(images).square().sum().backward()
            optimizer.step()
            if masked:
                pruning.apply_masks(nn.Sequential(layer), masks)
        revived[masked] = int((layer.weight != 0).sum()) - 60
    assert revived == {False: 140, True: 0}


def test_torch_modules_cannot_be_copied_once_pruned_and_ours_can():
    images = torch.randn(2, 3, 8, 8)
    theirs, ours = small_model(), small_model()
    prune.global_unstructured(to_prune(theirs), prune.L1Unstructured, amount=0.7)
    theirs(images)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)
    pruning.apply_masks(ours, pruning.global_masks(ours, 0.7))
    ours(images)
    twin = copy.deepcopy(ours)
    assert torch.equal(twin.eval()(images), ours.eval()(images))


def test_torch_renames_the_weights_and_ours_load_into_a_plain_network():
    theirs, ours = small_model(), small_model()
    names = set(theirs.state_dict())
    prune.global_unstructured(to_prune(theirs), prune.L1Unstructured, amount=0.7)
    assert {"0.weight_orig", "0.weight_mask"} <= set(theirs.state_dict()) and "0.weight" not in theirs.state_dict()
    with pytest.raises(RuntimeError, match="weight_orig"):
        small_model().load_state_dict(theirs.state_dict())
    two_rounds(ours, 0.7)
    assert set(ours.state_dict()) == names
    small_model(seed=1).load_state_dict(ours.state_dict())


def test_torch_reads_one_and_one_point_zero_differently_and_ours_refuses_both():
    one, whole = (prune.l1_unstructured(nn.Linear(10, 10), "weight", amount=amount) for amount in (1, 1.0))
    assert int((one.weight_mask == 0).sum()) == 1 and int((whole.weight_mask == 0).sum()) == 100
    for amount in (1, 1.0):
        with pytest.raises(ValueError, match="ambiguous"):
            pruning.global_masks(small_model(), amount)


def test_torch_ranks_nan_as_largest_and_ours_refuses_it():
    theirs = nn.Linear(10, 10)
    with torch.no_grad():
        theirs.weight[3, 4] = math.nan
    prune.l1_unstructured(theirs, "weight", amount=0.9)
    assert theirs.weight_mask[3, 4] == 1
    prune.remove(theirs, "weight")
    with pytest.raises(ValueError, match="weight has 1 weights"):
        pruning.global_masks(nn.Sequential(theirs), 0.5)
