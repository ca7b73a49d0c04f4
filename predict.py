"""Classify pictures: `python predict.py cat.png photos/ --checkpoint model.pt.gz`.

Takes pictures, or folders of them, of any size and mode; each is cropped to its middle
square and scaled to the network's input size, see `engine/pictures.py`. --checkpoint is a
run's folder or file, a compact or safetensors file, or an ONNX file; it holds the classes
and the shape of the images. Pictures that cannot be read are skipped and named at the
end, with exit code 2.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import json
import sys
from pathlib import Path

import torch

from deploy import onnx_files
from engine import commandline, pictures
from networks import data_of, load_network
from train import find_checkpoint


def read_picture(path, kind, background=pictures.WHITE):
    """A picture as the network's input, (1, C, H, W) float, normalised; ValueError if the file is no picture."""
    pixels = torch.from_numpy(pictures.read_picture(path, kind.shape, background))[None].permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (kind.mean, kind.std))
    return (pixels - mean) / std


def find_pictures(path):
    """The file at `path`, or the pictures in the folder at `path`, sorted; ValueError if there is none."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file at {path}")
    if not path.is_dir():
        return [path]
    inside = sorted(filter(pictures.is_picture, path.iterdir()))
    if not inside:
        raise ValueError(f"{path} holds no picture")
    return inside


@torch.no_grad()
def predict(forward, path, kind, top, background=pictures.WHITE):
    """[(class, probability)] of the `top` most likely classes of one picture."""
    shares = forward(read_picture(path, kind, background)).softmax(1)[0]
    if not torch.isfinite(shares).all():
        raise ValueError(f"the network's outputs for {path} are NaN or infinite; its numbers overflow: train it again "
                         "with a smaller --lr")
    best = shares.topk(min(top, len(shares)))
    return [(kind.classes[index], share) for share, index in zip(best.values.tolist(), best.indices.tolist(),
                                                                 strict=True)]


def predict_all(paths, tell):
    """Call tell(picture) for each picture in `paths`, files or folders; returns [(path, error)] of the failures."""
    wrong = []
    for path in paths:
        try:
            found = find_pictures(path)
        except (ValueError, OSError) as problem:
            wrong.append((path, str(problem)))
            continue
        for picture in found:
            try:
                tell(picture)
            except ValueError as problem:
                wrong.append((str(picture), str(problem)))
    return wrong


def parse(argv):
    """The flags of this script."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", help="files or folders")
    parser.add_argument("--checkpoint", help="a run's folder or file, a compact, safetensors or ONNX file (the newest "
                        "run's, else the ResNet-18 that ships)")
    parser.add_argument("--dataset", help="data set of the network's classes, if its file names none (cifar10)")
    parser.add_argument("--background", default="white", help="colour behind what is transparent: a name or #rrggbb "
                        "(white)")
    parser.add_argument("--top", type=int, default=1, help="number of classes to print per picture (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per picture")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top}: at least 1 class")
    arguments.background = pictures.color_of(arguments.background)
    return arguments


def main(argv):
    """Predict each picture."""
    arguments = parse(argv)
    path = find_checkpoint(arguments.checkpoint)
    if arguments.checkpoint is None:
        print(f"network: {path}", file=sys.stderr)
    forward, state = (onnx_files.open_network if path.suffix == ".onnx" else load_network)(path)
    _, kind = data_of(path, state, arguments.dataset)

    def tell(picture):
        found = predict(forward, picture, kind, arguments.top, arguments.background)
        if arguments.json:
            print(json.dumps({"picture": str(picture), "classes": dict(found)}))
        else:
            print(f"{picture}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found))
    wrong = predict_all(arguments.pictures, tell)
    if arguments.json:
        for picture, problem in wrong:
            print(json.dumps({"picture": picture, "error": problem}))
    if wrong:
        raise ValueError("; ".join(dict.fromkeys(problem for _, problem in wrong)))


if __name__ == "__main__":
    commandline.command(main)
