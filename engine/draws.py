"""Random draws for mixing, from the one generator that a run saves, and the boxes that they place.

torch.distributions takes no generator, so that a resumed run could not repeat
its draws; these do.
"""
import torch

from engine.doubles import WITHOUT


def draw_beta(alpha, count, generator, device):
    """(count,) draws of Beta(alpha, alpha) for any finite alpha > 0; float64, since small alphas come close to 0 and 1.

    A device without float64 gets float32, drawn on the CPU from a seed of its generator.
    """
    if alpha == 1:
        return torch.rand(count, generator=generator, device=device)
    if torch.device(device).type in WITHOUT:       # nor does it have the sampler
        seed = torch.randint(2**31, (1,), generator=generator, device=device).item()
        return sample_beta(alpha, count, torch.Generator().manual_seed(seed), torch.device("cpu")).float().to(device)
    return sample_beta(alpha, count, generator, device)


def sample_beta(alpha, count, generator, device):
    """The draws of `draw_beta` in float64, for alpha other than 1.

    The odds of a share are those of two gamma variables. Gamma(a) is Gamma(a + 1) times U^(1/a), which falls below
    the smallest float64 where a is small; the logarithm of the odds does not.
    """
    shape = torch.full((2, count), float(alpha), device=device, dtype=torch.float64) + 1
    gamma = torch._standard_gamma(shape, generator=generator)      # the sampler beneath torch.distributions.Gamma
    uniform = torch.rand(2, count, generator=generator, device=device, dtype=torch.float64)
    lower, other = torch.log1p(-uniform)                           # of 1 - u in (0, 1]: finite
    return ((gamma[0] / gamma[1]).log() + (lower - other) / alpha).sigmoid()


def draw_shares(alpha, probability, count, generator, device):
    """(count,) shares of an image that stay its own: Beta(alpha, alpha) with `probability`, else 1."""
    share = draw_beta(alpha, count, generator, device)
    mixed = torch.rand(count, generator=generator, device=device) < probability
    return torch.where(mixed, share, torch.ones_like(share))


def span(centre, side, size):
    """Which positions of an axis a box covers, (N, size) bool, and how many after clipping, (N,)."""
    half = (side * size).long() // 2
    first, last = (centre - half).clamp_min(0), (centre + half).clamp_max(size)
    position = torch.arange(size, device=centre.device)
    return (position >= first[:, None]) & (position < last[:, None]), last - first
