import json
import shutil

import pandas as pd
import pytest

import profil
import report
import test as half_test


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """Two runs that differ in their seed alone, tested and profiled."""
    half_test.main(["--checkpoint", str(trained / "model.pt")])
    profil.main(["--checkpoint", str(trained / "model.pt")])
    folders = [tmp_path_factory.mktemp("runs") / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        shutil.copytree(trained, folder)
        config = json.loads((folder / "config.json").read_text())
        config["settings"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(config))
        found = json.loads((folder / "report.json").read_text())
        found["test"]["accuracy"] = 90.0 + 2 * seed
        (folder / "report.json").write_text(json.dumps(found))
    return folders


def test_runs_that_differ_in_seed_share_a_row(reported, tmp_path, capsys):
    report.main([*map(str, reported), "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 1 and table["n"][0] == 2
    assert table["test_accuracy"][0] == 91.0 and table["test_sd"][0] == pytest.approx(2**0.5)
    assert "91.00 ± 1.41" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().count("\n") == 3


@pytest.mark.parametrize("setting, value", [("lr", 0.01), ("teacher", "runs/teacher/model.pt"), ("prune_end", 0.9),
                                            ("weight_decay", 2e-4), ("resize", 20), ("layer_bits", ["linear:8:8"])])
def test_another_setting_is_another_row(reported, tmp_path, setting, value):
    other = tmp_path / "other"
    shutil.copytree(reported[0], other)
    config = json.loads((other / "config.json").read_text())
    config["settings"][setting] = value
    (other / "config.json").write_text(json.dumps(config))
    report.main([*map(str, reported), str(other), "--out", str(tmp_path / "out")])
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert sorted(table["n"]) == [1, 2]
    assert f"{setting} " in table["other_settings"][1] and "seed" not in table["other_settings"][1]


def test_seeds_with_a_teacher_each_share_a_row(reported, tmp_path):
    folders = []
    for seed, folder in enumerate(reported):
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        config = json.loads((folder / "config.json").read_text())
        config["settings"]["teacher"] = f"runs/study-dense-s{seed}/model.pt"
        (folders[-1] / "config.json").write_text(json.dumps(config))
    report.main([*map(str, folders), "--out", str(tmp_path / "out")])
    assert list(pd.read_csv(tmp_path / "out" / "table.csv")["n"]) == [2]


def test_plots_are_drawn_and_kept_without_sources(reported, tmp_path):
    report.main([str(reported[0]), "--out", str(tmp_path)])
    kept = tmp_path / "seed0"
    for name in ("curves.png", "layers.png"):
        assert (kept / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "accuracy_size.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((kept / "config.json").read_text())
    assert "source" not in config and "out" not in config["settings"]
    assert pd.read_csv(kept / "history.csv").equals(pd.read_csv(reported[0] / "history.csv"))


def test_names_of_near_points_do_not_overlap(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    table = pd.DataFrame({"dataset": "cifar10", "network": "n", "epochs": ["1", "2", "3"], "distilled": False,
                          "continued": [False, False, True], "nonzero": 135_748.0,
                          "test_accuracy": [90.46, 90.6, 90.5]})
    report.draw_accuracy_size(tmp_path / "size.png", table)
    texts = [text for text in drawn[0].axes[0].texts if " epochs" in text.get_text()]
    assert sorted(text.get_text() for text in texts) == ["n, 1 epochs", "n, 2 epochs", "n, 3 epochs more"]
    names = [text.get_window_extent() for text in texts]
    assert not any(name.overlaps(other) for place, name in enumerate(names) for other in names[:place])


def test_kept_runs_are_reported_again_from_results(reported, tmp_path, monkeypatch):
    report.main([str(reported[0]), "--out", str(tmp_path / "results")])
    before = (tmp_path / "results" / "table.csv").read_text()
    monkeypatch.chdir(tmp_path)
    report.main([])
    assert (tmp_path / "results" / "table.csv").read_text() == before


def test_an_untested_run_has_dashes(trained, tmp_path):
    untested = tmp_path / "untested"
    shutil.copytree(trained, untested, ignore=shutil.ignore_patterns("report.json"))
    report.main([str(untested), "--out", str(tmp_path / "out")])
    assert "| - |" in (tmp_path / "out" / "table.md").read_text()


def test_no_run_and_damaged_files_are_named(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="train first"):
        report.main([])
    with pytest.raises(FileNotFoundError, match="nothing is no run"):
        report.main(["nothing"])
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    (damaged / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        report.main([str(damaged)])


def history_of(accuracies, seconds):
    return pd.DataFrame({"validation_accuracy": accuracies, "seconds": seconds})


def test_the_time_to_an_accuracy_is_that_of_the_first_epoch_that_had_it():
    common = {"network": "n", "recipe": "ours", "device": "cpu", "minutes": 3.0}
    runs = [{"run": "a", "dataset": "cifar10", "history": history_of([50.0, 71.0, 70.0], [60, 60, 60]), **common},
            {"run": "b", "dataset": "cifar10", "history": history_of([40.0, 60.0, 70.0], [600, 600, 600]), **common},
            {"run": "c", "dataset": "digits", "history": history_of([99.0], [6]), **common}]
    times = report.times_of(runs).set_index("run")
    assert times["level"].tolist() == [70.0, 70.0, 99.0]
    assert times["minutes_to_level"].tolist() == [2.0, 30.0, 0.1]
    assert times["epochs_to_level"].tolist() == [2, 3, 1]
    times = report.times_of(runs[:2], [71, 70]).set_index(["run", "level"])
    assert times["minutes_to_level"]["a"].tolist() == [2.0, 2.0] and times["minutes_to_level"]["b", 70] == 30.0
    assert pd.isna(times["minutes_to_level"]["b", 71])


def test_a_run_from_other_weights_has_no_time_of_its_own(reported, tmp_path):
    later = shutil.copytree(reported[1], tmp_path / "later")
    config = json.loads((later / "config.json").read_text())
    config["settings"]["start"] = "runs/seed0/model.pt"
    (later / "config.json").write_text(json.dumps(config))
    for runs, named in (([reported[0], later], ["seed0"]), ([later], [])):
        report.main([*map(str, runs), "--out", str(tmp_path / "out")])
        assert list(pd.read_csv(tmp_path / "out" / "time.csv")["run"]) == named
        assert "start runs/seed0/model.pt" in (tmp_path / "out" / "table.md").read_text()


def test_times_are_written_and_drawn(reported, tmp_path):
    report.main([*map(str, reported), "--out", str(tmp_path), "--level", "0"])
    assert pd.read_csv(tmp_path / "time.csv")["epochs_to_level"].tolist() == [1, 1]
    assert (tmp_path / "accuracy_time.png").read_bytes().startswith(b"\x89PNG")
