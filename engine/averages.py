"""The exponential moving average (EMA) of a network's weights."""
import torch


def average_pairs(average, model):
    """(averages, weights, averages' integers, model's integers): lists of tensors of two networks of one structure."""
    old, new = average.state_dict().values(), model.state_dict().values()
    pairs = list(zip(old, new, strict=True))
    floats, integers = ([pair for pair in pairs if pair[0].is_floating_point() == wanted] for wanted in (True, False))
    return tuple([pair[side] for pair in kind] for kind in (floats, integers) for side in (0, 1))


@torch.no_grad()
def update_average(pairs, decay, step):
    """average <- d average + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)); integers are copied.

    pairs: from `average_pairs`.
    """
    averages, weights, counts, new_counts = pairs
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))
    if counts:
        torch._foreach_copy_(counts, new_counts)
