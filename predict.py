"""Say what is on a picture: `python predict.py cat.png photos/ --checkpoint model.pt.gz`.

Pictures, or folders of them, of any size; each is cropped to its middle square
and scaled to what the network takes. --checkpoint is a run's file, a compact or
safetensors file, or an ONNX file, whose data set --dataset names.
"""
import json
from pathlib import Path

import numpy as np
import torch

import cifar10
import commandline
import onnx_files
from networks import load_network
from train import find_checkpoint

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def read_picture(path, kind):
    """A picture as the network takes it, (1, C, H, W) float, normalised; ValueError where the file is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    height, width, channels = kind.shape
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as problem:
        reason = "its format is unknown" if isinstance(problem, UnidentifiedImageError) else str(problem)
        raise ValueError(f"{path} is no picture that can be read: {reason}") from None
    pixels = torch.from_numpy(np.array(square)).view(1, height, width, channels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (kind.mean, kind.std))
    return (pixels - mean) / std


def find_pictures(paths):
    """The files named, and those in the folders named that end like pictures, in order."""
    found = []
    for path in map(Path, paths):
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no picture")
        found += inside
    missing = [path for path in found if not path.exists()]
    if missing:
        raise FileNotFoundError(f"there is no file at {missing[0]}")
    return found


@torch.no_grad()
def predict(forward, path, kind, top):
    """[(class, probability)] of the `top` most likely classes of one picture."""
    shares = forward(read_picture(path, kind)).softmax(1)[0]
    best = shares.topk(min(top, len(shares)))
    return [(kind.classes[index], share) for share, index in zip(best.values.tolist(), best.indices.tolist(),
                                                                 strict=True)]


def main(argv):
    """Predict each picture."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", help="files or folders")
    parser.add_argument("--checkpoint", help="a run's file, a compact, safetensors or ONNX file (the newest run's)")
    parser.add_argument("--dataset", choices=list(cifar10.KINDS), help="whose classes an ONNX file tells (cifar10)")
    parser.add_argument("--top", type=int, default=1, help="so many classes a picture (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a picture")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top}: at least 1 class")
    pictures, path = find_pictures(arguments.pictures), find_checkpoint(arguments.checkpoint)
    if path.suffix == ".onnx":
        forward, dataset = onnx_files.open_onnx(path), arguments.dataset or "cifar10"
    else:
        forward, state = load_network(path)
        dataset = arguments.dataset or state["dataset"]
    for picture in pictures:
        found = predict(forward, picture, cifar10.KINDS[dataset], arguments.top)
        if arguments.json:
            print(json.dumps({"picture": str(picture), "classes": dict(found)}))
        else:
            print(f"{picture}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found))


if __name__ == "__main__":
    commandline.command(main)
