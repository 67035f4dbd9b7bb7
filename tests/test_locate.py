"""Boxes: tokens to pixels and back, what malformed answers give, overlap against counting pixels, drawing."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sigma_book.locate import Detection, compare_boxes, draw_boxes, encode_boxes, iou, parse

BOX = "<loc0100><loc0200><loc0300><loc0400>"
GOOD = f"{BOX} cat"


@pytest.mark.parametrize("size", [1, 112, 224, 333, 4000])
def test_every_bin_comes_back(size):
    for index in range(1024):
        edge = index / 1023 * size
        text = encode_boxes([(0, 0, edge, edge)], ["x"], size, size)
        assert text.count(f"<loc{index:04d}>") >= 2
        (found,), remarks = parse(text, size, size)
        assert not remarks
        assert found.box == pytest.approx((0, 0, edge, edge), abs=1e-9 * size)


edges = st.floats(0, 1)


@given(edges, edges, edges, edges, st.integers(1, 5000), st.integers(1, 5000))
def test_a_box_moves_by_half_a_bin_at_most(a, b, c, d, height, width):
    box = (min(a, b) * height, min(c, d) * width, max(a, b) * height, max(c, d) * width)
    (found,), _ = parse(encode_boxes([box], ["thing"], height, width), height, width)
    for edge, other, size in zip(box, found.box, (height, width) * 2, strict=True):
        assert abs(edge - other) <= size / 1023 / 2 * (1 + 1e-9)


def test_order_is_y_before_x_and_edges_are_clipped():
    assert encode_boxes([(0, 50, 100, 200)], ["cat"], 100, 200) == "<loc0000><loc0256><loc1023><loc1023> cat"
    assert encode_boxes([(-5, 0, 300, 10)], ["cat"], 100, 10) == "<loc0000><loc0000><loc1023><loc1023> cat"


def test_several_boxes_keep_their_order_and_labels():
    boxes, labels = [(0, 0, 10, 10), (20, 20, 30, 40)], ["red star", "blue ring"]
    found, remarks = parse(encode_boxes(boxes, labels, 112, 112), 112, 112)
    assert [detection.label for detection in found] == labels and not remarks


@pytest.mark.parametrize(
    ("answer", "labels", "words"),
    [
        ("", [], ["empty"]),
        ("a cat on a mat", [], ["no loc token"]),
        ("<loc0001><loc0002><loc0003> dog", [], ["3 loc tokens"]),
        (f"{GOOD} ; <loc0001><loc0002><loc0003> dog", ["cat"], ["Part 2", "3 loc tokens"]),
        ("<loc0001><loc0002><loc0003><loc0004><loc0005> dog", ["dog"], ["5 loc tokens"]),
        ("<loc0100><loc0200><loc0300><loc0400>", [""], ["no label"]),
        ("<loc0300><loc0200><loc0100><loc0400> cat", [], ["ends before it begins"]),
        ("<loc0100><loc0400><loc0300><loc0200> cat", [], ["ends before it begins"]),
        (f"look: {GOOD}", ["cat"], ["'look:'"]),
        ("<loc1024><loc0200><loc0300><loc0400> cat", [], ["above 1023"]),
        (f"{GOOD} <seg003>", ["cat"], ["seg"]),
        (BOX + "<seg001>" * 16 + " cat", ["cat"], []),
        (BOX + "<seg001>" * 15 + " cat", ["cat"], ["15 seg tokens, a mask takes 16"]),
        (BOX + "<seg001>" * 17 + " cat", ["cat"], ["17 seg tokens", "first 16 were read"]),
        (BOX + "<seg001>" * 15 + "<seg128> cat", ["cat"], ["a seg token above 127"]),
        (BOX + "<seg001>" * 16, [""], ["no label"]),
        ("<loc0100><seg001><loc0200><loc0300><loc0400> cat", ["cat"], ["1 seg token where no mask stands"]),
        ("<loc0100><seg001><loc0200><loc0300> cat", [], ["3 loc tokens", "1 seg token"]),
        ("<seg001>" * 16 + " cat", [], ["no loc token"]),
        (f"{GOOD} ; ", ["cat"], ["Part 2 is empty"]),
        (f"{GOOD};{GOOD}", ["cat", "cat"], []),
    ],
)
def test_what_can_be_read_is_read_and_the_rest_is_told(answer, labels, words):
    found, remarks = parse(answer, 112, 112)
    assert [detection.label for detection in found] == labels
    for word in words:
        assert any(word in remark for remark in remarks), remarks
    assert bool(remarks) == bool(words)


PIECES = ["<loc0000>", "<loc0512>", "<loc1023>", "<loc1024>", "<loc00", "<seg003>", "<seg127>", "<seg128>"]
PIECES += ["<loc0001><loc0002><loc0900><loc1023>", "<seg003>" * 16, " ; ", ";", " cat", "<", ">", "\n", "loc"]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=25).map("".join))
def test_no_text_breaks_the_reader(text):
    found, remarks = parse(text, 100, 100)
    assert all(0 <= edge <= 100 for detection in found for edge in detection.box)
    assert all(isinstance(remark, str) for remark in remarks)


@given(st.lists(st.tuples(*[st.integers(0, 1023)] * 4, st.lists(st.integers(0, 127), min_size=16, max_size=16))))
def test_masks_survive_the_way_to_text_and_back(things):
    boxes = [(min(y), min(x), max(y), max(x)) for a, b, c, d, _ in things for y, x in [((a, c), (b, d))]]
    codes, labels = [row[4] for row in things], [f"thing {number}" for number in range(len(things))]
    text = encode_boxes(boxes, labels, 1023, 1023, codes)
    found, remarks = parse(text, 1023, 1023)
    assert remarks == ([] if things else ["The answer is empty."])
    assert [(d.label, d.box, list(d.codes)) for d in found] == list(zip(labels, boxes, codes))


@pytest.mark.parametrize("codes", [[], [1] * 15, [1] * 17, [1] * 15 + [128], [1] * 15 + [-1]])
def test_codes_that_are_no_mask(codes):
    with pytest.raises(ValueError, match="a mask is 16 codes from 0 to 127"):
        encode_boxes([(0, 0, 1, 1)], ["x"], 10, 10, [codes])


@pytest.mark.parametrize("label", ["", "  ", "a;b", "<loc0001>", "x <seg1", "<loc"])
def test_labels_that_could_not_be_read_back(label):
    with pytest.raises(ValueError, match="could not be read back"):
        encode_boxes([(0, 0, 1, 1)], [label], 10, 10)


def test_boxes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="1 boxes and 1 labels and 2 masks"):
        encode_boxes([(0, 0, 1, 1)], ["x"], 10, 10, [[1] * 16] * 2)
    with pytest.raises(ValueError, match="as many"):
        encode_boxes([(0, 0, 1, 1)], [], 10, 10)
    with pytest.raises(ValueError, match="ends before it begins"):
        encode_boxes([(5, 0, 1, 1)], ["x"], 10, 10)


boxes = st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@given(boxes, boxes)
def test_overlap_is_counted_pixels(one, other):
    grids = []
    for top, left, bottom, right in (one, other):
        grid = np.zeros((13, 13), dtype=bool)
        grid[top:bottom, left:right] = True
        grids.append(grid)
    together = (grids[0] | grids[1]).sum()
    expected = (grids[0] & grids[1]).sum() / together if together else 0.0
    assert iou(one, other) == pytest.approx(expected)
    assert iou(one, other) == iou(other, one)


def test_pairing_is_the_best_of_all():
    rng = random.Random(0)
    for _ in range(200):
        truth, found = (
            [
                (y, x, y + rng.randint(2, 8), x + rng.randint(2, 8))
                for y, x in ((rng.randint(0, 9), rng.randint(0, 9)) for _ in range(n))
            ]
            for n in (3, rng.randint(0, 4))
        )
        padded = [*found, *[(0, 0, 0, 0)] * (3 - len(found))]
        best = max(
            sum(iou(t, padded[j]) for t, j in zip(truth, p)) for p in itertools.permutations(range(len(padded)), 3)
        )
        good, mean = compare_boxes(found, truth)
        assert mean == pytest.approx(best / 3)
        assert not good or len(found) == 3


def test_found_is_what_covers_half():
    truth = [(0, 0, 10, 10)]
    assert compare_boxes([(0, 0, 10, 5)], truth) == (True, 0.5)
    assert not compare_boxes([(0, 0, 10, 4.9)], truth)[0]


def test_found_and_overlap_may_come_from_two_pairings():
    """Side by side 1 and 4/9, crosswise 0.6 and 0.7: the first have the larger sum, of the second both count as found."""
    truth, found = [(0, 0, 10, 10), (0, 0, 10, 7)], [(0, 0, 10, 10), (0, 3, 10, 9)]
    assert compare_boxes(found, truth) == (True, pytest.approx((1 + 4 / 9) / 2))


def test_many_boxes_are_paired():
    """Sixty boxes, each moved a little, in another order: pairing them back is the best that can be done."""
    rng = random.Random(0)
    truth = [(y * 20, x * 20, y * 20 + 10, x * 20 + 10) for y in range(6) for x in range(10)]
    found = [(y0 + 1, x0, y1 + 1, x1) for y0, x0, y1, x1 in truth]
    rng.shuffle(found)
    assert compare_boxes(found, truth) == (True, pytest.approx(9 / 11))


def test_one_too_many_is_not_right():
    truth = [(0, 0, 10, 10)]
    assert compare_boxes(truth, truth) == (True, 1.0)
    assert compare_boxes([*truth, (50, 50, 60, 60)], truth) == (False, 1.0)
    assert compare_boxes([], truth) == (False, 0.0)
    assert compare_boxes([(0, 0, 10, 4)], truth)[0] is False
    with pytest.raises(ValueError, match="no true box"):
        compare_boxes([], [])


@pytest.mark.parametrize(
    "label", ["cat", "", "猫 🐈", "a very long label that is wider than the whole picture it stands in", "x\ny"]
)
@pytest.mark.parametrize(
    ("size", "ground"), [((112, 112), "white"), ((40, 20), "black"), ((1200, 900), "grey"), ((3, 3), "white")]
)
def test_drawing_marks_the_box_and_leaves_the_picture_as_it_was(label, size, ground):
    picture = Image.new("RGB", size, ground)
    width, height = size
    drawn = draw_boxes(picture, [Detection(label, (height * 0.4, width * 0.3, height * 0.9, width * 0.8))])
    assert drawn.size == size and picture.getcolors() == [(width * height, picture.getpixel((0, 0)))]
    assert drawn.getpixel((round(width * 0.5), round(height * 0.4))) != picture.getpixel((0, 0))


def test_a_label_at_the_upper_edge_stays_inside():
    picture = Image.new("RGB", (200, 200), "white")
    drawn = np.asarray(draw_boxes(picture, [Detection("star", (0, 150, 60, 199))]))
    plain = np.asarray(draw_boxes(picture, [Detection("", (0, 150, 60, 199))]))
    rows, columns = np.nonzero((drawn != plain).any(-1))
    assert len(rows) > 50 and rows.min() >= 0 and columns.max() <= 199
