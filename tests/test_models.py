"""Small networks: their size, parity with hand-built ones, initial weights, files."""
import pytest
import torch
from samples import images_of, layers_of, lively, small
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from engine import checkpoint
from models import BasicBlock, WideBlock, arguments_of, build

GOLDEN = [      # name, arguments, (channels, size) of an image, parameters, MACs
    ("lenet5", {"in_channels": 1, "size": 28}, (1, 28), 61_706, 416_520),
    ("lenet5", {"in_channels": 1}, (1, 32), 61_706, 416_520),
    ("lenet5-student", {"in_channels": 1, "size": 28}, (1, 28), 11_246, 129_300),
    ("cifar-quick", {}, (3, 32), 145_578, 12_354_176),
    ("mobilenet", {}, (3, 32), 3_217_226, 46_354_432),
    ("resnet20", {"shortcut": "A"}, (3, 32), 269_722, 40_551_040),
    ("resnet32", {"shortcut": "A"}, (3, 32), 464_154, 68_862_592),
    ("resnet44", {"shortcut": "A"}, (3, 32), 658_586, 97_174_144),
    ("resnet56", {"shortcut": "A"}, (3, 32), 853_018, 125_485_696),
    ("resnet56", {"shortcut": "B"}, (3, 32), 855_770, 125_747_840),
    ("resnet110", {"shortcut": "A"}, (3, 32), 1_727_962, 252_887_680),
    ("resnet20-14-28-56", {}, (3, 32), 208_904, 31_296_048),
    ("wrn-16-4", {}, (3, 32), 2_748_890, 392_612_352),
    ("wrn-28-10", {}, (3, 32), 36_479_194, 5_243_328_768),
]


# ---- size

@pytest.mark.parametrize(("name", "arguments", "shape", "parameters", "macs"), GOLDEN)
def test_network_has_the_golden_parameters_and_macs(name, arguments, shape, parameters, macs):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = build(name, **arguments).eval()
        model(torch.zeros(1, shape[0], shape[1], shape[1]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", models.NETWORKS)
def test_logits_for_other_classes_and_channels(name):
    for classes, channels in ((10, 1), (100, 3)):
        with torch.device("meta"):
            logits = build(name, classes, channels).eval()(torch.zeros(2, channels, 32, 32))
        assert logits.shape == (2, classes)


@pytest.mark.parametrize("name", ["resnet20", "resnet110", "wrn-16-4", "wrn-28-10"])
def test_depth_is_that_of_the_name(name):
    with torch.device("meta"):
        layers = list(layers_of(build(name)))
    if name.startswith("wrn"):      # the paper counts the convolutions, with those of the three shortcuts
        assert len(layers) - 1 == int(name.split("-")[1])
    else:                           # convolutions without the two shortcuts', and the linear layer
        assert len(layers) - 2 == int(name.removeprefix("resnet"))


@small
def test_every_parameter_gets_a_finite_gradient_of_its_own(name, arguments, side):
    model = build(name, **arguments)
    nn.functional.cross_entropy(model(images_of(side)), torch.tensor([1, 2, 3])).backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) > len(list(model.parameters())) / 2
    for key, parameter in trained.items():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key
        assert bool(parameter.grad.any()), key


# ---- arguments

@pytest.mark.parametrize("name", ["resnet19", "resnet26", "resnet20-14-28", "resnet21-14-28-56", "resnet20-14-28-0",
                                  "resnet20-14-32-28", "resnet2-14-28-56", "wrn-15-4", "wrn-4-2", "wrn-16-0",
                                  "wrn-16", "wrn-16-4-2", "wrn-16-4\n", ""])
def test_unknown_network_is_refused_with_the_choices(name):
    for function in (build, arguments_of):
        with pytest.raises(ValueError, match=r"no network is called.*lenet5, .*resnet110, wrn-16-4, .*d = 10, 16, 22"
                                             r".*a <= b <= c by stage"):
            function(name)


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("lenet5", {"size": 33}, "takes no size 33; choose from 32, 28"),
    ("lenet5", {"activation": "swish"}, "takes no activation 'swish'; choose from relu, leaky_relu"),
    ("cifar-quick", {"pooling": "median"}, "takes no pooling 'median'; choose from max, average"),
    ("resnet20", {"shortcut": "C"}, "takes no shortcut 'C'; choose from B, A"),
    ("cifar-quick", {"size": 28}, "has no size to choose, only activation and pooling; size was 28"),
    ("lenet5-student", {"shortcut": "A"}, "has no shortcut to choose"),
    ("wrn-16-4", {"shortcut": "A"}, "has no shortcut to choose, only activation"),
    ("mobilenet", {"pooling": "average"}, "has no pooling to choose"),
])
def test_argument_that_does_not_fit_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        build(name, **arguments)


@pytest.mark.parametrize("name", [*models.NETWORKS, "wrn-22-3", "resnet14-4-4-9"])
def test_arguments_of_a_network_are_those_that_change_it(name):
    others = {"size": 28, "activation": "tanh", "pooling": "average", "shortcut": "A"}
    with torch.device("meta"):
        plain = build(name)
        for argument, value in others.items():
            if argument in arguments_of(name):
                changed = build(name, **{argument: value})
                assert repr(changed) != repr(plain) or list(changed.state_dict()) != list(plain.state_dict())
            else:
                with pytest.raises(ValueError, match=f"has no {argument}"):
                    build(name, **{argument: value})


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_activation_is_the_only_one_in_the_network(activation):
    kinds = tuple(models.ACTIVATIONS.values())
    for name in ("lenet5", "cifar-quick", "mobilenet", "resnet20", "wrn-10-1"):
        with torch.device("meta"):
            found = {type(module) for module in build(name, activation=activation).modules()
                     if isinstance(module, kinds)}
        assert found == {models.ACTIVATIONS[activation]}, name


def test_choosing_among_max_and_average_pooling_changes_the_output():
    largest, mean = build("lenet5").eval(), build("lenet5", pooling="average").eval()
    mean.load_state_dict(largest.state_dict())
    assert not torch.allclose(largest(images_of(32)), mean(images_of(32)))


# ---- parity

def test_lenet5_equals_a_sequence():
    model = build("lenet5", in_channels=1, size=28, activation="tanh", pooling="average")
    layers = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
              nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
              nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)]
    sequence = nn.Sequential(*layers)
    sequence.load_state_dict(dict(zip(sequence.state_dict(), model.state_dict().values(), strict=True)))
    images = images_of(28, channels=1)
    torch.testing.assert_close(model(images), sequence(images))


@pytest.mark.parametrize(("inputs", "width", "stride"), [(16, 16, 1), (16, 32, 2)])
def test_basic_block_equals_torchvision(inputs, width, stride):
    from torchvision.models.resnet import BasicBlock as Theirs
    downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    theirs = lively(Theirs(inputs, width, stride, downsample if stride > 1 else None))
    ours = BasicBlock(inputs, width, stride, "relu", "B").double().eval()
    ours.load_state_dict({key.replace("downsample", "shortcut"): tensor for key, tensor in theirs.state_dict().items()})
    images = images_of(7, channels=inputs, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(("inputs", "width", "stride"), [(16, 16, 1), (16, 32, 2), (16, 32, 1)])
def test_wide_block_equals_its_formula(inputs, width, stride):
    block = lively(WideBlock(inputs, width, stride, "relu"))
    images = images_of(7, channels=inputs, dtype=torch.float64)
    first = block.bn1(images).clamp_min(0)
    second = block.bn2(nn.functional.conv2d(first, block.conv1.weight, stride=stride, padding=1)).clamp_min(0)
    branch = nn.functional.conv2d(second, block.conv2.weight, padding=1)
    kept = stride == 1 and inputs == width
    shortcut = images if kept else nn.functional.conv2d(first, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(images), branch + shortcut)


@pytest.mark.parametrize("side", [8, 7])
def test_shortcut_a_equals_a_pad_by_hand(side):
    images = images_of(side, channels=16)
    padded = torch.zeros(3, 32, 4, 4)
    padded[:, :16] = images[:, :, ::2, ::2]
    block = BasicBlock(16, 32, 2, "relu", "A").eval()
    assert torch.equal(block.shortcut(images), padded) and not list(block.shortcut.parameters())
    branch = block.bn2(block.conv2(block.bn1(block.conv1(images)).relu()))
    torch.testing.assert_close(block(images), (padded + branch).relu())


# ---- initial weights

@pytest.mark.parametrize("name", ["mobilenet", "resnet20", "wrn-10-2"])
def test_convolutions_start_with_he_variance_by_group(name):
    for key, module in layers_of(build(name), nn.Conv2d).items():
        fan_out = module.out_channels // module.groups * module.kernel_size[0] ** 2
        deviation = module.weight.std().item() / (2 / fan_out) ** 0.5
        assert abs(deviation - 1) < 5 / (2 * module.weight.numel()) ** 0.5, key
        assert module.bias is None


def test_lenet_starts_as_torch_does_and_the_seed_decides():
    def weights(make, seed):
        torch.manual_seed(seed)
        return make().weight
    ours = [weights(lambda: build("lenet5").conv1, seed) for seed in (1, 1, 2)]
    assert torch.equal(ours[0], weights(lambda: nn.Conv2d(3, 6, 5), 1))
    assert torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], ours[2])


# ---- files

@small
def test_weights_come_back_from_a_checkpoint(name, arguments, side):
    saved, architecture = lively(build(name, **arguments)).float(), {"model": name, **arguments}
    fresh = build(name, **arguments).eval()
    checkpoint.load_weights(fresh, architecture, checkpoint.network_of(saved, architecture))
    assert torch.equal(fresh(images_of(side)), saved(images_of(side)))
    with pytest.raises(ValueError, match="the checkpoint is of"):
        checkpoint.load_weights(build("wrn-22-1"), {"model": "wrn-22-1"}, checkpoint.network_of(saved, architecture))
