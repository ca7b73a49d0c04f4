"""The original files of further data sets, and of those on a disk that cannot be written."""
import contextlib
import gzip
import hashlib
import os
import re
import struct
import tempfile
import threading
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import test_cifar10
from samples import assert_same, random_data
from scipy.io import savemat
from torchvision import datasets

import cifar10
from engine import originals


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise urllib.error.URLError("no network here")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def open_folder():
    """A folder that every user can reach, which a test's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def read_only(folder):
    """Within, this process may read the folder but not write in it, root's or not."""
    places = [folder, *(place for place in folder.rglob("*") if place.is_dir())]
    for place in places:
        place.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            (folder / "probe").touch()
        yield
    finally:
        os.seteuid(user)
        for place in places:
            place.chmod(0o755)


def write_idx(root, monkeypatch, dataset="mnist", packed=False):
    """A tiny MNIST or Fashion-MNIST in its own format, packed by gzip or not. Returns its data."""
    kind = cifar10.KINDS[dataset]._replace(counts=(12, 5))
    monkeypatch.setitem(cifar10.KINDS, dataset, kind)
    reader, data, sums = getattr(datasets, kind.reader), random_data(kind), []
    folder = root / reader.__name__ / "raw"
    folder.mkdir(parents=True)
    for name, array in zip(test_cifar10.MNIST_FILES, data, strict=True):
        shape = array.shape[:3]
        content = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape) + array.astype(np.uint8).tobytes()
        content = gzip.compress(content) if packed else content
        (folder / (name + (".gz" if packed else ""))).write_bytes(content)
        sums.append((name + ".gz", hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(reader, "resources", sums)
    return data


def write_svhn(root, monkeypatch):
    """A tiny SVHN in its own format, where the digit 0 has the label 10. Returns its data."""
    kind = cifar10.KINDS["svhn"]._replace(counts=(12, 5))
    monkeypatch.setitem(cifar10.KINDS, "svhn", kind)
    data, parts = random_data(kind), {}
    for part, images, labels in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        parts[part] = ["http://127.0.0.1/", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", parts)
    return data


# ---- Fashion-MNIST and SVHN

@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_is_read_and_kept(tmp_path, monkeypatch, packed):
    data = write_idx(tmp_path, monkeypatch, "fashion-mnist", packed)
    assert_same(cifar10.load("fashion-mnist", tmp_path), data)
    assert_same(cifar10.read_npz(tmp_path / "fashion-mnist.npz"), data)


def test_svhn_is_read_and_kept(tmp_path, monkeypatch):
    data = write_svhn(tmp_path, monkeypatch)
    assert 0 in data.y_train and data.x_train.shape == (12, 32, 32, 3)
    assert_same(cifar10.load("svhn", tmp_path), data)
    assert_same(cifar10.read_npz(tmp_path / "svhn.npz"), data)


def test_altered_svhn_is_refused_with_both_checksums(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    (tmp_path / "test_32x32.mat").write_bytes(b"half")
    with pytest.raises(ValueError, match="test_32x32.mat is truncated or altered: expected md5 .*, found .*4 bytes"):
        cifar10.load("svhn", tmp_path)


@pytest.mark.parametrize("dataset, names", [
    ("fashion-mnist", ["FashionMNIST/raw/", "train-images-idx3-ubyte.gz"]),
    ("svhn", ["train_32x32.mat (md5 e26dedcc434d2e4c54c9b2d4a06d8373)", "test_32x32.mat"])])
def test_absent_files_without_network_are_named(tmp_path, dataset, names):
    with pytest.raises(FileNotFoundError) as problem:
        cifar10.load(dataset, tmp_path / "absent")
    for part in (f"absent/{dataset}.npz", "download failed", "--dataset digits", *names):
        assert part in str(problem.value)


# ---- a disk that cannot be written

def writers(name):
    return {"mnist": write_idx, "packed": lambda root, patch: write_idx(root, patch, packed=True), "svhn": write_svhn,
            "cifar10": test_cifar10.write_originals}[name]


@pytest.mark.parametrize("name", ["mnist", "packed", "svhn", "cifar10"])
def test_whole_originals_on_a_read_only_disk_are_read_and_the_cache_is_a_note(open_folder, monkeypatch, capsys, name):
    data, dataset = writers(name)(open_folder, monkeypatch), "mnist" if name == "packed" else name
    before = sorted(open_folder.rglob("*"))
    with read_only(open_folder):
        assert_same(cifar10.load(dataset, open_folder), data)
    output, errors = capsys.readouterr()
    told = rf"note: {open_folder}/{dataset}\.npz could not be written \(Permission denied\): [\d,]+ bytes are needed; "
    assert re.fullmatch(told + "the next start reads the original files again\n", errors)
    assert "note" not in output and sorted(open_folder.rglob("*")) == before


@pytest.mark.parametrize("missing", test_cifar10.MNIST_FILES)
def test_part_of_the_originals_on_a_read_only_disk_is_refused(open_folder, monkeypatch, missing):
    write_idx(open_folder, monkeypatch)
    (open_folder / "MNIST" / "raw" / missing).unlink()
    with read_only(open_folder), pytest.raises(OSError, match="cannot write in .*Permission denied"):
        cifar10.load("mnist", open_folder)


def test_an_altered_original_on_a_read_only_disk_is_named_there(open_folder, monkeypatch):
    write_idx(open_folder, monkeypatch)
    path = open_folder / "MNIST" / "raw" / test_cifar10.MNIST_FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    with read_only(open_folder), pytest.raises(ValueError, match=f"{path} is truncated or altered"):
        cifar10.load("mnist", open_folder)


@pytest.mark.parametrize("name, header", [("train-images-idx3-ubyte", (0x802, 12, 28, 28)),
                                          ("train-labels-idx1-ubyte", (0x801, 11)),
                                          ("t10k-images-idx3-ubyte", (0x803, 5, 28, 27))])
def test_a_header_that_was_altered_is_named(tmp_path, monkeypatch, name, header):
    write_idx(tmp_path, monkeypatch)
    path = tmp_path / "MNIST" / "raw" / name
    content = struct.pack(f">{len(header)}I", *header)
    path.write_bytes(content + path.read_bytes()[len(content):])
    told = f"{name} is altered: expected a header of 0000080[13].*, found {content.hex()}"
    with pytest.raises(ValueError, match=told):
        cifar10.load("mnist", tmp_path)


def test_a_second_start_waits_for_the_first_ones_download(tmp_path, monkeypatch):
    begun, root = threading.Event(), tmp_path / "data"
    data, read = random_data(cifar10.KINDS["mnist"]), []

    def read_originals(dataset, kind, folder):
        read.append(folder)
        begun.set()
        time.sleep(0.5)                     # half of the file is there
        return list(data)
    monkeypatch.setattr(originals, "read_originals", read_originals)
    first = threading.Thread(target=cifar10.load, args=("mnist", root))
    first.start()
    assert begun.wait(60)
    assert_same(cifar10.load("mnist", root), data)
    first.join()
    assert len(read) == 1
