"""A run that was stopped goes on as if it had not been: bit for bit."""
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from sample_runs import (
    EPOCHS,
    ROUNDS,
    SMALL,
    Stop,
    assert_same_run,
    folder_after,
    history_of,
    launch,
    resume,
    run_in_parts,
    same,
    start_rounds,
    stop_after_a_save,
    wait_for,
)

import experiment
import morphnet
import networks
import pruning
import train
import train_pruning
from engine import checkpoint, compiling

pytestmark = pytest.mark.usefixtures("one_thread")


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
    flags = [*SMALL, "--recipe", "published", "--epochs", "2"]
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
    flags = [*SMALL, "--batch-size", "16", "--epochs", "2", "1", *shlex.split(flags)]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(tmp_path / "parts")]), tmp_path / "parts", 3)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_the_faster_form_of_grouped_convolutions_is_kept(tmp_path, monkeypatch):
    """As on CUDA, where both are timed; here the times are made up, and turned round when the run goes on."""
    flags, real = [*SMALL, "--batch-size", "16", "--epochs", "2", "1", "--sparsity", "0.5"], compiling.choose_forward
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
    forced = start_rounds("--resume", "--force", "--convolutions", "grouped", "--out", tmp_path / "parts")
    assert forced.form == "grouped"


def laid_out(model):
    """Whether each layer computes as those of a run of dense convolutions do, in form and memory layout."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    return all((type(layer) is compiling.BlockDiagonalConv2d) == (1 < layer.groups < layer.in_channels)
               and layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in layers)


def test_layers_that_morphnet_replaces_compute_as_the_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr(morphnet, "draw_widths", lambda *given: None)
    run = start_rounds(*SMALL, "--pruning", "morphnet", "--epochs", 1, 1, "--convolutions", "dense", "--out",
                       tmp_path / "run")
    experiment.begin_round(run)
    before = sum(parameter.numel() for parameter in run.model.parameters())
    assert laid_out(run.model)
    train_pruning.morph(run)
    assert sum(parameter.numel() for parameter in run.model.parameters()) < before and laid_out(run.model)


def test_filters_that_leave_change_neither_form_nor_layout_nor_what_a_resumed_run_does(tmp_path, monkeypatch):
    """Some layers keep one channel a group, and are depthwise from then on."""
    right, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, *batch: right.append(laid_out(run.model)) or real(run, *batch))
    flags = [*SMALL, "--limit", "8", "--batch-size", "8", "--convolutions", "dense", "--pruning", "filters", "--epochs",
             "2", "--filter-threshold", "0.97", "--filter-interval", "1", "--filter-stop", "1"]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(tmp_path / "parts")]), tmp_path / "parts", 2)
    assert right == [True] * 4
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


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
    run = start_rounds(*SMALL, "--epochs", 1, 1, "--sparsity", 0.8, "--weight-decay", 0.1, "--out", tmp_path / "run")
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


# ---- what a step works on

def test_weights_that_move_to_their_layout_are_averaged_where_they_are_then(tmp_path):
    """As on resuming: one input and one pixel are no layout to torch, which copies such weights each time."""
    run = start_rounds(*SMALL, "--epochs", 1, 1, "--sparsity", 0.5, "--groups", 64, "--out", tmp_path / "run")
    experiment.begin_round(run)
    experiment.lay_out(run)
    averages, weights, counts, others = run.averaged
    for network, tensors in ((run.average, [*averages, *counts]), (run.model, [*weights, *others])):
        held = {tensor.data_ptr() for tensor in tensors}
        assert not [name for name, tensor in network.state_dict().items() if tensor.data_ptr() not in held]
