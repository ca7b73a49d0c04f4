"""Random draws for mixing images, from the generator that a run saves, and the boxes placed by them.

torch.distributions takes no generator, so a resumed run could not repeat its draws; these
functions take one.
"""
import torch

from engine.doubles import WITHOUT


def draw_beta(alpha, count, generator, device):
    """(count,) draws of Beta(alpha, alpha) for finite alpha > 0, in float64: with a small alpha they lie near 0 and 1.

    A device without float64 gets float32, drawn on the CPU from a seed of its generator.
    """
    if alpha == 1:
        return torch.rand(count, generator=generator, device=device)
    if torch.device(device).type in WITHOUT:       # it has no gamma sampler either
        seed = torch.randint(2**31, (1,), generator=generator, device=device).item()
        return sample_beta(alpha, count, torch.Generator().manual_seed(seed), torch.device("cpu")).float().to(device)
    return sample_beta(alpha, count, generator, device)


def sample_beta(alpha, count, generator, device):
    """The draws of `draw_beta` in float64, for alpha other than 1.

    x / (1 - x) of a Beta draw x is the ratio of two Gamma(a) draws. Gamma(a) equals Gamma(a + 1) times U^(1/a), which
    underflows float64 for small a; the logarithm of the ratio does not.
    """
    shape = torch.full((2, count), float(alpha), device=device, dtype=torch.float64) + 1
    gamma = torch._standard_gamma(shape, generator=generator)      # the sampler beneath torch.distributions.Gamma
    uniform = torch.rand(2, count, generator=generator, device=device, dtype=torch.float64)
    lower, other = torch.log1p(-uniform)                           # of 1 - u in (0, 1]: finite
    return ((gamma[0] / gamma[1]).log() + (lower - other) / alpha).sigmoid()


def draw_shares(alpha, probability, count, generator, device):
    """(count,) shares that each image keeps of itself: drawn from Beta(alpha, alpha) with `probability`, else 1."""
    share = draw_beta(alpha, count, generator, device)
    mixed = torch.rand(count, generator=generator, device=device) < probability
    return torch.where(mixed, share, torch.ones_like(share))


def span(centre, side, size):
    """(positions of an axis that a box covers, (N, size) bool; their number after clipping, (N,))."""
    half = (side * size).long() // 2
    first, last = (centre - half).clamp_min(0), (centre + half).clamp_max(size)
    position = torch.arange(size, device=centre.device)
    return (position >= first[:, None]) & (position < last[:, None]), last - first
