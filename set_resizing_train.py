"""Progressive resizing: each round begins with smaller images, which cost fewer operations.

    images = resized(images, side_of(progress, 32, small=20, until=0.5))

After Tan and Le 2021 (arXiv:2104.00298), section 4, without their change of
regularization. A network that averages its last feature map takes images of any
size with the same weights. `train.py` calls it on each batch when
--resize is given; validation and tests are always at the full size.
"""
import torch
import torch.nn.functional as F

from engine.modes import in_mode
from engine.settings import Setting

SETTINGS = {
    "resize": Setting(None, "side of the training images at the start of each round, smaller for speed", form=int,
                      shown="PIXELS", unless=(("resize_until", 0),)),
    "resize_until": Setting(0.5, "fraction of a round after which images have full size", low=0, high=1,
                            only=(("resize", ()),)),
}
SMALLEST = 8        # pixels; below it a strided convolution reads single pixels, and its bfloat16 gradient is garbage


def side_of(progress, side, small, until):
    """Side of training images in pixels at `progress` in [0, 1] of a round: `small` before `until`, then `side`."""
    return small if small is not None and progress < until else side


def resized(images, side):
    """Resize (N, C, H, W) float images to (N, C, side, side), bilinear, antialiased; unchanged if they fit already."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def share_of_work(side, small, until):
    """Operations of a round, relative to one with images of the full size throughout."""
    return 1.0 if small is None else until * (small / side) ** 2 + 1 - until


def check_resize(model, shape, small):
    """Raise ValueError unless `model` takes `small` x `small` images, at least `SMALLEST`, below the data set's size.

    shape: (C, H, W) of the data set's images. In images of 4 pixels the last
    convolution of stride 2 reads 1x1 maps; oneDNN's gradient of its weight, grouped
    and in bfloat16, then reads uninitialised memory.
    """
    if small is None:
        return
    channels, height, _ = shape
    if not SMALLEST <= small < height:
        raise ValueError(f"--resize {small}: it must be at least {SMALLEST} and below the {height} pixels of the data "
                         "set's images")
    least = next((side for side in range(small, height) if takes(model, channels, side)), None)
    if least is None:
        raise ValueError(f"--resize {small}: this network takes images of {height} x {height} pixels alone, since its "
                         "last feature map is not averaged")
    if least > small:
        raise ValueError(f"--resize {small}: this network takes images of {least} pixels at least")


def takes(model, channels, side):
    """Whether a network takes images of (channels, side, side)."""
    try:
        with torch.no_grad(), in_mode(model):
            model(torch.zeros(1, channels, side, side, device=next(model.parameters()).device))
        return True
    except (RuntimeError, ValueError):
        return False
