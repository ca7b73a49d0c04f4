"""What a file says of its data set: a run on a folder of pictures, every export of it, and what does not fit."""
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_runs import Stop, stop_after_a_save

import cifar10
import export
import networks
import predict
import profil
import test as half_test
import train
import train_pruning
from deploy import onnx_files
from engine import checkpoint, pictures, tensor_files
from networks import data_of, load_network

ENDINGS = [".pt.gz", ".int8.pt.gz", ".safetensors", ".onnx", ".w8.onnx", ".int8.onnx"]
QUICK = ["--epochs", "1", "--model", "lenet5-student", "--mixing", "none", "--compile", "off", "--batch-size", "4",
         "--device", "cpu", "--lr", "0.02"]


def paint(folder, counts):
    """Pictures of three colours by class, of another size each: {"train": count, "test": count} of every class."""
    random = np.random.default_rng(0)
    for part, count in counts.items():
        for name, color in (("green", (20, 200, 40)), ("red", (220, 30, 30)), ("violet", (130, 20, 200))):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                size = (40 + number, 36, 3)
                pixels = np.clip(color + random.normal(0, 20, size), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of pictures and a run of train.py on it."""
    folder = paint(tmp_path_factory.mktemp("own") / "colours", {"train": 8, "test": 3})
    out = folder.parent / "run"
    train.main(["--dataset", str(folder), "--out", str(out), *QUICK])
    return SimpleNamespace(folder=folder, out=out, model=out / "model.pt")


@pytest.fixture(scope="module")
def exported(own):
    """{ending: file} of every form of that run's network."""
    files = {}
    for ending in ENDINGS:
        files[ending] = own.out.parent / f"network{ending}"
        export.main(["--checkpoint", str(own.model), "--out", str(files[ending])])
    return files


def opened(path):
    return (onnx_files.open_network if path.suffix == ".onnx" else load_network)(path)


def save_network(path, state=None, **changes):
    """A file of lenet5-student with these arguments and what it says of its data set."""
    architecture = {"name": "lenet5-student", "num_classes": 10, "in_channels": 3, "size": 32, "activation": "relu",
                    "pooling": "max"} | changes
    checkpoint.save(path, {**checkpoint.network_of(networks.build(**architecture), architecture), **(state or {})})
    return path


# ---- a folder of one's own

def test_a_run_on_a_folder_keeps_all_that_is_known_of_it(own):
    kind, data = cifar10.read_folder(own.folder)
    assert kind.classes == ("green", "red", "violet") and kind.counts == (24, 9) and kind.shape == (32, 32, 3)
    pixels = data.x_train.reshape(-1, 3) / 255
    np.testing.assert_allclose(kind.mean, pixels.mean(0), atol=5.1e-5)
    np.testing.assert_allclose(kind.std, pixels.std(0), atol=5.1e-5)
    for name in ("model.pt", "last.pt"):
        state = load_network(own.out / name)[1]
        assert data_of(own.out / name, state) == (str(own.folder), kind)
        assert state["architecture"]["num_classes"] == 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_export_tells_the_classes_and_the_form_without_the_folder(own, exported, ending, capsys):
    moved = own.folder.rename(own.folder.with_name("moved"))
    try:
        found = data_of(exported[ending], opened(exported[ending])[1])
        predict.main([str(moved / "test" / "red" / "0.png"), "--checkpoint", str(exported[ending]), "--json",
                      "--top", "3"])
        said = json.loads(capsys.readouterr().out)
    finally:
        moved.rename(own.folder)
    assert found == (str(own.folder), cifar10.read_folder(own.folder)[0])
    assert said["classes"].keys() == {"green", "red", "violet"}
    image = cifar10.read_folder(own.folder)[1].x_test[3:4]
    batches = cifar10.Batches(image, np.array([1]), 1, found[1])
    with torch.no_grad():
        expected = opened(exported[ending])[0](next(iter(batches))[0]).softmax(1)[0]
    assert [said["classes"][name] for name in found[1].classes] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_packed_network_of_few_bits_keeps_it_too(own, tmp_path):
    train.main(["--dataset", str(own.folder), "--out", str(tmp_path / "run"), *QUICK, "--weights", "lsq"])
    target = tmp_path / "network.packed.gz"
    export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(target)])
    assert data_of(target, load_network(target)[1]) == (str(own.folder), cifar10.kind_of(str(own.folder)))
    half_test.main(["--checkpoint", str(target), "--json"])


def test_test_and_profile_and_a_run_with_rounds(own, tmp_path, capsys):
    half_test.main(["--checkpoint", str(own.out), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == str(own.model) and result["dataset"] == str(own.folder)
    assert [(row["name"], row["images"]) for row in result["classes"]] == [("green", 3), ("red", 3), ("violet", 3)]
    profil.main(["--checkpoint", str(own.out), "--json"])
    assert json.loads(capsys.readouterr().out)["network"] == str(own.model)
    train_pruning.main(["--dataset", str(own.folder), "--out", str(tmp_path / "run"), *QUICK[2:], "--epochs", "1", "1",
                        "--sparsity", "0.5"])
    assert load_network(tmp_path / "run" / "model.pt")[1]["kind"]["classes"] == ["green", "red", "violet"]


def test_a_copy_of_the_folder_is_tested_with_the_mean_of_the_training(own, tmp_path, capsys):
    copy = shutil.copytree(own.folder, tmp_path / "copy")
    for file in copy.glob("train/*/*"):
        Image.new("RGB", (32, 32)).save(file)                    # another mean, which must not be taken
    results = []
    for flags in ([], ["--dataset", str(copy)]):
        half_test.main(["--checkpoint", str(own.model), "--json", *flags])
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["loss"] == results[1]["loss"] and results[1]["dataset"] == str(copy)


def test_the_folder_that_is_gone_is_named(own, tmp_path):
    state = checkpoint.read(own.model)
    checkpoint.save(tmp_path / "model.pt", {**state, "dataset": str(tmp_path / "gone")})
    with pytest.raises(ValueError, match="no folder is called '.*gone'; --dataset takes cifar10, .*folder"):
        half_test.main(["--checkpoint", str(tmp_path / "model.pt")])


def test_a_file_of_an_unknown_data_set_is_named(tmp_path):
    path = save_network(tmp_path / "model.pt", {"dataset": "imagenet"})
    with pytest.raises(ValueError, match="model.pt: no data set and no folder is called 'imagenet'"):
        data_of(path, load_network(path)[1])


def test_a_folder_without_its_path_in_the_name_of_a_run(own, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train.main(["--dataset", f"{own.folder}/", *QUICK])
    run, = (tmp_path / "runs").iterdir()
    assert run.name.startswith("colours-lenet5-student-")


def test_a_run_goes_on_only_while_its_folder_is_as_it_was(own, tmp_path, capsys):
    folder, out = shutil.copytree(own.folder, tmp_path / "colours"), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after_a_save(patch)
        train.main(["--dataset", str(folder), "--out", str(out), *QUICK, "--epochs", "2"])
    Image.new("RGB", (32, 32)).save(folder / "train" / "red" / "new.png")
    (out / "last.pt.partial").touch()
    with pytest.raises(ValueError, match=r"colours is not as it was .*counts: \[24, 9\] then, \[25, 9\] now.*--force"):
        train.main(["--resume", "--out", str(out)])
    assert (out / "last.pt.partial").exists()             # refused before anything is touched
    train.main(["--resume", "--force", "--out", str(out)])
    assert "counts: [24, 9] then, [25, 9] now); the run goes on with it" in capsys.readouterr().err
    assert not (out / "last.pt.partial").exists()


def test_the_network_of_a_finished_run_is_not_said_to_be_of_other_pictures(own, tmp_path):
    folder, out = shutil.copytree(own.folder, tmp_path / "colours"), tmp_path / "run"
    train.main(["--dataset", str(folder), "--out", str(out), *QUICK])
    train.main(["--resume", "--out", str(out)])
    Image.new("RGB", (32, 32)).save(folder / "train" / "red" / "new.png")
    before = (out / "model.pt").read_bytes()
    for flags in ([], ["--force"]):
        with pytest.raises(ValueError, match=r"is not as it was .*; the run is finished: put back what it began with"):
            train.main(["--resume", *flags, "--out", str(out)])
    assert (out / "model.pt").read_bytes() == before
    train.main(["--resume", "--force", "--epochs", "2", "--out", str(out)])


def test_a_folder_of_pictures_that_cannot_be_read_is_named(own, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="colours"):
        pictures.files_in(own.folder / "train" / "red")


def test_a_slash_behind_a_folder_changes_nothing(own, tmp_path):
    out = tmp_path / "run"
    train.main(["--dataset", f"{own.folder}//", "--out", str(out), "--teacher", str(own.model), *QUICK])
    assert checkpoint.read(out / "model.pt")["dataset"] == str(own.folder)
    train.main(["--resume", "--dataset", f"{own.folder}/", "--out", str(out)])
    half_test.main(["--checkpoint", str(out / "model.pt"), "--dataset", f"{own.folder}/"])
    assert json.loads((out / "report.json").read_text())["test"]["accuracy"] >= 0


@pytest.mark.parametrize("given, named", [("data/mine/", "data/mine"), ("mine//", "mine"), ("/", "/"),
                                          ("cifar10", "cifar10"), ("digits/", "digits/"), ("./digits/", "./digits")])
def test_a_data_set_is_named_without_its_last_slash_but_for_a_folder_called_like_another(given, named):
    assert cifar10.named(given) == named


def test_the_published_recipe_and_its_loaders_take_a_folder(own, tmp_path):
    train.main(["--dataset", str(own.folder), "--out", str(tmp_path / "run"), *QUICK, "--recipe", "published"])
    loaders = cifar10.loaders(cifar10.load(str(own.folder)), str(own.folder), batch_size=4)
    assert [len(each.dataset) for each in loaders] == [22, 2, 9]


# ---- small sets

@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.none() | st.integers(1, 50))
def test_every_set_of_two_images_or_more_is_split(count, limit):
    data = cifar10.Data(np.zeros((count, 1, 1, 1), np.uint8), np.zeros(count, np.int64), None, None)
    train_part, validation = cifar10.split(data, limit=limit)
    assert len(train_part) >= 1 and len(validation) >= 1 and not set(train_part) & set(validation)
    if limit is None:
        assert len(train_part) + len(validation) == count and len(validation) == max(1, count // 10)


def test_one_image_is_not_split():
    data = cifar10.Data(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int64), None, None)
    with pytest.raises(ValueError, match="1 training images: one is needed to train and one to validate"):
        cifar10.split(data)


# ---- kinds as plain types

@pytest.mark.parametrize("dataset", cifar10.KINDS)
def test_a_kind_comes_back_from_plain_types(dataset):
    kind = cifar10.kind_of(dataset)
    stored = json.loads(json.dumps(cifar10.plain(kind)))
    assert cifar10.kind_of("anything", stored) == kind._replace(reader="")


JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                    max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["shape", "counts", "mean", "std", "classes", "flip"]), JSON | st.just(...))
def test_a_stored_kind_of_another_form_is_refused_or_usable(name, value):
    stored = cifar10.plain(cifar10.KINDS["cifar10"]) | {name: value}
    if value is ...:
        del stored[name]
    try:
        kind = cifar10.kind_of("mine", stored)
    except ValueError as problem:
        assert "of its data set mine" in str(problem)
        return
    assert all(math.isfinite(level) for level in kind.mean + kind.std) and min(kind.std) > 0
    assert len(kind.mean) == len(kind.std) == kind.shape[2] and all(isinstance(each, str) for each in kind.classes)


@pytest.mark.parametrize("stored", [None, [], 3, "cifar10", {}])
def test_a_file_whose_kind_is_none_is_refused_by_name(tmp_path, stored):
    path = save_network(tmp_path / "model.pt", {"dataset": "digits", "kind": stored})
    if stored is None:
        assert data_of(path, load_network(path)[1])[1] == cifar10.KINDS["digits"]
        return
    with pytest.raises(ValueError, match="model.pt holds no network that can be built: .*data set digits"):
        load_network(path)


# ---- what does not fit

def test_files_that_name_no_data_set_are_of_cifar10_or_what_is_named(tmp_path):
    path = save_network(tmp_path / "model.pt")
    state = load_network(path)[1]
    assert data_of(path, state) == ("cifar10", cifar10.KINDS["cifar10"])
    assert data_of(path, state, "svhn") == ("svhn", cifar10.KINDS["svhn"])
    for shipped in (ROOT / "pretrained").iterdir():
        name, kind = data_of(shipped, load_network(shipped)[1])
        assert (name, kind._replace(reader="CIFAR10")) == ("cifar10", cifar10.KINDS["cifar10"])


@pytest.mark.parametrize("named", [{}, {"dataset": "cifar10"},
                                   {"dataset": "cifar10", "kind": cifar10.plain(cifar10.KINDS["cifar10"])}])
@pytest.mark.parametrize("dataset, told", [
    ("mnist", "takes images of 32x32, 3 channels, mnist has 28x28, 1 channels"),
    ("cifar100", "tells 10 classes apart, cifar100 has 100")])
@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".onnx"])
def test_another_form_is_refused_before_any_image(named, dataset, told, ending, tmp_path):
    path = save_network(tmp_path / "model.pt", named)
    if ending == ".onnx":
        onnx_files.write_onnx(load_network(path)[0], tmp_path / "model.onnx", (3, 32, 32), named)
    elif ending == ".safetensors":
        (tmp_path / "model.safetensors").write_bytes(tensor_files.to_bytes(checkpoint.read(path), 1))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    flags = ["--checkpoint", str(tmp_path / f"model{ending}"), "--dataset", dataset]
    with pytest.raises(ValueError, match=told):
        predict.main([str(tmp_path / "a.png"), *flags])
    if ending != ".onnx":
        flags += ["--data", str(tmp_path / "none")]
        with pytest.raises(ValueError, match=told):
            half_test.main(flags)
        with pytest.raises(ValueError, match=told):
            export.main([*flags, "--out", str(tmp_path / "b.pt.gz")])


def test_other_classes_of_the_same_number_are_refused_and_the_same_ones_taken(tmp_path):
    path = save_network(tmp_path / "model.pt", {"dataset": "cifar10"})
    with pytest.raises(ValueError, match=r"tells the classes of cifar10 apart \(airplane.*not those of digits \(0, 1"):
        data_of(path, load_network(path)[1], "digits")
    path = save_network(tmp_path / "model.pt", {"dataset": "digits"})
    assert data_of(path, load_network(path)[1], "svhn") == ("svhn", cifar10.KINDS["digits"])


def test_an_onnx_file_of_mnist_that_names_nothing(tmp_path, capsys):
    path = save_network(tmp_path / "model.pt", in_channels=1, size=28)
    onnx_files.write_onnx(load_network(path)[0], tmp_path / "model.onnx", (1, 28, 28))
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    flags = [str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "model.onnx")]
    with pytest.raises(ValueError, match="takes images of 28x28, 1 channels, cifar10 has 32x32, 3 channels; name the"):
        predict.main(flags)
    predict.main([*flags, "--dataset", "mnist"])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/a.png: ")


@pytest.mark.parametrize("metadata", ["[", "[]", "3", '{"dataset": 3}', '{"dataset": "digits", "kind": {"shape": 3}}'])
def test_metadata_of_another_form_is_one_line(tmp_path, metadata):
    path = save_network(tmp_path / "model.pt")
    onnx_files.write_onnx(load_network(path)[0], tmp_path / "a.onnx", (3, 32, 32))
    (tmp_path / "a.onnx").write_bytes(onnx_files.with_metadata(tmp_path / "a.onnx", {"network": metadata}))
    with pytest.raises(ValueError, match="metadata that cannot be read|does not say of its data set digits"):
        data_of(tmp_path / "a.onnx", onnx_files.open_network(tmp_path / "a.onnx")[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_onnx_file_of_something_else_is_refused(tmp_path):
    torch.onnx.export(torch.nn.Linear(4, 2), (torch.zeros(1, 4),), tmp_path / "a.onnx", dynamo=False)
    with pytest.raises(ValueError, match="a.onnx is no classifier of images: it takes"):
        onnx_files.open_network(tmp_path / "a.onnx")


@pytest.mark.parametrize("limit", [3, 6, None])
def test_some_of_the_test_pictures_are_of_every_class(own, limit, capsys):
    half_test.main(["--checkpoint", str(own.model), "--json", *(["--limit", str(limit)] if limit else [])])
    images = [row["images"] for row in json.loads(capsys.readouterr().out)["classes"]]
    assert sum(images) == (limit or 9) and max(images) < (limit or 10)         # the first three are of one class
    data = cifar10.load(str(own.folder), "data")
    chosen, labels = cifar10.some(data.x_test, data.y_test, limit)
    for image, label in zip(chosen, labels, strict=True):
        assert any((image == other).all() for other in data.x_test[data.y_test == label])


def test_some_images_that_are_mixed_already_are_the_first():
    labels = np.array([2, 0, 1, 1])
    images, chosen = cifar10.some(labels[:, None], labels, 2)
    assert chosen.tolist() == [2, 0] and images[:, 0].tolist() == [2, 0]
