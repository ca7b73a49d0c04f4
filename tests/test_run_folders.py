"""The folder of a run: one process has it, nobody's files are touched, and a run that never trained leaves none."""
import json
import os
import time

import pytest
from sample_runs import SMALL, folder_after, run_script, start_training

import experiment
import train
from engine import checkpoint, folders

TINY = [*SMALL, "--model", "lenet5-student", "--epochs", "1"]


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    """Runs that other tests began and never ended hold their folders; here none does."""
    monkeypatch.setattr(folders, "HELD", {})


def files_of(folder):
    """{path: bytes} of all below."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [["--out", "run"], []], ids=["with --out", "in the same second"])
def test_of_two_runs_that_start_at_once_the_second_is_refused(flags, tmp_path, monkeypatch):
    """Both have found the folder free; the other one takes it in between."""
    monkeypatch.chdir(tmp_path)
    clock = time.strftime
    monkeypatch.setattr(time, "strftime", lambda form, *moment: clock(form, *moment) if moment else "20250101-000000")
    real, others = experiment.announce, []

    def announce(run):
        if not others:
            others.append(run)
            train.main([*TINY, *flags])
            before.update(files_of(tmp_path))
        real(run)
    before = {}
    monkeypatch.setattr(experiment, "announce", announce)
    with pytest.raises(ValueError, match="holds another run.*choose another --out"):
        train.main([*TINY, *flags])
    assert before and files_of(tmp_path) == before


def test_a_run_is_not_resumed_twice_at_once(finished, tmp_path):
    out = folder_after(finished, 4, tmp_path / "run")
    folders.hold(out)
    try:
        code, line = run_script("train_pruning.py", "--resume", "--out", out)
    finally:
        folders.let_go(out)
    assert code == 2 and f"another process trains in {out}" in line
    assert sorted(os.listdir(out)) == ["last.pt", "previous.pt"]


def test_a_folder_is_free_again_when_its_run_has_ended(tmp_path):
    train.main([*TINY, "--out", str(tmp_path / "run")])
    assert not folders.HELD


@pytest.mark.parametrize("place", ["begin_round", "train_step"])
@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["fault", "Ctrl-C"])
def test_a_run_that_fails_before_its_first_step_leaves_no_folder(place, fault, tmp_path, monkeypatch):
    def fail(*arguments):
        assert (tmp_path / "new" / "run" / "config.json").exists(), "the folder was taken"
        raise fault
    monkeypatch.setattr(train, place, fail)
    with pytest.raises(type(fault)):
        train.main([*TINY, "--out", str(tmp_path / "new" / "run")])
    assert not list(tmp_path.iterdir()) and not folders.HELD


def test_an_empty_folder_that_was_there_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *arguments: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        train.main([*TINY, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_after_a_step_keeps_its_folder(tmp_path, monkeypatch):
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, images, labels, step: real(run, images, labels, step)
                        if not step else (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        train.main([*TINY, "--batch-size", "16", "--out", str(tmp_path / "run")])
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_give_back_leaves_what_others_put_there(tmp_path):
    made = folders.take(tmp_path / "a" / "b")
    folders.let_go(tmp_path / "a" / "b")
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    folders.give_back(tmp_path / "a" / "b", made)
    assert files_of(tmp_path) == {tmp_path / "a" / "thesis.txt": b"precious"}


@pytest.mark.parametrize("out", [".", "given"])
@pytest.mark.parametrize("name, content", [("thesis.txt", "precious"), ("config.json", "[1]"), ("config.json", "{"),
                                           ("model.pt", "precious")])
def test_somebodys_folder_is_no_run_and_nothing_is_to_be_deleted(shell, tmp_path, monkeypatch, out, name, content):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path if out == "." else tmp_path / out
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    code, line = shell("train.py", *TINY, "--out", out)
    assert code == 2 and "is no run of this project" in line and name in line and "choose another --out" in line
    assert "delete" not in line and files_of(tmp_path) == {folder / name: content.encode()}


def test_a_run_without_a_checkpoint_is_left_alone(shell, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}}))
    code, line = shell("train.py", *TINY, "--out", tmp_path)
    assert code == 2 and "no last.pt to resume from; choose another --out" in line and "delete" not in line


# ---- what a run reads and what it writes

def test_a_teacher_that_the_run_would_write_over_is_refused(shell, tmp_path):
    train.main([*TINY, "--out", str(tmp_path / "run")])
    before = files_of(tmp_path)
    code, line = shell("train.py", "--resume", "--force", "--epochs", 2, "--teacher", tmp_path / "run" / "model.pt",
                       "--out", tmp_path / "run")
    assert code == 2 and "--teacher" in line and "written over" in line
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("flag", ["--teacher", "--start", "input_model_path"])
def test_a_cycle_does_not_write_over_what_it_reads(shell, tmp_path, flag):
    train.main([*TINY, "--out", str(tmp_path / "first")])
    model = tmp_path / "first" / "model.pt"
    before = model.read_bytes()
    cycle = {"output_model_path": str(model)} | ({"input_model_path": f"{model.parent}/../first/model.pt"}
                                                 if flag == "input_model_path" else {})
    (tmp_path / "cycle.json").write_text(json.dumps(cycle))
    code, line = shell("train_pruning.py", *TINY, "--pruning", "l1_cycle", "--cycle", tmp_path / "cycle.json", "--out",
                       tmp_path / "run", *([flag, model] if flag != "input_model_path" else []))
    assert code == 2 and flag in line and "written over" in line
    assert model.read_bytes() == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["absent/model.pt", "folder", "run/last.pt"])
def test_a_cycle_whose_result_has_no_place_is_refused_before_training(shell, tmp_path, target):
    (tmp_path / "folder").mkdir()
    (tmp_path / "cycle.json").write_text(json.dumps({"output_model_path": str(tmp_path / target)}))
    code, line = shell("train_pruning.py", *TINY, "--pruning", "l1_cycle", "--cycle", tmp_path / "cycle.json", "--out",
                       tmp_path / "run")
    assert code == 2 and "output_model_path of --cycle" in line and target in line
    assert not (tmp_path / "run").exists()


# ---- a path that is nearly right

def test_a_runs_folder_means_its_model(finished, capsys):
    assert train.find_checkpoint(finished.out) == checkpoint.find(finished.out) == finished.out / "model.pt"
    assert f"{finished.out}/model.pt" in capsys.readouterr().err
    assert checkpoint.find(finished.out / "last.pt") == finished.out / "last.pt"
    assert capsys.readouterr() == ("", "")


def test_a_folder_without_a_model_is_told(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; name a checkpoint"):
        checkpoint.find(tmp_path)
    out = folder_after(finished, 1, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=f"{out}/last.pt holds an unfinished run"):
        checkpoint.find(out)


def test_teacher_and_start_take_a_runs_folder(tmp_path):
    train.main([*TINY, "--out", str(tmp_path / "a")])
    run = start_training(tmp_path / "b", "--model", "lenet5-student", "--teacher", tmp_path / "a", "--start",
                         tmp_path / "a")
    folders.let_go(tmp_path / "b")
    assert run.settings["teacher"] == run.settings["start"] == str(tmp_path / "a" / "model.pt")
    weights = checkpoint.read(tmp_path / "a" / "model.pt")["weights"]
    assert all(tensor.equal(weights[name]) for name, tensor in run.model.state_dict().items())


def test_a_checkpoint_means_its_run_where_a_folder_is_asked_for(tmp_path):
    train.main([*TINY, "--out", str(tmp_path / "run")])
    train.main(["--resume", "--out", str(tmp_path / "run" / "last.pt")])
