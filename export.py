"""Export a trained network to a file: `python export.py --checkpoint runs/a/model.pt --out a.pt.gz`.

The end of --out chooses the format:

    .packed.gz      a quantized network, its integers packed to their bits and computed in integer arithmetic
    .pt.gz          a compact file: half precision or one bit a weight, zeros one bit each, compressed
    .int8.pt.gz     the same with weights of 8 bits
    .safetensors    float32, with the structure in the metadata
    .onnx           float32
    .w8.onnx        weights stored in 8 bits, computed in float32
    .int8.onnx      computed in 8-bit integers, calibrated on training images

test.py and profil.py read the first four like any checkpoint. Dead channels, which pruning has cut off, are removed
first, which does not change the outputs. The file is read back and compared with the network on the test images
before the command reports success. Every file names its data set, its classes, and the shape, mean and std of its
images.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import contextlib
import os
import tempfile
from pathlib import Path

import torch

import cifar10
import quantization
from deploy import integer_inference, onnx_files
from engine import checkpoint, commandline, files, packing, tensor_files
from networks import data_of, load_network, trim
from train import find_checkpoint

FORMATS = (".int8.pt.gz", ".pt.gz", ".safetensors", ".int8.onnx", ".w8.onnx", ".onnx", ".packed.gz")
EIGHT_BITS = (".int8.pt.gz", ".int8.onnx", ".w8.onnx")


def export(model, state, target, data=None):
    """Write a network, as `load_network` gives it, to `target` and read it back; removes its dead channels in place.

    data: `cifar10.Data` of its data set, needed for .int8.onnx only. Returns (a function
    from images to logits, loaded from the file; the number of channels removed). Raises
    ValueError for an unknown ending, one that does not suit this network, or where half
    precision overflows; RuntimeError where a weight that was read back differs from what
    was written.
    """
    ending = ending_of(target)
    refuse_ending(ending, model, state)
    removed = trim(model)
    kind = cifar10.kind_of(state["dataset"], state.get("kind"))
    about = {"dataset": state["dataset"], "kind": cifar10.plain(kind)}
    if ending.endswith("onnx"):
        write_onnx(model, ending, target, kind, about, data)
        return onnx_files.open_onnx(target), removed
    network = {**checkpoint.network_of(model, state["architecture"]), **about}
    if ending == ".packed.gz":
        expected = {f"{name}.weight": model.get_submodule(name).integers() for name in quantization.bits_of(model)}
        integer_inference.save_packed(target, model, {name: network[name] for name in network if name != "weights"})
    elif ending == ".safetensors":
        expected = network["weights"]
        files.write(target, tensor_files.to_bytes(network, checkpoint.FORMAT))
    else:
        eight_bits = ending in EIGHT_BITS
        expected = (packing.to_eight_bits if eight_bits else packing.to_half)(network["weights"])
        checkpoint.save_compact(target, network, eight_bits)
    forward, written = load_network(target)
    refuse_difference(target, forward.state_dict() if ending == ".packed.gz" else written["weights"], expected)
    return forward, removed


def write_onnx(model, ending, target, kind, about, data):
    """Write a network as the kind of ONNX file that `ending` names, whole or not at all; see `export`."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "network.onnx"
        onnx_files.write_onnx(model, plain, (kind.shape[-1], *kind.shape[:2]), about)
        if ending == ".int8.onnx":
            onnx_files.quantize_onnx(plain, target, calibration(data, kind))
        elif ending == ".w8.onnx":
            onnx_files.store_in_eight_bits(plain, target)
        else:
            files.write(target, plain.read_bytes())


def ending_of(target):
    """The entry of FORMATS that a file's name ends in; ValueError if there is none."""
    ending = next((ending for ending in FORMATS if str(target).endswith(ending)), None)
    if ending is None:
        raise ValueError(f"{target}: it must end in one of {', '.join(FORMATS)}")
    return ending


def refuse_ending(ending, model, state):
    """ValueError where a network of this kind cannot be written in this format."""
    if "integers" in state:
        raise ValueError("the network is packed: its integers are what ships; export from the model.pt it came from")
    if ending in EIGHT_BITS and quantization.bits_of(model):
        raise ValueError("the network has few bits already and is not quantized again; .packed.gz holds its integers")
    if ending == ".packed.gz" and not quantization.bits_of(model):
        raise ValueError(integer_inference.FLOATS)


def refuse_difference(target, written, expected):
    """RuntimeError that names the first tensor in the file that is not bit for bit as expected."""
    for name, tensor in expected.items():
        if not torch.equal(written[name], tensor):
            raise RuntimeError(f"{target} does not hold {name} as it was written")


def calibration(data, kind, images=512):
    """Batches of training images without augmentation, for finding the ranges of the activations."""
    chosen = cifar10.split(data, limit=images)[0]
    return (batch for batch, _ in cifar10.Batches(data.x_train, data.y_train, 128, kind, chosen=chosen))


@torch.no_grad()
def compare(model, forward, batches):
    """(largest difference of a logit, number of changed predictions, number of images) between two functions."""
    largest, changed, count = 0.0, 0, 0
    for images, _ in batches:
        ours, theirs = model(images), forward(images)
        if not bool(torch.isfinite(ours).all() & torch.isfinite(theirs).all()):
            raise ValueError("the network gives logits that are NaN or infinite, which no file can be compared on")
        largest = max(largest, (ours - theirs).abs().max().item())
        changed += int((ours.argmax(1) != theirs.argmax(1)).sum())
        count += len(images)
    return largest, changed, count


@contextlib.contextmanager
def room_for(target):
    """A block that writes `target`; its folder is created first, and removed again if the block fails."""
    made = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        if target.is_dir():
            raise ValueError(f"{target} is a folder; --out names a file")
        cifar10.check_folder(target.parent)
        yield
    except BaseException:
        with contextlib.suppress(OSError):       # a folder that is not empty is kept
            for folder in made:
                folder.rmdir()
        raise


def parse(argv):
    """The flags of this script."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run's folder, model.pt or last.pt (the newest run's, "
                        "else the ResNet-18 that ships)")
    parser.add_argument("--out", required=True, help=f"the file to write; it ends in {', '.join(FORMATS)}")
    parser.add_argument("--dataset", type=cifar10.named, help="data set to test on (the one named in the checkpoint)")
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--limit", type=int, help="number of test images to compare on (all)")
    parser.add_argument("--no-compare", action="store_true", help="no comparison; only .int8.onnx needs the data set")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit}: at least 1 test image is needed")
    ending_of(arguments.out)
    return arguments


def main(argv):
    """Export one checkpoint and compare the file with it."""
    arguments = parse(argv)
    source, target = find_checkpoint(arguments.checkpoint), Path(arguments.out)
    checkpoint.refuse_same(source, target, "--out")
    with room_for(target):
        model, state = load_network(source)
        refuse_ending(ending_of(target), model, state)
        dataset, kind = data_of(source, state, arguments.dataset)
        if state["assumed"]:
            state["dataset"] = dataset
        needed = not arguments.no_compare or ending_of(target) == ".int8.onnx"
        data = cifar10.load(dataset, arguments.data, kind.classes) if needed else None
        forward, removed = export(model, state, target, data)
    before, after = os.path.getsize(source), os.path.getsize(target)
    print(f"{source}: {before:,} bytes -> {target}: {after:,} bytes, {before / after:.1f} times smaller"
          + (f"; {removed:,} dead channels removed" if removed else ""))
    if not arguments.no_compare:
        batches = cifar10.Batches(*cifar10.some(data.x_test, data.y_test, arguments.limit), 250, kind)
        largest, changed, count = compare(model, forward, batches)
        print(f"largest difference of a logit {largest:.3g}, {changed:,} of {count:,} predictions changed")


if __name__ == "__main__":
    commandline.command(main)
