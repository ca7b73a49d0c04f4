"""The models that ship give the numbers that the README and results/ state."""
import csv
import json

import pytest
from conftest import ROOT

import cifar10
import export
import profil
import pruning
import test as half_test
from benchmarks import deployment
from networks import load_network
from train import SHIPPED

TEACHER = SHIPPED.parent / "wrn16_2_cifar10.pt.gz"


def result(name):
    """What a JSON file in results/ states."""
    return json.loads((ROOT / "results" / name).read_text())


@pytest.fixture(scope="module")
def stated():
    return {part: result(f"shipped_{part}.json") for part in ("profile", "test")}


def test_zeros_and_parameters(stated):
    model, _ = load_network(SHIPPED)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    zeros = sum(int((weight == 0).sum()) for weight in pruning.prunable(model).values())
    assert (stated["profile"]["parameters"], stated["profile"]["nonzero"]) == (parameters, parameters - zeros)
    assert pruning.sparsity_of(model) == pytest.approx(0.91, abs=1e-3)


def test_it_is_the_run_that_it_came_from(stated):
    with open(ROOT / "results" / "full_protocol" / "runs.csv") as file:
        run = next(row for row in csv.DictReader(file) if row["arm"] == "100 + 25 + 125 epochs" and row["seed"] == "0")
    assert (float(run["nonzero"]), float(run["macs"])) == (stated["profile"]["nonzero"], stated["profile"]["macs"])
    assert float(run["bytes"]) == SHIPPED.stat().st_size
    assert stated["test"]["accuracy"] == pytest.approx(float(run["test_accuracy"]), abs=0.05)


def test_it_is_small():
    assert SHIPPED.stat().st_size < 11_173_962 * 4 / 100


def accuracy_of(path, data, capsys):
    """What test.py says of a file on all 10,000 test images, in %."""
    half_test.main(["--checkpoint", str(path), "--data", str(data), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 10_000
    return result["accuracy"]


# other processors and threads add in another order: a few of 10,000 images may tip over
def test_accuracy_on_the_real_test_images(real_cifar10, capsys, stated):
    assert accuracy_of(SHIPPED, real_cifar10, capsys) == pytest.approx(stated["test"]["accuracy"], abs=0.05)


def test_the_teacher_is_as_good_as_stated(real_cifar10, capsys):
    stated = result("wrn16_2_test.json")
    found = accuracy_of(TEACHER, real_cifar10, capsys)
    assert found == pytest.approx(stated["accuracy"], abs=0.05)


def test_the_teacher_with_weights_of_8_bits_is_a_fiftieth_of_dense_resnet18(real_cifar10, tmp_path):
    path, form = tmp_path / "network.w8.onnx", "ONNX Runtime, 8-bit weights"
    export.main(["--checkpoint", str(TEACHER), "--out", str(path), "--no-compare"])
    data, kind = cifar10.load("cifar10", real_cifar10), cifar10.KINDS["cifar10"]
    accuracy = deployment.test_form(form, path, cifar10.Batches(data.x_test, data.y_test, 250, kind))
    stated = result("deployment/deployment.json")["rows"]
    row, = (row for row in stated if row["network"].startswith("WRN-16-2") and row["form"] == form)
    assert accuracy == pytest.approx(row["accuracy"], abs=0.1)             # made from half precision here
    assert path.stat().st_size < 44.8e6 / 50


def test_the_packed_network_has_its_score_and_accuracy(real_cifar10, capsys):
    path = SHIPPED.parent / "resnet20_12_24_48_3bits_cifar10.packed.gz"
    stated = {part: result(f"low_bits/{part}.json") for part in ("profile", "test")}
    profil.main(["--checkpoint", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    for name in ("score_course", "score_course_strict", "nonzero", "macs"):
        assert found[name] == stated["profile"][name]
    assert found["score_course"] < 0.010
    assert accuracy_of(path, real_cifar10, capsys) == pytest.approx(stated["test"]["accuracy"], abs=0.05)
