# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Saying where
#
# *How can a model that only speaks point at a thing?*
#
# **You build** boxes from tokens and tokens from boxes, and draw them. **You need** chapter 13 (generation).
# **Exports** the module `sigma_book.locate`.

# %%
# | export
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from PIL import Image, ImageDraw, ImageFont

# %%
import random

import matplotlib.pyplot as plt

from sigma_book import generate
from sigma_book.style import GREY, PICTURE, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()

# %% [markdown]
# ## The picture
#
# PaliGemma has no output for coordinates. It has words. So 1,024 words of its vocabulary are made into places along an
# edge: `<loc0000>` is one end, `<loc1023>` the other. Four of them are a box.

# %%
scene = make_scene(155)
picture = draw_scene(scene)
thing = next(thing for thing in scene.things if thing.kind == "red star")
top, left, bottom, right = thing.box
figure, axis = plt.subplots(figsize=(3.6, 3.4))
axis.imshow(picture)
axis.add_patch(plt.Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec=PICTURE, lw=2))
for edge, name in ((top, "y min"), (bottom, "y max")):
    axis.axhline(edge - 0.5, color=GREY, lw=0.7, ls="--")
    axis.text(114, edge, f"{name}: {round(edge / 112 * 1023)}", va="center", fontsize=8)
for edge, name in ((left, "x min"), (right, "x max")):
    axis.axvline(edge - 0.5, color=GREY, lw=0.7, ls="--")
    axis.text(edge, -4, f"{name}:\n{round(edge / 112 * 1023)}", ha="center", fontsize=8)
axis.axis("off")
save(figure, "14_edges")
plt.show()

# %% [markdown]
# *A scene with a box around the red star. Dashed lines carry its four edges to the rim, where the bins are written.*
#
# The prompt is `detect red star`, the answer four loc tokens and the label. The order is y before x: top, left,
# bottom, right. Several things are separated by ` ; `.
#
# ## First by hand


# %%
def bin_naive(pixel: float, size: int) -> int:
    best, nearest = 0, None
    for index in range(1024):  # which of the 1,024 marks lies nearest?
        distance = abs(index / 1023 * size - pixel)
        if nearest is None or distance < nearest:
            best, nearest = index, distance
    return best


[bin_naive(edge, 112) for edge in thing.box]

# %% [markdown]
# ## The formula
#
# $$ \mathrm{bin} = \mathrm{round}\!\left(1023\, \frac{x}{S}\right), \qquad x = \frac{\mathrm{bin}}{1023}\, S $$
#
# **1023 or 1024?** The training data of PaliGemma was written with `round(x * 1023)`, so the last mark is the far edge
# itself and reading divides by 1023; some demos divide by 1024, which shifts a box by a thousandth of the picture at most.

# %%
assert max(abs(index / 1023 - index / 1024) for index in range(1024)) < 0.001

# %%
# | export
BINS = 1024
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """A named box: (y_min, x_min, y_max, x_max) in pixels of the picture that was asked about."""

    label: str
    box: Box


# %%
# | export
def encode_boxes(boxes: Sequence[Box], labels: Sequence[str], height: int, width: int) -> str:
    """Boxes as PaliGemma writes them: four loc tokens and a label, ` ; ` between them.

    Parameters
    ----------
    boxes : sequence of (y_min, x_min, y_max, x_max)
        In pixels.
    labels : sequence of str
    height, width : int
        Of the picture, in pixels.

    Raises
    ------
    ValueError
        If boxes and labels differ in number, or a box lies upside down.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"{len(boxes)} boxes and {len(labels)} labels: there must be as many of each")
    parts = []
    for (top, left, bottom, right), label in zip(boxes, labels):
        if bottom < top or right < left:
            raise ValueError(
                f"box {(top, left, bottom, right)} ends before it begins: expected y_min, x_min, y_max, x_max"
            )
        edges = (top / height, left / width, bottom / height, right / width)
        bins = [min(BINS - 1, max(0, round(edge * (BINS - 1)))) for edge in edges]
        parts.append("".join(f"<loc{index:04d}>" for index in bins) + f" {label}")
    return " ; ".join(parts)


# %%
written = encode_boxes([thing.box], [thing.kind], 112, 112)
assert [bin_naive(edge, 112) for edge in thing.box] == [int(part[:4]) for part in written.split("<loc")[1:]]
written

# %% [markdown]
# ## Reading an answer
#
# A model may write anything: three loc tokens, a box upside down, no label. What can be read is read. What cannot is
# dropped, and a sentence says so, because a box that vanishes silently looks like a thing that was not found.


# %%
# | export
def parse(answer: str, height: int, width: int) -> tuple[list[Detection], list[str]]:
    """Read an answer to `detect` or `segment`: what can be read, and sentences about what could not.

    Parameters
    ----------
    answer : str
        With its loc tokens.
    height, width : int
        Of the picture, in pixels.

    Returns
    -------
    tuple
        Detections in the order of the answer, and remarks on what was dropped.
    """
    found, remarks = [], []
    for number, part in enumerate(answer.split(";"), start=1):
        text = part.strip()
        if not text:
            if len(answer.split(";")) > 1:
                remarks.append(f"part {number} is empty")
            continue
        locs = re.findall(r"<loc(\d{4})>", text)
        before, *_ = re.split(r"<loc\d{4}>", text, maxsplit=1)
        label = re.sub(r"<(?:loc|seg)\d+>", " ", text[len(before) :] if locs else text).strip()
        label = " ".join(label.split())
        if re.search(r"<seg\d+>", text):
            remarks.append(f"part {number} ({text!r}): seg tokens were left aside, only the box was read")
        if len(locs) < 4:
            remarks.append(f"part {number} ({text!r}): {len(locs)} loc tokens where a box takes four; dropped")
            continue
        if len(locs) > 4:
            remarks.append(
                f"part {number} ({text!r}): {len(locs)} loc tokens where a box takes four; the first four were read"
            )
        if before.strip():
            remarks.append(f"part {number}: {before.strip()!r} stands before the box; dropped")
        bins = [int(index) for index in locs[:4]]
        if max(bins) >= BINS:
            remarks.append(f"part {number} ({text!r}): a loc token above <loc{BINS - 1:04d}>; dropped")
            continue
        top, left, bottom, right = (index / (BINS - 1) * size for index, size in zip(bins, (height, width) * 2))
        if bottom < top or right < left:
            remarks.append(f"part {number} ({text!r}): the box ends before it begins; dropped")
            continue
        if not label:
            remarks.append(f"part {number} ({text!r}): no label")
        found.append(Detection(label, (top, left, bottom, right)))
    return found, remarks


# %%
for answer in ("<loc0100><loc0200><loc0300><loc0400> cat ; <loc0001><loc0002><loc0003> dog", "no loc here", written):
    found, remarks = parse(answer, 112, 112)
    print(found, *remarks, sep="\n  ")

# %% [markdown]
# ## Proof
#
# Every bin survives the way to pixels and back, in pictures of any size.

# %%
for size in (112, 224, 333, 4000):
    for index in range(1024):
        pixel = index / 1023 * size
        (back,), remarks = parse(encode_boxes([(0, 0, pixel, size)], ["x"], size, size), size, size)
        assert not remarks and abs(back.box[2] - pixel) < 1e-9 * size

# %% [markdown]
# And a box never moves by more than half a bin.

# %%
rng = random.Random(0)
for _ in range(1000):
    height, width = rng.randint(1, 4000), rng.randint(1, 4000)
    ys, xs = sorted(rng.uniform(0, height) for _ in range(2)), sorted(rng.uniform(0, width) for _ in range(2))
    box = (ys[0], xs[0], ys[1], xs[1])
    (back,), _ = parse(encode_boxes([box], ["thing"], height, width), height, width)
    for edge, other, size in zip(box, back.box, (height, width) * 2, strict=True):
        assert abs(edge - other) <= size / 1023 / 2 + 1e-9

# %% [markdown]
# ## How good is a box?
#
# Two boxes are compared by the area they share, divided by the area they cover together: *intersection over union*, IoU.
# 1 is perfect, 0 is a miss, and by custom 0.5 counts as found.


# %%
# | export
def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, 0 to 1; a box without area overlaps nothing."""
    height = min(first[2], second[2]) - max(first[0], second[0])
    width = min(first[3], second[3]) - max(first[1], second[1])
    if height <= 0 or width <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return height * width / (sum(areas) - height * width)


# %%
def iou_by_pixels(one, other) -> float:
    cover = [{(y, x) for y in range(b[0], b[2]) for x in range(b[1], b[3])} for b in (one, other)]
    together = len(cover[0] | cover[1])
    return len(cover[0] & cover[1]) / together if together else 0.0


for _ in range(300):
    pair = []
    for _ in range(2):
        (y0, y1), (x0, x1) = sorted(rng.sample(range(20), 2)), sorted(rng.sample(range(20), 2))
        pair.append((y0, x0, y1, x1))
    assert abs(iou(*pair) - iou_by_pixels(*pair)) < 1e-12
iou((0, 0, 10, 10), (0, 5, 10, 15))

# %% [markdown]
# With several things, boxes must be paired first, one to one.


# %%
# | export
def compare_boxes(found: Sequence[Box], truth: Sequence[Box], threshold: float = 0.5) -> tuple[bool, float]:
    """Were all things found, and how well?

    Boxes are paired one to one so that the sum of their overlaps is largest (all pairings are tried: few boxes).

    Returns
    -------
    tuple
        Whether every true box has a partner of at least `threshold` and no box is left over; and the mean overlap
        over the true boxes, where one without a partner counts 0.

    Raises
    ------
    ValueError
        If there is no true box.
    """
    if not truth:
        raise ValueError("there is no true box to compare with")
    rows = list(found)[: len(truth) + 3]  # boxes beyond a few too many cannot change the verdict
    rows += [(0.0, 0.0, 0.0, 0.0)] * (len(truth) - len(rows))
    overlap = [[iou(box, true) for box in rows] for true in truth]
    pairings = permutations(range(len(rows)), len(truth))
    best = max(([overlap[i][j] for i, j in enumerate(pairing)] for pairing in pairings), key=sum)
    return len(found) == len(truth) and min(best) >= threshold, sum(best) / len(truth)


# %%
truth = [(0, 0, 10, 10), (20, 20, 30, 30)]
print(compare_boxes([(21, 20, 30, 30), (0, 0, 10, 9)], truth))  # the order does not matter
print(compare_boxes([(0, 0, 10, 10)], truth))  # one is missing
print(compare_boxes([*truth, (50, 50, 60, 60)], truth))  # one too many

# %% [markdown]
# ## Drawing


# %%
# | export
def draw_boxes(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """A copy of a picture with named boxes on it, readable on light and on dark ground."""
    picture = image.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    line = max(1, round(min(picture.size) / 200))
    font = ImageFont.load_default(size=max(9, round(min(picture.size) / 24)))
    for number, detection in enumerate(detections):
        colour = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7")[number % 5]
        top, left, bottom, right = detection.box
        canvas.rectangle((left - line, top - line, right + line, bottom + line), outline="black", width=line)
        canvas.rectangle((left, top, right, bottom), outline=colour, width=line)
        if detection.label:
            _, _, text_width, text_height = canvas.textbbox((0, 0), detection.label, font=font)
            x = min(max(0, left), max(0, picture.width - text_width - 2 * line))
            y = top - text_height - 3 * line
            y = y if y >= 0 else min(bottom + line, max(0, picture.height - text_height - 2 * line))
            plate = (x, y, x + text_width + 2 * line, y + text_height + 2 * line)
            canvas.rectangle(plate, fill=colour, outline="black")
            canvas.text((x + line, y + line // 2), detection.label, fill="black", font=font)
    return picture


# %% [markdown]
# ## A look inside
#
# What the pocket model points at, on a scene it never saw. Two of the boxes of the second picture are one answer.

# %%
figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7))
for axis, (seed, kind) in zip(axes, ((155, "red star"), (155, "brown heart"), (5, "purple heart")), strict=True):
    picture = draw_scene(make_scene(seed))
    answer = generate(picture, f"detect {kind}")
    found, remarks = parse(answer, 448, 448)
    axis.imshow(draw_boxes(picture.resize((448, 448), 0), found))
    axis.set_title(f"detect {kind}", fontsize=9)
    axis.axis("off")
    print(answer, *remarks, sep="\n  ")
save(figure, "14_found")
plt.show()

# %% [markdown]
# *Three scenes with the boxes that the model gave, each with its label on a plate.*
#
# ## The bill
#
# How coarse is a bin?

# %%
for name, size in (("112 px", 112), ("224 px", 224), ("a photograph of 4,000 px", 4000)):
    print(f"{name}: a bin is {size / 1023:.2f} pixels")
assert 224 / 1023 < 0.25 and 3.9 < 4000 / 1023 < 4
tokens = 5 * (4 + 3) + 4
f"five boxes with labels of two words and a separator: about {tokens} tokens, against 1 for 'yes'"

# %% [markdown]
# Far finer than a patch of 14 pixels. A model that is off by a bin is not off by much; it is off because it saw badly.
#
# ## Your turn
#
# **1.** Turn a box in pixels into (x, y, width, height), as COCO files have it.


# %%
def to_coco(box: tuple) -> tuple: ...


check(to_coco, (((10, 20, 40, 80),), (20, 10, 60, 30)))

# %% [markdown]
# **2.** The IoU of a box with itself, moved by a quarter of its width.


# %%
def moved_iou() -> float: ...


check(moved_iou, ((), 0.6))

# %% [markdown]
# **3.** How many loc tokens does an answer hold?


# %%
def count_locs(answer: str) -> int: ...


check(count_locs, ((written,), 4), (("cat",), 0))

# %% [markdown]
# Next: from answering to learning.
