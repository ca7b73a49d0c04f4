"""A study: its file is checked, its runs are made once, and its table is what the runs hold."""
import contextlib
import io
import json
import os
import shlex
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import ROOT

import experiment
import export
import networks
import profil
import study
import test as half_test
import train
import train_pruning
from engine import checkpoint, shrinking

SHORT = "--dataset digits --limit 32 --batch-size 16 --device cpu --compile off --epochs 1"


def study_file(folder, **changes):
    """A study of two arms, written to a file."""
    path = folder / "small.json"
    path.write_text(json.dumps({"flags": SHORT, "seeds": [0, 1], "arms": [
        {"group": "mixing", "name": "none (all)", "run": "train.py --mixing none"},
        {"group": "pruning", "name": "one shot", "run": "train_pruning.py --epochs 1 1 --sparsity 0.9"}], **changes}))
    return path


MAINS = {"train.py": train.main, "train_pruning.py": train_pruning.main, "export.py": export.main,
         "test.py": half_test.main, "profil.py": profil.main}


def call_here(command, show=False):
    """`study.call` without a process of its own: imports cost more than these runs."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        MAINS[command[0]](command[1:])
    return printed.getvalue()


def test_a_run_is_trained_exported_and_tested_in_processes_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = study_file(tmp_path, seeds=[3], arms=[{"group": "g", "name": "a", "run": "train.py --mixing none",
                                                  "keep": {"history.csv": "epochs.csv"}}])
    study.main([str(path)])
    (row,) = pd.read_csv("results/small/runs.csv").to_dict("records")
    assert Path("results/small/epochs.csv").read_bytes() == Path("runs/small-a-s3/history.csv").read_bytes()
    assert row["seed"] == 3 and row["test_images"] == 360
    with pytest.raises(RuntimeError, match="python train.py --groups 3 failed with exit code 2"):
        study.call(["train.py", "--groups", "3"])


def test_of_few_bits_the_packed_file_is_tested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    few = "train.py --mixing none --model lenet5 --weights lsq --weight-bits 2 --activation-bits 4"
    study.main([str(study_file(tmp_path, seeds=[0], arms=[{"group": "g", "name": "few", "run": few}]))])
    (row,) = pd.read_csv("results/small/runs.csv").to_dict("records")
    packed = Path("runs/small-few-s0/exported.packed.gz")
    assert row["bytes"] == packed.stat().st_size < 62_000 / 2 and "integers computed exactly" in row["precision"]
    whole = json.loads(call_here(["profil.py", "--checkpoint", str(packed), "--json"]))
    assert row["score_course"] == pytest.approx(whole["score_course"]) and row["nonzero"] == whole["nonzero"]
    floats = json.loads(call_here(["profil.py", "--model", "lenet5", "--dataset", "digits", "--json"]))
    assert row["macs"] == floats["macs"] and row["score_course"] < 0.5 * floats["score_course"]


def test_a_stopped_study_goes_on_and_its_table_holds_the_means(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, calls = study_file(tmp_path), []

    def call(command, show=False):
        calls.append(command[0])
        if calls.count("train.py") == 2 and command[0] == "train.py":
            Path(command[-1]).mkdir()
            (Path(command[-1]) / "config.json").write_text("{}")
            raise RuntimeError("killed in its first epoch")
        return call_here(command, show)
    monkeypatch.setattr(study, "call", call)
    with pytest.raises(RuntimeError, match="1 of 4 runs failed.*none .all., seed 1: killed in its first epoch"):
        study.main([str(path)])
    table = pd.read_csv("results/small/table.csv")
    assert table["n"].tolist() == [1, 2] and table["failed"][0] == "seed 1: killed in its first epoch"
    text = Path("results/small/table.md").read_text()
    assert "| none (all) (failed) | 1 |" in text and "Failed: none (all), seed 1: killed" in text
    assert not Path("runs/small-none-all-s1/finished").exists()
    calls.clear()
    study.main([str(path)])
    assert calls == ["train.py", "export.py", "test.py", "profil.py"]
    runs, table = pd.read_csv("results/small/runs.csv"), pd.read_csv("results/small/table.csv")
    assert runs["arm"].tolist() == ["none (all)", "one shot"] * 2 and runs["seed"].tolist() == [0, 0, 1, 1]
    for row in table.to_dict("records"):
        of_arm = runs[runs["arm"] == row["arm"]]
        assert row["n"] == 2 and row["test_accuracy"] == pytest.approx(of_arm["test_accuracy"].mean(), rel=1e-4)
        low, high = scipy.stats.ttest_1samp(of_arm["test_accuracy"], 0).confidence_interval(0.95)
        assert [row["test_accuracy_low"], row["test_accuracy_high"]] == pytest.approx([low, high], rel=1e-4)
        assert row["validation_accuracy_sd"] == pytest.approx(of_arm["validation_accuracy"].std(), rel=1e-4)
    for row in runs.to_dict("records"):
        folder = study.folder_of("small", {"name": row["arm"]}, row["seed"])
        assert row["bytes"] == (folder / "exported.pt.gz").stat().st_size and row["test_images"] == 360
        assert row["validation_accuracy"] == pd.read_csv(folder / "history.csv")["validation_accuracy"].iloc[-1]
    assert runs["sparsity"].tolist() == pytest.approx([0, 0.9] * 2, abs=1e-3)
    assert runs["parameters_at_first"].tolist() == runs["parameters"].tolist()       # zeros stay where they are
    whole, pruned = table.to_dict("records")
    assert whole["parameters_fewer"] == whole["macs_fewer"] == pruned["macs_fewer"] == 0 and whole["times_faster"] == 1
    assert pruned["parameters_fewer"] == pytest.approx(100 * (1 - pruned["nonzero"] / whole["nonzero"]), rel=1e-6)
    assert Path("results/small/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| mixing | none (all) | 2 |" in capsys.readouterr().out


def test_finished_makes_a_table_of_what_is_there_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    path = study_file(tmp_path, seeds=[0])
    with pytest.raises(FileNotFoundError, match="no run of small is finished"):
        study.main([str(path), "--finished"])
    arm = {"group": "mixing", "name": "none (all)", "run": "train.py --mixing none"}
    study.train_arm(arm, SHORT, 0, study.folder_of("small", arm, 0))
    study.main([str(path), "--finished", "--out", "elsewhere"])
    table = pd.read_csv("elsewhere/table.csv")
    assert table["arm"].tolist() == ["none (all)"] and table["validation_accuracy_sd"].isna().all()


def test_arms_alone_are_trained_and_others_that_are_finished_stay_in_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    path = str(study_file(tmp_path))
    with pytest.raises(ValueError, match="--arms: .*small.json has no arm 'two'; it has 'none .all.', 'one shot'"):
        study.main([path, "--arms", "two"])
    study.main([path, "--arms", "none (all)", "--seeds", "1"])
    assert [folder.name for folder in Path("runs").iterdir()] == ["small-none-all-s1"]
    study.main([path, "--arms", "one shot", "--seeds", "1"])
    assert pd.read_csv("results/small/runs.csv")["arm"].tolist() == ["none (all)", "one shot"]
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.parametrize("content, message", [
    ([], "it holds a list"), ({"test_accuracy": "90"}, "'test_accuracy' must be a number, not '90'"),
    ({"bytes": [3]}, "'bytes' must be a number"), ({"macs": True}, "'macs' must be a number")])
def test_kept_measurements_of_another_shape_are_named(content, message, tmp_path):
    (tmp_path / "model.pt").touch()
    (tmp_path / "exported.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"exported.json is damaged: .*{message}"):
        study.kept_of(tmp_path / "exported.json", tmp_path / "model.pt")


@pytest.mark.parametrize("changes", [{"depth": 3}, {"num_classes": "10"}, {"num_classes": -1}, {"name": "resnet21"}])
def test_an_architecture_that_cannot_be_built_is_one_line(changes):
    architecture = {"name": "resnet20", "num_classes": 10, "in_channels": 3}
    assert study.parameters_of(architecture) > 200_000
    with pytest.raises(ValueError, match="config.json is damaged, .*cannot be built"):
        study.parameters_of({**architecture, **changes})


def row(arm, against, seed, **numbers):
    """A row of runs.csv, of an arm that nothing was measured of but what is given."""
    names = ["validation_accuracy", "test_accuracy", "parameters", "nonzero", "sparsity", "macs", "bytes",
             "score_course", "minutes", "images_per_second", "test_seconds", "epochs_faster"]
    return {"group": "g", "arm": arm, "against": against, "seed": seed, **dict.fromkeys(names, 1.0), **numbers}


LENET = "train.py --mixing none --model lenet5"


def test_one_bad_arm_ends_no_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    path = study_file(tmp_path, seeds=[0], arms=[
        {"group": "g", "name": "diverges", "run": f"{LENET} --lr 1e12"},
        {"group": "g", "name": "on from it", "run": f"{LENET} --start runs/small-diverges-s0/model.pt"},
        {"group": "g", "name": "keeps nothing", "run": LENET, "keep": {"cycle.png": "c.png", "history.csv": "h.csv"}},
        {"group": "g", "name": "good", "run": LENET}])
    with pytest.raises(RuntimeError, match="3 of 4 runs failed, results/small/table.md marks them; the first is diver"):
        study.main([str(path)])
    runs = pd.read_csv("results/small/runs.csv").set_index("arm")
    assert runs["validation_accuracy"].notna().to_dict() == {"diverges": False, "on from it": False,
                                                             "keeps nothing": True, "good": True}
    assert "finite" in runs["failed"]["diverges"]
    assert "runs/small-diverges-s0/model.pt" in runs["failed"]["on from it"]
    assert runs["failed"]["keeps nothing"] == "runs/small-keeps-nothing-s0 has no cycle.png to keep"
    assert Path("results/small/h.csv").read_bytes() == Path("runs/small-keeps-nothing-s0/history.csv").read_bytes()
    table = pd.read_csv("results/small/table.csv").set_index("arm")
    assert table["n"].to_dict() == {"diverges": 0, "on from it": 0, "keeps nothing": 1, "good": 1}
    text = Path("results/small/table.md").read_text()
    assert "| g | diverges (failed) | 0 | - | - | - |" in text and "| g | good | 1 |" in text
    assert "\nFailed: keeps nothing, seed 0: runs/small-keeps-nothing-s0 has no cycle.png to keep.\n" in text
    assert Path("results/small/accuracy.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert captured.err.count("note: ") == 3 and text in captured.out


def test_a_study_of_which_nothing_succeeds_still_has_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    with pytest.raises(RuntimeError, match="1 of 1 runs failed"):
        study.main([str(study_file(tmp_path, seeds=[0], arms=[
            {"group": "g", "name": "diverges", "run": f"{LENET} --lr 1e12"}]))])
    assert "| g | diverges (failed) | 0 |" in Path("results/small/table.md").read_text()


def test_what_was_measured_holds_for_the_model_it_was_measured_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def call(command, show=False):
        calls.append(command[0])
        return call_here(command, show)
    monkeypatch.setattr(study, "call", call)
    path = study_file(tmp_path, seeds=[0], arms=[{"group": "g", "name": "a", "run": LENET}])
    study.main([str(path)])
    folder = Path("runs/small-a-s0")
    measured, first = folder / "exported.json", pd.read_csv("results/small/runs.csv")
    calls.clear()
    study.main([str(path)])
    assert calls == [] and pd.read_csv("results/small/runs.csv").equals(first)
    state = checkpoint.read(folder / "model.pt")
    state["weights"]["conv1.weight"][0] = 0                  # 75 weights of the first filter
    checkpoint.save(folder / "model.pt", state)
    os.utime(folder / "model.pt", (1, 1))                    # content counts, not the clock
    study.main([str(path)])
    assert calls == ["export.py", "test.py", "profil.py"]
    assert (first["nonzero"] - pd.read_csv("results/small/runs.csv")["nonzero"]).item() == 75
    old = json.loads(measured.read_text())
    del old["sha256"]                                        # as an older version wrote it
    measured.write_text(json.dumps(old))
    for moment, expected in ((1, []), (2**33, ["export.py", "test.py", "profil.py"])):
        os.utime(folder / "model.pt", (moment, moment))
        calls.clear()
        study.main([str(path)])
        assert calls == expected


def test_operations_are_those_of_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    path = study_file(tmp_path, seeds=[0], arms=[{"group": "g", "name": name, "run": LENET} for name in "ab"])
    study.main([str(path)])
    history = pd.read_csv("runs/small-a-s0/history.csv")
    pd.concat([history, history]).assign(pflop=[0.125, 0.25]).to_csv("runs/small-a-s0/history.csv", index=False)
    history.drop(columns="pflop", errors="ignore").to_csv("runs/small-b-s0/history.csv", index=False)
    study.main([str(path)])
    assert pd.read_csv("results/small/runs.csv")["pflop"].fillna(-1).tolist() == [0.25, -1]
    assert pd.read_csv("results/small/table.csv")["pflop"].fillna(-1).tolist() == [0.25, -1]
    header, _, one, other = Path("results/small/table.md").read_text().splitlines()
    place = header.split(" | ").index("PFLOP")
    assert [line.split(" | ")[place] for line in (one, other)] == ["0.25", "-"]


def test_an_arm_is_compared_with_the_one_it_names():
    runs = pd.DataFrame([row("big", "big", 0, nonzero=1000, macs=800, test_seconds=6.0),
                         row("small", "big", 0, nonzero=100, macs=200, test_seconds=1.0),
                         row("small", "big", 1, nonzero=300, macs=200, test_seconds=2.0),
                         row("other", "alone", 0)])
    table = study.table_of(runs)
    assert table["n"].tolist() == [1, 2, 1]
    small = table.set_index("arm").loc["small"]
    assert small["parameters_fewer"] == pytest.approx(80) and small["macs_fewer"] == pytest.approx(75)
    assert small["times_faster"] == pytest.approx(4)
    text = study.markdown_of(table)
    assert "| g | small | 2 | 1.00 ± 0.00 | 1.00 ± 0.00 (95 %: 1.00 to 1.00) | 200 | 80.0 % | 200 | 75.0 % | 1" in text
    assert text.splitlines()[-1].endswith("| 1.00 |  | 1.00 |")      # against one that has not run


@pytest.mark.parametrize("value, text", [(-0.0002, "0.0 %"), (-0.0, "0.0 %"), (-0.06, "-0.1 %"), (80.0, "80.0 %"),
                                         (-10.0, "-10.0 %"), (float("nan"), "none")])
def test_what_rounds_to_zero_has_no_sign(value, text):
    assert study.shown(value, "{:.1f} %", "none") == text


def test_epochs_get_faster_where_channels_leave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "measure_arm", lambda folder, data: {})
    folder = tmp_path / "run"
    folder.mkdir()
    architecture = {"name": "lenet5", "num_classes": 10, "in_channels": 1, "size": 28, "activation": "relu",
                    "pooling": "max"}
    (folder / "config.json").write_text(json.dumps({"settings": {
        "limit": None, "dataset": "mnist", "mixing": "none", "recipe": "ours", "seed": 0, "sparsity": []},
        "device": "cpu", "started": "now",
                                                    "versions": {"torch": "2"}, "architecture": architecture}))
    model = networks.build(**architecture)
    space = model.channels()[-1]
    shrinking.remove(model, space, torch.arange(40))         # of 84: 44 x 121 weights and biases, 44 x 10 leave
    checkpoint.save(folder / "model.pt", checkpoint.network_of(model, architecture))
    pd.DataFrame({"round": 1, "seconds": 30.0, "images_per_second": [5, 100, 110, 90, 100, 300, 320, 310],
                  "validation_accuracy": [1.0, 2, 3, 4, 5, 6, 7, 8], "validation_loss": 1.0, "train_accuracy": 1.0,
                  "parameters": [61_706] * 4 + [55_942] * 3 + [50_000]}).to_csv(folder / "history.csv")
    found = study.row_of({"group": "g", "name": "a", "against": "a", "run": "train.py"}, 0, folder, "data")
    assert found["epochs_faster"] == 3.1 and found["minutes"] == 4 and found["parameters_at_first"] == 61_706
    assert found["validation_accuracy"] == 7                 # the last row is of a network that was refused


@pytest.mark.parametrize("count, settings, expected", [
    (8, {}, 2.0), (7, {"resize": None}, 2.0), (6, {}, None), (4, {}, None), (1, {}, None), (8, {"resize": 20}, None)])
def test_the_speed_of_epochs_is_compared_where_they_do_the_same_work(count, settings, expected):
    speed = pd.Series([5.0, 100, 100, 100, *[200.0] * 4][:count])
    assert study.epochs_faster(speed, settings) == expected


def factor_study(folder):
    path = folder / "factors.json"
    path.write_text(json.dumps({"flags": SHORT, "seeds": [0], "run": "train.py --mixing none --model lenet5",
                                "factors": {"epochs": {"flag": "--epochs", "values": [1, 2]},
                                            "rate": {"flag": "--lr", "values": [0.01, 0.03]}}}))
    return path


def test_factors_make_an_arm_of_every_combination_and_their_influence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    study.main([str(factor_study(tmp_path))])
    runs = pd.read_csv("results/factors/runs.csv")
    assert runs[["factor_epochs", "factor_rate"]].to_numpy().tolist() == [[1, 0.01], [1, 0.03], [2, 0.01], [2, 0.03]]
    assert pd.read_csv("results/factors/influence.csv")["term"].tolist() == ["mean", "epochs", "rate", "epochs x rate"]
    assert Path("results/factors/influence.png").read_bytes().startswith(b"\x89PNG")


def test_influence_is_what_made_the_numbers():
    import itertools
    values = list(itertools.product([2, 4, 10], [0.1, 0.5], [1, 3]))
    runs = pd.DataFrame(values, columns=["factor_E", "factor_P", "factor_I"])
    e, p, i = ((runs[name] - (runs[name].max() + runs[name].min()) / 2) / ((runs[name].max() - runs[name].min()) / 2)
               for name in runs)
    runs["f"] = 7 + 2 * e - 3 * p + 0.5 * i + 4 * e * p - 1.5 * e * p * i
    found = study.influence_of(runs, ["E", "P", "I"], "f")
    assert found == pytest.approx({"mean": 7, "E": 2, "P": -3, "I": 0.5, "E x P": 4, "E x I": 0, "P x I": 0,
                                   "E x P x I": -1.5}, abs=1e-9)


@pytest.mark.parametrize("changes, message", [
    ({"factors": {"a": {"flag": "--lr", "values": [1]}}, "run": "train.py"}, "'a' a flag and two values"),
    ({"flags": 3}, "'flags' must be a str"), ({"arms": []}, "'arms' must be a list that is not empty"),
    ({"arms": [{"name": "a", "run": "train.py"}]}, "arm 0 must have a group"),
    ({"arms": [{"group": "g", "name": "a", "run": "rm -rf x"}]}, "arm 'a' must run train.py or train_pruning.py"),
    ({"arms": [{"group": "g", "name": "a", "run": "train.py"}] * 2}, "two arms are called 'a'"),
    ({"arms": [{"group": "g", "name": "a", "run": "train.py", "against": "b"}]}, "against 'b', which is no arm")])
def test_a_study_of_another_form_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        study.read_study(study_file(tmp_path, **changes))
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ValueError, match="no.json is no JSON"):
        study.read_study(tmp_path / "no.json")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.json")), ids=lambda path: path.stem)
def test_runs_of_shipped_studies_are_accepted_by_their_scripts(path, tmp_path, monkeypatch):
    class Accepted(Exception):
        pass

    def prepare(settings, state, forced=False):
        raise Accepted
    monkeypatch.chdir(ROOT)         # settings are named from there
    monkeypatch.setattr(experiment, "prepare", prepare)
    found = study.read_study(path)
    for arm in found["arms"]:
        script, *own = shlex.split(arm["run"])
        with pytest.raises(Accepted):
            MAINS[script]([*shlex.split(found["flags"]), *own])


@pytest.mark.parametrize("name", ["a", "batch 512, averaging 0.98, momentum of Muon 0.6, biases x 5"])
def test_points_title_and_groups_have_room_in_the_plot_whatever_arms_are_called(name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study.files, "save_figure", lambda path, figure: drawn.append(figure))
    rows = [{"group": f"a group of a long name {place}", "arm": f"{name} {place}", "validation_accuracy": 90 + place,
             "validation_accuracy_sd": float("nan")} for place in range(9)]
    study.draw_accuracy(tmp_path / "a.png", pd.DataFrame(rows), "What a choice is worth for a dense network, by arm")
    figure, = drawn
    figure.canvas.draw()
    assert figure.axes[0].get_window_extent().width > 3 * figure.dpi
    for part in (figure._suptitle, figure.legends[0]):
        extent = part.get_window_extent()
        assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1 and extent.y0 >= 0 and extent.y1 <= figure.bbox.y1


@pytest.mark.parametrize(("accuracies", "width"), [([91.98, 92.0], 1.0), ([91.5, 92.0], 1.0), ([88.0, 92.0], 4.8)])
def test_a_plot_is_a_point_wide_so_that_noise_looks_like_noise(accuracies, width, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study.files, "save_figure", lambda path, figure: drawn.append(figure))
    rows = [{"group": "a", "arm": f"{value} %", "validation_accuracy": value, "validation_accuracy_sd": float("nan")}
            for value in accuracies]
    study.draw_accuracy(tmp_path / "a.png", pd.DataFrame(rows), "Two runs")
    low, high = drawn[0].axes[0].get_xlim()
    assert high - low == pytest.approx(width) and low < min(accuracies) and high > max(accuracies)
