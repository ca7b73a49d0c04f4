"""A study: its file is checked, its runs are made once, and its table is what the runs hold."""
import json
from pathlib import Path

import pandas as pd
import pytest

import study

SHORT = "--dataset digits --limit 32 --batch-size 16 --device cpu --compile off --epochs 1"


def study_file(folder, **changes):
    """A study of two arms, written to a file."""
    path = folder / "small.json"
    path.write_text(json.dumps({"flags": SHORT, "seeds": [0, 1], "arms": [
        {"group": "mixing", "name": "none (all)", "run": "train.py --mixing none"},
        {"group": "pruning", "name": "one shot", "run": "train_pruning.py --epochs 1 1 --sparsity 0.9"}], **changes}))
    return path


def test_a_stopped_study_goes_on_and_its_table_holds_the_means(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, real, calls = study_file(tmp_path), study.call, []

    def call(command, **options):
        calls.append(command[0])
        if calls.count("train.py") == 2 and command[0] == "train.py":
            raise RuntimeError("killed")
        return real(command, **options)
    monkeypatch.setattr(study, "call", call)
    with pytest.raises(RuntimeError, match="killed"):
        study.main([str(path)])
    assert sorted(path.name for path in Path("runs").iterdir()) == ["small-none-all-s0", "small-one-shot-s0"]
    assert len(pd.read_csv("results/small/runs.csv")) == 2
    calls.clear()
    study.main([str(path)])
    assert calls == ["train.py", "export.py", "test.py", "profil.py",
                     "train_pruning.py", "export.py", "test.py", "profil.py"]
    runs, table = pd.read_csv("results/small/runs.csv"), pd.read_csv("results/small/table.csv")
    assert runs["arm"].tolist() == ["none (all)", "one shot"] * 2 and runs["seed"].tolist() == [0, 0, 1, 1]
    for row in table.to_dict("records"):
        of_arm = runs[runs["arm"] == row["arm"]]
        assert row["n"] == 2 and row["test_accuracy"] == pytest.approx(of_arm["test_accuracy"].mean(), rel=1e-4)
        assert row["validation_accuracy_sd"] == pytest.approx(of_arm["validation_accuracy"].std(), rel=1e-4)
    for row in runs.to_dict("records"):
        folder = study.folder_of("small", {"name": row["arm"]}, row["seed"])
        assert row["bytes"] == (folder / "exported.pt.gz").stat().st_size and row["test_images"] == 360
        assert row["validation_accuracy"] == pd.read_csv(folder / "history.csv")["validation_accuracy"].iloc[-1]
    assert runs["sparsity"].tolist() == pytest.approx([0, 0.9] * 2, abs=1e-3)
    assert Path("results/small/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| mixing | none (all) | 2 |" in capsys.readouterr().out


def test_finished_makes_a_table_of_what_is_there_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = study_file(tmp_path, seeds=[0])
    with pytest.raises(FileNotFoundError, match="no run of small is finished"):
        study.main([str(path), "--finished"])
    arm = {"group": "mixing", "name": "none (all)", "run": "train.py --mixing none"}
    study.train_arm(arm, SHORT, 0, study.folder_of("small", arm, 0))
    study.main([str(path), "--finished", "--out", "elsewhere"])
    table = pd.read_csv("elsewhere/table.csv")
    assert table["arm"].tolist() == ["none (all)"] and table["validation_accuracy_sd"].isna().all()


@pytest.mark.parametrize("changes, message", [
    ({"flags": 3}, "'flags' must be a str"), ({"arms": []}, "'arms' must be a list that is not empty"),
    ({"arms": [{"name": "a", "run": "train.py"}]}, "arm 0 must have a group"),
    ({"arms": [{"group": "g", "name": "a", "run": "rm -rf x"}]}, "arm 'a' must run train.py or train_pruning.py"),
    ({"arms": [{"group": "g", "name": "a", "run": "train.py"}] * 2}, "two arms are called 'a'")])
def test_a_study_of_another_form_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        study.read_study(study_file(tmp_path, **changes))
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ValueError, match="no.json is no JSON"):
        study.read_study(tmp_path / "no.json")


@pytest.mark.parametrize("path", sorted((study.HERE / "studies").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_studies_parse_to_the_end(path, tmp_path, monkeypatch):
    """Each run of each study is one that its script accepts."""
    import shlex

    import train
    import train_pruning
    monkeypatch.chdir(tmp_path)
    found = study.read_study(path)
    for arm in found["arms"]:
        script, *own = shlex.split(arm["run"])
        main = {"train.py": train.main, "train_pruning.py": train_pruning.main}[script]
        main([*shlex.split(found["flags"]), *own, "--dataset", "digits", "--compile", "off", "--batch-size", "2",
              "--limit", "4", "--dry-run"])
