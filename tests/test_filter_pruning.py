"""Zhou's reduction: the published functions by hand, whole networks, filters that leave while training."""
import copy
import json
import shlex

import pytest
import torch
from sample_runs import run_in_parts, same
from torch import nn

import filter_pruning
import models
import networks
import profil
import resnet_factorized
import test as half_test
import train_pruning
from engine import checkpoint
from filter_pruning import (
    absolute_reduce,
    reduce_network,
    relative_reduce,
    relative_reduce_1D,
    relative_reduce_2D,
    relative_reduce_layer,
    shrink_layer,
    shrink_tensor,
    shrink_vector,
)

SHORT = shlex.split("--dataset digits --device cpu --compile off --mixing none --model lenet5 --lr 0.03 "
                    "--batch-size 32")


# ---- the published functions

def test_absolute_reduce_is_equation_one():
    weights = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0], [0.3, 0.4]])
    keep = absolute_reduce(weights, 1.0, weights.norm(dim=1))
    assert keep.tolist() == [0] and keep.dtype == torch.long
    expected = torch.tensor([[3.0, 4.0], [0, 0], [0, 0], [0, 0]]) * torch.tensor([4 / 5, 0, 0, 0])[:, None]
    torch.testing.assert_close(weights, expected)
    assert bool((weights[1:] == 0).all())


def test_threshold_zero_keeps_all_but_the_zeros_and_changes_nothing():
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-15, 0.0]])
    before = weights.clone()
    assert absolute_reduce(weights, 0.0, weights.norm(dim=1)).tolist() == [0, 2]
    torch.testing.assert_close(weights, before)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.999])
def test_relative_threshold_leaves_the_longest(ratio):
    weights = torch.randn(20, 7)
    longest = weights.norm(dim=1).argmax().item()
    assert longest in relative_reduce(weights, ratio, weights.norm(dim=1)).tolist()


def test_layers_are_told_by_their_weight():
    linear, convolution = nn.Linear(5, 8), nn.Conv2d(3, 8, 3)
    for layer, function, norms in ((linear, relative_reduce_1D, linear.weight.norm(dim=1)),
                                   (convolution, relative_reduce_2D, convolution.weight.pow(2).sum((1, 2, 3)).sqrt())):
        norms, twin = norms.detach(), copy.deepcopy(layer)
        keep = relative_reduce_layer(layer, 0.8)
        assert keep.tolist() == (norms > 0.8 * norms.max()).nonzero().flatten().tolist()
        assert torch.equal(keep, function(twin.weight.detach(), 0.8)) and torch.equal(layer.weight, twin.weight)
        torch.testing.assert_close(layer.weight.detach().flatten(1).norm(dim=1),
                                   (norms - 0.8 * norms.max()).clamp_min(0))
    with pytest.raises(ValueError, match="BatchNorm2d has weights of shape"):
        relative_reduce_layer(nn.BatchNorm2d(3), 0.1)


@pytest.mark.parametrize("call, message", [
    (lambda: absolute_reduce(torch.ones(2, 2), -1, torch.ones(2)), "at least 0"),
    (lambda: absolute_reduce(torch.ones(2, 2), float("nan"), torch.ones(2)), "at least 0"),
    (lambda: absolute_reduce(torch.ones(2, 2), 1, torch.tensor([1.0, torch.inf])), "1 of 2 outputs"),
    (lambda: relative_reduce(torch.ones(2, 2), 1.0, torch.ones(2)), r"outside \[0, 1\)")])
def test_wrong_thresholds_and_weights_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_published_functions_shrink_a_network_in_somebodys_own_loop():
    """Convolution, flatten, linear: what the report's example does, and the output is that of the zeroed network."""
    convolution, linear = nn.Conv2d(1, 6, 3), nn.Linear(6 * 4, 3)
    images = torch.randn(2, 1, 4, 4)
    keep = relative_reduce_layer(convolution, 0.9)
    assert 0 < len(keep) < 6
    with torch.no_grad():
        convolution.bias[[k for k in range(6) if k not in keep.tolist()]] = 0
    expected = linear(torch.relu(convolution(images)).flatten(1))
    parts = convolution.weight[keep], convolution.bias[keep]
    assert torch.equal(shrink_tensor(convolution.weight, None, keep), parts[0])
    assert torch.equal(shrink_vector(convolution.bias, keep), parts[1])
    assert shrink_vector(torch.arange(6), torch.tensor([1, 2]), 2).tolist() == [2, 3, 4, 5]
    shrink_layer(convolution, keep_indexes_output=keep)
    shrink_layer(linear, keep_indexes_input=keep, unfold_factor=4)
    torch.testing.assert_close(linear(torch.relu(convolution(images)).flatten(1)), expected)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99999999, 1 - 2**-53])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-3, 1.0, 1e15])
def test_no_ratio_below_1_takes_a_whole_layer(ratio, scale):
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 13).view(3, 4) * scale)
    kept = relative_reduce_layer(layer, ratio)
    assert len(kept) and (scale in (0, 1e-40) or 2 in kept.tolist() and bool((layer.weight[2] != 0).any()))


# ---- whole networks

@pytest.mark.parametrize("name, threshold", [("lenet5", 0.97), ("resnet20", 0.95), ("mobilenet", 0.8),
                                             ("resnet18", 0.9)])
@pytest.mark.parametrize("columns", [False, True])
def test_what_leaves_is_below_the_threshold(name, threshold, columns):
    model = networks.build(name).eval()
    reference = copy.deepcopy(model)
    found = reduce_network(model, threshold, columns=columns)
    spaces = filter_pruning.reducible(reference)
    assert list(found) == [space["name"] for space in spaces]
    for before, after, held in found.values():
        assert 1 <= after <= before and held >= 0
    parts = (filter_pruning.read_weights(reference, spaces[0], spaces[0]["readers"][0]) if columns
             else filter_pruning.made_weights(reference, spaces[0]))
    norms = torch.cat([weights.flatten(1).norm(dim=1) for _, weights in parts])
    before, after, held = found[spaces[0]["name"]]               # of the first layer nothing had left before
    assert after - held == int((norms > threshold * norms.max()).sum())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(p.numel() for p in reference.parameters())


def test_columns_are_those_of_every_reader():
    """A stem that two layers read: a channel that one of them reads strongly stays, and both are shortened alike."""
    model = networks.build("wrn-16-4").eval()
    spaces = filter_pruning.trained_spaces(model)
    turn, space = next((turn, space) for turn, space in enumerate(spaces) if len(space["readers"]) > 1)
    first, second = (model.get_submodule(name) for name in space["readers"])
    with torch.no_grad():
        first.weight[:, 3] *= 1e-4
        second.weight[:, 3] *= 10
        for layer in (first, second):
            layer.weight[:, 5] *= 1e-4
    before = [layer.weight.detach().clone() for layer in (first, second)]
    norms = torch.cat([weight.transpose(0, 1).flatten(1) for weight in before], 1).norm(dim=1)
    limit = 0.2 * norms.max()
    stays = (norms > limit).nonzero().flatten()
    assert 3 in stays and 5 not in stays
    reduce_network(model, 0.2, columns=True, turn=turn)
    share = ((norms - limit) / norms)[stays].view(1, -1, 1, 1)
    for layer, weight in zip((first, second), before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight[:, stays] * share)


def test_scales_that_do_not_train_are_not_shortened():
    model = networks.build("vgg6-8-16-16")
    with pytest.raises(ValueError, match="--filter-measure neuron shortens batch norm's scales, and those of .* fixed"):
        reduce_network(model, 0.5, measure="neuron")
    with pytest.raises(ValueError, match="take --filter-measure filter"):
        train_pruning.main(shlex.split("--dataset digits --limit 32 --batch-size 32 --compile off --epochs 2 "
                                       "--model vgg6-8-16-16 --pruning filters --filter-measure neuron --dry-run"))


def test_groups_keep_as_many_each_and_what_is_held_is_counted():
    model = resnet_factorized.build("resnet18", 8)
    with torch.no_grad():
        model.layer1[0].conv1.weight[:3].mul_(1e-3)              # three weak filters, all of the first group
    before = model.layer1[0].conv1.weight.detach().clone()
    found = reduce_network(model, 0.05)
    assert found["layer1.0.conv1"] == (64, 64, 3)
    after = model.layer1[0].conv1.weight
    assert torch.equal(after[:3], before[:3]), "at zero, batch norm would make their gradient immense"
    assert bool((after[3:].flatten(1).norm(dim=1) < before[3:].flatten(1).norm(dim=1)).all())


def test_layer_by_layer_takes_one_in_turn():
    model = models.build("lenet5")
    names = [space["name"] for space in filter_pruning.reducible(model)]
    assert [list(reduce_network(model, 0.1, turn=turn)) for turn in range(5)] == [[name] for name in [*names, names[0]]]


def test_absolute_threshold_beyond_all_keeps_one_channel():
    model = models.build("lenet5")
    found = reduce_network(model, 1e6, relative=False)
    assert all(after == 1 for _, after, _ in found.values())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-1", "mobilenet"])
def test_a_neuron_behind_batch_norm_keeps_its_share(name):
    """What one layer's neurons send on is shortened by equation 1, whatever the length of their filters."""
    model = trained_statistics(networks.build(name))
    space = next(space for space in filter_pruning.reducible(model) if space["norms"])
    maker, norm = (model.get_submodule(space[kind][0]) for kind in ("makers", "norms"))
    gains = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    lengths = gains * maker.weight.detach().flatten(1).norm(dim=1)
    shares = (1 - 0.7 * lengths.max() / lengths).clamp_min(0)
    images, sent = torch.randn(4, 3, 32, 32), []
    norm.register_forward_hook(lambda layer, inputs, output: sent.append(output.detach()))
    model(images)
    turn = [other["name"] for other in filter_pruning.trained_spaces(model)].index(space["name"])
    before, after, held = reduce_network(model, 0.7, turn=turn, measure="neuron")[space["name"]]
    model(images)
    assert 1 <= after < before == len(shares) and held == 0 and after == int((shares > 0).sum())
    torch.testing.assert_close(sent[1], (shares[:, None, None] * sent[0])[:, shares > 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-1", "resnet18"])
def test_neurons_are_the_same_for_filters_of_any_length(name):
    """Batch norm takes a filter's length away, so the outputs and what leaves must not depend on it."""
    whole = trained_statistics(networks.build(name))
    rescaled, images = copy.deepcopy(whole), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for space in filter_pruning.reducible(rescaled):
            if space["norms"]:
                maker, norm = (rescaled.get_submodule(space[kind][0]) for kind in ("makers", "norms"))
                lengths = torch.rand(len(maker.weight)) * 10 + 0.1
                maker.weight.mul_(lengths.view(-1, 1, 1, 1))
                norm.running_mean.mul_(lengths)
                norm.running_var.copy_((norm.running_var + norm.eps) * lengths ** 2 - norm.eps)
    torch.testing.assert_close(rescaled(images), whole(images), atol=1e-3, rtol=1e-3)
    left = [reduce_network(model, 0.8, measure="neuron") for model in (whole, rescaled)]
    assert left[0] == left[1] and any(after < before for before, after, _ in left[0].values())
    torch.testing.assert_close(rescaled(images), whole(images), atol=1e-3, rtol=1e-3)


def trained_statistics(model):
    """The network in evaluation mode, with batch norms as training leaves them: no two channels alike."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn(len(module.weight)))
                module.bias.normal_(std=0.2)
        model.train()
        for _ in range(40):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


# ---- filters leave while training

def filters_run(out, *flags):
    train_pruning.main([*SHORT, "--pruning", "filters", "--filter-threshold", "0.5", "--filter-stop", "0.5", "--seed",
                        "1", "--epochs", "12", "--out", str(out), *flags])
    return checkpoint.read(out / "last.pt")


@pytest.fixture(scope="module")
def shrunk_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("filters") / "run"
    return out, filters_run(out)


def test_the_network_shrinks_until_the_stop_and_keeps_learning(shrunk_run):
    out, state = shrunk_run
    sizes = [row["parameters"] for row in state["history"]]
    assert sizes[0] == 62_006 > 10 * sizes[5] and sizes == sorted(sizes, reverse=True) and len(set(sizes[5:])) == 1
    assert sizes[-1] == sum(tensor.numel() for tensor in state["weights"].values())
    assert state["history"][-1]["validation_accuracy"] > 80
    for name, tensor in state["weights"].items():
        assert state["average"][name].shape == tensor.shape


def test_a_shrunk_network_is_tested_and_profiled_physically(shrunk_run, capsys):
    out, state = shrunk_run
    half_test.main(["--checkpoint", str(out / "model.pt"), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] > 80
    profil.main(["--checkpoint", str(out / "model.pt"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == state["history"][-1]["parameters"] and found["macs"] < 651_000


def test_stopped_after_every_epoch_is_the_run_that_was_not(shrunk_run, tmp_path):
    out = tmp_path / "run"
    run_in_parts(lambda: filters_run(out), out, 12)
    assert same(checkpoint.read(out / "model.pt"), checkpoint.read(shrunk_run[0] / "model.pt"))


@pytest.mark.parametrize("flags, message", [
    (["--sparsity", "0.5"], "takes one number of epochs and no --sparsity"),
    (["--filter-threshold", "1"], "below 1; --no-filter-relative takes a norm"),
    (["--filter-interval", "0"], "--filter-interval 0"), (["--filter-stop", "1.5"], "--filter-stop 1.5")])
def test_settings_that_cannot_be_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        filters_run(tmp_path / "run", *flags)


def test_grouped_residual_network_shrinks_with_variants(tmp_path):
    flags = ["--model", "resnet18", "--limit", "32", "--epochs", "2", "--filter-interval", "1", "--filter-stop", "1",
             "--batch-size", "16", "--filter-threshold", "0.9", "--filter-columns"]
    state = filters_run(tmp_path / "run", *flags)
    assert state["history"][-1]["parameters"] < 0.5 * 1_411_146
    model, _ = networks.load_network(tmp_path / "run" / "model.pt")
    assert any(getattr(module, "positions", None) is not None for module in model.modules())
