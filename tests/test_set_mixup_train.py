import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from set_mixup_train import blend, mixup


def batch(count=6, side=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return torch.randn(count, 3, side, side, generator=generator), F.one_hot(labels, classes).float(), labels


@given(st.integers(0, 2**31), st.integers(2, 9), st.floats(0, 1))
def test_blend_is_equation_two(seed, count, share):
    images, targets, _ = batch(count, seed=seed)
    partner = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mixed, soft = blend(images, targets, partner, torch.tensor([share]))
    for i in range(count):
        j = int(partner[i])
        assert torch.allclose(mixed[i], share * images[i] + (1 - share) * images[j], atol=1e-6)
        assert torch.allclose(soft[i], share * targets[i] + (1 - share) * targets[j], atol=1e-6)


def test_equals_torchvision(monkeypatch):
    """torchvision rolls the batch by one; the same partner and lambda give the same batch."""
    from torchvision.transforms import v2
    images, targets, labels = batch()
    transform = v2.MixUp(alpha=1.0, num_classes=4)
    monkeypatch.setattr(transform, "make_params", lambda inputs: {
        "labels": labels, "batch_size": len(images), "lam": 0.3})
    theirs, their_targets = transform(images.clone(), labels)
    partner = torch.arange(len(images)).roll(1)
    ours, our_targets = blend(images, targets, partner, torch.tensor([0.3]))
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(our_targets, their_targets, atol=1e-6)


def test_loss_of_soft_targets_is_the_mixed_loss():
    images, targets, labels = batch()
    partner, logits = torch.arange(6).roll(2), torch.randn(6, 4)
    _, soft = blend(images, targets, partner, torch.tensor([0.7]))
    by_parts = 0.7 * F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(logits, labels[partner])
    assert torch.allclose(F.cross_entropy(logits, soft), by_parts, atol=1e-6)


def test_the_callers_batch_and_the_global_generator_stay():
    images, targets, _ = batch()
    kept, state = (images.clone(), targets.clone()), torch.get_rng_state()
    mixup(images, targets, torch.Generator().manual_seed(1))
    assert torch.equal(images, kept[0]) and torch.equal(targets, kept[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("alpha, probability", [(0, 1), (-1, 1), (1, 0)])
def test_no_mixing(alpha, probability):
    images, targets, _ = batch()
    mixed, soft = mixup(images, targets, torch.Generator(), alpha, probability)
    assert mixed is images and soft is targets


def test_one_lambda_for_the_batch_or_one_for_each_sample():
    images, targets = torch.zeros(64, 1, 1, 1), torch.eye(64)
    for per_sample in (False, True):
        _, soft = mixup(images, targets, torch.Generator().manual_seed(0), per_sample=per_sample)
        shares = {round(value, 4) for value in soft.diag().tolist() if value < 1}
        assert (len(shares) > 10) == per_sample
        assert torch.allclose(soft.sum(1), torch.ones(64), atol=1e-6)


def test_probability_is_the_share_of_mixed_batches():
    images, targets = torch.arange(4.0).view(4, 1, 1, 1), torch.eye(4)
    generator = torch.Generator().manual_seed(0)
    mixed = sum(not torch.equal(mixup(images, targets, generator, probability=0.5)[0], images) for _ in range(400))
    assert 140 < mixed < 220        # half of 400, less the draws of a partner that is oneself
