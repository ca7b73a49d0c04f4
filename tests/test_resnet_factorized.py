"""Networks: their size, parity with torchvision, and what the channel shuffle does."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_factorized
from resnet_factorized import MovedChannels, build, shuffle_channels, take_channels

GOLDEN = {1: (11_173_962, 555_422_720), 4: (2_805_834, 140_186_624), 8: (1_411_146, 70_980_608)}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("groups", GOLDEN)
def test_resnet18_has_the_golden_parameters_and_macs(groups, shuffle):
    model = build("resnet18", groups, shuffle)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == GOLDEN[groups][0]
    assert counter.get_total_flops() == 2 * GOLDEN[groups][1]


@pytest.mark.parametrize("name", resnet_factorized.NETWORKS)
def test_every_depth_gives_one_row_of_logits_an_image(name):
    model = build(name, num_classes=7)
    layers = [key for key, module in model.named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in key]
    assert len(layers) == int(name.removeprefix("resnet"))
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and bool(torch.isfinite(logits).all())


def test_every_convolution_but_the_stem_is_grouped():
    for name, module in build("resnet50", groups=4).named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.groups == (1 if name == "conv1" else 4), name
            assert module.bias is None


def test_other_sizes_and_channels():
    assert build(in_channels=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("groups", [0, -8, 3, 5, 24, 128])
def test_groups_that_do_not_divide_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups {groups} does not divide.*choose 1, 2, 4, 8"):
        build("resnet18", groups)


@pytest.mark.parametrize("groups", [1, 2, 16, 32, 64])
def test_groups_that_divide_are_built(groups):
    assert build("resnet18", groups).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_unknown_network_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'resnet19'.*resnet18, resnet34, resnet50, resnet101, resnet152"):
        build("resnet19")


# ---- parity

@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dense_network_equals_torchvision_with_the_stem_for_small_images(name):
    import torchvision
    theirs = getattr(torchvision.models, name)(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours = build(name, groups=1)
    renamed = {key.replace("downsample", "shortcut").replace("fc.", "linear."): tensor
               for key, tensor in theirs.state_dict().items()}
    ours.load_state_dict(renamed)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs(images), ours(images)                      # running statistics that are not 0 and 1
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)
    for key, tensor in theirs.state_dict().items():
        own = ours.state_dict()[key.replace("downsample", "shortcut").replace("fc.", "linear.")]
        torch.testing.assert_close(own, tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (12, 3), (12, 4), (6, 1), (6, 6)])
def test_shuffle_equals_torch(channels, groups):
    images = torch.randn(2, channels, 5, 3)
    assert torch.equal(shuffle_channels(images, groups), nn.ChannelShuffle(groups)(images))


def test_shuffle_puts_channel_k_of_group_g_at_its_stated_place():
    images = torch.arange(24.0).view(1, 24, 1, 1)
    shuffled = shuffle_channels(images, 4).flatten()
    for group in range(4):
        for k in range(6):
            assert shuffled[k * 4 + group] == group * 6 + k


# ---- channels that move by a product of matrices

CHANNELS_LAST = torch.channels_last


@pytest.fixture
def products(monkeypatch):
    """The orders that channels were moved in by a product."""
    orders, real = [], MovedChannels.apply
    monkeypatch.setattr(MovedChannels, "apply", lambda images, order, groups: orders.append(order.tolist())
                        or real(images, order, groups))
    return orders


def images_in(dtype, shape, layout=CHANNELS_LAST):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return numbers.contiguous(memory_format=layout).requires_grad_()


def compare(move, shape, expected):
    """Assert that `move` gives bfloat16 images and their gradient the bits of `expected` on the same numbers."""
    ours, theirs = images_in(torch.bfloat16, shape), images_in(torch.bfloat16, shape)
    moved, known = move(ours), expected(theirs)
    gradient = torch.randn(known.shape).bfloat16()
    moved.backward(gradient)
    known.backward(gradient)
    assert moved.dtype == ours.grad.dtype == torch.bfloat16
    assert torch.equal(moved, known) and torch.equal(ours.grad, theirs.grad)
    assert moved.is_contiguous(memory_format=CHANNELS_LAST) and ours.grad.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (12, 3), (12, 4), (6, 1), (6, 6), (48, 8)])
def test_a_shuffle_in_bfloat16_has_the_bits_of_torch(channels, groups, products):
    compare(lambda images: shuffle_channels(images, groups), (3, channels, 5, 3), nn.ChannelShuffle(groups))
    index = torch.arange(channels, dtype=torch.float).view(1, -1, 1, 1)
    assert products == [nn.ChannelShuffle(groups)(index).flatten().long().tolist()]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_channels_taken_in_bfloat16_have_the_bits_of_indexing(data):
    channels = data.draw(st.integers(2, 20))
    order = data.draw(st.permutations(range(channels)))[:data.draw(st.integers(1, channels))]
    order = torch.tensor(order)
    compare(lambda images: take_channels(images, order), (2, channels, 3, 4), lambda images: images[:, order])


def test_other_images_are_moved_by_indexing(products):
    order = torch.tensor([3, 0, 2])
    for dtype, layout in ((torch.float32, CHANNELS_LAST), (torch.bfloat16, torch.contiguous_format)):
        images = images_in(dtype, (2, 4, 3, 3), layout)
        assert torch.equal(take_channels(images, order), images[:, order])
        assert torch.equal(shuffle_channels(images, 2), nn.ChannelShuffle(2)(images))
    with torch.no_grad():
        take_channels(images_in(torch.bfloat16, (2, 4, 3, 3)).detach(), order)
    assert not products


def test_gradients_of_moved_channels_have_gradients():
    images = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([5, 0, 1, 3])
    assert torch.autograd.gradgradcheck(lambda images: MovedChannels.apply(images, order, None), images)
    shuffled = torch.tensor([0, 3, 1, 4, 2, 5])
    assert torch.autograd.gradcheck(lambda images: MovedChannels.apply(images, shuffled, 2), images)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_network_in_bfloat16_trains_as_it_does_with_indexing(narrow, products, monkeypatch):
    torch.manual_seed(0)
    ours = build("resnet18", 8).to(memory_format=CHANNELS_LAST)
    if narrow:
        ours.layer1[0].order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    theirs = copy.deepcopy(ours)

    def gradients(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images_in(torch.float32, (4, 3, 16, 16)).detach()).float().square().sum()
        loss.backward()
        return loss, [parameter.grad for parameter in model.parameters()]

    loss, found = gradients(ours)
    assert len(products) == 8
    monkeypatch.setattr(resnet_factorized, "moves_by_products", lambda images: False)
    known, expected = gradients(theirs)
    assert len(products) == 8 and torch.equal(loss, known)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def changed_groups(shuffle):
    """Which of the 8 groups of the last features change when the first group's input channels do."""
    torch.manual_seed(0)
    model = build("resnet18", 8, shuffle).eval()
    stages = nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4)
    features = torch.rand(1, 64, 16, 16)
    moved = features.clone()
    moved[:, :8] += 1
    with torch.no_grad():
        difference = (stages(moved) != stages(features)).view(8, 64, -1)
    return [group for group in range(8) if bool(difference[group].any())]


def test_a_group_reaches_the_others_only_through_the_shuffle():
    assert changed_groups(shuffle=False) == [0]
    assert changed_groups(shuffle=True) == list(range(8))


def test_dense_network_has_nothing_to_shuffle():
    images = torch.randn(2, 3, 16, 16)
    plain, shuffled = build("resnet18", 1, shuffle=False).eval(), build("resnet18", 1, shuffle=True).eval()
    shuffled.load_state_dict(plain.state_dict())
    assert torch.equal(plain(images), shuffled(images))


# ---- initial weights

def test_convolutions_start_with_he_variance_by_group():
    torch.manual_seed(0)
    for name, module in build("resnet18", groups=8).named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * module.kernel_size[0] ** 2
            deviation = module.weight.std().item() / (2 / fan_out) ** 0.5
            assert abs(deviation - 1) < 5 / (2 * module.weight.numel()) ** 0.5, name


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in build().parameters()])
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
