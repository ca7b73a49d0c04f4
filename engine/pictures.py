"""Read pictures as arrays: any size, format and mode, single files or folders by class.

    pixels = read_picture("cat.png", (32, 32, 3))          # (32, 32, 3) uint8: its middle square, scaled
    classes, arrays, mean, std = read_classes("data/mine", (32, 32, 3))

A folder of your own pictures has two parts, each in the layout of torchvision's
ImageFolder: data/mine/train/<class>/... and data/mine/test/<class>/..., with the same classes.
"""
import contextlib
import functools
import os
import struct
import warnings
from pathlib import Path

import numpy as np

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
WHITE = (255, 255, 255)
EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
BITS, PHOTOMETRIC = 258, 262       # tags of a TIFF: bits per value; photometric 0: the highest value is black


# ---- one picture

def read_picture(path, shape, background=WHITE):
    """The middle square of a picture, scaled to `shape` (H, W, C), uint8; C is 3, or 1 for grey.

    background: (R, G, B) behind transparent pixels. ValueError if the file is no picture, or
    has a mode that `to_rgb` refuses.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError
    height, width, channels = shape
    try:
        if isinstance(path, (str, os.PathLike)) and Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no file")          # opening a pipe would wait forever
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")            # about oddities in readable files
            with Image.open(path) as picture:
                picture.load()
                with contextlib.suppress(SyntaxError, struct.error):      # a malformed EXIF header
                    ImageOps.exif_transpose(picture, in_place=True)
                picture = to_rgb(picture, background)
                square = ImageOps.fit(picture.convert("L") if channels == 1 else picture, (width, height),
                                      Image.Resampling.BICUBIC)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that can be read: its format is unknown") from None
    except Exception as problem:                   # Pillow raises many types for damaged files
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(f"{path} is no picture that can be read: {reason}") from None
    return np.array(square).reshape(shape)


def to_rgb(picture, background=WHITE):
    """A PIL image of any mode as RGB of 8 bits, with `background` (R, G, B) behind transparent pixels.

    16 bits, and floats from 0 to 1, are scaled. ValueError that names the mode if it is
    unknown which value is white.
    """
    from PIL import Image
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = to_eight_bits(picture)
    if picture.mode not in EIGHT_BITS:
        raise ValueError(f"its mode {picture.mode} is none of this project; save it as RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    if picture.mode == "La":                       # Pillow converts it to RGBA only via LA
        picture = picture.convert("LA")
    canvas = Image.new("RGBA", picture.size, (*background, 255))
    return Image.alpha_composite(canvas, picture.convert("RGBA")).convert("RGB")


def to_eight_bits(picture):
    """A grey image of 16 bits, or of floats from 0 to 1, in 8 bits: mode L, or LA if one value is transparent."""
    from PIL import Image
    values, tags = np.asarray(picture).astype(np.float64), getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        white = 1
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"its mode F holds floats from {values.min():.4g} to {values.max():.4g}, not from 0 to 1; "
                             "save it in 8 or 16 bits")
    elif picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM"):      # older Pillow opens these as I
        white = 2 ** tags.get(BITS, (16,))[0] - 1
    else:
        raise ValueError(f"its mode {picture.mode} holds integers of 32 bits, of which none is known to be white; "
                         "save it in 8 or 16 bits")
    shown = white - values if tags.get(PHOTOMETRIC) == 0 else values
    grey = Image.fromarray((255 * shown / white).round().astype(np.uint8))
    if not isinstance(picture.info.get("transparency"), int):
        return grey
    opaque = Image.fromarray(np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, opaque))


def color_of(text):
    """(R, G, B) of a colour's name such as "white", or of "#rrggbb"; ValueError for any other text."""
    from PIL import ImageColor
    try:
        color = ImageColor.getrgb(text)
    except ValueError:
        color = ()
    if len(color) != 3:
        raise ValueError(f"--background {text!r} is no colour; a name, as white, or #rrggbb is one")
    return color


# ---- folders of classes

def read_classes(folder, shape):
    """(class names in order, [x_train, y_train, x_test, y_test], mean, std) of a folder of pictures by class.

    x: (N, *shape) uint8, y: (N,) int64; mean and std per channel of the training images,
    scaled to [0, 1], rounded to four digits. ValueError for a folder without train/ or
    test/, a class without pictures, classes that differ, and the first damaged picture.
    """
    classes = list_classes(folder)
    listing = tuple((part, label, file, file.stat().st_size, file.stat().st_mtime_ns)
                    for part, by_name in classes.items() for label, name in enumerate(by_name)
                    for file in by_name[name])
    return tuple(classes["train"]), *read_listed(listing, shape)


def list_classes(folder):
    """{"train": {class: [files]}, "test": {class: [files]}}, sorted; see `read_classes`."""
    classes = {}
    for part in ("train", "test"):
        inside = Path(folder) / part
        if not inside.is_dir():
            raise ValueError(f"{folder} has no folder {part}; pictures stand in {Path(folder) / 'train'}/<class>/ and "
                             f"{Path(folder) / 'test'}/<class>/")
        names = sorted(each.name for each in inside.iterdir() if each.is_dir() and not each.name.startswith("."))
        if len(names) < 2:
            raise ValueError(f"{inside} holds {', '.join(names) or 'no folder of a class'}; "
                             "a classifier needs at least 2 classes, each a folder of pictures")
        classes[part] = {name: files_in(inside / name) for name in names}
        empty = [name for name, files in classes[part].items() if not files]
        if empty:
            raise ValueError(f"{inside / empty[0]} holds no picture; one ends in {', '.join(sorted(ENDINGS))}")
    apart = sorted(classes["train"].keys() ^ classes["test"].keys())
    if apart:
        there, absent = ("train", "test") if apart[0] in classes["train"] else ("test", "train")
        raise ValueError(f"{folder}: the class {apart[0]} is in {there} and not in {absent}; both must have the same "
                         "classes")
    return classes


def files_in(folder):
    """The pictures below a folder, at any depth, in torchvision's order, without names that begin with a dot.

    OSError for a folder that cannot be read.
    """
    def refuse(problem):
        raise problem
    found, seen = [], set()
    for inside, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(inside) in seen:           # a link back to a visited folder
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]      # such as thumbnails
        seen.add(os.path.realpath(inside))
        found += [(inside, name) for name in names if is_picture(Path(inside) / name)]
    return [Path(inside) / name for inside, name in sorted(found)]


def is_picture(path):
    """Whether a path has a picture's ending and is no folder or hidden file (macOS adds one beside each picture)."""
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".") and not path.is_dir()


@functools.lru_cache(maxsize=1)       # starting a run reads a data set several times
def read_listed(listing, shape):
    """([x_train, y_train, x_test, y_test], mean, std) for a listing of (part, label, file, size, time) per picture."""
    arrays = []
    for part in ("train", "test"):
        chosen = [(label, file) for name, label, file, *_ in listing if name == part]
        arrays += [np.stack([read_picture(file, shape) for _, file in chosen]),
                   np.array([label for label, _ in chosen], dtype=np.int64)]
    return arrays, *spread_of(arrays[0])


def spread_of(images):
    """(mean, std) per channel of (N, H, W, C) uint8, scaled to [0, 1]; a std is at least half an 8-bit step."""
    level, found = np.arange(256) / 255, []
    for channel in range(images.shape[-1]):
        counts = sum(np.bincount(image[..., channel].ravel(), minlength=256) for image in images)
        mean = counts @ level / counts.sum()
        std = np.sqrt(counts @ (level - mean) ** 2 / counts.sum())
        found.append((round(float(mean), 4), round(max(float(std), 0.5 / 255), 4)))
    return tuple(mean for mean, _ in found), tuple(std for _, std in found)
