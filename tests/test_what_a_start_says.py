"""What a run says before its first step: flags that change nothing, the time it will take; and what it counts."""
import json
import shlex

import pytest
import torch
from sample_runs import QUICK, SMALL, Stop, history_of, part_of, resume, stop_after_a_save

import experiment
import export
import set_pruning_train
import train
import train_pruning
from engine import compiling

# ---- flags that change nothing

def started(out, flags):
    """A run of train.py, about to train."""
    return experiment.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                            [*QUICK, *shlex.split(flags), "--out", str(out)])


@pytest.mark.parametrize("flags, told", [
    ("--mixing cutout --mix-alpha 0.3", "--mix-alpha 0.3 changes nothing: Cutout mixes no two images"),
    ("--mixing mixup --mix-alpha 0", "--mixing mixup changes nothing beside --mix-alpha 0"),
    ("--mixing mixup --mix-alpha 0 --mix-per-sample", "--mix-per-sample changes nothing beside --mix-alpha 0"),
    ("--mixing cutout --mix-alpha 0", "--mixing cutout changes nothing beside --mix-alpha 0"),
    ("--norm-weight-decay 0", "--norm-weight-decay 0.0 changes nothing: lenet5-student has no batch norm"),
    ("--model resnet18 --groups 1 --no-shuffle", "--no-shuffle changes nothing: one group has nothing to interleave"),
    ("--teacher {teacher} --distillation-weight 1 --label-smoothing 0.3",
     "--label-smoothing 0.3 changes nothing: with --distillation-weight 1 the labels have no part in the loss")])
def test_a_flag_that_changes_nothing_is_told(flags, told, tmp_path, capsys):
    if "{teacher}" in flags:
        train.main([*QUICK, "--out", str(tmp_path / "teacher")])
    started(tmp_path / "run", flags.format(teacher=tmp_path / "teacher" / "model.pt"))
    assert f"note: {told}\n" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--mixing mixup --mix-alpha 0.3", "--label-smoothing 0.3",
                                   "--model resnet8-8-8-8 --norm-weight-decay 0",
                                   "--model resnet18 --groups 2 --no-shuffle"])
def test_and_one_that_changes_something_is_not(flags, tmp_path, capsys):
    started(tmp_path / "run", flags)
    assert "changes nothing" not in capsys.readouterr().err


# ---- what a start says, and what a run counts

def told_by(capsys, tmp_path, flags):
    """What a run of train_pruning.py says before its first step: (stdout, stderr)."""
    train_pruning.main([*QUICK, *shlex.split(flags), "--dry-run", "--out", str(tmp_path / "run")])
    return capsys.readouterr()


def test_settings_of_a_cycle_do_nothing_in_another_run(tmp_path, capsys):
    written = {"input_model_path": str(tmp_path / "absent.pt"), "output_model_path": str(tmp_path / "result.pt")}
    (tmp_path / "cycle.json").write_text(json.dumps(written))
    train_pruning.main([*QUICK, "--epochs", "1", "1", "--sparsity", "0.5", "--cycle", str(tmp_path / "cycle.json"),
                        "--out", str(tmp_path / "run")])
    assert "--cycle" in capsys.readouterr().err and not (tmp_path / "result.pt").exists()


def test_a_cycle_that_goes_on_is_told_nothing_wrong(tmp_path, capsys):
    (tmp_path / "cycle.json").write_text('{"finetuning_epochs": 1, "pruning_percent_step": 0.9, "stop_loss": 99}')
    out = part_of(tmp_path / "run", "--pruning", "l1_cycle", "--epochs", "1", "--cycle", str(tmp_path / "cycle.json"))
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(Stop):
            resume(out)
    assert "changes nothing" not in capsys.readouterr().err


@pytest.mark.parametrize("flags, told", [
    ("--weights binary --pruning l1_cycle --epochs 1", True), ("--weights binary --pruning filters --epochs 4", True),
    ("--weights binary --epochs 1 1 --sparsity 0.5 --macs 300000 --model lenet5", True),
    ("--weights binary --epochs 1 1 --sparsity 0.5", False), ("--pruning filters --epochs 4", False)])
def test_channels_of_binary_weights_leave_by_a_length_that_says_nothing(flags, told, tmp_path, capsys):
    assert ("channels leave by the length of their filters" in told_by(capsys, tmp_path, flags).err) == told


@pytest.mark.parametrize("flags, told", [("--model mobilenet", True), ("--model resnet18 --groups 1", True),
                                         ("--model resnet18 --groups 8", False)])
def test_dense_convolutions_in_a_network_without_groups_are_no_form_of_it(flags, told, tmp_path, capsys):
    said = told_by(capsys, tmp_path, f"--convolutions dense --epochs 1 1 --sparsity 0.5 {flags}")
    assert ("--convolutions dense changes nothing: no convolution of floats has groups" in said.err) == told
    assert ("grouped convolutions as dense ones" in said.out) == (not told)


def minutes_of(said):
    return float(said.out.split("estimated time for ")[1].split(": ")[1].split(" min")[0])


def test_the_estimate_has_a_teachers_passes(tmp_path, capsys, monkeypatch):
    """A teacher of 100 times a student's work and more; time is what operations cost at a speed that is given."""
    monkeypatch.setattr(compiling, "choose_forward", lambda model, *given: (model, 1.0, "eager"))
    train.main([*SMALL, "--model", "resnet18", "--mixing", "none", "--epochs", "1", "--out", str(tmp_path / "teacher")])
    capsys.readouterr()
    flags = "--epochs 30 30 --sparsity 0.5"
    alone = minutes_of(told_by(capsys, tmp_path, flags))
    teacher = f"--teacher {tmp_path / 'teacher' / 'model.pt'}"
    live = minutes_of(told_by(capsys, tmp_path, f"{flags} {teacher}"))
    once = minutes_of(told_by(capsys, tmp_path, f"{flags} {teacher} --teacher-views 2"))
    assert live - alone == pytest.approx(30 * (once - alone), rel=0.02) and live > 10 * alone


def test_the_estimate_of_a_cycle_is_of_its_first_round(tmp_path, capsys):
    said = told_by(capsys, tmp_path, "--pruning l1_cycle --epochs 2 --model lenet5").out
    assert "estimated time for the first round: " in said
    assert "estimated time for all rounds: " in told_by(capsys, tmp_path, "--epochs 1 1 --sparsity 0.5").out


def test_the_seconds_of_asking_are_those_of_the_first_epoch(tmp_path, monkeypatch):
    train.main([*QUICK, "--epochs", "1", "--out", str(tmp_path / "teacher")])
    late, real, clock = [0.0], train.take_views, train.time.perf_counter

    def take(run, precision):
        real(run, precision)
        late[0] += 1000
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(train, "take_views", take)
    train.main([*QUICK, "--epochs", "2", "--teacher", str(tmp_path / "teacher" / "model.pt"), "--teacher-views", "2",
                "--out", str(tmp_path / "run")])
    first, second = (float(row["seconds"]) for row in history_of(tmp_path / "run"))
    assert 1000 <= first < 1500 and second < 500


@pytest.mark.parametrize("views", [[], ["--teacher-views", "2"]])
def test_a_teacher_without_weight_changes_nothing(views, tmp_path):
    train.main([*QUICK, "--epochs", "1", "--out", str(tmp_path / "alone")])
    train.main([*QUICK, "--epochs", "1", "--teacher", str(tmp_path / "alone"), "--distillation-weight", "0", *views,
                "--out", str(tmp_path / "beside")])
    rows = [{name: value for name, value in history_of(tmp_path / out)[0].items()
             if name not in ("seconds", "images_per_second")} for out in ("alone", "beside")]
    assert rows[0] == rows[1] and not (tmp_path / "beside" / "views.pt").exists()


def test_a_packed_network_teaches_and_its_passes_count(tmp_path):
    train.main([*QUICK, "--weights", "lsq", "--epochs", "1", "--out", str(tmp_path / "teacher")])
    export.main(["--checkpoint", str(tmp_path / "teacher"), "--out", str(tmp_path / "teacher.packed.gz")])
    rows = {}
    for name, flags in (("alone", []), ("taught", ["--teacher", str(tmp_path / "teacher.packed.gz")])):
        train.main([*QUICK, "--epochs", "1", *flags, "--out", str(tmp_path / name)])
        rows[name] = float(history_of(tmp_path / name)[0]["pflop"])
    assert rows["taught"] == pytest.approx(4 / 3 * rows["alone"], rel=0.02)


def test_a_gradual_run_that_macs_left_with_more_zeros_goes_on(tmp_path):
    """Channels that are denser than the others leave: the share of zeros rises above what was asked for."""
    settings = {"epochs": [10], "sparsity": [0.9], "pruning": "polynomial", "prune_end": 0.6,
                **{name: None for name in set_pruning_train.OF_A_PRUNING if name != "sparsity"}}
    state = {"round": 0, "epoch": 8, "settings": settings, "masks": {"a": torch.arange(1000) < 60}}
    set_pruning_train.check_position(settings, state)
    with pytest.raises(ValueError, match="the run has pruned 94.0 % already"):
        set_pruning_train.check_position({**settings, "sparsity": [0.8]}, {**state, "epoch": 2})


def test_morphnets_late_error_says_how_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(set_pruning_train, "check_budget", lambda *given: None)      # blocks may die, or not
    out, flags = str(tmp_path / "run"), ["--morph-budget", "0.01", "--epochs", "1", "1"]
    with pytest.raises(ValueError, match="smaller --morph-round-to or a larger --morph-budget goes on"):
        train_pruning.main([*SMALL, "--mixing", "none", "--model", "resnet8-4-4-4", "--pruning", "morphnet", *flags,
                            "--out", out])
    train_pruning.main(["--resume", "--force", "--morph-budget", "0.9", "--out", out])
    assert len(history_of(out)) == 2
