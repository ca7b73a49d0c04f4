"""Batches: how a data set is split, and what training and evaluation see of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import SMALL, assert_same, random_data

import cifar10
import experiment
import train

# ---- the split

def numbered(count):
    """A data set of `count` images, each of one pixel."""
    images, labels = np.zeros((count, 1, 1, 1), np.uint8), np.zeros(count, np.int64)
    return cifar10.Data(images, labels, images[:0], labels[:0])


def test_split_is_disjoint_complete_and_of_the_stated_sizes():
    train, validation = cifar10.split(numbered(50_000))
    assert (len(train), len(validation)) == (45_000, 5_000)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(50_000))


def test_split_is_fixed():
    train, validation = cifar10.split(numbered(50_000))
    assert list(train[:5]) == [11841, 19602, 45519, 25747, 42642] and list(train[-2:]) == [31686, 46467]
    assert list(validation[:5]) == [43726, 16118, 49381, 35715, 14489] and list(validation[-2:]) == [43567, 2732]


def test_split_does_not_depend_on_the_global_generators():
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = cifar10.split(numbered(500))
    np.random.seed(6)
    second = cifar10.split(numbered(500))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))
    np.random.seed(5)
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize("limit", [2, 64, 5_000, 10_000])
def test_limit_shortens_the_split_and_does_not_move_it(limit):
    whole, limited = cifar10.split(numbered(50_000)), cifar10.split(numbered(50_000), limit=limit)
    for full, part in zip(whole, limited, strict=True):
        assert len(part) == min(limit, len(full))
        np.testing.assert_array_equal(part, full[:limit])


# ---- batches

def pixels_of(images, kind):
    """Normalised images (N, C, H, W) as uint8 (N, H, W, C); every value must be a whole number of 0 to 255."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (kind.mean, kind.std))
    pixels = (images * std + mean) * 255
    assert (pixels - pixels.round()).abs().max() < 1e-3
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def crops_of(image, pad=4, mirror=True):
    """{bytes: (row, column, mirrored)} of every crop of one reflect-padded image (H, W, C)."""
    height, width, _ = image.shape
    planar = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    padded = F.pad(planar, (pad,) * 4, mode="reflect")[0].permute(1, 2, 0).to(torch.uint8).numpy()
    crops = {}
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[row:row + height, column:column + width]
            for mirrored in (False, True)[:1 + mirror]:
                crops[(crop[:, ::-1] if mirrored else crop).tobytes()] = row, column, mirrored
    return crops


def test_every_training_sample_is_a_crop_or_mirror_of_its_own_image():
    images = random_data(SMALL).x_train
    batches = cifar10.Batches(images, np.arange(40), 8, SMALL, generator=torch.Generator().manual_seed(0))
    crops = [crops_of(image) for image in images]
    assert all(len(own) == 9 * 9 * 2 for own in crops)
    for _ in range(3):
        for normalised, labels in batches:
            for sample, label in zip(pixels_of(normalised, SMALL), labels, strict=True):
                assert sample.tobytes() in crops[label]


@pytest.mark.parametrize("flip", [True, False])
def test_every_crop_and_mirror_comes_equally_often(flip):
    kind = SMALL._replace(flip=flip)
    image = random_data(SMALL).x_train[0]
    crops, images = crops_of(image, mirror=flip), np.repeat(image[None], 1000, 0)
    batches = cifar10.Batches(images, np.zeros(1000, np.int64), 1000, kind, generator=torch.Generator().manual_seed(0))
    counts = dict.fromkeys(crops.values(), 0)
    epochs = 16 if flip else 8
    for _ in range(epochs):
        for normalised, _ in batches:
            for sample in pixels_of(normalised, kind):
                counts[crops[sample.tobytes()]] += 1
    expected = 1000 * epochs / len(crops)
    assert len(counts) == 81 * (1 + flip)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_samples_of_one_batch_get_draws_of_their_own():
    image = random_data(SMALL).x_train[0]
    batches = cifar10.Batches(np.repeat(image[None], 64, 0), np.zeros(64, np.int64), 64, SMALL,
                              generator=torch.Generator().manual_seed(0))
    (normalised, _), = batches
    crops = crops_of(image)
    drawn = [crops[sample.tobytes()] for sample in pixels_of(normalised, SMALL)]
    rows, columns, mirrored = zip(*drawn, strict=True)
    assert len(set(drawn)) > 40
    assert len(set(rows)) == len(set(columns)) == 9 and len(set(mirrored)) == 2
    assert len(set(zip(rows, columns, strict=True))) > 30        # the two axes are not tied to each other


@pytest.mark.parametrize("dataset", ["mnist", "digits"])
def test_digits_are_never_mirrored(dataset):
    kind = cifar10.KINDS[dataset]
    images = np.random.default_rng(0).integers(0, 256, (16, *kind.shape), dtype=np.uint8)
    batches = cifar10.Batches(images, np.arange(16), 16, kind, generator=torch.Generator().manual_seed(0))
    crops = [crops_of(image, mirror=False) for image in images]
    for _ in range(4):
        for normalised, labels in batches:
            for sample, label in zip(pixels_of(normalised, kind), labels, strict=True):
                assert sample.tobytes() in crops[label]


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_pad_bounds_the_shift(pad):
    kind, images = SMALL._replace(flip=False), random_data(SMALL).x_train
    batches = cifar10.Batches(images, np.arange(40), 40, kind, generator=torch.Generator().manual_seed(0), pad=pad)
    (normalised, labels), = batches
    samples = pixels_of(normalised, kind)
    assert all(sample.tobytes() in crops_of(images[label], pad, mirror=False)
               for sample, label in zip(samples, labels, strict=True))


def test_evaluation_yields_every_image_once_in_order_with_the_incomplete_batch():
    data = random_data(SMALL)
    batches = cifar10.Batches(data.x_train, data.y_train, 16, SMALL)
    parts = list(batches)
    assert [len(labels) for _, labels in parts] == [16, 16, 8] and len(batches) == 3
    np.testing.assert_array_equal(np.concatenate([pixels_of(images, SMALL) for images, _ in parts]), data.x_train)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in parts]), data.y_train)


def test_evaluation_of_fewer_images_than_a_batch_yields_them_all():
    data = random_data(SMALL)
    (images, labels), = cifar10.Batches(data.x_test, data.y_test, 500, SMALL)
    assert images.shape == (8, 3, 12, 11) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_training_shuffles_and_drops_the_incomplete_batch():
    images = random_data(SMALL).x_train
    batches = cifar10.Batches(images, np.arange(40), 16, SMALL, generator=torch.Generator().manual_seed(0))
    first, second = ([labels for _, labels in batches] for _ in range(2))
    assert [len(labels) for labels in first] == [16, 16] and len(batches) == 2
    assert len(set(torch.cat(first).tolist())) == 32            # no image twice
    assert torch.cat(first).tolist() != sorted(torch.cat(first).tolist())
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_chosen_images_alone_take_part():
    data, chosen = random_data(SMALL), np.array([30, 2, 17, 5, 39])
    (images, labels), = cifar10.Batches(data.x_train, np.arange(40), 8, SMALL, chosen=chosen)
    assert labels.tolist() == chosen.tolist()
    np.testing.assert_array_equal(pixels_of(images, SMALL), data.x_train[chosen])
    generator = torch.Generator().manual_seed(0)
    training = cifar10.Batches(data.x_train, np.arange(40), 5, SMALL, generator=generator, chosen=chosen)
    (_, labels), = training
    assert sorted(labels.tolist()) == sorted(chosen.tolist()) and len(training) == 1


def test_same_generator_state_gives_the_same_epoch():
    data, generator = random_data(SMALL), torch.Generator().manual_seed(0)
    batches = cifar10.Batches(data.x_train, np.arange(40), 16, SMALL, generator=generator)
    list(batches)
    state, outer = generator.get_state(), torch.get_rng_state()
    first = list(batches)
    generator.set_state(state)
    second = list(batches)
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, second, strict=True))
    assert torch.equal(outer, torch.get_rng_state())


@pytest.mark.parametrize("dataset", ["cifar10", "mnist", "digits"])
def test_normalisation_is_that_of_torchvision(dataset):
    from torchvision.transforms import v2
    kind = cifar10.KINDS[dataset]
    images = np.random.default_rng(0).integers(0, 256, (5, *kind.shape), dtype=np.uint8)
    (found, _), = cifar10.Batches(images, np.zeros(5, np.int64), 5, kind)
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(kind.mean, kind.std)])
    expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dataset", ["cifar10", "mnist"])
@pytest.mark.parametrize("shuffled", [True, False])
def test_images_lie_by_pixel_in_memory_without_a_copy_for_it(dataset, shuffled):
    kind = cifar10.KINDS[dataset]
    images = np.random.default_rng(0).integers(0, 256, (6, *kind.shape), dtype=np.uint8)
    generator = torch.Generator().manual_seed(0) if shuffled else None
    (found, _), = cifar10.Batches(images, np.zeros(6, np.int64), 6, kind, generator=generator)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.stride(1) == 1


def test_callers_arrays_are_not_written():
    data = random_data(SMALL)
    kept = random_data(SMALL)
    for generator in (None, torch.Generator().manual_seed(0)):
        for images, _ in cifar10.Batches(data.x_train, data.y_train, 16, SMALL, generator=generator):
            images.zero_()
    assert_same(data, kept)


def test_batches_that_cannot_be_filled_are_refused():
    data, generator = random_data(SMALL), torch.Generator()
    with pytest.raises(ValueError, match="batch size 41 is larger than the 40 .* at most 40"):
        cifar10.Batches(data.x_train, data.y_train, 41, SMALL, generator=generator)
    with pytest.raises(ValueError, match="at most 3"):
        cifar10.Batches(data.x_train, data.y_train, 4, SMALL, generator=generator, chosen=np.arange(3))
    with pytest.raises(ValueError, match="batch size 0"):
        cifar10.Batches(data.x_train, data.y_train, 0, SMALL)


# ---- DataLoaders

@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_loaders_give_the_same_splits_and_pixels(dataset):
    kind = cifar10.KINDS[dataset]
    data = random_data(kind._replace(counts=(300, 25)))
    _, validation, test = cifar10.loaders(data, dataset, batch_size=8)
    chosen = cifar10.split(data)[1]
    ours = list(cifar10.Batches(data.x_train, data.y_train, 8, kind, chosen=chosen))
    ours_test = list(cifar10.Batches(data.x_test, data.y_test, 8, kind))
    for theirs, expected in ((validation, ours), (test, ours_test)):
        assert len(theirs) == len(expected) == 4
        for (images, labels), (our_images, our_labels) in zip(theirs, expected, strict=True):
            torch.testing.assert_close(images, our_images, rtol=0, atol=2e-6)
            assert torch.equal(labels, our_labels)


def test_training_loader_crops_mirrors_shuffles_and_drops():
    kind = cifar10.KINDS["cifar10"]
    data = random_data(kind._replace(counts=(24, 2)))._replace(y_train=np.arange(24))
    torch.manual_seed(0)
    train, validation, test = cifar10.loaders(data, "cifar10", batch_size=8, limit=20)
    batches = list(train)
    chosen = cifar10.split(data, limit=20)[0]
    assert len(batches) == 2 and len(validation) == len(test) == 1
    seen = torch.cat([labels for _, labels in batches]).tolist()
    assert len(set(seen)) == 16 and set(seen) <= set(chosen.tolist()) and seen != chosen[:16].tolist()
    for images, labels in batches:
        for sample, label in zip(pixels_of(images, kind), labels, strict=True):
            assert sample.tobytes() in crops_of(data.x_train[label])


def test_alternating_flips_mirror_each_image_in_every_second_epoch():
    """Without crops: in two epochs running each image is seen as it is and mirrored, half of them first so."""
    data = random_data(SMALL)
    batches = cifar10.Batches(data.x_train, data.y_train, 8, SMALL, generator=torch.Generator().manual_seed(0), pad=0,
                              alternating=True)
    plain = list(cifar10.Batches(data.x_train, data.y_train, 40, SMALL))[0][0]
    seen = []
    for epoch in range(3):
        batches.epoch = epoch
        images = torch.cat([images for images, _ in batches])
        distance = [(images - each).flatten(1).abs().sum(1).min().item() for each in plain]
        mirrored = [(images - each.flip(2)).flatten(1).abs().sum(1).min().item() for each in plain]
        assert all((as_is < 1e-3) != (turned < 1e-3) for as_is, turned in zip(distance, mirrored, strict=True))
        seen.append([turned < 1e-3 for turned in mirrored])
    assert seen[0] == seen[2]
    assert all(first != second for first, second in zip(seen[0], seen[1], strict=True))
    assert 8 < sum(seen[0]) < 32


def test_alternating_flips_do_not_depend_on_what_the_generator_drew_before():
    data, sides = random_data(SMALL), []
    for drawn in (0, 5):
        generator = torch.Generator().manual_seed(7)
        torch.rand(drawn, generator=generator)
        sides.append(cifar10.Batches(data.x_train, data.y_train, 8, SMALL, generator=generator, alternating=True).sides)
    assert torch.equal(*sides)


def test_all_images_adds_the_validation_images_to_those_that_train(tmp_path):
    flags = ["--dataset", "digits", "--batch-size", "7", "--model", "lenet5", "--compile", "off", "--device", "cpu"]
    ours, whole = (experiment.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                                    [*flags, *more, "--out", str(tmp_path / name)])
                   for name, more in (("ours", []), ("whole", ["--all-images"])))
    assert len(ours.train.chosen) + len(ours.validation.chosen) == 1_437 == len(whole.train.chosen)
    assert set(whole.train.chosen.tolist()) == set(range(1_437))
    assert torch.equal(ours.validation.chosen, whole.validation.chosen)
