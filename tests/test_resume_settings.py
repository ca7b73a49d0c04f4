"""Which runs do not go on, and which settings may change when one does."""
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import EPOCHS, ROUNDS, SMALL, folder_after, history_of, resume, start_rounds

import train
import train_pruning
from engine import checkpoint, schedules
from engine.settings import to_resume

pytestmark = pytest.mark.usefixtures("one_thread")


def test_resume_where_there_is_nothing_makes_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*nothing/last.pt"):
        resume(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*empty/last.pt"):
        resume(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="last.pt"):
        train_pruning.main(["--resume"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


def test_resume_without_a_folder_takes_the_newest(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for number, name in enumerate(("a", "c", "b")):
        out = folder_after(finished, 1, tmp_path / "runs" / name)
        os.utime(out / "last.pt", (1000 + number, 1000 + number))
    assert start_rounds("--resume", "--dry-run") is None
    assert "writes runs/b" in capsys.readouterr().out


def test_folder_of_another_run_is_refused(finished):
    before = {path.name: path.read_bytes() for path in finished.out.iterdir()}
    with pytest.raises(ValueError, match="holds another run; --resume continues it, another --out"):
        train_pruning.main([*ROUNDS, "--out", str(finished.out)])
    assert {path.name: path.read_bytes() for path in finished.out.iterdir()} == before


def test_another_script_does_not_resume_it(finished, tmp_path):
    out = folder_after(finished, 2, tmp_path / "run")
    with pytest.raises(ValueError, match="is a run of train_pruning.py"):
        train.main(["--resume", "--out", str(out)])
    assert sorted(os.listdir(out)) == ["last.pt", "previous.pt"]


def test_other_settings_are_listed_and_refused(finished, tmp_path):
    out = folder_after(finished, 2, tmp_path / "run")
    with pytest.raises(ValueError) as problem:
        resume(out, "--lr", "0.2", "--groups", "4", "--epochs", "2", "1", "3", "--batch-size", "32")
    message = str(problem.value)
    for told in ("lr: 0.15 then, 0.2 now", "groups: 8 then, 4 now", "epochs: [2, 1, 2] then, [2, 1, 3] now",
                 "--force", str(out)):
        assert told in message
    assert "batch_size" not in message and "seed" not in message
    assert sorted(os.listdir(out)) == ["last.pt", "previous.pt"]


def test_another_technique_line_is_listed_unless_a_flag_overrides_it(finished):
    state = finished.states[0]
    lines = {**state["settings"]["lines"], "mixing": "none"}
    with pytest.raises(ValueError, match=r"\(mixing: cutmix then, none now\)"):
        to_resume(train_pruning.SETTINGS, state, lines, {"resume": True, "out": "a"})
    forced = to_resume(train_pruning.SETTINGS, state, lines, {"resume": True, "out": "a", "force": True})
    assert (forced["mixing"], forced["out"], forced["seed"]) == ("none", "a", 3)
    kept = to_resume(train_pruning.SETTINGS, state, lines, {"resume": True, "out": "a", "mixing": "cutmix"})
    assert kept["mixing"] == "cutmix"


def test_force_accepts_other_settings_and_they_take_effect(finished, tmp_path):
    out = folder_after(finished, 4, tmp_path / "run")
    run = start_rounds("--resume", "--out", out, "--force", "--lr", 0.3, "--weight-decay", 0.01, "--momentum", 0.5)
    assert (run.settings["lr"], run.settings["weight_decay"], run.settings["seed"]) == (0.3, 0.01, 3)
    assert (run.round, run.epoch, len(run.history)) == (2, 1, 4)
    group = run.optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)
    run.schedule.step()
    assert group["lr"] == pytest.approx(0.3 * schedules.one_cycle(4 / 6)), "4 of the round's 6 steps are done"


@pytest.mark.parametrize("flags", [("--averaging", "none"), ("--schedule", "plateau"), ("--schedule", "cosine")])
def test_force_of_another_technique_trains_on(finished, tmp_path, flags):
    out = folder_after(finished, 4, tmp_path / "run")
    resume(out, "--force", *flags)
    assert checkpoint.read(out / "model.pt")["weights"].keys() == finished.states[3]["weights"].keys()
    assert len(history_of(out)) == EPOCHS


def test_force_of_averaging_where_there_was_none(finished, tmp_path):
    out = folder_after(finished, 4, tmp_path / "run")
    state = {**finished.states[3], "average": None}
    state["settings"] = {**state["settings"], "averaging": "none"}
    checkpoint.save(out / "last.pt", state)
    assert start_rounds("--resume", "--out", out, "--force", "--averaging", "ema").average is not None


def test_force_of_another_network_names_the_tensors(finished, tmp_path):
    out = folder_after(finished, 2, tmp_path / "run")
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight is 64x8x3x3 in the file, 64x16x3x3 in the network"):
        resume(out, "--force", "--groups", "4")


def test_resume_from_a_file_of_weights_alone_is_refused(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished.out / "model.pt", tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match="last.pt"):
        resume(tmp_path / "run")


# ---- the schedule stands where the epochs stand

@given(st.sampled_from([schedules.one_cycle, schedules.warm_cosine]), st.floats(0, 10))
def test_a_share_of_the_rate_never_leaves_0_to_1(shape, progress):
    assert 0 <= shape(progress) <= 1
    assert progress < 1 or shape(progress) == 0


def short(out, *flags):
    """A run of train.py on 32 images, or what goes on with it."""
    begins = [] if "--resume" in flags else [*SMALL, "--model", "lenet5-student"]
    train.main([*begins, "--out", str(out), *map(str, flags)])
    return [float(row["lr"]) for row in history_of(out)]


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
@pytest.mark.parametrize("before, after", [(16, 32), (8, 32), (32, 8), (16, 16)])
def test_a_finished_run_is_extended_with_another_batch_size(tmp_path, capsys, schedule, before, after):
    short(tmp_path / "run", "--epochs", 2, "--batch-size", before, "--schedule", schedule, "--lr", 0.25)
    capsys.readouterr()
    rates = short(tmp_path / "run", "--resume", "--force", "--batch-size", after, "--epochs", 4)
    shape = schedules.one_cycle if schedule == "one-cycle" else schedules.warm_cosine
    assert rates[2:] == pytest.approx([0.25 * shape(2 / 4), 0.25 * shape(3 / 4)], abs=1e-6)
    assert (f"the schedule goes on at learning rate {0.25 * shape(0.5):.4g}, 2 of 4 epochs into its round; it stood at "
            "0\n") in capsys.readouterr().out


def test_the_rate_at_every_step_after_another_batch_size(tmp_path, monkeypatch):
    short(tmp_path / "run", "--epochs", 2, "--batch-size", 4)
    rates, real = [], train.train_step

    def train_step(run, *arguments):
        rates.append(run.optimizer.param_groups[0]["lr"])
        return real(run, *arguments)
    monkeypatch.setattr(train, "train_step", train_step)
    short(tmp_path / "run", "--resume", "--force", "--epochs", 3, "--batch-size", 16, "--lr", 0.5)
    assert rates == pytest.approx([0.5 * schedules.one_cycle(4 / 6), 0.5 * schedules.one_cycle(5 / 6)])


@pytest.mark.parametrize("first, then, expected", [
    ("plateau", "one-cycle", 0.25 * schedules.one_cycle(2 / 3)), ("one-cycle", "plateau", 0.25),
    ("plateau", "plateau", 0.25), ("cosine", "plateau", 0.25)])
def test_another_schedule_begins_where_the_run_stands(tmp_path, first, then, expected):
    short(tmp_path / "run", "--epochs", 2, "--schedule", first, "--lr", 0.25)
    rates = short(tmp_path / "run", "--resume", "--force", "--epochs", 3, "--schedule", then)
    assert rates[2] == pytest.approx(expected, abs=1e-6)


def test_a_plateau_keeps_what_the_losses_made_of_its_rate(finished, tmp_path):
    short(tmp_path / "run", "--epochs", 1, "--schedule", "plateau", "--lr", 0.25)
    state = checkpoint.read(tmp_path / "run" / "last.pt")
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = 0.025
    checkpoint.save(tmp_path / "run" / "last.pt", state)
    assert short(tmp_path / "run", "--resume", "--force", "--epochs", 2, "--lr", 0.5)[1] == pytest.approx(0.05)


@pytest.mark.parametrize("flags, told", [
    (["--epochs", "1"], "has trained 2 in its round 1 already"), (["--seed", "4"], "began with seed 0; --seed 4"),
    (["--recipe", "published"], "began with recipe ours"), (["--start", "a.pt"], "began with start None")])
def test_what_cannot_be_carried_over_is_refused_with_force_too(tmp_path, flags, told):
    short(tmp_path / "run", "--epochs", 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=told):
        short(tmp_path / "run", "--resume", "--force", *flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("flags", [["--epochs", "2", "2", "2"], ["--epochs", "2", "1", "--sparsity", "0.7"],
                                   ["--sparsity", "0.6", "0.7"]])
def test_rounds_that_are_over_do_not_change(finished, tmp_path, flags):
    out = folder_after(finished, 4, tmp_path / "run")          # in its third round
    with pytest.raises(ValueError, match="are over and cannot change|in its round 3 already"):
        resume(out, "--force", *flags)


@pytest.mark.parametrize("device, size", [(None, 16), ("cuda", 16), ("mps", 44)])
def test_a_run_does_not_go_on_where_other_numbers_are_drawn(device, size, finished, tmp_path):
    """Begun on a GPU; files from before they said so have a generator of a GPU's size."""
    out = folder_after(finished, 2, tmp_path / "run")
    state = checkpoint.read(out / "last.pt")
    state["random"]["generator"] = torch.zeros(size, dtype=torch.uint8)
    state["device"] = device
    checkpoint.save(out / "last.pt", state)
    with pytest.raises(ValueError, match=f"began on {device or 'cuda'} and cannot go on .* on cpu.*resume it with"):
        resume(out)


def test_a_run_goes_on_where_it_began_by_whichever_name(finished, tmp_path):
    """The setting may be auto then and a name now, which is what the error above advises."""
    out = folder_after(finished, 2, tmp_path / "run")
    state = checkpoint.read(out / "last.pt")
    assert state["device"] == "cpu"
    state["settings"]["device"] = "auto"
    checkpoint.save(out / "last.pt", state)
    run = start_rounds("--resume", "--out", out, "--device", "cpu")
    assert (len(run.history), run.settings["device"]) == (2, "cpu")
