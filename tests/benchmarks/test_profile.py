"""What bounds training: kernels by kind, shares of the time, and the speed of convolutions."""
import json
from types import SimpleNamespace

import pytest
import torch

import train
from benchmarks import profile as training_profile
from benchmarks import training


@pytest.mark.parametrize("name, kind", [
    ("aten::mkldnn_convolution", "convolutions and products"),
    ("aten::convolution_backward", "convolutions and products"),
    ("aten::addmm", "convolutions and products"),
    ("aten::mm", "convolutions and products"),
    ("sm90_xmma_dgrad_implicit_gemm_bf16bf16", "convolutions and products"),
    ("graph_0_cpp_fused_convolution_backward_relu_3", "batch norm, activations, additions"),
    ("triton_poi_fused_add_relu_7", "batch norm, activations, additions"),
    ("aten::native_batch_norm_backward", "batch norm, activations, additions"),
    ("Optimizer.step#SGD.step", "update of weights and average"),
    ("aten::_foreach_lerp_", "update of weights and average"),
    ("aten::index", training_profile.REST),
    ("aten::comm", training_profile.REST)])
def test_kernels_have_their_kind(name, kind):
    assert training_profile.kind_of(name) == kind


def summary(device, kernels, seconds=2.0):
    run = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    return training_profile.summary_of(run, seconds, kernels, images=100, macs=10**9)


def test_shares_and_speed_by_hand(monkeypatch):
    monkeypatch.setattr(training_profile, "product_speed", lambda dtype, device: 5e11)
    found = summary("cpu", {"aten::convolution": 1.0, "aten::relu": 0.5, "aten::index": 0.1})
    assert found["images_per_second"] == 50 and found["busy"] == pytest.approx(0.8)
    assert found["shares"] == pytest.approx({
        "convolutions and products": 0.5, "batch norm, activations, additions": 0.25,
        "update of weights and average": 0, training_profile.REST: 0.25})
    assert found["convolutions_gflops"] == pytest.approx(600)              # 3 passes of 2 operations, in 1 s
    assert found["product_gflops"] == 500
    assert list(found["slowest"]) == ["aten::convolution", "aten::relu", "aten::index"]
    assert found["bound"] == "convolutions and products"


def test_a_gpu_that_waits_is_bound_by_the_host(monkeypatch):
    monkeypatch.setattr(training_profile, "product_speed", lambda dtype, device: 5e11)
    waiting = summary("cuda", {"xmma_fprop": 1.0, "triton_relu": 0.5})
    assert waiting["busy"] == 0.75 and waiting["bound"].startswith("the host")
    assert waiting["shares"][training_profile.REST] == 0, "what it waits is no kernel"
    assert summary("cuda", {"xmma_fprop": 0.2, "triton_relu": 1.7})["bound"] == "batch norm, activations, additions"


def test_a_gpu_by_its_name_is_told_how_much_it_computes(monkeypatch, capsys):
    monkeypatch.setattr(training_profile, "product_speed", lambda dtype, device: 5e11)
    for device, name in (("cuda", "NVIDIA H100 80GB HBM3"), ("cpu", "cpu, 1 threads")):
        training_profile.print_summary({"device": name, "how": "eager", **summary(device, {"xmma_fprop": 1.5})})
        assert ("the GPU computes 75% of the time" in capsys.readouterr().out) == (device == "cuda")


def test_what_is_measured_are_the_batches_that_training_takes(monkeypatch):
    """Of another memory layout they would be another computation."""
    batch = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), torch.zeros(2, dtype=torch.int64)
    run, seen = SimpleNamespace(train=[batch] * 3, device=torch.device("cpu"), layout=torch.contiguous_format,
                                settings={"batch_size": 2}, model=torch.nn.Identity()), []
    monkeypatch.setattr(train, "train_step", lambda run, images, labels, step: seen.append(images))
    training_profile.take_steps(run, run.train, 1)
    training.time_part(run, run.train, 2 * 2, 0.0)
    assert len(seen) == 3 and all(images.is_contiguous() for images in seen)


def test_real_steps_are_recorded(tmp_path, capsys):
    path = tmp_path / "profile.json"
    training_profile.main(["--dataset", "digits", "--device", "cpu", "--steps", "2", "--json", str(path)])
    found = json.loads(path.read_text())
    assert (found["steps"], found["batch_size"]) == (2, 64)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.02)
    assert found["shares"]["convolutions and products"] > 0.1
    assert "aten::convolution_backward" in found["slowest"]
    assert 0 < found["convolutions_gflops"] < 3 * found["product_gflops"]
    assert f"bound by: {found['bound']}" in capsys.readouterr().out


def test_only_what_is_recorded_counts(one_thread):
    """Twice the steps have twice the convolutions, whatever ran before."""
    counts = []
    arguments = SimpleNamespace(dataset="digits", data="data", device="cpu")
    run, _ = training.make_run({}, arguments)
    real = training_profile.torch.profiler.profile
    for steps in (1, 3):
        recorded = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.profiler, "profile",
                          lambda recorded=recorded, **kinds: recorded.append(real(**kinds)) or recorded[0])
            training_profile.record(run, steps)
        counts.append(next(event.count for event in recorded[0].key_averages()
                           if event.key == "aten::convolution_backward"))
    assert counts == [20, 60]                                              # convolutions of ResNet-18


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="--steps must be at least 1"):
        training_profile.main(["--steps", "0"])
