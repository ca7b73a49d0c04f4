"""CIFAR-10, CIFAR-100, SVHN, MNIST, Fashion-MNIST, digits, own pictures: from files on disk to batches on the device.

    data = load("cifar10", "data")                   # uint8 arrays, checked
    train, validation = split(data)                  # indices of 45,000 and 5,000, fixed
    for images, labels in Batches(data.x_train, data.y_train, 64, KINDS["cifar10"], chosen=train):
        ...                                          # (64, 3, 32, 32) float, normalised

`load` reads `data/<dataset>.npz` (takes a second); if there is none, torchvision's
reader downloads and checks the original files, and the `.npz` is written for the
next start. `digits` ships with scikit-learn and needs no download. If the name is
that of a folder, the pictures in it are read (`engine/pictures.py`).

`Batches` keeps the whole set on the device as uint8 and crops, flips and
normalises each sample there, so that no worker process is needed. For a
training loop of your own, use `loaders`: torchvision transforms and DataLoaders
over the same splits.
"""
import contextlib
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine import archives, files, originals, pictures


class Kind(NamedTuple):
    """The properties of a data set; mean and std by channel, of pixels scaled to [0, 1]."""

    shape: tuple          # one image, (H, W, C)
    counts: tuple         # training and test images
    mean: tuple
    std: tuple
    classes: tuple
    flip: bool            # whether a mirrored image is still of its class
    reader: str           # torchvision's class


DIGITS = tuple(str(digit) for digit in range(10))
KINDS = {
    "cifar10": Kind((32, 32, 3), (50_000, 10_000), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
                    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
                    True, "CIFAR10"),
    "cifar100": Kind((32, 32, 3), (50_000, 10_000), (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762),
                     tuple(f"class {label}" for label in range(100)), True, "CIFAR100"),
    "mnist": Kind((28, 28, 1), (60_000, 10_000), (0.1307,), (0.3081,), DIGITS, False, "MNIST"),
    "digits": Kind((32, 32, 3), (1_437, 360), (0.3054,) * 3, (0.3234,) * 3, DIGITS, False, ""),
    "fashion-mnist": Kind((28, 28, 1), (60_000, 10_000), (0.2860,), (0.3530,),
                          ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                           "Ankle boot"), True, "FashionMNIST"),
    "svhn": Kind((32, 32, 3), (73_257, 26_032), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), DIGITS, False,
                 "SVHN"),
}
PICTURE = (32, 32, 3)     # size that your own pictures are scaled to
check_folder = originals.check_folder
HELP = f"{', '.join(KINDS)}, or a folder that holds train/<class>/ and test/<class>/ with pictures"


class Data(NamedTuple):
    """A data set as arrays: x (N, H, W, C) uint8, y (N,) int64 labels from 0."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


# ---- the properties of a data set

def kind_of(dataset, stored=None):
    """Return the `Kind` of a data set: by its name, of a folder of pictures, or as a checkpoint `stored` it (`plain`).

    A data set's name takes precedence over a folder of that name; "./digits" is the folder.
    Raises ValueError if it is neither, and if `stored` has another form.
    """
    if stored is not None:
        return from_plain(dataset, stored)
    return KINDS[dataset] if dataset in KINDS else read_folder(dataset)[0]


def named(dataset):
    """Return the name without trailing slashes, so that data/mine/ is data/mine; digits/ still means a folder."""
    short = dataset.rstrip("/")
    return dataset if short in KINDS else short or dataset


def plain(kind):
    """A `Kind` as a dictionary of plain types, for a file."""
    return {name: value if name == "flip" else list(value) for name, value in kind._asdict().items()
            if name != "reader"}


def from_plain(dataset, stored):
    """The `Kind` that `plain` wrote; ValueError if the file holds something else."""
    try:
        if not isinstance(stored, dict):
            raise TypeError
        kind = Kind(*(tuple(stored[name]) for name in Kind._fields[:5]), stored["flip"], "")
        sizes, levels = kind.shape + kind.counts, kind.mean + kind.std
        fits = (len(kind.shape) == 3 and len(kind.counts) == 2 and len(kind.mean) == len(kind.std) == kind.shape[2]
                and all(type(size) is int and size > 0 for size in sizes) and type(kind.flip) is bool
                and np.isfinite(np.array(levels, dtype=float)).all() and min(kind.std) > 0
                and len(kind.classes) > 0 and all(isinstance(name, str) for name in kind.classes))
    except (LookupError, RuntimeError, TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"the file does not say of its data set {dataset} what it must: shape, counts, mean, std, "
                         "classes and flip")
    return kind


def changes(dataset, stored, found):
    """Say in words what changed in a folder of pictures since a run began; None if nothing did.

    stored (in the checkpoint), found (now): (kind, `sha256_of` the images and labels); None if never stored.
    """
    before, now = (plain(each) for each in (kind_of(dataset, stored[0]) if stored[0] is not None else found[0],
                                            found[0]))
    name = next((name for name in now if before[name] != now[name]), None)
    if name is not None:
        change = f" ({name}: {before[name]} then, {now[name]} now)"
    elif None not in (stored[1], found[1]) and stored[1] != found[1]:
        change = ": other pictures, or the same under other names or classes, which also puts others into validation"
    else:
        return None
    return f"{dataset} is not as it was when the run began{change}"


def sha256_of(data):
    """The SHA-256 of all images and labels of a `Data`, in their order, as text."""
    digest = hashlib.sha256()
    for array in data:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# ---- from files to arrays

def read_folder(folder):
    """(Kind, Data) of a folder of pictures by class, scaled to 32x32; mirroring is assumed to keep the class."""
    if not Path(folder).is_dir():
        raise ValueError(f"no data set and no folder is called {str(folder)!r}; --dataset takes {HELP}")
    classes, arrays, mean, std = pictures.read_classes(folder, PICTURE)
    data = Data(*arrays)
    return Kind(PICTURE, (len(data.y_train), len(data.y_test)), mean, std, classes, True, ""), data


def load(dataset, root="data", classes=None):
    """The data set called `dataset`, one of KINDS or a folder of pictures, as `Data`.

    root: the folder that holds, or will hold, `<dataset>.npz`; classes: those of a
    network, which a folder must still have. Raises ValueError for other classes and
    for a file that is damaged or of another form, FileNotFoundError if there is none
    and it cannot be downloaded, OSError if the folder cannot be used.
    """
    if dataset not in KINDS:
        kind, data = read_folder(dataset)
        if classes is not None and tuple(classes) != tuple(kind.classes):
            raise ValueError(f"{dataset} has the classes {', '.join(kind.classes)}, and the network tells "
                             f"{', '.join(classes)} apart; bring back the folders that it was trained on")
        return check(data, kind, dataset)
    path = Path(root) / f"{dataset}.npz"
    if path.exists():
        return check(read_npz(path), KINDS[dataset], path)
    if dataset == "digits":
        return check(Data(*originals.read_digits()), KINDS[dataset], "scikit-learn's digits")
    with contextlib.suppress(OSError):             # `read_originals` reports it
        originals.check_folder(root)
    with files.locked(Path(root)):                 # another process may be downloading or unpacking
        if path.exists():
            return check(read_npz(path), KINDS[dataset], path)
        data = check(Data(*originals.read_originals(dataset, KINDS[dataset], Path(root))), KINDS[dataset], root)
        archives.write(path, data._asdict())
    return data


def read_npz(path):
    """The `Data` in an `.npz`, before `check`; ValueError if it is damaged or lacks an array."""
    return Data(**archives.read(path, Data._fields))


def check(data, kind, source):
    """Return `data` with int64 labels; ValueError names the array, the first bad index and the expected form."""
    fields = data._asdict()
    for part, count in zip(("train", "test"), kind.counts, strict=True):
        images, labels = fields[f"x_{part}"], fields[f"y_{part}"]
        if images.dtype != np.uint8 or images.shape[1:] != kind.shape:
            raise ValueError(f"{source}: x_{part} is {images.dtype} {images.shape}; expected uint8 (N, {kind.shape})")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"{source}: y_{part} is {labels.dtype} {labels.shape}; expected integers (N,)")
        if len(images) != count or len(labels) != count:
            raise ValueError(f"{source}: x_{part} has {len(images):,} images and y_{part} {len(labels):,} labels; "
                             f"expected {count:,} of each")
        wrong = np.flatnonzero((labels < 0) | (labels >= len(kind.classes)))
        if len(wrong):
            raise ValueError(f"{source}: y_{part}[{wrong[0]}] is {labels[wrong[0]]}; "
                             f"expected 0 to {len(kind.classes) - 1}")
    return Data(data.x_train, data.y_train.astype(np.int64), data.x_test, data.y_test.astype(np.int64))


def split(data, validation=0.1, limit=None):
    """Split the training images: indices for training and for validation, 45,000 and 5,000 of CIFAR-10.

    The order is a fixed permutation (NumPy's RandomState(0), whose stream is
    frozen); its last tenth, at least one image, is the validation split. limit: at
    most this many in each. Raises ValueError for a set of one image.
    """
    order = np.random.RandomState(0).permutation(len(data.x_train))
    if len(order) < 2:
        raise ValueError(f"{len(order)} training images: one is needed to train and one to validate")
    cut = len(order) - max(1, int(len(order) * validation))
    return order[:cut][:limit], order[cut:][:limit]


def some(images, labels, limit=None):
    """Return at most `limit` images and their labels, (N, H, W, C) and (N,); all if it is None.

    These are the first ones or, if the images are sorted by class, as in a folder, a fixed random choice.
    """
    if limit is None or limit >= len(labels):
        return images, labels
    by_class = bool((np.diff(labels.astype(np.int64)) >= 0).all())
    chosen = np.random.RandomState(0).permutation(len(labels))[:limit] if by_class else slice(limit)
    return images[chosen], labels[chosen]


class Batches:
    """Batches of images that are kept on the device as uint8; augmented if there is a generator.

    images: (N, H, W, C) uint8 and labels: (N,), as `load` gives them; chosen:
    indices of the images to use, all if None.
    Yields images (B, C, H, W) float, normalised, in memory as channels_last, and labels (B,) int64.
    With `generator` (on the same device) an epoch is shuffled, each sample is
    cropped at a random place (reflect padding of `pad`) and, if `kind.flip`, mirrored
    with probability 1/2, and an incomplete last batch is dropped. With `alternating`
    each image is mirrored in every second `epoch`, the first one drawn at random
    (Jordan 2024, arXiv:2404.00498, section 3.6). Without a generator, all images come
    in order, without augmentation.
    """

    def __init__(self, images, labels, batch_size, kind, device="cpu", generator=None, pad=4, chosen=None,
                 alternating=False):
        count = len(images) if chosen is None else len(chosen)
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}; at least 1 is needed")
        if generator is not None:
            check_batch_fits(batch_size, count)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.as_tensor(labels, dtype=torch.int64).to(device)
        self.chosen = torch.arange(count, device=device) if chosen is None else torch.from_numpy(chosen).to(device)
        self.scale = torch.tensor([255 * std for std in kind.std], device=device).view(-1, 1, 1)
        self.shift = torch.tensor([mean / std for mean, std in zip(kind.mean, kind.std, strict=True)],
                                  device=device).view(-1, 1, 1)
        self.batch_size, self.pad, self.flip, self.generator = batch_size, pad, kind.flip, generator
        self.epoch, self.sides = 0, None
        self.views = self.answers = self.answer = None       # see `set_distillation_train.ask`
        if alternating and generator is not None:
            own = torch.Generator(device).manual_seed(generator.initial_seed())
            self.sides = torch.randint(2, (len(images), 1), generator=own, device=device)

    def __len__(self):
        whole, rest = divmod(len(self.chosen), self.batch_size)
        return whole + bool(rest and self.generator is None)

    def __iter__(self):
        order = self.chosen
        if self.generator is not None:
            order = order[torch.randperm(len(order), generator=self.generator, device=order.device)]
        for indices in order.split(self.batch_size)[:len(self)]:
            images = self.images[indices] if self.generator is None else self.augment(indices)
            yield self.normalise(images.permute(0, 3, 1, 2)), self.labels[indices]

    def normalise(self, images):
        """(N, C, H, W) uint8 -> float, by channel (x / 255 - mean) / std."""
        return images / self.scale - self.shift

    def augment(self, indices):
        """Return training images, (N, H, W, C), each shifted and mirrored at random, or as one of its stored views."""
        return self.moved(indices, *(self.draw_moves(indices) if self.views is None else self.draw_views(indices)))

    def draw_moves(self, indices):
        """Draw (rows, columns, mirrored), all (N, 1): the crop's shift in pixels, and whether an image is mirrored."""
        def draw(below):
            return torch.randint(below, (len(indices), 1), generator=self.generator, device=indices.device)
        rows, columns = draw(2 * self.pad + 1) - self.pad, draw(2 * self.pad + 1) - self.pad
        if not self.flip:
            return rows, columns, torch.zeros_like(rows)
        return rows, columns, draw(2) if self.sides is None else (self.sides[indices] + self.epoch) % 2

    def draw_views(self, indices):
        """Draw a stored view of each image, in the form of `draw_moves`; `answer` gets the teacher's logits for it."""
        number = torch.randint(self.views.shape[1], (len(indices),), generator=self.generator, device=indices.device)
        self.answer = self.answers[indices, number].float()
        return self.views[indices, number].long().T.unsqueeze(-1)

    def moved(self, indices, rows, columns, mirrored):
        """Crop and mirror images in one gather, (N, H, W, C); rows, columns, mirrored: from `draw_moves`."""
        height, width = self.images.shape[1:3]
        rows = reflect(torch.arange(height, device=indices.device) + rows, height)
        columns = reflect(torch.arange(width, device=indices.device) + columns, width)
        columns = torch.where(mirrored == 1, columns.flip(1), columns)
        return self.images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


def check_batch_fits(batch_size, count):
    """Raise ValueError if a training batch is larger than the set, which would then have no whole batch."""
    if batch_size > count:
        raise ValueError(f"batch size {batch_size} is larger than the {count:,} training images; "
                         f"at most {count:,} fits")


def reflect(index, size):
    """Indices outside 0 .. size - 1 mirrored at the edge, as reflect padding reads them."""
    return size - 1 - (size - 1 - index.abs()).abs()


class Split(torch.utils.data.Dataset):
    """A torchvision-style data set of one split: item k is (transform(PIL image), label)."""

    def __init__(self, images, labels, transform=None, chosen=None):
        self.images, self.labels, self.transform = images, labels, transform
        self.chosen = range(len(labels)) if chosen is None else chosen

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, index):
        from PIL import Image
        pixels = self.images[self.chosen[index]]
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        return (self.transform(image) if self.transform else image), int(self.labels[self.chosen[index]])


def loaders(data, dataset, batch_size=32, workers=0, limit=None):
    """DataLoaders of training (augmented), validation and test images, for a loop of your own.

    The same splits as `split`; pad 4, random crop, mirror and normalise with
    torchvision's transforms. Shuffling draws from torch's global generator.
    """
    transforms, kind = originals.import_torchvision().transforms.v2, kind_of(dataset)
    plain = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True),
             transforms.Normalize(kind.mean, kind.std)]
    moved = [transforms.RandomCrop(kind.shape[:2], padding=4, padding_mode="reflect")]
    mirrored = [transforms.RandomHorizontalFlip()] if kind.flip else []
    train, validation = split(data, limit=limit)
    plain, moved = transforms.Compose(plain), transforms.Compose(moved + mirrored + plain)
    check_batch_fits(batch_size, len(train))
    sets = (Split(data.x_train, data.y_train, moved, train), Split(data.x_train, data.y_train, plain, validation),
            Split(*some(data.x_test, data.y_test, limit), plain))
    return tuple(torch.utils.data.DataLoader(images, batch_size, shuffle=images is sets[0],
                                             drop_last=images is sets[0], num_workers=workers) for images in sets)
