"""MorphNet's structures: their files, their expansion, and the networks rebuilt from them."""
import json
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Plain, Tiny, macs_by_torch, weights_of
from torch import nn

import models
import morphnet
import resnet_factorized
from engine import checkpoint
from engine.widths import widths_of

DEVICE = (1e9, 1e8)        # MACs and bytes a second


# ---- files

def test_structure_round_trip(tmp_path, resnet):
    structure = resnet[2] | {"layer4.1.conv1": 0}
    morphnet.write_structure(tmp_path / "structure.json", structure)
    assert morphnet.read_structure(tmp_path / "structure.json") == structure
    assert json.loads((tmp_path / "structure.json").read_text()) == structure


@pytest.mark.parametrize("content, reason", [
    (b'{"a": 3, "b"', "no JSON"), (b"", "no JSON"), (b"\xff\xfe\x00", "no JSON"), (b"[" * 100_000, "no JSON"),
    (b"[1, 2]", "one object"), (b"{}", "one object"), (b"7", "one object"), (b'{"conv1": -1}', "conv1 is -1"),
    (b'{"conv1": 8.0}', "conv1 is 8.0"), (b'{"a": 1, "conv1": true}', "conv1 is True"), (b'{"conv1": NaN}', "is nan"),
    (b'{"conv1": "8"}', "conv1 is '8'"), (b'{"conv1": null}', "conv1 is None")])
def test_damaged_structures_are_refused(tmp_path, content, reason):
    path = tmp_path / "structure.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refused:
        morphnet.read_structure(path)
    assert str(path) in str(refused.value)


def test_an_absent_structure_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        morphnet.read_structure(tmp_path / "absent.json")


@pytest.mark.parametrize("change, reason", [
    ({"layer1.0.conv1": 12}, "layer1.0.conv1 cannot have width 12: it takes a multiple of 8 or 0"),
    ({"stream0": 0}, "stream0 cannot have width 0: it takes a multiple of 8$"), ({"stream2": 8.0}, "width 8.0"),
    ({"stream0": -8}, "width -8"), ({"other": 8}, "other is in the structure but not in the network"),
    ({"stream4": None}, "stream4 is in the network but not in the structure")])
def test_structures_of_other_networks_are_refused(resnet, change, reason):
    model, sizes, structure = resnet
    structure = {name: width for name, width in (structure | change).items() if width is not None}
    before = widths_of(model)
    for function in (morphnet.rebuild, lambda *given: morphnet.expand(*given, sizes, "macs", 1e8)):
        with pytest.raises(ValueError, match=reason):
            function(model, structure)
    assert widths_of(model) == before


# ---- expansion

def rounded(structure, steps, factor):
    return {name: max(1, math.floor(factor * width / steps[name] + Fraction(1, 2))) * steps[name] if width else 0
            for name, width in structure.items()}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_expansion_fits_and_the_next_factor_does_not(resnet, data):
    model, sizes, full = resnet
    structure = {name: 8 * data.draw(st.integers(0 if name.startswith("layer") else 1, width // 8), name)
                 for name, width in full.items()}
    what, round_to = data.draw(st.sampled_from(morphnet.METRICS)), data.draw(st.sampled_from([1, 2, 12, 16]))
    step = math.lcm(8, round_to)
    steps = dict.fromkeys(full, step)
    least = morphnet.cost_of(sizes, rounded(structure, steps, 0), what, DEVICE)
    budget = least * data.draw(st.floats(1, 200))
    found, factor = morphnet.expand(model, structure, sizes, what, budget, round_to, DEVICE)
    assert morphnet.cost_of(sizes, found, what, DEVICE) <= budget
    assert all(width % step == 0 and (width > 0) == (structure[name] > 0) for name, width in found.items())
    following = min(Fraction(2 * found[name] + step, 2 * width) for name, width in structure.items() if width)
    assert found == rounded(structure, steps, Fraction(factor)) and factor < following
    assert morphnet.cost_of(sizes, rounded(structure, steps, following), what, DEVICE) > budget
    assert (found, factor) == morphnet.expand(model, structure, sizes, what, budget, round_to, DEVICE)


def test_expansion_by_hand():
    model = Plain()
    sizes = morphnet.sizes_of(model, (1, 4, 4))
    structure = {"conv": 1, "hidden": 2}         # MACs at factor f: 144 (f) + 16 (f) (2 f) + (2 f) 2
    assert morphnet.cost_of(sizes, structure) == 144 + 32 + 4
    found, factor = morphnet.expand(model, structure, sizes, "macs", 144 * 3 + 16 * 3 * 6 + 6 * 2)
    assert found == {"conv": 3, "hidden": 6} and 2.75 <= factor < 3.25
    found, factor = morphnet.expand(model, structure, sizes, "macs", 144 * 3 + 16 * 3 * 6 + 6 * 2 - 1)
    assert found == {"conv": 3, "hidden": 5} and factor == pytest.approx(2.75)
    found, factor = morphnet.expand(model, {"conv": 3, "hidden": 4}, sizes, "macs", 162)        # also narrower
    assert found == {"conv": 1, "hidden": 1} and factor < 0.5
    with pytest.raises(ValueError, match="budget of 161 .*is below 162.0"):
        morphnet.expand(model, structure, sizes, "macs", 161)


def test_an_expansion_to_the_network_itself_changes_nothing(resnet):
    model, sizes, structure = resnet
    found, factor = morphnet.expand(model, structure, sizes, "macs", 70_980_608)
    assert found == structure and 1 <= factor < 1.1


@pytest.mark.parametrize("budget, round_to", [(0, 1), (-1, 1), (math.nan, 1), (math.inf, 1), (1e9, 0), (1e9, 1.5)])
def test_impossible_budgets_are_refused(budget, round_to):
    model = Plain()
    sizes = morphnet.sizes_of(model, (1, 4, 4))
    with pytest.raises(ValueError, match="must be above 0"):
        morphnet.expand(model, {"conv": 1, "hidden": 2}, sizes, "macs", budget, round_to)


def test_without_a_width_to_change_the_factor_is_one():
    model = models.build("resnet20", shortcut="A")
    structure = dict.fromkeys(morphnet.structure_of(model, None), 0)
    assert morphnet.expand(model, structure, morphnet.sizes_of(model, (3, 32, 32)), "macs", 1e9) == (structure, 1.0)


# ---- rebuilding

@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_rebuilt_network_costs_what_its_structure_says(resnet, data):
    _, sizes, full = resnet
    structure = {name: 8 * data.draw(st.integers(0 if name.startswith("layer") else 1, 5), name) for name in full}
    model = morphnet.rebuild(resnet_factorized.build("resnet18", 8), structure)
    assert macs_by_torch(model) == morphnet.cost_of(sizes, structure)
    assert weights_of(model) == morphnet.cost_of(sizes, structure, "parameters")
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name, arguments, shape", [
    ("lenet5", {"in_channels": 1, "size": 28}, (1, 28, 28)), ("mobilenet", {}, (3, 32, 32)),
    ("resnet20", {"shortcut": "A"}, (3, 32, 32)), ("resnet20", {"shortcut": "B"}, (3, 32, 32)),
    ("wrn-10-2", {}, (3, 32, 32)), ("wrn-16-1", {}, (3, 32, 32))])
def test_the_other_networks_are_rebuilt_saved_and_loaded(name, arguments, shape, tmp_path):
    model = models.build(name, **arguments)
    sizes, removable = morphnet.sizes_of(model, shape), morphnet.blocks_of(model)
    structure = {space: width // 2 + 1 for space, width in morphnet.structure_of(model, None).items()}
    structure |= dict.fromkeys(list(removable)[::2], 0)
    predicted = morphnet.cost_of(sizes, structure), morphnet.cost_of(sizes, structure, "parameters")
    model = morphnet.rebuild(model, structure)
    assert predicted == (macs_by_torch(model, shape), weights_of(model))
    assert predicted == (morphnet.cost(model, morphnet.sizes_of(model, shape)), weights_of(model))
    check_saved(model, lambda: models.build(name, **arguments), shape, tmp_path)


def check_saved(model, build, shape, folder):
    """The network from its file gives the same outputs."""
    checkpoint.save(folder / "model.pt", checkpoint.network_of(model, {"model": "x"}))
    loaded = build()
    checkpoint.load_weights(loaded, {"model": "x"}, checkpoint.read(folder / "model.pt"))
    images = torch.randn(2, *shape)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), loaded.eval()(images))


@pytest.mark.parametrize("groups", [1, 8])
def test_a_shuffled_network_is_rebuilt_saved_and_loaded(groups, tmp_path):
    structure = morphnet.structure_of(resnet_factorized.build("resnet18", groups), None)
    structure = {name: width - 24 for name, width in structure.items()} | {"layer2.1.conv1": 0, "layer3.0.conv1": 0}
    model = morphnet.rebuild(resnet_factorized.build("resnet18", groups).train(), structure)
    assert model.training and all(module.training for module in model.modules())
    assert {m.groups for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1"} == {groups}
    assert morphnet.structure_of(model, 0.01) == {name: width for name, width in structure.items() if width}
    check_saved(model, lambda: resnet_factorized.build("resnet18", groups), (3, 16, 16), tmp_path)


def test_a_rebuilt_network_starts_another_iteration():
    model = resnet_factorized.build("resnet18", 8)
    structure = dict.fromkeys(morphnet.structure_of(model, None), 16) | {"layer1.1.conv1": 0}
    morphnet.rebuild(model, structure)
    sizes = morphnet.sizes_of(model, (3, 32, 32))
    found, _ = morphnet.expand(model, morphnet.structure_of(model, 0.01), sizes, "macs", 5e6)
    morphnet.rebuild(model, found | {"layer4.0.conv1": 0, "layer4.1.conv1": 0})
    assert macs_by_torch(model) == morphnet.cost_of(sizes, found | {"layer4.0.conv1": 0, "layer4.1.conv1": 0}) < 5e6
    morphnet.structure_of(model, 0.01)


def test_a_block_at_width_zero_is_its_shortcut():
    model = resnet_factorized.build("resnet18", 8)
    structure = morphnet.structure_of(model, None) | {"layer1.0.conv1": 0, "layer2.0.conv1": 0}
    model = morphnet.rebuild(model, structure).eval()
    hidden = torch.randn(2, 64, 8, 8)
    assert torch.equal(model.layer1[0](hidden), F.relu(hidden))
    assert torch.equal(model.layer2[0](hidden), F.relu(model.layer2[0].shortcut(hidden)))
    assert not list(model.layer1[0].parameters()) and len(list(model.layer2[0].parameters())) == 3
    assert model.layer1[1].conv1 is not None


def test_a_rebuilt_network_starts_from_fresh_weights(resnet):
    model, _, structure = resnet_factorized.build("resnet18", 8), *resnet[1:]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    morphnet.rebuild(model, structure | {"layer4.1.conv1": 256})
    assert not any(bool((tensor == 7).any()) for tensor in model.state_dict().values())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (layer.out_channels // layer.groups * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1), name
        if isinstance(layer, nn.BatchNorm2d):
            assert bool((layer.weight == 1).all()) and bool((layer.running_mean == 0).all())


def test_without_batch_norm_the_start_is_torchs():
    model = morphnet.rebuild(Plain(), {"conv": 3, "hidden": 5})
    assert model.hidden.weight.shape == (5, 48) and model.hidden.weight.abs().max() <= 48 ** -0.5
    assert model.conv.weight.abs().max() <= 1 / 3


def test_an_order_of_removed_channels_does_not_outlive_the_rebuilding(resnet):
    model = resnet_factorized.build("resnet18", 8)
    model.layer1[0].order = torch.arange(63, -1, -1)
    morphnet.rebuild(model, resnet[2] | {"layer1.0.conv1": 32})
    assert model.layer1[0].order is None and model.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_precision_and_mode_stay():
    model = morphnet.rebuild(Tiny().double().eval(), {"a": 2, "b": 4})
    assert not any(module.training for module in model.modules())
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert model.depth.groups == model.depth.out_channels == 2 and model.linear.in_features == 16
