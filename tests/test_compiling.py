import contextlib
import time

import pytest
import torch

import compiling
import networks
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


def test_timing_leaves_no_trace():
    model, state = build("resnet18").train(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose(model, "off")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


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


def cpu_with(monkeypatch, *names):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)


@pytest.mark.parametrize("name, bits, images, has, expected", [
    ("resnet20", {}, 30_000, True, torch.bfloat16), ("resnet20", {}, 30_000, False, torch.float32),
    ("resnet20", {}, 29_999, True, torch.float32), ("mobilenet", {}, 30_000, True, torch.float32),
    ("resnet20", {"conv1": [2, 2]}, 30_000, True, torch.float32)])
def test_arithmetic_is_bfloat16_where_the_cpu_has_it_and_it_pays(monkeypatch, name, bits, images, has, expected):
    cpu_with(monkeypatch, *["avx512_bf16"] * has)
    model = networks.build(name=name, **({"bits": bits} if bits else {}))
    assert compiling.choose_arithmetic("auto", model, images, torch.device("cpu")) is expected
    assert compiling.choose_arithmetic("bfloat16", model, images, torch.device("cpu")) is torch.bfloat16
    assert compiling.choose_arithmetic("float32", model, images, torch.device("cuda")) is torch.float32


def test_an_older_torch_that_cannot_say_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not compiling.has_bfloat16()
