"""Packed integers and the inference that computes with them: round trips, exact sums, the same predictions."""
import gzip
import io
import json
import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cifar10
import export
import networks
import predict
import profil
import quantization
import test as few_bits_test
import train
from deploy import integer_inference, onnx_files
from engine import checkpoint
from engine.widths import widths_of
from networks import load_network

NETWORKS = [
    {"name": "resnet20", "shortcut": "A"}, {"name": "resnet20", "shortcut": "B"},
    {"name": "resnet18", "groups": 8, "shuffle": True}, {"name": "mobilenet"}, {"name": "lenet5"},
    {"name": "lenet5", "activation": "tanh"}, {"name": "wrn-10-1"}]


def network_of(images, weight_bits=2, activation_bits=4, given=(), **architecture):
    """(quantized network in evaluation mode, architecture): steps and batch norm from `images`, which it is fit to."""
    architecture = {"num_classes": 10, "in_channels": 3, **architecture}
    model = networks.build(**architecture)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    torch.optim.swa_utils.update_bn([images], model)
    bits = quantization.layer_bits(model, weight_bits, activation_bits, given)
    ranges = quantization.input_ranges(model, [(images, None)])
    return quantization.quantize_layers(model, bits, ranges).eval(), {**architecture, "bits": bits}


def save(path, model, architecture):
    """Write a packed file."""
    integer_inference.save_packed(path, model, {"architecture": architecture, "dataset": "digits",
                                                "widths": widths_of(model)})
    return path


def archive(path, state):
    """Write a dictionary as a compressed checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue()))
    return path


@pytest.fixture
def lenet(tmp_path):
    """(network, images, packed file) of a LeNet-5."""
    images = torch.randn(8, 3, 32, 32)
    model, architecture = network_of(images, name="lenet5")
    return model, images, save(tmp_path / "lenet.packed.gz", model, architecture)


@pytest.fixture(scope="module")
def trained_few(tmp_path_factory):
    """The folder of a short run with few bits."""
    out = tmp_path_factory.mktemp("runs") / "few"
    train.main(["--dataset", "digits", "--limit", "200", "--batch-size", "20", "--epochs", "2", "--model", "lenet5",
                "--weights", "lsq", "--mixing", "none", "--lr", "0.05", "--compile", "off", "--out", str(out)])
    return out


# ---- packing

@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 8), data=st.data())
def test_integers_come_back(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=21))
    packed = integer_inference.pack_integers(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(codes) * bits // 8)
    assert integer_inference.unpack_integers(packed, bits, len(codes)).tolist() == codes


def test_two_bits_are_four_to_a_byte():
    packed = integer_inference.pack_integers(torch.tensor([3, 0, 1, 2, 3]), 2)
    assert packed.tolist() == [0b11000110, 0b11000000]
    with pytest.raises(ValueError, match="2 bytes of torch.uint8 for 18 bits"):
        integer_inference.unpack_integers(packed, 2, 9)


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 8), density=st.floats(0, 1), count=st.integers(1, 50), seed=st.integers(0, 9999))
def test_weights_come_back_and_take_the_smaller_form(bits, density, count, seed):
    draw = torch.Generator().manual_seed(seed)
    low, high = quantization.weight_range(bits)
    weight = torch.randint(low, high + 1, (count, 3), generator=draw)
    if bits == 1:
        weight = torch.where(weight < 0, -1, 1)
    weight = (weight * (torch.rand(count, 3, generator=draw) < density)).to(torch.int8)
    packed = integer_inference.pack_weights(weight, bits)
    assert torch.equal(integer_inference.unpack_weights(packed, bits), weight)
    size = sum(len(packed[name]) for name in ("codes", "kept") if name in packed)
    nonzero = int((weight != 0).sum())
    masked = math.ceil(3 * count / 8) + math.ceil(nonzero * bits / 8)
    whole = math.ceil(3 * count * bits / 8) if bits > 1 or nonzero == 3 * count else math.inf
    assert size == min(whole, masked if nonzero < 3 * count else math.inf)


# ---- exact sums

@pytest.mark.parametrize("groups", [1, 4])
def test_sums_are_those_of_int32(groups):
    """Against a product of int32 matrices of unfolded images, with the largest values that there are."""
    layer = quantization.quantized(nn.Conv2d(8, 12, 3, 2, 1, groups=groups, bias=False), [8, 8], (1.0, -100.0, 155.0))
    with torch.no_grad():
        layer.weight.uniform_(-2, 2)
        layer.weight_step.fill_(0.01)
    inputs = torch.rand(3, 8, 9, 9) * 300 - 150
    layer = integer_inference.integer_layer(layer, "layer", integer_inference.packed_layer(layer))
    codes = (inputs / layer.step).round().clamp(-100, 155)
    columns = F.unfold(codes, 3, 1, 1, 2).to(torch.int32).view(3, groups, -1, 25)
    rows = layer.weight.to(torch.int32).view(groups, 12 // groups, -1)
    expected = torch.stack([torch.stack([rows[g] @ image[g] for g in range(groups)]) for image in columns])
    assert torch.equal(integer_inference.integer_sums(layer, inputs), expected.view(3, 12, 5, 5))
    assert layer.weight.min() == -128 and layer.weight.max() == 127


def test_sums_beyond_32_bits_are_refused(tmp_path):
    layer = quantization.quantized(nn.Linear(70_000, 1), [8, 8], (1.0, 0.0, 1.0))
    with torch.no_grad():
        layer.weight.fill_(-9)
        layer.weight_step.fill_(0.01)
    with pytest.raises(ValueError, match="sums may reach 2,284,800,000, beyond integers of 32 bits; fewer bits"):
        integer_inference.packed(nn.Sequential(layer), {})


# ---- the same network

@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_integer_inference_is_the_simulation(architecture, tmp_path):
    images = torch.randn(12, 3, 32, 32) if architecture["name"] == "lenet5" else torch.randn(12, 3, 16, 16)
    model, built = network_of(images, given=["linear=8/3"] if "lenet" not in architecture["name"] else [],
                              **architecture)
    packed, state = load_network(save(tmp_path / "model.packed.gz", model, built))
    assert quantization.bits_of(packed) == quantization.bits_of(model) == built["bits"]
    with torch.no_grad():
        ours, theirs = model(images), packed(images)
    # a value on the edge between two integers may fall to either side, for other orders of float32 sums
    assert int((ours.argmax(1) != theirs.argmax(1)).sum()) <= 1
    assert (ours - theirs).abs().median() < 0.02 * ours.std()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    left = sum(isinstance(module, nn.BatchNorm2d) for module in packed.modules())
    # wide blocks of one stage normalise sums, not a convolution's outputs alone
    assert left == (norms - 3 if architecture["name"] == "wrn-10-1" else 0) and norms - left == len(state["folded"])


def test_one_bit_with_zeros_and_eight_bits(tmp_path):
    images = torch.randn(8, 3, 32, 32)
    for bits in ((1, 1), (8, 8)):
        model, architecture = network_of(images, *bits, name="lenet5")
        with torch.no_grad():
            model.linear1.weight[:, ::3] = 0
        packed, _ = load_network(save(tmp_path / f"{bits[0]}.packed.gz", model, architecture))
        assert torch.equal(packed.linear1.weight, model.linear1.integers())
        assert bool((packed.linear1.weight[:, ::3] == 0).all())
        with torch.no_grad():
            assert (packed(images) - model(images)).abs().median() < 1e-3


def test_a_shrunk_network_is_packed_and_read(tmp_path):
    model, architecture = network_of(torch.randn(8, 3, 16, 16), name="resnet18", groups=8)
    with torch.no_grad():                 # by the shuffle, each group of conv1 makes one of the channels
        for group, part in enumerate(model.layer1[0].conv2.weight.chunk(8)):
            part[:, group] = 0
    checkpoint.save(tmp_path / "model.pt", {**checkpoint.network_of(model, architecture), "dataset": "digits"})
    source = load_network(tmp_path / "model.pt")
    forward, removed = export.export(*source, tmp_path / "small.packed.gz")
    assert removed == 8 and forward.layer1[0].conv1.out_channels == 56
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        assert int((forward(images).argmax(1) != model(images).argmax(1)).sum()) <= 1


# ---- from the command line

def test_export_test_profile_and_predict_a_packed_file(trained_few, tmp_path, capsys):
    target = tmp_path / "few.packed.gz"
    export.main(["--checkpoint", str(trained_few / "model.pt"), "--out", str(target)])
    printed = capsys.readouterr().out
    changed, of = printed.split(", ")[-1].split(" predictions")[0].split(" of ")
    assert int(changed) <= 3 and of == "360"
    assert target.stat().st_size < 62_006 / 4 + 10_000
    results = []
    for path in (trained_few / "model.pt", target):
        few_bits_test.main(["--checkpoint", str(path), "--json"])
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=100 * 3 / 360)
    assert [result["precision"].split(", ")[1] for result in results] == ["integers simulated",
                                                                         "integers computed exactly"]
    assert results[1]["bytes"] == {"packed": target.stat().st_size}
    assert results[0]["bytes"]["packed"] == pytest.approx(target.stat().st_size, abs=200)
    profiles = []
    for path in (trained_few / "model.pt", target):
        profil.main(["--checkpoint", str(path), "--json"])
        profiles.append(json.loads(capsys.readouterr().out))
    for name in ("parameters", "nonzero", "macs", "score_course", "score_profiler", "layer_bits"):
        assert profiles[0][name] == profiles[1][name], name
    assert profiles[1]["layer_bits"]["conv1"] == [8, 8] and profiles[1]["layer_bits"]["linear1"] == [2, 4]
    assert profiles[0]["score_course_strict"] >= profiles[1]["score_course_strict"] > profiles[1]["score_course"]
    profil.main(["--checkpoint", str(target)])
    assert "score, strict" in capsys.readouterr().out
    assert len(predict.predict(load_network(target)[0], *picture(tmp_path), top=3)) == 3


def picture(folder):
    """(path, kind) of a picture of noise."""
    import numpy as np
    from PIL import Image

    import cifar10
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "a.png")
    return folder / "a.png", cifar10.KINDS["digits"]


def test_batch_norm_counts_the_same_folded(tmp_path):
    images = torch.randn(8, 3, 16, 16)
    model, architecture = network_of(images, name="resnet20", shortcut="A")
    packed, _ = load_network(save(tmp_path / "a.packed.gz", model, architecture))
    one, two = (profil.totals_of(profil.count_layers(each, (3, 32, 32))) for each in (model, packed))
    assert one["parameters"] == two["parameters"] == 269_722 and one["score_course"] == two["score_course"]
    assert two["macs"] == one["macs"] and one["score_course_strict"] > two["score_course_strict"]


@pytest.mark.parametrize("ending", [".packed.gz", ".pt.gz", ".onnx"])
def test_a_packed_file_is_not_exported_again(ending, lenet, tmp_path):
    with pytest.raises(ValueError, match="the network is packed: .* export from the model.pt it came from"):
        export.main(["--checkpoint", str(lenet[2]), "--out", str(tmp_path / f"b{ending}"), "--no-compare"])


def test_what_does_not_fit_an_ending_is_refused(trained_few, tmp_path):
    plain = {"name": "lenet5", "num_classes": 10, "in_channels": 3}
    with pytest.raises(ValueError, match="few bits, this one has floats; --weights lsq trains one"):
        export.export(networks.build(**plain), {"architecture": plain, "dataset": "digits"}, tmp_path / "a.packed.gz")
    with pytest.raises(ValueError, match="few bits already .* .packed.gz holds its integers"):
        export.main(["--checkpoint", str(trained_few / "model.pt"), "--out", str(tmp_path / "a.int8.onnx")])
    assert not list(tmp_path.iterdir())


def test_training_does_not_start_from_a_packed_file(lenet, tmp_path):
    with pytest.raises(ValueError, match="is packed: its integers do not train; start from the model.pt"):
        train.main(["--dataset", "digits", "--limit", "8", "--batch-size", "4", "--model", "lenet5", "--start",
                    str(lenet[2]), "--out", str(tmp_path / "run")])


# ---- damage

def test_damaged_files_are_told_in_one_line(lenet, tmp_path):
    content, draw = lenet[2].read_bytes(), random.Random(0)
    for turn in range(30):
        damaged = bytearray(content)
        damaged[draw.randrange(10, len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "b.packed.gz").write_bytes(damaged if turn else content[:len(content) // 2])
        with pytest.raises(ValueError, match="b.packed.gz is damaged") as problem:
            load_network(tmp_path / "b.packed.gz")
        assert "\n" not in str(problem.value)


@pytest.mark.parametrize("path, value", [
    ("conv2 bits", [2, 9]), ("conv2 bits", [0, 4]), ("conv2 bits", [4, 4]), ("conv2 bits", "24"),
    ("conv2 shape", [16, 6, 5, 4]), ("conv2 shape", [10**9, 10**9, 5, 5]), ("conv2 shape", [-16, 6, 5, 5]),
    ("conv2 codes", torch.zeros(3, dtype=torch.uint8)), ("conv2 codes", torch.zeros(600)), ("conv2 codes", None),
    ("conv2 scale", torch.zeros(15)), ("conv2 scale", torch.full((16,), float("nan"))), ("conv2 scale", None),
    ("conv2 shift", torch.zeros(16, dtype=torch.int32)), ("conv2 step", torch.tensor(0.0)), ("conv2 step", "much"),
    ("conv2 step", torch.tensor(float("nan"))), ("conv2 low", 10**9), ("conv2 low", 0.5), ("conv2", None),
    ("", {}), ("", None), ("conv9", {})])
def test_entries_that_contradict_themselves_are_refused(path, value, lenet, tmp_path):
    state = torch.load(io.BytesIO(gzip.decompress(lenet[2].read_bytes())), weights_only=True)
    place = {"state": state}
    for word in ("state", "integers", *path.split()):
        holder, place = place, place.get(word)
    holder[word] = value
    with pytest.raises(ValueError, match="b.packed.gz is damaged: its integers cannot be unpacked") as problem:
        load_network(archive(tmp_path / "b.packed.gz", state))
    assert "\n" not in str(problem.value)


def test_more_or_fewer_tensors_than_the_network_has_are_refused(tmp_path):
    model, architecture = network_of(torch.randn(8, 3, 16, 16), name="wrn-10-1")
    path = save(tmp_path / "a.packed.gz", model, architecture)
    state = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)
    for change in (lambda weights: weights.pop("bn.weight"), lambda weights: weights.update(extra=torch.zeros(1))):
        altered = {**state, "weights": dict(state["weights"])}
        change(altered["weights"])
        with pytest.raises(ValueError, match="is in the file or in the network alone"):
            load_network(archive(tmp_path / "b.packed.gz", altered))


class Trap:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return (print, ("it ran",))


def test_code_in_a_packed_file_does_not_run(tmp_path, capsys):
    buffer = io.BytesIO()
    torch.save({"format": 1, "integers": {"conv1": Trap()}}, buffer, pickle_module=pickle)
    (tmp_path / "a.packed.gz").write_bytes(gzip.compress(buffer.getvalue()))
    with pytest.raises(ValueError, match="holds code objects .*print.* and is refused; none of it ran"):
        load_network(tmp_path / "a.packed.gz")
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".onnx", ".safetensors", ".pt.gz"])
def test_a_quantized_network_is_exported_in_other_forms_too(ending, trained_few, tmp_path):
    target = tmp_path / f"few{ending}"
    export.main(["--checkpoint", str(trained_few / "model.pt"), "--out", str(target), "--no-compare"])
    model, _ = load_network(trained_few / "model.pt")
    forward = onnx_files.open_onnx(target) if ending == ".onnx" else load_network(target)[0]
    data = cifar10.load("digits")
    images, _ = next(iter(cifar10.Batches(data.x_test, data.y_test, 360, cifar10.KINDS["digits"])))
    with torch.no_grad():
        found, expected = forward(images), model(images)
    same = found.argmax(1) == expected.argmax(1)
    assert same.float().mean() >= 0.99        # an input on an edge between two integers may round the other way
    spread = (found - expected).abs().median() / expected.std()
    assert spread < (0.05 if ending == ".pt.gz" else 1e-4)                     # of half precision, and of float32
