import json

import pytest
import torch

import cifar10
import export
import test as half_test
from engine import checkpoint
from networks import build as build_by_name
from networks import load_network
from resnet_factorized import build


def test_table_and_confusion_count_every_image(trained, capsys):
    half_test.main(["--checkpoint", str(trained / "model.pt"), "--json"])
    result = json.loads(capsys.readouterr().out)
    labels = torch.from_numpy(cifar10.load("digits").y_test)
    assert result["images"] == len(labels) == sum(row["images"] for row in result["classes"])
    assert [row["images"] for row in result["classes"]] == labels.bincount(minlength=10).tolist()
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum(1).tolist() == labels.bincount(minlength=10).tolist()
    assert [row["correct"] for row in result["classes"]] == confusion.diag().tolist()
    assert result["accuracy"] == pytest.approx(100 * confusion.diag().sum().item() / len(labels))


def test_accuracy_is_that_of_the_rounded_weights(trained):
    model, _ = load_network(trained / "model.pt")
    rounded, _ = load_network(trained / "model.pt")
    rounded.load_state_dict({name: tensor.half().float() if tensor.is_floating_point() else tensor
                             for name, tensor in model.state_dict().items()})
    data, kind = cifar10.load("digits"), cifar10.KINDS["digits"]
    images = torch.from_numpy(data.x_test).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(kind.mean).view(-1, 1, 1)) / torch.tensor(kind.std).view(-1, 1, 1)
    with torch.no_grad():
        logits = rounded(images)
    result = half_test.test_network(model, data, kind, "half", torch.device("cpu"), batch_size=101)
    labels = torch.from_numpy(data.y_test)
    assert result["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-4)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert "rounded to half" in result["precision"] and "float32" in result["precision"]


@pytest.mark.parametrize("precision, bits", [("float", 23), ("half", 10), ("bfloat16", 7)])
def test_each_precision_rounds_the_weights_to_it(precision, bits):
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 1 + 2.0**-bits + 2.0**-(bits + 2))
    half_test.quantization.set_precision(model, precision, torch.device("cpu"))
    assert model.weight.dtype == torch.float32
    assert model.weight.item() == (1 + 2.0**-bits if bits < 23 else pytest.approx(1 + 2.0**-23))


def test_overflow_in_half_precision_is_refused():
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, 70_000.0)
    with pytest.raises(ValueError, match=r"weight \(largest 7e\+04\)"):
        half_test.quantization.set_precision(model, "half", torch.device("cpu"))


def test_sizes_are_those_of_files(trained, tmp_path):
    state = checkpoint.read(trained / "model.pt")
    network = {name: state[name] for name in ("architecture", "widths", "weights")}
    sizes = half_test.sizes_of(network, network)
    weights = sum(tensor.numel() for tensor in state["weights"].values())
    assert 4 * weights < sizes["float32"] < 4 * weights * 1.05
    assert 2 * weights < sizes["half"] < 2 * weights * 1.05
    assert sizes["compressed"] < sizes["half"] / 5


def test_picture_and_report_stand_beside_the_run(trained):
    half_test.main(["--checkpoint", str(trained / "model.pt")])
    assert (trained / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((trained / "report.json").read_text())["test"]["images"] == 360


def test_other_number_of_classes_is_refused(trained, tmp_path):
    network = checkpoint.network_of(build("resnet18", num_classes=100), {
        "name": "resnet18", "groups": 8, "shuffle": True, "num_classes": 100, "in_channels": 3})
    checkpoint.save(tmp_path / "hundred.pt", network)
    with pytest.raises(ValueError, match="100 classes.*digits has 10"):
        half_test.main(["--checkpoint", str(tmp_path / "hundred.pt"), "--dataset", "digits"])


def test_without_a_checkpoint_the_newest_run_is_read(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    half_test.main(["--limit", "10"])
    assert "network: runs/one/model.pt" in capsys.readouterr().out


def test_the_clock_runs_from_a_warm_device_to_one_that_has_finished(trained, monkeypatch):
    """A GPU goes on behind the call that launched its work, and starts up within the first one."""
    events, clock, predict = [], half_test.time.perf_counter, half_test.predict
    monkeypatch.setattr(half_test.time, "perf_counter", lambda: events.append("clock") or clock())
    monkeypatch.setattr(half_test.compiling, "synchronise", lambda device: events.append("wait"))

    def counted(model, batches, device):
        logits, labels = predict(model, batches, device)
        events.append(len(labels))
        return logits, labels
    monkeypatch.setattr(half_test, "predict", counted)
    model, _ = load_network(trained / "model.pt")
    result = half_test.test_network(model, cifar10.load("digits"), cifar10.KINDS["digits"], "half",
                                    torch.device("cpu"), batch_size=101)
    assert events == [101, "wait", "clock", 360, "wait", "clock"] and result["images"] == 360


def test_bytes_of_few_bits_are_those_of_what_is_exported(tmp_path, capsys):
    architecture = {"name": "lenet5-student", "num_classes": 10, "in_channels": 3,
                    "bits": {"conv1": [8, 8], "conv2": [2, 4], "linear1": [2, 4], "linear2": [8, 8]}}
    network = checkpoint.network_of(build_by_name(**architecture), architecture)
    checkpoint.save(tmp_path / "few.pt", {**network, "dataset": "digits"})
    half_test.main(["--checkpoint", str(tmp_path / "few.pt"), "--limit", "10", "--json"])
    sizes = json.loads(capsys.readouterr().out)["bytes"]
    for form, name in (("compressed", "few.pt.gz"), ("packed", "few.packed.gz")):
        export.main(["--checkpoint", str(tmp_path / "few.pt"), "--out", str(tmp_path / name), "--no-compare"])
        assert sizes[form] == pytest.approx((tmp_path / name).stat().st_size, rel=0.05), form
