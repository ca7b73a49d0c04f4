"""Channels that leave for a number of multiply-adds (--macs): the weakest, no more than needed, and exactly."""
import copy
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_runs import SMALL, assert_same_run, history_of, run_in_parts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import networks
import pruning
import set_pruning_train
import train_pruning
from engine import checkpoint, parallel, shrinking
from engine.operations import macs_of

SHAPE = (3, 32, 32)
NETWORKS = "lenet5", "resnet18", "resnet20-8-16-16", "vgg6-16-32-32"


def network(name, seed=0):
    torch.manual_seed(seed)
    return networks.build(name, **({"groups": 8} if name == "resnet18" else {})).eval()


def floor_macs(model, shape):
    """The multiply-adds of a network of which all leave that can."""
    every = {space["name"]: torch.zeros(len(model.get_submodule(space["makers"][0]).weight))
             for space in pruning.inner_spaces(model)}
    return pruning.narrowed_macs(model, every, 0.0, shape)


@settings(max_examples=15)
@given(st.sampled_from(NETWORKS), st.floats(0, 1), st.integers(0, 3))
def test_the_number_is_met_and_one_limit_lower_would_not_do(name, share, seed):
    model, shape = network(name, seed), SHAPE
    least, whole = floor_macs(model, shape), macs_of(model, shape)
    wanted, before = int(least + share * (whole - least)), copy.deepcopy(model)
    changed = pruning.narrow(model, wanted, shape)
    found = macs_of(model, shape)
    assert least <= found <= wanted
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    assert counter.get_total_flops() == 2 * found
    assert (changed == {}) == (found == whole)
    strengths = {space["name"]: pruning.strength_of(before, space) for space in pruning.inner_spaces(before)}
    limits = [-1.0, *torch.cat(list(strengths.values())).unique().tolist()]
    tried = [pruning.narrowed_macs(before, strengths, limit, shape) for limit in limits[::max(1, len(limits) // 20)]]
    assert all(macs <= found for macs in tried if macs <= wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_what_it_did_with_those_channels_at_zero(name):
    model, shape = network(name), SHAPE
    whole, removed = copy.deepcopy(model), {}
    real = shrinking.remove

    def note(shrunk, space, keep, *companions):
        removed[space["name"]] = space, keep
        return real(shrunk, space, keep, *companions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrinking, "remove", note)
        changed = pruning.narrow(model, int(0.8 * macs_of(model, shape)), shape)
    assert changed and all(after < before for before, after in changed.values())
    for name_of, (space, keep) in removed.items():
        if name_of not in changed:
            continue                      # of a trial
        gone = torch.ones(changed[name_of][0], dtype=torch.bool)
        gone[keep] = False
        for layer in (*space["makers"], *space["norms"]):
            for tensor in (whole.get_submodule(layer).weight, whole.get_submodule(layer).bias):
                if tensor is not None:
                    tensor.data[gone] = 0
        for layer in space["norms"]:
            whole.get_submodule(layer).running_mean[gone] = 0
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(images), whole(images), atol=1e-4)


def test_strengths_are_what_a_hand_computes():
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False))
    model[0].weight.data = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1)
    model[1].weight.data = torch.tensor([-1.0, 0.0, 5.0]).view(1, 3, 1, 1)
    space = {"name": "0", "makers": ["0"], "readers": ["1"], "shuffled": None, "unfold": 1, "norms": [],
             "depthwise": [], "branch": None}
    # means: 2 of what makes, 2 of what reads
    assert pruning.strength_of(model, space).tolist() == [0.25, 0.0, 3.75]


def test_channels_that_are_weak_anywhere_leave_first():
    model = network("vgg6-16-32-32")
    spaces = pruning.inner_spaces(model)
    weak = {}
    with torch.no_grad():
        for weight in pruning.prunable(model).values():       # identities at first, of one weight a filter
            weight.normal_()
        for number, space in enumerate(spaces):
            maker = model.get_submodule(space["makers"][0])
            weak[space["name"]] = torch.arange(number, len(maker.weight), 4)
            maker.weight[weak[space["name"]]] *= 1e-3
    left = copy.deepcopy(model)
    expected = {space["name"]: len(model.get_submodule(space["makers"][0]).weight) - len(weak[space["name"]])
                for space in spaces}
    for space in spaces:
        keep = torch.ones(len(left.get_submodule(space["makers"][0]).weight), dtype=torch.bool)
        keep[weak[space["name"]]] = False
        shrinking.remove(left, space, keep.nonzero().flatten())
    changed = pruning.narrow(model, macs_of(left, SHAPE), SHAPE)
    assert {name: after for name, (_, after) in changed.items()} == expected
    for one, other in zip(model.state_dict().values(), left.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_fewer_than_can_be_are_refused_with_the_fewest():
    model = network("resnet20-8-16-16")
    least, before = floor_macs(model, SHAPE), copy.deepcopy(model)
    for refuse in (pruning.check_macs, pruning.narrow):
        with pytest.raises(ValueError, match=f"--macs {least - 1}: .* still has {least:,} multiply-adds"):
            refuse(model, least - 1, SHAPE)
    pruning.check_macs(model, least, SHAPE)
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(),
                                                             before.state_dict().values(), strict=True))
    assert pruning.narrow(model, macs_of(model, SHAPE), SHAPE) == {}


def test_only_the_layers_that_are_named_lose_channels():
    model = network("resnet18")
    changed = pruning.narrow(model, 66_600_000, SHAPE, ["layer1.0.conv1", "layer1.1.conv1"])
    # 8 channels of a block are 2 x 589,824 multiply-adds, and 4 such steps are needed
    assert changed.keys() <= {"layer1.0.conv1", "layer1.1.conv1"}
    assert sum(before - after for before, after in changed.values()) == 32
    assert macs_of(model, SHAPE) == 70_980_608 - 4 * 2 * 589_824
    for layers, told in ((["layer1.0.conv2"], "'layer1.0.conv2' cannot lose channels by --macs; these can: layer1.0"),
                         (["conv1"], "'conv1' cannot lose channels"), (["layer1.0.conv1"], "--macs 1: without any")):
        with pytest.raises(ValueError, match=told):
            pruning.check_macs(model, 1, SHAPE, layers)


@pytest.mark.parametrize("end, epochs, expected", [
    (0.6, 10, 6), (0.1, 10, 1), (0.05, 10, 1), (1.0, 10, 9), (0.6, 1, 1)])
def test_channels_leave_before_the_epoch_in_which_gradual_pruning_ends(end, epochs, expected):
    values = {"pruning": "polynomial", "macs": 1, "epochs": [epochs], "prune_begin": 0.0, "prune_end": end,
              "prune_frequency": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_pruning_train, "narrow", lambda *given: "left")
        patch.setattr(set_pruning_train, "rank", lambda *given: {})
        found = [set_pruning_train.remove_channels({**values, "sparsity": [0.5]}, epoch, 7, SHAPE, None, None, None, {})
                 for epoch in range(1, epochs + 1)]
    assert found == [""] * (expected - 1) + ["left"] * (epochs - expected + 1)


# ---- runs

GRADUAL = "--model resnet20-8-16-16 --pruning polynomial --sparsity 0.8 --prune-frequency 1 --epochs 4 --batch-size 16"
ROUNDS = "--model resnet20-8-16-16 --sparsity 0.5 0.6 --epochs 1 1 2 --batch-size 16"


@pytest.mark.parametrize("flags", [GRADUAL, f"{GRADUAL} --optimizer sgd --averaging none", ROUNDS,
                                   "--model resnet18 --groups 8 --sparsity 0.5 0.6 --epochs 1 1 1"])
def test_a_run_ends_with_that_number_its_zeros_and_files_that_fit(flags, tmp_path):
    out, grouped = tmp_path / "run", "resnet18" in flags
    macs = 60_000_000 if grouped else 3_000_000
    train_pruning.main([*SMALL, *shlex.split(flags), "--macs", str(macs), "--out", str(out)])
    rows = history_of(out)
    sizes = [int(row["parameters"]) for row in rows]
    assert len(set(sizes)) == 2 and sizes[0] > sizes[-1]
    model, _ = networks.load_network(out / "model.pt")
    assert 0.8 * macs < macs_of(model, SHAPE) <= macs
    state = checkpoint.read(out / "last.pt")
    masks = state["masks"]
    assert all(mask.shape == state["weights"][name].shape for name, mask in masks.items())
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert pruning.sparsity_of(model) == pytest.approx(1 - kept, abs=1e-6)
    if "polynomial" in flags:             # the schedule ends behind it
        assert kept == pytest.approx(0.2, abs=1e-3)


def test_a_schedule_that_ends_in_the_first_epoch_keeps_its_sparsity_in_what_is_left(tmp_path):
    flags = f"{GRADUAL} --prune-begin 0 --prune-end 0.1 --macs 3000000"
    train_pruning.main([*SMALL, *shlex.split(flags), "--out", str(tmp_path / "run")])
    assert [float(row["sparsity"]) for row in history_of(tmp_path / "run")] == pytest.approx([0.8] * 4, abs=1e-3)
    state = checkpoint.read(tmp_path / "run" / "last.pt")
    for weights in (state["weights"], state["average"]):
        assert all((weights[name][~mask] == 0).all() for name, mask in state["masks"].items())


@pytest.mark.parametrize("flags, epochs", [(GRADUAL, 4), (ROUNDS, 4)])
def test_a_run_that_narrows_goes_on_bit_for_bit(flags, epochs, tmp_path):
    flags = [*SMALL, *shlex.split(flags), "--macs", "3000000", "--mixing", "none"]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(tmp_path / "parts")]), tmp_path / "parts", epochs)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("flags, told", [
    ("--model resnet20-8-16-16 --macs 1000 --sparsity 0.5 --epochs 1 1", "--macs 1000: .* give as many or more"),
    ("--macs 60000000 --weights lsq", "--macs 60000000 does not go with --weights lsq"),
    ("--macs 60000000 --macs-layers linear", "'linear' cannot lose channels by --macs"),
    ("--macs 0", "--macs 0: it must be at least 1")])
def test_what_cannot_be_is_refused_before_any_folder_is_made(flags, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        train_pruning.main([*SMALL, *shlex.split(flags), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_number_without_any_pruning_is_refused():
    with pytest.raises(ValueError, match="--macs 5 comes with the last pruning, and there is none: give --sparsity"):
        set_pruning_train.check_narrowing({"macs": 5, "sparsity": []}, None, SHAPE)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    with pytest.raises(ValueError, match="--macs shrinks the network, which takes one process"):
        set_pruning_train.check_narrowing({"macs": 1, "sparsity": [0.5]}, None, SHAPE)


def test_other_prunings_say_that_it_changes_nothing(tmp_path, capsys):
    train_pruning.main([*SMALL, "--dataset", "digits", "--model", "lenet5", "--pruning", "filters", "--epochs", "2",
                        "--macs", "100000", "--out", str(tmp_path / "run")])
    assert "--macs 100000 changes nothing without --pruning rounds or polynomial or constant" in capsys.readouterr().err


def test_where_no_channel_may_leave_the_number_is_refused_or_met_already():
    model, excluded = network("lenet5"), ["conv2", "linear2"]        # which touch every space
    before = copy.deepcopy(model.state_dict())
    assert pruning.narrow(model, macs_of(model, SHAPE), SHAPE, exclude=excluded) == {}
    with pytest.raises(ValueError, match="without any channel that can leave the network still has 651,720"):
        pruning.narrow(model, 300_000, SHAPE, exclude=excluded)
    with pytest.raises(ValueError, match="still has 651,720 multiply-adds"):
        pruning.check_macs(model, 300_000, SHAPE, exclude=excluded)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
