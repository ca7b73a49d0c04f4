"""Pictures of every mode against formulas in NumPy, and folders of them against torchvision's ImageFolder."""
import colorsys
import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageCms

from engine import pictures

BACKGROUNDS = [(255, 255, 255), (0, 0, 0), (10, 200, 30)]


def values_of(bands, dtype=np.uint8, **limits):
    """Arrays of any small size, of so many bands, over the whole range of their type."""
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    return sizes.flatmap(lambda size: arrays.arrays(dtype, (*size, bands) if bands > 1 else size, **limits))


def picture_of(mode, values):
    """A PIL image of this mode whose bytes are these."""
    height, width = values.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(values).tobytes())


def over(color, alpha, background):
    """A colour, (H, W, 3), over a background, by alpha from 0 to 255."""
    share = alpha[..., None] / 255
    return color * share + np.array(background) * (1 - share)


def three(grey):
    return np.repeat(np.asarray(grey, dtype=float)[..., None], 3, -1)


def by_pixel(function, values):
    """colorsys and its like, on every pixel of 8 bits."""
    flat = [function(*pixel) for pixel in values.reshape(-1, 3) / 255]
    return 255 * np.array(flat).reshape(values.shape)


def from_ycc(luma, blue, red):
    blue, red = blue - 128 / 255, red - 128 / 255
    return np.clip((luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue), 0, 1)


def assert_shown(picture, expected, background=(255, 255, 255), tolerance=1.01):
    """The picture, in memory and where its mode can be kept in a file, becomes the expected RGB."""
    found = pictures.to_rgb(picture, background)
    assert found.mode == "RGB" and found.size == picture.size
    np.testing.assert_allclose(np.asarray(found), expected, atol=tolerance)
    for form in ("TIFF", "PNG"):
        file = io.BytesIO()
        try:
            picture.save(file, form)
        except (OSError, KeyError, ValueError):
            continue
        with Image.open(file) as again:
            kept = (again.mode, again.has_transparency_data) == (picture.mode, picture.has_transparency_data)
        if kept:
            read = pictures.read_picture(file, (picture.height, picture.width, 3), background)
            np.testing.assert_allclose(read, expected, atol=tolerance, err_msg=form)


# ---- modes

@settings(max_examples=25, deadline=None)
@given(values_of(1), st.data())
def test_grey_and_black_and_white(values, data):
    assert_shown(picture_of("L", values), three(values), tolerance=0)
    bits = values > 127
    assert_shown(Image.fromarray(bits), three(255 * bits), tolerance=0)


@settings(max_examples=25, deadline=None)
@given(values_of(2), st.sampled_from(BACKGROUNDS))
def test_transparent_grey_shows_the_background(values, background):
    grey, alpha = values[..., 0], values[..., 1]
    expected = over(three(grey), alpha, background)
    assert_shown(picture_of("LA", values), expected, background)
    multiplied = np.stack([np.round(grey * (alpha / 255)), alpha], -1).astype(np.uint8)
    assert_shown(picture_of("La", multiplied), expected, background, tolerance=2.01)


@settings(max_examples=25, deadline=None)
@given(values_of(4), st.sampled_from(BACKGROUNDS))
def test_transparent_colours_show_the_background(values, background):
    color, alpha = values[..., :3], values[..., 3]
    expected = over(color.astype(float), alpha, background)
    assert_shown(picture_of("RGBA", values), expected, background)
    multiplied = np.concatenate([np.round(color * (alpha[..., None] / 255)), alpha[..., None]], -1).astype(np.uint8)
    assert_shown(picture_of("RGBa", multiplied), expected, background, tolerance=2.01)
    assert_shown(picture_of("RGBX", values), color, background, tolerance=0)


@settings(max_examples=25, deadline=None)
@given(values_of(3))
def test_colours(values):
    assert_shown(picture_of("RGB", values), values, tolerance=0)
    assert_shown(picture_of("YCbCr", values), by_pixel(from_ycc, values), tolerance=2.01)
    assert_shown(picture_of("HSV", values), by_pixel(colorsys.hsv_to_rgb, values), tolerance=4.01)


@settings(max_examples=25, deadline=None)
@given(values_of(4))
def test_ink(values):
    ink = values / 255
    assert_shown(picture_of("CMYK", values), 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:]))


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (120, 120, 120), (200, 40, 90), (30, 160, 60)])
def test_lab_is_led_back_to_what_it_was_made_of(color):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.new("RGB", (4, 3), color), *profiles, outputMode="LAB")
    assert lab.mode == "LAB"
    assert_shown(lab, np.broadcast_to(color, (3, 4, 3)), tolerance=4.01)


@settings(max_examples=25, deadline=None)
@given(values_of(1), st.integers(0, 2**32 - 1), st.sampled_from(BACKGROUNDS))
def test_palettes_whole_transparent_and_with_alpha(values, seed, background):
    random = np.random.default_rng(seed)
    palette, alphas = (random.integers(0, 256, size, np.uint8) for size in ((256, 3), 256))
    picture = picture_of("P", values)
    picture.putpalette(palette.tobytes())
    assert_shown(picture, palette[values], background, tolerance=0)
    one = int(values.flat[0])
    picture.info["transparency"] = one
    assert_shown(picture, np.where(values[..., None] == one, background, palette[values]), background, tolerance=0)
    picture.info["transparency"] = alphas.tobytes()
    assert_shown(picture, over(palette[values].astype(float), alphas[values], background), background)
    both = picture_of("PA", np.stack([values, alphas[values]], -1))
    both.putpalette(palette.tobytes())
    assert_shown(both, over(palette[values].astype(float), alphas[values], background), background)


@settings(max_examples=25, deadline=None)
@given(values_of(1, np.uint16))
@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_are_scaled(mode, values):
    stored = values.astype({"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2"))
    assert_shown(picture_of(mode, stored), three(values / 257), tolerance=0.51)


@settings(max_examples=25, deadline=None)
@given(values_of(1))
def test_sixteen_bits_show_what_eight_do(values):
    assert_shown(picture_of("I;16", values.astype("<u2") * 257), three(values), tolerance=0)


@settings(max_examples=25, deadline=None)
@given(values_of(1, np.float32, elements=st.floats(0, 1, width=32)))
def test_floats_from_0_to_1_are_scaled(values):
    assert_shown(picture_of("F", values), three(255 * values.astype(float)), tolerance=0.51)


def test_a_value_of_sixteen_bits_that_is_transparent(tmp_path):
    values = np.array([[0, 65535], [30000, 7]], np.uint16)
    picture_of("I;16", values).save(tmp_path / "a.png", transparency=7)
    found = pictures.read_picture(tmp_path / "a.png", (2, 2, 3), (0, 9, 0))
    assert found.tolist() == [[[0] * 3, [255] * 3], [[117] * 3, [0, 9, 0]]]


@pytest.mark.parametrize("mode, values", [("I;16", np.array([[0, 65535, 257]], np.uint16)),
                                          ("F", np.array([[0, 1, 1 / 255]], np.float32))])
def test_a_tiff_whose_highest_value_is_black(mode, values, tmp_path):
    picture_of(mode, values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert pictures.read_picture(tmp_path / "a.tif", (1, 3, 3))[0, :, 0].tolist() == [255, 0, 254]


def test_a_tiff_of_twelve_bits(tmp_path):
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 3)]
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    (tmp_path / "a.tif").write_bytes(header.ljust(122, b"\0") + bytes([0xFF, 0xF8, 0x00]))       # 0xFFF and 0x800
    assert pictures.read_picture(tmp_path / "a.tif", (1, 2, 3))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("mode, values, told", [
    ("I", np.array([[0, 2**31 - 1]], np.int32), "mode I holds integers of 32 bits"),
    ("I", np.array([[0, 255]], np.int32), "mode I holds integers of 32 bits"),
    ("F", np.array([[0, 255]], np.float32), "mode F holds floats from 0 to 255"),
    ("F", np.array([[-0.5, 1]], np.float32), "mode F holds floats from -0.5 to 1"),
    ("F", np.array([[np.nan, 1]], np.float32), "mode F holds floats"),
    ("F", np.array([[np.inf, 1]], np.float32), "mode F holds floats"),
])
def test_what_has_no_known_white_is_refused_by_mode(mode, values, told, tmp_path):
    picture_of(mode, values).save(tmp_path / "a.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"a.tif is no picture that can be read: its {told}"):
            pictures.read_picture(tmp_path / "a.tif", (1, 2, 3))


def test_every_mode_of_pillow_is_converted_or_refused_by_its_name():
    for mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I",
                 "I;16", "I;16L", "I;16B", "I;16N", "F"):
        try:
            assert pictures.to_rgb(Image.new(mode, (3, 2))).mode == "RGB", mode
        except ValueError as problem:
            assert f"mode {mode} " in str(problem)


# ---- files

def drawing(form):
    """A picture with black ink, as the bytes of a file."""
    file, values = io.BytesIO(), np.full((8, 8, 3), 250, np.uint8)
    values[2:6, 3] = 0
    Image.fromarray(values).save(file, form)
    return file.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), st.integers(0, 10**6), st.integers(0, 7),
       st.booleans())
def test_a_damaged_picture_is_read_or_one_valueerror(form, position, bit, cut):
    content = bytearray(drawing(form))
    content[position % len(content)] ^= 1 << bit
    file = io.BytesIO(content[:position % len(content)] if cut else content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            assert pictures.read_picture(file, (32, 32, 3)).shape == (32, 32, 3)
        except ValueError as problem:
            assert "is no picture that can be read: " in str(problem) and "\n" not in str(problem)


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path):
    values = np.zeros((4, 4, 3), np.uint8)
    values[0] = 255                                       # the top row is white
    exif = Image.Exif()
    exif[0x0112] = 6                                      # to be turned right by a quarter
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    assert pictures.read_picture(tmp_path / "a.png", (4, 4, 3))[0, :, 0].tolist() == [0, 0, 0, 255]


@pytest.mark.parametrize("text, color", [("white", (255, 255, 255)), ("#0a0B0c", (10, 11, 12)), ("#f00", (255, 0, 0)),
                                         ("rgb(1, 2, 3)", (1, 2, 3))])
def test_colours_by_name_and_number(text, color):
    assert pictures.color_of(text) == color


@pytest.mark.parametrize("text", ["", "whitish", "#12", "#11223344"])
def test_what_is_no_colour_is_refused(text):
    with pytest.raises(ValueError, match="--background '.*' is no colour"):
        pictures.color_of(text)


# ---- folders

def write_folder(folder, counts, side=32):
    """Random pictures of {"train": {class: count}, "test": {...}}, every third one in a folder below its class."""
    random = np.random.default_rng(0)
    for part, classes in counts.items():
        for name, count in classes.items():
            for number in range(count):
                inside = folder / part / name / ("more" if number % 3 == 2 else "")
                inside.mkdir(parents=True, exist_ok=True)
                values = random.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(values).save(inside / f"{number}.{('png', 'PNG', 'bmp')[number % 3]}")
    return folder


@pytest.fixture
def animals(tmp_path):
    return write_folder(tmp_path / "animals", {"train": {"zebra": 5, "Ant": 4, "cat": 7},
                                               "test": {"zebra": 2, "Ant": 3, "cat": 1}})


def test_a_folder_is_read_as_torchvision_does(animals):
    from torchvision.datasets import ImageFolder
    (animals / "train" / "cat" / "notes.txt").write_text("no picture")
    classes, found, mean, std = pictures.read_classes(animals, (32, 32, 3))
    for part, images, labels in zip(("train", "test"), found[::2], found[1::2], strict=True):
        theirs = ImageFolder(animals / part)
        assert classes == tuple(theirs.classes) == ("Ant", "cat", "zebra")
        assert labels.tolist() == theirs.targets and labels.dtype == np.int64
        np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image, _ in theirs]))
    pixels = found[0].reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), atol=5.1e-5)
    np.testing.assert_allclose(std, pixels.std(0), atol=5.1e-5)


def test_pictures_of_one_colour_have_a_std_that_can_divide():
    assert pictures.spread_of(np.full((3, 2, 2, 1), 255, np.uint8)) == ((1.0,), (0.002,))


def test_a_folder_that_has_changed_is_read_again(animals):
    first = pictures.read_classes(animals, (32, 32, 3))
    assert pictures.read_classes(animals, (32, 32, 3))[1][0] is first[1][0]
    Image.new("RGB", (50, 40)).save(animals / "train" / "cat" / "0.png")
    again = pictures.read_classes(animals, (32, 32, 3))
    assert again[2] != first[2] and (again[1][0] != first[1][0]).any()
    (animals / "test" / "zebra" / "1.PNG").unlink()
    assert len(pictures.read_classes(animals, (32, 32, 3))[1][3]) == 5


@pytest.mark.parametrize("spoil, told", [
    (lambda folder: folder.joinpath("test").rename(folder / "tests"), r"animals has no folder test; pictures stand in"),
    (lambda folder: folder.joinpath("train").rename(folder / "x"), r"animals has no folder train"),
    (lambda folder: folder.joinpath("test/cat").rename(folder / "test/dog"),
     "the class cat is in train and not in test"),
    (lambda folder: folder.joinpath("train/Ant").rename(folder / "ant"), "the class Ant is in test and not in train"),
    (lambda folder: folder.joinpath("train/dog").mkdir(), "train/dog holds no picture; one ends in .*.png"),
    (lambda folder: folder.joinpath("train/cat/x.png").write_text("text"),
     "train/cat/x.png is no picture that can be read: its format is unknown"),
    (lambda folder: folder.joinpath("test/cat/x.jpg").write_bytes(drawing("JPEG")[:200]),
     "test/cat/x.jpg is no picture that can be read"),
    (lambda folder: [folder.joinpath("train", name).rename(folder / name) for name in ("Ant", "cat", "zebra")],
     "train holds no folder of a class; a classifier needs at least 2 classes"),
    (lambda folder: [folder.joinpath("test", name).rename(folder / name) for name in ("Ant", "cat")],
     "test holds zebra; a classifier needs at least 2 classes"),
])
def test_a_folder_of_another_form_is_one_clear_line(animals, spoil, told):
    spoil(animals)
    with pytest.raises(ValueError, match=told) as problem:
        pictures.read_classes(animals, (32, 32, 3))
    assert "\n" not in str(problem.value)


def test_folders_with_a_dot_in_front_are_left_out_at_any_depth(tmp_path):
    for name in ("a.png", ".thumbnails/a.png", "more/.ipynb_checkpoints/b.png", "more/b.png", ".@__thumb/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert pictures.files_in(tmp_path) == [tmp_path / "a.png", tmp_path / "more" / "b.png"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("header", [b"no header of a TIFF", b"II", b"MM\x00*\xff\xff\xff\xff", b""])
def test_a_picture_with_a_garbled_orientation_is_read_as_it_lies(form, header):
    picture, file = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)), io.BytesIO()
    picture.save(file, form, exif=b"Exif\x00\x00" + header, **({"dpi": (72, 72)} if form == "JPEG" else {}))
    with Image.open(file) as read:
        expected = np.asarray(read.convert("RGB").crop((1, 0, 7, 6)))
    np.testing.assert_array_equal(pictures.read_picture(file, (6, 6, 3)), expected)
