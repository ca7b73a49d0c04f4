import json
import shutil

import pandas as pd
import pytest

import profil
import report
import test as half_test
from engine import files, run_plots


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
    (other / "config.json").write_text(json.dumps({**config, "started": "another day"}))
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


def keep_figures(monkeypatch, drawn):
    """Put every figure that is saved into a list, too."""
    save = files.save_figure
    monkeypatch.setattr(files, "save_figure", lambda path, figure: (drawn.append(figure), save(path, figure)))


def test_names_of_near_points_do_not_overlap(tmp_path, monkeypatch):
    drawn = []
    keep_figures(monkeypatch, drawn)
    table = pd.DataFrame({"dataset": "cifar10", "network": "n", "epochs": ["1", "2", "3"], "distilled": False,
                          "continued": [False, False, True], "nonzero": 135_748.0,
                          "test_accuracy": [90.46, 90.6, 90.5]})
    run_plots.draw_accuracy_size(tmp_path / "size.png", table)
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


def edit(folder, history=None, **settings):
    """The run in a folder with other settings, or with a history that a function makes of its own."""
    config = json.loads((folder / "config.json").read_text())
    config["settings"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    if history is not None:
        history(pd.read_csv(folder / "history.csv")).to_csv(folder / "history.csv", index=False)
    return folder


def test_a_run_and_its_copy_count_once(reported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(reported[0], "runs/a")
    other = shutil.copytree(reported[1], "runs/b")
    (tmp_path / "link").symlink_to(run)
    report.main([run, other, run, "--out", "results"])
    once = pd.read_csv("results/table.csv")
    assert once["n"].tolist() == [2]
    for named in ([run, run, other], [run, other, "runs/../runs/b"], [run, "link", other],
                  [run, other, "results/a", "results/b"], report.find_runs()):
        capsys.readouterr()
        runs = report.distinct([report.read_run(folder) for folder in named])
        assert [str(each["folder"]) for each in runs] == [run, other]
        assert capsys.readouterr().err.count("hold one run; it counts once") == len(named) - 2


def test_two_runs_of_one_name_are_refused_and_no_copy_is_overwritten(reported, tmp_path):
    one = shutil.copytree(reported[0], tmp_path / "x" / "same")
    other = edit(shutil.copytree(reported[0], tmp_path / "y" / "same"), slower)
    with pytest.raises(ValueError, match="x/same and .*y/same are different runs of one name"):
        report.main([str(one), str(other), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    report.main([str(one), "--out", str(tmp_path / "out")])
    before = (tmp_path / "out/same/config.json").read_bytes()
    with pytest.raises(ValueError, match="out/same holds a copy of another run than .*y/same"):
        report.main([str(other), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/same/config.json").read_bytes() == before


def slower(history):
    """Of another run: its epochs took longer."""
    return history.assign(seconds=history["seconds"] + 1)


def test_a_run_that_went_on_with_other_settings_is_still_the_run_that_its_copy_is_of(reported, tmp_path, capsys):
    run = shutil.copytree(reported[0], tmp_path / "runs" / "a")
    report.main([str(run), "--out", str(tmp_path / "out")])
    edit(run, lambda history: pd.concat([history, history.tail(1)]), epochs=[1, 1, 2], lr=0.01, device="cpu")
    report.main([str(tmp_path / "out" / "a"), str(run), "--out", str(tmp_path / "out")])
    table = pd.read_csv(tmp_path / "out/table.csv")
    assert table["n"].tolist() == [1] and "lr 0.01" in table["other_settings"][0]
    assert "hold one run; it counts once" in capsys.readouterr().err


def test_no_run_is_lost_where_a_longer_copy_has_the_name_of_another_run(reported, tmp_path):
    short = shutil.copytree(reported[0], tmp_path / "x" / "a")
    other = edit(shutil.copytree(reported[0], tmp_path / "y" / "b"), slower)
    longer = edit(shutil.copytree(reported[0], tmp_path / "z" / "b"),
                  lambda history: pd.concat([history, history.tail(1)]))
    with pytest.raises(ValueError, match="y/b and .*z/b are different runs of one name"):
        report.main([str(short), str(other), str(longer), "--out", str(tmp_path / "out")])


def test_a_run_that_went_on_is_kept_in_its_later_state(reported, tmp_path):
    run = shutil.copytree(reported[0], tmp_path / "runs" / "a")
    report.main([str(run), "--out", str(tmp_path / "out")])
    edit(run, lambda history: pd.concat([history, history.tail(1)]), epochs=[1, 1, 2])
    report.main([str(tmp_path / "out" / "a"), str(run), "--out", str(tmp_path / "out")])
    assert pd.read_csv(tmp_path / "out/table.csv")["epochs"].tolist() == ["1+1+2"]
    assert (tmp_path / "out/a/history.csv").read_bytes() == (run / "history.csv").read_bytes()


def test_runs_in_a_read_only_folder_are_reported(reported, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(reported[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    for name in ("curves.png", "layers.png"):
        (run / f"{name}.partial").mkdir()                    # nothing can be written there
    report.main([str(run), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert "| run | digits |" in captured.out and captured.err.count("note: ") == 2
    for name in ("curves.png", "layers.png"):
        assert (tmp_path / "out" / "run" / name).read_bytes().startswith(b"\x89PNG") and not (run / name).exists()


def test_the_table_is_printed_where_the_disk_is_full(reported, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("accuracy_size.png", "accuracy_time.png"):
        (out / f"{name}.partial").symlink_to("/dev/full")
    report.main([str(reported[0]), "--out", str(out)])
    captured = capsys.readouterr()
    assert "| seed0 |" in captured.out and captured.err.count("No space left on device") == 2
    assert not list(out.glob("accuracy_[st]*")) and (out / "table.md").exists()
    (out / "table.md.partial").symlink_to("/dev/full")
    before = (out / "table.md").read_text()
    with pytest.raises(RuntimeError, match="the previous table.md is intact"):
        report.main([str(reported[1]), "--out", str(out)])
    assert "| seed1 |" in capsys.readouterr().out and (out / "table.md").read_text() == before


def test_operations_are_shown_and_drawn_where_they_were_counted(reported, tmp_path, monkeypatch):
    counted = edit(shutil.copytree(reported[0], tmp_path / "counted"), lambda history: history.assign(
        pflop=[0.5 * (1 + place) for place in range(len(history))]), lr=0.01)
    plain = edit(shutil.copytree(reported[1], tmp_path / "plain"),
                 lambda history: history.drop(columns="pflop", errors="ignore"))
    drawn = []
    keep_figures(monkeypatch, drawn)
    report.main([str(counted), str(plain), "--out", str(tmp_path / "out")])
    assert pd.read_csv(tmp_path / "out/table.csv")["pflop"].fillna(-1).tolist() == [1.5, -1]
    header, _, one, other = (tmp_path / "out/table.md").read_text().splitlines()
    place = header.split(" | ").index("PFLOP")
    assert [line.split(" | ")[place] for line in (one, other)] == ["1.5", "-"]
    assert (tmp_path / "out/accuracy_operations.png").read_bytes().startswith(b"\x89PNG")
    axes = drawn[-1].axes[0]
    (line,) = axes.lines
    assert line.get_label() == "counted" and line.get_xdata().tolist() == [0.5, 1.0, 1.5]
    assert axes.get_xscale() == "log" and line.get_ydata().tolist() == pd.read_csv(
        counted / "history.csv")["validation_accuracy"].tolist()


def test_numbers_of_a_network_that_is_there_no_more_are_left_out(reported, tmp_path, capsys):
    run = shutil.copytree(reported[0], tmp_path / "run")
    assert report.read_run(run)["test_accuracy"] == 90 and report.read_run(run)["nonzero"] > 0
    (run / "model.pt").write_bytes(b"of a later epoch")
    found = report.read_run(run)
    assert found["test_accuracy"] is None and found["nonzero"] is None and found["layers"] is None
    assert capsys.readouterr().err.count("does not hold any more") == 2
    (run / "model.pt").unlink()                              # as in results/
    assert report.read_run(run)["test_accuracy"] == 90


def test_a_copy_does_not_bring_numbers_of_another_network_back(reported, tmp_path):
    run, out = shutil.copytree(reported[0], tmp_path / "run"), tmp_path / "out"
    report.main([str(run), "--out", str(out)])
    assert (out / "run" / "report.json").read_bytes() == (run / "report.json").read_bytes()
    (run / "model.pt").write_bytes(b"of a later epoch")
    report.main([str(run), "--out", str(out)])
    found = report.read_run(out / "run")                     # no model.pt is there to compare with
    assert found["test_accuracy"] is None and found["nonzero"] is None and found["layers"] is None
