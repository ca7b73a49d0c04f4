"""Pruning while training, by its lines: what the loop calls, and MorphNet from search to structure."""
import json
import shlex

import pytest
import torch
from sample_runs import ROUNDS, assert_same_run, history_of, resume, run_in_parts, same, stop_after_a_save
from torch.utils.flop_counter import FlopCounterMode

import experiment
import filter_pruning
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
                  "filter_measure": "filter", "filter_warmup": 0.0, "epochs": [8]}


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


@pytest.mark.parametrize("warmup, thresholds", [
    (0.0, [0.8] * 8), (0.5, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8]), (1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
    (0.05, [0.8] * 8)])                                          # less than an epoch
def test_the_threshold_grows_to_its_value(warmup, thresholds, monkeypatch):
    settings, taken = {**LAYER_BY_LAYER, "filter_interval": 1, "filter_stop": 1, "filter_threshold": 0.8,
                       "filter_until": 0, "filter_warmup": warmup}, []
    monkeypatch.setattr(filter_pruning, "reduce_network",
                        lambda model, threshold, *given: taken.append(threshold) or {})
    model = networks.build("lenet5")
    for epoch in range(1, 9):
        set_pruning_train.reduce_filters(settings, epoch, model, None, None, {})
    assert taken == pytest.approx(thresholds)


# ---- --finetune-lr

@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--optimizer", "muon", "--bias-lr", "2"]])
def test_rounds_behind_a_pruning_train_at_their_share_of_every_rate(flags, tmp_path):
    run = experiment.start(train_pruning.__file__, "", train_pruning.SETTINGS, train.RECIPES,
                           [*ROUNDS, *flags, "--finetune-lr", "0.25", "--peak", "0", "--out", str(tmp_path)])
    rates = []
    for run.round in range(3):
        experiment.begin_round(run)
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    assert rates[0][-1] in (0.15, 0.3) and len(rates[0]) == (3 if "muon" in flags else 1)
    assert rates[1] == rates[2] == pytest.approx([0.25 * rate for rate in rates[0]])


def test_a_share_of_a_half_shows_in_the_history_and_goes_on_bit_for_bit(tmp_path):
    flags = [*ROUNDS, "--model", "lenet5", "--mixing", "none"]
    for name, share in (("whole", []), ("half", ["--finetune-lr", "0.5"])):
        train_pruning.main([*flags, *share, "--out", str(tmp_path / name)])
    rates = {name: [float(row["lr"]) for row in history_of(tmp_path / name)] for name in ("whole", "half")}
    assert rates["half"] == pytest.approx([rate * (1 if place < 2 else 0.5)
                                           for place, rate in enumerate(rates["whole"])], abs=1e-6)
    parts = tmp_path / "parts"
    run_in_parts(lambda: train_pruning.main([*flags, "--finetune-lr", "0.5", "--out", str(parts)]), parts, 5)
    assert_same_run(parts, tmp_path / "half")


@pytest.mark.parametrize("schedule", ["one-cycle", "plateau"])
def test_another_share_for_a_round_that_has_begun_acts_on_its_rate(schedule, tmp_path):
    out, flags = tmp_path / "run", [*ROUNDS, "--model", "lenet5", "--mixing", "none", "--schedule", schedule]
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        for epoch in range(4):                                      # the second one of the last round is still to come
            with pytest.raises(Exception, match="^$"):
                train_pruning.main(["--resume", "--out", str(out)] if epoch else [*flags, "--out", str(out)])
    stood = checkpoint.read(out / "last.pt")["optimizer"]["param_groups"][0]["lr"]
    with pytest.raises(ValueError, match="finetune_lr: 1.0 then, 0.1 now"):
        resume(out, "--finetune-lr", "0.1")
    resume(out, "--finetune-lr", "0.1", "--force")
    assert float(history_of(out)[-1]["lr"]) == pytest.approx(0.1 * stood, abs=1e-6)


def test_rounds_that_search_or_train_from_scratch_keep_their_rate(tmp_path, capsys):
    run = experiment.start(train_pruning.__file__, "", train_pruning.SETTINGS, train.RECIPES,
                           [*SHORT, "--finetune-lr", "0.5", "--out", str(tmp_path)])
    assert "--finetune-lr 0.5 changes nothing without --pruning rounds or l1_cycle" in capsys.readouterr().err
    run.round = 1
    experiment.begin_round(run)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * run.schedule.lr_lambdas[0](0))


def test_fine_tuning_in_an_l1_cycle_has_a_rate_of_its_own(tmp_path):
    settings = {"finetuning_epochs": 1, "stop_loss": 1e9, "pruning_percent_step": 0.5,
                "pruning_standard_deviation_part": 0}
    (tmp_path / "cycle.json").write_text(json.dumps(settings))
    train_pruning.main(shlex.split(f"--dataset digits --limit 64 --batch-size 32 --compile off --device cpu "
                                   f"--mixing none --model lenet5-student --pruning l1_cycle --epochs 1 --peak 0 "
                                   f"--finetune-lr 0.1 --lr 0.02 --cycle {tmp_path}/cycle.json --out {tmp_path}/run"))
    rates = [float(row["lr"]) for row in history_of(tmp_path / "run")]
    assert len(rates) > 2 and rates == [0.02] + [0.002] * (len(rates) - 1)
