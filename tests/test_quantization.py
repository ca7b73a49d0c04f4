"""Few bits: LSQ's formulas by hand, grids, first steps, and whole runs of them with everything else."""
import json
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_runs import run_in_parts, same
from torch import nn

import experiment
import export
import networks
import pruning
import quantization
import train
import train_pruning
from engine import checkpoint
from engine.widths import widths_of
from networks import load_network

DIGITS = shlex.split("--dataset digits --compile off --device cpu --model lenet5")
LAYERS = ["conv1", "conv2", "linear1", "linear2", "linear3"]


def lenet(bits=None, **arguments):
    """LeNet-5 for digits."""
    return networks.build(name="lenet5", num_classes=10, in_channels=3, bits=bits, **arguments)


def few(outputs=3, inputs=5, bits=(2, 4), extent=(0.5, 0.0, 2.0)):
    """A quantized linear layer."""
    return quantization.quantized(nn.Linear(inputs, outputs), list(bits), extent)


# ---- the formulas, arXiv:1902.08153 and arXiv:2004.09576

def test_forward_and_gradients_by_hand():
    """Two signed bits, step 0.5: integers from -2 to 1."""
    values = torch.tensor([-3.2, -0.8, -0.6, -0.1, 0.2, 0.3, 0.4, 2.6], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    codes = quantization.codes_of(values, step, *quantization.weight_range(2))
    assert codes.tolist() == [-2, -2, -1, 0, 0, 1, 1, 1]
    outputs = codes * step
    gradients = torch.stack([torch.autograd.grad(output, step, retain_graph=True)[0] for output in outputs])
    # v / s is -6.4 | -1.6, -1.2, -0.2, 0.4, 0.6, 0.8 | 5.2: a bound outside, round(v / s) - v / s within
    assert gradients.tolist() == pytest.approx([-2, -0.4, 0.2, 0.2, -0.4, 0.4, 0.2, 1], abs=1e-6)
    outputs.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(2, 8), step=st.floats(0.01, 2), seed=st.integers(0, 9999))
def test_gradients_are_the_papers(bits, step, seed):
    """Equation 3: -v/s + round(v/s) within, -Q_N and Q_P outside; equation 5: 1 within, 0 outside."""
    low, high = quantization.weight_range(bits)
    assert (low, high) == (-2 ** (bits - 1), 2 ** (bits - 1) - 1)
    draw = torch.Generator().manual_seed(seed)
    values = (torch.randn(50, generator=draw).double() * step * high * 1.5).requires_grad_()
    learned, weights = torch.tensor(step, dtype=torch.float64, requires_grad=True), torch.randn(50, generator=draw)
    (quantization.codes_of(values, learned, low, high) * learned * weights).sum().backward()
    ratio = values.detach() / step
    inside = (ratio > low) & (ratio < high)
    slope = torch.where(inside, ratio.round() - ratio, ratio.sign() * torch.where(ratio < 0, -low, high))
    assert torch.allclose(values.grad, inside * weights.double())
    assert learned.grad.item() == pytest.approx((slope * weights).sum().item(), rel=1e-6, abs=1e-6)


def test_a_layer_scales_the_gradients_of_its_steps():
    """1 / sqrt(N Q): N the weights of a channel, or the features of an image; Q the largest integer."""
    layer = few(bits=(3, 2))
    inputs = torch.rand(4, 5) * 3
    layer(inputs).sum().backward()
    weight, steps, step = layer.weight.detach(), layer.weight_step.detach()[:, None], layer.activation_step.detach()
    codes = (inputs / step).round().clamp(0, 3)
    ratio = weight / steps
    slope = torch.where((ratio > -4) & (ratio < 3), ratio.round() - ratio, ratio.clamp(-4, 3))
    expected = (slope * (codes * step).sum(0)).sum(1) / (5 * 3) ** 0.5
    assert torch.allclose(layer.weight_step.grad, expected, atol=1e-5)
    ratio = inputs / step
    slope = torch.where(ratio < 3, codes - ratio, torch.tensor(3.0))
    read = ((weight / steps).round().clamp(-4, 3) * steps).sum(0)
    assert layer.activation_step.grad.item() == pytest.approx((slope * read).sum().item() / (5 * 3) ** 0.5, rel=1e-4)
    assert layer.activation_offset.grad.item() == 0, "inputs that follow a ReLU have none"


def test_one_bit_is_the_sign_times_a_learned_step():
    layer = few(bits=(1, 8))
    with torch.no_grad():
        layer.weight[0] = torch.tensor([0.3, -2.0, 0.0, 0.7, -0.1])
        layer.weight_step[0] = 0.4
    codes, step = quantization.weight_codes(layer)
    assert codes[0].tolist() == [1, -1, 0, 1, -1]
    (codes[0] * step[0] * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert layer.weight.grad[0].tolist() == pytest.approx([1, 2, 3, 4, 5])
    assert layer.weight_step.grad[0].item() == pytest.approx((1 - 2 + 4 - 5) / 5 ** 0.5)


def test_signed_inputs_have_an_offset_that_keeps_zero_exact():
    """LSQ+: outside the range the offset has gradient 1, within it none; here in whole steps."""
    layer = few(bits=(8, 2), extent=(1.0, -1.0, 2.0))
    assert layer.signed and layer.activation_step.item() == 1 and layer.activation_offset.item() == -1
    inputs = torch.tensor([[-3.0, -0.8, 0.0, 0.4, 9.0]])
    codes, step = quantization.input_codes(layer, inputs)
    assert codes.tolist() == [[-1, -1, 0, 0, 2]]
    for place, slope in enumerate([1, 0, 0, 0, 1]):
        (gradient,) = torch.autograd.grad((codes * step)[0, place], layer.activation_offset, retain_graph=True)
        assert gradient.item() == pytest.approx(slope / (5 * 3) ** 0.5)
    with torch.no_grad():
        layer.activation_offset.fill_(-1.4)
    assert quantization.input_codes(layer, torch.tensor([[-9.0, 9.0]]))[0].tolist() == [[-1, 2]]


# ---- grids

@settings(deadline=None, max_examples=40)
@given(bits=st.integers(1, 8), inputs=st.integers(1, 40), seed=st.integers(0, 9999))
def test_weights_are_on_the_grid_and_masked_ones_zero(bits, inputs, seed):
    draw = torch.Generator().manual_seed(seed)
    layer = few(4, inputs, (bits, 8))
    mask = torch.rand(4, inputs, generator=draw) < 0.5
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, inputs, generator=draw) * mask)
        layer.weight_step.copy_(torch.rand(4, generator=draw) + 0.01)
    codes, low, high = quantization.weight_codes(layer)[0].detach(), *quantization.weight_range(bits)
    assert torch.equal(codes, codes.round()) and codes.min() >= low and codes.max() <= high
    assert len(codes[mask].unique()) <= 2**bits
    assert bool((codes[~mask] == 0).all())
    assert layer.integers().dtype == torch.int8 and torch.equal(layer.integers().float(), codes)


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(1, 8), lowest=st.floats(-4, 1), seed=st.integers(0, 9999))
def test_inputs_are_on_the_grid(bits, lowest, seed):
    layer = few(2, 60, (4, bits), (1.0, lowest, 3.0))
    inputs = 3 * torch.randn(2, 60, generator=torch.Generator().manual_seed(seed))
    codes, _ = quantization.input_codes(layer, inputs)
    codes = codes.detach()
    assert bool(layer.signed) == (lowest < 0) and (lowest < 0 or codes.min() >= 0)
    assert torch.equal(codes, codes.round()) and codes.max() - codes.min() < 2**bits
    assert quantization.input_codes(layer, torch.zeros(1, 60))[0].abs().max() == 0


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_weights_on_the_grid_stay_there_in_half_precision(bits):
    layer = few(8, 300, (bits, 4))
    inputs, before = torch.rand(3, 300), layer.integers()
    outputs = layer(inputs)
    quantization.to_grid(layer)
    assert torch.equal(layer.integers(), before) and torch.equal(layer(inputs), outputs)
    assert torch.equal(layer.half().float().integers(), before)


def test_integers_of_the_smallest_steps_stay_in_half_precision_too():
    layer = few(2, 256, (8, 4))
    with torch.no_grad():
        layer.weight_step[:] = torch.tensor([0.0, 4e-6])
        quantization.keep_positive(layer)
        layer.weight[:] = layer.weight_step[:, None] * torch.arange(-128, 128)
    before = layer.integers()
    assert before.unique().numel() >= 255
    quantization.to_grid(layer)
    assert torch.equal(layer.half().float().integers(), before)


# ---- first steps, layers and their bits

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.0, -1.5]), st.integers(0, 99))
def test_bfloat16_holds_the_integers_and_rounds_each_sum_once(weights, inputs, lowest, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = quantization.quantized(nn.Conv2d(4, 3, 3, bias=False), [weights, inputs], (0.5, lowest, 2.0))
    images = torch.randn(2, 4, 6, 6, generator=generator) + 1
    exact = layer(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(images)
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).abs() <= 1.01 * 2.0 ** -8 * exact.abs()).all()


def test_first_weight_steps():
    weight = torch.tensor([[1.0, -2.0, 0.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]])
    assert quantization.first_weight_step(weight, 3).tolist() == pytest.approx(
        [2 * 1.5 / 3**0.5, 8 / 3**0.5, 2 * 3 / 3**0.5]), "of weights that are not pruned; an empty channel as its layer"
    assert quantization.first_weight_step(weight, 1).tolist() == pytest.approx([1.5, 4, 3])
    assert quantization.first_weight_step(torch.zeros(2, 3), 4).tolist() == pytest.approx([2**-16] * 2)


def test_first_activation_steps_come_from_images_and_leave_the_network_alone():
    model = networks.build(name="resnet20", num_classes=10, in_channels=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(8, 3, 16, 16)
    ranges = quantization.input_ranges(model, [(images, None)] * 3)
    assert same(dict(model.state_dict()), before) and model.training
    assert list(ranges) == list(quantization.layers_of(model))
    assert ranges["conv1"] == pytest.approx(
        tuple(value.item() for value in (images.abs().mean(), images.min(), images.max())))
    assert [name for name, (_, lowest, _) in ranges.items() if lowest < 0] == ["conv1"], "others follow a ReLU"
    bits = quantization.layer_bits(model, 2, 4)
    quantization.quantize_layers(model, bits, ranges)
    signed = [name for name, layer in quantization.layers_of(model).items() if layer.signed]
    assert signed == ["conv1"] and quantization.bits_of(model) == bits
    assert model.conv1.activation_step.item() == pytest.approx((images.max() - images.min()).item() / 255)
    second = model.layer1[0].conv1
    assert second.activation_step.item() == pytest.approx(2 * ranges["layer1.0.conv1"][0] / 15**0.5)


def test_bits_by_layer():
    model = lenet()
    assert quantization.layer_bits(model, 2, 4) == {
        "conv1": [8, 8], "conv2": [2, 4], "linear1": [2, 4], "linear2": [2, 4], "linear3": [8, 8]}
    assert quantization.layer_bits(model, 1, 3, ["conv1=4/5", "linear2=8/1"]) == {
        "conv1": [4, 5], "conv2": [1, 3], "linear1": [1, 3], "linear2": [8, 1], "linear3": [8, 8]}


@pytest.mark.parametrize("bits", [{"conv9": [2, 2]}, {"conv1": [0, 2]}, {"conv1": [2]}, {"conv1": [2, 2.0]}])
def test_bits_that_do_not_fit_a_network_are_refused(bits):
    with pytest.raises(ValueError, match="bits .* of layer 'conv.': the network has conv1, conv2, linear1"):
        lenet(bits)


def test_quantized_layers_are_found_by_every_technique():
    model = lenet(quantization.layer_bits(lenet(), 2, 4))
    assert list(pruning.prunable(model)) == [f"{name}.weight" for name in LAYERS]
    assert widths_of(model) == widths_of(lenet())


def test_eight_bits_are_close_to_float():
    torch.manual_seed(1)
    model, images = networks.build(name="resnet20", num_classes=10, in_channels=3), torch.randn(16, 3, 16, 16)
    torch.optim.swa_utils.update_bn([images], model)
    with torch.no_grad():
        expected = model.eval()(images)
        errors = []
        for bits in (8, 4):
            other = networks.build(name="resnet20", num_classes=10, in_channels=3)
            other.load_state_dict(model.state_dict())
            ranges = quantization.input_ranges(other, [(images, None)])
            quantization.quantize_layers(other, quantization.layer_bits(other, bits, bits), ranges)
            errors.append(((other.eval()(images) - expected).square().mean() / expected.var()).item())
    assert errors[0] < 0.05 < errors[1]


def test_steps_have_no_weight_decay_and_stay_positive():
    model = lenet()
    (group,) = quantization.parameter_groups(model)
    assert len(group["params"]) == 10 and group.keys() == {"params"}
    quantization.quantize_layers(model, quantization.layer_bits(model, 2, 4))
    others, steps = quantization.parameter_groups(model)
    assert len(others["params"]) == 10 and len(steps["params"]) == 15 and steps["weight_decay"] == 0
    with torch.no_grad():
        model.conv1.weight_step[2] = -1
        model.linear1.activation_step.fill_(0)
        model.conv1.activation_offset.fill_(-2)
    quantization.keep_positive(model)
    assert model.conv1.weight_step[2] == model.linear1.activation_step == torch.tensor(2.0**-16)
    assert model.conv1.activation_offset == -2


def test_the_precision_of_few_bits_is_its_own():
    model = lenet(quantization.layer_bits(lenet(), 2, 4))
    before = checkpoint.weights_of(model)
    dtype, note = quantization.set_precision(model, "half", torch.device("cpu"))
    assert dtype == torch.float32 and note == "weights and activations of 2 to 8 bits, integers simulated"
    assert same(checkpoint.weights_of(model), before)


# ---- runs

@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    """The folder of a short run with floats."""
    out = tmp_path_factory.mktemp("runs") / "float"
    train.main([*DIGITS, "--limit", "400", "--batch-size", "40", "--epochs", "4", "--lr", "0.05", "--weights", "float",
                "--mixing", "none", "--out", str(out)])
    return out


def start(*flags):
    """A run of train.py, about to train."""
    return experiment.start(train.__file__, "", train.SETTINGS, train.RECIPES, [*DIGITS, *map(str, flags)])


def test_it_learns_from_a_network_of_floats(float_run, tmp_path):
    out, source = tmp_path / "run", load_network(float_run / "model.pt")[0]
    flags = ["--limit", 400, "--batch-size", 40, "--epochs", 4, "--lr", 0.05, "--mixing", "none", "--weights", "lsq",
             "--weight-bits", 2, "--activation-bits", 3, "--layer-bits", "linear2=4/4", "--start",
             float_run / "model.pt", "--out", out]
    run = start(*flags)
    for name, layer in quantization.layers_of(source).items():
        mine = run.model.get_submodule(name)
        assert torch.equal(mine.weight, layer.weight)
        assert torch.equal(mine.weight_step, quantization.first_weight_step(layer.weight, mine.weight_bits))
    assert [bool(run.model.get_submodule(name).signed) for name in LAYERS] == [True, False, False, False, False]
    first = run.model.linear2.weight_step.clone()
    train.fit(run)
    experiment.finish(run)
    assert run.history[-1]["train_loss"] < 0.9 * run.history[0]["train_loss"]
    assert not torch.equal(run.model.linear2.weight_step, first), "steps are learned"
    model, state = load_network(out / "model.pt")
    assert state["architecture"]["bits"]["linear2"] == [4, 4] and state["architecture"]["bits"]["conv2"] == [2, 3]
    assert quantization.bits_of(model) == state["architecture"]["bits"]
    assert json.loads((out / "config.json").read_text())["architecture"] == state["architecture"]
    assert len(model.linear1.integers().unique()) <= 4


def test_training_in_bfloat16_is_measured_in_float32_as_its_file_is(float_run, tmp_path):
    flags = ["--limit", 64, "--batch-size", 16, "--epochs", 2, "--weights", "lsq", "--lr", 0.02, "--mixing", "none",
             "--averaging", "none", "--start", float_run / "model.pt"]
    runs = {}
    for arithmetic in ("bfloat16", "float32"):
        runs[arithmetic] = start(*flags, "--arithmetic", arithmetic, "--out", tmp_path / arithmetic)
        train.fit(runs[arithmetic])
    run = runs["bfloat16"]
    assert run.arithmetic == "bfloat16" and not same(run.model.state_dict(), runs["float32"].model.state_dict())
    for row in zip(*(each.history for each in runs.values()), strict=True):
        assert row[0]["train_loss"] == pytest.approx(row[1]["train_loss"], rel=0.05)
    in_use = train.evaluate(run.model, run.validation, run.device)
    assert train.measure(run) == in_use != train.evaluate(run.model, run.validation, run.device, torch.bfloat16)
    assert run.history[-1]["validation_loss"] == pytest.approx(in_use[0], abs=1e-4)


def test_it_starts_from_few_bits_too_and_floats_from_them(float_run, tmp_path):
    small = ["--limit", 8, "--batch-size", 4, "--epochs", 1]
    run = start(*small, "--weights", "lsq", "--out", tmp_path / "a")
    experiment.begin_round(run)
    checkpoint.save(tmp_path / "a.pt", checkpoint.network_of(run.model, run.architecture))
    fewer = start(*small, "--weights", "lsq", "--weight-bits", 1, "--start", tmp_path / "a.pt", "--out", tmp_path / "b")
    floats = start(*small, "--start", tmp_path / "a.pt", "--out", tmp_path / "c")
    for other in (fewer, floats):
        assert torch.equal(other.model.linear1.weight, run.model.linear1.weight)
    assert fewer.model.linear1.weight_bits == 1 and type(floats.model.linear1) is nn.Linear
    assert "bits" not in floats.architecture


def test_everything_together_goes_on_bit_for_bit(float_run, tmp_path):
    """Pruning between rounds, moving average, CutMix and a teacher; stopped after every epoch."""
    flags = [*DIGITS, "--limit", "64", "--batch-size", "16", "--epochs", "1", "2", "--sparsity", "0.7", "--weights",
             "lsq", "--mixing", "cutmix", "--averaging", "ema", "--recalibrate", "--teacher",
             str(float_run / "model.pt"), "--start", str(float_run / "model.pt")]
    train_pruning.main([*flags, "--out", str(tmp_path / "whole")])
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(tmp_path / "parts")]), tmp_path / "parts", 3)
    whole, parts = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for key in ("weights", "average", "optimizer", "schedule", "masks", "random", "architecture"):
        assert same(whole[key], parts[key]), key
    assert same(*(checkpoint.read(tmp_path / name / "model.pt") for name in ("whole", "parts")))
    assert [group["weight_decay"] for group in whole["optimizer"]["param_groups"]] == [5e-4, 0.0]
    model = load_network(tmp_path / "whole" / "last.pt")[0]
    for name, mask in whole["masks"].items():
        assert bool((whole["average"][name][~mask] == 0).all())
        assert bool((model.get_submodule(name.removesuffix(".weight")).integers()[~mask] == 0).all())
    assert pruning.sparsity_of(model) == pytest.approx(0.7, abs=1e-3)


def test_forced_settings_leave_the_steps_without_decay(tmp_path):
    flags = ["--limit", "8", "--batch-size", "4", "--epochs", "2", "--weights", "lsq", "--out", tmp_path / "run"]
    run = start(*flags)
    experiment.begin_round(run)
    run.epoch, run.history = 1, [{"epoch": 1}]
    experiment.save(run)
    run = start("--resume", "--out", tmp_path / "run", "--force", "--weight-decay", 0.01, "--lr", 0.3)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.01, 0.0]
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [0.3, 0.3]


def test_a_compact_file_holds_the_same_integers_and_fewer_channels(tmp_path):
    architecture = {"name": "lenet5", "num_classes": 10, "in_channels": 3, "size": 32, "activation": "relu",
                    "pooling": "max", "bits": quantization.layer_bits(lenet(), 3, 4)}
    model, images = networks.build(**architecture), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        model.linear2.weight[:, 20:] = 0
    checkpoint.save(tmp_path / "model.pt", {**checkpoint.network_of(model, architecture), "dataset": "digits"})
    forward, removed = export.export(*load_network(tmp_path / "model.pt"), tmp_path / "small.pt.gz")
    assert removed == 100 and forward.linear1.out_features == len(forward.linear1.weight_step) == 20
    assert torch.equal(forward.linear2.integers(), model.linear2.integers()[:, :20])
    assert torch.equal(forward.conv2.integers(), model.conv2.integers())
    with torch.no_grad():
        assert torch.allclose(forward(images), model(images), atol=0.02)


@pytest.mark.parametrize("flags, told", [
    ("--weight-bits 0", "--weight-bits 0: it must be at least 1 and at most 8"),
    ("--activation-bits 9", "--activation-bits 9: it must be at least 1 and at most 8"),
    ("--weight-bits two", "invalid int value: 'two'"),
    ("--layer-bits conv1", "--layer-bits conv1: it must read layer=weights/activations"),
    ("--layer-bits conv1=9/8", "each of 1 to 8 bits, such as conv1=8/8"),
    ("--layer-bits conv7=8/8", "no convolution or linear layer is called 'conv7'; there are conv1, conv2, linear1"),
    ("--recipe published --weights lsq", "--weights lsq does not go with --recipe published"),
    ("--pruning filters", "--weights lsq does not go with --pruning filters"),
    ("--pruning morphnet", "does not go with --pruning morphnet"),
    ("--pruning l1_cycle", "does not go with --pruning l1_cycle")])
def test_what_does_not_fit_is_refused_before_training(flags, told, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *arguments: pytest.fail("it trains"))
    with pytest.raises(ValueError) as problem:
        train_pruning.main([*DIGITS, "--limit", "8", "--batch-size", "4", "--weights", "lsq", "--out",
                            str(tmp_path / "run"), *flags.split()])
    assert told in str(problem.value) and "\n" not in str(problem.value)
    assert not (tmp_path / "run").exists()
