"""Saying where.

How can a model that only speaks point at a thing?

Tangled from chapters/14_locate.py: edit there, then run python -m sigma_book.tangle.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from PIL import Image, ImageDraw, ImageFont

__all__ = ["BINS", "Box", "Detection", "compare_boxes", "draw_boxes", "encode_boxes", "iou", "parse"]

BINS = 1024
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """A named box: (y_min, x_min, y_max, x_max) in pixels of the picture that was asked about."""

    label: str
    box: Box


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


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, 0 to 1; a box without area overlaps nothing."""
    height = min(first[2], second[2]) - max(first[0], second[0])
    width = min(first[3], second[3]) - max(first[1], second[1])
    if height <= 0 or width <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return height * width / (sum(areas) - height * width)


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
