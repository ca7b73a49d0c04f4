"""What could be taken for something else: other pictures, settings, classes, epochs or files than those meant."""
import json
import multiprocessing
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sample_runs import SMALL

import cifar10
import filter_pruning
import predict
import profil
import report
import set_pruning_train
import test as half_test
import train
import train_pruning
from benchmarks import check, deployment, inference, profile, training
from engine import checkpoint, files, run_files
from pruning import inner_spaces
from studies import study_file

FEW = shlex.split("--limit 40 --batch-size 20 --epochs 1 --model lenet5 --mixing none --compile off")
QUICK = [*SMALL, "--epochs", "1", "--model", "lenet5", "--mixing", "none"]


def draw_pictures(folder, classes):
    """A data set of 12 pictures to train on and 4 to test on for each class."""
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{name}{number}.png")
    return folder


@pytest.fixture
def mine(tmp_path):
    """A folder of pictures, and a run on it."""
    pictures = draw_pictures(tmp_path / "mine", ("cat", "dog"))
    train.main([*FEW, "--dataset", str(pictures), "--out", str(tmp_path / "run")])
    return pictures, tmp_path / "run"


def put_into_another_class(pictures):
    (pictures / "train" / "cat" / "cat0.png").rename(pictures / "train" / "cat" / "x.png")
    (pictures / "train" / "dog" / "dog0.png").rename(pictures / "train" / "cat" / "cat0.png")
    (pictures / "train" / "cat" / "x.png").rename(pictures / "train" / "dog" / "dog0.png")


def rename(pictures):
    (pictures / "train" / "cat" / "cat0.png").rename(pictures / "train" / "cat" / "z.png")


@pytest.mark.parametrize("change", [put_into_another_class, rename])
def test_pictures_that_changed_places_are_noticed(change, mine):
    pictures, run = mine
    change(pictures)
    with pytest.raises(ValueError, match="mine is not as it was when the run began: other pictures, or the same under"):
        train.main(["--resume", "--out", str(run)])
    train.main(["--resume", "--force", "--epochs", "2", "--out", str(run)])


def test_pictures_that_stayed_are_gone_on_with(mine):
    train.main(["--resume", "--force", "--epochs", "2", "--out", str(mine[1])])
    held = checkpoint.read(mine[1] / "last.pt")
    assert held["pictures"] == cifar10.sha256_of(cifar10.load(str(mine[0]))) and held["epoch"] == 2
    checkpoint.save(mine[1] / "last.pt", {**held, "pictures": None})             # of an older run
    rename(mine[0])
    train.main(["--resume", "--out", str(mine[1])])


@pytest.mark.parametrize("flag", ["--teacher", "--start"])
def test_a_network_of_other_classes_is_not_taken_for_one_of_these(flag, mine, tmp_path):
    shutil.rmtree(mine[0])
    draw_pictures(mine[0], ("ant", "bee"))
    flags = [*FEW, "--dataset", str(mine[0]), flag, str(mine[1] / "model.pt"), "--out", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="tells cat, dog apart, and .*mine has ant, bee; --force takes it"):
        train.main(flags)
    train.main([*flags, "--force"])


# ---- settings

@pytest.mark.parametrize("flags, told", [
    ("--model resnet20 --pooling nonsense", "--pooling nonsense: resnet20 has no pooling to choose"),
    ("--model mobilenet --shortcut Q", "--shortcut Q: mobilenet has no shortcut"),
    ("--model resnet18 --activation tanh", "--activation tanh: resnet18 has no activation"),
    ("--model lenet5 --shortcut A", "--shortcut A: lenet5 has no shortcut")])
def test_a_choice_that_the_network_does_not_have_is_refused(flags, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        train.main([*QUICK, *flags.split(), "--out", str(tmp_path / "run")])


def test_a_study_knows_what_its_older_runs_trained_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arm = {"group": "a", "name": "a", "run": "train.py --flips alternating"}
    Path("s.json").write_text(json.dumps({"flags": " ".join(QUICK), "seeds": [0], "arms": [arm]}))
    study, folder = study_file.read_study("s.json"), Path("runs/s-a-s0")
    train.main([*QUICK, "--flips", "alternating", "--out", str(folder)])
    study_file.check_runs("s", study, [0])
    config = json.loads((folder / "config.json").read_text())
    del config["settings"]["flips"]                 # older than that, so it mirrored by a draw
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="flips: random then, alternating now"):
        study_file.check_runs("s", study, [0])


def test_a_cycle_whose_file_has_changed_does_not_go_on_without_a_word(tmp_path):
    given = tmp_path / "cycle.json"
    flags = [*QUICK, "--pruning", "l1_cycle", "--cycle", str(given), "--out", str(tmp_path / "run")]
    given.write_text('{"stop_loss": 100, "finetuning_epochs": 1, "pruning_percent_step": 0.5}')
    train_pruning.main(flags)
    given.write_text('{"stop_loss": 1, "finetuning_epochs": 1, "pruning_percent_step": 0.5}')
    with pytest.raises(ValueError, match="has other settings .cycle_settings: .*'stop_loss': 100.*--force"):
        train_pruning.main([*flags, "--resume"])
    given.unlink()
    train_pruning.main([*flags, "--resume"])


@pytest.mark.parametrize("text", ['{"stop_loss": 0.1, "stop_loss": 5}', '{"layers": ["a"], "layers": ["b"]}'])
def test_json_that_names_a_part_twice_is_refused(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    for read in (filter_pruning.read_given, files.read_json, study_file.read_study):
        with pytest.raises(ValueError, match="'(stop_loss|layers)' stands in it twice"):
            read(path)
    assert files.parse_json('[{"a": 1}, {"a": {"b": 2}, "b": 1}]') == [{"a": 1}, {"a": {"b": 2}, "b": 1}]


def test_one_setting_of_the_cycle_under_two_spellings_is_refused():
    given = {"pruning_standart_deviation_part": 0.1, "pruning_standard_deviation_part": 0.2}
    with pytest.raises(ValueError, match="pruning_standart_deviation_part and pruning_standard_deviation_part are one"):
        filter_pruning.read_given(given)


def test_layers_that_are_excluded_keep_their_channels(resnet):
    model, shape = resnet[0], (3, 32, 32)
    names = {space["name"] for space in inner_spaces(model, exclude=["layer1.0.conv1", "layer2.1.conv2"])}
    assert {space["name"] for space in inner_spaces(model)} - names == {"layer1.0.conv1", "layer2.1.conv1"}
    settings = {"sparsity": [0.5], "macs": 60_000_000, "macs_layers": ["layer1.0.conv1"], "exclude": ["layer1.0.conv1"]}
    with pytest.raises(ValueError, match="'layer1.0.conv1' cannot lose channels by --macs"):
        set_pruning_train.check_narrowing(settings, model, shape)


def test_a_run_leaves_excluded_layers_whole(tmp_path):
    train_pruning.main([*SMALL, "--model", "resnet8-16-32-64", "--epochs", "1", "1", "--sparsity", "0.5", "--mixing",
                        "none", "--macs", "8000000", "--exclude", "layer1.0.conv1", "--out", str(tmp_path / "run")])
    weights = checkpoint.read(tmp_path / "run" / "model.pt")["weights"]
    assert len(weights["layer1.0.conv1.weight"]) == 16 and weights["layer1.0.conv1.weight"].all()


# ---- numbers

@pytest.fixture
def quick(tmp_path):
    """A run of one epoch on digits."""
    train.main([*QUICK, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def overflowing(path):
    """The network in a file with finite weights whose products are not."""
    state = checkpoint.read(path)
    state["weights"] = {name: torch.full_like(tensor, 1e30) for name, tensor in state["weights"].items()}
    checkpoint.save(path, state)


def test_outputs_that_are_not_finite_are_no_prediction(quick, tmp_path, capsys):
    overflowing(quick / "model.pt")
    with pytest.raises(ValueError, match="outputs for [0-9]+ of 360 images are NaN or infinite"):
        half_test.main(["--checkpoint", str(quick / "model.pt"), "--precision", "float"])
    capsys.readouterr()
    Image.new("RGB", (40, 40), (200, 30, 90)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="outputs for .*a.png are NaN or infinite"):
        predict.main([str(tmp_path / "a.png"), "--checkpoint", str(quick / "model.pt"), "--json"])
    told, = capsys.readouterr().out.splitlines()
    assert json.loads(told)["picture"].endswith("a.png") and "error" in json.loads(told)


def test_a_broken_network_is_no_start(quick, tmp_path):
    state = checkpoint.read(quick / "model.pt")
    name = next(iter(state["weights"]))
    state["weights"][name][0, 0, 0, 0] = float("nan")
    checkpoint.save(quick / "model.pt", state)
    with pytest.raises(ValueError, match=f"model.pt holds a broken network: 1 of .* values of {name} are NaN"):
        train.main([*QUICK, "--start", str(quick / "model.pt"), "--out", str(tmp_path / "other")])


def test_numbers_of_an_earlier_epoch_are_left_out(quick, tmp_path, capsys):
    for measure in (half_test, profil):
        measure.main(["--checkpoint", str(quick / "model.pt")])
    assert run_files.outdated(quick) == {}
    kept = (quick / "model.pt").read_bytes()
    train.main(["--resume", "--force", "--epochs", "3", "--out", str(quick)])
    (quick / "model.pt").write_bytes(kept)              # as if it had been stopped before its end
    capsys.readouterr()
    report.main([str(quick), "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    for name in ("test", "profile"):
        assert f"has the {name} of the network after 1 epochs, and the run has 3 by now; it is left out" in told.err
    assert "| - |" in told.out


def test_a_test_of_some_images_leaves_the_picture_of_all(quick):
    half_test.main(["--checkpoint", str(quick / "model.pt")])
    before = (quick / "confusion.png").read_bytes()
    half_test.main(["--checkpoint", str(quick / "model.pt"), "--limit", "5"])
    assert (quick / "confusion.png").read_bytes() == before


# ---- files

def test_a_table_of_layers_does_not_replace_what_a_run_needs(quick):
    with pytest.raises(ValueError, match="--csv .*history.csv is a file of the run"):
        profil.main(["--model", "lenet5", "--csv", str(quick / "history.csv")])


def test_a_cycle_does_not_replace_the_result_of_another_run(quick, tmp_path):
    settings = {"cycle_settings": {"output_model_path": str(quick / "model.pt")}, "start": None, "cycle": None,
                "teacher": None}
    with pytest.raises(ValueError, match="output_model_path of --cycle .*model.pt is a file of the run"):
        filter_pruning.check_files(settings, tmp_path / "other", True)
    filter_pruning.check_files(settings, quick, False)


@pytest.mark.parametrize("benchmark", [check, deployment, inference, profile, training])
@pytest.mark.parametrize("name, told", [("report.json", "is a file of the run"), ("model.pt", "must end in .json"),
                                        ("new.md", "must end in .json")])
def test_a_benchmark_does_not_replace_what_is_needed(benchmark, name, told, quick):
    given = [str(quick / "model.pt")] if benchmark is deployment else []
    before = {path: path.read_bytes() for path in quick.iterdir()}
    with pytest.raises(ValueError, match=told):
        benchmark.main([*given, "--json", str(quick / name)])
    assert {path: path.read_bytes() for path in quick.iterdir()} == before


def test_tables_of_a_study_and_of_runs_do_not_share_a_folder(quick, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text('{"study": "studies/a.json"}')
    with pytest.raises(ValueError, match="study holds the tables of a study; choose another --out"):
        report.main([str(quick), "--out", str(tmp_path / "study")])
    report.main([str(quick), "--out", str(tmp_path / "runs")])
    with pytest.raises(ValueError, match="runs holds the tables of report.py; choose another --out"):
        study_file.check_out(tmp_path / "a.json", tmp_path / "runs")


def test_one_damaged_run_does_not_keep_the_others_from_the_table(quick, tmp_path, capsys):
    shutil.copytree(quick, tmp_path / "bad")
    (tmp_path / "bad" / "history.csv").write_text("round\n")
    with pytest.raises(ValueError, match="^left out: .*bad/history.csv is damaged"):
        report.main([str(tmp_path / "bad"), str(quick), "--out", str(tmp_path / "out")])
    assert "| run |" in capsys.readouterr().out and (tmp_path / "out" / "table.md").read_text().count("\n") == 3
    with pytest.raises(ValueError, match="^.*bad/history.csv is damaged"):
        report.main([str(tmp_path / "bad"), "--out", str(tmp_path / "out")])


def change(held, name, value):
    """The dictionary with a part, "a" or "a.b", of another value, or without it where that is None."""
    first, *rest = name.split(".")
    if rest:
        return {**held, first: change(held[first], ".".join(rest), value)}
    return {key: part for key, part in held.items() if key != first} | ({} if value is None else {first: value})


@pytest.mark.parametrize("name, value", [
    ("settings.lines", None), ("round", None), ("random.generator", None), ("settings", ["a"]), ("history", 3),
    ("history", ["row"]), ("epoch", "1"), ("epoch", True), ("masks", None), ("random", 1), ("settings.epochs", 2)])
def test_a_last_pt_of_another_form_is_one_error(name, value, quick):
    checkpoint.save(quick / "last.pt", change(checkpoint.read(quick / "last.pt"), name, value))
    with pytest.raises(ValueError, match=f"last.pt holds no whole run: '{name}' must be a "):
        train.main(["--resume", "--out", str(quick)])


def test_a_config_of_another_form_is_one_error(quick):
    config = json.loads((quick / "config.json").read_text())
    (quick / "config.json").write_text(json.dumps({**config, "versions": ["x"]}))
    with pytest.raises(ValueError, match="'versions' must be an object"):
        run_files.read_config(quick)
    (quick / "config.json").write_text(json.dumps({**config, "resumed": None}))
    train.main(["--resume", "--force", "--epochs", "2", "--out", str(quick)])
    assert len(json.loads((quick / "config.json").read_text())["resumed"]) == 1


def test_a_network_of_other_than_squares_is_refused(tmp_path):
    from deploy import onnx_files
    asked = SimpleNamespace(type="tensor(float)", shape=["n", 3, 32, 64])
    told = SimpleNamespace(type="tensor(float)", shape=["n", 10])
    session = SimpleNamespace(get_inputs=lambda: [asked], get_outputs=lambda: [told],
                              get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={}))
    with pytest.raises(ValueError, match="takes images of 32 x 64 pixels; predict.py gives it squares"):
        onnx_files.state_of(tmp_path / "a.onnx", session)


def write_often(path, byte):
    """Write a file of one kind of byte again and again; the exit code of the process is 1 where that fails."""
    for _ in range(100):
        files.write(path, byte * 50_000)


def test_two_processes_write_one_file_in_turns(tmp_path):
    writers = [multiprocessing.get_context("spawn").Process(target=write_often, args=(tmp_path / "a", byte))
               for byte in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (tmp_path / "a").read_bytes() in (b"a" * 50_000, b"b" * 50_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
