"""The CUDA path on a pretended GPU: whole runs, what they resume to, what a step would wait for, and planted faults."""
import shlex
from contextlib import suppress
from unittest import mock

import pytest
import torch
from fake_cuda import REAL_GENERATOR, Pretend
from sample_runs import same

import experiment
import pruning
import test as half_test
import train
import train_pruning
from engine import checkpoint

ROUNDS = shlex.split("--dataset digits --limit 64 --batch-size 32 --compile off --model resnet18 --epochs 1 1 "
                     "--sparsity 0.7")
TINY = shlex.split("--dataset digits --limit 64 --batch-size 32 --compile off --model resnet8-8-8-8 --epochs 1 1")
WAYS = {"rounds": [*ROUNDS, "--recalibrate"],
        "Muon": [*ROUNDS, "--optimizer", "muon", "--flips", "alternating", "--mixing", "cutout"],
        "polynomial": [*TINY, "--pruning", "polynomial", "--sparsity", "0.5", "--mixing", "mixup",
                       "--mix-alpha", "0.4"],
        "MorphNet": [*TINY, "--pruning", "morphnet", "--mixing", "none"],
        "few bits": [*TINY, "--sparsity", "0.5", "--weights", "lsq"]}


@pytest.fixture(autouse=True)
def no_meta_device(monkeypatch):
    """The trial pass on torch's meta device is left out, of which the pretended GPU knows nothing."""
    monkeypatch.setattr(experiment, "check_batch", lambda *given: None)


def stopped_after_a_save(flags):
    """Begin a run and end it once its first epoch is saved."""
    real = train.save

    def save_and_stop(run):
        real(run)
        raise KeyboardInterrupt
    with Pretend(), mock.patch.object(train, "save", save_and_stop), suppress(KeyboardInterrupt):
        train_pruning.main(flags)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_trains_prunes_and_resumes_to_the_bit(way, tmp_path):
    with Pretend() as gpu:
        train_pruning.main([*WAYS[way], "--out", str(tmp_path / "whole")])
    assert not gpu.uncovered, "operators without a CUDA kernel"
    assert not gpu.default_draws, "draws that no checkpoint holds"
    stopped_after_a_save([*WAYS[way], "--out", str(tmp_path / "cut")])
    assert checkpoint.read(tmp_path / "cut" / "last.pt")["device"] == "cuda"
    with Pretend():
        train_pruning.main(["--resume", "--out", str(tmp_path / "cut")])
    whole, cut = (checkpoint.read(tmp_path / name / "model.pt")["weights"] for name in ("whole", "cut"))
    assert same(whole, cut)


def test_a_run_of_a_gpu_is_tested_in_half_precision_and_does_not_go_on_elsewhere(tmp_path, capsys):
    with Pretend():
        train_pruning.main([*WAYS["polynomial"], "--out", str(tmp_path / "run")])
        capsys.readouterr()
        half_test.main(["--checkpoint", str(tmp_path / "run" / "model.pt"), "--limit", "20", "--device", "cuda"])
    assert "half precision" in capsys.readouterr().out
    with pytest.raises(ValueError, match="began on cuda and cannot go on bit for bit on cpu.*--device cuda"):
        train_pruning.main(["--resume", "--out", str(tmp_path / "run"), "--device", "cpu"])


@pytest.fixture
def step(tmp_path):
    """(gpu, run, step): a run on the pretended GPU that has made a step, and a call that makes another."""
    with Pretend() as gpu:
        run = experiment.start(train_pruning.__file__, "", train_pruning.SETTINGS, train.RECIPES,
                               [*ROUNDS, "--out", str(tmp_path / "run")])
        experiment.begin_round(run)
        run.masks = pruning.global_masks(run.model, 0.7)
        run.model.train()
        batch = train.as_step_takes(run, *next(iter(run.train)))

        def make():
            train.train_step(run, *batch, 0)
        make()
        for counter in (gpu.syncs, gpu.launches, gpu.layouts):
            counter.clear()
        yield gpu, run, make


def test_a_step_waits_for_nothing_and_no_convolution_turns_its_images(step):
    gpu, _, make = step
    make()
    assert not gpu.syncs
    assert 200 < sum(gpu.launches.values()) < 400
    assert {name for name in gpu.layouts if "first" in name} == set()


def test_masks_on_the_cpu_are_found(step):
    _, run, make = step
    run.masks = {name: torch.ones(mask.shape, dtype=torch.bool) for name, mask in run.masks.items()}
    with pytest.raises(RuntimeError, match="same device"):
        pruning.apply_masks(run.model, run.masks)


def test_a_generator_of_the_cpu_is_found(step):
    _, run, make = step
    run.generator = REAL_GENERATOR()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        make()


def test_a_step_that_reads_a_number_is_found(step):
    gpu, run, make = step
    with mock.patch.object(pruning, "mask_gradients", lambda *given: run.model.linear.weight.grad.sum().item()):
        make()
    assert any("_local_scalar_dense" in wait for wait in gpu.syncs)
