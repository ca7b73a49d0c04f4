"""Faults of studies and reports: names that collide, stale numbers, other shapes, arms and plots that fail."""
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_study import SHORT, call_here, study_file

import profil
import report
import study
import test as half_test
import train
from engine import checkpoint, files, run_files, tables

LENET = "train.py --mixing none --model lenet5"
HEAD = "round,seconds,images_per_second,train_accuracy,validation_loss,validation_accuracy"
WORDS = ["flags", "seeds", "arms", "factors", "run", "group", "name", "settings", "architecture", "device", "test",
         "profile", "layers", "bytes", "sparsity", "a"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=12)


def arms_of(*named):
    return [{"group": "g", "name": name, "run": run} for name, run in named]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, in which studies call scripts in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    return tmp_path


# ---- what a cache depends on

@pytest.mark.parametrize("names", [("lr 0.1", "lr 0_1"), ("x -1", "x 1"), ("a b", "a-b"), ("a(b)", "a b")])
def test_names_of_one_folder_are_refused(names, tmp_path):
    with pytest.raises(ValueError) as problem:
        study.read_study(study_file(tmp_path, arms=arms_of(*((name, LENET) for name in names))))
    assert all(repr(name) in str(problem.value) for name in names)


def test_seeds_twice_are_refused(here):
    with pytest.raises(ValueError, match="'seeds' holds 0 twice"):
        study.read_study(study_file(here, seeds=[0, 0]))
    with pytest.raises(ValueError, match="--seeds holds 1 twice"):
        study.main([str(study_file(here)), "--seeds", "1", "1"])


@pytest.mark.parametrize("changes", [{"arms": arms_of(("a", f"{LENET} --lr 0.03"))}, {"flags": f"{SHORT} --lr 0.03"}])
def test_a_run_of_an_arm_that_was_edited_is_refused(changes, here):
    study.main([str(study_file(here, seeds=[0], arms=arms_of(("a", LENET))))])
    with pytest.raises(ValueError, match="small-a-s0 was trained with other settings.*'a'.*lr: 0.15 then, 0.03 now"):
        study.main([str(study_file(here, **{"seeds": [0], "arms": arms_of(("a", LENET)), **changes}))])


def test_two_studies_of_one_name_do_not_share_a_table(here):
    (here / "other").mkdir()
    study.main([str(study_file(here, seeds=[0], arms=arms_of(("a", LENET))))])
    with pytest.raises(ValueError, match="holds the table of small.json, not of other/small.json"):
        study.main([str(study_file(Path("other"), seeds=[0], arms=arms_of(("b", LENET))))])


def test_another_result_is_measured_anew(here):
    path = study_file(here, seeds=[0], arms=arms_of(("a", LENET)))
    study.main([str(path)])
    model, before = Path("runs/small-a-s0/model.pt"), pd.read_csv("results/small/runs.csv")["nonzero"][0]
    network = checkpoint.read(model)
    network["weights"]["linear1.weight"].zero_()
    checkpoint.save(model, network)
    study.main([str(path)])
    assert pd.read_csv("results/small/runs.csv")["nonzero"][0] < before - 10_000


# ---- one bad arm

def test_arms_that_fail_are_marked_and_the_others_go_on(here, capsys):
    arms = arms_of(("diverges", f"{LENET} --lr 1e30 --momentum 0"), ("keeps", LENET), ("good", LENET))
    arms[1]["keep"] = {"cycle.png": "cycle.png"}
    with pytest.raises(RuntimeError, match="2 of 3 runs failed"):
        study.main([str(study_file(here, seeds=[0], arms=arms))])
    table = pd.read_csv("results/small/table.csv")
    assert table["n"].tolist() == [0, 1, 1] and "no cycle.png to keep" in table["failed"][1]
    assert "finite" in table["failed"][0] and pd.isna(table["failed"][2])
    assert capsys.readouterr().err.count("note: ") == 2


# ---- JSON, CSV of another shape

@pytest.mark.parametrize(("text", "told"), [
    ("[]", "holds '\\[\\]'"), ("null", "holds 'None'"), ("3", "holds '3'"), ("{", "no JSON"), ('"x"', "holds 'x'"),
    ("[" * 100_000, "no JSON")])
def test_a_study_that_is_no_object_is_one_line(text, told, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json.*{told}"):
        study.read_study(tmp_path / "a.json")


@pytest.mark.parametrize("values", [["a", "b"], [1, "2"], [1, None], [1, 1], [True, False], [1], "12",
                                    [float("nan"), 1]])
def test_factors_that_are_no_numbers_are_refused_before_training(values, here):
    (here / "a.json").write_text(json.dumps({"flags": SHORT, "seeds": [0], "run": LENET,
                                             "factors": {"rate": {"flag": "--lr", "values": values}}}))
    with pytest.raises(ValueError, match="'rate'"):
        study.main(["a.json"])
    assert not Path("runs").exists()


@settings(deadline=None)
@given(JSON, JSON)
def test_any_json_is_a_study_or_one_error(tmp_path_factory, whole, part):
    path = tmp_path_factory.getbasetemp() / "any.json"
    for held in (whole, {"flags": SHORT, "seeds": [0], "arms": part}, {"flags": SHORT, "seeds": part, "arms": whole},
                 {"flags": SHORT, "seeds": [0], "run": LENET, "factors": part}):
        path.write_text(json.dumps(held))
        with pytest.raises(ValueError, match="any.json"):
            study.read_study(path)


@settings(deadline=None)
@given(JSON)
def test_any_config_and_report_is_read_or_one_error(tmp_path_factory, held):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for name, read in (("config.json", run_files.read_config), ("report.json", run_files.read_report)):
        (folder / name).write_text(json.dumps(held))
        try:
            assert isinstance(read(folder), dict)
        except ValueError as problem:
            assert name in str(problem)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "round,seconds\n", "\0\0", f"{HEAD}\n", f"{HEAD}\n1,1,1,1,one,1\n"])
def test_a_history_without_its_rows_is_one_line(text, tmp_path):
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(ValueError, match="history.csv"):
        run_files.read_history(tmp_path)


# ---- counting twice

def copied(run, target):
    shutil.copytree(run, target)
    return target


def test_a_run_and_its_copy_count_once(trained, tmp_path, capsys):
    one, other = copied(trained, tmp_path / "runs" / "a"), copied(trained, tmp_path / "kept" / "b")
    report.main([str(one), str(one), f"{one}/.", str(other), "--out", str(tmp_path / "out")])
    assert pd.read_csv(tmp_path / "out" / "table.csv")["n"].tolist() == [1]
    assert capsys.readouterr().err.count("hold one run; it counts once") == 3


def test_different_runs_of_one_name_are_refused(trained, tmp_path):
    one, other = copied(trained, tmp_path / "x" / "a"), copied(trained, tmp_path / "y" / "a")
    history = pd.read_csv(other / "history.csv")
    history["seconds"] += 1
    history.to_csv(other / "history.csv", index=False)
    with pytest.raises(ValueError, match="x/a and .*y/a are different runs of one name"):
        report.main([str(one), str(other), "--out", str(tmp_path / "out")])
    report.main([str(one), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="out/a holds a copy of another run"):
        report.main([str(other), "--out", str(tmp_path / "out")])


# ---- what stands beside a result

@pytest.fixture
def full(monkeypatch):
    """A disk that takes no file any more."""
    def write(path, content):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "write_synced", write)


def test_the_result_is_told_where_nothing_can_be_written(trained, tmp_path, full, capsys):
    run = copied(trained, tmp_path / "run")
    before = (run / "report.json").read_bytes() if (run / "report.json").exists() else None
    half_test.main(["--checkpoint", str(run / "model.pt"), "--json", "--picture", str(tmp_path / "a.png")])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 360 and printed.err.count("note: ") == 2
    profil.main(["--checkpoint", str(run / "model.pt"), "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["macs"] > 0 and "note: " in printed.err
    assert ((run / "report.json").read_bytes() if before else None) == before
    assert not list(tmp_path.glob("**/*.partial")) and not (tmp_path / "a.png").exists()


def test_a_picture_is_whole_or_the_one_before(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    path = tmp_path / "a.png"
    files.save_figure(path, Figure())
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def half(path, content):
        path.write_bytes(content[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "write_synced", half)
    with pytest.raises(RuntimeError, match="a.png could not be written .No space left on device."):
        files.save_figure(path, Figure(figsize=(1, 1)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_no_script_writes_a_picture_or_a_table_in_place():
    scripts = [*ROOT.glob("*.py"), *(path for folder in ("engine", "deploy", "benchmarks", "models", "studies")
                                     for path in (ROOT / folder).glob("*.py"))]
    assert len(scripts) > 40
    for path in scripts:
        text = path.read_text()
        assert text.count(".savefig(") == (path.name == "files.py"), path.name
        assert "to_csv(out" not in text and "to_csv(path" not in text and ".write_text(" not in text, path.name


# ---- tables in pages

TABLE = """| arm | n | test %, exported file | fewer | MACs | fewer |
|---|---|---|---|---|---|
| a | 1 | 9.0 | x | 2 | y |
"""


@pytest.mark.parametrize(("columns", "shown"), [
    ("", TABLE.strip()), (": arm, n", "| arm | n |\n|---|---|\n| a | 1 |"),
    (": n, test %, exported file", "| n | test %, exported file |\n|---|---|\n| 1 | 9.0 |"),
    (": fewer, MACs, fewer", "| fewer | MACs | fewer |\n|---|---|---|\n| x | 2 | y |"),
])
def test_a_page_is_filled_with_the_columns_that_its_marker_names(columns, shown, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text(TABLE)
    page = f"before\n\n<!-- table results/table.md{columns} -->\nold\n<!-- end -->\n\nafter\n"
    filled = tables.fill(page, tmp_path)
    assert shown in filled and "old" not in filled and filled.startswith("before") and filled.endswith("after\n")
    assert tables.fill(filled, tmp_path) == filled


def test_pages_show_what_results_hold():
    assert len(tables.pages_of(ROOT)) > 5
    for page in tables.pages_of(ROOT):
        assert tables.fill(page.read_text(), ROOT) == page.read_text(), f"{page.name}: python report.py --pages"


# ---- runs that are there

@pytest.mark.parametrize("name, flag", [("teacher", "--teacher"), ("start", "--start")])
def test_a_student_of_another_teacher_is_refused(name, flag, here):
    path = study_file(here, seeds=[0], arms=arms_of(("first", LENET), (
        "second", f"{LENET} {flag} runs/small-first-s0/model.pt")))
    study.main([str(path)])
    study.main([str(path), "--finished"])
    teacher = here / "runs/small-first-s0/model.pt"
    held = checkpoint.read(teacher)
    held["weights"]["conv1.weight"] += 1
    checkpoint.save(teacher, held)
    with pytest.raises(ValueError, match=f"small-second-s0 was trained with another {name} than "
                                         "runs/small-first-s0/model.pt is now"):
        study.main([str(path), "--finished"])
    teacher.unlink()                                     # what is gone says nothing
    (here / "runs/small-first-s0/finished").unlink()
    (here / "runs/small-first-s0/last.pt").unlink()
    study.main([str(path), "--finished"])


def test_a_trained_network_without_its_last_checkpoint_keeps_its_files(here, capsys):
    path = study_file(here, seeds=[0], arms=arms_of(("a", LENET)))
    study.main([str(path)])
    folder = here / "runs/small-a-s0"
    for name in ("last.pt", "previous.pt", "finished"):
        (folder / name).unlink(missing_ok=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(RuntimeError, match="neither `finished` nor last.pt: .* `touch runs/small-a-s0/finished`"):
        study.main([str(path)])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder / "finished").touch()
    study.main([str(path)])


def test_a_run_that_goes_on_reads_the_data_from_where_it_is_now(here, monkeypatch):
    calls = []
    for seed in (0, 1):
        (here / f"runs/s-a-s{seed}").mkdir(parents=True)
    (here / "runs/s-a-s0/last.pt").touch()
    monkeypatch.setattr(study, "call", lambda words, show=False: calls.append(words))
    for seed in (0, 1):
        study.train_arm({"name": "a", "run": "train.py --lr 0.1"}, "--model lenet5", seed, here / f"runs/s-a-s{seed}",
                        "elsewhere")
    assert calls[0] == ["train.py", "--resume", "--data", "elsewhere", "--out", str(here / "runs/s-a-s0")]
    assert calls[1][calls[1].index("--data") + 1] == "elsewhere" and "--resume" not in calls[1]


def rows_of_table():
    return sorted(map(tuple, pd.read_csv("results/small/runs.csv")[["arm", "seed"]].to_numpy().tolist()))


def test_a_run_that_another_process_finishes_meanwhile_is_in_the_table(here, monkeypatch):
    path = study_file(here, seeds=[0], arms=arms_of(("a", LENET), ("b", LENET)))
    train_arm = study.train_arm

    def train_both(arm, flags, seed, folder, *data):
        train_arm(arm, flags, seed, folder, *data)
        if arm["name"] == "a":
            train_arm({"name": "b", "run": LENET}, flags, seed, Path("runs/small-b-s0"), *data)
    monkeypatch.setattr(study, "train_arm", train_both)
    study.main([str(path), "--arms", "a"])
    assert rows_of_table() == [("a", 0), ("b", 0)]


def test_one_seed_leaves_the_others_in_the_table(here):
    path = study_file(here, seeds=[0, 1], arms=arms_of(("a", LENET)))
    study.main([str(path), "--seeds", "0"])
    assert rows_of_table() == [("a", 0)]
    study.main([str(path), "--seeds", "1"])
    assert rows_of_table() == [("a", 0), ("a", 1)]
    study.main([str(path), "--seeds", "7"])
    assert rows_of_table() == [("a", 0), ("a", 1), ("a", 7)]


# ---- reports

def test_a_folder_whose_name_is_no_text_is_in_the_report(here, capsys):
    train.main([*SHORT.split(), "--mixing", "none", "--model", "lenet5", "--out", "runs/a"])
    folder = os.fsdecode(b"runs/caf\xe9")
    os.rename("runs/a", folder)
    report.main([folder, "--out", "tables"])
    assert b"caf\\udce9" in Path("tables/table.md").read_bytes()


def test_pages_are_filled_in_the_projects_folder_alone(here):
    with pytest.raises(ValueError, match="no README.md here and no docs/"):
        report.main(["--pages"])
