"""Networks as ONNX files: export, inference with ONNX Runtime, int8 quantization or 8-bit storage.

    write_onnx(model, "model.onnx", (3, 32, 32))
    forward = open_onnx("model.onnx")                  # images -> logits, both tensors
    quantize_onnx("model.onnx", "model.int8.onnx", batches)
    store_in_eight_bits("model.onnx", "model.w8.onnx")
    forward, state = open_network("model.onnx")        # with the file's metadata on its data set
"""
import contextlib
import json
import logging
import os
import platform
import tempfile
import warnings
from pathlib import Path

import torch

from engine import compiling, files, packing
from engine.modes import in_mode


def write_onnx(model, path, shape, about=None):
    """Write `model`, in evaluation mode and float32 on the CPU, for any number of images of `shape` (C, H, W).

    Batch norm is folded into the convolutions before it. The network takes "images"
    (N, C, H, W) and returns "logits" (N, K); about, plain types, is stored in the metadata
    as JSON. The file is written whole or not at all.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")      # the old exporter warns that it is old; it needs no further package
        target = os.path.join(folder, "model.onnx")
        axes = {"images": {0: "n"}, "logits": {0: "n"}}
        with in_mode(model):
            torch.onnx.export(model, (torch.zeros(1, *shape),), target, dynamo=False, input_names=["images"],
                              output_names=["logits"], dynamic_axes=axes, opset_version=17)
        files.write(path, with_metadata(target, {"network": json.dumps(about)} if about else {}))


def with_metadata(path, texts):
    """The bytes of an ONNX file with {key: text} as its metadata."""
    from onnx import helper, load_model
    network = load_model(str(path))
    helper.set_model_props(network, texts)
    return network.SerializeToString()


def metadata_of(path):
    """The metadata of an ONNX file, {key: text}."""
    from onnx import load_model
    return {held.key: held.value for held in load_model(str(path)).metadata_props}


def open_onnx(path, threads=None):
    """A function from images (N, C, H, W), a float32 tensor, to logits (N, K), computed by ONNX Runtime on the CPU.

    Raises FileNotFoundError where there is no file, ValueError where it is no ONNX network.
    """
    return open_network(path, threads)[0]


def open_network(path, threads=None):
    """(function of `open_onnx`, {"architecture", "dataset", "assumed", "kind"} from the file, for `networks.data_of`).

    A file from another program only gives its numbers of classes, channels and pixels.
    """
    import onnxruntime
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file at {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4           # failures are reported below, in one line
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as problem:             # ONNX Runtime's errors have no common type
        raise ValueError(f"{path} is no ONNX network that can be read: {str(problem).splitlines()[0]}") from None
    name = session.get_inputs()[0].name

    def forward(images):
        try:
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        except Exception as problem:
            raise ValueError(f"{path} cannot take images of {' x '.join(map(str, images.shape[1:]))}: "
                             f"{str(problem).splitlines()[0]}") from None
    return forward, state_of(path, session)


def state_of(path, session):
    """The description of the network in an opened file, see `open_network`; ValueError if it has another form."""
    images, logits = session.get_inputs()[0].shape, session.get_outputs()[0].shape
    if len(session.get_inputs()) != 1 or len(images) != 4 or len(logits) != 2:
        raise ValueError(f"{path} is no classifier of images: it takes {images} and gives {logits}")
    if session.get_inputs()[0].type != "tensor(float)" or images[0] not in (None, 1) and isinstance(images[0], int):
        raise ValueError(f"{path} takes {session.get_inputs()[0].type} of {images}; predict.py gives it tensor(float), "
                         "one image at a time")
    if all(isinstance(side, int) for side in images[2:4]) and images[2] != images[3]:
        raise ValueError(f"{path} takes images of {images[2]} x {images[3]} pixels; predict.py gives it squares")
    channels, size, classes = (each if isinstance(each, int) else None for each in (images[1], images[2], logits[1]))
    try:
        about = json.loads(session.get_modelmeta().custom_metadata_map.get("network", "{}"))
        named, kind = about.get("dataset"), about.get("kind")
        if not (named is None or isinstance(named, str)):
            raise TypeError("its data set is no name")
    except (AttributeError, TypeError, ValueError) as problem:
        raise ValueError(f"{path} has metadata that cannot be read: {problem}") from None
    return {"architecture": {"num_classes": classes, "in_channels": channels, "size": size},
            "dataset": named or "cifar10", "assumed": named is None, "kind": kind}


def quantize_onnx(path, out, batches):
    """Quantize the network in `path` to 8-bit integers (static, weights per output channel) and write it to `out`.

    batches: training images in the form that `open_onnx` takes; the smallest and largest
    activations on them set the activation ranges.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        """Hands the calibrator one batch after the other."""

        def __init__(self):
            self.batches = iter(batches)

        def get_next(self):
            images = next(self.batches, None)
            return None if images is None else {"images": images.numpy()}

    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared, target = os.path.join(folder, "prepared.onnx"), os.path.join(folder, "int8.onnx")
        quantization.quant_pre_process(str(path), prepared)
        quantization.quantize_static(prepared, target, Reader(), per_channel=True, reduce_range=sums_overflow())
        files.write(out, with_metadata(target, metadata_of(path)))


def sums_overflow():
    """Whether this CPU adds two 8-bit products in 16 bits, which may overflow: x86 without VNNI.

    ONNX Runtime's documentation then asks for weights of 7 bits (reduce_range).
    """
    found = compiling.cpu_instructions()
    return platform.machine().lower() in ("x86_64", "amd64") and not (found.get("avx512_vnni") or found.get("avx_vnni"))


def store_in_eight_bits(path, out):
    """Write the network in `path` to `out` with its weights stored as int8 and a float32 step for each output.

    Two nodes per layer, Cast and Mul, convert them back to float32. ONNX Runtime runs these
    once, when it opens the file, so inference is as fast as with float32 weights.
    """
    from onnx import TensorProto, helper, load_model, numpy_helper
    network = load_model(str(path))
    graph, nodes = network.graph, []
    wanted = [node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    for held in [each for each in graph.initializer if each.name in wanted]:
        name, weights = held.name, torch.from_numpy(numpy_helper.to_array(held).copy())
        codes, steps = packing.codes_of(weights)
        graph.initializer.remove(held)
        graph.initializer.extend([
            numpy_helper.from_array(codes.numpy(), f"{name}.codes"),
            numpy_helper.from_array(packing.by_row(steps, codes).numpy(), f"{name}.steps")])
        nodes += [helper.make_node("Cast", [f"{name}.codes"], [f"{name}.floats"], to=TensorProto.FLOAT),
                  helper.make_node("Mul", [f"{name}.floats", f"{name}.steps"], [name])]
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *others])
    files.write(out, network.SerializeToString())


@contextlib.contextmanager
def quiet():
    """A block without the messages that the quantizer writes to the root logger."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
