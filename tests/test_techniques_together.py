"""Techniques beside each other, and runs that go on with other flags: right, or one line that says what is not."""
import re
import shlex
import shutil

import pytest
import torch
from sample_runs import SMALL, assert_same_run, resume, stop_after_a_save, without_times

import binaryconnect
import cifar10
import filter_pruning
import networks
import resnet_factorized
import set_optimizer_train
import train
import train_pruning
from engine import checkpoint, settings, shrinking
from set_distillation_train import distilled

QUICK = [*SMALL, "--model", "lenet5", "--mixing", "none"]
DIGITS = [*shlex.split("--dataset digits --compile off --device cpu --batch-size 32 --mixing none")]


def began(script, out, *flags):
    """A run of `script` in `out` that was stopped after its first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(Exception, match="^$"):
            script.main([*QUICK, *map(str, flags), "--out", str(out)])
    return out


def resume_train(out, *flags):
    """Go on with a run of train.py."""
    train.main(["--resume", "--out", str(out), *flags])


# ---- what is measured is what is saved

@pytest.mark.parametrize("flags", [("--weights", "binary", "--lr", "0.05", "--momentum", "0.9"),
                                   ("--averaging", "ema", "--ema-decay", "0.9")])
def test_the_published_recipe_measures_the_network_that_it_saves(tmp_path, flags):
    train.main([*DIGITS, "--limit", "300", "--recipe", "published", "--model", "lenet5", "--epochs", "2", *flags,
                "--out", str(tmp_path / "run")])
    rows = checkpoint.read(tmp_path / "run" / "last.pt")["history"]
    model, _ = networks.load_network(tmp_path / "run" / "model.pt")
    data = cifar10.load("digits", "data")
    _, validation, _ = cifar10.loaders(data, "digits", 32, limit=300)
    _, accuracy = train.evaluate(model, validation, torch.device("cpu"))
    assert accuracy == pytest.approx(rows[-1]["validation_accuracy"], abs=0.01)


# ---- Zhou's reduction in groups

def test_weak_filters_that_groups_hold_keep_their_weights():
    torch.manual_seed(0)
    model = resnet_factorized.build("resnet18", groups=8)
    layer = model.layer1[0].conv1
    with torch.no_grad():                              # the first group is weak whole, the others by one filter
        layer.weight.mul_(1 / layer.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        layer.weight[:8] *= 0.01
        layer.weight[8::8] *= 0.01
    before = layer.weight.detach().clone()
    space = next(space for space in filter_pruning.trained_spaces(model) if space["makers"] == ["layer1.0.conv1"])
    turn = filter_pruning.trained_spaces(model).index(space)
    found = filter_pruning.reduce_network(model, 0.5, turn=turn)[space["name"]]
    after = model.layer1[0].conv1.weight.detach()
    norms = after.flatten(1).norm(dim=1)
    assert found[0] == 64 and found[1] == len(after) and found[2] > 0
    assert norms.min() == pytest.approx(0.01, rel=1e-4) and int((norms < 0.02).sum()) == found[2]
    assert norms.max() == pytest.approx(0.5, rel=1e-4), "the others are shortened by the threshold"
    held = after[norms < 0.02]
    assert all(any(torch.equal(one, other) for other in before) for one in held)


def test_the_last_channel_of_a_layer_keeps_its_weights():
    torch.manual_seed(0)
    model = networks.build("lenet5")
    filter_pruning.reduce_network(model, 100.0, relative=False)
    assert len(model.conv1.weight) == 1 and model.conv1.weight.abs().sum() > 0


def test_a_muon_run_goes_on_after_a_grouped_layer_became_depthwise(tmp_path):
    flags = [*DIGITS, "--limit", "64", "--model", "resnet18", "--groups", "8", "--pruning", "filters", "--epochs", "2",
             "--filter-interval", "1", "--filter-stop", "0.5", "--filter-threshold", "0.97", "--optimizer", "muon"]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "previous.pt").replace(tmp_path / "again" / "last.pt")
    state = checkpoint.read(tmp_path / "again" / "last.pt")
    model, _ = networks.load_network(tmp_path / "again" / "last.pt")
    depthwise = {f"{name}.weight" for name, layer in model.named_modules() if shrinking.is_depthwise(layer)}
    assert depthwise & set(set_optimizer_train.moved_by_muon(state["optimizer"])), "the case is provoked"
    resume(tmp_path / "again")
    one, other = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "again"))
    assert without_times(one["history"]) == without_times(other["history"])
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


@pytest.mark.parametrize("flags", [("--epochs", "3"), ("--epochs", "3", "--filter-interval", "4"),
                                   ("--epochs", "9", "--filter-until", "99999999")])
def test_a_reduction_that_can_remove_nothing_is_told(tmp_path, capsys, flags):
    train_pruning.main([*QUICK, "--pruning", "filters", *flags, "--dry-run", "--out", str(tmp_path / "a")])
    assert "note: --pruning filters removes nothing" in capsys.readouterr().err
    train_pruning.main([*QUICK, "--pruning", "filters", "--epochs", "4", "--dry-run", "--out", str(tmp_path / "a")])
    assert "removes nothing" not in capsys.readouterr().err


def test_a_cycle_of_no_layers_is_refused(tmp_path):
    (tmp_path / "cycle.json").write_text('{"layers": []}')
    with pytest.raises(ValueError, match=r"layers \[\] of --cycle names none: .*conv1"):
        train_pruning.main([*QUICK, "--pruning", "l1_cycle", "--cycle", str(tmp_path / "cycle.json"), "--epochs", "1",
                            "--out", str(tmp_path / "a")])


# ---- binary weights

def test_a_stem_that_does_not_train_keeps_its_filters(tmp_path):
    model = networks.build("vgg6-8-16-16")
    before = model.conv1.weight.detach().clone()
    with binaryconnect.binarized(model, "glorot"):
        assert torch.equal(model.conv1.weight, before)
        assert model.linear.weight.abs().unique().numel() == 1
    binaryconnect.BC(model, "glorot").clip()
    assert torch.equal(model.conv1.weight, before)
    for weights in ("float", "binary"):
        train.main([*DIGITS, "--limit", "64", "--model", "vgg6-8-16-16", "--epochs", "1", "--weights", weights,
                    "--out", str(tmp_path / weights)])
    stems = [checkpoint.read(tmp_path / name / "model.pt")["weights"]["conv1.weight"] for name in ("float", "binary")]
    assert torch.equal(*stems) and stems[0].abs().unique().numel() > 2


def test_binary_weights_and_a_norm_that_is_kept_do_not_go_together():
    with pytest.raises(ValueError, match="--keep-norm does not go with --weights binary"):
        train.main([*QUICK, "--weights", "binary", "--optimizer", "muon", "--keep-norm"])


# ---- the same command with --resume

@pytest.mark.parametrize("flags", [
    ("--pruning", "polynomial", "--epochs", "2", "1", "--sparsity", "0.5"),
    ("--pruning", "polynomial", "--epochs", "1", "1", "1"),
    ("--pruning", "constant", "--epochs", "1", "1", "1", "--sparsity", "0.2", "0.3"),
    ("--pruning", "filters", "--epochs", "1", "2"),
    ("--epochs", "2", "1", "--sparsity", "0.5"),
])
def test_the_command_that_began_a_run_goes_on_with_it(tmp_path, flags):
    train_pruning.main([*QUICK, "--limit", "64", *flags, "--out", str(tmp_path / "whole")])
    out = began(train_pruning, tmp_path / "run", "--limit", "64", *flags)
    train_pruning.main([*QUICK, "--limit", "64", *flags, "--out", str(out), "--resume"])
    assert_same_run(tmp_path / "whole", out)


def test_an_l1_cycle_goes_on_with_the_command_that_began_it(tmp_path):
    (tmp_path / "cycle.json").write_text('{"finetuning_epochs": 1, "pruning_percent_step": 0.3}')
    flags = [*QUICK, "--pruning", "l1_cycle", "--epochs", "1", "--cycle", str(tmp_path / "cycle.json"), "--stop-loss",
             "9", "--out", str(tmp_path / "run")]
    train_pruning.main(flags)
    before = checkpoint.read(tmp_path / "run" / "last.pt")["settings"]["epochs"]
    assert len(before) > 1
    train_pruning.main([*flags, "--resume"])
    assert checkpoint.read(tmp_path / "run" / "last.pt")["settings"]["epochs"] == before
    with pytest.raises(ValueError, match=r"epochs: \[1, .*then, \[2, "):
        train_pruning.main([*flags, "--resume", "--epochs", "2"])


def test_an_edited_line_leaves_what_a_flag_chose():
    table = train.SETTINGS
    state = {"settings": {"mixing": "none", "lines": {"mixing": "cutmix", "flips": "random"}, "flips": "random"}}
    found = settings.to_resume(table, state, {"mixing": "mixup", "flips": "random"}, {"out": "a"})
    assert found["mixing"] == "none"
    forced = settings.to_resume(table, state, {"mixing": "mixup", "flips": "random"}, {"out": "a", "force": True})
    assert forced["mixing"] == "none"
    with pytest.raises(ValueError, match=r"\(flips: random then, alternating now\)"):
        settings.to_resume(table, state, {"mixing": "mixup", "flips": "alternating"}, {"out": "a"})


def test_momentum_that_comes_back_has_nesterov(tmp_path):
    out = began(train, tmp_path / "run", "--epochs", "2", "--momentum", "0")
    run = train.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                      ["--resume", "--force", "--momentum", "0.9", "--out", str(out)])
    assert [group["nesterov"] for group in run.optimizer.param_groups] == [True]


def test_less_sparsity_than_is_pruned_is_refused(tmp_path):
    out = began(train_pruning, tmp_path / "run", "--limit", "64", "--pruning", "polynomial", "--epochs", "2",
                "--sparsity", "0.8", "--prune-frequency", "1", "--prune-begin", "0")
    with pytest.raises(ValueError, match=r"sparsity 0.2: the run has pruned [0-9.]+ % already"):
        resume(out, "--force", "--sparsity", "0.2")
    resume(out, "--force", "--sparsity", "0.85")


@pytest.mark.parametrize("flags", [("--activation", "tanh"), ("--pooling", "average"), ("--model", "lenet5-student"),
                                   ("--weights", "lsq")])
def test_another_network_is_refused_with_a_way_out(tmp_path, flags):
    out = began(train, tmp_path / "run", "--epochs", "2")
    with pytest.raises(ValueError, match="a run's network stays, with --force too: start a new run with another --out"):
        resume_train(out, "--force", *flags)


@pytest.mark.parametrize("rate", [0.1, 0.007, 0.05, 0.2])
def test_a_plateau_stands_where_it_stood(tmp_path, capsys, rate):
    out = began(train, tmp_path / "run", "--epochs", "2", "--schedule", "plateau", "--lr", rate)
    resume_train(out)
    assert "the schedule goes on" not in capsys.readouterr().out
    assert checkpoint.read(out / "last.pt")["optimizer"]["param_groups"][0]["lr"] == rate


# ---- values at the ends of their range

@pytest.mark.parametrize("flags", ["--lr 1e300", "--weight-decay 1e300", "--muon-lr 1e300", "--bias-lr 1e308",
                                   "--muon-momentum 1", "--morph-budget 1e300", "--temperature 1e9",
                                   f"--epochs {'9' * 400}", f"--batch-size {'9' * 400}"])
def test_a_number_that_nothing_can_train_with_is_out_of_range(flags):
    name = flags.split()[0][2:]
    with pytest.raises(ValueError, match=re.escape(f"--{name} ") + ".* must be .*(below|at most) "):
        train_pruning.main([*QUICK, *flags.split()])


@pytest.mark.parametrize("name", ["resnet20-1-1-99999999999", "wrn-10-99999999999999999999999999999", "wrn-10-9999",
                                  "vgg6-64-64-99999", "resnet9998-16-16-16"])
def test_a_network_that_no_memory_holds_is_no_network(name):
    with pytest.raises(ValueError, match=f"no network is called '{name}'"):
        train.main([*SMALL, "--model", name])


def test_the_loss_of_a_teacher_is_right_at_the_highest_temperature():
    torch.manual_seed(0)
    logits, teacher = torch.randn(64, 10), torch.randn(64, 10)
    high = train.SETTINGS["temperature"].high
    found = distilled(torch.zeros(()), logits, teacher, high, 1.0)
    exact = distilled(torch.zeros(()).double(), logits.double(), teacher.double(), high, 1.0)
    assert found.item() == pytest.approx(exact.item(), rel=0.02)


def test_flags_that_change_nothing_for_this_network_or_these_images(tmp_path, capsys):
    train.main([*QUICK, "--epochs", "1", "--recalibrate", "--flips", "alternating", "--dry-run"])
    told = capsys.readouterr().err
    assert "note: --recalibrate changes nothing: lenet5 has no batch norm\n" in told
    assert "note: --flips alternating changes nothing: images of digits are not mirrored\n" in told
    train.main([*SMALL, "--model", "resnet8-8-8-8", "--mixing", "none", "--epochs", "1", "--recalibrate", "--dry-run"])
    assert "changes nothing" not in capsys.readouterr().err
