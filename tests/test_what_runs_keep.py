"""What holds of a run when it goes on, is measured or is told of later: arithmetic, numbers, settings, folders."""
import json
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from sample_runs import QUICK, Stop, history_of, part_of, resume, start_rounds, stop_after_a_save
from test_study import call_here, study_file

import experiment
import export
import networks
import profil
import report
import study
import test as half_test
import train
import train_pruning
from engine import checkpoint, compiling, files, run_files, run_plots, shrinking, small_images
from engine.widths import widths_of
from studies import study_file as studied

# ---- an L1 cycle, which ends with a network that it refuses

@pytest.fixture(scope="module")
def cycle(tmp_path_factory):
    """An L1 cycle, tested and profiled, whose last step was refused."""
    folder = tmp_path_factory.mktemp("cycle")
    (folder / "cycle.json").write_text(json.dumps({"finetuning_epochs": 1, "pruning_percent_step": 0.9,
                                                   "pruning_standard_deviation_part": 0}))
    train_pruning.main([*shlex.split("--dataset digits --limit 300 --batch-size 32 --compile off --device cpu "
                                     "--mixing none --model lenet5-student --pruning l1_cycle --epochs 6 --lr 0.05"),
                        "--finetune-lr", "0.001", "--cycle", str(folder / "cycle.json"), "--out", str(folder / "run")])
    for script in (half_test, profil):
        script.main(["--checkpoint", str(folder / "run" / "model.pt")])
    return folder / "run"


def test_the_numbers_of_a_cycle_are_those_of_the_network_that_it_kept(cycle, tmp_path, capsys):
    kept = checkpoint.read(cycle / "model.pt")["epochs"]
    assert kept < len(history_of(cycle))                                    # else this test shows nothing
    report.main([str(cycle), "--out", str(tmp_path)])
    assert "left out" not in capsys.readouterr().err
    expected = float(history_of(cycle)[kept - 1]["validation_accuracy"])
    measured = json.loads((cycle / "report.json").read_text())["test"]["accuracy"]
    for folder in (cycle, tmp_path / "run"):                                # and its copy, beside which is no network
        run = report.read_run(folder)
        assert (run["validation_accuracy"], run["test_accuracy"]) == (expected, measured)
        assert run["nonzero"] is not None


def test_seeds_of_a_cycle_share_a_row_however_many_steps_each_took(cycle, tmp_path):
    longer = shutil.copytree(cycle, tmp_path / "longer")
    config = json.loads((longer / "config.json").read_text())
    config["settings"] |= {"seed": 1, "epochs": [6, 1, 1]}                  # as one that was resumed has them
    (longer / "config.json").write_text(json.dumps(config))
    history = pd.read_csv(longer / "history.csv")
    again = history.tail(1).assign(round=history["round"].max() + 1, seconds=9)
    pd.concat([history, again]).to_csv(longer / "history.csv", index=False)
    report.main([str(cycle), str(longer), "--out", str(tmp_path / "out")])
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert (table["n"].tolist(), table["epochs"].tolist(), table["pruning"].tolist()) == (
        [2], ["6, then 1 a step"], ["l1_cycle"])


def test_the_plot_of_a_run_that_lost_filters_tells_its_parameters(cycle):
    row = pd.read_csv(cycle / "history.csv").iloc[-1]
    assert run_plots.pruned_to(row) == f"{int(row['parameters']):,} parameters"
    assert run_plots.pruned_to(row.drop("parameters")) == "pruned to 0%"
    assert run_plots.pruned_to(pd.Series({"sparsity": 0.7, "parameters": 9})) == "pruned to 70%"


def test_a_cycle_begins_with_the_network_of_a_runs_folder(cycle, tmp_path):
    settings = tmp_path / "cycle.json"
    settings.write_text(json.dumps({"finetuning_epochs": 1, "input_model_path": str(cycle)}))
    run = start_rounds(*shlex.split(
        "--dataset digits --limit 64 --batch-size 32 --compile off --device cpu --mixing none --model lenet5-student "
        "--pruning l1_cycle --epochs 1 --cycle"), settings, "--out", tmp_path / "run")
    kept = checkpoint.read(cycle / "model.pt")["weights"]
    assert torch.equal(run.model.state_dict()["linear1.weight"], kept["linear1.weight"])
    sha256 = json.loads((tmp_path / "run" / "config.json").read_text())["sha256"]
    assert sha256 == {"start": files.sha256_of(cycle / "model.pt")}


def test_a_cycle_measured_before_it_went_on_is_told(cycle, tmp_path):
    folder = shutil.copytree(cycle, tmp_path / "run")
    checkpoint.save(folder / "model.pt", {**checkpoint.read(folder / "model.pt"), "epochs": 1})
    assert "does not hold any more" in run_files.outdated(folder)["test"]


# ---- what was measured, and on which file

@pytest.mark.parametrize("name", ["epoch1.pt", "previous.pt", "exported.pt.gz"])
def test_numbers_of_another_file_in_the_folder_are_not_those_of_the_run(name, tmp_path):
    out = part_of(tmp_path / "run", "--epochs", "2", "1", "--sparsity", "0.5", epochs=2)
    if name == "exported.pt.gz":
        export.main(["--checkpoint", str(out / "last.pt"), "--out", str(out / name), "--no-compare"])
    elif name != "previous.pt":
        shutil.copy(out / "last.pt", out / name)
    for script in (half_test, profil):
        script.main(["--checkpoint", str(out / name)])
    assert not (out / "report.json").exists()


def test_numbers_of_an_unfinished_run_are_outdated_once_it_goes_on(tmp_path):
    out = part_of(tmp_path / "run", "--epochs", "2", "1", "--sparsity", "0.5")
    for script in (half_test, profil):
        script.main(["--checkpoint", str(out / "last.pt")])
    assert json.loads((out / "report.json").read_text())["test"]["epochs"] == 1 and run_files.outdated(out) == {}
    resume(out)
    assert set(run_files.outdated(out)) == {"test", "profile"}


def test_a_file_that_changed_while_it_was_tested_is_not_kept(tmp_path, monkeypatch, capsys):
    out, measure = part_of(tmp_path / "run", "--epochs", "2", "1", "--sparsity", "0.5"), half_test.test_network

    def test_network(*given):
        result = measure(*given)
        state = checkpoint.read(out / "last.pt")
        checkpoint.save(out / "last.pt", {**state, "planned": 7})
        return result
    monkeypatch.setattr(half_test, "test_network", test_network)
    half_test.main(["--checkpoint", str(out / "last.pt")])
    told = capsys.readouterr()
    assert "accuracy" in told.out and "last.pt has changed since it was read" in told.err
    assert not (out / "report.json").exists()


# ---- what a resumed run looks at again

@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_force_holds_for_the_command_that_has_it(flags, tmp_path):
    for seed in (0, 1):
        train.main([*QUICK, "--seed", str(seed), "--out", str(tmp_path / f"teacher{seed}")])
    teacher = tmp_path / "teacher0" / "model.pt"
    out = part_of(tmp_path / "run", "--teacher", str(teacher), "--epochs", "2", "1", "--sparsity", "0.5", "--force")
    shutil.copy(tmp_path / "teacher1" / "model.pt", teacher)
    if flags:
        return resume(out, *flags)
    with pytest.raises(ValueError, match="is not the one that the run in .* began with; --force goes on with it"):
        resume(out)


def test_an_edited_cycle_is_noticed_without_its_flag(tmp_path):
    cycle = tmp_path / "cycle.json"
    cycle.write_text(json.dumps({"finetuning_epochs": 1, "pruning_percent_step": 0.9}))
    out = part_of(tmp_path / "run", "--pruning", "l1_cycle", "--epochs", "2", "--cycle", str(cycle))
    cycle.write_text(json.dumps({"finetuning_epochs": 1, "pruning_percent_step": 0.9, "stop_loss": 3}))
    with pytest.raises(ValueError, match="cycle_settings"):
        resume(out)
    cycle.unlink()
    resume(out)


def test_a_layer_that_lost_its_channels_is_the_one_that_a_resumed_run_has(monkeypatch):
    monkeypatch.setattr(compiling, "cpu_instructions", lambda: {"amx_bf16": True})
    model = networks.build("vgg6-64-256-256", activation="relu")
    small_images.use_products(model)
    before = [type(layer) for layer in model.modules()]
    space = next(space for space in model.channels() if space["name"] == "layer2.conv1")
    shrinking.remove(model, space, torch.arange(200))
    small_images.use_products(model)
    resumed = networks.build("vgg6-64-256-256", activation="relu")
    checkpoint.load_weights(resumed, None, {"weights": checkpoint.weights_of(model), "widths": widths_of(model),
                                            "architecture": None})
    small_images.use_products(resumed)
    after = [type(layer) for layer in model.modules()]
    assert after == [type(layer) for layer in resumed.modules()] != before
    assert small_images.SmallImageConv2d in after


@pytest.mark.parametrize("began, now, told", [(True, True, None), (False, False, None), (None, True, None),
                                              (True, False, "began compiled, and now it would be eager")])
def test_a_run_goes_on_compiled_or_not_as_it_began(began, now, told, tmp_path, monkeypatch):
    out, asked = tmp_path / "run", []

    def choose_forward(model, wanted, *rest):
        asked.append(wanted)
        return (model if wanted == "off" or not now else lambda images: model(images)), 1.0, "eager (no compiler)"
    monkeypatch.setattr(experiment.compiling, "choose_forward", choose_forward)
    flags = [*QUICK[:QUICK.index("--compile")], *QUICK[QUICK.index("--compile") + 2:]]
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(Stop):
            train.main([*flags, "--epochs", "2", "--out", str(out)])
    checkpoint.save(out / "last.pt", {**checkpoint.read(out / "last.pt"), "compiled": began})
    if told:
        with pytest.raises(ValueError, match=told):
            train.main(["--resume", "--out", str(out)])
        return train.main(["--resume", "--compile", "off", "--force", "--out", str(out)])
    train.main(["--resume", "--out", str(out)])
    assert asked[-1] == ("off" if began is False else "auto")
    assert checkpoint.read(out / "last.pt")["compiled"] is now


# ---- side products

def test_tensorboard_that_fails_leaves_the_run_alone(tmp_path, monkeypatch, capsys):
    def opened(folder, rows):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(experiment.board, "opened", opened)
    train.main([*QUICK, "--epochs", "2", "--tensorboard", "--out", str(tmp_path / "run")])
    assert len(history_of(tmp_path / "run")) == 2 and (tmp_path / "run" / "model.pt").exists()
    assert capsys.readouterr().err.count("note: [Errno 28] No space left on device") == 2


def test_a_run_goes_on_without_the_package_of_tensorboard(tmp_path, monkeypatch, capsys):
    out = part_of(tmp_path / "run", "--epochs", "1", "1", "--sparsity", "0.5", "--tensorboard")
    monkeypatch.setattr(experiment.board.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs a package"):
        resume(out, "--tensorboard")
    resume(out)
    assert "note: --tensorboard needs a package" in capsys.readouterr().err and len(history_of(out)) == 2


def test_a_run_that_diverges_before_filters_leave_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite: epoch 1, step 1, .*last good checkpoint: none yet"):
        train_pruning.main([*QUICK, *shlex.split("--epochs 2 --pruning filters --filter-interval 1 --filter-stop 1 "
                                                 "--lr 1e30"), "--out", str(tmp_path / "run")])


# ---- arithmetic

@pytest.mark.parametrize("began, native, expected", [("bfloat16", True, "bfloat16"), ("float32", True, "float32"),
                                                     ("bfloat16", False, "float32"), (None, True, "float32")])
def test_a_run_goes_on_in_the_arithmetic_in_which_it_began(began, native, expected, tmp_path, monkeypatch):
    out = part_of(tmp_path / "run", "--epochs", "1", "1", "--sparsity", "0.5")
    monkeypatch.setattr(compiling, "has_bfloat16", lambda: native)
    state = checkpoint.read(out / "last.pt")
    assert state["arithmetic"] == "float32"
    checkpoint.save(out / "last.pt", {**state, "arithmetic": began})
    resume(out)
    assert checkpoint.read(out / "last.pt")["arithmetic"] == expected


# ---- values and moments of pruning

@pytest.mark.parametrize("flags", ["--pruning polynomial --epochs 5 -1 3", "--pruning constant --epochs 0 0 3",
                                   "--pruning filters --epochs 5 -1 3", "--pruning l1_cycle --epochs 5 0"])
def test_each_of_the_epochs_that_one_round_takes_is_checked(flags, tmp_path):
    with pytest.raises(ValueError, match="--epochs .*: each must be at least 1"):
        train_pruning.main([*QUICK, *flags.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_each_of_the_sparsities_that_a_run_goes_on_with_is_checked(tmp_path):
    out = part_of(tmp_path / "run", "--pruning", "polynomial", "--epochs", "1", "1", "2")
    with pytest.raises(ValueError, match="--sparsity 2.0 1.9: each must be at least 0 and below 1"):
        resume(out, "--force", "--sparsity", "2", "1.9", "--epochs", "1", "1", "2")


@pytest.mark.parametrize("first, done, late", [
    ("--pruning polynomial --epochs 6 --sparsity 0.5 --prune-end 0.5", 4, "--sparsity 0.9"),
    ("--pruning polynomial --epochs 6 --sparsity 0.5 --prune-end 0.5", 4, "--score lamp"),
    ("--pruning polynomial --epochs 2 --sparsity 0.5 --prune-end 1", 2, "--sparsity 0.9"),
    ("--epochs 1 2 --sparsity 0.5", 2, "--macs 100000"), ("--epochs 1 2 --sparsity 0.5", 2, "--exclude conv1")])
def test_what_the_last_pruning_would_have_read_comes_too_late_behind_it(first, done, late, tmp_path):
    out = part_of(tmp_path / "run", *first.split(), epochs=done)
    before = (out / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=f"{late} comes too late: the last pruning of this run is over"):
        resume(out, "--force", *late.split())
    assert (out / "last.pt").read_bytes() == before


def test_what_the_last_pruning_reads_may_change_before_it(tmp_path):
    out = part_of(tmp_path / "run", *shlex.split("--pruning polynomial --epochs 6 --sparsity 0.5 --prune-end 0.5"),
                  epochs=3)
    resume(out, "--force", "--sparsity", "0.9")
    assert float(history_of(out)[-1]["sparsity"]) == pytest.approx(0.9, abs=0.001)


def test_a_budget_that_a_later_search_cannot_keep_is_refused_before_training(tmp_path):
    flags = shlex.split("--dataset digits --compile off --device cpu --mixing none --pruning morphnet --epochs 5 5 12")
    with pytest.raises(ValueError, match="a budget of .* is below"):
        train_pruning.main([*flags, "--morph-budget", "0.05", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    train_pruning.main([*flags, "--morph-budget", "0.06", "--dry-run", "--out", str(tmp_path / "run")])


# ---- tables

def test_a_run_older_than_a_setting_shares_the_row_of_its_method(tmp_path):
    for seed in (0, 1):
        train.main([*QUICK, "--epochs", "1", "--seed", str(seed), "--out", str(tmp_path / f"s{seed}")])
    config = json.loads((tmp_path / "s0" / "config.json").read_text())
    for name in ("finetune_lr", "optimizer", "flips"):
        del config["settings"][name]
    (tmp_path / "s0" / "config.json").write_text(json.dumps(config))
    report.main([str(tmp_path / "s0"), str(tmp_path / "s1"), "--out", str(tmp_path / "out")])
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["n"].tolist() == [2] and "optimizer" not in table["other_settings"][0]


def test_an_arm_whose_teacher_is_a_folder_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    arms = [{"group": "g", "name": name, "run": f"train.py --mixing none --model lenet5{more}"} for name, more in
            (("teacher", ""), ("student", "-student --teacher ./runs/small-teacher-s{seed}/"))]
    path = study_file(tmp_path, seeds=[0], arms=arms)
    for flags in ([], ["--finished"], []):
        study.main([str(path), *flags])
        assert pd.read_csv("results/small/table.csv")["n"].tolist() == [1, 1]
    stored = run_files.read_config(Path("runs/small-student-s0"))["settings"]["teacher"]
    assert stored == "runs/small-teacher-s0/model.pt" == studied.settings_of(
        studied.read_study(path), {"name": "student", "run": arms[1]["run"]}, 0)["teacher"]


@pytest.mark.parametrize("left", ["last.pt.partial", "views.pt.partial", "config.json.partial"])
def test_an_arm_that_was_killed_in_its_first_save_begins_again(left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    folder = tmp_path / "runs" / "small-a-s0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"settings": {}}')
    (folder / left).write_bytes(b"x")
    study.main([str(study_file(tmp_path, seeds=[0], arms=[
        {"group": "g", "name": "a", "run": "train.py --mixing none --model lenet5"}]))])
    assert pd.read_csv("results/small/table.csv")["n"].tolist() == [1]
    assert not list(folder.glob("*.partial"))


def test_a_new_arm_leaves_the_rows_of_the_others_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    arms = [{"group": "g", "name": name, "run": f"train.py --mixing none --model lenet5 --lr {lr}"}
            for name, lr in (("a", 0.1), ("b", 0.05))]
    study.main([str(study_file(tmp_path, seeds=[0, 1], arms=arms[:1]))])
    tables, write = [], study.write_results
    monkeypatch.setattr(study, "write_results", lambda *given: tables.append(write(*given)) or tables[-1])
    study.main([str(study_file(tmp_path, seeds=[0, 1], arms=arms))])
    assert [table["n"].tolist() for table in tables[1:]] == [[2], [2, 1], [2, 2]]
    assert pd.read_csv("results/small/runs.csv")[["arm", "seed"]].to_numpy().tolist() == [
        ["a", 0], ["b", 0], ["a", 1], ["b", 1]]


def test_the_first_seed_keeps_its_files_when_it_is_trained_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "call", call_here)
    path = study_file(tmp_path, seeds=[0, 1], arms=[{"group": "g", "name": "a", "keep": {"history.csv": "epochs.csv"},
                                                     "run": "train.py --mixing none --model lenet5"}])
    for seeds, first in ((["--seeds", "1"], 1), ([], 0), (["--finished"], 0)):
        study.main([str(path), *seeds])
        kept = Path("results/small/epochs.csv").read_bytes()
        assert kept == Path(f"runs/small-a-s{first}/history.csv").read_bytes()
