"""Optimizers: Muon against torch.optim.Muon, SGD against torch.optim.SGD, groups, masks, shrinking, resuming."""
import copy
import shlex

import pytest
import torch
from sample_runs import assert_same_run, run_in_parts, start_rounds
from torch import nn

import models
import resnet_factorized
import train
import train_pruning
from engine import compiling, shrinking
from set_optimizer_train import Muon, filters_of, make_optimizer, orthogonal, parameter_groups

SETTINGS = {**train.DEFAULTS, "optimizer": "muon"}
SPEEDY = ["--optimizer", "muon", "--flips", "alternating"]


def gradients_of(shape, steps=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def moved(optimizer, parameter, gradients):
    """The parameter after a step on each gradient."""
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize(("rate", "momentum", "decay"), [(0.02, 0.95, 0.1), (0.3, 0.6, 0.0)])
def test_muon_is_torchs_on_a_matrix(shape, rate, momentum, decay, monkeypatch):
    monkeypatch.setattr(compiling, "has_bfloat16", lambda: True)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "blocks": [1], "lr": rate, "momentum": momentum, "weight_decay": decay,
             "keep_norm": False}
    other = torch.optim.Muon([theirs], lr=rate, momentum=momentum, weight_decay=decay)
    gradients = gradients_of(shape)
    torch.testing.assert_close(moved(Muon([group]), ours, gradients), moved(other, theirs, gradients), rtol=1e-2,
                               atol=rate / 50)         # both iterate in bfloat16, in another order of sums
    assert not torch.allclose(ours, start, atol=rate / 10)


@pytest.mark.parametrize("shape", [(1, 6, 10), (3, 10, 6)])
def test_a_cpu_without_bfloat16_iterates_in_float32(shape, monkeypatch):
    monkeypatch.setattr(compiling, "has_bfloat16", lambda: False)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = matrices.double() if shape[1] <= shape[2] else matrices.double().mT
    exact = exact / exact.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):                                          # (3.4445 - 4.7750 xx' + 2.0315 (xx')^2) x
        gram = exact @ exact.mT
        exact = 3.4445 * exact - 4.7750 * gram @ exact + 2.0315 * gram @ gram @ exact
    turned = orthogonal(matrices)
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned.double(), exact if shape[1] <= shape[2] else exact.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_rest_is_torchs_sgd(nesterov):
    start = torch.randn(7, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rates = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    gradients = gradients_of(7)
    torch.testing.assert_close(moved(Muon([{"params": [ours], **rates}]), ours, gradients),
                               moved(torch.optim.SGD([theirs], **rates), theirs, gradients))


def test_each_group_of_a_convolution_is_a_matrix_of_its_own():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(8, 2, 3, 3, generator=generator)
    update = orthogonal(whole.reshape(4, 2, 18))
    for part, own in zip(whole.chunk(4), update, strict=True):
        torch.testing.assert_close(own, orthogonal(part.reshape(1, 2, 18))[0], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(update.reshape(8, 18), orthogonal(whole.reshape(1, 8, 18))[0], atol=0.05)


@pytest.mark.parametrize("shape", [(3, 5, 20), (3, 20, 5), (1, 16, 16)])
def test_singular_values_come_close_to_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonal(matrices).double())
    assert values.max() < 1.3
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonal(matrices).double().flatten(),
                                                 (left @ right).flatten(), dim=0) > 0.97


def test_a_gradient_of_zeros_moves_nothing():
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


def test_a_filter_bank_keeps_its_norm_where_asked():
    weight = nn.Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon([{"params": [weight], "blocks": [2], "lr": 0.1, "momentum": 0.0, "weight_decay": 0.5,
                       "keep_norm": True}])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.norm().item() == pytest.approx(8 ** 0.5, rel=1e-5)


def test_muon_takes_filters_and_leaves_classifier_depthwise_and_frozen_layers():
    names = {"layer1.0.conv1.weight": 8, "conv1.weight": 1}
    found = filters_of(resnet_factorized.build())
    assert {name: found[name][1] for name in names} == names
    assert "linear.weight" not in found and len(found) == 20
    assert not [name for name in filters_of(models.build("mobilenet")) if "depthwise" in name]
    assert "conv1.weight" not in filters_of(models.build("vgg6-8-8-8"))
    assert list(filters_of(models.build("lenet5"))) == [f"{name}.weight" for name in
                                                        ("conv1", "conv2", "linear1", "linear2")]


def test_every_parameter_is_in_one_group_and_biases_follow_their_own_rate():
    model = models.build("cifar-quick")
    groups = parameter_groups(model, {**SETTINGS, "lr": 0.2, "bias_lr": 4.0, "weight_decay": 0.1})
    held = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    (biases,) = [group for group in groups if model.conv1.bias in set(group["params"])]
    assert (biases["lr"], biases["weight_decay"]) == (0.8, 0.025)
    assert len(make_optimizer(model, {**SETTINGS, "optimizer": "sgd"}).param_groups) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("bias_lr", [1.0, 4.0])
@pytest.mark.parametrize("own", [None, 0.0, 0.3])
def test_the_weight_decay_of_batch_norm_is_its_own(own, bias_lr, optimizer):
    model = models.build("mobilenet")
    settings = {**SETTINGS, "optimizer": optimizer, "lr": 0.2, "weight_decay": 0.1, "norm_weight_decay": own,
                "bias_lr": bias_lr, "muon_lr": 0.05, "muon_decay": 0.2}
    made = make_optimizer(model, settings)
    filters = filters_of(model) if optimizer == "muon" else {}
    held = [parameter for group in made.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():                                 # the scales and biases of batch norm, too
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    made.step()
    for name, parameter in model.named_parameters():
        decay = own if own is not None and ".bn" in f".{name}" else 0.1      # without a gradient a step only decays,
        expected = 1 - 0.05 * 0.2 if name in filters else 1 - 0.2 * decay * 1.9      # by Nesterov's momentum 1.9 times
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), msg=name)


def test_a_parameter_without_gradient_stays():
    model = models.build("vgg6-8-8-8")
    optimizer, before = make_optimizer(model, SETTINGS), copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["layer2.conv1.weight"], after["layer2.conv1.weight"])


def test_momentum_shrinks_with_its_channels():
    model = resnet_factorized.build("resnet18")
    optimizer = make_optimizer(model, SETTINGS)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model(images).sum().backward()
    optimizer.step()
    space = next(space for space in model.channels() if space["name"] == "layer1.0.conv1")
    keep = shrinking.balanced(torch.ones(64, dtype=torch.bool), torch.arange(64.0), *shrinking.partitions(model, space))
    shrinking.remove(model, space, keep, optimizer=optimizer)
    optimizer.zero_grad()
    model(images).sum().backward()
    optimizer.step()
    weight = model.layer1[0].conv1.weight
    assert optimizer.state[weight]["momentum_buffer"].shape == weight.shape == (len(keep), 8, 3, 3)


def test_a_run_with_muon_resumes_to_the_bit_across_pruning(tmp_path):
    flags = [*shlex.split("--dataset digits --limit 64 --batch-size 32 --compile off --device cpu --seed 3 "
                          "--epochs 2 1 2 --sparsity 0.7 0.7 --model resnet8-8-8-8 --mixing cutout --bias-lr 2 "
                          "--peak 0 --norm-weight-decay 0"), *SPEEDY]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_pruning.main([*flags, "--out", str(whole)])
    run_in_parts(lambda: train_pruning.main([*flags, "--out", str(parts)]), parts, 5)
    assert_same_run(whole, parts)
    network = torch.load(whole / "model.pt", weights_only=True)["weights"]
    zeros = sum(int((weight == 0).sum()) for weight in network.values() if weight.dim() > 1)
    assert zeros >= 0.9 * sum(weight.numel() for weight in network.values() if weight.dim() > 1)


@pytest.mark.parametrize("weights", ["binary", "lsq"])
def test_muon_trains_binary_and_few_bit_networks(weights, tmp_path):
    run = start_rounds("--dataset", "digits", "--limit", "64", "--batch-size", "32", "--compile", "off",
                       "--device", "cpu", "--epochs", "1", "--pruning", "polynomial", "--sparsity", "0.5",
                       "--model", "resnet8-8-8-8", "--weights", weights, "--out", tmp_path / weights, *SPEEDY)
    train.fit(run)
    assert run.history[-1]["sparsity"] == pytest.approx(0.5, abs=0.3)
    assert {"blocks" in group for group in run.optimizer.param_groups} == {True, False}
