import json
import re

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file as safetensors_file
from safetensors.torch import save_file
from torch import nn

import binaryconnect
import cifar10
import export
import networks
import test as half_test
from deploy import onnx_files
from engine import checkpoint, shrinking
from networks import load_network


def test_the_compact_file_holds_the_rounded_network(trained, tmp_path, capsys):
    target = tmp_path / "folder" / "small.pt.gz"
    export.main(["--checkpoint", str(trained / "model.pt"), "--out", str(target)])
    printed = capsys.readouterr().out
    assert "times smaller" in printed and "predictions changed" in printed and "of 360" in printed
    whole, _ = load_network(trained / "model.pt")
    small, state = load_network(target)
    assert state["dataset"] == "digits"
    for (name, ours), theirs in zip(whole.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(ours.half().float() if ours.is_floating_point() else ours, theirs), name
    assert (trained / "model.pt").stat().st_size > 12 * target.stat().st_size
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(whole(images), small(images), atol=0.05, rtol=0.01)


def test_last_pt_exports_as_well(trained, tmp_path):
    export.export(*load_network(trained / "last.pt"), tmp_path / "last.pt.gz")
    assert (tmp_path / "last.pt.gz").stat().st_size < (trained / "last.pt").stat().st_size
    assert checkpoint.read(tmp_path / "last.pt.gz")["dataset"] == "digits"


def test_overflow_is_refused_and_nothing_is_saved(trained, tmp_path):
    state = checkpoint.read(trained / "model.pt")
    state["weights"]["linear.weight"][0, 0] = 1e6
    checkpoint.save(tmp_path / "large.pt", {name: value for name, value in state.items() if name != "format"})
    with pytest.raises(ValueError, match=r"linear.weight \(largest 1e\+06\)"):
        export.export(*load_network(tmp_path / "large.pt"), tmp_path / "large.pt.gz")
    assert not (tmp_path / "large.pt.gz").exists()


@pytest.mark.parametrize("ending", [".onnx", ".safetensors"])
def test_float32_formats_give_the_same_logits(ending, trained, tmp_path, capsys):
    target = tmp_path / f"model{ending}"
    export.main(["--checkpoint", str(trained / "model.pt"), "--out", str(target)])
    printed = capsys.readouterr().out
    assert " 0 of 360 predictions changed" in printed
    assert float(printed.split("largest difference of a logit ")[1].split(",")[0]) < 1e-3
    assert target.stat().st_size > 4 * 1_411_146


def test_a_file_is_used_without_this_project_as_the_page_shows(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export.main(["--checkpoint", str(trained / "model.pt"), "--out", "a.w8.onnx", "--no-compare"])
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "inference.md").read_text(), re.DOTALL)[1]
    data, told = cifar10.load("digits"), []
    for place in range(5):
        Image.fromarray(data.x_test[place]).save("a_photo.png")
        capsys.readouterr()
        exec(block, {})
        told.append(capsys.readouterr().out.strip())
    forward = onnx_files.open_onnx("a.w8.onnx")
    images, _ = next(iter(cifar10.Batches(data.x_test, data.y_test, 5, cifar10.KINDS["digits"])))
    assert told == [cifar10.DIGITS[place] for place in forward(images).argmax(1)]


def test_int8_is_calibrated_on_training_images_and_compared(trained, tmp_path, capsys):
    target = tmp_path / "model.int8.onnx"
    export.main(["--checkpoint", str(trained / "model.pt"), "--out", str(target), "--limit", "50"])
    assert "of 50 predictions changed" in capsys.readouterr().out
    assert target.stat().st_size < 2 * 1_411_146


def test_safetensors_carry_the_structure_and_are_read_like_a_checkpoint(trained, tmp_path, capsys):
    target = tmp_path / "model.safetensors"
    export.export(*load_network(trained / "model.pt"), target)
    model, state = load_network(target)
    theirs = safetensors_file(target)
    assert state["dataset"] == "digits" and state["architecture"]["name"] == "resnet18"
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
    half_test.main(["--checkpoint", str(target), "--json"])
    assert json.loads(capsys.readouterr().out)["images"] == 360
    content = target.read_bytes()
    target.write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_network(target)
    save_file({"a": torch.zeros(2)}, target)
    with pytest.raises(ValueError, match="holds tensors alone"):
        load_network(target)


def test_dead_channels_are_not_exported(tmp_path):
    architecture = {"name": "lenet5", "num_classes": 10, "in_channels": 3, "size": 32, "activation": "relu",
                    "pooling": "max"}
    model = networks.build(**architecture)
    with torch.no_grad():
        model.linear2.weight[:, 20:] = 0
    checkpoint.save(tmp_path / "model.pt", {**checkpoint.network_of(model, architecture), "dataset": "digits"})
    forward, removed = export.export(*load_network(tmp_path / "model.pt"), tmp_path / "small.pt.gz")
    assert removed == 100 and forward.linear1.out_features == 20


def test_another_ending_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"small.zip: it must end in one of .int8.pt.gz, .pt.gz, .safetensors"):
        export.main(["--checkpoint", str(trained / "model.pt"), "--out", str(tmp_path / "small.zip")])
    assert not (tmp_path / "small.zip").exists()


def shrunk(name, branches, **arguments):
    """A network that random channels have left: inner ones, or those of the residual branches (selective addition)."""
    model = networks.build(name, num_classes=10, **arguments)
    for space in model.channels():
        if bool(space.get("branch")) == branches and not space["name"].startswith("stream"):
            rows, columns = shrinking.partitions(model, space)
            weak = torch.rand(len(rows)) < 0.5
            shrinking.remove(model, space, shrinking.balanced(weak, torch.rand(len(rows)), rows, columns))
    return model


def binary():
    model = networks.build("resnet20", num_classes=10, in_channels=3, shortcut="A")
    with torch.no_grad():
        for name, weight in binaryconnect.binary_weights(model).items():
            weight.copy_(binaryconnect.binarize(weight, binaryconnect.scale_of(weight, "glorot"),
                                                mask=torch.rand_like(weight) < 0.7 if "layer3" in name else None))
    return model


GROUPED = {"name": "resnet18", "in_channels": 3, "groups": 8, "shuffle": True}
RESNET20 = {"name": "resnet20", "in_channels": 3, "shortcut": "A"}
NETWORKS = {       # how it is made, and its architecture
    "grouped, shrunk": (lambda: shrunk(**GROUPED, branches=False), GROUPED),
    "grouped, selective addition": (lambda: shrunk(**GROUPED, branches=True), GROUPED),
    "selective addition": (lambda: shrunk(**RESNET20, branches=True), RESNET20),
    "depthwise, shrunk": (lambda: shrunk("mobilenet", False, in_channels=3), {"name": "mobilenet", "in_channels": 3}),
    "plain, shrunk": (lambda: shrunk("lenet5", False, in_channels=3), {"name": "lenet5", "in_channels": 3}),
    "binary": (binary, RESNET20),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_of_network_comes_back_from_every_export(kind, tmp_path):
    torch.manual_seed(0)
    make, architecture = NETWORKS[kind]
    model = make()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None                        # statistics are the mean of what was seen
    model.train()(torch.randn(64, 3, 32, 32))
    architecture = {**architecture, "num_classes": 10}
    checkpoint.save(tmp_path / "model.pt", {**checkpoint.network_of(model, architecture), "dataset": "digits"})
    data = cifar10.load("digits", str(tmp_path))
    images = next(iter(cifar10.Batches(data.x_test, data.y_test, 64, cifar10.KINDS["digits"])))[0]
    with torch.no_grad():
        expected = load_network(tmp_path / "model.pt")[0](images)
        spread = expected.std(0).mean()
        for ending, tolerance in ((".safetensors", 0), (".onnx", 1e-3), (".pt.gz", 2e-2), (".int8.pt.gz", 0.4),
                                  (".w8.onnx", 0.4), (".int8.onnx", 0.5)):
            target = tmp_path / f"out{ending}"
            written, _ = export.export(*load_network(tmp_path / "model.pt"), target, data)
            forward = onnx_files.open_onnx(target) if ending.endswith("onnx") else load_network(target)[0]
            assert torch.equal(forward(images), written(images)), ending
            worst = ((forward(images) - expected).abs().mean() / spread).item()
            assert worst <= tolerance + 1e-5, f"{ending}: {worst:.3g} of the logits' spread"


@pytest.mark.parametrize("found, machine, expected", [
    ({"avx2": True, "avx512_vnni": False}, "x86_64", True), ({"avx512_vnni": True}, "x86_64", False),
    ({"avx_vnni": True}, "AMD64", False), ({}, "x86_64", True), ({}, "arm64", False)])
def test_weights_have_seven_bits_where_sums_of_eight_may_overflow(found, machine, expected, monkeypatch):
    monkeypatch.setattr(onnx_files.compiling, "cpu_instructions", lambda: found)
    monkeypatch.setattr(onnx_files.platform, "machine", lambda: machine)
    assert onnx_files.sums_overflow() is expected
