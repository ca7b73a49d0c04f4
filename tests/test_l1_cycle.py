"""The L1 cycle: its steps by hand, its limits, its settings, its files, stopped and resumed."""
import json
import shlex

import pytest
import torch
from sample_runs import same
from torch import nn

import filter_pruning
import models
import resnet_factorized
import train
import train_pruning
from engine import checkpoint, compiling
from engine.settings import defaults_of
from engine.widths import widths_of
from filter_pruning import Pruner

SHORT = shlex.split("--dataset digits --device cpu --compile off --mixing none --model lenet5 --lr 0.03 "
                    "--batch-size 32")


def lenet_with_norms(values):
    """LeNet-5 whose first convolution has filters of these L1 norms, and whose other layers have equal ones."""
    model = models.build("lenet5")
    for name in ("conv1", "conv2", "linear1", "linear2"):
        nn.init.constant_(model.get_submodule(name).weight, 0.01)
    with torch.no_grad():
        model.conv1.weight.copy_((torch.tensor(values) / 75).view(-1, 1, 1, 1).expand_as(model.conv1.weight))
    return model


@pytest.mark.parametrize("step, part, left", [
    (0.5, 0.0, [3, 4, 5]),             # three at most, and three are below the mean of 3.5
    (0.4, 0.0, [2, 3, 4, 5]),          # two at most
    (0.9, 1.0, [1, 2, 3, 4, 5]),       # below 3.5 - 1.708 is one
    (0.9, 5.0, [0, 1, 2, 3, 4, 5]), (0.1, 0.0, [0, 1, 2, 3, 4, 5])])
def test_a_step_takes_the_lowest_norms_within_both_limits(step, part, left):
    model = lenet_with_norms([1.0, 2, 3, 4, 5, 6])
    kept = model.conv1.weight[left].clone()
    changed = Pruner({"pruning_percent_step": step, "pruning_standart_deviation_part": part}).step(model)
    assert torch.equal(model.conv1.weight, kept)
    assert changed == ({"conv1": (6, len(left))} if len(left) < 6 else {})


def test_widths_stay_multiples():
    model = lenet_with_norms([1.0, 2, 3, 4, 5, 6])
    Pruner({"pruning_percent_step": 0.5, "pruning_standard_deviation_part": 0, "round_to": 2}).step(model)
    assert len(model.conv1.weight) == 4


def test_the_cycle_ends_at_the_limit_and_saves_what_is_within(tmp_path):
    model, losses, trained = lenet_with_norms([1.0, 2, 3, 4, 5, 6]), iter([0.5, 0.6, 0.9, 2.0]), []
    pruner = Pruner({"pruning_percent_step": 0.34, "pruning_standard_deviation_part": 0, "stop_loss": 1,
                     "finetuning_epochs": 3, "output_model_path": str(tmp_path / "out.pt")})
    history = pruner.prune(model, lambda network, epochs: trained.append(epochs), lambda network: next(losses),
                           plots=tmp_path)
    assert [row["loss"] for row in history] == [0.5, 0.6, 0.9, 2.0] and trained == [3, 3, 3]
    assert [row["step"] for row in history] == [0, 1, 2, 3] and history[0]["parameters"] > history[3]["parameters"]
    assert len(checkpoint.read(tmp_path / "out.pt")["weights"]["conv1.weight"]) == 3 > len(model.conv1.weight)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["norms-1.png", "norms-2.png", "norms-3.png"]
    filter_pruning.draw_cycle(tmp_path / "cycle.png", history)
    assert (tmp_path / "cycle.png").read_bytes().startswith(b"\x89PNG")


def test_the_cycle_ends_when_nothing_qualifies_and_never_empties_a_layer():
    model = models.build("cifar-quick")
    pruner = Pruner({"pruning_percent_step": 1, "pruning_standard_deviation_part": 0, "stop_loss": 1})
    history = pruner.prune(model, lambda network, epochs: None, lambda network: 0.5)
    assert 2 < len(history) < 30
    assert all(width > 0 for widths in widths_of(model).values() for width in widths)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_a_loss_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="the validation loss is nan before any filter is removed"):
        Pruner({}).prune(models.build("lenet5"), None, lambda network: float("nan"))


def test_a_limit_that_is_exceeded_at_once_is_an_error():
    with pytest.raises(ValueError, match="0.5 before any filter is removed, above stop_loss 0.1"):
        Pruner({}).prune(models.build("lenet5"), None, lambda network: 0.5)


@pytest.mark.parametrize("config, message", [
    ({"stop": 1}, "no setting is called 'stop'"), ({"pruning_percent_step": 2}, "pruning_percent_step 2: it must be"),
    ({"finetuning_epochs": True}, "finetuning_epochs True"), ({"stop_loss": "low"}, "stop_loss 'low'"),
    ({"round_to": 0}, "round_to 0")])
def test_settings_of_a_cycle_are_checked(config, message):
    with pytest.raises(ValueError, match=message):
        Pruner(config)


def test_settings_of_a_cycle_come_from_a_file(tmp_path):
    path = tmp_path / "cycle.json"
    path.write_text('{"stop_loss": 0.3, "pruning_standart_deviation_part": 0.1}')
    assert Pruner(path).settings == {**defaults_of(filter_pruning.CYCLE), "stop_loss": 0.3,
                                     "pruning_standard_deviation_part": 0.1}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="cycle.json is no JSON object"):
        Pruner(path)


def test_what_it_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match="'linear' cannot lose filters.*these can: layer1.0.conv1"):
        Pruner({"layers": ["linear"]}).step(resnet_factorized.build("resnet18", 8))
    with pytest.raises(ValueError, match="Sequential does not say which layers share channels"):
        Pruner({}).step(nn.Sequential(nn.Linear(2, 2)))
    model = models.build("lenet5")
    model.conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="conv2 has weights that are NaN"):
        Pruner({}).step(model)


def test_cycle_by_its_line_goes_on_when_stopped(tmp_path, monkeypatch):
    """Its epochs become more as it goes; arithmetic is chosen by those it began with, here too few for bfloat16."""
    monkeypatch.setattr(compiling, "multiplies_bfloat16_faster", lambda: True)
    monkeypatch.setattr(compiling, "WORTH_COMPILING", 6 * 1_280)
    (tmp_path / "cycle.json").write_text('{"finetuning_epochs": 2, "pruning_percent_step": 0.3, '
                                         '"pruning_standard_deviation_part": 0, "stop_loss": 1.2}')
    flags = [*SHORT, "--pruning", "l1_cycle", "--epochs", "5", "--cycle", str(tmp_path / "cycle.json")]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    saves = []

    class Stop(Exception):
        pass

    def save(run, real=train.save):
        real(run)
        saves.append(len(run.history))
        if len(saves) in (2, 6, 7):
            raise Stop
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save)
        for start in ([*flags], ["--resume"], ["--resume"]):
            with pytest.raises(Stop):
                train_pruning.main([*start, "--out", str(tmp_path / "parts")])
        train_pruning.main(["--resume", "--out", str(tmp_path / "parts")])
    whole, parts = (checkpoint.read(tmp_path / out / "model.pt") for out in ("whole", "parts"))
    assert same(whole, parts)
    state = checkpoint.read(tmp_path / "parts" / "last.pt")
    assert state["planned"] < compiling.WORTH_COMPILING < sum(state["settings"]["epochs"]) * state["planned"] / 5
    history = state["history"]
    assert [row["round"] for row in history[:9]] == [1] * 5 + [2, 2, 3, 3]
    within = [row for row in history if row["validation_loss"] <= 1.2]
    assert sum(tensor.numel() for tensor in whole["weights"].values()) == within[-1]["parameters"]
    assert (tmp_path / "whole" / "cycle.png").exists()
    plots = [{path.name for path in (tmp_path / out).glob("norms-*.png")} for out in ("whole", "parts")]
    assert plots[0] == plots[1] and {f"norms-{step}.png" for step in range(1, history[-1]["round"])} <= plots[0]


@pytest.mark.parametrize("model, cycle, told", [
    ("resnet20", {"round_to": 8}, r"pruning_percent_step 0.05 and round_to 8 of --cycle remove nothing: .*\(16\)"),
    ("lenet5", {"layers": ["conv1"]}, r"remove nothing: no layer of conv1 \(6\)"),
    ("resnet18", {"layers": ["layer1.0.conv1"]}, r"layer1.0.conv1 \(64\) can lose so many")])       # 8 groups, 3 a step
def test_a_cycle_that_can_remove_nothing_is_refused_before_training(model, cycle, told, tmp_path):
    (tmp_path / "cycle.json").write_text(json.dumps(cycle))
    with pytest.raises(ValueError, match=told):
        train_pruning.main(shlex.split(f"--dataset digits --limit 64 --compile off --mixing none --model {model} "
                                       f"--epochs 1 --pruning l1_cycle --cycle {tmp_path}/cycle.json "
                                       f"--out {tmp_path}/run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share, round_to, groups", [
    (0.05, 1, 1), (0.2, 1, 8), (0.3, 16, 1), (0.13, 8, 8), (0.12, 8, 8), (0.25, 24, 1), (0.2, 24, 1)])
def test_what_is_refused_is_what_no_step_removes(share, round_to, groups):
    model = resnet_factorized.build("resnet18", groups=groups)
    pruner = Pruner({"pruning_percent_step": share, "round_to": round_to, "layers": ["layer1.0.conv1"],
                     "pruning_standard_deviation_part": 0})
    pruner.weak = lambda norms: torch.isin(torch.arange(len(norms)), norms.argsort()[:int(share * len(norms) + 1e-9)])
    idle = False
    try:
        pruner.refuse_idle(model)
    except ValueError:
        idle = True
    changed = pruner.step(model)
    assert not (idle and changed) and (groups > 1 or bool(changed) != idle)       # groups: the weakest may be of one


@pytest.mark.parametrize("share, filters, most", [(0.58, 50, 29), (0.29, 100, 29), (0.05, 64, 3), (0.05, 19, 0),
                                                  (1, 7, 7)])
def test_a_share_of_the_filters_is_not_one_short_by_rounding(share, filters, most):
    pruner = Pruner({"pruning_percent_step": share, "pruning_standard_deviation_part": 0})
    assert pruner.most(filters) == most
    norms = torch.arange(filters) + 1.0
    assert int(pruner.weak(norms).sum()) == min(most, int((norms < norms.mean()).sum()))
