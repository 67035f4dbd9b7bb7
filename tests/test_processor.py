"""Our own rules: what becomes of pictures that are not plain RGB, how rows are laid out, and what is said of damage.

What is the same as in transformers stands in parity/test_processor.py; what a user sees on the command line, in
test_bad_input.py.
"""

import gc
import io
import json
import os
import random
import re
import shutil
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from sigma_book.assemble import POCKET
from sigma_book.cli import main
from sigma_book.processor import Processor, Tokenizer, load_image, pixels
from sigma_book.weights import read_config


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def rgb(source) -> np.ndarray:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(values) -> np.ndarray:
    """What a grey picture should look like in three colours."""
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def over_white(colour, alpha):
    return colour * alpha / 255 + 255 - alpha


def png(width: int, height: int, depth: int, colour: int, content: bytes, transparent: bytes | None = None) -> bytes:
    """A PNG of the kinds that Pillow reads and does not write."""

    def chunk(kind: bytes, inside: bytes) -> bytes:
        return struct.pack(">I", len(inside)) + kind + inside + struct.pack(">I", zlib.crc32(kind + inside))

    row = len(content) // height
    lines = b"".join(b"\x00" + content[start : start + row] for start in range(0, len(content), row))
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts += chunk(b"tRNS", transparent) if transparent is not None else b""
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


RAMP = np.arange(256, dtype=np.uint8)[None]  # (1, 256)
UPRIGHT = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)  # no two turns of it are alike


# EXIF


def stored_as(orientation: int) -> np.ndarray:
    """UPRIGHT as a camera held in this way stores it: where each stored pixel belongs, from the table of EXIF 2.3."""
    height, width, _ = UPRIGHT.shape
    sideways = orientation >= 5
    stored = np.empty((width, height, 3) if sideways else (height, width, 3), np.uint8)
    for row in range(stored.shape[0]):
        for column in range(stored.shape[1]):
            right, down = (row, column) if sideways else (column, row)
            if orientation in (2, 3, 6, 7):
                right = width - 1 - right
            if orientation in (3, 4, 7, 8):
                down = height - 1 - down
            stored[row, column] = UPRIGHT[down, right]
    return stored


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_obeyed(orientation, kind):
    note = Image.Exif()
    note[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(stored_as(orientation)), kind, exif=note, **options)
    assert np.array_equal(rgb(content), UPRIGHT)
    assert np.array_equal(rgb(Image.open(io.BytesIO(content))), UPRIGHT)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))), UPRIGHT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_of_a_jpeg(orientation):
    note = Image.Exif()
    note[0x0112] = orientation
    stored = Image.fromarray(stored_as(orientation))
    stored = stored.resize((8 * stored.width, 8 * stored.height), Image.Resampling.NEAREST)
    content = encoded(stored, "JPEG", exif=note, quality=90)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(rgb(content), np.asarray(expected))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_picture_is_turned_once_however_often_it_is_loaded(orientation, kind):
    """The server opens a picture at the door, the engine takes what came of it."""
    note = Image.Exif()
    note[0x0112] = orientation
    content = encoded(Image.fromarray(stored_as(orientation)), kind, exif=note)
    given = Image.open(io.BytesIO(content))
    once = load_image(given)
    assert np.array_equal(rgb(once), np.asarray(once)) and once.size == (8, 5)
    if kind != "TIFF":  # which Pillow turns itself
        assert given.getexif()[0x0112] == orientation  # what was handed in keeps its note


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png is no file"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_exif_that_means_nothing(orientation):
    note = Image.Exif()
    note[0x0112] = orientation
    assert np.array_equal(rgb(encoded(Image.fromarray(UPRIGHT), "PNG", exif=note)), UPRIGHT)


def test_exif_with_a_damaged_line():
    """A description under a number that is not its own: Pillow's turning, which writes the note anew, stumbles over it."""
    note = Image.Exif()
    note[0x0112], note[0x010E] = 6, "a long description"
    stored = Image.fromarray(stored_as(6)).resize((40, 64), Image.Resampling.NEAREST)
    content = encoded(stored, "JPEG", exif=note)
    line = b"\x01\x0e\x00\x02"
    assert content.count(line) == 1
    damaged = content.replace(line, b"\x01\x01\x00\x02")
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(damaged)))
    assert np.array_equal(rgb(damaged), rgb(content))
    assert rgb(damaged).shape == (40, 64, 3)


@pytest.mark.parametrize("note", [b"Exif\0\0XXXXXXXXXXXX", b"Exif\0\0II*\0"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_cannot_be_read(kind, note):
    """The pixels are whole, so they are taken as they stand."""
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(UPRIGHT), kind, exif=note, **options)
    once = load_image(content)
    assert np.array_equal(np.asarray(once), UPRIGHT) and np.array_equal(rgb(once), UPRIGHT)


# transparency


def test_alpha_lies_over_white():
    """Every alpha, with four colours; Pillow rounds in its own way, so within one grey level."""
    for colour in (0, 90, 200, 255):
        expected = grey(over_white(colour, RAMP.astype(float)))
        full = np.full_like(RAMP, colour)
        four = np.stack([full, full, full, RAMP], -1)
        two = Image.merge("LA", (Image.fromarray(full), Image.fromarray(RAMP)))
        for source in (four, Image.fromarray(four), encoded(Image.fromarray(four), "PNG"), two, encoded(two, "PNG")):
            assert np.abs(rgb(source) - expected).max() <= 1
        assert np.abs(rgb(Image.fromarray(four).convert("RGBa")) - expected).max() <= 2  # multiplied and rounded before


def test_what_is_solid_stays_as_it_is():
    four = np.concatenate([UPRIGHT, np.full((5, 8, 1), 255, np.uint8)], -1)
    assert np.array_equal(rgb(four), UPRIGHT)
    four[..., 3] = 0
    assert (rgb(four) == 255).all()  # and of what is clear, the colour does not matter


def test_a_palette_with_one_clear_colour():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image = image.convert("P")
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    for kind in ("PNG", "GIF"):
        content = encoded(image, kind, transparency=1)
        with Image.open(io.BytesIO(content)) as stored:
            assert stored.mode == "P" and "transparency" in stored.info
        assert rgb(content).tolist() == expected
    assert rgb(encoded(image, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def test_a_palette_with_an_alpha_for_each_colour():
    image = Image.new("P", (4, 1))
    image.putdata([0, 1, 2, 3])
    image.putpalette([100, 0, 200] * 4)
    alphas = np.array([0, 64, 128, 255])
    expected = np.stack([over_white(colour, alphas) for colour in (100, 0, 200)], -1)[None]
    assert np.abs(rgb(encoded(image, "PNG", transparency=bytes(alphas.tolist()))) - expected).max() <= 1
    inside = Image.new("P", (4, 1))
    inside.putdata([0, 1, 2, 3])
    inside.putpalette(np.stack([[100] * 4, [0] * 4, [200] * 4, alphas], -1).astype(np.uint8).tobytes(), "RGBA")
    assert "transparency" not in inside.info
    assert np.abs(rgb(inside) - expected).max() <= 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(3, 1, 8, 0, bytes([10, 20, 30]), b"\x00\x14"), [10, 255, 30]),
        (png(2, 1, 8, 2, bytes([10, 20, 30, 40, 50, 60]), struct.pack(">3H", 10, 20, 30)), [255, 40]),
        (png(8, 1, 1, 0, b"\x0f", b"\x00\x00"), [255] * 8),
        (png(8, 1, 1, 0, b"\x0f", b"\x00\x01"), [0] * 4 + [255] * 4),
        (png(2, 1, 16, 0, struct.pack(">HH", 1000, 2000), struct.pack(">H", 1000)), [255, 8]),
    ],
    ids=["grey", "colour", "black of 1 bit", "white of 1 bit", "16-bit grey"],
)
def test_a_png_with_a_clear_colour(content, expected):
    assert rgb(content)[0, :, 0].tolist() == expected


# palette, grey, bits, inks


@pytest.mark.parametrize(
    ("mode", "note"), [("1", b"\0\x80"), ("L", b"\0"), ("RGB", b"\0"), ("RGB", None), ("P", (1, 2, 3))]
)
def test_a_clear_colour_left_from_another_mode_says_nothing(mode, note):
    """Pillow's `convert` leaves the note where it was: one of a palette's, on black and white."""
    image = Image.fromarray(UPRIGHT).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    image.info["transparency"] = note
    assert np.array_equal(rgb(image), expected) and image.info["transparency"] == note


def test_palette_grey_and_one_bit():
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    palette = Image.fromarray(RAMP).convert("P")
    palette.putpalette(colours.tobytes())
    assert np.array_equal(rgb(palette)[0], colours)
    for kind in ("PNG", "GIF", "BMP"):
        assert np.array_equal(rgb(encoded(palette, kind))[0], colours)
    assert np.array_equal(rgb(encoded(Image.fromarray(RAMP), "PNG")), grey(RAMP))
    bits = Image.fromarray(RAMP > 99)
    assert bits.mode == "1"
    assert np.array_equal(rgb(encoded(bits, "PNG")), grey((RAMP > 99) * 255))


DEEP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "big-endian TIFF", "32-bit TIFF", "image", "32-bit image"])
def test_sixteen_bits_are_scaled(kind):
    """Every value there is: 0 is black, 65535 white, and each grey level gets 257 of them."""
    image = Image.fromarray(DEEP)
    if kind == "big-endian TIFF":
        image = Image.frombytes("I;16B", (256, 256), DEEP.astype(">u2").tobytes())
    elif kind.startswith("32-bit"):
        image = Image.fromarray(DEEP.astype(np.int32))
    source = image if kind.endswith("image") else encoded(image, kind.split()[-1])
    assert np.array_equal(rgb(source), grey(np.round(DEEP / 257)))


def test_sixteen_bits_of_colour():
    """Pillow itself keeps the upper of the two bytes: within a grey level of rounding."""
    values = np.random.default_rng(2).integers(0, 65536, (4, 5, 3))
    content = png(5, 4, 16, 2, values.astype(">u2").tobytes())
    assert np.abs(rgb(content) - values / 257).max() <= 1
    solid = np.concatenate([values, np.full((4, 5, 1), 65535)], -1)
    assert np.abs(rgb(png(5, 4, 16, 6, solid.astype(">u2").tobytes())) - values / 257).max() <= 1


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_in_a_tiff(white):
    """White is 1, 255 or 65535: the first that no number in the file exceeds."""
    values = np.linspace(0, white, 300, dtype=np.float32).reshape(15, 20)
    found = rgb(encoded(Image.fromarray(values), "TIFF"))
    assert np.abs(found - grey(values / white * 255)).max() <= 0.51
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize("wrong", [-1.0, 65536.0, float("nan"), float("inf")])
def test_floats_out_of_range(wrong):
    values = np.array([[0.5, wrong]], np.float32)
    with pytest.raises(ValueError, match="this picture in bytes has grey values outside 0 to 65535: scale"):
        load_image(encoded(Image.fromarray(values), "TIFF"))


def test_whole_numbers_out_of_range():
    with pytest.raises(ValueError, match="outside 0 to 65535"):
        load_image(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_four_inks():
    inks = np.random.default_rng(3).integers(0, 256, (6, 7, 4), dtype=np.uint8)
    image = Image.frombytes("CMYK", (7, 6), inks.tobytes())
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(rgb(image) - expected).max() <= 1
    assert np.abs(rgb(encoded(image, "TIFF")) - expected).max() <= 1
    flat = Image.new("CMYK", (16, 16), (0, 200, 100, 30))  # JPEG keeps an even surface
    expected = np.array([255, 55, 155]) * 225 / 255
    assert np.abs(rgb(encoded(flat, "JPEG", quality=100)) - expected).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX", "La", "PA"])
def test_rare_modes(mode):
    image = Image.fromarray(UPRIGHT)
    if mode == "LAB":
        assert load_image(Image.new("LAB", (3, 2))).mode == "RGB"
        return
    between = image.convert("LA") if mode == "La" else image.convert("P") if mode == "PA" else image
    expected = between.convert("RGB") if mode == "PA" else image.convert("L" if mode == "La" else "RGB").convert("RGB")
    assert np.abs(rgb(between.convert(mode)) - np.asarray(expected).astype(int)).max() <= 4  # colours are rounded twice


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_many(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.n_frames == 3
    assert (rgb(content) == [255, 0, 0]).all()


def test_the_first_frame_of_a_gif_with_a_clear_ground():
    frames = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(2)]
    frames[0].paste((255, 0, 0, 255), (0, 0, 4, 8))
    frames[1].paste((0, 0, 255, 255), (0, 0, 8, 8))
    found = rgb(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (found[:, :4] == [255, 0, 0]).all() and (found[:, 4:] == 255).all()


# where pictures come from


def test_all_ways_in_give_the_same(tmp_path):
    content = encoded(Image.fromarray(UPRIGHT), "PNG")
    path = tmp_path / "ein Bild ü.png"
    path.write_bytes(content)
    for source in (content, bytearray(content), path, str(path), Image.open(path), Image.fromarray(UPRIGHT), UPRIGHT):
        assert np.array_equal(rgb(source), UPRIGHT)


@pytest.mark.parametrize(("depth", "content", "clear"), [(2, b"\x1b", 2), (4, b"\x01\x8f", 8)])
def test_a_clear_grey_of_few_bits_becomes_white(depth, content, clear):
    """Four pixels: two ends and two between; Pillow spreads their levels over 0 to 255, and its note on the clear one not."""
    levels = [0, 1, 2, 3] if depth == 2 else [0, 1, 8, 15]
    found = rgb(png(4, 1, depth, 0, content, clear.to_bytes(2, "big")))
    step = 255 // (2**depth - 1)
    assert found[0, :, 0].tolist() == [255 if level == clear else level * step for level in levels]


def test_threads_that_read_pictures_leave_the_warnings_as_they_were():
    content = encoded(Image.fromarray(np.zeros((400, 400, 3), np.uint8)), "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_image, [content] * 200))
    assert warnings.filters == before


def test_the_ending_of_a_name_says_nothing(tmp_path):
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(Image.fromarray(UPRIGHT), "PNG"))
    assert np.array_equal(rgb(path), UPRIGHT)


def test_a_file_is_closed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(UPRIGHT), "PNG"))
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")  # an open file that is dropped is a ResourceWarning
        load_image(path)
        gc.collect()
    assert remarks == []


def test_a_picture_handed_in_is_left_as_it_was():
    image = Image.fromarray(np.concatenate([UPRIGHT, UPRIGHT[..., :1]], -1))
    before = image.tobytes()
    load_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RAMP, grey(RAMP)),
        (RAMP[..., None], grey(RAMP)),
        (UPRIGHT, UPRIGHT),
        (UPRIGHT[::-1, ::-1], UPRIGHT[::-1, ::-1]),  # memory read backwards
        (np.asfortranarray(UPRIGHT), UPRIGHT),
        (DEEP, grey(np.round(DEEP / 257))),
        (DEEP.astype(">u2"), grey(np.round(DEEP / 257))),
        (UPRIGHT.astype(np.uint16) * 257, UPRIGHT),
        (UPRIGHT / 255, UPRIGHT),
        ((UPRIGHT / 255).astype(np.float32), UPRIGHT),
        ((UPRIGHT / 255).astype(np.float16), UPRIGHT),  # 11 bits hold a grey level exactly enough
        (np.array([[0.0, 0.5, 1.0]]), grey([[0, 128, 255]])),
        (np.array([[[0.0, 0.0, 0.0, 0.0]]]), [[[255, 255, 255]]]),
    ],
    ids=lambda value: f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_arrays(array, expected):
    assert np.array_equal(rgb(array), expected)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(5, np.uint8), "shape (5,)"),
        (np.zeros((2, 3, 4, 3), np.uint8), "shape (2, 3, 4, 3)"),
        (np.zeros((3, 20, 20), np.uint8), "shape (3, 20, 20)"),  # channels first
        (np.zeros((4, 4, 2), np.uint8), "shape (4, 4, 2)"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), bool), "bool"),
        (np.zeros((4, 4), complex), "complex"),
        (np.zeros((4, 4), object), "object"),
        (np.array([["a"]]), "expected uint8, uint16, or floats"),
        (np.full((2, 2), 200.0), "from 0 to 1: divide by 255"),
        (np.full((2, 2), -0.1), "from 0 to 1"),
        (np.array([[0.5, np.nan]]), "from 0 to 1"),
        (np.array([[0.5, np.inf]], np.float16), "from 0 to 1"),
    ],
)
def test_arrays_that_are_no_pictures(array, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_image(array)


# damage


def sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("source", [None, 5, ["a.png"], torch.zeros(3, 4, 4), io.BytesIO(b"x"), memoryview(b"x")])
def test_other_kinds_of_source(source):
    with pytest.raises(ValueError, match=f"got {type(source).__name__}"):
        load_image(source)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x00" * 1000, b"<svg></svg>", b"%PDF-1.7"])
def test_bytes_that_are_no_picture(content):
    with pytest.raises(ValueError, match="is not a picture that can be read: give a JPEG, PNG") as error:
        load_image(content)
    assert sentence(error).startswith("this picture in bytes")


def test_a_cut_off_picture_in_bytes_and_opened_by_the_user():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    half = encoded(noise, "JPEG")[:1500]
    for source, name in ((half, "this picture in bytes"), (Image.open(io.BytesIO(half)), "this picture")):
        with pytest.raises(ValueError, match="damaged or cut off") as error:
            load_image(source)
        assert sentence(error).startswith(name) and "get a whole copy" in sentence(error)


def test_a_bomb_in_bytes():
    bomb = png(30_000, 30_000, 1, 0, bytes(30_000))
    with pytest.raises(ValueError, match="89,478,485 pixels: reduce the picture") as error:
        load_image(bomb)
    sentence(error)


def test_a_picture_without_pixels():
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_postscript_is_not_run(tmp_path):
    """Pillow would hand it to Ghostscript, and Ghostscript runs what stands in it."""
    content = encoded(Image.fromarray(UPRIGHT), "EPS")
    assert Image.open(io.BytesIO(content)).format == "EPS"
    with pytest.raises(ValueError, match="is not a picture that can be read"):
        load_image(content)


def test_paths_that_cannot_be_opened(tmp_path):
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_image(tmp_path / "file.png" / "inside.png")
    with pytest.raises(RuntimeError, match="cannot be opened") as error:
        load_image("x" * 5000)
    assert len(sentence(error)) < 400
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_image("a\x00b.png")


KINDS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "DDS", "SGI"]
KINDS += [kind for kind, name in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(name)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_gets_past_the_sentence(kind):
    """Bytes overwritten, ends cut off: a picture, or a ValueError in one sentence; never another error, never a remark."""
    rng = random.Random(kind)
    note = Image.Exif()
    note[0x0112], note[0x010E] = 6, "a description"
    options = {"exif": note} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    content = encoded(Image.fromarray(UPRIGHT).resize((30, 24)), kind, **options)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(min(len(content), rng.choice((60, 200, len(content)))))
            damaged[place] = rng.choice((0, 255, rng.randrange(256)))
        if rng.random() < 0.3:
            damaged = damaged[: rng.randrange(len(damaged))]
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            try:
                assert load_image(damaged).mode == "RGB"
            except ValueError as error:
                refused += 1
                assert str(error).startswith("this picture in bytes ")
        assert remarks == []
    assert refused > 0


# pixels


def test_pixels():
    image = Image.new("RGB", (30, 50), (0, 51, 255))
    found = pixels(image, 14)
    assert found.shape == (3, 14, 14) and found.dtype == torch.float32
    torch.testing.assert_close(found[:, 3, 4], torch.tensor([-1.0, -0.6, 1.0]))
    assert found.flatten(1).std(dim=1).max() == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pixels_of_another_mode(mode):
    with pytest.raises(ValueError, match=f"mode {mode}, expected RGB"):
        pixels(Image.new(mode, (5, 5)), 14)


# rows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(POCKET)


@pytest.fixture(scope="module")
def processor(tokenizer) -> Processor:
    """Two by two patches of 14 pixels."""
    return Processor(tokenizer, image_size=28, num_image_tokens=4)


PICTURE = Image.fromarray(UPRIGHT)


def words(tokenizer: Tokenizer, ids: torch.Tensor) -> list[str]:
    return [tokenizer.decode([token], skip_special_tokens=False) for token in ids.tolist()]


def test_the_shorter_row_is_padded_in_front(processor, tokenizer):
    batch = processor.prepare([PICTURE, PICTURE], ["caption en", ""])
    image = ["<image>"] * 4
    assert words(tokenizer, batch.input_ids[0]) == [*image, "<bos>", "caption", " en", "\n"]
    assert words(tokenizer, batch.input_ids[1]) == ["<pad>", "<pad>", *image, "<bos>", "\n"]
    assert batch.attention_mask.tolist() == [[1] * 8, [0, 0] + [1] * 6]
    assert batch.token_type_ids.tolist() == [[0] * 8] * 2
    assert batch.labels is None
    assert batch.pixel_values.shape == (2, 3, 28, 28)


def test_for_training_it_is_padded_behind(processor, tokenizer):
    batch = processor.prepare([PICTURE, PICTURE], ["caption en", ""], ["", "a star"])
    image = ["<image>"] * 4
    assert words(tokenizer, batch.input_ids[0]) == [*image, "<bos>", "caption", " en", "\n", "<eos>"]
    assert words(tokenizer, batch.input_ids[1]) == [*image, "<bos>", "\n", "a", " star", "<eos>"]
    batch = processor.prepare([PICTURE, PICTURE], ["caption en", ""], ["a star", "star"])
    assert words(tokenizer, batch.input_ids[1])[5:] == ["\n", "star", "<eos>"] + ["<pad>"] * 3
    assert batch.attention_mask[1].tolist() == [1] * 8 + [0] * 3
    assert batch.token_type_ids[1].tolist() == [0] * 6 + [1, 1] + [0] * 3
    assert batch.labels[1].tolist() == [-100] * 6 + [tokenizer.token_id("star"), tokenizer.eos_id] + [-100] * 3
    assert batch.labels[0].tolist() == [-100] * 8 + batch.input_ids[0, 8:].tolist()


def test_pictures_stand_in_order(processor, tokenizer):
    flat = {name: Image.new("RGB", (9, 9), name) for name in ("red", "lime", "blue")}
    batch = processor.prepare([[flat["red"], flat["lime"]], flat["blue"]], ["a", "b"])
    assert words(tokenizer, batch.input_ids[0]).count("<image>") == 8
    assert words(tokenizer, batch.input_ids[1])[:4] == ["<pad>"] * 4
    expected = [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
    torch.testing.assert_close(batch.pixel_values.mean((2, 3)), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], []), "there are no prompts"),
        (([PICTURE], ["a", "b"]), "1 images, 2 prompts: "),
        (([PICTURE], ["a"], ["b", "c"]), "1 images, 1 prompts and 2 suffixes"),
        (([PICTURE], ["what is <image>?"]), "prompt 'what is <image>?' contains <image>"),
        (([PICTURE], ["<image>"], ["b"]), "prompt '<image>' contains <image>"),
        (([PICTURE], ["a"], ["b<image>"]), "suffix 'b<image>' contains <image>"),
        (([PICTURE], [5]), "prompt 5 is int: expected text"),
        (([PICTURE], ["a"], [None]), "suffix None is NoneType: expected text"),
        (([[]], ["a"]), "prompt 'a' has no picture"),
        ((["scene.png"], ["a"]), "prompt 'a' has no picture"),
        (([None], ["a"]), "prompt 'a' has no picture"),
        (([PICTURE.convert("L")], ["a"]), "mode L, expected RGB"),
        (([PICTURE], ["a\ud800"]), "lone surrogate at place 1"),
    ],
)
def test_rows_that_cannot_be(processor, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        processor.prepare(*arguments)
    sentence(error)


def test_a_prompt_of_bytes_that_are_no_text(capsys, tiny_folder, picture_file):
    """What Python makes of the argument $'\\xff' on a command line."""
    prompt = b"caption \xff".decode("utf-8", "surrogateescape")
    assert main(["generate", str(picture_file), prompt, "--model", str(tiny_folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "lone surrogate at place 8" in err


def test_a_batch_moves_whole(processor):
    batch = processor.prepare([PICTURE], ["a"], ["b"]).to("meta")
    assert {value.device.type for value in vars(batch).values()} == {"meta"}
    assert processor.prepare([PICTURE], ["a"]).to("meta").labels is None


def test_ids_that_are_none(tokenizer):
    with pytest.raises(ValueError, match="-100 is no token id"):
        tokenizer.decode([5, -100])
    with pytest.raises(ValueError, match="no piece '<loc1024>'"):
        tokenizer.token_id("<loc1024>")
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.vocab_size, 257_215, 2**40]) == ""
    assert tokenizer.decode(torch.tensor(tokenizer.encode("a star"))) == "a star"


# the files of a processor


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    """The pocket's files without its weights."""
    target = tmp_path / "folder"
    target.mkdir()
    for path in POCKET.glob("*.json"):
        shutil.copy(path, target)
    shutil.copy(POCKET / "tokenizer.model", target)
    return target


def test_the_folder_is_read(folder):
    processor = Processor.from_folder(folder)
    assert (processor.image_size, processor.num_image_tokens) == (112, 64)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b'"a"', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "processor_config.json", "added_tokens.json"]
)
def test_a_file_that_is_no_table(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(folder / name))) as error:
        Processor.from_folder(folder)
    sentence(error)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "added_tokens.json"]
)
def test_a_file_that_cannot_be_opened(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(RuntimeError, match=re.escape(f"{folder / name} cannot be read (")) as error:
        Processor.from_folder(folder)
    sentence(error)


def test_a_missing_file(folder):
    (folder / "preprocessor_config.json").unlink()  # says nothing that config.json does not
    assert Processor.from_folder(folder).image_size == 112
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert Processor.from_folder(folder).tokenizer.image_id == Tokenizer.from_folder(POCKET).image_id
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"no config.json in {folder}"):
        Processor.from_folder(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model"
    ):
        Processor.from_folder(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Processor.from_folder(folder / "nowhere")


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        (5, "vision_config is 5"),
        ([1], "vision_config is [1]"),
        ([], "vision_config is []"),
        ({"image_size": "112"}, "image_size is '112'"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 112.0}, "image_size is 112.0"),
        ({"image_size": 112, "patch_size": None}, "patch_size is None"),
        ({"image_size": 112, "patch_size": -14}, "patch_size is -14"),
    ],
)
def test_sizes_that_cannot_be(folder, vision, words):
    edit_json(folder / "config.json", vision_config=vision)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        Processor.from_folder(folder)
    assert str(folder / "config.json") in sentence(error)


@pytest.mark.parametrize(("vision", "count"), [(None, 256), ({}, 196), ({"image_size": 112}, 49)])
def test_absent_sizes_are_those_of_the_model(folder, vision, count):
    edit_json(folder / "config.json", vision_config=vision)
    (folder / "preprocessor_config.json").unlink()
    processor = Processor.from_folder(folder)
    assert processor.num_image_tokens == read_config(folder).num_image_tokens == count
    assert processor.image_size == read_config(folder).vision.image_size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.485, 0.456, 0.406]),
        ("image_std", [1, 1, 1]),
        ("resample", 2),
        ("size", {"height": 224, "width": 224}),
        ("size", 112),
        ("rescale_factor", 1.0),
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("image_seq_length", 256),
    ],
)
@pytest.mark.parametrize("layout", ["old", "new"])
def test_pictures_prepared_in_another_way(folder, key, value, layout):
    """A model that was taught with other pictures must not be shown ours. The new file holds the settings one step down."""
    path = folder / "preprocessor_config.json"
    edit_json(path, **{key: value})
    if layout == "new":
        settings = {"image_processor": json.loads(path.read_text())}
        path.unlink()
        path = folder / "processor_config.json"
        path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(f"{key} is {value!r}, expected")) as error:
        Processor.from_folder(folder)
    assert str(path) in sentence(error)


def test_settings_that_are_no_table(folder):
    (folder / "processor_config.json").write_text('{"image_processor": 5}')
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'processor_config.json'}: image_processor is 5")):
        Processor.from_folder(folder)


def test_settings_that_are_left_out(folder):
    (folder / "preprocessor_config.json").write_text('{"do_convert_rgb": null, "resample": null}')
    assert Processor.from_folder(folder).image_size == 112


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_cut_off(folder, name):
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("piece", ["<pad>", "<bos>", "<eos>"])
def test_a_tokenizer_of_another_model(folder, piece):
    """It reads well, and lacks a piece without which no row can be laid out."""
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table["added_tokens"] = [entry for entry in table["added_tokens"] if entry["content"] != piece]
    table["model"]["vocab"]["[other]"] = table["model"]["vocab"].pop(piece)
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=re.escape(f"{path} has no piece {piece}")) as error:
        Tokenizer.from_folder(folder)
    sentence(error)


def test_listed_pieces_get_their_ids(folder, tokenizer):
    size = tokenizer.vocab_size
    path = folder / "added_tokens.json"
    for name in ("tokenizer.json", "tokenizer.model"):
        path.write_text(json.dumps({"<two>": size + 1, "<image>": size - 1, "<one>": size, "<one>s": size + 2}))
        (folder / name).write_bytes((POCKET / name).read_bytes())
        found = Tokenizer.from_folder(folder)
        assert found.encode("a<one><two>") == [*tokenizer.encode("a"), size, size + 1]
        assert found.encode("<one>s<one>") == [size + 2, size]  # the longest name wins
        for wrong in ({"<one>": size + 7}, {"<image>": 3}, {"<one>": "7"}, {"<one>": None}):
            path.write_text(json.dumps(wrong))
            with pytest.raises(ValueError, match=re.escape(str(path))) as error:
                Tokenizer.from_folder(folder)
            sentence(error)
        (folder / "tokenizer.json").unlink(missing_ok=True)


def test_saved_and_read_again(folder, tmp_path):
    for names in (("tokenizer.json", "tokenizer.model"), ("tokenizer.model",), ("tokenizer.json",)):
        source, target = tmp_path / f"from-{len(names)}-{names[0]}", tmp_path / f"to-{len(names)}-{names[0]}"
        source.mkdir()
        for name in (*names, "config.json", "preprocessor_config.json", "tokenizer_config.json"):
            shutil.copy(folder / name, source)
        processor = Processor.from_folder(source)
        processor.save(target / "deep")
        shutil.copy(source / "config.json", target / "deep")
        assert {path.name for path in (target / "deep").iterdir()} == {path.name for path in source.iterdir()}
        for name in (*names, "tokenizer_config.json"):
            assert (target / "deep" / name).read_bytes() == (source / name).read_bytes()
        again = Processor.from_folder(target / "deep")
        before, after = (one.prepare([PICTURE], ["a <loc0001> é"], ["b"]) for one in (processor, again))
        assert all(torch.equal(value, vars(after)[name]) for name, value in vars(before).items())


def test_saving_over_what_is_there(folder, tmp_path):
    processor = Processor.from_folder(folder)
    before = {path.name for path in folder.iterdir()}
    (folder / "tokenizer.json").write_bytes(b"old")
    os.link(folder / "tokenizer.json", tmp_path / "link")
    processor.save(folder)
    assert (
        tmp_path / "link"
    ).read_bytes() == b"old"  # moved into place, not written over: a reader has one or the other
    assert Processor.from_folder(folder).tokenizer.encode("a star") == processor.tokenizer.encode("a star")
    assert {path.name for path in folder.iterdir()} == before


def test_saving_where_nothing_can_be_written(folder, tmp_path):
    processor = Processor.from_folder(folder)
    file = tmp_path / "file"
    file.write_bytes(b"here first")
    with pytest.raises(ValueError, match=f"{file} is a file: expected a folder"):
        processor.save(file)
    assert file.read_bytes() == b"here first"
    with pytest.raises(RuntimeError, match="cannot be written"):
        processor.save(file / "inside")
    target = tmp_path / "target"
    (target / "tokenizer.json").mkdir(parents=True)  # a folder sits where a file should go
    with pytest.raises(RuntimeError, match=f"{target} cannot be written"):
        processor.save(target)
    assert [path for path in target.iterdir() if path.name.startswith(".")] == []
