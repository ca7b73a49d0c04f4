"""What a run does on a GPU, by a pretended one: it trains, resumes, is tested, waits for nothing, turns no layout."""
import contextlib
import shlex

import pytest
import torch
from fake_cuda import DEVICE, CpuGenerator, FakeCuda
from sample_runs import Stop, same, start_rounds, stop_after_a_save

import cifar10
import experiment
import pruning
import test as half_test
import train
import train_pruning
from engine import checkpoint, compiling

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = shlex.split("--dataset digits --limit 8 --batch-size 8 --compile off")
SMALL = [*SHORT, "--model", "resnet8-8-8-8"]
RUNS = {          # flags of train_pruning.py; the first has convolutions in groups, in the form that is faster
    "rounds": [*SHORT, *shlex.split("--epochs 1 1 --sparsity 0.7 --recalibrate")],
    "polynomial": [*SMALL, *shlex.split("--epochs 2 --pruning polynomial --sparsity 0.5 --mixing mixup "
                                        "--mix-alpha 0.4 --score lamp --prune-frequency 1")],
    "smaller images, Muon": [*SMALL, *shlex.split("--epochs 1 1 --sparsity 0.5 --optimizer muon --resize 20 "
                                                  "--mixing cutout --flips alternating")],
    "MorphNet": [*SMALL, *shlex.split("--epochs 1 1 1 --pruning morphnet")],
    "few bits": [*SMALL, *shlex.split("--epochs 1 1 --sparsity 0.5 --weights lsq")],
    "drawn signs": [*SMALL, *shlex.split("--epochs 1 1 --sparsity 0.5 --weights binary-stochastic")],
    "filters": [*SMALL, *shlex.split("--epochs 2 --pruning filters --filter-threshold 0.9 --filter-interval 1 "
                                     "--filter-stop 1")]}


@pytest.fixture(autouse=True, scope="module")
def quick_timing():
    """Which form of convolutions is faster is asked in one step, not in 90."""
    real = compiling.time_calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "time_calls", lambda step, images, calls, device: real(step, images, 1, device))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A call that gives (folder, what the GPU saw) of a run of RUNS that nothing disturbed; each is made once."""
    made = {}

    def run_of(name):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            with FakeCuda() as gpu:
                train_pruning.main([*RUNS[name], "--out", str(out)])
            made[name] = out, gpu
        return made[name]
    return run_of


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_there_and_goes_on_to_the_bit(name, whole, tmp_path, monkeypatch):
    out, gpu = whole(name)
    assert gpu.launches["convolution"] and not gpu.without_kernel
    if name == "filters":
        first, last = (row["parameters"] for row in checkpoint.read(out / "last.pt")["history"])
        assert last < first, "filters leave in each epoch, and what is left trains on"
    assert not gpu.unsaved_draws, "numbers that a resumed run could not draw again"
    with monkeypatch.context() as patch, FakeCuda():
        stop_after_a_save(patch)
        with pytest.raises(Stop):
            train_pruning.main([*RUNS[name], "--out", str(tmp_path / "run")])
    with FakeCuda():
        train_pruning.main(["--resume", "--out", str(tmp_path / "run")])
    assert same(*(checkpoint.read(folder / "model.pt")["weights"] for folder in (out, tmp_path / "run")))


@pytest.mark.parametrize("name, precision", [("rounds", "half"), ("rounds", "bfloat16"), ("few bits", "half")])
def test_its_network_is_tested_there(name, precision, whole):
    out, _ = whole(name)
    found = []
    data, kind = cifar10.load("digits"), cifar10.KINDS["digits"]
    for device in (DEVICE, torch.device("cpu")):
        with FakeCuda() if device == DEVICE else contextlib.nullcontext():
            model, _ = half_test.load_network(out / "model.pt", device)
            found.append(half_test.test_network(model, data, kind, precision, device, batch_size=60, limit=60))
    assert found[0]["images"] == 60 and abs(found[0]["accuracy"] - found[1]["accuracy"]) < 10
    assert found[0]["precision"] == (f"weights and arithmetic in {precision} precision" if name == "rounds" else
                                     found[1]["precision"])


def test_it_does_not_go_on_where_there_is_no_gpu_and_a_cpus_run_not_there(whole, tmp_path):
    out, _ = whole("polynomial")
    assert checkpoint.read(out / "last.pt")["device"] == "cuda"
    with pytest.raises(ValueError, match="began on cuda and cannot go on bit for bit on cpu.*--device cuda"):
        train_pruning.main(["--resume", "--out", str(out)])
    train_pruning.main([*RUNS["polynomial"], "--device", "cpu", "--out", str(tmp_path / "run")])
    with FakeCuda(), pytest.raises(ValueError, match="began on cpu and cannot go on bit for bit on cuda"):
        train_pruning.main(["--resume", "--out", str(tmp_path / "run"), "--device", "auto"])


# ---- a step

@pytest.fixture(params=["grouped", "dense"])
def step(request, tmp_path):
    """(GPU, run, a call that trains a step): of ResNet-18 with masks, which has made one."""
    with FakeCuda() as gpu:
        run = start_rounds(*SHORT, "--convolutions", request.param, "--out", tmp_path / "run")
        experiment.begin_round(run)
        run.masks = pruning.global_masks(run.model, 0.7)
        run.model.train()

        def make():
            gpu.forget()
            batch = train.as_step_takes(run, *next(iter(run.train)))
            gpu.forget()
            return train.train_step(run, *batch, 0)
        make()
        yield gpu, run, make


def test_a_step_waits_for_nothing_and_turns_no_layout(step):
    gpu, run, make = step
    make()
    assert not gpu.waits
    assert not +gpu.turned
    assert gpu.launches["convolution"] == 20 and sum(gpu.launches.values()) < 400
    assert gpu.launches["_foreach_mul_"] and gpu.launches["mul_"] < 20, "masks are applied to all weights in one call"
    with torch.no_grad():
        gpu.forget()
        run.model.eval()(next(iter(run.validation))[0])
        assert not gpu.waits and not +gpu.turned


def planted_masks(run, patch):
    run.masks = {name: torch.ones(mask.shape) for name, mask in run.masks.items()}
    patch.setattr(pruning, "mask_pairs", lambda model, masks: ([model.get_parameter(name) for name in masks],
                                                               list(masks.values())))


def planted_generator(run, patch):
    run.generator = CpuGenerator()


def planted_images(run, patch):
    patch.setattr(train, "as_step_takes", lambda run, images, labels: (images.cpu(), labels))


@pytest.mark.parametrize("plant, told", [
    (planted_masks, "same device.*_foreach_mul_"), (planted_images, "same device"),
    (planted_generator, "Expected a 'cuda' device type for generator but found 'cpu'")])
@pytest.mark.parametrize("step", ["grouped"], indirect=True)
def test_planted_faults_of_devices_are_found(plant, told, step, monkeypatch):
    _, run, make = step
    plant(run, monkeypatch)
    with pytest.raises(RuntimeError, match=told):
        make()


READS = {
    "item": lambda number: number.item(), "bool": lambda number: bool(number > 0), "cpu": lambda number: number.cpu(),
    "tolist": lambda number: number.tolist(), "copy": lambda number: torch.zeros(()).copy_(number),
    "mask": lambda number: number.view(1)[number.view(1) > 0], "float": lambda number: f"{float(number)}"}


@pytest.mark.parametrize("step", ["grouped"], indirect=True)
def test_planted_waits_are_found(step, monkeypatch):
    gpu, _, make = step
    for read in READS.values():
        monkeypatch.setattr(pruning, "mask_gradients", lambda weights, masks, read=read: read(weights[0].grad.sum()))
        make()
        assert sum(gpu.waits.values()) == 1, gpu.waits


@pytest.mark.parametrize("step", ["grouped"], indirect=True)
def test_a_planted_layout_is_found(step):
    gpu, run, make = step
    run.model.to(memory_format=torch.contiguous_format)
    make()
    assert gpu.turned["weight"] > 0


def test_forms_are_timed_in_rows_of_steps_without_a_wait(monkeypatch):
    """One step alone would tell its latency."""
    calls = []
    with FakeCuda() as gpu:
        model, real = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10)).to(DEVICE), compiling.time_calls
        monkeypatch.setattr(compiling, "time_calls", lambda *given: calls.append(given[2]) or real(*given))
        compiling.choose_forward(model, "off", 1, (4, 3, 2, 2), contextlib.nullcontext(), DEVICE)
    assert calls == [30, 30, 30]
    assert {wait.split(",")[0] for wait in gpu.waits} == {"synchronize"} and sum(gpu.waits.values()) == 6
