"""What --force changes of a run is told, and what would change nothing any more is refused."""
import json
import shlex
import shutil

import pytest
import torch
from sample_runs import QUICK, history_of, part_of, resume
from test_own_pictures import paint
from test_study import call_here, study_file
from test_study_faults import arms_of

import cifar10
import experiment
import networks
import set_pruning_train
import study
import train
import train_pruning
from engine import checkpoint, run_files


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of train.py that has trained its one epoch."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main([*QUICK, "--epochs", "1", "--out", str(out)])
    return out


@pytest.mark.parametrize("flags", ["--lr 0.05", "--dataset mnist", "--momentum 0.5 --compile off", "--mixing cutmix"])
def test_a_finished_run_takes_no_other_settings(flags, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="is finished and would train nothing with other settings .*more --epochs"):
        train.main(["--resume", "--force", *flags.split(), "--out", str(out)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_finished_run_whose_result_is_gone_writes_it_again(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "model.pt").unlink()
    train.main(["--resume", "--force", "--compile", "auto", "--out", str(out)])
    assert checkpoint.read(out / "model.pt")["epochs"] == 1


def test_what_force_accepts_is_told(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    train.main(["--resume", "--force", "--epochs", "2", "--lr", "0.05", "--out", str(out)])
    told, = [line for line in capsys.readouterr().err.splitlines() if "other settings" in line]
    assert told == (f"note: the run in {out} goes on with other settings "
                    "(epochs: [1] then, [2] now; lr: 0.15 then, 0.05 now)")


def test_a_technique_line_that_was_edited_is_told_too(tmp_path, capsys):
    out = part_of(tmp_path / "run", "--epochs", "1", "1", "--sparsity", "0.5")
    state = checkpoint.read(out / "last.pt")
    state["settings"]["lines"]["flips"] = state["settings"]["flips"] = "alternating"
    checkpoint.save(out / "last.pt", state)
    resume(out, "--force", "--epochs", "1", "2")
    assert "flips: alternating then, random now" in capsys.readouterr().err
    assert len(history_of(out)) == 3


@pytest.mark.parametrize("flag", ["--teacher", "--start", "--cycle", "--out", "--data"])
def test_an_empty_text_is_refused(flag, tmp_path):
    """As "$CHECKPOINT" is, of a variable that is not set."""
    with pytest.raises(ValueError, match=f"^{flag}: it is empty; give a value, or leave it out"):
        train_pruning.main([*QUICK, "--epochs", "1", "1", "--sparsity", "0.5", "--out", str(tmp_path / "run"), flag,
                            ""])
    assert not (tmp_path / "run").exists()


def test_an_empty_text_is_no_setting_of_an_arm(tmp_path):
    path = study_file(tmp_path, seeds=[0], arms=arms_of(("a", "train.py --model lenet5 --mixing none --teacher ''")))
    with pytest.raises(ValueError, match="arm 'a': --teacher: it is empty"):
        study.main([str(path)])


@pytest.mark.parametrize("where", ["--stop-loss 0", '{"stop_loss": 0}'])
def test_a_loss_that_no_network_reaches_is_refused_before_training(where, tmp_path):
    (tmp_path / "cycle.json").write_text(where if where.startswith("{") else "{}")
    flags = [] if where.startswith("{") else where.split()
    with pytest.raises(ValueError, match="above 0"):
        train_pruning.main([*QUICK, "--pruning", "l1_cycle", "--epochs", "1", "--cycle", str(tmp_path / "cycle.json"),
                            *flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, told", [
    ("--pruning morphnet --epochs 1 1 --morph-device 1e9 1e9", "--morph-device 1000000000.0 1000000000.0 changes "
                                                               "nothing without --morph-cost latency"),
    ("--pruning filters --epochs 8 --filter-threshold 0", "removes no filter that is not zero already")])
def test_what_changes_nothing_is_told(flags, told, tmp_path, capsys):
    model = ["--model", "resnet20"] if "morphnet" in flags else []
    train_pruning.main([*QUICK, *model, *shlex.split(flags), "--dry-run", "--out", str(tmp_path / "run")])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("flags, advice", [("--lr 1e30", "--lr"), ("--optimizer muon --muon-lr 1e4 --lr 1e-6",
                                                                   "--muon-lr")])
def test_a_run_that_diverges_names_the_rate_that_is_too_large(flags, advice, tmp_path):
    with pytest.raises(RuntimeError, match=f"try a smaller {advice}$"):
        train.main([*QUICK, "--epochs", "9", *flags.split(), "--out", str(tmp_path / "run")])


def test_a_small_learning_rate_is_written_down_as_it_is(tmp_path):
    train.main([*QUICK, "--epochs", "1", "--lr", "3e-9", "--peak", "0", "--out", str(tmp_path / "run")])
    assert float(history_of(tmp_path / "run")[0]["lr"]) == pytest.approx(3e-9)


# ---- shares of epochs

@pytest.mark.parametrize("share, epochs", [(0.7, 90), (0.29, 100), (0.57, 100), (0.58, 50), (0.6, 30), (1.0, 7)])
def test_a_share_of_the_epochs_is_not_one_short_by_rounding(share, epochs):
    last = round(share * epochs)                         # each share is of a whole number of epochs
    settings = {"pruning": "polynomial", "prune_end": share, "epochs": [epochs]}
    assert [set_pruning_train.is_pruned(settings, 0, epoch) for epoch in (last, last + 1)] == [last == epochs, True]
    settings = {"pruning": "filters", "filter_interval": last, "filter_stop": share, "filter_threshold": 0.1,
                "filter_until": 0, "filter_one_layer": False, "filter_relative": True, "filter_columns": False,
                "filter_measure": "filter", "filter_warmup": 0.0, "epochs": [epochs]}
    assert set_pruning_train.never_reduces(settings, 9) == ""
    model = networks.build("lenet5")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    settings["filter_threshold"] = 0.9
    assert "conv1 6 -> " in set_pruning_train.reduce_filters(settings, last, model, None, optimizer, {})


# ---- files that lie about

def test_files_that_editors_leave_end_no_run(tmp_path):
    project = tmp_path / "project"
    (project / "engine").mkdir(parents=True)
    (project / "train.py").write_text("x = 1\n")
    (project / ".#train.py").symlink_to(project / "nowhere")                 # Emacs, beside an unsaved file
    (project / "._train.py").write_bytes(b"\xb0\x00")                        # macOS, on foreign file systems
    (project / "engine" / "old.py").write_bytes("# \xe9".encode("latin-1"))
    assert run_files.sources_of(project) == {"train.py": "x = 1\n", "engine/old.py": "# \\xe9"}


def test_a_source_that_cannot_be_read_is_a_note(tmp_path, capsys):
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train.py").write_text("x = 1\n")
    assert run_files.sources_of(tmp_path) == {"train.py": "x = 1\n"}
    assert "gone.py" in capsys.readouterr().err


# ---- a study whose data have changed

def test_an_arm_on_pictures_that_have_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    folder = paint(tmp_path / "colours", {"train": 6, "test": 2})
    path = study_file(tmp_path, seeds=[0, 1], arms=arms_of(("a", (
        f"train.py --model lenet5-student --mixing none --batch-size 4 --lr 0.02 --dataset {folder}/"))))
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, "flags": "--epochs 1 --compile off --device cpu"}))
    study.main([str(path), "--seeds", "0"])
    study.main([str(path), "--finished"])
    assert run_files.read_config(tmp_path / "runs/small-a-s0")["sha256"]["pictures"] == cifar10.sha256_of(
        cifar10.load(str(folder)))
    (folder / "test" / "red" / "0.png").rename(folder / "test" / "green" / "9.png")
    with pytest.raises(ValueError, match="small-a-s0 was trained with another pictures than .*colours is now"):
        study.main([str(path)])


# ---- the estimate

def test_the_estimate_counts_the_images_that_are_measured(tmp_path):
    counts = {}
    for recipe in ("ours", "published"):
        run = experiment.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                               [*QUICK, "--recipe", recipe, "--epochs", "1", "--out", str(tmp_path / recipe)])
        counts[recipe] = experiment.measured_images(run)
    assert counts == {"ours": 32, "published": 32 + 2 * 32}
