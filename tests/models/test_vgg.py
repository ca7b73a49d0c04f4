"""The dense network made for accuracy per operation: its stem, its form, its channels."""
import pytest
import torch
from sample_runs import start_training
from samples import images_of, lively

import models
import train
from engine import checkpoint, operations, shrinking
from models import vgg

DEEP, FLAT = "vgg9-6-8-10", "vgg6-6-8-10"


@pytest.mark.parametrize(("name", "parameters", "macs"), [("vgg6-64-256-256", 1_972_802, 118_147_360),
                                                          ("vgg9-128-512-512", 12_721_218, 615_201_056)])
def test_size(name, parameters, macs):
    """By hand: stem 24 (3 4 + 1); 31, 15, 7 pixels a side; nine weights a channel pair."""
    model = models.build(name, activation="gelu")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert operations.macs_of(model, (3, 32, 32)) == macs


@pytest.mark.parametrize("name", ["vgg6-8-8", "vgg6-0-8-8", "vgg12-8-8-8", "vgg-8-8-8", "vgg6-8-8-8-8"])
def test_other_names_are_refused(name):
    assert vgg.family(name) is None
    with pytest.raises(ValueError, match="no network is called"):
        models.build(name)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem_whitens_patches(channels):
    """Every filter's output has variance 1 over the images, and no two of different directions are correlated."""
    images = torch.randn(200, channels, 10, 10, generator=torch.Generator().manual_seed(0))
    images = images + images.roll(1, 3) + images.roll(1, 2)                    # neighbours are alike
    model = models.build(FLAT, in_channels=channels)
    model.whiten(images)
    half = 4 * channels
    output = model.conv1(images).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(output[:half], -output[half:])
    moments = output[:half] @ output[:half].T / output.shape[1]
    torch.testing.assert_close(moments, torch.eye(half), rtol=0, atol=0.02)


def test_filters_begin_by_handing_their_inputs_on():
    stage = models.build(FLAT).layer2
    images = images_of(8, channels=6)
    torch.testing.assert_close(stage.conv1(images)[:, :6], images)


def test_a_run_whitens_the_stem_and_never_trains_it(tmp_path):
    run = start_training(tmp_path / "a", "--model", FLAT, "--optimizer", "muon", "--epochs", "1")
    before = run.model.conv1.weight.clone()
    expected = models.build(FLAT)
    expected.whiten(torch.cat([images for images, _ in run.calibration]))
    assert torch.equal(before, expected.conv1.weight)
    train.fit(run)
    assert torch.equal(run.model.conv1.weight, before)
    assert run.model.conv1.bias.any()


@pytest.mark.parametrize("name", [DEEP, FLAT])
def test_it_takes_images_of_other_sizes(name):
    model = models.build(name, num_classes=7).eval()
    assert model(images_of(20)).shape == (3, 7)


@pytest.mark.parametrize("name", [DEEP, FLAT])
def test_removed_channels_leave_what_zeros_would(name):
    """Behind its norm a channel is held at zero; without it the logits are the same."""
    for place in range(len(models.build(name).channels())):
        torch.manual_seed(place)
        model = lively(models.build(name, activation="gelu"))
        space = model.channels()[place]
        gone = torch.tensor([1, 4])
        with torch.no_grad():
            for layer in space["norms"] or space["makers"]:
                model.get_submodule(layer).weight[gone] = 0
                model.get_submodule(layer).bias[gone] = 0
            images = images_of(16, dtype=torch.float64)
            expected = model(images)
            width = len(model.get_submodule(space["makers"][0]).weight)
            keep = torch.tensor([channel for channel in range(width) if channel not in gone])
            shrinking.remove(model, space, keep)
            torch.testing.assert_close(model(images), expected)


def test_a_shrunk_network_comes_back_from_its_file_with_what_is_frozen(tmp_path):
    model = models.build(DEEP)
    for space in model.channels():
        width = len(model.get_submodule(space["makers"][0]).weight)
        shrinking.remove(model, space, torch.arange(width - 2))
    architecture = {"name": DEEP}
    checkpoint.save(tmp_path / "a.pt", checkpoint.network_of(model, architecture))
    other = models.build(DEEP)
    checkpoint.load_weights(other, architecture, checkpoint.read(tmp_path / "a.pt"))
    images = images_of(16)
    assert torch.equal(other.eval()(images), model.eval()(images))
    assert ([parameter.requires_grad for parameter in other.parameters()]
            == [parameter.requires_grad for parameter in model.parameters()])
    assert other.layer1.bn1.momentum == model.layer1.bn1.momentum
