"""Random draws for mixing, from the one generator that a run saves.

torch.distributions takes no generator, so that a resumed run could not repeat
its draws; these do.
"""
import torch


def draw_beta(alpha, count, generator, device):
    """(count,) draws of Beta(alpha, alpha) for alpha > 0; float64, since small alphas come close to 0 and 1."""
    if alpha == 1:
        return torch.rand(count, generator=generator, device=device)
    shape = torch.full((2, count), float(alpha), device=device, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator)      # the sampler beneath torch.distributions.Gamma
    return gamma[0] / gamma.sum(0)


def draw_shares(alpha, probability, count, generator, device):
    """(count,) shares of an image that stay its own: Beta(alpha, alpha) with `probability`, else 1."""
    share = draw_beta(alpha, count, generator, device)
    mixed = torch.rand(count, generator=generator, device=device) < probability
    return torch.where(mixed, share, torch.ones_like(share))
