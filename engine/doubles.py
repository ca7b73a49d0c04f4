"""float64, which a Mac's GPU does not have: there it is computed on the CPU."""
WITHOUT = ("mps",)      # kinds of devices


def in_double(tensor):
    """A tensor as float64: on its device, or on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type in WITHOUT else tensor).double()


def back(tensor, device):
    """A tensor of `in_double` on `device` again; as float32 where that has no float64."""
    return (tensor.float() if device.type in WITHOUT else tensor).to(device)
