"""Data: what is read from disk, and what is refused."""
import gzip
import hashlib
import pickle
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT
from samples import SMALL, assert_same, random_data

import cifar10
from engine import archives


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A CIFAR-10 of 40 + 8 images of 12x11 as an .npz: (its path, its data)."""
    monkeypatch.setitem(cifar10.KINDS, "cifar10", SMALL)
    data = random_data(SMALL)
    archives.write(tmp_path / "cifar10.npz", data._asdict())
    return tmp_path / "cifar10.npz", data


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise urllib.error.URLError("no network here")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


class Payload:
    """Unpickling it makes a file, so that a test can tell whether it was unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# ---- the .npz

def test_npz_is_read_back_with_int64_labels(small):
    path, data = small
    found = cifar10.load("cifar10", path.parent)
    assert_same(found, data)
    assert found.y_train.dtype == found.y_test.dtype == np.int64


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_npz_is_refused_with_its_size(small, share):
    path, _ = small
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match="damaged") as error:
        cifar10.load("cifar10", path.parent)
    assert str(path) in str(error.value) and f"{int(share * len(content)):,} bytes" in str(error.value)


@pytest.mark.parametrize("name", cifar10.Data._fields)
def test_flipped_bit_in_the_middle_of_an_array_is_refused(small, name):
    path, data = small
    content = bytearray(path.read_bytes())
    stored = getattr(data, name).tobytes()
    content[content.index(stored) + len(stored) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged.*{name}"):
        cifar10.load("cifar10", path.parent)


def test_no_flipped_bit_gives_other_data_or_another_error(small):
    path, data = small
    content = path.read_bytes()
    stored = [content.index(array.tobytes()) for array in data]
    bulk = {i for start, array in zip(stored, data, strict=True) for i in range(start + 8, start + array.nbytes - 8)}
    for place in sorted(set(range(len(content))) - bulk):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert_same(cifar10.load("cifar10", path.parent), data)     # a date, or padding
        except ValueError as error:
            assert str(path) in str(error), f"byte {place}: {error}"
        except Exception as error:
            pytest.fail(f"byte {place}, bit {place % 8}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_other_files_in_place_of_the_npz_are_refused(small, content):
    path, _ = small
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cifar10.npz"):
        cifar10.load("cifar10", path.parent)


def test_single_array_in_place_of_the_npz_is_refused(small):
    path, data = small
    with open(path, "wb") as file:
        np.save(file, data.x_train)
    with pytest.raises(ValueError, match="cifar10.npz"):
        cifar10.load("cifar10", path.parent)


@pytest.mark.parametrize("name", cifar10.Data._fields)
def test_missing_array_is_named(small, name):
    path, data = small
    np.savez(path, **{field: array for field, array in data._asdict().items() if field != name})
    with pytest.raises(ValueError, match=f"no array called {name}"):
        cifar10.load("cifar10", path.parent)


@pytest.mark.parametrize(("change", "message"), [
    ({"x_train": lambda x: x.astype(np.float32)}, r"x_train is float32 \(40, 12, 11, 3\); expected uint8"),
    ({"x_test": lambda x: x.astype(np.int8)}, "x_test is int8"),
    ({"x_train": lambda x: x.transpose(0, 3, 1, 2)}, r"x_train is uint8 \(40, 3, 12, 11\); expected"),
    ({"x_test": lambda x: x.reshape(8, -1)}, r"x_test is uint8 \(8, 396\); expected"),
    ({"x_train": lambda x: x[:39]}, "39 images and y_train 40 labels; expected 40"),
    ({"x_train": lambda x: x[:39], "y_train": lambda y: y[:39]}, "39 images and y_train 39 labels; expected 40"),
    ({"y_test": lambda y: y[:7]}, "8 images and y_test 7 labels; expected 8"),
    ({"y_train": lambda y: y.astype(np.float64)}, "y_train is float64"),
    ({"y_train": lambda y: np.eye(4, dtype=int)[y]}, r"y_train is int64 \(40, 4\); expected integers"),
    ({"y_train": lambda y: np.where(np.isin(np.arange(40), (17, 30)), 4, y)}, r"y_train\[17\] is 4; expected 0 to 3"),
    ({"y_test": lambda y: np.where(np.arange(8) == 5, -1, y)}, r"y_test\[5\] is -1; expected 0 to 3"),
])
def test_arrays_of_another_form_are_refused(small, change, message):
    path, data = small
    np.savez(path, **{name: change.get(name, lambda array: array)(array) for name, array in data._asdict().items()})
    with pytest.raises(ValueError, match=message) as error:
        cifar10.load("cifar10", path.parent)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8"])
def test_labels_of_any_integer_type_become_int64(small, dtype):
    path, data = small
    np.savez(path, **data._replace(y_train=data.y_train.astype(dtype))._asdict())
    found = cifar10.load("cifar10", path.parent)
    assert found.y_train.dtype == np.int64
    assert_same(found, data)


def test_pickled_array_is_refused_without_unpickling(small):
    path, data = small
    trap = path.parent / "unpickled"
    np.savez(path, **data._replace(y_train=np.array([Payload(trap)], dtype=object))._asdict())
    with pytest.raises(ValueError, match="cifar10.npz is not an .npz of plain arrays"):
        cifar10.load("cifar10", path.parent)
    assert not trap.exists()


def test_unknown_data_set_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'cifar'.*cifar10, cifar100, mnist, digits"):
        cifar10.load("cifar")


# ---- the original files

def write_originals(root, monkeypatch, name="CIFAR10"):
    """Tiny pickled batches, with the counts and checksums that are expected set to theirs. Returns their data."""
    from torchvision import datasets
    reader, key = getattr(datasets, name), "labels" if name == "CIFAR10" else "fine_labels"
    kind = cifar10.KINDS[name.lower()]
    names = [part for part, _ in (*reader.train_list, *reader.test_list)]
    kind = kind._replace(counts=(4 * (len(names) - 1), 4))
    monkeypatch.setitem(cifar10.KINDS, name.lower(), kind)
    data = random_data(kind)
    planar = np.concatenate([data.x_train, data.x_test]).transpose(0, 3, 1, 2).reshape(-1, 4, 3072)
    labels = np.concatenate([data.y_train, data.y_test]).reshape(-1, 4).tolist()
    folder, sums = root / reader.base_folder, {}
    folder.mkdir(parents=True)
    contents = {part: {"data": images, key: own} for part, images, own in zip(names, planar, labels, strict=True)}
    contents[reader.meta["filename"]] = {reader.meta["key"]: list(kind.classes)}
    for part, content in contents.items():
        (folder / part).write_bytes(pickle.dumps(content))
        sums[part] = hashlib.md5((folder / part).read_bytes()).hexdigest()
    monkeypatch.setattr(reader, "train_list", [[part, sums[part]] for part in names[:-1]])
    monkeypatch.setattr(reader, "test_list", [[names[-1], sums[names[-1]]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums[reader.meta["filename"]]})
    return data


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_originals_are_read_and_kept_as_npz(tmp_path, monkeypatch, no_network, name):
    data = write_originals(tmp_path, monkeypatch, name)
    assert_same(cifar10.load(name.lower(), tmp_path), data)
    for file in tmp_path.glob("cifar-10*/*"):
        file.unlink()
    assert_same(cifar10.load(name.lower(), tmp_path), data)     # now from the .npz alone
    assert not list(tmp_path.glob("*partial*")) and not list(tmp_path.glob(".probe*"))


@pytest.mark.parametrize("part", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
@pytest.mark.parametrize("payload", [True, False])
def test_altered_original_is_refused_before_it_is_unpickled(tmp_path, monkeypatch, no_network, part, payload):
    write_originals(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / part
    expected = hashlib.md5(path.read_bytes()).hexdigest()
    content = pickle.dumps(Payload(tmp_path / "unpickled")) if payload else path.read_bytes()[:-1]
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        cifar10.load("cifar10", tmp_path)
    found = hashlib.md5(content).hexdigest()
    for text in (str(path), f"expected md5 {expected}", f"found {found}", f"{len(content):,} bytes"):
        assert text in str(error.value)
    assert not (tmp_path / "unpickled").exists()
    assert not (tmp_path / "cifar10.npz").exists()


def test_altered_archive_is_refused_with_both_checksums(tmp_path, no_network):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    with pytest.raises(ValueError) as error:
        cifar10.load("cifar10", tmp_path)
    assert "cifar-10-python.tar.gz is truncated or altered" in str(error.value)
    assert "c58f30108f718f92721af3b95e74349a" in str(error.value)
    assert hashlib.md5(b"half an archive").hexdigest() in str(error.value)


@pytest.mark.parametrize(("dataset", "file"), [("cifar10", "cifar-10-python.tar.gz"),
                                               ("cifar100", "cifar-100-python.tar.gz"),
                                               ("mnist", "train-images-idx3-ubyte.gz")])
def test_absent_data_without_network_says_what_to_put_where(tmp_path, no_network, dataset, file):
    with pytest.raises(FileNotFoundError) as error:
        cifar10.load(dataset, tmp_path / "absent")
    message = str(error.value)
    assert str(tmp_path / "absent") in message and file in message and "--dataset digits" in message
    assert "no network here" in message or "Error downloading" in message


def test_data_folder_that_is_a_file_is_refused(tmp_path, no_network):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(OSError, match="cannot write in .*data") as error:
        cifar10.load("cifar10", tmp_path / "data")
    assert not isinstance(error.value, FileNotFoundError)


def test_npz_that_cannot_be_written_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, no_network):
    data = write_originals(tmp_path, monkeypatch)

    def disk_full(path, content):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cifar10.files, "write_synced", disk_full)
    assert_same(cifar10.load("cifar10", tmp_path), data)
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz*"))


# ---- MNIST

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(root, monkeypatch):
    """A tiny MNIST in its own format. Returns its data."""
    kind = cifar10.KINDS["mnist"]._replace(counts=(12, 5))
    monkeypatch.setitem(cifar10.KINDS, "mnist", kind)
    data = random_data(kind)
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name, array in zip(MNIST_FILES, data, strict=True):
        shape = array.shape[:3]
        header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
        (root / "MNIST" / "raw" / name).write_bytes(header + array.astype(np.uint8).tobytes())
    return data


def test_mnist_is_read_from_idx_files_and_kept_as_npz(tmp_path, monkeypatch, no_network):
    data = write_idx(tmp_path, monkeypatch)
    assert_same(cifar10.load("mnist", tmp_path), data)
    for file in (tmp_path / "MNIST" / "raw").iterdir():
        file.unlink()
    assert_same(cifar10.load("mnist", tmp_path), data)


@pytest.mark.parametrize("name", MNIST_FILES)
def test_truncated_mnist_file_is_named_and_not_called_a_failed_download(tmp_path, monkeypatch, no_network, name):
    write_idx(tmp_path, monkeypatch)
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{name}.*") as error:
        cifar10.load("mnist", tmp_path)
    assert "download failed" not in str(error.value)


def find_mnist():
    """The folder that holds MNIST/raw/; skips where there is none."""
    for folder in (DATA / "mnist", DATA, ROOT / "data"):
        raw = folder / "MNIST" / "raw"
        if all((raw / name).exists() or (raw / f"{name}.gz").exists() for name in MNIST_FILES):
            return folder
    pytest.skip(f"needs the real MNIST files: no MNIST/raw/ in {DATA}/mnist, {DATA} or {ROOT}/data "
                "(set DATA_ROOT)")


def test_real_mnist_is_read_exactly_and_has_the_stated_mean_and_std(tmp_path, no_network):
    folder = find_mnist()
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST" / "raw").symlink_to((folder / "MNIST" / "raw").resolve())
    data = cifar10.load("mnist", tmp_path)
    assert_same(cifar10.read_npz(tmp_path / "mnist.npz"), data)
    plain, packed = folder / "MNIST" / "raw" / MNIST_FILES[0], folder / "MNIST" / "raw" / (MNIST_FILES[0] + ".gz")
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    assert data.x_train.tobytes() == raw[16:]
    assert list(data.y_train[:10]) == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert_stated(data.x_train, cifar10.KINDS["mnist"])


# ---- mean and std

def assert_stated(images, kind):
    """Mean and std by channel, from a histogram, are those of `kind` to their four digits."""
    level = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(kind.mean, kind.std, strict=True)):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        found = share @ level
        assert found == pytest.approx(mean, abs=6e-5)
        assert np.sqrt(share @ level**2 - found**2) == pytest.approx(std, abs=6e-5)


def test_cifar10_std_is_that_of_the_real_pixels(real_cifar10):
    with np.load(real_cifar10 / "cifar10.npz") as archive:
        assert_stated(archive["x_train"], cifar10.KINDS["cifar10"])


def test_cifar10_std_is_not_the_common_mistake():
    assert cifar10.KINDS["cifar10"].std == (0.2470, 0.2435, 0.2616)
    assert cifar10.KINDS["cifar10"].mean == (0.4914, 0.4822, 0.4465)


# ---- digits

def test_digits_need_neither_files_nor_network(tmp_path, no_network):
    data = cifar10.load("digits", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    assert data.x_train.shape == (1437, 32, 32, 3) and data.x_test.shape == (360, 32, 32, 3)
    assert data.x_train.dtype == np.uint8 and data.y_train.dtype == np.int64
    assert set(data.y_train) == set(data.y_test) == set(range(10))
    assert (data.x_train == data.x_train[..., :1]).all()
    assert_stated(data.x_train, cifar10.KINDS["digits"])


def test_digits_are_all_images_once_and_their_test_set_is_fixed():
    from sklearn.datasets import load_digits
    data = cifar10.load("digits")
    labels = np.concatenate([data.y_train, data.y_test])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(load_digits().target))
    assert len({image.tobytes() for image in np.concatenate([data.x_train, data.x_test])}) == 1797
    assert list(data.y_train[:10]) == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert list(data.y_test[:10]) == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1]
