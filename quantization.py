"""Numeric precision of a trained network.

    note = set_precision(model, "half", device)    # then evaluate as always

On CUDA the arithmetic itself runs in the precision asked for. On a CPU, where
half and bfloat16 arithmetic is slower than float32, the weights are rounded to
the precision and the arithmetic stays in float32; `note` says which it was.
"""
import torch

import checkpoint

DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def set_precision(model, precision, device):
    """Convert `model` in place to "float", "half" or "bfloat16". Returns (input dtype, a note for people).

    Raises ValueError with the tensors that are not finite, or that half precision
    cannot hold, and their largest value.
    """
    dtype = DTYPES[precision]
    checkpoint.refuse_overflow(model.state_dict(), dtype)
    if device.type == "cuda" or precision == "float":
        model.to(dtype)
        return dtype, f"weights and arithmetic in {precision} precision"
    model.to(dtype).to(torch.float32)
    return torch.float32, f"weights rounded to {precision} precision, arithmetic in float32"
