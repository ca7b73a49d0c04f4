"""CutMix: against torchvision, against the paper's equations, and where its randomness comes from."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.draws import draw_beta
from set_cutmix_train import cutmix, paste


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=8, height=16, width=16, classes=5, channels=3):
    """Images whose every pixel is unique, one-hot targets."""
    images = torch.arange(float(count * channels * height * width)).view(count, channels, height, width)
    return images, torch.eye(classes)[torch.arange(count) % classes]


def paste_by_hand(images, targets, partner, share, rows, columns):
    """Yun et al. 2019, equation 2 and algorithm A1, pixel by pixel. Also returns lambda of each sample."""
    count, _, height, width = images.shape
    mixed, labels, kept = images.clone(), targets.clone(), []
    for n in range(count):
        draw = n if len(share) > 1 else 0
        ratio = math.sqrt(1 - share[draw].item())
        tall, wide = int(height * ratio), int(width * ratio)
        top, left = max(0, int(rows[draw]) - tall // 2), max(0, int(columns[draw]) - wide // 2)
        bottom, right = min(height, int(rows[draw]) + tall // 2), min(width, int(columns[draw]) + wide // 2)
        for row in range(top, bottom):
            for column in range(left, right):
                mixed[n, :, row, column] = images[partner[n], :, row, column]
        kept.append(1 - (bottom - top) * (right - left) / (height * width))
        labels[n] = kept[n] * targets[n] + (1 - kept[n]) * targets[partner[n]]
    return mixed, labels, kept


# ---- parity

@pytest.mark.parametrize("seed", range(20))
def test_paste_equals_torchvision_on_the_same_draws(seed, monkeypatch):
    from torchvision.transforms import v2
    images, targets = batch(6, height=17, width=24)
    share = torch.rand(1, generator=seeded(seed))
    row, column = (torch.randint(size, (1,), generator=seeded(seed + 100)) for size in (17, 24))
    theirs = v2.CutMix(num_classes=5)
    theirs._dist = type("Fixed", (), {"sample": lambda self, shape: share[0]})()
    centre = iter([column, row])
    monkeypatch.setattr(torch, "randint", lambda *arguments, **options: next(centre))
    expected_images, expected_targets = theirs(images, targets)
    partner = torch.arange(6).roll(1)
    mixed, labels = paste(images, targets, partner, share, row, column)
    assert torch.equal(mixed, expected_images)
    torch.testing.assert_close(labels, expected_targets, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(1, 5), height=st.integers(1, 12), width=st.integers(1, 12), per_sample=st.booleans(),
       seed=st.integers(0, 10_000), share=st.sampled_from([None, 0.0, 0.19, 0.5, 0.75, 1.0]))
def test_paste_equals_the_equations_by_hand(count, height, width, per_sample, seed, share):
    generator, draws = seeded(seed), count if per_sample else 1
    images, targets = batch(count, height, width)
    partner = torch.randperm(count, generator=generator)
    shares = torch.rand(draws, generator=generator) if share is None else torch.full((draws,), share)
    rows, columns = (torch.randint(size, (draws,), generator=generator) for size in (height, width))
    mixed, labels = paste(images, targets, partner, shares, rows, columns)
    expected, expected_labels, _ = paste_by_hand(images, targets, partner, shares, rows, columns)
    assert torch.equal(mixed, expected)
    torch.testing.assert_close(labels, expected_labels, rtol=0, atol=1e-6)


def test_a_box_at_the_corner_is_clipped_and_its_label_follows_the_pixels():
    images, targets = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.eye(2)
    mixed, labels = paste(images, targets, torch.tensor([1, 0]), torch.tensor([0.75]), torch.tensor([0]),
                          torch.tensor([7]))
    assert mixed[0, 0].sum() == 2 * 3 and mixed[0, 0, :2, 5:].eq(1).all()       # 4x4, two rows and a column outside
    assert labels[0].tolist() == [1 - 6 / 64, 6 / 64]
    assert labels[1].tolist() == [6 / 64, 1 - 6 / 64]


# ---- labels, and what is left alone

@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(1, 6), height=st.integers(1, 20), width=st.integers(1, 20), per_sample=st.booleans(),
       seed=st.integers(0, 10_000), alpha=st.sampled_from([0.2, 1.0, 4.0]))
def test_lambda_is_the_share_of_pixels_kept_and_targets_sum_to_one(count, height, width, per_sample, seed, alpha):
    images = torch.arange(float(count))[:, None, None, None].expand(count, 3, height, width)
    targets = torch.eye(count)                                # each image is its own class, its pixels name it
    mixed, labels = cutmix(images, targets, seeded(seed), alpha=alpha, per_sample=per_sample)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    for n in range(count):
        shares = torch.bincount(mixed[n, 0].flatten().long(), minlength=count) / (height * width)
        torch.testing.assert_close(labels[n], shares, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_sample", [True, False])
def test_callers_images_and_targets_are_unchanged(per_sample):
    images, targets = batch()
    kept = images.clone(), targets.clone()
    mixed, labels = cutmix(images, targets, seeded(1), per_sample=per_sample)
    assert not torch.equal(mixed, images) and not torch.equal(labels, targets)
    assert torch.equal(images, kept[0]) and torch.equal(targets, kept[1])


def test_soft_targets_are_mixed_as_they_are():
    images, _ = batch(4)
    targets = torch.softmax(torch.randn(4, 5, generator=seeded()), 1)
    partner, share, centre = torch.tensor([1, 2, 3, 0]), torch.tensor([0.36]), torch.tensor([8])
    _, labels = paste(images, targets, partner, share, centre, centre)
    _, expected, kept = paste_by_hand(images, targets, partner, share, centre, centre)
    assert kept[0] == 1 - 144 / 256
    torch.testing.assert_close(labels, expected)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha": -1.0}, {"probability": 0.0}])
@pytest.mark.parametrize("per_sample", [True, False])
def test_no_mixing_gives_the_same_batch(options, per_sample):
    images, targets = batch()
    for seed in range(5):
        mixed, labels = cutmix(images, targets, seeded(seed), per_sample=per_sample, **options)
        assert torch.equal(mixed, images) and torch.equal(labels, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_types_are_kept(dtype):
    images, targets = batch(4)
    mixed, labels = cutmix(images.to(dtype), targets.to(dtype), seeded(), per_sample=True)
    assert mixed.dtype == labels.dtype == dtype


# ---- draws

def mixed_samples(images, mixed):
    return (mixed != images).flatten(1).any(1)


def test_probability_is_that_of_a_whole_batch():
    images, targets = batch(4)
    generator, hits = seeded(), []
    for _ in range(400):
        mixed, labels = cutmix(images, targets, generator, probability=0.5)
        changed = mixed_samples(images, mixed)
        hits.append(bool(changed.any()))
        assert hits[-1] or torch.equal(labels, targets)
    # a mixed batch may look unchanged: an empty box (1 - lambda below 1/64) or the identity permutation (1/24)
    assert 0.38 < sum(hits) / 400 < 0.56


def test_probability_is_that_of_each_sample():
    images, targets = batch(2000, height=8, width=8, channels=1)
    mixed, _ = cutmix(images, targets, seeded(), probability=0.5, per_sample=True)
    share = mixed_samples(images, mixed).float().mean()
    assert 0.40 < share < 0.52                           # half, less the boxes of no pixel (1 - lambda below 1/16)
    mixed, _ = cutmix(images, targets, seeded(), probability=1.0, per_sample=True)
    assert mixed_samples(images, mixed).float().mean() > 0.88


def boxes(per_sample):
    images = torch.zeros(64, 1, 16, 16)
    images[:] = torch.arange(64.0).view(-1, 1, 1, 1)
    mixed, _ = cutmix(images, torch.eye(64), seeded(3), per_sample=per_sample)
    changed = (mixed != images)[:, 0]
    return {tuple(box.flatten().tolist()) for box in changed if box.any()}


def test_boxes_are_one_a_batch_or_one_a_sample():
    assert len(boxes(per_sample=False)) == 1
    assert len(boxes(per_sample=True)) > 40


def test_centres_are_uniform_over_the_image():
    images = torch.zeros(1, 1, 9, 9).expand(40_000, 1, 9, 9)
    images = images + torch.arange(40_000.0).view(-1, 1, 1, 1)
    mixed, _ = cutmix(images, torch.ones(40_000, 1), seeded(), per_sample=True)
    covered = (mixed != images).float().mean((0, 1))
    assert covered.min() > 0
    even = covered[:8, :8]                               # sides are even: boxes lie half a pixel to the top and left
    torch.testing.assert_close(even, even.flip(0), rtol=0.06, atol=0)
    torch.testing.assert_close(even, even.flip(1), rtol=0.06, atol=0)
    torch.testing.assert_close(covered, covered.T, rtol=0.06, atol=0)


def test_all_randomness_comes_from_the_generator():
    images, targets = batch()
    torch.manual_seed(1)
    outer = torch.get_rng_state()
    first = cutmix(images, targets, seeded(5), probability=0.9, per_sample=True)
    assert torch.equal(outer, torch.get_rng_state())
    torch.manual_seed(2)
    second = cutmix(images, targets, seeded(5), probability=0.9, per_sample=True)
    other = cutmix(images, targets, seeded(6), probability=0.9, per_sample=True)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_lambda_is_uniform_for_alpha_one():
    draws = draw_beta(1.0, 50_000, seeded(), "cpu").double().sort().values
    steps = torch.arange(1, 50_001, dtype=torch.float64) / 50_000
    distance = torch.maximum((steps - draws).abs(), (draws - (steps - 1 / 50_000)).abs()).max()
    assert distance < 1.63 / 50_000**0.5                 # Kolmogorov and Smirnov, 1 %
    assert draws.min() >= 0 and draws.max() <= 1


@pytest.mark.parametrize("alpha", [0.2, 0.5, 2.0])
def test_lambda_has_the_moments_of_its_beta_distribution(alpha):
    draws = draw_beta(alpha, 200_000, seeded(), "cpu").double()
    reference = torch.distributions.Beta(alpha, alpha)
    assert draws.mean() == pytest.approx(0.5, abs=0.005)
    assert draws.var() == pytest.approx(reference.variance.item(), rel=0.02)
    kurtosis = -6 / (2 * alpha + 3)                     # excess
    assert ((draws - 0.5) ** 4).mean() == pytest.approx((3 + kurtosis) * reference.variance.item() ** 2, rel=0.02)
    assert bool(((draws >= 0) & (draws <= 1)).all())


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.01, 0.2, 0.7, 2.0, 30.0, 1e6])
def test_shares_are_beta_distributed_as_scipy_has_it(alpha):
    """The share of draws below a point, for points at both ends too, within 5 standard errors of scipy's."""
    draws, expected = draw_beta(alpha, 100_000, seeded(), "cpu").numpy(), stats.beta(alpha, alpha)
    middle = expected.ppf([0.1, 0.3, 0.5, 0.7, 0.9])
    points = np.array([1e-300, 1e-100, 1e-10, 0.01, 0.3, 0.5, 0.7, 0.99, 1 - 1e-10, *middle[middle < 1 - 1e-15]])
    wanted = expected.cdf(points)
    found = (draws[:, None] <= points).mean(0)
    assert (abs(found - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / len(draws)) + 1e-9).all()


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-8])
def test_a_share_at_the_smallest_alpha_is_one_image_or_the_other(alpha):
    draws = draw_beta(alpha, 20_000, seeded(), "cpu").double()
    assert bool(((draws < 1e-6) | (draws > 1 - 1e-6)).all()), "neither 0.5 nor NaN"
    assert (draws > 0.5).double().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("alpha", [1e15, 1e300, 1.7e308])
def test_a_share_at_the_largest_alpha_is_a_half(alpha):
    assert bool(((draw_beta(alpha, 1_000, seeded(), "cpu") - 0.5).abs() < 1e-6).all())
