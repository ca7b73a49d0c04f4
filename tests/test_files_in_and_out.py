"""What scripts read and write: the right file, untouched neighbours, and one line for what cannot be used."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sample_runs import SMALL

import cifar10
import export
import networks
import predict
import profil
import report
import study
import test as half_test
import train
from benchmarks import deployment, inference, overview
from deploy import onnx_files
from engine import checkpoint, files, folders, pictures
from studies.study_file import read_study

QUICK = [*SMALL, "--epochs", "1", "--model", "lenet5", "--mixing", "none"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their seed alone, neither tested nor profiled."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train.main([*QUICK, "--seed", str(seed), "--out", str(folder / f"seed{seed}")])
    return folder


@pytest.fixture
def own(runs, tmp_path):
    """A copy of both for a test."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


# ---- a study and a run beside it

def test_a_study_leaves_a_run_that_another_process_has_just_begun(tmp_path):
    """The other one is in its first epoch: a config.json, and a lock of its process."""
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from engine import folders\n"
         "folders.take(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()", str(folder)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process trains in"):
            study.train_arm({"name": "a", "run": "train.py"}, "", 0, folder)
        assert (folder / "config.json").exists()
    finally:
        holder.communicate("")
    folders.hold(folder)                               # it is free again
    folders.let_go(folder)


def test_two_factors_of_one_flag_are_refused(tmp_path):
    factors, path = {name: {"flag": "--lr", "values": [0.1, 0.2]} for name in ("x", "y")}, tmp_path / "a.json"
    path.write_text(json.dumps({"seeds": [0], "factors": factors, "run": "train.py --model lenet5"}))
    with pytest.raises(ValueError, match="two factors are of the flag --lr"):
        read_study(path)


# ---- whose numbers a report has

def test_a_profile_of_another_file_of_the_run_is_not_the_run_s(own):
    out = own / "seed0"
    profil.main(["--checkpoint", str(out / "model.pt")])
    before = files.read_json(out / "report.json")["profile"]
    shutil.copy(out / "last.pt", out / "previous.pt")
    profil.main(["--checkpoint", str(out / "previous.pt")])
    profil.main(["--checkpoint", str(out / "model.pt"), "--bits", "1"])
    assert files.read_json(out / "report.json")["profile"] == before


def test_repetitions_of_a_seed_and_untested_runs_are_told(own, capsys):
    shutil.copytree(own / "seed0", own / "again")
    config = files.read_json(own / "again" / "config.json")
    (own / "again" / "config.json").write_text(json.dumps({**config, "started": "2020-01-01 00:00:00"}))
    half_test.main(["--checkpoint", str(own / "seed0")])
    report.main([*(str(own / name) for name in ("seed0", "again", "seed1")), "--out", str(own / "out")])
    assert "again has the settings and the seed of" in capsys.readouterr().err
    table = pd.read_csv(own / "out" / "table.csv")
    assert (list(table["n"]), list(table["tested"]), list(table["runs"])) == ([2], [1], ["seed0 seed1"])
    assert " (1 of 2) |" in (own / "out" / "table.md").read_text()


def test_tests_in_two_precisions_are_no_mean(own):
    half_test.main(["--checkpoint", str(own / "seed0")])
    half_test.main(["--checkpoint", str(own / "seed1"), "--precision", "bfloat16"])
    report.main([str(own / "seed0"), str(own / "seed1"), "--out", str(own / "out")])
    assert list(pd.read_csv(own / "out" / "table.csv")["n"]) == [1, 1]


def test_a_copy_says_nothing_against_the_run(own):
    report.main([str(own / "seed0"), "--out", str(own / "out")])
    half_test.main(["--checkpoint", str(own / "seed0")])
    for order in (("out/seed0", "seed0"), ("seed0", "out/seed0")):
        report.main([*(str(own / name) for name in order), "--out", str(own / "other")])
        assert pd.read_csv(own / "other" / "table.csv")["test_accuracy"].notna().all()


def test_a_run_in_the_current_folder_has_its_name(own, monkeypatch):
    monkeypatch.chdir(own / "seed0")
    report.main([".", "--out", "out"])
    assert list(pd.read_csv("out/table.csv")["runs"]) == ["seed0"]
    assert os.path.isfile("out/seed0/config.json") and not os.path.exists("out/config.json")


@pytest.mark.parametrize("main, flag", [(profil.main, "--csv"), (half_test.main, "--picture")])
@pytest.mark.parametrize("name", ["last.pt", "history.csv", "config.json"])
def test_a_file_of_a_run_is_not_written_over(own, main, flag, name):
    before = (own / "seed0" / name).read_bytes()
    with pytest.raises(ValueError, match=f"{flag} .*{name} is a file of the run in"):
        main(["--checkpoint", str(own / "seed0" / "model.pt"), flag, str(own / "seed0" / name)])
    assert (own / "seed0" / name).read_bytes() == before


# ---- networks that are broken, or that one form cannot hold

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_network_is_refused_everywhere(runs, tmp_path, value):
    state = checkpoint.read(runs / "seed0" / "model.pt")
    state["weights"]["linear3.weight"][0, :2] = value
    checkpoint.save(tmp_path / "broken.pt", state)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for main, flags in ((half_test.main, []), (profil.main, []), (export.main, ["--out", str(tmp_path / "a.onnx")]),
                        (predict.main, [str(tmp_path / "a.png")])):
        with pytest.raises(ValueError, match="2 of 840 values of linear3.weight are NaN or infinite"):
            main([*flags, "--checkpoint", str(tmp_path / "broken.pt")])
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_export_is_not_compared_on_logits_that_are_not_finite(value):
    def give(images):
        return torch.tensor([[0.0, value]])
    with pytest.raises(ValueError, match="logits that are NaN or infinite"):
        export.compare(give, give, [(torch.ones(1, 1, 32, 32), None)])


def test_the_accuracy_counts_where_the_packed_size_cannot_be_known(tmp_path, capsys, monkeypatch):
    train.main([*SMALL, "--epochs", "1", "--model", "lenet5", "--mixing", "none", "--weights", "lsq", "--out",
                str(tmp_path / "run")])
    capsys.readouterr()

    def refuse(*arguments):
        raise ValueError("conv1: its sums may reach 4,770,000,000")
    monkeypatch.setattr(half_test.integer_inference, "packed_bytes", refuse)
    half_test.main(["--checkpoint", str(tmp_path / "run"), "--json"])
    told = capsys.readouterr()
    assert "accuracy" in json.loads(told.out) and "its sums may reach" in told.err


def test_the_size_of_the_file_that_was_tested_is_told(runs, tmp_path, capsys):
    export.main(["--checkpoint", str(runs / "seed0"), "--out", str(tmp_path / "a.int8.pt.gz"), "--no-compare"])
    capsys.readouterr()
    half_test.main(["--checkpoint", str(tmp_path / "a.int8.pt.gz"), "--json"])
    assert json.loads(capsys.readouterr().out)["bytes"]["file"] == os.path.getsize(tmp_path / "a.int8.pt.gz")


def test_deployment_tests_a_folder_s_network_as_it_was_trained(tmp_path, monkeypatch):
    folder, random = tmp_path / "own", np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for name, level in (("dark", 60), ("light", 90)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(level + random.normal(0, 5, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    train.main(["--dataset", str(folder), "--epochs", "20", "--model", "lenet5-student", "--mixing", "none",
                "--compile", "off", "--batch-size", "4", "--device", "cpu", "--lr", "0.02", "--out",
                str(tmp_path / "run")])
    for number in range(60):
        Image.new("RGB", (32, 32), "white").save(folder / "train" / "light" / f"white{number}.png")
    found = {}
    monkeypatch.setattr(deployment, "forms_of", lambda source: ["PyTorch"])
    monkeypatch.setattr(deployment, "time_form", lambda *given: {})
    monkeypatch.setattr(deployment, "compare", lambda rows, size: found.update(rows=rows))
    monkeypatch.setattr(deployment, "markdown_of", lambda rows: "")
    monkeypatch.setattr(deployment, "print_row", lambda row: None)
    monkeypatch.setattr(deployment, "FORMS", {"PyTorch": ".pt"})
    monkeypatch.setattr(deployment, "write_form", lambda source, path, data: shutil.copy(source, path))
    monkeypatch.setattr(deployment, "open_form", lambda form, path: networks.load_network(path)[0])
    monkeypatch.setattr(deployment, "alone", lambda function, *given: function(*given))
    monkeypatch.setattr(deployment, "call", lambda command: json.dumps({"parameters": 1, "nonzero": 1, "macs": 1}))
    deployment.main([str(tmp_path / "run"), "--repeats", "1", "--seconds", "0.05"])
    model, state = networks.load_network(tmp_path / "run" / "model.pt")
    name, kind = networks.data_of(tmp_path / "run", state)
    data = cifar10.load(name, "data", kind.classes)
    right = half_test.test_network(model, data, kind, "float", torch.device("cpu"))["accuracy"]
    assert found["rows"][-1]["accuracy"] == pytest.approx(right) and right > 90


def test_checkpoints_of_deployment_are_found_as_others_are(own):
    shutil.copytree(own / "seed0", own / "lr=0.1")
    assert deployment.named(str(own / "seed0")) == ("seed0", own / "seed0" / "model.pt")
    assert deployment.named(str(own / "lr=0.1" / "model.pt")) == ("lr=0.1", own / "lr=0.1" / "model.pt")
    assert deployment.named(f"small={own / 'seed0'}") == ("small", own / "seed0" / "model.pt")


# ---- files of others

def test_a_data_file_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    (tmp_path / "digits.npz").mkdir()
    with pytest.raises(ValueError, match="digits.npz cannot be read: Is a directory") as problem:
        cifar10.load("digits", tmp_path)
    assert "delete" not in str(problem.value)


@pytest.mark.parametrize("form, size", [(10, "n"), (1, 4)])      # of half precision; of four images
def test_an_onnx_file_of_another_input_is_refused(tmp_path, form, size):
    from onnx import TensorProto, helper, save
    images = helper.make_tensor_value_info("x", form, [size, 1, 8, 8])
    logits = helper.make_tensor_value_info("y", form, [size, 64])
    node = helper.make_node("Flatten", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [images], [logits])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"predict.py gives it tensor\(float\), one image at a time"):
        onnx_files.open_network(tmp_path / "a.onnx")
    assert TensorProto.FLOAT == 1 and TensorProto.FLOAT16 == 10


def test_safetensors_without_metadata_are_told(tmp_path):
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="damaged|structure in the metadata"):
        networks.load_network(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", ["{}", '{"ours": [{}]}', '{"ours": 3}', '{"ours": null}'])
def test_an_overview_of_another_form_is_told(tmp_path, content):
    (tmp_path / "overview.json").write_text(content)
    with pytest.raises(ValueError, match="does not hold the rows that this script writes"):
        overview.main(["--draw", "--out", str(tmp_path)])


def test_a_benchmark_takes_no_endless_seconds():
    with pytest.raises(ValueError, match="--seconds above 0 and below 3600"):
        inference.main(["--seconds", "inf"])


@pytest.mark.parametrize("stored", [torch.ones(2), {"shape": torch.ones(2)}, {"shape": [torch.ones(3)] * 3}])
def test_a_kind_that_holds_tensors_is_refused(stored):
    whole = {"shape": [8, 8, 1], "counts": [1, 1], "mean": [0.5], "std": [0.2], "classes": ["a"], "flip": True}
    with pytest.raises(ValueError, match="does not say of its data set"):
        cifar10.from_plain("a", stored if isinstance(stored, torch.Tensor) else {**whole, **stored})


def test_a_network_that_takes_no_such_images_is_not_profiled():
    with pytest.raises(ValueError, match="cifar-quick cannot train on batches of 2 images of 1x28x28"):
        profil.main(["--model", "cifar-quick", "--dataset", "mnist"])


# ---- folders of pictures

def test_a_link_that_leads_back_is_followed_once(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "inner" / "b.png")
    assert [path.name for path in pictures.files_in(tmp_path)] == ["a.png", "b.png"]


def test_what_is_only_named_like_a_picture_is_left_out(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"AppleDouble")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in predict.find_pictures(tmp_path)] == ["a.png"]
    assert [path.name for path in pictures.files_in(tmp_path)] == ["a.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is no picture that can be read: it is no file"):
        pictures.read_picture(tmp_path / "a.png", (8, 8, 3))
