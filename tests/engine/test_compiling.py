import contextlib
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_runs import same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import networks
from engine import compiling
from resnet_factorized import build

CPU = torch.device("cpu")


def choose(model, wanted, images=10**9):
    return compiling.choose_forward(model, wanted, images, (4, 3, 32, 32), contextlib.nullcontext(), CPU)


@pytest.mark.parametrize("wanted, images, reason", [("off", 10**9, "asked for"), ("auto", 100, "too short")])
def test_eager_says_why(wanted, images, reason):
    model = build("resnet18")
    forward, speed, note = choose(model, wanted, images)
    assert forward is model and speed > 0 and note.startswith("eager") and reason in note


def test_without_a_compiler_auto_is_eager_and_on_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = build("resnet18")
    forward, _, note = choose(model, "auto")
    assert forward is model and "no C++ compiler" in note
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        choose(model, "on")


def test_a_failing_backend_falls_back_and_says_so(monkeypatch):
    def broken(model, dynamic):
        raise RuntimeError("backend trouble")
    monkeypatch.setattr(torch, "compile", broken)
    model = build("resnet18")
    forward, _, note = choose(model, "auto")
    assert forward is model and "backend trouble" in note
    with pytest.raises(RuntimeError, match="backend trouble"):
        choose(model, "on")


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_a_compiled_network_whose_gradients_are_not_finite_does_not_train(monkeypatch, broken):
    """As torch 2.14 compiles GELU in bfloat16; eager trains in its place, and what was tried leaves no trace."""
    def compiled(model, **options):
        return lambda images: model(images) * float("nan") if broken == "loss" else (0 * model(images)).abs().sqrt()
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiling, "find_compiler", lambda: "g++")
    model = networks.build("lenet5")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward, speed, note = choose(model, "auto")
    assert forward is model and speed > 0 and note == "eager (torch.compile failed: its gradients are not finite)"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="gradients are not finite"):
        choose(model, "on")


@pytest.mark.parametrize("wrong, reason", [
    (lambda model: lambda images: model(images) + 5, "its loss is"),
    (lambda model: lambda images: model(images).detach() + 0 * model(images), "its gradients have a norm of 0 where"),
    (lambda model: lambda images: 4 * model(images) - 3 * model(images).detach(), "its gradients have a norm of")])
def test_a_compiled_network_that_computes_something_else_does_not_train(monkeypatch, wrong, reason):
    monkeypatch.setattr(torch, "compile", lambda model, **options: wrong(model))
    monkeypatch.setattr(compiling, "find_compiler", lambda: "g++")
    model = networks.build("lenet5")
    forward, _, note = choose(model, "auto")
    assert forward is model and note.startswith(f"eager (torch.compile failed: {reason}")
    with pytest.raises(RuntimeError, match=reason):
        choose(model, "on")


@pytest.mark.parametrize("name", ["lenet5", "mobilenet"])
def test_a_compiled_network_may_round_otherwise(monkeypatch, name):
    """MobileNet's gradient in float32 is as long as in bfloat16 and points elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda images: in_bfloat16(model, images))
    monkeypatch.setattr(compiling, "find_compiler", lambda: "g++")
    torch.manual_seed(0)
    model = networks.build(name)
    forward, _, note = choose(model, "auto")
    assert forward is not model and note.startswith("compiled")


def in_bfloat16(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        return model(images)


def test_a_network_that_is_not_finite_itself_is_no_fault_of_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda images: model(images))
    monkeypatch.setattr(compiling, "find_compiler", lambda: "g++")
    model = networks.build("lenet5")
    torch.nn.init.constant_(next(model.parameters()), float("inf"))
    assert choose(model, "on")[2].startswith("compiled")


def test_timing_leaves_no_trace():
    model, state = build("resnet18").train(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose(model, "off")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class FailsBackward(torch.autograd.Function):
    """Its output can be computed, its gradient cannot, as where a compiler fails on the backward graph."""

    @staticmethod
    def forward(context, hidden):
        return hidden.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("no gradient")


def test_timing_that_fails_in_the_backward_pass_leaves_no_trace(monkeypatch):
    model = build("resnet18").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: lambda images: FailsBackward.apply(network(images)))
    monkeypatch.setattr(compiling, "find_compiler", lambda: "g++")
    with pytest.raises(RuntimeError, match="torch.compile failed: no gradient"):
        choose(model, "on")
    assert same(before, dict(model.state_dict()))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("device, batch", [("cuda", 64), ("cpu", 16)])
def test_a_gpu_is_timed_at_the_batch_of_the_run(device, batch, monkeypatch):
    shapes = []
    monkeypatch.setattr(compiling, "time_steps", lambda model, forward, shape, *how: shapes.append(shape) or 1.0)
    compiling.choose_forward(build("resnet18"), "off", 1, (64, 3, 32, 32), contextlib.nullcontext(),
                             torch.device(device))
    assert shapes == [(batch, 3, 32, 32)]


@pytest.mark.parametrize("dense, form", [(99.0, "grouped"), (104.9, "grouped"), (105.1, "dense")])
def test_another_form_must_be_faster_by_more_than_noise(dense, form):
    assert compiling.fastest_form({"grouped": 100.0, "dense": dense}) == form
    assert compiling.fastest_form({"dense": dense}) == "dense"


def test_float32_is_float32_on_a_gpu(monkeypatch):
    """And not TF32, which is torch's default for convolutions."""
    for name, value in (("allow_tf32", True), ("deterministic", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    compiling.set_up(torch.device("cpu"))
    assert torch.backends.cudnn.allow_tf32
    compiling.set_up(torch.device("cuda"))
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


def test_compiled_and_eager_networks_agree():
    model = build("resnet18").eval()
    if compiling.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    forward, _, note = choose(model, "on")
    assert note.startswith("compiled")
    images = torch.randn(4, 3, 32, 32)
    model.train()
    with torch.no_grad():
        reference = model(images)
        assert torch.allclose(forward(images), reference, atol=1e-3, rtol=1e-3)


def test_calls_are_warmed_up_counted_and_timed():
    called = []
    calls, taken = compiling.time_repeats(lambda images: called.append(time.sleep(0.002)), None, 3, 0.01, CPU)
    assert 1 <= calls <= 5 and len(taken) == 3 and len(called) == 2 + 4 * calls
    assert all(0.002 <= seconds < 0.2 for seconds in taken)
    slow = []
    calls, taken = compiling.time_repeats(lambda images: slow.append(time.sleep(0.03)), None, 5, 0.005, CPU)
    assert calls == 1 and len(taken) == 2 and len(slow) == 4


def test_spread_is_median_least_and_greatest():
    assert compiling.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


# ---- grouped convolutions

@settings(deadline=None)
@given(st.sampled_from([(1, 1, 1), (2, 2, 3), (4, 1, 2), (8, 3, 1), (3, 2, 4)]), st.sampled_from([1, 3]),
       st.integers(0, 9), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_a_grouped_convolution_is_the_dense_one_of_its_blocks(form, kernel, seed, layout):
    groups, inside, outside = form
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * outside, inside, kernel, kernel, generator=generator, dtype=torch.float64)
    images = torch.randn(2, groups * inside, 5, 5, generator=generator, dtype=torch.float64)
    weight = weight.to(memory_format=layout)
    dense = compiling.block_diagonal(weight, groups)
    assert torch.equal(dense[:, :, 0, 0], torch.block_diag(*weight[:, :, 0, 0].chunk(groups)))
    weight.requires_grad_()
    one = F.conv2d(images, weight, padding=kernel // 2, groups=groups)
    other = F.conv2d(images, compiling.block_diagonal(weight, groups), padding=kernel // 2)
    assert torch.allclose(one, other, atol=1e-12)
    upstream = torch.randn(one.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(output, weight, upstream)[0] for output in (one, other)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_dense_form_is_the_same_network_and_is_undone():
    model, images = build("resnet18", 8).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before, kept = model(images), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiling.compute_as(model, "dense")
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert type(layers[0]) is torch.nn.Conv2d
    assert {type(layer) for layer in layers[1:]} == {compiling.BlockDiagonalConv2d}
    with FlopCounterMode(display=False) as counter:
        assert torch.allclose(model(images), before, atol=1e-9)
    dense = build("resnet18", 1).double().eval()
    with FlopCounterMode(display=False) as other:
        dense(images)
    assert counter.get_total_flops() == other.get_total_flops()
    assert same(kept, dict(model.state_dict()))
    compiling.compute_as(model, "grouped")
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("form", ["grouped", "dense"])
def test_every_convolution_reads_images_and_weights_in_channels_last(form):
    model, turned = compiling.lay_out(build("resnet18", 8), torch.channels_last, form), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                turned.extend(not each.is_contiguous(memory_format=torch.channels_last) for each in args[:2])
            return function(*args, **(kwargs or {}))
    with Watch():
        model(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert len(turned) == 40 and not any(turned)


@pytest.mark.parametrize("form", ["grouped", "dense"])
def test_a_network_computes_the_same_in_both_layouts(form):
    model, images = build("resnet18", 8).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        compiling.lay_out(model, layout, form).zero_grad()
        model(images.contiguous(memory_format=layout)).square().sum().backward()
        found[layout] = [parameter.grad.clone() for parameter in model.parameters()]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_batches_are_not_counted_and_recalibration_still_averages():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    compiling.lay_out(ours, torch.contiguous_format, "grouped")
    batches = torch.randn(3, 8, 3, 4, 4).unbind()
    for images in batches:
        assert torch.equal(ours(images), theirs(images))
    assert (ours[1].num_batches_tracked, theirs[1].num_batches_tracked) == (0, 3)
    assert torch.equal(ours[1].running_var, theirs[1].running_var)
    for model in (ours, theirs):
        torch.optim.swa_utils.update_bn(batches, model)
    assert same(dict(ours.state_dict()), dict(theirs.state_dict())), "plain averages over the batches"
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_forms_are_tried_where_there_is_a_gpu_and_something_grouped():
    grouped, cuda = build("resnet18", 8), torch.device("cuda")
    assert compiling.forms_of("auto", grouped, cuda) == ["grouped", "dense"]
    assert compiling.forms_of("auto", grouped, CPU) == ["grouped"]
    assert compiling.forms_of("dense", grouped, CPU) == ["dense"]
    for other in (build("resnet18", 1), networks.build(name="mobilenet"),
                  networks.build(name="resnet20", bits={"conv1": [2, 2]})):
        assert compiling.forms_of("auto", other, cuda) == ["grouped"] and not compiling.grouped_layers(other)


# ---- arithmetic

BF16 = ("avx512_bf16",)


def cpu_with(monkeypatch, *names):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)


def products_take(monkeypatch, seconds):
    """Matrix products take so many seconds in each data type."""
    monkeypatch.setattr(compiling, "product_seconds", seconds.get)


FASTER, SLOWER = {torch.bfloat16: 0.001, torch.float32: 0.002}, {torch.bfloat16: 0.002, torch.float32: 0.001}
AMX = (*BF16, "amx_bf16")


@pytest.mark.parametrize("name, bits, images, has, products, expected", [
    ("resnet20", {}, 30_000, BF16, FASTER, torch.bfloat16), ("resnet20", {}, 30_000, BF16, SLOWER, torch.float32),
    ("resnet20", {}, 30_000, (), FASTER, torch.float32), ("resnet20", {}, 29_999, AMX, FASTER, torch.float32),
    ("resnet20", {}, 30_000, ("bf16",), FASTER, torch.bfloat16), ("resnet20", {}, 30_000, AMX, {}, torch.bfloat16),
    ("mobilenet", {}, 30_000, BF16, FASTER, torch.float32), ("mobilenet", {}, 30_000, AMX, {}, torch.bfloat16),
    ("mobilenet", {}, 30_000, (), FASTER, torch.float32),
    ("resnet20", {"conv1": [2, 2]}, 30_000, BF16, FASTER, torch.bfloat16)])
def test_arithmetic_is_bfloat16_where_the_cpu_has_it_and_it_pays(monkeypatch, name, bits, images, has, products,
                                                                 expected):
    cpu_with(monkeypatch, *has)
    products_take(monkeypatch, products)
    model = networks.build(name=name, **({"bits": bits} if bits else {}))
    assert compiling.choose_arithmetic("auto", model, images, torch.device("cpu")) is expected
    assert compiling.choose_arithmetic("bfloat16", model, images, torch.device("cpu")) is torch.bfloat16
    assert compiling.choose_arithmetic("float32", model, images, torch.device("cuda")) is torch.float32


@pytest.mark.parametrize("products", [FASTER, SLOWER])
def test_a_run_that_began_in_bfloat16_goes_on_in_it_although_another_cpu_is_slower(monkeypatch, products):
    cpu_with(monkeypatch, *BF16)
    products_take(monkeypatch, products)
    model = networks.build(name="resnet20")
    assert compiling.choose_arithmetic("auto", model, 30_000, CPU, "bfloat16") is torch.bfloat16


def test_the_time_of_a_product_is_that_of_its_fastest_repeat(monkeypatch):
    clock = iter([0, 5, 10, 12, 20, 23])             # it began and ended
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: next(clock))
    assert compiling.product_seconds(torch.bfloat16, side=8, repeats=3) == 2


def test_an_older_torch_that_cannot_say_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not compiling.has_bfloat16()
