"""Training: one step by hand, schedules, averages and evaluation."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import experiment
import networks
import train
import train_pruning
from engine import schedules

CPU = torch.device("cpu")
SHORT = ["--dataset", "digits", "--device", "cpu", "--compile", "off"]


def start_run(out, model, batches, classes=10, **settings):
    """A run of `model` over a list of batches, at the start of its first round."""
    lines = {"mixing": "none", "weights": "float", "schedule": "one-cycle", "averaging": "none",
             "optimizer": "sgd"}
    run = experiment.Run({**train.DEFAULTS, **lines, "epochs": [1], **settings}, out, CPU, {"num_classes": classes},
                         model, torch.Generator().manual_seed(0), batches, None, forward=model)
    experiment.begin_round(run)
    return run


def linear_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))


def random_batches(count=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 2, 2, generator=generator), torch.randint(10, (size,), generator=generator))
            for _ in range(count)]


# ---- schedules

@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
def test_schedule_starts_above_zero_peaks_at_one_and_ends_near_zero(name, tmp_path):
    model = linear_model()
    run = start_run(tmp_path, model, [None] * 50, schedule=name, lr=0.4, epochs=[4])
    rates = []
    for _ in range(200):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.schedule.step()
    peak = rates.index(max(rates))
    assert 0 < rates[0] < 0.03 * 0.4
    assert rates[peak] == pytest.approx(0.4, rel=2e-3)
    assert peak == pytest.approx({"one-cycle": 50, "cosine": 10}[name], abs=1)
    assert rates[:peak + 1] == sorted(rates[:peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.01 * 0.4
    assert 0 <= run.optimizer.param_groups[0]["lr"] < 1e-9


@pytest.mark.parametrize("shape", [schedules.one_cycle, schedules.warm_cosine])
def test_shares_of_the_learning_rate_stay_between_zero_and_one(shape):
    shares = [shape(step / 999) for step in range(1000)]
    assert all(0 <= share <= 1 for share in shares) and min(shares[:-1]) > 0 and max(shares) > 0.999


def test_plateau_takes_a_tenth_when_the_validation_loss_stalls(tmp_path, monkeypatch):
    run = start_run(tmp_path, linear_model(), [], schedule="plateau", lr=0.2)
    run.train, losses = random_batches(1), iter([2.0] + [3.0] * 12)
    monkeypatch.setattr(train, "measure", lambda run: (next(losses), 10.0))
    monkeypatch.setattr(train, "save", lambda run: None)
    bar = type("Bar", (), {"disable": True, "update": lambda self, count: None})()
    rates = [train.run_epoch(run, bar)["lr"] for _ in range(13)]
    assert rates == [0.2] * 12 + [0.02]


# ---- one step

def test_train_step_is_smoothed_cross_entropy_and_nesterov_by_hand(tmp_path):
    batches, model, smoothing, decay, momentum, rate = random_batches(4), linear_model(), 0.1, 0.01, 0.9, 0.3
    run = start_run(tmp_path, model, batches, label_smoothing=smoothing, weight_decay=decay, momentum=momentum, lr=rate)
    weight, bias = (tensor.detach().clone() for tensor in (model[1].weight, model[1].bias))
    slots = torch.zeros_like(weight), torch.zeros_like(bias)
    for step, (images, labels) in enumerate(batches):
        found, right = train.train_step(run, images, labels, step)
        flat = images.flatten(1)
        logits = flat @ weight.T + bias
        wanted = torch.full((8, 10), smoothing / 10)
        wanted[range(8), labels] += 1 - smoothing
        logarithms = logits - logits.exp().sum(1, keepdim=True).log()
        loss = -(wanted * logarithms).sum(1).mean()
        slope = (logarithms.exp() - wanted) / 8
        share = rate * schedules.one_cycle(step / 4)
        for tensor, slot, gradient in zip((weight, bias), slots, (slope.T @ flat, slope.sum(0)), strict=True):
            gradient += decay * tensor
            slot.mul_(momentum).add_(gradient)
            tensor -= share * (gradient + momentum * slot)
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        assert right.item() == (logits.argmax(1) == labels).sum()
        torch.testing.assert_close(model[1].weight, weight)
        torch.testing.assert_close(model[1].bias, bias)


def test_mixing_draws_from_the_generator_of_the_run_alone(tmp_path):
    images, labels = random_batches(1)[0]
    results = []
    for outer_seed in (1, 2):
        model = linear_model()
        run = start_run(tmp_path, model, [None], mixing="cutmix", mix_probability=1.0)
        torch.manual_seed(outer_seed)
        outer, inner = torch.get_rng_state(), run.generator.get_state()
        train.train_step(run, images, labels, 0)
        assert torch.equal(outer, torch.get_rng_state())
        assert not torch.equal(inner, run.generator.get_state())
        results.append(model[1].weight.detach())
    assert torch.equal(*results)


def test_no_mixing_draws_nothing(tmp_path):
    images, labels = random_batches(1)[0]
    run = start_run(tmp_path, linear_model(), [None], mixing="none")
    inner, kept = run.generator.get_state(), images.clone()
    train.train_step(run, images, labels, 0)
    assert torch.equal(inner, run.generator.get_state()) and torch.equal(images, kept)


def test_mixed_batch_is_what_the_network_sees_and_learns(tmp_path, monkeypatch):
    images, labels = random_batches(1)[0]
    seen, model = [], linear_model()
    run = start_run(tmp_path, model, [None], mixing="cutmix", mix_per_sample=True, label_smoothing=0.0)
    soft = torch.softmax(torch.randn(8, 10), 1)

    def half(images, targets, generator, alpha, probability, per_sample):
        assert generator is run.generator and (alpha, probability, per_sample) == (1.0, 0.5, True)
        assert torch.equal(targets, F.one_hot(labels, 10).float())
        return images / 2, soft
    monkeypatch.setitem(train.MIXINGS, "cutmix", half)
    run.forward = lambda batch: seen.append(batch) or model(batch)
    expected = F.cross_entropy(model(images / 2), soft).item()
    assert train.train_step(run, images, labels, 0)[0].item() == pytest.approx(expected)
    assert torch.equal(seen[0], images / 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_before_the_update(value, tmp_path):
    (images, labels), model = random_batches(1)[0], linear_model()
    run = start_run(tmp_path, model, [None] * 10, averaging="ema", lr=0.2)
    train.train_step(run, images, labels, 0)
    parts = model, run.average, run.optimizer
    before = copy.deepcopy([part.state_dict() for part in parts])
    images[3, 0, 0, 0] = value
    with pytest.raises(RuntimeError, match=r"not finite: epoch 1, step 2, learning rate .*none yet"):
        train.train_step(run, images, labels, 1)
    for old, part in zip(before, parts, strict=True):
        torch.testing.assert_close(old, part.state_dict(), rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


def counting_run(tmp_path, batches, **settings):
    """A run that trains as on CUDA: whether all was finite is counted on the device, and looked at now and then."""
    run = start_run(tmp_path, linear_model(), batches, **settings)
    run.finite_steps = torch.zeros((), dtype=torch.int64)
    return run


BAR = SimpleNamespace(update=lambda count: None, disable=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("bad", "schedule"), [(0, "one-cycle"), (3, "one-cycle"), (9, "one-cycle"), (3, "plateau")])
def test_a_late_look_names_the_first_step_that_was_not_finite(value, bad, schedule, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "READ_EVERY", 4)
    batches = random_batches(10)
    run = counting_run(tmp_path, batches, averaging="ema", lr=0.2, epochs=[2], schedule=schedule)
    train.train_epoch(run, BAR)
    run.epoch, run.history = 1, [{}]
    batches[bad][0][3, 0, 0, 0] = value
    rate = 0.2 * (schedules.one_cycle((10 + bad) / 20) if schedule == "one-cycle" else 1)
    with pytest.raises(RuntimeError, match=f"not finite: epoch 2, step {bad + 1}, learning rate {rate:.4g}; last good"):
        train.train_epoch(run, BAR)
    assert not list(tmp_path.iterdir())


def test_counting_trains_the_same_bits_and_looks_every_so_often(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "READ_EVERY", 4)
    looks, real = [], train.refuse_counted
    monkeypatch.setattr(train, "refuse_counted", lambda run, step: (looks.append(step), real(run, step)))
    batches, weights = random_batches(10), []
    for run in (counting_run(tmp_path, batches), start_run(tmp_path, linear_model(), batches)):
        train.train_epoch(run, BAR)
        weights.append(run.model[1].weight.detach())
    assert torch.equal(*weights) and looks == [3, 7, 9]


@pytest.mark.parametrize("settings", [{"weights": "binary", "binary_scale": "one"},
                                      {"pruning": "polynomial", "sparsity": [0.5], "prune_frequency": 1}])
def test_what_ranks_or_binarizes_weights_finds_them_finite(settings, tmp_path):
    batches = random_batches(4)
    batches[1][0][0, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="not finite: epoch 1, step 2"):
        train.train_epoch(counting_run(tmp_path, batches, **settings), BAR)


def test_gradual_pruning_looks_only_where_it_ranks(tmp_path, monkeypatch):
    """On a GPU each look waits."""
    monkeypatch.setattr(train, "READ_EVERY", 100)
    looks, real = [], train.refuse_counted
    monkeypatch.setattr(train, "refuse_counted", lambda run, step: (looks.append(step), real(run, step)))
    run = counting_run(tmp_path, random_batches(20), pruning="polynomial", sparsity=[0.5], prune_frequency=4,
                       prune_begin=0.1, prune_end=0.6)
    train.train_epoch(run, BAR)
    assert looks == [2, 6, 10, 12, 19] and run.masks


def test_masks_are_looked_up_once_for_each_that_are_set(tmp_path, monkeypatch):
    run, calls, real = start_run(tmp_path, linear_model(), [None] * 9), [], experiment.pruning.mask_pairs
    monkeypatch.setattr(experiment.pruning, "mask_pairs", lambda *given: calls.append(1) or real(*given))
    images, labels = random_batches(1)[0]
    for count, share in ((1, 0.5), (2, 0.8)):
        run.masks = experiment.pruning.global_masks(run.model, share)
        for step in range(3):
            train.train_step(run, images, labels, step)
            assert (run.model[1].weight == 0).sum() == round(share * 120) and len(calls) == count
    experiment.begin_round(run)
    train.train_step(run, images, labels, 0)
    assert len(calls) == 3, "other tensors may be in place in another round"


def test_a_fault_on_the_device_is_seen_before_an_epoch_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save", lambda run: pytest.fail("it saves"))
    batches = random_batches(3)
    batches[-1][0][0, 0, 0, 0] = math.nan
    run = counting_run(tmp_path, batches, averaging="ema")
    monkeypatch.setattr(train, "begin_round", lambda run: None)
    with pytest.raises(RuntimeError, match="epoch 1, step 3"):
        train.fit(run)


def test_epoch_reports_means_over_its_images(tmp_path):
    batches, model = random_batches(3), linear_model()
    run = start_run(tmp_path, model, batches, lr=1e-12, label_smoothing=0.0)
    bar = type("Bar", (), {"disable": True, "update": lambda self, count: None})()
    loss, accuracy = train.train_epoch(run, bar)
    with torch.no_grad():
        logits, labels = torch.cat([model(images) for images, _ in batches]), torch.cat([own for _, own in batches])
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), rel=1e-5)


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
        train.run_epoch(run, SimpleNamespace(update=lambda count: None, disable=True))
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
