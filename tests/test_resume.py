"""A run that was stopped goes on as if it had not been: bit for bit, or it says why not."""
import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Stop, run_in_parts, same, stop_after_a_save

import checkpoint
import commandline
import compiling
import experiment
import networks
import pruning
import train
import train_pruning

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 5
ROUNDS = shlex.split("--dataset digits --limit 96 --batch-size 32 --compile off --device cpu --seed 3 --epochs 2 1 2 "
                     "--sparsity 0.7 0.7")
SHORT = shlex.split("--dataset digits --limit 32 --batch-size 32 --compile off --device cpu")


def without_times(rows):
    """Rows of a history without what the clock gave."""
    return [{name: value for name, value in row.items() if name not in ("images_per_second", "seconds")}
            for row in rows]


def history_of(out):
    """Rows of history.csv, as text; none while there is no file."""
    path = Path(out) / "history.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def assert_same_run(out, other):
    """Result, checkpoints and history of two runs agree to the bit, times and folder aside."""
    assert same(checkpoint.read(out / "model.pt"), checkpoint.read(other / "model.pt"))
    for name in ("last.pt", "previous.pt"):
        one, two = checkpoint.read(out / name), checkpoint.read(other / name)
        for state in (one, two):
            state["history"] = without_times(state["history"])
            del state["settings"]
        assert [key for key in one if not same(one[key], two[key])] == [], name
    assert without_times(history_of(out)) == without_times(history_of(other))


def start(*flags):
    """A run of train_pruning.py, about to train."""
    return experiment.start(train_pruning.__file__, "", train_pruning.ROUNDS, train.RECIPES, list(map(str, flags)),
                               train_pruning.add_flags)


def resume(out, *flags):
    """Go on with the run in `out`, to its end."""
    train_pruning.main(["--resume", "--out", str(out), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread):
    """A run of three rounds that nothing disturbed: its folder, and last.pt as it was after each epoch."""
    out, states, real = tmp_path_factory.mktemp("finished") / "run", [], train.save

    def save(run):
        real(run)
        states.append(checkpoint.read(run.out / "last.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", save)
        train_pruning.main([*ROUNDS, "--out", str(out)])
    return SimpleNamespace(out=out, states=states)


def folder_after(finished, epochs, folder):
    """A copy of the run's folder as it was after so many epochs."""
    folder.mkdir()
    for number in range(max(1, epochs - 1), epochs + 1):
        checkpoint.save(folder / "last.pt", finished.states[number - 1], folder / "previous.pt")
    return folder


def launch(*arguments):
    """train_pruning.py in a process of its own, on one thread."""
    return subprocess.Popen([sys.executable, "train_pruning.py", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})


def wait_for(process, condition):
    """Return as soon as `condition()` holds, within a quarter of an hour and while the process runs."""
    deadline = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The same run, with Ctrl-C pressed twice after the first epoch: folder, exit code, both outputs."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    process = launch(*ROUNDS, "--out", out)
    wait_for(process, lambda: (out / "last.pt").exists())
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    return SimpleNamespace(out=out, code=process.returncode, output=output, errors=errors)


# ---- bit for bit

def test_stopped_after_every_epoch_is_the_run_that_was_not(finished, tmp_path):
    run_in_parts(lambda: train_pruning.main([*ROUNDS, "--out", str(tmp_path / "run")]), tmp_path / "run", EPOCHS)
    assert_same_run(tmp_path / "run", finished.out)


def test_interrupted_then_killed_is_the_run_that_was_not(finished, interrupted, tmp_path):
    """Another process each time; killed as the row of the pruned network's first epoch appears, so within a save."""
    out = Path(shutil.copytree(interrupted.out, tmp_path / "run"))
    process = launch("--resume", "--out", out)
    wait_for(process, lambda: len(history_of(out)) == 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoint.read(out / "last.pt")["history"]
    resume(out)
    assert_same_run(out, finished.out)
    assert not list(out.glob("*.partial"))


def test_another_seed_is_another_run(finished, tmp_path, monkeypatch):
    stop_after_a_save(monkeypatch)
    with pytest.raises(Stop):
        train_pruning.main([*ROUNDS, "--seed", "4", "--out", str(tmp_path / "run")])
    assert not same(checkpoint.read(tmp_path / "run" / "last.pt")["weights"], finished.states[0]["weights"])


def test_resuming_a_finished_run_gives_the_same_result(finished, tmp_path):
    out = folder_after(finished, EPOCHS, tmp_path / "run")
    resume(out)
    assert same(checkpoint.read(out / "model.pt"), checkpoint.read(finished.out / "model.pt"))


def test_damaged_last_is_mended_by_the_command_that_is_offered(finished, tmp_path):
    out = folder_after(finished, EPOCHS, tmp_path / "run")
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:100_000])
    (out / "last.pt.partial").write_bytes(b"left by a killed save")
    with pytest.raises(ValueError, match="damaged.*cp ") as problem:
        resume(out)
    assert sorted(os.listdir(out)) == ["last.pt", "last.pt.partial", "previous.pt"]
    subprocess.run(shlex.split(str(problem.value).split("go on from it with: ")[1]), check=True)
    resume(out)
    assert_same_run(out, finished.out)
    assert not list(out.glob("*.partial"))


def test_published_recipe_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Its loaders draw from torch's global generator."""
    flags = [*SHORT, "--recipe", "published", "--epochs", "2"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(Stop):
            train.main([*flags, "--out", str(tmp_path / "parts")])
    torch.manual_seed(1000)
    train.main(["--resume", "--out", str(tmp_path / "parts")])
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("flags", [
    "--weights binary --mixing mixup --recalibrate --sparsity 0.5",
    "--weights binary-stochastic --binary-scale glorot --mix-per-sample --score lamp --exclude conv1 --sparsity 0.5",
    "--weights binary --averaging none --pruning polynomial --prune-frequency 1 --sparsity 0.8"])
def test_techniques_together_go_on_bit_for_bit(flags, tmp_path):
    flags = [*SHORT, "--batch-size", "16", "--epochs", "2", "1", *shlex.split(flags)]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(tmp_path / "parts")]), tmp_path / "parts", 3)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_the_faster_form_of_grouped_convolutions_is_kept(tmp_path, monkeypatch):
    """As on CUDA, where both are timed; here the times are made up, and turned round when the run goes on."""
    flags, real = [*SHORT, "--batch-size", "16", "--epochs", "2", "1", "--sparsity", "0.5"], compiling.choose_forward
    forms = []

    def forms_of(wanted, model, device):
        forms.append(wanted)
        return ["grouped", "dense"] if wanted == "auto" else [wanted]

    def choose_forward(model, *arguments):
        forward, _, note = real(model, *arguments)
        dense = any(isinstance(layer, compiling.BlockDiagonalConv2d) for layer in model.modules())
        return forward, 2.0 if dense == (len(forms) == 1) else 1.0, note
    monkeypatch.setattr(compiling, "forms_of", forms_of)
    monkeypatch.setattr(compiling, "choose_forward", choose_forward)
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(tmp_path / "parts")]), tmp_path / "parts", 3)
    assert forms == ["auto", *["dense"] * 3] and checkpoint.read(tmp_path / "parts" / "last.pt")["form"] == "dense"
    monkeypatch.undo()
    train_pruning.main([*flags, "--convolutions", "dense", "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    forced = start("--resume", "--force", "--convolutions", "grouped", "--out", tmp_path / "parts")
    assert forced.form == "grouped"


def test_run_begun_before_a_setting_existed_goes_on_with_its_default(finished, tmp_path):
    out = folder_after(finished, 4, tmp_path / "run")
    state = checkpoint.read(out / "last.pt")
    for name in ("mix_per_sample", "recalibrate", "exclude"):
        del state["settings"][name]
    checkpoint.save(out / "last.pt", state)
    resume(out)
    assert same(checkpoint.read(out / "model.pt"), checkpoint.read(finished.out / "model.pt"))


# ---- pruned weights

def assert_zeros(state, masks):
    """The dropped weights are exactly zero in the network, in its average and in the momentum."""
    names = list(state["weights"])
    for name, mask in masks.items():
        assert bool((state["weights"][name][~mask] == 0).all()), name
        if state.get("average") is not None:
            assert bool((state["average"][name][~mask] == 0).all()), f"average of {name}"
    assert set(masks) <= set(names)


def test_pruned_weights_are_zero_in_every_file(finished):
    assert [len(state["masks"]) for state in finished.states[:2]] == [0, 0]
    for state in finished.states[2:]:
        assert_zeros(state, state["masks"])
        buffers = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
        parameters = dict(networks.load_network(finished.out / "model.pt")[0].named_parameters())
        for name, buffer in zip(parameters, buffers, strict=True):
            assert name not in state["masks"] or bool((buffer[~state["masks"][name]] == 0).all()), name
    masks = finished.states[-1]["masks"]
    for name in ("last.pt", "previous.pt", "model.pt"):
        assert_zeros(checkpoint.read(finished.out / name), masks)


def test_sparsity_compounds_and_never_falls(finished):
    shares, kept = [], None
    for state in finished.states[2:]:
        total = sum(mask.numel() for mask in state["masks"].values())
        shares.append(1 - sum(int(mask.sum()) for mask in state["masks"].values()) / total)
        assert kept is None or not any(bool((mask & ~kept[name]).any()) for name, mask in state["masks"].items())
        kept = state["masks"]
    assert shares == pytest.approx([0.7, 0.91, 0.91], abs=1e-4)
    recorded = [float(row["sparsity"]) for row in history_of(finished.out)]
    assert recorded[:2] == [0, 0] and recorded[2:] == pytest.approx(shares, abs=2e-5)
    model = networks.load_network(finished.out / "model.pt")[0]
    assert pruning.sparsity_of(model) == pytest.approx(0.91, abs=1e-4)


def test_result_is_the_averaged_network(finished):
    state = finished.states[-1]
    assert same(checkpoint.read(finished.out / "model.pt")["weights"], state["average"])
    assert not same(state["average"], state["weights"])


def test_momentum_and_decay_do_not_revive_pruned_weights(tmp_path):
    run = start(*SHORT, "--epochs", 1, 1, "--sparsity", 0.8, "--weight-decay", 0.1, "--out", tmp_path / "run")
    train_pruning.prune(run)
    experiment.begin_round(run)
    for parameter in run.model.parameters():
        run.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    before = checkpoint.weights_of(run.model)
    train.fit(run)
    state = checkpoint.read(tmp_path / "run" / "last.pt")
    assert_zeros(state, run.masks)
    assert_zeros({"weights": checkpoint.weights_of(run.model)}, run.masks)
    assert not same(state["weights"]["linear.weight"], before["linear.weight"]), "it has trained"


# ---- refused

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
    assert start("--resume", "--dry-run") is None
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
        commandline.settings_to_resume(state, lines, {"resume": True, "out": "a"})
    forced = commandline.settings_to_resume(state, lines, {"resume": True, "out": "a", "force": True})
    assert (forced["mixing"], forced["out"], forced["seed"]) == ("none", "a", 3)
    kept = commandline.settings_to_resume(state, lines, {"resume": True, "out": "a", "mixing": "cutmix"})
    assert kept["mixing"] == "cutmix"


def test_force_accepts_other_settings_and_they_take_effect(finished, tmp_path):
    out = folder_after(finished, 4, tmp_path / "run")
    run = start("--resume", "--out", out, "--force", "--lr", 0.3, "--weight-decay", 0.01, "--momentum", 0.5)
    assert (run.settings["lr"], run.settings["weight_decay"], run.settings["seed"]) == (0.3, 0.01, 3)
    assert (run.round, run.epoch, len(run.history)) == (2, 1, 4)
    group = run.optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)
    run.schedule.step()
    assert group["lr"] == pytest.approx(0.3 * experiment.one_cycle(4 / 6)), "4 of the round's 6 steps are done"


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
    assert start("--resume", "--out", out, "--force", "--averaging", "ema").average is not None


def test_force_of_another_network_names_the_tensors(finished, tmp_path):
    out = folder_after(finished, 2, tmp_path / "run")
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight is 64x8x3x3 in the file, 64x16x3x3 in the network"):
        resume(out, "--force", "--groups", "4")


def test_resume_from_a_file_of_weights_alone_is_refused(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished.out / "model.pt", tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match="last.pt"):
        resume(tmp_path / "run")


# ---- Ctrl-C

def test_ctrl_c_twice_is_one_line_with_the_way_on(interrupted):
    assert interrupted.code == 130
    assert interrupted.errors.count("\n") == 1, interrupted.errors
    line = interrupted.errors.strip()
    epochs = len(checkpoint.read(interrupted.out / "last.pt")["history"])
    assert line == (f"error: interrupted; {interrupted.out}/last.pt holds {epochs} whole epochs, go on with: "
                    f"python train_pruning.py --resume --out {interrupted.out}")
    assert not (interrupted.out / "model.pt").exists()


def test_ctrl_c_before_the_first_save_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="nothing was saved before the first epoch's end"):
        train_pruning.main([*ROUNDS, "--out", str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("*.pt"))


def test_ctrl_c_during_a_save_waits_and_names_it(finished, tmp_path, monkeypatch):
    out, real = folder_after(finished, 4, tmp_path / "run"), os.fsync

    def fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("last.pt.partial"):
            os.kill(os.getpid(), signal.SIGINT)
        return real(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="last.pt holds 5 whole epochs, go on with: python train_pruning"):
            resume(out)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same(checkpoint.read(out / "last.pt")["weights"], finished.states[4]["weights"])
    assert same(checkpoint.read(out / "previous.pt")["weights"], finished.states[3]["weights"])


def test_ctrl_c_just_before_a_save_counts_what_the_file_holds(finished, tmp_path, monkeypatch):
    out, real = folder_after(finished, 4, tmp_path / "run"), experiment.state_of

    def state_of(run):
        os.kill(os.getpid(), signal.SIGINT)
        return real(run)
    monkeypatch.setattr(experiment, "state_of", state_of)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            resume(out)
    finally:
        signal.signal(signal.SIGINT, handler)
    epochs = len(checkpoint.read(out / "last.pt")["history"])
    assert f"last.pt holds {epochs} whole epochs" in str(stopped.value)


@pytest.mark.parametrize("epochs, place", [(2, "prune"), (EPOCHS, "finish")])
def test_ctrl_c_between_rounds_names_the_checkpoint(finished, tmp_path, monkeypatch, epochs, place):
    out = folder_after(finished, epochs, tmp_path / "run")
    monkeypatch.setattr(train_pruning, place, lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match=f"last.pt holds {epochs} whole epochs, go on with: python train_prun"):
        resume(out)
