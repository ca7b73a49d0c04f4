"""Training: schedules, one step by hand, and what is looked at between steps."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from toy_runs import BAR, linear_model, random_batches, start_run

import experiment
import train
from engine import schedules

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
