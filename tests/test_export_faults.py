"""What export.py, test.py and predict.py refuse, before any work and with nothing left behind."""
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from sample_runs import one_line

import cifar10
import export
import networks
import predict
import profil
import test as half_test
import train
from benchmarks import deployment
from engine import checkpoint, commandline
from networks import load_network

ARCHITECTURE = {"name": "lenet5-student", "num_classes": 10, "in_channels": 3, "size": 32, "activation": "relu",
                "pooling": "max"}


def network_state(**changes):
    """The dictionary of a small digits network's file, with some parts changed."""
    torch.manual_seed(0)
    return {**checkpoint.network_of(networks.build(**ARCHITECTURE), ARCHITECTURE), "dataset": "digits", **changes}


@pytest.fixture
def small(tmp_path):
    """The folder of a run, as far as these scripts look into it."""
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run" / "model.pt", network_state())
    return tmp_path / "run"


@pytest.fixture
def no_data(monkeypatch):
    """A test in which reading a data set fails."""
    monkeypatch.setattr(cifar10, "load", lambda *arguments: pytest.fail("a data set was read"))


@pytest.fixture
def exit_of(monkeypatch, capsys):
    """exit_of(script's main, *flags) -> (exit code, stdout, stderr)."""
    def call(main, *flags):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            commandline.command(main)
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()
    return call


# ---- export.py: before any work

@pytest.mark.parametrize("out, flags, told", [
    ("new/dir/a.pth", "", "a.pth: it must end in one of .int8.pt.gz"),
    ("new/dir/a.gz", "", "a.gz: it must end in one of"),
    ("new/dir/a.pt.gz", "--limit 0", "--limit 0: at least 1 test image is needed"),
    ("new/dir/a.pt.gz", "--limit -5", "--limit -5: at least 1 test image is needed"),
    ("new/dir/a.pt.gz", "--limit 0 --no-compare", "--limit 0: at least 1"),
    ("new/dir/a.packed.gz", "", "a packed file holds a network of few bits, this one has floats"),
    ("new/dir/a.pt.gz", "--dataset mnist", "takes images of 32x32, 3 channels, mnist has 28x28, 1 channels"),
    ("new/dir/a.pt.gz", "--dataset nothing", "no data set and no folder is called 'nothing'"),
    ("run/model.pt/a.pt.gz", "", "cannot write in .*model.pt"),
    ("/proc/none/a.pt.gz", "", "cannot write in /proc/none: No such file"),
])
def test_what_is_known_before_is_refused_before(small, no_data, exit_of, out, flags, told):
    before = sorted(small.parent.rglob("*"))
    code, output, errors = exit_of(export.main, "--checkpoint", small / "model.pt", "--out", small.parent / out,
                                   *flags.split())
    assert code == 2 and output == ""
    assert re.search(told, one_line(errors)), errors
    assert sorted(small.parent.rglob("*")) == before


def test_an_absent_or_damaged_checkpoint_leaves_no_folder(small, no_data, exit_of):
    (small / "model.pt").write_bytes(b"<html>")
    for name in ("model.pt", "nothing.pt"):
        code, _, errors = exit_of(export.main, "--checkpoint", small / name, "--out", small / "new" / "dir" / "a.onnx")
        assert code == 2 and name in one_line(errors) and os.listdir(small) == ["model.pt"]


def test_a_folder_in_the_place_of_the_file_is_refused(small, no_data):
    (small / "a.onnx").mkdir()
    with pytest.raises(ValueError, match="a.onnx is a folder; --out names a file"):
        export.main(["--checkpoint", str(small), "--out", str(small / "a.onnx")])


def test_folders_that_were_made_stay_where_they_hold_something(tmp_path):
    with pytest.raises(RuntimeError), export.room_for(tmp_path / "a" / "b" / "c.onnx"):
        (tmp_path / "a" / "precious.txt").touch()
        raise RuntimeError
    assert os.listdir(tmp_path / "a") == ["precious.txt"]


def test_a_quantizer_that_fails_leaves_no_file_of_another_form(small, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no ranges")
    monkeypatch.setattr(export.onnx_files, "quantize_onnx", fail)
    with pytest.raises(RuntimeError, match="no ranges"):
        export.main(["--checkpoint", str(small), "--out", str(small / "new" / "a.int8.onnx"), "--limit", "4"])
    assert os.listdir(small) == ["model.pt"]


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard", "through a folder"])
def test_the_checkpoint_itself_is_not_written_over(small, no_data, exit_of, link):
    source = small.parent / "network.pt.gz"
    checkpoint.save_compact(source, network_state())
    content = source.read_bytes()
    target = small / "b.pt.gz"
    target = {"itself": source, "through a folder": small.parent / "there" / "network.pt.gz"}.get(link, target)
    if link == "symbolic":
        target.symlink_to(source)
    elif link == "hard":
        os.link(source, target)
    elif link == "through a folder":
        target.parent.symlink_to(small.parent)
    for one, other in ((source, target), (target, source)):
        code, _, errors = exit_of(export.main, "--checkpoint", one, "--out", other)
        assert code == 2 and "is the checkpoint itself" in one_line(errors)
        for main, flag in ((half_test.main, "--picture"), (profil.main, "--csv")):
            code, _, errors = exit_of(main, "--checkpoint", one, flag, other)
            assert code == 2 and f"{flag} {other} is the checkpoint itself" in one_line(errors)
    assert source.read_bytes() == content and target.read_bytes() == content


# ---- no check on nothing

@pytest.mark.parametrize("limit", ["0", "-5"])
def test_no_limit_below_one(small, limit):
    with pytest.raises(ValueError, match=f"--limit {limit}: at least 1 test image is needed"):
        half_test.main(["--checkpoint", str(small), "--limit", limit])
    with pytest.raises(ValueError, match=f"--limit {limit}: at least 1 test image is needed"):
        deployment.main([str(small / "model.pt"), "--limit", limit])
    with pytest.raises(ValueError, match=f"--top {limit}: at least 1 class"):
        predict.main(["a.png", "--checkpoint", str(small), "--top", limit])


# ---- the folder of a run

def test_a_run_is_named_by_its_folder(small, exit_of, tmp_path):
    assert train.find_checkpoint(str(small)) == checkpoint.find(f"{small}/") == small / "model.pt"
    assert checkpoint.find(small / "other.pt") == small / "other.pt"
    code, output, _ = exit_of(half_test.main, "--checkpoint", small, "--limit", 5)
    assert code == 0 and output.startswith(f"network: {small}/model.pt, trained on digits")
    code, output, _ = exit_of(export.main, "--checkpoint", small, "--out", tmp_path / "a.onnx", "--limit", 5)
    assert code == 0 and output.startswith(f"{small}/model.pt: ")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    code, output, errors = exit_of(predict.main, "--checkpoint", small, tmp_path / "a.png")
    assert (code, output.count("\n")) == (0, 1)
    assert errors == f"note: {small} is a folder; its model.pt is read: {small}/model.pt\n"


def test_a_folder_without_a_result_is_told_with_what_it_holds(small):
    shutil.move(small / "model.pt", small / "last.pt")
    with pytest.raises(FileNotFoundError, match="run is a folder; .*last.pt holds an unfinished run"):
        checkpoint.find(small)
    with pytest.raises(FileNotFoundError, match="is a folder; name a checkpoint"):
        train.find_checkpoint("")                 # an unset variable of a shell is not the newest run


# ---- predict.py: one picture does not end the others

def test_a_broken_picture_is_named_and_the_others_are_told(small, exit_of, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "c.png", "e.png"):
        Image.new("RGB", (9, 9)).save(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(folder / "d.tif")
    (tmp_path / "empty").mkdir()
    given_paths = tmp_path / "none.png", folder, tmp_path / "empty", folder / "a.png"
    code, output, errors = exit_of(predict.main, "--checkpoint", small / "model.pt", *given_paths)
    assert code == 2
    assert [line.split(": ")[0] for line in output.splitlines()] == [f"{folder}/{name}.png" for name in "acea"]
    line = one_line(errors)
    for part in ("there is no file at", "none.png", "b.png is no picture", "d.tif is no picture", "mode I",
                 "empty holds no picture"):
        assert part in line
    code, output, errors = exit_of(predict.main, "--checkpoint", small / "model.pt", "--json", *given_paths)
    assert code == 2 and output.count('"classes"') == 4 and output.count('"error"') == 4


def test_a_whole_folder_has_exit_code_0(small, exit_of, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert exit_of(predict.main, "--checkpoint", small / "model.pt", tmp_path)[::2] == (0, "")


def test_what_is_transparent_shows_the_background(tmp_path):
    kind = cifar10.KINDS["digits"]
    Image.new("LA", (9, 9), (0, 0)).save(tmp_path / "a.png")
    for background, level in ((predict.pictures.WHITE, 1), ((0, 0, 0), 0)):
        expected = (level - torch.tensor(kind.mean)) / torch.tensor(kind.std)
        found = predict.read_picture(tmp_path / "a.png", kind, background)
        torch.testing.assert_close(found, expected.view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_the_background_is_a_flag(small, exit_of, tmp_path):
    Image.new("LA", (9, 9), (0, 0)).save(tmp_path / "a.png")
    for name in ("white", "black"):
        Image.new("RGB", (9, 9), name).save(tmp_path / f"{name}.png")
    flags = ["--checkpoint", small / "model.pt", "--top", 3]
    told = {}
    for name in ("white", "black"):
        told[name] = exit_of(predict.main, *flags, tmp_path / f"{name}.png")[1].split(": ")[1]
        assert exit_of(predict.main, *flags, tmp_path / "a.png", "--background", name)[1].endswith(told[name])
    assert told["white"] != told["black"]
    assert exit_of(predict.main, *flags, tmp_path / "a.png")[1].endswith(told["white"])
    assert exit_of(predict.main, *flags, tmp_path / "a.png", "--background", "wit")[0] == 2


# ---- checkpoints of another shape

@pytest.mark.parametrize("changes, told", [
    ({"architecture": {**ARCHITECTURE, "depth": 3}}, "depth"),
    ({"architecture": {}}, "name"),
    ({"architecture": {"name": "resnet18", "groups": "8"}}, "groups"),
    ({"architecture": {**ARCHITECTURE, "name": ["lenet5"]}}, "model.pt"),
    ({"architecture": {**ARCHITECTURE, "name": "lenet6"}}, "lenet6"),
    ({"architecture": {**ARCHITECTURE, "num_classes": -3}}, "model.pt"),
    ({"architecture": {**ARCHITECTURE, "bits": [1]}}, "model.pt"),
    ({"architecture": [1]}, "architecture or weights are missing"),
    ({"widths": 3}, "model.pt"),
    ({"widths": {"linear1": "wide"}}, "model.pt"),
    ({"widths": {"conv1": [3, -1]}}, "model.pt"),
    ({"dataset": ["digits"]}, "digits"),
    ({"dataset": None, "settings": [1]}, "model.pt"),
    ({"average": [1, 2]}, "model.pt"),
    ({"average": {"conv1.weight": 3}}, "model.pt"),
    ({"integers": 3}, "model.pt is damaged"),
])
def test_a_checkpoint_of_another_shape_is_one_line(small, exit_of, no_data, changes, told):
    checkpoint.save(small / "model.pt", network_state(**changes))
    for main, flags in ((half_test.main, ()), (export.main, ("--out", small / "a.onnx"))):
        code, output, errors = exit_of(main, "--checkpoint", small / "model.pt", *flags)
        line = one_line(errors)
        assert code == 2 and output == "" and told in line and "model.pt" in line, line


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-2, 9) | st.floats(width=16) | st.text(max_size=2),
                      lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=2), inner, max_size=2), max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["architecture", "widths", "weights", "dataset", "kind", "average", "settings", "integers"]),
       st.sampled_from([None, *ARCHITECTURE, "conv1", "linear2", "conv1.weight"]), VALUES)
def test_any_value_anywhere_is_read_or_refused_by_name(tmp_path_factory, part, name, value):
    state = network_state()
    state[part] = value if name is None or not isinstance(state.get(part), dict) else state[part] | {name: value}
    path = tmp_path_factory.mktemp("shapes") / "model.pt"
    checkpoint.save(path, state)
    try:
        networks.data_of(path, load_network(path)[1])
    except ValueError as problem:
        assert "model.pt" in str(problem) and str(problem).strip(), problem


@pytest.mark.parametrize("metadata", [
    {"network": "{}"}, {"format": "1", "network": "[]"}, {"format": "x", "network": "{}"},
    {"format": "1", "network": "{"}, {"format": "1", "network": "3"}])
def test_safetensors_of_another_structure_are_one_line(tmp_path, metadata):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({"a": torch.ones(2)}, metadata))
    with pytest.raises(ValueError, match="a.safetensors"):
        load_network(tmp_path / "a.safetensors")
