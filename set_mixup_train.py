"""mixup: two images are averaged, and so are their labels.

    images, targets = mixup(images, targets, generator, alpha=1.0)

Zhang et al. 2018 (arXiv:1710.09412), equation 2. `train.py` calls it on each
batch when the line MIXING = "mixup" is active. The targets are class
probabilities, so that label smoothing and distillation compose with it: the
cross-entropy of averaged targets is the average of the cross-entropies.
"""
import torch

from engine.draws import draw_shares


def mixup(images, targets, generator, alpha=1.0, probability=1.0, per_sample=False):
    """Average a batch with a permutation of itself; the arguments are not written to.

    images: (N, C, H, W) float; targets: (N, K) class probabilities; generator: on
    the same device, the only source of randomness. lambda ~ Beta(alpha, alpha);
    alpha <= 0 means no mixing. Images are mixed with `probability`, drawn for
    the batch or for each sample. Returns images and targets of the same shapes.
    """
    if alpha <= 0 or probability <= 0:
        return images, targets
    partner = torch.randperm(len(images), generator=generator, device=images.device)
    share = draw_shares(alpha, probability, len(images) if per_sample else 1, generator, images.device)
    return blend(images, targets, partner, share)


def blend(images, targets, partner, share):
    """mixup for given draws: lambda x + (1 - lambda) x[partner], images and targets alike.

    partner: (N,) indices; share: (N,) or (1,) lambda in [0, 1].
    """
    each_image, each_target = share.view(-1, 1, 1, 1).to(images.dtype), share.view(-1, 1).to(targets.dtype)
    return (each_image * images + (1 - each_image) * images[partner],
            each_target * targets + (1 - each_target) * targets[partner])
