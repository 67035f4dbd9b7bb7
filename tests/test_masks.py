"""Masks: both networks against plain numpy, random files, cutting and pasting against Pillow, drawing, JSON.

The real file is published elsewhere and is not here: arrays are random, of the published shapes, and of odd ones.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from sigma_book.cli import main
from sigma_book.locate import (
    MASKS_VARIABLE,
    Detection,
    MaskVAE,
    cut_mask,
    describe,
    draw,
    draw_boxes,
    encode_boxes,
    load_mask_vae,
    parse,
    paste_mask,
    run_lengths,
)

PUBLISHED = {"down": (64, 128, 128, 128), "up": (128, 128, 64, 32, 16), "code": 512}
HALVED = {"down": (16, 32, 64, 128), "up": (128, 64, 32, 16, 8), "code": 512}
ODD = {"down": (3, 5, 7, 11), "up": (13, 7, 5, 3, 2), "code": 6}
CODES = "".join(f"<seg{code:03d}>" for code in (5, 99, 0, 127, 64, 31, 8, 77, 1, 2, 3, 4, 100, 101, 102, 103))


def random_arrays(down, up, code, seed=0) -> dict[str, np.ndarray]:
    """The names and shapes of the published file, written out one by one."""
    rng = np.random.default_rng(seed)
    shapes = {"_vq_vae._embedding": (128, code)}
    for place, (before, after) in zip((0, 2, 4, 6), zip((1, *down), down)):
        shapes |= {f"encoder.{place}.weight": (after, before, 4, 4), f"encoder.{place}.bias": (after,)}
    shapes |= {"encoder.10.weight": (code, down[3], 1, 1), "encoder.10.bias": (code,)}
    shapes |= {"decoder.0.weight": (up[0], code, 1, 1), "decoder.0.bias": (up[0],)}
    for side, numbers, width in (("encoder", (8, 9), down[3]), ("decoder", (2, 3), up[0])):
        for number in numbers:
            for layer, reach in ((0, 3), (2, 3), (4, 1)):
                shapes[f"{side}.{number}.net.{layer}.weight"] = (width, width, reach, reach)
                shapes[f"{side}.{number}.net.{layer}.bias"] = (width,)
    for place, (before, after) in zip((4, 6, 8, 10), zip(up, up[1:])):
        shapes |= {f"decoder.{place}.weight": (before, after, 4, 4), f"decoder.{place}.bias": (after,)}
    shapes |= {"decoder.12.weight": (1, up[4], 1, 1), "decoder.12.bias": (1,)}
    arrays = {}
    for name, shape in shapes.items():
        size = max(1, int(np.prod(shape[1:])))
        arrays[name] = (rng.standard_normal(shape) * (1.5 / size) ** 0.5).astype(np.float32)
    return arrays


# the second version, in plain numpy and float64


def convolve(x, weight, bias, stride=1, pad=0):
    """(C, H, W) with (O, C, k, k): each output place is a sum over a window."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    reach = weight.shape[-1]
    side = (x.shape[1] - reach) // stride + 1
    out = np.empty((len(weight), side, side))
    for i in range(side):
        for j in range(side):
            window = x[:, i * stride : i * stride + reach, j * stride : j * stride + reach]
            out[:, i, j] = np.tensordot(weight, window, axes=3) + bias
    return out


def spread(x, weight, bias):
    """A transposed convolution, 4 x 4, stride 2: each input place is painted as a stamp, then one rim is cut off."""
    side = x.shape[1]
    out = np.zeros((weight.shape[1], 2 * side + 2, 2 * side + 2))
    for i in range(side):
        for j in range(side):
            out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.tensordot(x[:, i, j], weight, axes=(0, 0))
    return out[:, 1:-1, 1:-1] + bias[:, None, None]


def relu(x):
    return np.maximum(x, 0)


def residual(arrays, name, x):
    def part(layer):
        return arrays[f"{name}.net.{layer}.weight"].astype(float), arrays[f"{name}.net.{layer}.bias"].astype(float)

    inner = relu(convolve(relu(convolve(x, *part(0), pad=1)), *part(2), pad=1))
    return x + convolve(inner, *part(4))


def decode_plainly(arrays, codes) -> np.ndarray:
    x = arrays["_vq_vae._embedding"].astype(float)[codes].T.reshape(-1, 4, 4)
    x = relu(convolve(x, arrays["decoder.0.weight"].astype(float), arrays["decoder.0.bias"]))
    x = residual(arrays, "decoder.3", residual(arrays, "decoder.2", x))
    for place in (4, 6, 8, 10):
        x = relu(spread(x, arrays[f"decoder.{place}.weight"].astype(float), arrays[f"decoder.{place}.bias"]))
    return convolve(x, arrays["decoder.12.weight"].astype(float), arrays["decoder.12.bias"])[0]


def encode_plainly(arrays, mask) -> np.ndarray:
    """The squared distance of each of the 16 vectors to each of the 128 codes."""
    x = mask[None].astype(float)
    for place in (0, 2, 4, 6):
        weight, bias = arrays[f"encoder.{place}.weight"].astype(float), arrays[f"encoder.{place}.bias"]
        x = relu(convolve(x, weight, bias, stride=2, pad=1))
    x = residual(arrays, "encoder.9", residual(arrays, "encoder.8", x))
    x = convolve(x, arrays["encoder.10.weight"].astype(float), arrays["encoder.10.bias"])
    vectors = x.reshape(len(x), 16).T
    return ((vectors[:, None] - arrays["_vq_vae._embedding"].astype(float)[None]) ** 2).sum(-1)


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory):
    """Random, and shifted so that about half of a mask is inside."""
    path = tmp_path_factory.mktemp("masks") / "vae-oid.npz"
    arrays = random_arrays(**ODD)
    arrays["decoder.12.bias"] -= np.median(decode_plainly(arrays, [int(code) for code in re.findall("[0-9]+", CODES)]))
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def odd_vae(odd_file):
    return load_mask_vae(odd_file)


@pytest.mark.parametrize("sizes", [PUBLISHED, HALVED, ODD], ids=["published", "halved", "odd"])
def test_both_networks_are_what_numpy_says(tmp_path, sizes):
    """Float32 sums of up to 2,048 products against float64: 1e-5 of the largest value. A code may differ only in a tie."""
    arrays = random_arrays(**sizes)
    np.savez(tmp_path / "vae.npz", **arrays)
    vae = load_mask_vae(tmp_path / "vae.npz")
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 128, (2, 16))
    decoded = vae.decode(torch.from_numpy(codes))
    assert decoded.shape == (2, 64, 64)
    for row, mask in zip(codes, decoded.numpy()):
        expected = decode_plainly(arrays, row)
        assert np.abs(expected).max() > 1e-3
        assert np.abs(mask - expected).max() <= 1e-5 * np.abs(expected).max()
    masks = rng.uniform(-1, 1, (2, 64, 64)).astype(np.float32)
    masks[1] = np.where(masks[1] > 0.3, 1, -1)
    chosen = vae.encode(torch.from_numpy(masks)).numpy()
    for row, mask in zip(chosen, masks):
        distances = encode_plainly(arrays, mask)
        reached, best = distances[np.arange(16), row], distances.min(1)
        assert (reached - best <= 1e-4 * best).all()
        assert (row == distances.argmin(1)).mean() > 0.8


def test_more_arrays_do_no_harm(tmp_path):
    arrays = random_arrays(**ODD) | {"_vq_vae._ema_w": np.zeros((128, 6), np.float32)}
    np.savez(tmp_path / "vae.npz", **arrays)
    assert load_mask_vae(tmp_path / "vae.npz").encode(torch.zeros(1, 64, 64)).shape == (1, 16)


def test_missing_and_wrong_arrays_are_named(tmp_path):
    arrays = random_arrays(**ODD)
    path = tmp_path / "vae.npz"
    for name in arrays:
        np.savez(path, **{other: array for other, array in arrays.items() if other != name})
        with pytest.raises(ValueError, match=f"(lacks|array) .*{re.escape(name)}"):
            load_mask_vae(path)
    for name in ("encoder.8.net.2.weight", "decoder.12.bias", "decoder.6.weight", "_vq_vae._embedding"):
        np.savez(path, **arrays | {name: np.zeros((2, *arrays[name].shape[1:]), np.float32)})
        with pytest.raises(ValueError, match="has the shape .*, expected"):
            load_mask_vae(path)
    np.savez(path, **arrays | {"encoder.0.bias": np.array([None], dtype=object)})
    with pytest.raises(ValueError, match="holds Python objects"):
        load_mask_vae(path)
    path.write_bytes(b"PK not quite")
    with pytest.raises(ValueError, match="no .npz file"):
        load_mask_vae(path)


def test_without_the_file(monkeypatch, tmp_path, odd_file):
    monkeypatch.delenv(MASKS_VARIABLE, raising=False)
    picture = Image.new("RGB", (64, 64), "white")
    answer = f"<loc0100><loc0100><loc0900><loc0900>{CODES} cat"
    for ask in (load_mask_vae, lambda: draw(picture, answer), lambda: load_mask_vae(tmp_path / "absent.npz")):
        with pytest.raises(FileNotFoundError, match="gs://big_vision/paligemma/vae-oid.npz.*SIGMA_BOOK_MASKS"):
            ask()
    assert draw(picture, "<loc0100><loc0100><loc0900><loc0900> cat").size == (256, 256)  # boxes need no file
    monkeypatch.setenv(MASKS_VARIABLE, str(odd_file))
    assert draw(picture, answer).size == (256, 256)


# between masks and boxes


def triangles(before: int, after: int) -> np.ndarray:
    """(after, before): how much each old value counts for each new one, a triangle as wide as two new or old pixels."""
    centre = (np.arange(after) + 0.5) * before / after
    distance = np.abs(np.arange(before) + 0.5 - centre[:, None]) / max(1.0, before / after)
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(1, keepdims=True)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.tuples(*[st.floats(0, 1)] * 4), st.integers(0, 99))
def test_cut_and_paste_are_weighted_means(height, width, edges, seed):
    """Written as two matrix products in float64; values within 1e-5 of 0 may fall on either side."""
    rng = np.random.default_rng(seed)
    a, b, c, d = edges
    box = (min(a, c) * height, min(b, d) * width, max(a, c) * height, max(b, d) * width)
    top, left = min(round(box[0]), height - 1), min(round(box[1]), width - 1)
    bottom, right = max(round(box[2]), top + 1), max(round(box[3]), left + 1)
    mask = rng.random((height, width)) < 0.5
    expected = 2 * (triangles(bottom - top, 64) @ mask[top:bottom, left:right] @ triangles(right - left, 64).T) - 1
    assert np.abs(cut_mask(torch.from_numpy(mask), box).numpy() - expected).max() < 1e-5
    square = rng.standard_normal((64, 64)).astype(np.float32)
    values = np.full((height, width), -1.0)
    values[top:bottom, left:right] = triangles(64, bottom - top) @ square @ triangles(64, right - left).T
    pasted = paste_mask(torch.from_numpy(square), box, height, width).numpy()
    assert (pasted == (values > 0))[np.abs(values) > 1e-5].all()


def test_a_mask_goes_to_text_and_back(odd_vae):
    mask = torch.zeros(50, 80, dtype=torch.bool)
    mask[10:30, 20:60] = True
    codes = odd_vae.codes_of(mask, (10, 20, 30, 60))
    assert len(codes) == 16 and all(0 <= code < 128 for code in codes)
    text = encode_boxes([(10, 20, 30, 60)], ["cat"], 50, 80, [codes])
    (found,), remarks = parse(text, 50, 80)
    assert found.codes == codes and not remarks
    square = odd_vae.decode(torch.tensor([codes]))[0]
    assert torch.equal(odd_vae.mask_of(found, 50, 80), paste_mask(square, found.box, 50, 80))


def test_masks_that_make_no_sense():
    for mask in (torch.zeros(4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="a mask is boolean"):
            cut_mask(mask, (0, 0, 1, 1))
    with pytest.raises(ValueError, match="four finite numbers"):
        cut_mask(torch.zeros(4, 4, dtype=torch.bool), (0, 0, float("nan"), 1))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_run_lengths_are_coco_s(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    lengths = run_lengths(torch.from_numpy(mask))
    read = coco.decode(coco.frPyObjects({"size": [height, width], "counts": lengths}, height, width))
    assert np.array_equal(read.astype(bool), mask)


# drawing and JSON


@pytest.mark.parametrize("ground", ["white", "black", "grey", "#e69f00"])
@pytest.mark.parametrize("size", [(20, 20), (112, 112), (900, 400)])
def test_a_mask_shows_on_any_ground(odd_vae, ground, size):
    width, height = size
    answer = f"<loc0100><loc0100><loc0900><loc0900>{CODES} cat"
    picture = Image.new("RGB", size, ground)
    if height < 100:  # such a picture is enlarged
        width, height = size = (200, 200)
    drawn = np.asarray(draw(picture, answer, odd_vae)).astype(int)
    boxes_only = np.asarray(draw(picture, answer.replace(CODES, ""))).astype(int)
    (found,), _ = parse(answer, height, width)
    mask = odd_vae.mask_of(found, height, width).numpy()
    assert mask.any() and drawn.shape == (height, width, 3)
    covered = np.zeros_like(mask)  # by lines and the label
    for plain in ("white", "black"):
        empty = Image.new("RGB", size, plain)
        covered |= (np.asarray(draw(empty, answer.replace(CODES, ""))) != np.asarray(empty)).any(-1)
    changed = (drawn != boxes_only).any(-1)
    if ground == "#e69f00":  # the mask's own colour: its black rim is what can be seen
        assert changed.any()
    else:
        assert changed[mask & ~covered].all()
    assert len(picture.getcolors()) == 1  # the picture given stays


def test_draw_takes_what_the_processor_takes(tmp_path, pictures):
    path = tmp_path / "scene.png"
    pictures[0].save(path)
    answer = "<loc0100><loc0100><loc0900><loc0900> cat"
    assert (
        draw(path, answer)
        == draw(str(path), answer)
        == draw(pictures[0], answer)
        == draw(np.array(pictures[0]), answer)
    )
    assert draw(pictures[0], "no box here") == pictures[0].convert("RGB")


def test_masks_of_another_picture():
    picture, thing = Image.new("RGB", (30, 20)), Detection("cat", (0, 0, 9, 9))
    mask = torch.ones(20, 30, dtype=torch.bool)
    assert draw_boxes(picture, [thing, thing], [mask, None]).size == (30, 20)
    for masks in ([mask], [mask, mask.t()], []):
        with pytest.raises(ValueError, match="2 detections on 20 x 30 pixels"):
            draw_boxes(picture, [thing, thing], masks)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((20, 20), (200, 200)),
        ((20, 30), (200, 300)),
        ((1, 1), (200, 200)),
        ((99, 99), (297, 297)),
        ((100, 100), (100, 100)),
    ]
    + [((3, 1500), (3, 1500)), ((50, 1000), (100, 2000)), ((4000, 3000), (4000, 3000))],
)
def test_small_pictures_are_enlarged(size, drawn):
    picture = draw(Image.new("RGB", size, "white"), "<loc0300><loc0300><loc0700><loc0700> cat")
    assert picture.size == drawn
    assert len(picture.getcolors(2**24)) > 2


def test_describe(odd_vae):
    answer = f"<loc0000><loc0100><loc0500><loc1023>{CODES} cat ; <loc0001> dog"
    plain = describe(answer, 100, 200)
    assert (plain["width"], plain["height"]) == (200, 100)
    (thing,) = plain["things"]
    assert thing["label"] == "cat" and len(thing["codes"]) == 16 and "mask" not in thing
    assert (thing["x_min"], thing["y_max"]) == (pytest.approx(100 / 1023 * 200), pytest.approx(500 / 1023 * 100))
    assert "1 loc token" in plain["remarks"][0] and "vae-oid.npz" in plain["remarks"][1]
    full = describe(answer, 100, 200, odd_vae)
    (thing,) = json.loads(json.dumps(full))["things"]
    mask = coco.decode(coco.frPyObjects(thing["mask"], 100, 200)).astype(bool)
    (found,), _ = parse(answer.split(" ; ")[0], 100, 200)
    assert np.array_equal(mask, odd_vae.mask_of(found, 100, 200).numpy())
    assert len(full["remarks"]) == 1
    assert describe("hello", 10, 10)["things"] == []


# the command line


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_the_command_draws_and_describes(capsys, tmp_path, tiny_folder, picture_file, odd_file, monkeypatch):
    monkeypatch.delenv(MASKS_VARIABLE, raising=False)
    ask = [
        "generate",
        picture_file,
        "segment cat",
        "--model",
        tiny_folder,
        "--grammar",
        "segment",
        "--max-new-tokens",
        "24",
    ]
    code, answer, error = run(capsys, *ask)
    assert code == 0 and error == "" and not parse(answer.strip(), 112, 112)[1]
    out = tmp_path / "out.png"
    code, text, error = run(capsys, *ask, "--save", out)
    assert code == 2 and text == answer and "vae-oid.npz" in error and not out.exists()
    code, text, error = run(capsys, *ask, "--save", out, "--masks", odd_file)
    assert (code, text, error) == (0, answer, "")
    with Image.open(picture_file) as picture, Image.open(out) as drawn:
        assert drawn.size == picture.size
        assert drawn.convert("RGB") == draw(picture, answer, load_mask_vae(odd_file))
    assert list(tmp_path.iterdir()) == [out]
    code, text, error = run(capsys, *ask, "--json", "--masks", odd_file)
    described = json.loads(text)
    assert code == 0 and described["prompt"] == "segment cat" and described["answer"] == answer.strip()
    assert described["things"][0]["mask"]["size"] == [112, 112] and described["remarks"] == []
    monkeypatch.setenv(MASKS_VARIABLE, str(odd_file))
    assert run(capsys, *ask, "--json")[1] == text
    short = ["generate", picture_file, "x", "--model", tiny_folder, "--max-new-tokens", "1", "--stream"]
    for name in ("a.jpg", "b.WEBP", "c.tiff"):
        assert run(capsys, *short, "--save", tmp_path / name)[0] == 0
        with Image.open(tmp_path / name) as drawn:
            assert drawn.size == (112, 112)


def test_remarks_go_to_standard_error(capsys, tmp_path, tiny_folder, picture_file):
    ask = [
        "generate",
        picture_file,
        "x",
        "--model",
        tiny_folder,
        "--max-new-tokens",
        "3",
        "--save",
        tmp_path / "out.png",
    ]
    code, answer, error = run(capsys, *ask)
    assert code == 0 and answer.strip() and error.startswith("sigma-book: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.txt", "expected a name that ends in"),
        ("out", "expected a name that ends in"),
        ("no/such/out.png", "no such folder"),
    ],
)
def test_names_that_cannot_be_saved(capsys, tmp_path, tiny_folder, picture_file, name, words):
    code, out, error = run(capsys, "generate", picture_file, "x", "--model", tiny_folder, "--save", tmp_path / name)
    assert code == 2 and out == "" and words in error and "\n" not in error.strip()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_picture(capsys, tmp_path, tiny_folder, picture_file):
    (tmp_path / "out.png").mkdir()
    code, out, error = run(
        capsys, "generate", picture_file, "x", "--model", tiny_folder, "--save", tmp_path / "out.png"
    )
    assert code == 2 and "is a folder" in error


def test_a_full_disk_leaves_the_old_picture(tmp_path, tiny_folder, picture_file):
    """A limit on the size of files stands for the disk: the old picture stays, no half of a new one does."""
    out = tmp_path / "out.bmp"
    out.write_bytes(b"old")
    command = f"ulimit -f 4; '{sys.executable}' -m sigma_book.cli generate '{picture_file}' x --model '{tiny_folder}' --save '{out}'"
    command = f"trap '' XFSZ; {command}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


def test_the_module_is_the_file(odd_vae, odd_file):
    with np.load(odd_file, allow_pickle=False) as arrays:
        assert set(arrays.files) == set(odd_vae.state_dict())
    assert isinstance(odd_vae, MaskVAE) and not odd_vae.training
    assert Detection("cat", (0, 0, 1, 1)).codes == ()
