"""Deployment: every form of every network is tested and timed in one run, and compared with dense ResNet-18."""
import json
import re

import pytest
import torch

import cifar10
import networks
import train
from benchmarks import deployment
from engine import checkpoint

RUN = ["PyTorch", "PyTorch compiled", "ONNX Runtime int8"]      # ONNX Runtime in float32 is as in test_export.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LeNet-5 that was trained for a moment, and what benchmarking it wrote."""
    folder = tmp_path_factory.mktemp("deployment")
    run = folder / "short"
    train.main(["--dataset", "digits", "--data", str(folder / "data"), "--model", "lenet5-student", "--mixing", "none",
                "--epochs", "4", "--lr", "0.05", "--batch-size", "32", "--compile", "off", "--device", "cpu",
                "--out", str(run)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "FORMS", {form: ending for form, ending in deployment.FORMS.items()
                                            if form in (*RUN, "packed integers")})
        patch.setenv("PATH", "")                  # no compiler: that this is said is tested here
        patch.delenv("CXX", raising=False)
        deployment.main([str(run / "model.pt"), "--data", str(folder / "data"), "--limit", "200", "--seconds", "0.05",
                         "--repeats", "3", "--json", str(folder / "table.json")])
    return folder, json.loads((folder / "table.json").read_text())["rows"]


def test_every_form_of_every_network_has_a_row(trained):
    rows = trained[1]
    assert [(row["network"], row["form"]) for row in rows] == [
        (name, form) for name in (deployment.DENSE, "short") for form in RUN]
    for row in rows:
        if row["form"] == "PyTorch compiled":
            assert row["not_run"] == "no C++ compiler found" and "times_faster" not in row
        else:
            speed = row["milliseconds"]
            assert 0 < speed["min"] <= speed["median"] <= speed["max"]


def test_accuracy_is_of_the_exported_file_and_only_of_what_was_trained(trained):
    folder, rows = trained
    data = cifar10.load("digits", str(folder / "data"))
    model = networks.load_network(folder / "short" / "model.pt")[0]
    batches = cifar10.Batches(data.x_test[:200], data.y_test[:200], 50, cifar10.KINDS["digits"])
    logits, labels = train.predict(model.half().float(), batches, torch.device("cpu"))
    expected = 100 * (logits.argmax(1) == labels).float().mean().item()
    of = {row["form"]: row for row in rows if row["network"] == "short"}
    assert of["PyTorch"]["accuracy"] == pytest.approx(expected, abs=1e-3) and of["PyTorch"]["images"] == 200
    assert of["ONNX Runtime int8"]["accuracy"] == pytest.approx(expected, abs=6)
    assert all(row["accuracy"] is None for row in rows if row["network"] == deployment.DENSE)


def test_sizes_and_ratios_are_what_is_on_disk_and_was_timed(trained):
    rows = {(row["network"], row["form"]): row for row in trained[1]}
    dense, ours = rows[deployment.DENSE, "PyTorch"], rows["short", "PyTorch"]
    assert dense["times_faster"] == 1
    assert ours["times_faster"] == dense["milliseconds"]["median"] / ours["milliseconds"]["median"]
    assert dense["macs"] > 100 * ours["macs"] and ours["parameters"] == ours["nonzero"] == 11_396
    assert 44_700_000 < dense["bytes"] * dense["times_smaller"] < 45_200_000
    assert ours["bytes"] + 5_000 > 2 * 11_396 and rows["short", "ONNX Runtime int8"]["bytes"] > 11_396


def test_table_and_plot_are_written(trained):
    folder, rows = trained
    table = (folder / "table.md").read_text()
    assert table.count("\n") == 2 + len(rows) and "not run" in table
    assert re.search(r"\| short \| [\d,]+ \| [\d,]+ \| PyTorch \| \d+\.\d\d \| [\d,]+ \| [\d.]+ \| [\d.]+ \|", table)
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")


def test_names(tmp_path):
    path = tmp_path / "a-run" / "model.pt"
    path.parent.mkdir()
    path.touch()
    compact = tmp_path / "small.pt.gz"
    compact.touch()
    assert deployment.named(str(path))[0] == "a-run"
    assert deployment.named(str(compact)) == ("small", compact)
    assert deployment.named(f"a name={compact}") == ("a name", compact)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        deployment.named("nowhere.pt")


def test_networks_of_two_data_sets_or_one_name_are_refused(tmp_path):
    for name, dataset in (("a", "digits"), ("b", "mnist"), ("c", "digits")):
        architecture = {"name": "lenet5-student", "num_classes": 10, "in_channels": 1, "size": 28,
                        "activation": "relu", "pooling": "max"}
        network = checkpoint.network_of(networks.build(**architecture), architecture)
        checkpoint.save(tmp_path / f"{name}.pt", {**network, "dataset": dataset})
    with pytest.raises(ValueError, match="digits, mnist, called a, b: they must be of one data set"):
        deployment.main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")])
    with pytest.raises(ValueError, match="have a name each"):
        deployment.main([f"x={tmp_path}/a.pt", f"x={tmp_path}/c.pt"])
    with pytest.raises(ValueError, match="at least 1"):
        deployment.main([str(tmp_path / "a.pt"), "--repeats", "0"])


def test_networks_of_few_bits_are_packed_and_not_quantized_again(tmp_path):
    architecture = {"name": "lenet5-student", "num_classes": 10, "in_channels": 3}
    for name, bits in (("floats", {}), ("few", {"bits": {"conv1": [8, 8], "conv2": [2, 4]}})):
        network = checkpoint.network_of(networks.build(**architecture, **bits), architecture | bits)
        checkpoint.save(tmp_path / f"{name}.pt", {**network, "dataset": "digits"})
    assert deployment.forms_of(tmp_path / "floats.pt") == list(deployment.FORMS)[:5]
    assert deployment.forms_of(tmp_path / "few.pt") == [*list(deployment.FORMS)[:3], "packed integers"]


def test_a_packed_file_is_measured_as_it_is(tmp_path):
    architecture = {"name": "lenet5-student", "num_classes": 10, "in_channels": 3,
                    "bits": {"conv1": [8, 8], "conv2": [2, 4]}}
    network = checkpoint.network_of(networks.build(**architecture), architecture)
    checkpoint.save(tmp_path / "few.pt", {**network, "dataset": "digits"})
    packed = tmp_path / "few.packed.gz"
    deployment.call(["export.py", "--checkpoint", str(tmp_path / "few.pt"), "--out", str(packed), "--no-compare"])
    arguments = deployment.parse([str(packed), "--data", str(tmp_path), "--limit", "50", "--seconds", "0.01",
                                  "--repeats", "1"])
    arguments.dataset = "digits"
    folder = tmp_path / "forms"
    folder.mkdir()
    (row,) = deployment.measure("few", packed, folder, cifar10.load("digits", str(tmp_path)), arguments)
    assert row["form"] == "packed integers" and row["bytes"] == packed.stat().st_size
    assert 0 <= row["accuracy"] <= 100 and row["milliseconds"]["median"] > 0 and row["repeats"] == 1


def test_repeats_that_were_cut_short_are_told(tmp_path):
    from onnx import TensorProto, helper, save
    graph = helper.make_graph([helper.make_node("Flatten", ["images"], ["logits"])], "g",
                              [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
                              [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 192])])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "a.onnx")
    for seconds, repeats in ((1e-9, 2), (0.001, 5)):
        assert deployment.time_form("ONNX Runtime", tmp_path / "a.onnx", (3, 8, 8), 5, seconds)["repeats"] == repeats
    with pytest.raises(ValueError, match="--seconds above 0 and below 3600"):
        deployment.parse(["a.pt", "--seconds", "inf"])


def test_every_form_has_a_marker_of_its_own():
    assert set(deployment.MARKERS) == set(deployment.FORMS)
    assert len(set(deployment.MARKERS.values())) == len(deployment.FORMS)


def test_a_script_that_fails_is_named_with_its_error(tmp_path):
    with pytest.raises(RuntimeError, match="python profil.py --checkpoint .*exit code 2; error: .*no checkpoint"):
        deployment.call(["profil.py", "--checkpoint", str(tmp_path / "none.pt")])
