"""Channels that leave: masked and shrunk networks agree, optimizers and averages follow, files keep the structure."""
import copy

import pytest
import torch
import torch_pruning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
import networks
import quantization
import resnet_factorized
from engine import checkpoint, compiling, shrinking
from engine.widths import layer_like, widths_of

NETWORKS = [("resnet18", 8, True), ("resnet18", 8, False), ("resnet18", 4, True), ("resnet18", 1, False),
            ("resnet50", 8, True), ("resnet20", None, None), ("wrn-10-2", None, None), ("lenet5", None, None),
            ("cifar-quick", None, None), ("mobilenet", None, None)]


def network(name, groups, shuffle):
    """An architecture and its network in evaluation mode, with batch norm that is far from doing nothing."""
    torch.manual_seed(0)
    architecture = {"name": name} | ({"groups": groups, "shuffle": shuffle} if groups else {})
    model = networks.build(**architecture).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return architecture, model


@torch.no_grad()
def silence(model, space, keep):
    """Set all channels of a space but `keep` to zero behind their norm (or in their maker): what removal must equal."""
    count = len(model.get_submodule(space["makers"][0]).weight)
    gone = [channel for channel in range(count) if channel not in set(keep.tolist())]
    for name in [*space["norms"], *space["makers"]]:
        layer = model.get_submodule(name)
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0


def some_keep(model, space, share, generator):
    """A random set of channels that may stay, balanced over the groups."""
    rows, columns = shrinking.partitions(model, space)
    weak = torch.rand(len(rows), generator=generator) < share
    return shrinking.balanced(weak, torch.rand(len(rows), generator=generator), rows, columns)


@pytest.mark.parametrize("name, groups, shuffle", NETWORKS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.2, 1))
def test_shrunk_equals_masked_for_random_channels_twice(name, groups, shuffle, seed, share):
    architecture, shrunk = network(name, groups, shuffle)
    generator, masked = torch.Generator().manual_seed(seed), copy.deepcopy(shrunk)
    images, before = torch.randn(2, 3, 32, 32, generator=generator), sum(p.numel() for p in shrunk.parameters())
    places = {}                                        # of the channels that are left, in the whole network
    for _ in range(2):
        for space in shrunk.channels():
            if space["name"].startswith("stream"):
                continue
            keep = some_keep(shrunk, space, share, generator)
            alive = places.get(space["name"], torch.arange(len(shrunk.get_submodule(space["makers"][0]).weight)))
            places[space["name"]] = alive[keep]
            silence(masked, space, alive[keep])
            shrinking.remove(shrunk, space, keep)
    with torch.no_grad():
        expected = masked(images)
        torch.testing.assert_close(shrunk(images), expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=0)
    assert sum(p.numel() for p in shrunk.parameters()) < before
    again = networks.build(**architecture).eval()
    checkpoint.load_weights(again, architecture, checkpoint.network_of(shrunk, architecture))
    assert torch.equal(again(images), shrunk(images))


@pytest.mark.parametrize("name, groups, shuffle", [("resnet18", 8, True), ("resnet18", 1, False),
                                                   ("resnet50", 4, True)])
def test_residual_streams_shrink_as_one(name, groups, shuffle):
    _, shrunk = network(name, groups, shuffle)
    masked, generator = copy.deepcopy(shrunk), torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    for space in shrunk.channels():
        if space["name"].startswith("stream"):
            keep = some_keep(shrunk, space, 0.6, generator)
            assert len(keep) < len(shrunk.get_submodule(space["makers"][0]).weight)
            silence(masked, space, keep)
            shrinking.remove(shrunk, space, keep)
    with torch.no_grad():
        expected = masked(images)
        torch.testing.assert_close(shrunk(images), expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=0)


def test_a_stream_below_a_selective_addition_is_refused():
    _, model = network("resnet18", 8, True)
    spaces = {space["name"]: space for space in model.channels()}
    shrinking.remove(model, spaces["layer1.0.conv2"], torch.arange(0, 64, 2))
    with pytest.raises(ValueError, match="stream0 cannot shrink: the branch of layer1.0 is added selectively"):
        shrinking.remove(model, spaces["stream0"], torch.arange(0, 64, 2))


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "mobilenet"])
def test_the_same_channels_removed_by_torch_pruning_give_the_same_output(name):
    """Without groups, where that package is exact; it shrinks the whole residual stream, so do we."""
    architecture = {"name": name, "groups": 1, "shuffle": False} if name == "resnet18" else {"name": name}
    ours = network(name, *((1, False) if name == "resnet18" else (None, None)))[1]
    theirs, generator = copy.deepcopy(ours), torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, images)
    assert architecture["name"] == name
    for space in ours.channels():
        if space["branch"]:
            continue
        keep = some_keep(ours, space, 0.5, generator)
        maker = theirs.get_submodule(space["makers"][0])
        gone = [channel for channel in range(len(maker.weight)) if channel not in set(keep.tolist())]
        prune = (torch_pruning.prune_linear_out_channels if isinstance(maker, nn.Linear)
                 else torch_pruning.prune_conv_out_channels)
        graph.get_pruning_group(maker, prune, idxs=gone).prune()
        shrinking.remove(ours, space, keep)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=0)
    assert widths_of(ours) == widths_of(theirs)


# ---- what follows a layer

def test_average_optimizer_and_masks_follow():
    _, model = network("resnet18", 8, True)
    average, parameters = copy.deepcopy(model), list(model.parameters())
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in model.named_parameters() if weight.dim() > 1}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model.train()(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    with torch.no_grad():                              # so that slots, masks and average can be told by their weights
        for name, weight in model.named_parameters():
            optimizer.state[weight]["momentum_buffer"].copy_(weight)
            average.get_parameter(name).copy_(weight)
            if name in masks:
                weight.mul_(masks[name])
    for space in model.channels():
        if not space["name"].startswith("stream"):
            keep = some_keep(model, space, 0.7, torch.Generator().manual_seed(0))
            shrinking.remove(model, space, keep, average, optimizer, masks)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    for name, weight in model.named_parameters():
        slot = optimizer.state[weight]["momentum_buffer"]
        assert torch.equal(slot, average.get_parameter(name)), name
        assert torch.equal(slot * masks[name] if name in masks else slot, weight), name
        assert weight.grad is None or weight.grad.shape == weight.shape
    before = model.layer1[0].conv1.weight.clone()
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layer1[0].conv1.weight, before)


def test_shrink_layer_by_hand():
    keep_in, keep_out = torch.tensor([0, 2]), torch.tensor([1, 3])
    layer = nn.Linear(6, 4)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert shrinking.shrink_layer(layer, keep_in, keep_out, unfold_factor=2) is layer
    assert torch.equal(layer.weight, weight[[1, 3]][:, [0, 1, 4, 5]]) and torch.equal(layer.bias, bias[[1, 3]])
    assert (layer.in_features, layer.out_features) == (4, 2)
    layer = nn.Conv2d(8, 4, 3, groups=2)
    weight = layer.weight.detach().clone()
    shrinking.shrink_layer(layer, torch.tensor([0, 3, 5, 6]), torch.tensor([1, 2]))
    assert torch.equal(layer.weight, torch.stack([weight[1, [0, 3]], weight[2, [1, 2]]]))
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 2, 2)
    layer = nn.Conv2d(5, 5, 3, groups=5)
    shrinking.shrink_layer(layer, keep_indexes_output=keep_out)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (2, 2, 2)
    assert layer(torch.ones(1, 2, 4, 4)).shape == (1, 2, 2, 2)
    layer = nn.BatchNorm2d(4)
    layer.running_mean.copy_(torch.arange(4))
    shrinking.shrink_layer(layer, keep_indexes_output=keep_out)
    assert layer.running_mean.tolist() == [1, 3] and layer.num_features == 2
    layer.eval()(torch.ones(1, 2, 3, 3))


@pytest.mark.parametrize("inputs, outputs, message", [
    ([0, 1, 2], None, r"inputs of 2 groups: \[3, 0\] would stay"),
    ([0, 1, 4], None, r"\[2, 1\] would stay"), (None, [0, 1], r"outputs of 2 groups: \[2, 0\] would stay"),
    (None, [2, 1], "rising order")])
def test_groups_that_would_keep_different_numbers_are_refused(inputs, outputs, message):
    layer = nn.Conv2d(8, 4, 3, groups=2)
    keep = [None if indexes is None else torch.tensor(indexes) for indexes in (inputs, outputs)]
    with pytest.raises(ValueError, match=message):
        shrinking.shrink_layer(layer, *keep)
    assert layer.weight.shape == (4, 4, 3, 3)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**31))
def test_balanced_takes_equally_many_weak_channels_from_every_group(groups, size, round_to, share, seed):
    """Rows and columns as in a network with shuffle; the strong ones stay, and a group keeps at least one."""
    count, generator = groups * groups * size, torch.Generator().manual_seed(seed)
    rows, order = torch.arange(count) // (count // groups), torch.arange(count).view(groups, -1).t().flatten()
    columns = torch.empty(count, dtype=torch.long)
    columns[order] = torch.arange(count) // (count // groups)
    weak, scores = torch.rand(count, generator=generator) < share, torch.rand(count, generator=generator)
    keep = shrinking.balanced(weak, scores, rows, columns, round_to)
    gone = torch.ones(count, dtype=torch.bool)
    gone[keep] = False
    assert bool((keep.diff() > 0).all()) and bool(weak[gone].all())
    for part in (rows, columns):
        left = torch.bincount(part[keep], minlength=groups)
        assert left.min() == left.max() >= 1
    assert len(keep) == count or len(keep) % round_to == 0
    if bool(weak.all()) and round_to == 1:
        assert len(keep) == groups


def test_balanced_removes_the_weakest():
    rows = torch.zeros(6, dtype=torch.long)
    scores = torch.tensor([5.0, 1, 4, 2, 6, 3])
    assert shrinking.balanced(scores < 4.5, scores, rows, rows).tolist() == [0, 4]
    assert shrinking.balanced(scores < 4.5, scores, rows, rows, round_to=4).tolist() == [0, 2, 4, 5]
    two = torch.tensor([0, 0, 0, 1, 1, 1])
    assert shrinking.balanced(scores < 4.5, scores, two, two).tolist() == [0, 4]
    assert shrinking.balanced(scores < 2.5, scores, two, two).tolist() == [0, 2, 4, 5]


def test_unknown_buffers_and_lost_blocks_come_from_the_file():
    architecture, model = network("resnet18", 8, True)
    block = model.layer2[1]
    block.conv1 = block.bn1 = block.conv2 = block.bn2 = None
    images = torch.randn(2, 3, 16, 16)
    again = resnet_factorized.build(**architecture).eval()
    checkpoint.load_weights(again, architecture, checkpoint.network_of(model, architecture))
    assert again.layer2[1].conv1 is None and torch.equal(again(images), model(images))
    assert "layer2.1.conv1" not in [space["name"] for space in again.channels()]


def test_network_names_every_layer_in_its_spaces():
    """But for the classifier, each layer's outputs are in one space, or in a branch and its stream."""
    for name, groups, shuffle in NETWORKS[:5]:
        _, model = network(name, groups, shuffle)
        makers = [maker for space in model.channels() for maker in space["makers"] if not space["branch"]]
        layers = [layer for layer, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        assert sorted(makers) == sorted(set(layers) - {"linear"})
        readers = [reader for space in model.channels() for reader in space["readers"]]
        assert sorted(readers) == sorted(set(layers) - {"conv1"})
    assert models.build("lenet5").channels()


# ---- dead channels

@pytest.mark.parametrize("name, groups, shuffle", [("resnet18", 8, True), ("resnet18", 1, False), ("resnet50", 4, True),
                                                   ("lenet5", None, None), ("resnet20", None, None),
                                                   ("mobilenet", None, None), ("wrn-10-2", None, None)])
def test_dead_channels_leave_without_a_trace(name, groups, shuffle):
    _, model = network(name, groups, shuffle)
    generator, expected = torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for space in model.channels():
            if space["name"].startswith("stream") or space["branch"] or len(space["readers"]) > 1:
                continue
            gone = torch.ones(len(model.get_submodule(space["makers"][0]).weight), dtype=torch.bool)
            gone[some_keep(model, space, 0.4, generator)] = False
            expected += int(gone.sum())
            reader = model.get_submodule(space["readers"][0])
            reads = gone
            if space["shuffled"]:
                reads = gone[shrinking.order_of(model.get_submodule(space["shuffled"]), len(gone))]
            for part, own in zip(reader.weight.chunk(getattr(reader, "groups", 1)),
                                 reads.chunk(getattr(reader, "groups", 1)), strict=True):
                part[:, own.repeat_interleave(space["unfold"])] = 0
        images = torch.randn(2, 3, 32, 32)
        before, outputs = copy.deepcopy(model), model(images)
        assert shrinking.remove_dead(model) == expected > 0
        torch.testing.assert_close(model(images), outputs, atol=1e-5 * max(1, outputs.abs().max().item()), rtol=0)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.parameters())
    assert shrinking.remove_dead(model) == 0


def test_a_silent_filter_leaves_only_where_its_norm_gives_nothing():
    _, model = network("resnet18", 1, False)
    norm = model.layer1[0].bn1
    with torch.no_grad():
        model.layer1[0].conv1.weight[:4] = 0
        norm.running_mean[:4], norm.bias[:4] = 0, torch.tensor([-1.0, 0.0, 0.5, -0.2])
        images = torch.randn(2, 3, 16, 16)
        outputs = model(images)
        assert shrinking.remove_dead(model) == 3 and len(model.layer1[0].conv1.weight) == 61
        torch.testing.assert_close(model(images), outputs, atol=1e-4, rtol=1e-4)


def test_other_activations_keep_silent_filters():
    model = models.build("resnet20", activation="sigmoid").eval()
    with torch.no_grad():
        model.layer1[0].conv1.weight[:4] = 0
    assert shrinking.remove_dead(model) == 0


def test_a_chain_of_dead_channels_leaves_as_a_whole():
    model = models.build("lenet5").eval()
    with torch.no_grad():
        model.linear3.weight[:, :5] = 0                       # nobody reads five of linear2, which alone read one
        model.linear2.weight[5:, 7] = 0
    assert shrinking.remove_dead(model) == 6
    assert model.linear1.out_features == 119 and model.linear2.out_features == 79


# ---- layers of somebody's own network

def test_steps_of_few_bits_stay_when_their_layer_shrinks_under_an_optimizer():
    model = quantization.quantize_layers(models.build("lenet5"), {"conv1": [3, 3], "conv2": [3, 3]})
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    before = optimizer.state[model.conv1.activation_step]["exp_avg"].clone()
    space = next(space for space in model.channels() if space["name"] == "conv1")
    shrinking.remove(model, space, torch.tensor([0, 2, 5]), optimizer=optimizer)
    assert torch.equal(optimizer.state[model.conv1.activation_step]["exp_avg"], before) and before.dim() == 0
    assert optimizer.state[model.conv1.weight]["exp_avg"].shape == model.conv1.weight.shape == (3, 3, 5, 5)
    optimizer.zero_grad()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_of_flattened_channels_keeps_all_entries_of_each(affine):
    norm, images = nn.BatchNorm1d(24, affine=affine), torch.randn(5, 6, 4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    expected = norm.eval()(images.flatten(1)).view(5, 6, 4)[:, [0, 2, 5]].flatten(1)
    shrinking.shrink_layer(norm, keep_indexes_input=torch.tensor([0, 2, 5]), unfold_factor=4)
    assert norm.num_features == 12
    torch.testing.assert_close(norm(images[:, [0, 2, 5]].flatten(1)), expected)


@pytest.mark.parametrize("made, read", [(2, 4), (4, 2)])
def test_other_groups_on_each_side_are_refused_by_name(made, read):
    model = nn.Sequential(nn.Conv2d(4, 8, 1, groups=made), nn.Conv2d(8, 8, 1, groups=read))
    space = resnet_factorized.space("0", ["0"], readers=["1"])
    with pytest.raises(ValueError, match=f"channels of 0 are made in {made} groups and read in {read}"):
        shrinking.partitions(model, space)


def test_a_resized_convolution_keeps_all_but_its_width():
    layer = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, padding_mode="reflect", bias=False)
    fresh, images = layer_like(layer, (4, 8)), torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        fresh.weight.copy_(layer.weight)
    torch.testing.assert_close(fresh(images), layer(images))
    assert layer_like(layer, (4, 6)).weight.shape == (6, 4, 3, 3)


def test_what_pads_otherwise_than_with_zeros_is_not_computed_as_if_it_did():
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular")
    model, images = nn.Sequential(layer), torch.randn(1, 8, 5, 5)
    expected = model(images)
    compiling.compute_as(model, "dense")
    torch.testing.assert_close(model(images), expected)
    with pytest.raises(ValueError, match="pads with zeros, not with padding_mode 'circular'"):
        quantization.quantized(layer, [3, 3])
