"""What a round ends with: averaged weights, recalibrated statistics, and how they are measured."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy_runs import BAR, CPU, linear_model, random_batches, start_run

import experiment
import networks
import train
import train_pruning

# ---- averaging

def wiggle(model, generator):
    """Other weights, other running statistics, one batch more counted."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=generator)
            else:
                tensor += 1


def test_average_equals_that_of_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    ours, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(model)
    for step in range(1000, 1006):
        wiggle(model, generator)
        train.update_average(experiment.average_pairs(ours, model), 0.9, step)
        theirs.update_parameters(model)
    for name, tensor in ours.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs.module.state_dict()[name], rtol=1e-6, atol=1e-6)
            assert not torch.equal(tensor, model.state_dict()[name])
    assert ours[1].num_batches_tracked == model[1].num_batches_tracked == 6


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (8, 0.5), (100, 101 / 110), (10_000, 0.998)])
def test_average_forgets_its_first_steps_sooner(step, decay):
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(model.weight, 3.0)
    nn.init.constant_(average.weight, 1.0)
    train.update_average(experiment.average_pairs(average, model), 0.998, step)
    assert average.weight.item() == pytest.approx(decay * 1 + (1 - decay) * 3, rel=1e-6)
    assert model.weight.item() == 3.0


def test_average_follows_a_network_that_shrinks(tmp_path, monkeypatch):
    """The tensors to average are looked up once a round, and again once filters have left."""
    monkeypatch.setattr(train, "save", lambda run: None)
    settings = {**train.DEFAULTS, "epochs": [2], "mixing": "none", "weights": "float", "schedule": "cosine",
                "averaging": "ema", "optimizer": "sgd", "pruning": "filters",
                "filter_interval": 1, "filter_threshold": 0.9}
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(2)]
    architecture = {"name": "lenet5", "num_classes": 10, "in_channels": 3, "size": 32}
    model = networks.build(**architecture)
    run = experiment.Run(settings, tmp_path, CPU, architecture, model, torch.Generator(), batches, batches,
                         forward=model)
    experiment.begin_round(run)
    before = sum(parameter.numel() for parameter in model.parameters())
    train.run_epoch(run, BAR)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    held = [tensor.data_ptr() for tensors in run.averaged for tensor in tensors]
    for network in (run.average, run.model):
        assert {tensor.data_ptr() for tensor in network.state_dict().values()} <= set(held)
    old = run.average.state_dict()["linear1.weight"].clone()
    train.train_epoch(run, BAR)
    assert not torch.equal(run.average.state_dict()["linear1.weight"], old)


def test_average_is_what_the_round_ends_with(tmp_path, monkeypatch):
    run = start_run(tmp_path, linear_model(), random_batches(3), averaging="ema", lr=0.3)
    run.validation = random_batches(1, seed=1)
    monkeypatch.setattr(train, "save", lambda run: None)
    trained = []

    def measure(run):
        trained.append(run.model[1].weight.detach().clone())
        return 1.0, 1.0
    monkeypatch.setattr(train, "measure", measure)
    train.fit(run)
    assert torch.equal(run.model[1].weight, run.average[1].weight)
    assert not torch.equal(run.model[1].weight, trained[0])


# ---- evaluation

def test_evaluate_counts_each_image_once(tmp_path):
    model = linear_model()
    images, labels = (torch.cat(parts) for parts in zip(*random_batches(3), strict=True))
    batches = list(zip(images.split(9), labels.split(9), strict=True))
    assert [len(part) for _, part in batches] == [9, 9, 6]
    loss, accuracy = train.evaluate(model, batches, CPU)
    losses, right = [], 0
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            logits = model(image[None])[0]
            losses.append(-(logits[label] - logits.exp().sum().log()).item())
            right += int(logits.argmax() == label)
    assert loss == pytest.approx(sum(losses) / 24, rel=1e-5)
    assert accuracy == pytest.approx(100 * right / 24, rel=1e-6)


def dropping_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 10))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_restores_the_mode_and_leaves_the_model_as_it_was(training):
    model = dropping_model().train(training)
    before = copy.deepcopy(model.state_dict())
    first, second = (train.evaluate(model, random_batches(2), CPU) for _ in range(2))
    assert first == second
    assert all(module.training == training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_restores_the_mode_when_it_fails():
    model = dropping_model().train()
    with pytest.raises(RuntimeError):
        train.evaluate(model, [(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64))], CPU)
    assert model.training


def test_evaluate_draws_from_no_generator(tmp_path):
    run = start_run(tmp_path, dropping_model(), random_batches(2))
    run.validation = random_batches(2, seed=1)
    outer, inner = torch.get_rng_state(), run.generator.get_state()
    train.measure(run)
    assert torch.equal(outer, torch.get_rng_state()) and torch.equal(inner, run.generator.get_state())


def test_averaged_weights_are_the_ones_measured(tmp_path):
    run = start_run(tmp_path, linear_model(), random_batches(1), averaging="ema")
    run.validation = random_batches(2, seed=1)
    nn.init.zeros_(run.average[1].weight)
    nn.init.zeros_(run.average[1].bias)
    assert train.measure(run)[0] == pytest.approx(math.log(10), rel=1e-6)


def batch_norm_run(tmp_path, **settings):
    """A run of a convolution with batch norm over one batch; calibration images are far from those that train it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    run = start_run(tmp_path, model, random_batches(1), averaging="ema", binary_scale="one", **settings)
    run.validation, run.calibration = random_batches(2, seed=1), [(random_batches(1, seed=2)[0][0] + 5,)]
    return run, model


@pytest.mark.parametrize("weights", ["float", "binary"])
def test_recalibration_ends_a_round_with_the_statistics_of_the_calibration_images(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save", lambda run: None)
    means = {}
    for wanted in (False, True):
        run, model = batch_norm_run(tmp_path, epochs=[2], recalibrate=wanted, weights=weights)
        train.run_epoch(run, BAR)
        early = run.average[1].running_mean.clone()
        train.fit(run)
        convolution = copy.deepcopy(model[0])
        if weights == "binary":
            convolution.weight.data = torch.where(convolution.weight >= 0, 1.0, -1.0)
        with torch.no_grad():
            expected = convolution(run.calibration[0][0]).mean((0, 2, 3))
        means[wanted] = torch.allclose(model[1].running_mean, expected, atol=1e-4)
        assert not torch.allclose(early, expected, atol=0.1)       # not before the round's end
    assert means == {False: False, True: True}


def test_recalibration_follows_pruning(tmp_path):
    run, model = batch_norm_run(tmp_path, epochs=[1, 1], sparsity=[0.7], recalibrate=True)
    train_pruning.prune(run)
    with torch.no_grad():
        expected = model[0](run.calibration[0][0]).mean((0, 2, 3))
    assert torch.allclose(model[1].running_mean, expected, atol=1e-4) and run.round == 1
