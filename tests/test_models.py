"""Small networks: their size, parity with hand-built ones, and that channels can leave without a trace."""
from collections import Counter
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import models
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
SMALL = [       # name, arguments, side of an image that is quick to compute
    ("lenet5", {"size": 28}, 28), ("lenet5", {"pooling": "average"}, 32), ("lenet5-student", {}, 32),
    ("cifar-quick", {}, 32), ("mobilenet", {}, 16), ("resnet20", {"shortcut": "A"}, 8), ("resnet20", {}, 8),
    ("resnet8-6-6-9", {}, 8), ("resnet8-4-6-9", {"shortcut": "A"}, 8),
    ("wrn-10-1", {}, 8), ("wrn-10-2", {}, 8), ("wrn-16-1", {}, 8),
]
small = pytest.mark.parametrize(("name", "arguments", "side"), SMALL)
residual = pytest.mark.parametrize(("name", "arguments", "side"), [each for each in SMALL if each[0][0] in "rw"])


def images_of(side, count=3, channels=3, dtype=torch.float32):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def lively(model):
    """The model in evaluation, double precision, with random batch norms, so that no scale is 1 and no shift 0."""
    with torch.no_grad():
        for module in model.double().eval().modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.5)
    return model


def layers_of(model, kinds=(nn.Conv2d, nn.Linear)):
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def blocks_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, (BasicBlock, WideBlock))}


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
    for key, parameter in model.named_parameters():
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


# ---- selective addition and removed branches

@residual
def test_positions_of_all_channels_in_order_change_nothing(name, arguments, side):
    model, images = lively(build(name, **arguments)), images_of(side, dtype=torch.float64)
    expected = model(images)
    for block in blocks_of(model).values():
        block.positions = torch.arange(block.conv2.out_channels)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("block", [BasicBlock(16, 32, 2, "relu", "A"), BasicBlock(16, 16, 1, "relu", "B"),
                                   BasicBlock(16, 32, 2, "relu", "B"), WideBlock(16, 16, 1, "relu"),
                                   WideBlock(16, 32, 2, "relu")], ids=lambda block: repr(type(block.shortcut)))
def test_branch_is_added_at_its_positions_and_removed_as_a_whole(block):
    block, images = lively(deepcopy(block)), images_of(8, channels=16, dtype=torch.float64)
    last = (lambda sums: sums.relu()) if isinstance(block, BasicBlock) else (lambda sums: sums)
    wide = isinstance(block, WideBlock) and block.shortcut is not None
    shortcut = block.bn1(images).relu() if wide else images
    shortcut = block.shortcut(shortcut) if block.shortcut is not None else shortcut
    branch = block.bn2 if isinstance(block, BasicBlock) else block.conv2
    seen = []
    handle = branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
    block(images)
    handle.remove()
    positions = torch.randperm(shortcut.shape[1])
    expected = shortcut.clone()
    for k, position in enumerate(positions.tolist()):
        expected[:, position] += seen[0][:, k]
    block.positions = positions
    torch.testing.assert_close(block(images), last(expected))
    block.remove_branch()
    torch.testing.assert_close(block(images), last(shortcut))
    kept = {key.split(".")[0] for key in block.state_dict()}
    assert kept <= {"shortcut", "bn1"} and ("bn1" in kept) == wide


@residual
def test_network_without_branches_still_trains_and_names_its_channels(name, arguments, side):
    model = build(name, **arguments)
    removed = list(blocks_of(model))[1:]
    for block in removed:
        model.get_submodule(block).remove_branch()
    model(images_of(side)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    existing = set(dict(model.named_modules()))
    spaces = model.channels()
    assert sum(space["branch"] is not None for space in spaces) == 1
    assert {layer for space in spaces for layer in layers_named(space)} <= existing
    assert len({space["name"] for space in spaces}) == len(spaces)
    compare_masked_and_sliced(lively(model), images_of(side, dtype=torch.float64), seed=0)


def test_positions_hold_under_autocast():
    block = BasicBlock(16, 16, 1, "relu", "B").eval()
    block.positions = torch.arange(16)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(block(images_of(8, channels=16))).all())


# ---- channels: what is named

def layers_named(space):
    return space["makers"] + space["norms"] + space["depthwise"] + space["readers"]


@small
def test_every_layer_is_named_once_in_each_role(name, arguments, side):
    model = build(name, **arguments)
    spaces, untied = model.channels(), arguments.get("shortcut") == "A"
    counted = [space for space in spaces if untied or space["branch"] is None]
    found = {role: Counter(layer for space in counted for layer in space[role])
             for role in ("makers", "norms", "depthwise", "readers")}
    layers = layers_of(model)
    classifier = list(layers)[-1]
    depthwise = {key for key, module in layers.items() if getattr(module, "groups", 1) > 1}
    expected = {"depthwise": depthwise, "makers": set(layers) - depthwise - {classifier},
                "readers": set(layers) - depthwise - {"conv1"}, "norms": set(layers_of(model, nn.BatchNorm2d))}
    if untied:      # nothing shrinks the streams: neither the stem, nor what reads them
        expected["makers"] -= {"conv1"}
        expected["norms"] -= {"bn1"}
        expected["readers"] = {key for key in layers if key.endswith("conv2")}
    assert found == {role: Counter(names) for role, names in expected.items()}


@small
def test_widths_of_a_space_agree(name, arguments, side):
    model = build(name, **arguments)
    for space in model.channels():
        assert list(space) == ["name", "makers", "norms", "depthwise", "readers", "unfold", "shuffled", "branch"]
        widths = {len(model.get_submodule(maker).weight) for maker in space["makers"]}
        widths |= {model.get_submodule(norm).num_features for norm in space["norms"]}
        for layer in map(model.get_submodule, space["depthwise"]):
            widths |= {layer.in_channels, layer.out_channels, layer.groups}
        for layer in map(model.get_submodule, space["readers"]):
            inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
            widths.add(inputs / space["unfold"])
        assert len(widths) == 1, space
        assert space["name"] == space["makers"][0] or len(space["makers"]) > 1
        assert space["shuffled"] is None and (space["branch"] is None or not space["readers"])


@residual
def test_spaces_of_a_residual_network(name, arguments, side):
    model = build(name, **arguments)
    spaces = model.channels()
    assert len({space["name"] for space in spaces}) == len(spaces)
    assert [space["branch"] for space in spaces if space["branch"]] == list(blocks_of(model))
    streams = [space["name"] for space in spaces if len(space["makers"]) > 1]
    assert streams == ([] if arguments.get("shortcut") == "A" else ["stream1", "stream2", "stream3"])
    assert ("conv1" in [space["name"] for space in spaces]) == (name == "wrn-10-2")     # before stage 1


def test_unfold_is_the_area_that_is_flattened():
    unfolds = {name: [space["unfold"] for space in build(name).channels()] for name in models.PLAIN}
    assert unfolds == {"lenet5": [1, 25, 1, 1], "lenet5-student": [1, 25, 1], "cifar-quick": [1, 1, 16, 1]}


# ---- channels: they can leave

@torch.no_grad()
def mask(model, space, gone):
    """Zero the channels `gone`: behind batch norm; at the filters too where there is none, or it follows the sum."""
    filters = not space["norms"] or isinstance(model, models.WideResNet)
    for layer in map(model.get_submodule, space["norms"] + space["makers"] * filters):
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0


def cut(model, space, keep):
    """Keep the channels `keep` alone: slices of the tensors, and the attributes that name widths."""
    for layer in map(model.get_submodule, space["makers"] + space["norms"] + space["depthwise"]):
        for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.dim():
                getattr(layer, key).data = tensor.data[keep]
    for layer in map(model.get_submodule, space["readers"]):
        columns = (keep[:, None] * space["unfold"] + torch.arange(space["unfold"])).flatten()
        layer.weight.data = layer.weight.data[:, columns]
    for layer in map(model.get_submodule, layers_named(space)):
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_features = len(layer.weight)
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        else:
            layer.groups = len(layer.weight) if layer.groups > 1 else 1
            layer.out_channels, layer.in_channels = len(layer.weight), layer.groups * layer.weight.shape[1]
    if space["branch"]:
        model.get_submodule(space["branch"]).positions = keep


def drawn(model, space, generator):
    """A random set of channels that stay, at least one, and those that go, at least half: not all of them are dead."""
    width = len(model.get_submodule(space["makers"][0]).weight)
    order = torch.randperm(width, generator=generator)
    count = int(torch.randint(1, width // 2 + 1, (), generator=generator))
    return order[:count].sort().values, order[count:]


@torch.no_grad()
def compare_masked_and_sliced(model, images, seed, branches=False):
    """Space by space, then all together: the same outputs, which are not the whole network's."""
    generator, original = torch.Generator().manual_seed(seed), model(images)
    all_masked, all_sliced = deepcopy(model), deepcopy(model)
    for space in model.channels():
        if bool(space["branch"]) != branches:
            continue
        keep, gone = drawn(model, space, generator)
        mask(all_masked, space, gone)
        cut(all_sliced, space, keep)
        masked, sliced = deepcopy(model), deepcopy(model)
        mask(masked, space, gone)
        cut(sliced, space, keep)
        expected = masked(images)
        torch.testing.assert_close(sliced(images), expected, rtol=1e-8, atol=1e-8, msg=lambda text, space=space:
                                   f"{space['name']}: {text}")
        assert not torch.allclose(expected, original), f"{space['name']} changes nothing"
    torch.testing.assert_close(all_sliced(images), all_masked(images), rtol=1e-8, atol=1e-8)
    return all_sliced


@small
def test_masked_equals_sliced(name, arguments, side):
    model, images = lively(build(name, **arguments)), images_of(side, dtype=torch.float64)

    @settings(max_examples=1 if name == "mobilenet" else 3, deadline=None)
    @given(st.integers(0, 2**31))
    def check(seed):
        sliced = compare_masked_and_sliced(model, images, seed)
        sliced.train()(images).sum().backward()
        assert all(parameter.grad is not None for parameter in sliced.parameters())
    check()


@residual
def test_masked_equals_sliced_at_the_ends_of_branches(name, arguments, side):
    compare_masked_and_sliced(lively(build(name, **arguments)), images_of(side, dtype=torch.float64), 0, branches=True)


# ---- files

@small
def test_weights_come_back_from_a_checkpoint(name, arguments, side):
    saved, architecture = lively(build(name, **arguments)).float(), {"model": name, **arguments}
    fresh = build(name, **arguments).eval()
    checkpoint.load_weights(fresh, architecture, checkpoint.network_of(saved, architecture))
    assert torch.equal(fresh(images_of(side)), saved(images_of(side)))
    with pytest.raises(ValueError, match="the checkpoint is of"):
        checkpoint.load_weights(build("wrn-22-1"), {"model": "wrn-22-1"}, checkpoint.network_of(saved, architecture))


@small
def test_sliced_weights_come_back_from_a_checkpoint(name, arguments, side):
    saved, architecture = lively(build(name, **arguments)).float(), {"model": name, **arguments}
    generator = torch.Generator().manual_seed(0)
    for space in saved.channels():      # a stream cannot shrink below a branch with positions
        if space["branch"] or not space["name"].startswith("stream"):
            cut(saved, space, drawn(saved, space, generator)[0])
    for block in list(blocks_of(saved))[1:2]:
        saved.get_submodule(block).remove_branch()
    fresh = build(name, **arguments).eval()
    checkpoint.load_weights(fresh, architecture, checkpoint.network_of(saved, architecture))
    assert torch.equal(fresh(images_of(side)), saved(images_of(side)))
