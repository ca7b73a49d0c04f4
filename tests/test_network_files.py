"""Networks in files: compact ones, and what loads into a network."""
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_runs import same
from samples import small_network
from torch import nn

from engine import checkpoint, packing
from engine.widths import widths_of
from resnet_factorized import build

ARCHITECTURE = {"name": "resnet18", "groups": 8, "shuffle": True, "num_classes": 10, "in_channels": 3}


# ---- compact files

finite_halves = st.floats(-65504, 65504, width=32)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), finite_halves), min_size=0, max_size=40), st.sampled_from([0, 1, 2]),
       st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_compact_keeps_zeros_and_rounds_the_rest(values, form, dtype):
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    tensor = [tensor, tensor.view(1, -1, 1), tensor[:len(values) // 2 * 2].view(2, -1).t()][form]
    weights = {"a": tensor, "steps": torch.tensor([0, 3])}
    state = packing.expand({"weights": packing.compact(weights)})
    found = state["weights"]["a"]
    assert found.dtype == torch.float16 and torch.equal(found, tensor.half())
    assert bool((found[tensor == 0] == 0).all())
    assert torch.equal(state["weights"]["steps"], weights["steps"])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), finite_halves), min_size=0, max_size=40), st.integers(1, 4))
def test_eight_bits_round_each_row_to_its_own_step(values, columns):
    tensor = torch.tensor(values[:len(values) // columns * columns]).view(-1, columns, 1)
    packed = packing.compact({"a": tensor, "b": torch.tensor(values)}, eight_bits=True)
    found = packing.expand({"weights": packed})["weights"]
    rounded = tensor.half().float()
    steps = (rounded.abs().flatten(1).amax(1) / 127).view(-1, 1, 1) if len(tensor) else torch.zeros(0, 1, 1)
    signs = "positive" in packed["a"]
    assert found["a"].dtype == torch.float16 and found["a"].shape == tensor.shape
    assert bool(((found["a"].float() - rounded).abs() <= (0 if signs else 0.501) * steps + rounded.abs() / 2000).all())
    assert bool((found["a"][tensor == 0] == 0).all())
    assert torch.equal(found["b"], torch.tensor(values).half()), "of one dimension: as in half precision"
    again = packing.to_eight_bits({"a": tensor})["a"]
    assert torch.equal(again, found["a"])


def test_eight_bits_are_torchs():
    tensor = torch.randn(6, 4, 3, 3)
    codes, steps = packing.codes_of(tensor)
    theirs = torch.fake_quantize_per_channel_affine(tensor, steps, torch.zeros(6, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(codes * steps.view(-1, 1, 1, 1), theirs, rtol=1e-6, atol=0)
    assert codes.abs().flatten(1).amax(1).tolist() == [127] * 6
    torch.testing.assert_close(packing.from_codes(codes, steps).float(), theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", [
    {"codes": torch.ones(6)}, {"codes": torch.ones(5, dtype=torch.int8)}, {"steps": torch.ones(3)},
    {"steps": torch.ones(2, dtype=torch.float64)}, {"steps": torch.ones(2, 1)}])
def test_codes_that_do_not_fit_their_shape_are_refused(change):
    packed = packing.pack(torch.arange(1.0, 7).view(2, 3), eight_bits=True)
    assert packing.unpack(packed).shape == (2, 3)
    with pytest.raises(ValueError, match="codes of|places"):
        packing.unpack(packed | change)


def pruned_resnet(share=0.9):
    """A seeded ResNet-18 with `share` of each convolution's weights zero."""
    torch.manual_seed(0)
    model = build("resnet18", groups=8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) > share)
    return model


def test_compact_file_is_small_and_exact(tmp_path):
    model = pruned_resnet()
    network = checkpoint.network_of(model, ARCHITECTURE)
    checkpoint.save(tmp_path / "plain.pt", network)
    checkpoint.save_compact(tmp_path / "compact.pt", network)
    weights, found = network["weights"], checkpoint.read(tmp_path / "compact.pt")
    for name, tensor in weights.items():
        expected = tensor.half() if tensor.is_floating_point() else tensor
        assert torch.equal(found["weights"][name], expected), name
        assert bool((found["weights"][name][tensor == 0] == 0).all()), name
    assert {**found, "weights": 0} == {"format": 1, **network, "weights": 0}
    nonzero = sum(int((tensor != 0).sum()) for tensor in weights.values())
    total = sum(tensor.numel() for tensor in weights.values())
    size = (tmp_path / "compact.pt").stat().st_size
    assert size < 2 * nonzero + total / 8 + 60_000 and size < (tmp_path / "plain.pt").stat().st_size / 8


def test_eight_bits_are_smaller_and_read_alike(tmp_path):
    network = checkpoint.network_of(pruned_resnet(), ARCHITECTURE)
    checkpoint.save_compact(tmp_path / "half.pt", network)
    checkpoint.save_compact(tmp_path / "eight.pt", network, eight_bits=True)
    half, eight = (checkpoint.read(tmp_path / name)["weights"] for name in ("half.pt", "eight.pt"))
    assert (tmp_path / "eight.pt").stat().st_size < 0.75 * (tmp_path / "half.pt").stat().st_size
    for name, tensor in half.items():
        assert eight[name].dtype == tensor.dtype and eight[name].shape == tensor.shape
        if tensor.dim() > 1:
            off, largest = (eight[name].float() - tensor.float()).abs().max(), tensor.abs().max().item()
            assert off <= 0.501 * largest / 127 + largest / 2000
        else:
            assert torch.equal(eight[name], tensor)


def test_compact_bytes_depend_on_nothing_else():
    assert checkpoint.compact_bytes(small_network()) == checkpoint.compact_bytes(small_network())


def test_compact_leaves_the_weights_alone():
    network = small_network()
    checkpoint.compact_bytes(network)
    assert same(network, small_network())


def test_overflow_of_half_names_tensor_and_value(tmp_path):
    weights = {"good": torch.tensor([65504.0, -1.0]), "large.weight": torch.tensor([1.0, -7e4]),
               "nan": torch.tensor([float("nan")]), "steps": torch.tensor(10**6)}
    with pytest.raises(ValueError) as problem:
        checkpoint.save_compact(tmp_path / "a.pt", {"weights": weights})
    message = str(problem.value)
    assert "large.weight" in message and "7e+04" in message and "nan" in message and "65504" in message
    assert "good" not in message and "steps" not in message
    assert os.listdir(tmp_path) == []


# ---- into a network

def read_network(tmp_path, model, architecture, save=checkpoint.save):
    """What a file of this model holds."""
    save(tmp_path / "a.pt", checkpoint.network_of(model, architecture))
    return checkpoint.read(tmp_path / "a.pt")


@pytest.mark.parametrize("other, differs", [
    ({"name": "resnet34"}, "layer1.2.conv1.weight is absent in the file, 64x8x3x3 in the network"),
    ({"groups": 4}, "layer1.0.conv1.weight is 64x8x3x3 in the file, 64x16x3x3 in the network"),
    ({"num_classes": 100}, "linear.weight is 10x512 in the file, 100x512 in the network"),
    ({"in_channels": 1}, "conv1.weight is 64x3x3x3 in the file, 64x1x3x3 in the network"),
    ({"shuffle": False}, "no shape differs"),
])
def test_another_architecture_names_both_and_the_first_tensors(tmp_path, other, differs):
    state = read_network(tmp_path, build(**ARCHITECTURE), ARCHITECTURE)
    wanted = {**ARCHITECTURE, **other}
    model = build(**wanted)
    before = checkpoint.weights_of(model)
    with pytest.raises(ValueError) as problem:
        checkpoint.load_weights(model, wanted, state)
    message = str(problem.value)
    assert str(ARCHITECTURE) in message and str(wanted) in message and differs in message
    assert same(checkpoint.weights_of(model), before)


def test_tensors_that_a_file_lacks_or_adds_are_named(tmp_path):
    state = read_network(tmp_path, build(**ARCHITECTURE), ARCHITECTURE)
    del state["weights"]["bn1.bias"]
    state["weights"]["extra"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="bn1.bias is absent in the file.*extra is one number in the file, absent"):
        checkpoint.load_weights(build(**ARCHITECTURE), ARCHITECTURE, state)


def test_half_precision_loads_into_float32(tmp_path):
    model = pruned_resnet()
    state = read_network(tmp_path, model, ARCHITECTURE, checkpoint.save_compact)
    other = build(**ARCHITECTURE)
    checkpoint.load_weights(other, ARCHITECTURE, state)
    for name, tensor in other.state_dict().items():
        expected = model.state_dict()[name]
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected.half().float() if tensor.is_floating_point() else expected), name


def shrink(block, width):
    """Give one BasicBlock a narrower inside: outputs of conv1, bn1, inputs of conv2."""
    groups, old = block.conv1.groups, block.conv1.out_channels
    kept = torch.cat([torch.arange(width // groups) + group * (old // groups) for group in range(groups)])
    narrow = nn.Conv2d(block.conv1.in_channels, width, 3, block.conv1.stride, 1, groups=groups, bias=False)
    norm, wide = nn.BatchNorm2d(width), nn.Conv2d(width, block.conv2.out_channels, 3, 1, 1, groups=groups, bias=False)
    with torch.no_grad():
        narrow.weight.copy_(block.conv1.weight[kept])
        wide.weight.copy_(block.conv2.weight[:, :width // groups])
        norm.weight.uniform_(0.5, 2)
        norm.running_var.uniform_(0.5, 2)
    block.conv1, block.bn1, block.conv2 = narrow, norm, wide


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_compact])
def test_narrower_layers_are_rebuilt_from_the_file(tmp_path, save):
    torch.manual_seed(0)
    model = build(**ARCHITECTURE)
    shrink(model.layer2[0], 40)
    shrink(model.layer4[1], 8)
    if save is checkpoint.save_compact:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(tensor.half() if tensor.is_floating_point() else tensor)
    state = read_network(tmp_path, model, ARCHITECTURE, save)
    other = build(**ARCHITECTURE).eval()
    checkpoint.load_weights(other, ARCHITECTURE, state)
    assert same(checkpoint.weights_of(other), checkpoint.weights_of(model))
    assert widths_of(other) == widths_of(model)
    assert other.layer2[0].conv1.out_channels == 40 and other.layer2[0].conv1.stride == (2, 2)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other(images), model.eval()(images)), "in evaluation mode as before"


def test_widths_that_the_weights_do_not_have_are_refused(tmp_path):
    state = read_network(tmp_path, build(**ARCHITECTURE), ARCHITECTURE)
    state["widths"]["layer2.0.conv1"] = [64, 40]
    with pytest.raises(ValueError, match="layer2.0.conv1.weight is 128x8x3x3 in the file, 40x8x3x3 in the network"):
        checkpoint.load_weights(build(**ARCHITECTURE), ARCHITECTURE, state)
