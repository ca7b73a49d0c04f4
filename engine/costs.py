"""The cost of a layer as a function of its input and output channels: multiply-adds, weights, or seconds on a device.

    pixels = pixels_of(model, (3, 32, 32))                          # {layer: (input pixels, output pixels)}
    row = row_of("conv1", model.conv1, pixels["conv1"], spaces)     # spaces: of the network's channels()
    price(row, coefficients(row, widths, "macs", None), widths)     # widths: {channel space: channels}
"""
import math

from engine.operations import layers_run

METRICS = ("macs", "parameters", "latency")
BYTES = 4        # of a weight or an activation: float32


def pixels_of(model, shape):
    """{layer: (pixels of its input, of its output)} of convolutions and linear layers, for an image of (C, H, W).

    In the order in which they run; a linear layer has one pixel. The model is not changed.
    Raises ValueError for a layer that runs twice.
    """
    pixels = {}
    for name, _, before, after in layers_run(model, shape):
        if name in pixels:
            raise ValueError(f"{name} runs twice in one pass; its cost does not follow from its widths")
        pixels[name] = math.prod(before[2:]), math.prod(after[2:])
    return pixels


def row_of(name, layer, pixels, spaces):
    """One layer as a dictionary: reads and makes name its channel spaces, None for a constant width.

    A constant width is, for example, that of the image. inputs, outputs: its widths now;
    filter: k^2; pixels: of its input and its output, 1 for linear layers; unfold: inputs per
    channel that it reads.
    """
    row = {"name": name, "reads": None, "makes": None, "unfold": 1, "depthwise": False, "pixels": pixels,
           "groups": getattr(layer, "groups", 1), "filter": math.prod(layer.weight.shape[2:])}
    for space in spaces:
        if name in space["readers"]:
            row |= {"reads": space["name"], "unfold": space["unfold"]}
        if name in space["makers"]:
            row["makes"] = space["name"]
        if name in space["depthwise"]:
            row |= {"reads": space["name"], "makes": space["name"], "depthwise": True}
    return row | {"inputs": layer.weight.shape[1] * row["groups"], "outputs": len(layer.weight)}


def sides(row, widths):
    """(A_in, A_out), the input and output channels of a layer, for {space: width}."""
    return (row["inputs"] if row["reads"] is None else widths[row["reads"]] * row["unfold"],
            row["outputs"] if row["makes"] is None else widths[row["makes"]])


def coefficients(row, widths, what, device):
    """(c, i, o) of a layer's cost c A_in A_out / groups + i A_in + o A_out.

    MACs: c = H_out W_out k^2; parameters: c = k^2; for a depthwise layer these are o.
    Latency: MACs divided by the device's peak or, if that is longer, bytes divided by its
    bandwidth; bytes of weights count in c, those of activations in i and o.
    """
    (before, after), area = row["pixels"], row["filter"]
    weights = (0, 0, area) if row["depthwise"] else (area, 0, 0)
    macs = tuple(after * each for each in weights)
    if what != "latency":
        return macs if what == "macs" else weights
    if 0 in sides(row, widths):              # a removed layer: nothing is read or written
        before = after = 0
    moved = weights[0], weights[1] + before, weights[2] + after
    return max(tuple(each / device[0] for each in macs), tuple(BYTES * each / device[1] for each in moved),
               key=lambda each: price(row, each, widths))


def price(row, each, widths):
    """The cost c A_in A_out / groups + i A_in + o A_out of a layer; each: its (c, i, o)."""
    inputs, outputs = sides(row, widths)
    return each[0] * inputs * outputs / row["groups"] + each[1] * inputs + each[2] * outputs


def check_metric(what, device):
    """ValueError for an unknown cost, or for a latency without the device's two numbers."""
    if what not in METRICS:
        raise ValueError(f"no cost is called {what!r}; choose from {', '.join(METRICS)}")
    if what == "latency" and (device is None or len(device) != 2 or not all(0 < each < math.inf for each in device)):
        raise ValueError(f"latency on device {device}: give its peak in MACs a second and its bandwidth in bytes a "
                         "second, two numbers above 0")
