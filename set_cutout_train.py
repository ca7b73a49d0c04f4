"""Cutout: a square of each image is blanked, and the label stays.

    images, targets = cutout(images, targets, generator, probability=1.0)

DeVries and Taylor 2017 (arXiv:1708.04552). `train.py` calls it on each batch when the
line MIXING = "cutout" is active. The square has three eighths of the image's side (12 of
32 pixels, as in airbench), is centred anywhere, and is clipped at the border.
"""
import torch

from engine.draws import span

SIDE = 3 / 8


def cutout(images, targets, generator, alpha=1.0, probability=1.0, per_sample=False):
    """Blank a square in each image, at its own random place; the arguments are not written to.

    images: (N, C, H, W) float, normalised, so that 0 is the mean colour; targets: (N, K)
    class probabilities, returned unchanged; generator: on the same device. The
    whole batch, or with per_sample each image, is blanked with `probability`; alpha <= 0 means none.
    """
    if alpha <= 0 or probability <= 0:
        return images, targets
    count, device = len(images), images.device

    def draw(number):
        return torch.rand(number, generator=generator, device=device)
    blanked = draw(count if per_sample else 1) < probability
    rows, columns = ((draw(count) * size).long() for size in images.shape[-2:])
    side = torch.full((count,), SIDE, device=device)
    inside = (span(rows, side, images.shape[-2])[0][:, None, :, None]
              & span(columns, side, images.shape[-1])[0][:, None, None, :])
    return images.masked_fill(inside & blanked[:, None, None, None], 0.0), targets
