"""Networks by name: freshly initialised, or loaded from a file.

    model = build(**architecture_of(settings))
    model, state = load_network("runs/a/model.pt")       # the structure is read from the file

An architecture is the dictionary that rebuilds a network; every checkpoint holds it.
"""
import copy

import torch

import binaryconnect
import cifar10
import models
import pruning
import quantization
import resnet_factorized
from deploy import integer_inference
from engine import checkpoint, shrinking
from engine.operations import zero_image
from engine.settings import Setting, line

SETTINGS = {
    "model": line("resnet18", hint="; wrn-d-k, resnetd-a-b-c, vgg6-a-b-c and vgg9-a-b-c are depths d and widths",
                  shown="NETWORK"),                  # `check_name` knows them all
    "groups": line(8),                               # the network checks which numbers fit
    "shuffle": line(True, (True, False)),
    "activation": Setting("relu", "activation function of the small networks: relu, gelu, tanh, ..."),
    "pooling": Setting("max", "pooling of LeNet-5: max or average"),
    "shortcut": Setting("B", "shortcuts of ResNet-20 to 110: A (zero padding) or B (1x1 convolution)"),
}

WORDS = ("activation", "pooling", "shortcut")       # a network has some of these or none


def build(name, bits=None, **arguments):
    """The network called `name` in resnet_factorized.py or models/, freshly initialised.

    bits: {layer: [bits of weights, of activations]} for a quantized network (`quantization.layer_bits`).
    """
    model = (resnet_factorized if name in resnet_factorized.NETWORKS else models).build(name, **arguments)
    return quantization.quantize_layers(model, bits) if bits else model


def check_name(name):
    """ValueError that lists all names, if neither module has a network called `name`."""
    try:
        models.arguments_of(name)
    except ValueError as problem:
        raise ValueError(f"--model: {problem}; or {', '.join(resnet_factorized.NETWORKS)}") from None


def architecture_of(settings):
    """The dictionary that rebuilds the network; ValueError if it cannot be built or lacks a layer to exclude."""
    kind, name = cifar10.kind_of(settings["dataset"]), settings["model"]
    architecture = {"name": name, "num_classes": len(kind.classes), "in_channels": kind.shape[-1]}
    if name in resnet_factorized.NETWORKS:
        architecture |= {"groups": settings["groups"], "shuffle": settings["shuffle"]}
    else:
        check_name(name)
        offered = {"size": kind.shape[0], **{word: settings[word] for word in WORDS}}
        architecture |= {word: offered[word] for word in models.arguments_of(name)}
    for word in WORDS:
        if word not in architecture and settings[word] != SETTINGS[word].default:
            raise ValueError(f"--{word} {settings[word]}: {name} has no {word} to choose; leave it out")
    with torch.device("meta"):
        model = build(**architecture)
        pruning.prunable(model, settings["exclude"])
    if settings.get("weights") == "lsq":
        architecture["bits"] = quantization.layer_bits(model, settings["weight_bits"], settings["activation_bits"],
                                                       settings["layer_bits"])
    return architecture


def load_network(path, device="cpu"):
    """(model in evaluation mode, the checkpoint's dictionary); the structure is read from the file.

    From an unfinished run's last.pt it is the averaged network, if there is one: the
    validation accuracy was measured on that. From a packed file it is the network that
    computes with integers. In the dictionary, `dataset` is always filled in, and `assumed`
    is True where the file names none. Raises ValueError where the file does not hold a whole network.
    """
    path = checkpoint.find(path)
    return network_of(path, read_network(path), device)


def network_of(path, state, device):
    """`load_network` for the dictionary that `read_network` gives."""
    state |= {"dataset": state["dataset"] or "cifar10", "assumed": state["dataset"] is None}
    try:
        if state.get("average"):
            state["weights"] = state["average"]
        model = build(**state["architecture"])
        if "integers" in state:
            integer_inference.load_packed(model, state, path)
        else:
            checkpoint.load_weights(model, state["architecture"], state)
            as_validated(model, state)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        if not isinstance(problem, ValueError):
            reason += f"; its architecture is {str(state['architecture'])[:300]}"
        named = "" if str(path) in reason else f"{path} holds no network that can be built: "
        raise ValueError(named + reason) from None
    refuse_broken(path, model)
    return model.eval().to(device), state


def refuse_broken(path, model):
    """ValueError if a value in the network read from `path` is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        wrong = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if wrong:
            raise ValueError(f"{path} holds a broken network: {wrong:,} of {tensor.numel():,} values of {name} are NaN "
                             "or infinite; train it again with a smaller --lr")


def as_validated(model, state):
    """Binarize the network of an unfinished run with binary weights: its checkpoint holds the real weights."""
    settings = state.get("settings") or {}
    if settings.get("weights") == "binary":
        masks = {name: mask.to(torch.bool) for name, mask in (state.get("masks") or {}).items()}
        binaryconnect.BC(model, settings["binary_scale"], masks=masks).binarization()
        state["weights"] = checkpoint.weights_of(model)


def read_network(path):
    """A checkpoint's dictionary, its `dataset` None where it names none; ValueError for one that holds no network."""
    state = checkpoint.read(path)
    if not isinstance(state.get("architecture"), dict) or not isinstance(state.get("weights"), dict):
        raise ValueError(f"{path} holds no network: architecture or weights are missing")
    settings = state.get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no network: its settings are no dictionary")
    named = state.get("dataset") or settings.get("dataset")
    if not (named is None or isinstance(named, str)):
        raise ValueError(f"{path} holds no network that can be built: its data set is called {named!r}")
    state["dataset"] = named
    if state.get("kind") is not None:
        try:
            cifar10.kind_of(named or "cifar10", state["kind"])
        except ValueError as problem:
            raise ValueError(f"{path} holds no network that can be built: {problem}") from None
    return state


def data_of(path, state, dataset=None):
    """(name, `cifar10.Kind`) of the images that a network takes; mean and std are those it was trained with.

    state: as `load_network` and `onnx_files.open_network` give it; dataset: --dataset,
    another data set to use it on. ValueError where its channels, size or classes are not
    those of the network.
    """
    own = dataset if dataset and state["assumed"] else state["dataset"]
    try:
        kind = cifar10.kind_of(own, state.get("kind"))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
    theirs, channels, size = (state["architecture"].get(word, usual) for word, usual in
                              (("num_classes", 10), ("in_channels", 3), ("size", None)))
    refuse_form(path, (size and (size, size), channels, theirs), own, kind)
    if not dataset or own == dataset:
        return own, kind
    other = cifar10.kind_of(dataset)
    refuse_form(path, (kind.shape[:2], kind.shape[2], len(kind.classes)), dataset, other)
    if kind.classes != other.classes:
        ours, others = (", ".join(each.classes[:3]) for each in (kind, other))
        raise ValueError(f"{path} tells the classes of {own} apart ({ours}, ...), not those of {dataset} ({others}, "
                         "...); leave --dataset out")
    return dataset, kind


def refuse_form(path, form, dataset, kind):
    """ValueError unless a network of `form`, (sides or None, channels, classes), takes a data set's images."""
    (sides, channels, classes), (height, width, theirs) = form, kind.shape
    if channels is not None and channels != theirs or sides and tuple(sides) != (height, width):
        size = f"{sides[0]}x{sides[1]}, " if sides else ""
        raise ValueError(f"{path} takes images of {size}{channels} channels, {dataset} has {height}x{width}, {theirs} "
                         "channels; name the right one with --dataset")
    if classes is not None and classes != len(kind.classes):
        raise ValueError(f"{path} tells {classes} classes apart, {dataset} has {len(kind.classes)}; "
                         "name the right one with --dataset")


def trim(model):
    """Make a network ready for export, in place; returns the number of dead channels removed.

    The weights of quantized layers are replaced by their quantized values.
    """
    removed = shrinking.remove_dead(model)
    quantization.to_grid(model)
    return removed


def load_teacher(path, dataset, kind, device, force=False):
    """The teacher network on the device, without gradients; ValueError where it does not fit the student's data.

    force: it may have been trained on another data set, whose images and number of classes match those of `dataset`.
    """
    state = read_network(path)
    refuse_misfit(f"the teacher in {path}", state["architecture"], dataset, kind)
    refuse_stranger(f"the teacher in {path}", state, dataset, kind, force)
    teacher, _ = network_of(path, state, device)
    try:
        teacher(zero_image(teacher, image_shape(kind)))
    except (RuntimeError, ValueError) as problem:
        raise ValueError(f"the teacher in {path} does not take the images of {dataset}: {problem}") from None
    return teacher.requires_grad_(False)


def load_start(model, architecture, path, dataset, kind, force=False):
    """Load the weights of the checkpoint --start into a float32 network; quantization steps in it are left out.

    force: they may come from another data set than `dataset`.
    """
    state = read_network(path)
    if "integers" in state:
        raise ValueError(f"{path} is packed: its integers do not train; start from the model.pt that it came from")
    refuse_misfit(f"the network in {path}", state["architecture"], dataset, kind)
    refuse_stranger(f"the network in {path}", state, dataset, kind, force)
    if state.get("average"):              # of an unfinished run: what was validated, as in `load_network`
        state["weights"] = state["average"]
    checkpoint.load_weights(model, quantization.without_bits(architecture), quantization.without_steps(state))
    refuse_broken(path, model)


# ---- a network and a data set

def image_shape(kind):
    """(C, H, W) of one image of a data set; its `cifar10.Kind` holds (H, W, C)."""
    height, width, channels = kind.shape
    return channels, height, width


def refuse_misfit(what, architecture, dataset, kind):
    """ValueError where a network has another number of classes than `dataset`, or takes other images.

    what: its name in the message. An architecture without a size takes images of any size, or of one that only the
    forward pass shows.
    """
    classes, channels = architecture.get("num_classes", 10), architecture.get("in_channels", 3)
    size = architecture.get("size", kind.shape[0])
    if classes != len(kind.classes):
        raise ValueError(f"{what} tells {classes} classes apart, {dataset} has {len(kind.classes)}")
    if (channels, size) != (kind.shape[-1], kind.shape[0]):
        asked = f" of {size} x {size} pixels" if "size" in architecture else ""
        raise ValueError(f"{what} takes images of {channels} channels{asked}; those of {dataset} have {kind.shape[-1]} "
                         f"channels and {kind.shape[0]} x {kind.shape[1]} pixels")


def refuse_stranger(what, state, dataset, kind, force):
    """ValueError where a network was trained on another data set, or on a folder with other classes, unless forced.

    state: the dictionary of its file, whose `dataset` is None if unknown.
    """
    theirs = state["dataset"]
    if theirs not in (None, dataset) and not force:
        raise ValueError(f"{what} was trained on {theirs}, and this run is on {dataset}; --force takes it all the same")
    classes = cifar10.kind_of(dataset, state["kind"]).classes if theirs and state.get("kind") else kind.classes
    if tuple(classes) != tuple(kind.classes) and not force:
        raise ValueError(f"{what} tells {', '.join(classes)[:200]} apart, and {dataset} has "
                         f"{', '.join(kind.classes)[:200]}; --force takes it all the same")


def check_batch(model, name, batch_size, shape):
    """ValueError where `model` cannot train on `batch_size` images of `shape`, for example because they are too small.

    Tried on torch's meta device, where nothing is computed; batch norm refuses a single value per channel there too.
    """
    trial = copy.deepcopy(model).to("meta").train()
    try:
        trial(torch.zeros(batch_size, *shape, device="meta"))
    except (RuntimeError, ValueError) as problem:
        raise ValueError(f"{name} cannot train on batches of {batch_size} images of {'x'.join(map(str, shape))} "
                         f"({problem}); give another --model or a larger --batch-size") from None


def begin_bits(model, bits, calibration):
    """Quantize the layers of `model` in place; steps start from the weights and, if given, `calibration` images."""
    ranges = quantization.input_ranges(model, calibration) if calibration is not None else None
    quantization.quantize_layers(model, {name: bits[name] for name in quantization.layers_of(model)}, ranges)
