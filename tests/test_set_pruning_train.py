"""Pruning while training, by its lines: what the loop calls, and MorphNet from search to structure."""
import json
import shlex

import pytest
import torch
from sample_runs import run_in_parts, same
from torch.utils.flop_counter import FlopCounterMode

import experiment
import morphnet
import networks
import profil
import set_pruning_train
import train
import train_pruning
from engine import checkpoint

SHORT = shlex.split("--dataset digits --device cpu --compile off --mixing none --model resnet20 --lr 0.05 "
                    "--batch-size 16 --limit 64 --pruning morphnet --epochs 2 1")


def morph_run(out, *flags):
    train_pruning.main([*SHORT, "--out", str(out), *flags])
    return checkpoint.read(out / "last.pt")


@pytest.fixture(scope="module")
def morphed(tmp_path_factory):
    out = tmp_path_factory.mktemp("morphnet") / "run"
    return out, morph_run(out)


def macs_of(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2


def test_the_structure_is_within_the_budget_and_is_what_was_trained(morphed, capsys):
    out, state = morphed
    model, _ = networks.load_network(out / "model.pt")
    whole = macs_of(networks.build("resnet20"))
    assert 0.4 * whole < macs_of(model) <= 0.5 * whole
    structure = morphnet.read_structure(out / "structure-1.json")
    for space in morphnet.spaces_of(model):
        assert structure[space["name"]] == len(model.get_submodule(space["makers"][0]).weight)
    profil.main(["--checkpoint", str(out / "model.pt"), "--json"])
    assert json.loads(capsys.readouterr().out)["macs"] == macs_of(model)
    assert [row["parameters"] for row in state["history"]][0] == 272_474 > state["history"][2]["parameters"]
    assert (out / "widths-1.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_at_the_search_and_after_it_is_the_run_that_was_not(morphed, tmp_path):
    out = tmp_path / "run"
    run_in_parts(lambda: morph_run(out), out, 3)
    assert same(checkpoint.read(out / "model.pt"), checkpoint.read(morphed[0] / "model.pt"))


def test_the_penalty_is_in_the_loss_of_the_search_alone(tmp_path):
    losses = {}
    for strength in (0.0, 0.5):
        run = experiment.start(train_pruning.__file__, "", train_pruning.SETTINGS, train.RECIPES,
                               [*SHORT, "--morph-strength", str(strength), "--out", str(tmp_path / str(strength))])
        for round_ in (0, 1):
            run.round = round_
            experiment.begin_round(run)
            torch.manual_seed(0)
            images, labels = next(iter(run.validation))
            losses[strength, round_] = train.train_step(run, images[:16], labels[:16], 0)[0].item()
            run.optimizer.zero_grad()
    assert losses[0.5, 0] - losses[0.0, 0] == pytest.approx(0.5 * 2, rel=0.1)      # scales of 1 cost twice the whole
    assert abs(losses[0.5, 1] - losses[0.0, 1]) < 0.2


@pytest.mark.parametrize("flags, error, message", [
    (["--morph-threshold", "5"], RuntimeError, "is alive; .*--morph-threshold 5, --morph-strength 0.1, --lr 0.05"),
    (["--morph-budget", "0.00001"], ValueError, "a budget of .* is below"),
    (["--epochs", "2"], ValueError, "MorphNet takes two numbers or more"),
    (["--morph-cost", "latency"], ValueError, "needs --morph-device"),
    (["--sparsity", "0.5"], ValueError, "no --sparsity"), (["--morph-strength", "-1"], ValueError, "--morph-strength")])
def test_what_cannot_be_is_one_error(flags, error, message, tmp_path):
    with pytest.raises(error, match=message):
        morph_run(tmp_path / "run", *flags)


def test_latency_and_parameters_are_costs_too(tmp_path):
    morph_run(tmp_path / "a", "--epochs", "1", "1", "--morph-cost", "latency", "--morph-device", "1e9", "1e9")
    morph_run(tmp_path / "b", "--epochs", "1", "1", "--morph-cost", "parameters", "--morph-round-to", "4")
    widths = morphnet.read_structure(tmp_path / "b" / "structure-1.json")
    assert all(width % 4 == 0 for width in widths.values())
    size = sum(tensor.numel() for name, tensor in checkpoint.read(tmp_path / "b" / "model.pt")["weights"].items()
               if tensor.dim() > 1)
    assert 0.3 * 270_896 < size <= 0.5 * 270_896


LAYER_BY_LAYER = {"filter_relative": True, "filter_columns": False, "filter_one_layer": True,
                  "filter_measure": "filter", "epochs": [8]}


def test_filters_leave_on_their_epochs_only():
    settings = {**LAYER_BY_LAYER, "filter_interval": 2, "filter_stop": 0.5, "filter_threshold": 0.99, "filter_until": 0}
    model = networks.build("lenet5")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    left = [set_pruning_train.reduce_filters(settings, epoch, model, None, optimizer, {}) for epoch in range(1, 9)]
    assert [bool(text) for text in left] == [False, True, False, True, False, False, False, False]
    assert left[1].startswith("conv1 6 -> ") and left[3].startswith("conv2 16 -> ")


def test_filters_stay_once_few_parameters_are_left():
    settings = {**LAYER_BY_LAYER, "filter_interval": 1, "filter_stop": 1, "filter_threshold": 0.9,
                "filter_until": 40_000}
    model = networks.build("lenet5")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sizes = []
    for epoch in range(1, 9):
        text = set_pruning_train.reduce_filters(settings, epoch, model, None, optimizer, {})
        assert bool(text) == (not sizes or sizes[-1] > 40_000)
        sizes.append(sum(weight.numel() for weight in model.parameters()))
    assert sizes[0] < 61_706 and sizes[-1] <= 40_000 and len(set(sizes)) < 8
    settings["filter_until"] = sizes[-1] - 1                    # one parameter fewer is asked for: more leave
    assert set_pruning_train.reduce_filters(settings, 9, model, None, optimizer, {}) == "" != \
        set_pruning_train.reduce_filters(settings, 8, model, None, optimizer, {})
