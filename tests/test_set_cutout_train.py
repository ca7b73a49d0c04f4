"""Cutout: one square an image, its size, its place, and what it leaves alone."""
import pytest
import torch

from set_cutout_train import cutout


def blanked(count=200, side=32, **arguments):
    """(images, which pixels were blanked) of random images without a zero."""
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) + 0.5
    targets = torch.eye(10)[torch.arange(count) % 10]
    kept = images.clone()
    found, same = cutout(images, targets, torch.Generator().manual_seed(1), **arguments)
    assert same is targets and torch.equal(images, kept)
    gone = (found == 0).all(1)
    assert torch.equal(torch.where(gone[:, None], 0.0, images), found)
    return gone


def test_each_image_loses_one_square_of_twelve_pixels_clipped_at_the_border():
    gone = blanked()
    for rows, columns in zip(gone.any(2), gone.any(1), strict=True):
        assert 6 <= rows.sum() <= 12 and 6 <= columns.sum() <= 12
        assert (rows.int().diff().abs().sum() <= 2) and (columns.int().diff().abs().sum() <= 2)
    assert torch.equal(gone, gone.any(2)[:, :, None] & gone.any(1)[:, None, :])
    assert gone.any(2).any(0).all() and len(gone.unique(dim=0)) > 150
    assert int((gone.flatten(1).sum(1) == 144).sum()) > 50


def test_probability_for_each_image_or_for_the_batch():
    share = blanked(1000, 16, probability=0.3, per_sample=True).flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.05)
    assert blanked(20, 16, probability=0.999).flatten(1).any(1).all()


@pytest.mark.parametrize("arguments", [{"alpha": 0.0}, {"probability": 0.0}])
def test_nothing_is_blanked_where_none_is_asked_for(arguments):
    assert not blanked(**arguments).any()
