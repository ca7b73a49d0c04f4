"""CutMix: a box of one image is pasted into another, and the label follows its area.

    images, targets = cutmix(images, targets, generator, alpha=1.0, probability=0.5)

Yun et al. 2019 (arXiv:1905.04899), section 3 and algorithm A1. `train.py` calls
it on each batch when the line MIXING = "cutmix" is active. The targets are class
probabilities, so that label smoothing and distillation compose with it.
"""
import torch

from engine.draws import draw_shares, span


def cutmix(images, targets, generator, alpha=1.0, probability=1.0, per_sample=False):
    """Mix a batch with a permutation of itself; the arguments are not written to.

    images: (N, C, H, W) float; targets: (N, K) class probabilities; generator: on
    the same device, the only source of randomness. lambda ~ Beta(alpha, alpha);
    alpha <= 0 means no mixing. The box is pasted with `probability`, drawn for
    the batch or for each sample. Returns images and targets of the same shapes.
    """
    if alpha <= 0 or probability <= 0:
        return images, targets
    count, (height, width) = len(images), images.shape[-2:]
    draws = count if per_sample else 1
    partner = torch.randperm(count, generator=generator, device=images.device)
    share = draw_shares(alpha, probability, draws, generator, images.device)
    rows = (torch.rand(draws, generator=generator, device=images.device) * height).long()
    columns = (torch.rand(draws, generator=generator, device=images.device) * width).long()
    return paste(images, targets, partner, share, rows, columns)


def paste(images, targets, partner, share, rows, columns):
    """CutMix for given draws: paste the partner's box, weight the targets by the remaining area.

    partner: (N,) indices; share: (N,) or (1,) lambda in [0, 1]; rows, columns: the
    centres of the boxes, of the same shape as share. A box has the sides
    int(side * sqrt(1 - lambda)) and is clipped at the border; lambda is then
    recomputed as 1 - area / (H W).
    """
    height, width = images.shape[-2:]
    side = (1 - share).sqrt()
    inside_rows, tall = span(rows, side, height)
    inside_columns, wide = span(columns, side, width)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    kept = (1 - tall * wide / (height * width)).to(targets.dtype)[:, None]
    return torch.where(inside, images[partner], images), kept * targets + (1 - kept) * targets[partner]
