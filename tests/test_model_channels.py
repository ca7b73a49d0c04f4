"""Small networks: which channels belong together, and that they can leave without a trace."""
from collections import Counter
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import blocks_of, images_of, layers_of, lively, residual, small
from torch import nn

import models
from engine import checkpoint
from models import BasicBlock, WideBlock, build

# ---- selective addition and removed branches

@residual
def test_positions_of_all_channels_in_order_change_nothing(name, arguments, side):
    model, images = lively(build(name, **arguments)), images_of(side, dtype=torch.float64)
    expected = model(images)
    for block in blocks_of(model).values():
        block.positions = torch.arange(block.conv2.out_channels)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("block", [BasicBlock(16, 32, 2, "relu", "A"), BasicBlock(16, 16, 1, "relu", "B"),
                                   BasicBlock(16, 32, 2, "relu", "B"), WideBlock(16, 16, 1, "relu"),
                                   WideBlock(16, 32, 2, "relu")], ids=lambda block: repr(type(block.shortcut)))
def test_branch_is_added_at_its_positions_and_removed_as_a_whole(block):
    block, images = lively(deepcopy(block)), images_of(8, channels=16, dtype=torch.float64)
    last = (lambda sums: sums.relu()) if isinstance(block, BasicBlock) else (lambda sums: sums)
    wide = isinstance(block, WideBlock) and block.shortcut is not None
    shortcut = block.bn1(images).relu() if wide else images
    shortcut = block.shortcut(shortcut) if block.shortcut is not None else shortcut
    branch = block.bn2 if isinstance(block, BasicBlock) else block.conv2
    seen = []
    handle = branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
    block(images)
    handle.remove()
    positions = torch.randperm(shortcut.shape[1])
    expected = shortcut.clone()
    for k, position in enumerate(positions.tolist()):
        expected[:, position] += seen[0][:, k]
    block.positions = positions
    torch.testing.assert_close(block(images), last(expected))
    block.remove_branch()
    torch.testing.assert_close(block(images), last(shortcut))
    kept = {key.split(".")[0] for key in block.state_dict()}
    assert kept <= {"shortcut", "bn1"} and ("bn1" in kept) == wide


@residual
def test_network_without_branches_still_trains_and_names_its_channels(name, arguments, side):
    model = build(name, **arguments)
    removed = list(blocks_of(model))[1:]
    for block in removed:
        model.get_submodule(block).remove_branch()
    model(images_of(side)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    existing = set(dict(model.named_modules()))
    spaces = model.channels()
    assert sum(space["branch"] is not None for space in spaces) == 1
    assert {layer for space in spaces for layer in layers_named(space)} <= existing
    assert len({space["name"] for space in spaces}) == len(spaces)
    assert_masked_equals_sliced(lively(model), images_of(side, dtype=torch.float64), seed=0)


def test_positions_hold_under_autocast():
    block = BasicBlock(16, 16, 1, "relu", "B").eval()
    block.positions = torch.arange(16)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(block(images_of(8, channels=16))).all())


# ---- channels: what is named

def layers_named(space):
    return space["makers"] + space["norms"] + space["depthwise"] + space["readers"]


@small
def test_every_layer_is_named_once_in_each_role(name, arguments, side):
    model = build(name, **arguments)
    spaces, untied = model.channels(), arguments.get("shortcut") == "A"
    counted = [space for space in spaces if untied or space["branch"] is None]
    found = {role: Counter(layer for space in counted for layer in space[role])
             for role in ("makers", "norms", "depthwise", "readers")}
    layers = layers_of(model)
    classifier = list(layers)[-1]
    depthwise = {key for key, module in layers.items() if getattr(module, "groups", 1) > 1}
    expected = {"depthwise": depthwise, "makers": set(layers) - depthwise - {classifier},
                "readers": set(layers) - depthwise - {"conv1"}, "norms": set(layers_of(model, nn.BatchNorm2d))}
    if untied:      # nothing shrinks the streams: neither the stem, nor what reads them
        expected["makers"] -= {"conv1"}
        expected["norms"] -= {"bn1"}
        expected["readers"] = {key for key in layers if key.endswith("conv2")}
    assert found == {role: Counter(names) for role, names in expected.items()}


@small
def test_widths_of_a_space_agree(name, arguments, side):
    model = build(name, **arguments)
    for space in model.channels():
        assert list(space) == ["name", "makers", "norms", "depthwise", "readers", "unfold", "shuffled", "branch"]
        widths = {len(model.get_submodule(maker).weight) for maker in space["makers"]}
        widths |= {model.get_submodule(norm).num_features for norm in space["norms"]}
        for layer in map(model.get_submodule, space["depthwise"]):
            widths |= {layer.in_channels, layer.out_channels, layer.groups}
        for layer in map(model.get_submodule, space["readers"]):
            inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
            widths.add(inputs / space["unfold"])
        assert len(widths) == 1, space
        assert space["name"] == space["makers"][0] or len(space["makers"]) > 1
        assert space["shuffled"] is None and (space["branch"] is None or not space["readers"])


@residual
def test_spaces_of_a_residual_network(name, arguments, side):
    model = build(name, **arguments)
    spaces = model.channels()
    assert len({space["name"] for space in spaces}) == len(spaces)
    assert [space["branch"] for space in spaces if space["branch"]] == list(blocks_of(model))
    streams = [space["name"] for space in spaces if len(space["makers"]) > 1]
    assert streams == ([] if arguments.get("shortcut") == "A" else ["stream1", "stream2", "stream3"])
    assert ("conv1" in [space["name"] for space in spaces]) == (name == "wrn-10-2")     # before stage 1


def test_unfold_is_the_area_that_is_flattened():
    unfolds = {name: [space["unfold"] for space in build(name).channels()] for name in models.PLAIN}
    assert unfolds == {"lenet5": [1, 25, 1, 1], "lenet5-student": [1, 25, 1], "cifar-quick": [1, 1, 16, 1]}


# ---- channels: they can leave

@torch.no_grad()
def mask(model, space, gone):
    """Zero the channels `gone`: behind batch norm; at the filters too where there is none, or it follows the sum."""
    filters = not space["norms"] or isinstance(model, models.WideResNet)
    for layer in map(model.get_submodule, space["norms"] + space["makers"] * filters):
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0


def cut(model, space, keep):
    """Keep the channels `keep` alone: slices of the tensors, and the attributes that name widths."""
    for layer in map(model.get_submodule, space["makers"] + space["norms"] + space["depthwise"]):
        for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.dim():
                getattr(layer, key).data = tensor.data[keep]
    for layer in map(model.get_submodule, space["readers"]):
        columns = (keep[:, None] * space["unfold"] + torch.arange(space["unfold"])).flatten()
        layer.weight.data = layer.weight.data[:, columns]
    for layer in map(model.get_submodule, layers_named(space)):
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_features = len(layer.weight)
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        else:
            layer.groups = len(layer.weight) if layer.groups > 1 else 1
            layer.out_channels, layer.in_channels = len(layer.weight), layer.groups * layer.weight.shape[1]
    if space["branch"]:
        model.get_submodule(space["branch"]).positions = keep


def drawn(model, space, generator):
    """A random set of channels that stay, at least one, and those that go, at least half: not all of them are dead."""
    width = len(model.get_submodule(space["makers"][0]).weight)
    order = torch.randperm(width, generator=generator)
    count = int(torch.randint(1, width // 2 + 1, (), generator=generator))
    return order[:count].sort().values, order[count:]


@torch.no_grad()
def assert_masked_equals_sliced(model, images, seed, branches=False):
    """Space by space, then all together: the same outputs, which are not the whole network's."""
    generator, original = torch.Generator().manual_seed(seed), model(images)
    all_masked, all_sliced = deepcopy(model), deepcopy(model)
    for space in model.channels():
        if bool(space["branch"]) != branches:
            continue
        keep, gone = drawn(model, space, generator)
        mask(all_masked, space, gone)
        cut(all_sliced, space, keep)
        masked, sliced = deepcopy(model), deepcopy(model)
        mask(masked, space, gone)
        cut(sliced, space, keep)
        expected = masked(images)
        torch.testing.assert_close(sliced(images), expected, rtol=1e-8, atol=1e-8, msg=lambda text, space=space:
                                   f"{space['name']}: {text}")
        assert not torch.allclose(expected, original), f"{space['name']} changes nothing"
    torch.testing.assert_close(all_sliced(images), all_masked(images), rtol=1e-8, atol=1e-8)
    return all_sliced


@small
def test_masked_equals_sliced(name, arguments, side):
    model, images = lively(build(name, **arguments)), images_of(side, dtype=torch.float64)

    @settings(max_examples=1 if name == "mobilenet" else 3, deadline=None)
    @given(st.integers(0, 2**31))
    def check(seed):
        sliced = assert_masked_equals_sliced(model, images, seed)
        sliced.train()(images).sum().backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in sliced.parameters())
    check()


@residual
def test_masked_equals_sliced_at_the_ends_of_branches(name, arguments, side):
    model, images = lively(build(name, **arguments)), images_of(side, dtype=torch.float64)
    assert_masked_equals_sliced(model, images, seed=0, branches=True)


@small
def test_sliced_weights_come_back_from_a_checkpoint(name, arguments, side):
    saved, architecture = lively(build(name, **arguments)).float(), {"model": name, **arguments}
    generator = torch.Generator().manual_seed(0)
    for space in saved.channels():      # a stream cannot shrink below a branch with positions
        if space["branch"] or not space["name"].startswith("stream"):
            cut(saved, space, drawn(saved, space, generator)[0])
    for block in list(blocks_of(saved))[1:2]:
        saved.get_submodule(block).remove_branch()
    fresh = build(name, **arguments).eval()
    checkpoint.load_weights(fresh, architecture, checkpoint.network_of(saved, architecture))
    assert torch.equal(fresh(images_of(side)), saved(images_of(side)))
