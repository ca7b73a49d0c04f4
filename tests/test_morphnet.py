"""MorphNet: costs against torch's counter, the regulariser by hand, and which channels live."""
import math

import pytest
import torch
import torch.nn.functional as F
from samples import Plain, Tiny, macs_by_torch, weights_of
from torch import nn

import models
import morphnet
import resnet_factorized

DEVICE = (1e9, 1e8)        # MACs and bytes a second


def set_scales(model, name, values):
    with torch.no_grad():
        model.get_submodule(name).weight.copy_(torch.tensor(values))


# ---- costs

@pytest.mark.parametrize("groups, macs, weights", [
    (1, 555_422_720, 11_164_352), (4, 140_186_624, 2_796_224), (8, 70_980_608, 1_401_536)])
def test_costs_are_the_golden_numbers(groups, macs, weights):
    model = resnet_factorized.build("resnet18", groups)
    sizes = morphnet.sizes_of(model, (3, 32, 32))
    assert weights_of(model) == weights
    for threshold in (None, 0, 0.5):         # a fresh scale is 1
        assert morphnet.cost(model, sizes, "macs", threshold) == macs
        assert morphnet.cost(model, sizes, "parameters", threshold) == weights


@pytest.mark.parametrize("name, arguments, shape", [
    ("lenet5", {"in_channels": 1, "size": 28}, (1, 28, 28)), ("mobilenet", {}, (3, 32, 32)),
    ("resnet20", {"shortcut": "A"}, (3, 32, 32)), ("resnet20", {"shortcut": "B"}, (3, 32, 32)),
    ("wrn-10-2", {}, (3, 32, 32))])
def test_costs_of_the_other_networks(name, arguments, shape):
    model = models.build(name, **arguments)
    sizes = morphnet.sizes_of(model, shape)
    assert morphnet.cost(model, sizes) == macs_by_torch(model, shape)
    assert morphnet.cost(model, sizes, "parameters") == weights_of(model)


@pytest.mark.parametrize("groups", [1, 8])
def test_costs_of_bottlenecks(groups):
    model = resnet_factorized.build("resnet50", groups)
    sizes = morphnet.sizes_of(model, (3, 16, 16))
    assert morphnet.cost(model, sizes) == macs_by_torch(model, (3, 16, 16))
    assert morphnet.cost(model, sizes, "parameters") == weights_of(model)


def test_costs_by_hand():
    model = Tiny()
    sizes = morphnet.sizes_of(model, (3, 8, 8))
    assert morphnet.cost(model, sizes) == 64 * 27 * 4 + 16 * 9 * 4 + 16 * 4 * 6 // 2 + 24 * 5
    assert morphnet.cost(model, sizes) == macs_by_torch(model, (3, 8, 8))
    assert morphnet.cost(model, sizes, "parameters") == weights_of(model)
    set_scales(model, "bn1", [0.1, 0.1, -1.0, 0.0])
    set_scales(model, "bn2", [0.1, 0.3, 0.0, 0.2])      # the larger of both: 0.1, 0.3, 1.0, 0.2
    set_scales(model, "bn3", [1.0, 0.2, -0.3, 0.0, 0.0, 0.21])
    assert morphnet.cost(model, sizes, "macs", 0.2) == 64 * 27 * 2 + 16 * 9 * 2 + 16 * 2 * 3 // 2 + 4 * 3 * 5
    assert morphnet.cost(model, sizes, "parameters", 0.2) == 27 * 2 + 9 * 2 + 2 * 3 // 2 + 4 * 3 * 5
    assert morphnet.cost(model, sizes, "macs", 0) == macs_by_torch(model, (3, 8, 8))


def test_latency_by_hand_in_both_regimes():
    model = Tiny()
    sizes = morphnet.sizes_of(model, (3, 8, 8))
    macs = [6912, 576, 192, 120]
    moved = [4 * (108 + 64 * 3 + 64 * 4), 4 * (36 + 64 * 4 + 16 * 4), 4 * (12 + 16 * 4 + 16 * 6), 4 * (120 + 24 + 5)]
    assert morphnet.cost(model, sizes, "latency", device=(1e9, 1e15)) == pytest.approx(sum(macs) / 1e9)
    assert morphnet.cost(model, sizes, "latency", device=(1e15, 1e9)) == pytest.approx(sum(moved) / 1e9)
    mixed = [max(work / 2e9, traffic / 1e9) for work, traffic in zip(macs, moved, strict=True)]
    assert mixed[0] == macs[0] / 2e9 and mixed[1:] == [each / 1e9 for each in moved[1:]]
    assert morphnet.cost(model, sizes, "latency", device=(2e9, 1e9)) == pytest.approx(sum(mixed))


def test_sizes_leave_the_model_as_it_was():
    model = Tiny().train()
    model.bn2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    morphnet.sizes_of(model, (3, 8, 8))
    assert model.training and model.bn1.training and not model.bn2.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_runs_twice_is_refused():
    model = Plain()
    model.forward = lambda images: model.conv(model.conv(images)[:, :1])
    with pytest.raises(ValueError, match="conv runs twice"):
        morphnet.sizes_of(model, (1, 4, 4))
    assert not model.conv._forward_hooks


@pytest.mark.parametrize("what, device, reason", [
    ("flops", None, "'flops'; choose from macs, parameters, latency"), ("latency", None, "MACs a second"),
    ("latency", (0, 1), "above 0"), ("latency", (1e9, math.nan), "above 0"), ("latency", (1e9,), "two numbers")])
def test_unknown_costs_are_refused(what, device, reason):
    model = Plain()
    sizes = morphnet.sizes_of(model, (1, 4, 4))
    for function in (morphnet.cost, morphnet.penalty):
        with pytest.raises(ValueError, match=reason):
            function(model, sizes, what, device=device)


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_thresholds_below_zero_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold .* at least 0"):
        morphnet.structure_of(Plain(), threshold)


# ---- the regulariser

def test_penalty_and_gradient_by_hand():
    """a: 2 alive of 4, b: 3 of 6; each channel pays r times what it costs while the others stay."""
    model = Tiny()
    sizes = morphnet.sizes_of(model, (3, 8, 8))
    set_scales(model, "bn1", [0.1, -0.4, 2.0, 0.0])
    set_scales(model, "bn2", [0.05, 0.3, 1.0, 0.2])
    set_scales(model, "bn3", [1.0, 0.2, -0.3, 0.0, 0.1, 0.5])
    price_a, price_b = 64 * 27 + 16 * 9 + 16 * 3 // 2, 16 * 2 // 2 + 20
    loss = morphnet.penalty(model, sizes, "macs", 0.2, whole=1000.0)
    assert loss.shape == ()
    assert loss.item() == pytest.approx((price_a * (0.1 + 0.4 + 2.0 + 0.2) + price_b * 2.1) / 1000, rel=1e-6)
    loss.backward()
    expected = {"bn1": [price_a, -price_a, price_a, 0], "bn2": [0, 0, 0, price_a],
                "bn3": [price_b, price_b, -price_b, 0, price_b, price_b]}
    for name, gradient in expected.items():
        assert torch.allclose(model.get_submodule(name).weight.grad, torch.tensor(gradient) / 1000), name
    assert model.conv1.weight.grad is None


def test_penalty_of_parameters_by_hand():
    model = Tiny()
    sizes = morphnet.sizes_of(model, (3, 8, 8))
    price_a, price_b = 27 + 9 + 6 / 2, 4 / 2 + 20
    assert morphnet.penalty(model, sizes, "parameters", 0.2, whole=1.0).item() == pytest.approx(4 * price_a
                                                                                              + 6 * price_b)


def test_penalty_of_latency_by_hand_in_both_regimes():
    model = Tiny()
    sizes = morphnet.sizes_of(model, (3, 8, 8))
    computing = morphnet.penalty(model, sizes, "latency", 0.2, (1e9, 1e15), whole=1e-9)
    assert computing.item() == pytest.approx(morphnet.penalty(model, sizes, "macs", 0.2, whole=1.0).item())
    # bytes: each channel of a is made by conv1, passes depth, is read by conv2; of b is made by conv2, read by linear
    price_a = 4 * ((27 + 64) + (64 + 9 + 16) + (6 / 2 + 16))
    price_b = 4 * ((4 / 2 + 16) + 4 * (5 + 1))
    moving = morphnet.penalty(model, sizes, "latency", 0.2, (1e15, 1e9), whole=1e-9)
    assert moving.item() == pytest.approx(4 * price_a + 6 * price_b)


def test_without_batch_norm_the_filters_pay():
    model = Plain()
    with torch.no_grad():
        model.conv.weight[1] = 0
    sizes = morphnet.sizes_of(model, (1, 4, 4))
    norms = model.conv.weight.detach().flatten(1).norm(dim=1), model.hidden.weight.detach().norm(dim=1)
    prices = 16 * 9 + 16 * 4, 16 * 2 + 2            # two of the three filters are alive
    loss = morphnet.penalty(model, sizes, "macs", 1e-6, whole=1.0)
    assert loss.item() == pytest.approx(sum(p * r.sum().item() for p, r in zip(prices, norms, strict=True)), rel=1e-5)
    loss.backward()
    expected = prices[1] * model.hidden.weight.detach() / norms[1][:, None]
    assert torch.allclose(model.hidden.weight.grad, expected, rtol=1e-5)
    assert bool((model.conv.weight.grad[1] == 0).all())            # no NaN at a norm of 0
    assert model.out.weight.grad is None


def test_counts_are_constant_in_the_gradient():
    """Doubling every alive scale doubles the loss and leaves the gradient; a death elsewhere lowers it."""
    def gradient(scales):
        model = Tiny()
        set_scales(model, "bn3", scales)
        loss = morphnet.penalty(model, morphnet.sizes_of(model, (3, 8, 8)), "macs", 0.2, whole=1.0)
        loss.backward()
        return model.bn1.weight.grad + model.bn2.weight.grad
    alive, doubled, fewer = gradient([1.0] * 6), gradient([2.0] * 6), gradient([1.0] * 4 + [0.1] * 2)
    assert torch.equal(alive, doubled)
    assert torch.allclose(alive - fewer, torch.full((4,), 16 * 2 / 2))


@pytest.mark.parametrize("what", morphnet.METRICS)
def test_normalised_by_the_whole_network(resnet, what):
    """At r = 1 everywhere each product pays twice, but for the constant sides, and activations once."""
    model, sizes, _ = resnet
    whole = morphnet.cost(model, sizes, what, device=DEVICE)
    loss = morphnet.penalty(model, sizes, what, 0.01, DEVICE).item()
    assert 1 < loss < 2
    assert loss == pytest.approx(morphnet.penalty(model, sizes, what, 0.01, DEVICE, 1.0).item() / whole, rel=1e-5)


def test_equal_scales_of_a_stream_share_the_gradient():
    model = Tiny()
    sizes = morphnet.sizes_of(model, (3, 8, 8))
    morphnet.penalty(model, sizes, "macs", 0.2).backward()
    assert torch.equal(model.bn1.weight.grad, model.bn2.weight.grad) and bool((model.bn1.weight.grad > 0).all())


def test_a_removed_branch_costs_nothing_and_the_stream_pays_nothing_for_it():
    model = resnet_factorized.build("resnet18", 8)
    sizes = morphnet.sizes_of(model, (3, 32, 32))
    for what in morphnet.METRICS:
        whole = morphnet.cost(model, sizes, what, 0.01, DEVICE)
        with torch.no_grad():
            model.layer1[0].bn1.weight.zero_()
        loss = morphnet.penalty(model, sizes, what, 0.01, DEVICE, 1.0)
        loss.backward()
        paid, model.bn1.weight.grad = model.bn1.weight.grad[0].item(), None
        removed = morphnet.rebuild(resnet_factorized.build("resnet18", 8), morphnet.structure_of(model, 0.01))
        left = morphnet.cost(removed, morphnet.sizes_of(removed, (3, 32, 32)), what, None, DEVICE)
        assert morphnet.cost(model, sizes, what, 0.01, DEVICE) == left < whole
        morphnet.penalty(removed, morphnet.sizes_of(removed, (3, 32, 32)), what, 0.01, DEVICE, 1.0).backward()
        # three norms share the stream's price in the one, two in the other
        assert 3 * paid == pytest.approx(2 * removed.bn1.weight.grad[0].item(), rel=1e-5)
        with torch.no_grad():
            model.layer1[0].bn1.weight.fill_(1)


# ---- which channels are alive

def test_a_stream_lives_and_dies_together(resnet):
    structure = resnet[2]
    assert not [name for name in structure if name.endswith("conv2")]        # ends of branches are the stream's
    model = resnet_factorized.build("resnet18", groups=1)
    norms = ["layer2.0.shortcut.1", "layer2.0.bn2", "layer2.1.bn2"]
    for name in norms:
        set_scales(model, name, [0.0] * 28 + [1.0] * 100)
    assert morphnet.structure_of(model, 0.01)["stream2"] == 100
    set_scales(model, norms[1], [0.02] * 3 + [0.0] * 125)        # one branch alone still holds three channels
    assert morphnet.structure_of(model, 0.01)["stream2"] == 103
    assert morphnet.structure_of(model, 0.01) == resnet[2] | {"stream2": 103}


@pytest.mark.parametrize("groups, alive, width", [(1, 3, 3), (8, 3, 8), (8, 8, 8), (8, 9, 16), (4, 9, 12), (8, 64, 64)])
def test_grouped_widths_are_rounded_up(groups, alive, width):
    model = resnet_factorized.build("resnet18", groups)
    set_scales(model, "layer1.0.bn1", [1.0] * alive + [0.0] * (64 - alive))
    assert morphnet.structure_of(model, 0.01)["layer1.0.conv1"] == width


def test_a_scale_at_the_threshold_is_dead():
    model = Tiny()
    set_scales(model, "bn3", [0.5, 0.5, 0.75, -0.75, 0.25, 1.0])
    assert morphnet.structure_of(model, 0.5) == {"a": 4, "b": 4}            # 3 alive, 2 groups make them


def test_without_ties_the_ends_of_branches_keep_their_width():
    model = models.build("resnet20", shortcut="A")
    structure = morphnet.structure_of(model, 0.01)
    assert set(structure) == {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
    morphnet.penalty(model, morphnet.sizes_of(model, (3, 32, 32)), "macs", 0.01).backward()
    assert model.bn1.weight.grad is None and model.layer1[0].bn2.weight.grad is None


def test_a_bottleneck_that_is_cut_anywhere_is_cut_throughout():
    model = resnet_factorized.build("resnet50", 1)
    with torch.no_grad():
        model.layer1[1].bn2.weight.zero_()
    structure = morphnet.structure_of(model, 0.01)
    assert structure["layer1.1.conv1"] == structure["layer1.1.conv2"] == 0
    assert sum(width == 0 for width in structure.values()) == 2


def test_selectively_added_branches_are_refused():
    model = resnet_factorized.build("resnet18", 1)
    model.layer1[0].conv2 = nn.Conv2d(64, 60, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match="stream0 has branches that are added selectively.*60"):
        morphnet.structure_of(model, 0.01)


# ---- runs that empty or explode

HINT = "threshold 0.01, strength 3, learning rate 0.1"


@pytest.mark.parametrize("norms, name", [
    (["bn1", "layer1.0.bn2", "layer1.1.bn2"], r"stream0 \(conv1, layer1.0.conv2, layer1.1.conv2\)"),
    (["layer4.0.shortcut.1", "layer4.0.bn2", "layer4.1.bn2"], "stream4")])
def test_an_empty_stream_stops_the_run(norms, name):
    model = resnet_factorized.build("resnet18", 8)
    for norm in norms:
        set_scales(model, norm, [0.0] * len(model.get_submodule(norm).weight))
    with pytest.raises(RuntimeError, match=f"no channel of {name}.*threshold, the strength or the learning rate") as no:
        morphnet.structure_of(model, 0.01, HINT)
    assert HINT in str(no.value)


def test_an_empty_layer_outside_blocks_stops_the_run():
    with pytest.raises(RuntimeError, match="no channel of conv .*threshold.*strength.*learning rate"):
        morphnet.structure_of(Plain(), 1e3)


def test_an_empty_network_stops_the_run():
    model = models.build("resnet20", shortcut="A")         # every space is removable
    with pytest.raises(RuntimeError, match="no channel of layer1.0.conv1"):
        morphnet.structure_of(model, 2.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_explosion_stops_the_run(value):
    model = Tiny()
    sizes = morphnet.sizes_of(model, (3, 8, 8))
    set_scales(model, "bn3", [value] + [1.0] * 5)
    for stops in (lambda: morphnet.penalty(model, sizes, "macs", 0.01, hint=HINT),
                  lambda: morphnet.structure_of(model, 0.01, HINT)):
        with pytest.raises(RuntimeError, match=f"r of b is .* in 1 channels.*threshold, the strength.*rate.*{HINT}"):
            stops()
    for loss in (value, torch.tensor(value, requires_grad=True)):
        with pytest.raises(RuntimeError, match=f"threshold, the strength or the learning rate.*{HINT}"):
            morphnet.refuse_explosion(loss, HINT)
    morphnet.refuse_explosion(torch.tensor(1.0, requires_grad=True))
    morphnet.refuse_explosion(1e30)


# ---- training, and the drawing

def train_tiny(strength, what="macs", steps=100):
    """The network after a training on random images, and what it costs with the channels that are alive."""
    torch.manual_seed(0)
    model = Tiny()
    sizes, optimizer = morphnet.sizes_of(model, (3, 8, 8)), torch.optim.SGD(model.parameters(), 0.05, momentum=0.5)
    images, targets = torch.randn(32, 3, 8, 8), torch.randint(5, (32,))
    for _ in range(steps):
        loss = F.cross_entropy(model(images), targets) + strength * morphnet.penalty(model, sizes, what, 0.05)
        morphnet.refuse_explosion(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, morphnet.cost(model, sizes, what, 0.05)


def test_the_penalty_drives_channels_below_the_threshold():
    free, whole = train_tiny(0.0)
    assert morphnet.structure_of(free, 0.05) == {"a": 4, "b": 6}
    pressed, left = train_tiny(3.0)
    spaces = morphnet.spaces_of(pressed)
    a, b = (int((morphnet.importance(pressed, space) > 0.05).sum()) for space in spaces)
    assert a < 4 and a / 4 < b / 6 and left < 0.6 * whole                  # a's channels cost most
    with torch.no_grad():
        for name in spaces[0]["norms"]:
            pressed.get_submodule(name).weight.mul_(1e-3)
    with pytest.raises(RuntimeError, match="no channel of a .*learning rate"):
        morphnet.structure_of(pressed, 0.05)


def test_widths_are_drawn(tmp_path):
    before = {f"layer{k}.0.conv1": 16 * (k + 1) for k in range(20)}
    after = {name: width // 3 for name, width in before.items()} | {"layer3.0.conv1": 0}
    after.pop("layer4.0.conv1")
    morphnet.draw_widths(tmp_path / "widths.png", before, after)
    content = (tmp_path / "widths.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
