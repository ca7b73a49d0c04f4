"""float64 on all devices: a Mac's GPU does not have it, so it is computed on the CPU there."""
WITHOUT = ("mps",)      # device types without float64


def in_double(tensor):
    """A tensor as float64, on its device or, if that has no float64, on the CPU."""
    return (tensor.cpu() if tensor.device.type in WITHOUT else tensor).double()


def back(tensor, device):
    """Move a tensor from `in_double` back to `device`; as float32 if that has no float64."""
    return (tensor.float() if device.type in WITHOUT else tensor).to(device)
