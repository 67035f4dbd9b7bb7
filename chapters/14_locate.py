# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Saying where
#
# *How can a model that only speaks point at a thing?*
#
# **You build** boxes and masks from tokens and back, a grammar for answers, a measure for boxes, and a way to draw them.
# **You need** chapters 01 (scenes), 11 (pictures), 12 (files) and 13 (generation). **Exports** the module `sigma_book.locate`.

# %%
# | export
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

from sigma_book.processor import Tokenizer, load_image
from sigma_book.npz import read_npz_array, read_npz_header

# %%
import random
import tempfile
from dataclasses import replace
from itertools import permutations

import matplotlib.pyplot as plt

from sigma_book import generate, load
from sigma_book.paligemma import count_parameters
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import Scene, draw_scene, make_scene

use_style()

# %% [markdown]
# ## The picture
#
# PaliGemma has no output for coordinates. It has words. So 1,024 words of its vocabulary are made into marks along an
# edge of the picture: `<loc0000>` is one end, `<loc1023>` the other. Four of them are a box.

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
# *Figure: a scene with a box around the red star. Dashed lines carry its four edges to the rim, where the marks are written.*
#
# The prompt is `detect red star`. The answer is four loc tokens and the label. The order is y before x: top, left, bottom,
# right. Several things are separated by ` ; `.
#
# ## First by hand
#
# The marks lie evenly from edge to edge. To write down a place, walk along all of them and keep the nearest. The number
# of a mark is called its *bin*.


# %%
def bin_naive(pixel: float, size: int) -> int:
    best, nearest = 0, math.inf
    for index in range(1024):
        distance = abs(index / 1023 * size - pixel)
        if distance < nearest:
            best, nearest = index, distance
    return best


[bin_naive(edge, 112) for edge in thing.box]

# %% [markdown]
# ## The formula
#
# $$ \mathrm{bin} = \mathrm{round}\!\left(1023\, \frac{x}{S}\right), \qquad x = \frac{\mathrm{bin}}{1023}\, S $$
#
# `x` is a place in pixels and `S` the height or the width of the picture. What lies outside is clipped to 0 or 1023.
#
# **1023 or 1024?** We divide by 1023, because PaliGemma's training targets were written with `round(x * 1023)` and its
# authors' evaluation reads them back so; demos that divide by 1024 are off by less than a thousandth of the picture.

# %%
assert max(abs(index / 1023 - index / 1024) for index in range(1024)) < 0.001

# %% [markdown]
# ## Writing boxes
#
# The shipped version checks its input. A box with its corners exchanged, or a label with a semicolon in it, would teach a
# model nonsense without a word of warning.

# %%
# | export
BINS = 1024
MASK_TOKENS, MASK_CODES = 16, 128  # seg tokens of a mask, and how many different ones there are
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """A named box, and perhaps a mask.

    Parameters
    ----------
    label : str
    box : (y_min, x_min, y_max, x_max)
        In pixels of the picture that was asked about.
    codes : tuple of int
        The 16 numbers, 0 to 127, of the seg tokens of a `segment` answer; empty where there is no mask.
    """

    label: str
    box: Box
    codes: tuple[int, ...] = ()


# %%
# | export
def encode_box(box: Box, height: int, width: int) -> str:
    """One box as four loc tokens: `<loc0073><loc0548><loc0329><loc0804>`.

    A place x on an edge of length S becomes bin round(1023 x / S), halves to the even bin, clipped to 0..1023. These are
    the training targets of big_vision (pp/proj/paligemma/segmentation.py).

    Parameters
    ----------
    box : (y_min, x_min, y_max, x_max)
        In pixels.
    height, width : int
        Of the picture, in pixels.

    Raises
    ------
    ValueError
        If the box is not four finite numbers, ends before it begins, or the picture has no size.
    """
    _check_size(height, width)
    if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
        raise ValueError(f"a box is four finite numbers (y_min, x_min, y_max, x_max), got {tuple(box)}")
    top, left, bottom, right = box
    if bottom < top or right < left:
        raise ValueError(f"box {tuple(box)} ends before it begins: expected (y_min, x_min, y_max, x_max)")
    places = (top / height, left / width, bottom / height, right / width)
    bins = [round(min(1.0, max(0.0, float(place))) * (BINS - 1)) for place in places]
    return "".join(f"<loc{index:04d}>" for index in bins)


def _check_size(height: int, width: int) -> None:
    if not (height > 0 and width > 0):
        raise ValueError(f"a picture has a height and a width above 0, got {height} and {width}")


# %%
# | export
def encode_boxes(
    boxes: Sequence[Box],
    labels: Sequence[str],
    height: int,
    width: int,
    codes: Sequence[Sequence[int]] | None = None,
) -> str:
    """Named boxes as PaliGemma writes them: four loc tokens and a label each, ` ; ` between them.

    With masks, 16 seg tokens stand between the loc tokens and the label.

    Parameters
    ----------
    boxes : sequence of (y_min, x_min, y_max, x_max)
        In pixels.
    labels : sequence of str
        One for each box, not empty. Runs of white space become one space.
    height, width : int
        Of the picture, in pixels.
    codes : sequence, optional
        The 16 codes of each mask, as `MaskVAE.encode` gives them.

    Raises
    ------
    ValueError
        If boxes, labels and codes differ in number, a box is wrong (see `encode_box`), a mask has not 16 codes from 0
        to 127, or a label is empty, or holds `;` or something that reads like a loc or seg token.
    """
    if len(boxes) != len(labels) or (codes is not None and len(codes) != len(boxes)):
        masks = "" if codes is None else f" and {len(codes)} masks"
        raise ValueError(f"{len(boxes)} boxes and {len(labels)} labels{masks}: there must be as many of each")
    parts = []
    for box, label, mask in zip(boxes, labels, codes or [()] * len(boxes), strict=True):
        if not label.split() or ";" in label or _LIKE_TOKEN.search(label):
            raise ValueError(f"label {label!r} could not be read back: give a word, without ';', '<loc' and '<seg'")
        if codes is not None and (len(mask) != MASK_TOKENS or not all(0 <= code < MASK_CODES for code in mask)):
            raise ValueError(f"a mask is {MASK_TOKENS} codes from 0 to {MASK_CODES - 1}, got {list(mask)!r:.100}")
        segs = "".join(f"<seg{code:03d}>" for code in mask)
        parts.append(" ".join([encode_box(box, height, width) + segs, *label.split()]))
    return " ; ".join(parts)


_LIKE_TOKEN = re.compile(r"<(?:loc|seg)[^<>\s]*>?")

# %%
written = encode_boxes([thing.box], [thing.kind], 112, 112)
assert [bin_naive(edge, 112) for edge in thing.box] == [int(part[:4]) for part in written.split("<loc")[1:]]
written

# %% [markdown]
# ## Reading an answer
#
# A model may write anything: three loc tokens, a box upside down, no label. What can be read is read. What cannot is
# dropped, and a sentence says so, because a box that vanishes silently looks like a thing that was not found.
#
# The answer is cut at every `;`, and before every new row of loc tokens. So a forgotten separator costs nothing.

# %%
# | export
# A box and what follows up to the next one. Up to the fourth loc token, stray seg tokens do not end the row; after it,
# seg tokens are the mask that `segment` gives.
_ROW = re.compile(
    r"((?:<loc[0-9]{4}>\s*(?:<seg[0-9]{3}>\s*)*){0,3}(?:<loc[0-9]{4}>\s*)+(?:<seg[0-9]{3}>\s*)*)",
)


def parse(answer: str, height: int, width: int) -> tuple[list[Detection], list[str]]:
    """Read an answer to `detect` or `segment`: what can be read, and sentences about what could not.

    A bin becomes bin / 1023 of the edge. Of more than four loc tokens in a row the first four are the box. A box without
    a label is kept, with an empty label; one that ends before it begins, or has a bin above 1023, is dropped. Sixteen seg
    tokens behind the loc tokens are a mask; of more the first sixteen, and fewer leave the box without one.

    Parameters
    ----------
    answer : str
        With its loc tokens.
    height, width : int
        Of the picture, in pixels.

    Returns
    -------
    tuple
        Detections in the order of the answer, and remarks: one sentence for each thing that was dropped or missing.

    Raises
    ------
    ValueError
        If the picture has no size.
    """
    _check_size(height, width)
    if not answer.strip():
        return [], ["The answer is empty."]
    found: list[Detection] = []
    remarks: list[str] = []
    number = 0
    for piece in answer.split(";"):
        before, *rows = _ROW.split(piece)
        number += 1
        if not piece.strip():
            remarks.append(f"Part {number} is empty.")
        elif before.strip():
            why = "stands before the first loc token" if rows else "has no loc token"
            remarks.append(f"Part {number}: {_short(before)} {why} and was dropped.")
        for place, (row, after) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
            number += place > 0
            detection, said = _read_row(row, after, height, width)
            found += [detection] if detection else []
            remarks += [f"Part {number} ({_short(row + after)}) {sentence}." for sentence in said]
    return found, remarks


def _read_row(row: str, after: str, height: int, width: int) -> tuple[Detection | None, list[str]]:
    bins = [int(index) for index in re.findall(r"<loc([0-9]{4})>", row)]
    segs = re.findall(r"<seg([0-9]{3})>", row[row.rindex("<loc") :])  # a mask stands behind the last loc token
    stray = len(re.findall(r"<seg[0-9]{3}>", row + after)) - len(segs)
    codes = tuple(map(int, segs[:MASK_TOKENS]))
    label = " ".join(_LIKE_TOKEN.sub(" ", after).split())
    broken = [token for token in _LIKE_TOKEN.findall(after) if not re.fullmatch(r"<seg[0-9]{3}>", token)]
    said = []
    if len(segs) > MASK_TOKENS:
        said.append(
            f"has {len(segs)} seg tokens, a mask takes {MASK_TOKENS}: the first {MASK_TOKENS} were read, the rest was dropped"
        )
    if 0 < len(codes) < MASK_TOKENS or max(codes, default=0) >= MASK_CODES:
        what = _count(len(codes), "seg token") if len(codes) < MASK_TOKENS else f"a seg token above {MASK_CODES - 1}"
        said.append(f"has {what}, a mask takes {MASK_TOKENS} from 0 to {MASK_CODES - 1}: dropped")
        codes = ()
    if stray:
        said.append(f"holds {_count(stray, 'seg token')} where no mask stands: dropped")
    if broken:
        said.append(f"holds {', '.join(map(repr, broken))}, which is no loc or seg token: dropped")
    if len(bins) < 4:
        return None, [*said, f"has {_count(len(bins), 'loc token')}, a box takes 4: dropped"]
    if len(bins) > 4:
        said.append(f"has {len(bins)} loc tokens, a box takes 4: the first four were read, the rest was dropped")
    if max(bins[:4]) >= BINS:
        return None, [*said, f"has a bin above {BINS - 1}: dropped"]
    top, left, bottom, right = (
        index / (BINS - 1) * size for index, size in zip(bins[:4], (height, width) * 2, strict=True)
    )
    if bottom < top or right < left:
        return None, [*said, "ends before it begins: dropped"]
    return Detection(label, (top, left, bottom, right), codes), said if label else [*said, "has no label"]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# %% [markdown]
# Nine answers, from good to hopeless. Under each stands what was read, and what was said about the rest.

# %%
cat = "<loc0100><loc0200><loc0300><loc0400>"
for answer in (
    f"{cat} cat ; <loc0500><loc0500><loc0900><loc0900> dog",
    f"{cat} cat <loc0500><loc0500><loc0900><loc0900> dog",
    f"{cat} cat ; <loc0001><loc0002><loc0003> dog",
    f"{cat}<loc0999> cat",
    "<loc0300><loc0200><loc0100><loc0400> cat",
    cat.replace("0400", "1024") + " cat",
    cat + "".join(f"<seg{index:03d}>" for index in range(16)) + " cat",
    cat + "<seg007> cat",
    "I see a cat",
):
    found, remarks = parse(answer, 1023, 1023)
    print(answer if len(answer) < 90 else f"{answer[:87]}...")
    for detection in found:
        print(
            "   ",
            detection.label,
            [round(edge) for edge in detection.box],
            *(["and a mask"] if detection.codes else []),
        )
    for remark in remarks:
        print("   ", remark)

# %% [markdown]
# ## Proof
#
# Every bin survives the way to pixels and back, in pictures of any size.

# %%
for size in (1, 112, 224, 333, 4000):
    for index in range(1024):
        there = f"<loc0000><loc0000><loc{index:04d}><loc{index:04d}> x"
        (detection,), remarks = parse(there, size, size)
        assert encode_boxes([detection.box], ["x"], size, size) == there and not remarks

# %% [markdown]
# And an edge never moves by more than half a bin.

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
# ## Answers that always parse
#
# So far the model writes what it likes, and we read what we can. There is another way round: forbid what cannot be read.
# Before each token, look at what was said, and allow only the tokens that can still lead to a well-formed answer. The
# loop of chapter 13 has the door for it: `allow`.
#
# What may come next depends on where we are. Four loc tokens, for `segment` sixteen seg tokens, then a label, then the
# end or a separator:

# %%
figure, axis = plt.subplots(figsize=(8.6, 1.9))
places = {"4 x <loc>": 0.8, "16 x <seg>": 3.1, "label": 5.2, "end": 7.4}
for name, x in places.items():
    colour = GREY if name == "end" else ANSWER
    axis.text(
        x, 1, name, ha="center", va="center", color="white", bbox={"boxstyle": "round,pad=0.5", "fc": colour, "lw": 0}
    )
arrow = {"arrowstyle": "-|>", "color": "0.3", "lw": 1.2}
for start, stop in ((1.5, 2.35), (3.85, 4.7), (5.75, 6.95)):
    axis.annotate("", (stop, 1), (start, 1), arrowprops=arrow)
bent = {**arrow, "connectionstyle": "arc3,rad=-0.25"}
axis.annotate("", (4.8, 1.28), (0.9, 1.28), arrowprops=bent)
axis.text(2.85, 2.2, "detect: no mask", ha="center", size=9, color="0.3")
axis.annotate("", (0.8, 0.72), (5.1, 0.72), arrowprops=bent)
axis.text(2.95, -0.5, "the separator ;", ha="center", size=9, color="0.3")
loop = {**arrow, "connectionstyle": "arc3,rad=-1.4"}
axis.annotate("", (5.5, 1.3), (5.0, 1.3), arrowprops=loop)
axis.text(5.35, 2.2, "one more word", ha="center", size=9, color="0.3")
axis.set(xlim=(0, 8.1), ylim=(-0.7, 2.5))
axis.axis("off")
save(figure, "14_grammar")
plt.show()

# %% [markdown]
# *Figure: the way through an answer. From four loc tokens to sixteen seg tokens or, for detect, past them to the label;
# the label may grow word by word, then comes the end, or a separator that leads back to the loc tokens.*
#
# By hand, with names for the kinds of tokens:


# %%
def may_come_naive(said: list[str], task: str) -> set[str]:
    item = said[len(said) - said[::-1].index(";") :] if ";" in said else said  # behind the last separator
    head = ["loc"] * 4 + (["seg"] * 16 if task == "segment" else [])
    if len(item) < len(head):
        return {head[len(item)]}
    return {"word"} if len(item) == len(head) else {"word", ";", "end"}


said = []
for kind in ("loc", "loc", "loc", "loc", "word", ";", "loc"):
    print(f"{' '.join(said) or 'nothing yet':32} -> {', '.join(sorted(may_come_naive(said, 'detect')))}")
    assert kind in may_come_naive(said, "detect")
    said.append(kind)

# %% [markdown]
# Real tokens ask for a little more care.
#
# - A box must not end before it begins: the third loc token is at least the first, the fourth at least the second.
# - A label is made of ordinary pieces. None of them may hold `;` or `<`, which would be read as something else. A piece
#   that is only a space makes no label. Pieces that stand for half a character are left out too, so a character that the
#   tokenizer knows only as bytes cannot appear.
# - The tokens of ` ; ` differ from tokenizer to tokenizer: we ask it.
# - The answer may be cut after `max_new_tokens`. It must be whole even then. So before a box is begun we look whether
#   there is room to finish it.
#
# The last point is arithmetic. A box still needs the rest of its loc and seg tokens and one word. If fewer tokens are
# left than a new box needs, the separator is forbidden.


# %%
# | export
class AnswerGrammar:
    """Says which tokens may come next in an answer to `detect` or `segment`: an `allow` for chapter 13's loops.

    An answer is one or more items with ` ; ` between them. An item is four loc tokens, of which the box does not end
    before it begins, for `segment` 16 seg tokens, and a label of ordinary pieces that is not empty. However few tokens
    may come, the answer is whole when they are used up. `parse` has nothing to remark on such an answer.

    A model that was taught on RefCOCO alone says box and mask without a label, and is forced to make one up: ask it freely.

    Parameters
    ----------
    tokenizer : Tokenizer
    vocab_size : int
        V, how many scores the model gives.
    stop_ids : sequence of int
        Tokens that end an answer.
    task : str
        `detect` or `segment`.

    Raises
    ------
    ValueError
        If the task is another one, or the model cannot say any stop token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int], task: str):
        if task not in ("detect", "segment"):
            raise ValueError(f"grammar is {task!r}: expected 'detect' or 'segment'")
        ends = [token for token in stop_ids if token < vocab_size]
        if not ends:
            raise ValueError(
                f"the stop tokens are {list(stop_ids)} and the vocabulary has {vocab_size}: a grammar needs one that the "
                "model can say, so correct eos_token_id in generation_config.json or config.json"
            )
        self.task = task
        self.head = 4 + (MASK_TOKENS if task == "segment" else 0)  # tokens of an item before its label
        self.shortest = self.head + 1
        locs = [tokenizer.token_id(f"<loc{index:04d}>") for index in range(BINS)]
        segs = [tokenizer.token_id(f"<seg{code:03d}>") for code in range(MASK_CODES)]
        marks = {*locs, *segs, *ends, tokenizer.image_id}
        pieces = {token: tokenizer.decode([token]) for token in range(vocab_size) if token not in marks}
        foreign = set("<;\ufffd\u2047")  # read as something else; half a character; how SentencePiece shows <unk>
        words = [token for token, piece in pieces.items() if piece and piece.isprintable() and not foreign & set(piece)]
        self._spoken = {token for token in words if pieces[token].strip()}  # pieces that make a label alone
        between = tokenizer.encode("<loc0000> ; <loc0000>")[1:-1]
        start = next(place for place, token in enumerate(between) if ";" in pieces[token])
        self._lead, self._separator = between[:start], between[start:]  # a space may come as a piece of its own
        self._vocab_size = vocab_size
        self._locs, self._bin_of = torch.tensor(locs), {token: index for index, token in enumerate(locs)}
        self._segs, self._words = self._only(segs), self._only(words)
        self._must_speak, self._end = self._only(list(self._spoken)), self._only(ends)

    def _only(self, tokens: list[int] | torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed[tokens] = True
        return allowed

    def __call__(self, answer: list[int], left: int) -> torch.Tensor:
        """The tokens that may come behind an answer, if `left` more may come: boolean (V,).

        Raises
        ------
        ValueError
            If not even one item fits.
        """
        begun = [place for place, token in enumerate(answer) if token == self._separator[0]]
        start = begun[-1] + len(self._separator) if begun else 0
        if start > len(answer):
            return self._only([self._separator[len(answer) - start]])
        item = answer[start:]
        if not answer and left < self.shortest:
            raise ValueError(
                f"an answer to {self.task} takes {self.shortest} tokens or more, and there is room for {left}: "
                "raise max_new_tokens, or shorten the prompt"
            )
        if len(item) < 4:
            least = self._bin_of[item[-2]] if len(item) >= 2 else 0
            return self._only(self._locs[least:])
        if len(item) < self.head:
            return self._segs
        if self._spoken.isdisjoint(item[self.head :]):
            return self._must_speak if left == 1 else self._words
        allowed = self._words | self._end
        led = answer[len(answer) - len(self._lead) :] == self._lead
        if led and left >= len(self._separator) + self.shortest:
            allowed[self._separator[0]] = True
        return allowed


# %% [markdown]
# Proof: a walk that takes any allowed token, at random, hundreds of times. Whatever the length it is given, the answer
# parses, and there is nothing to remark.

# %%
tokenizer = load().processor.tokenizer
walks, boxes_read = 0, 0
for task in ("detect", "segment"):
    grammar = AnswerGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], task)
    for room in range(grammar.shortest, grammar.shortest + 40):
        for _ in range(10):
            answer = []
            while len(answer) < room and tokenizer.eos_id not in answer:
                may = grammar(answer, room - len(answer)).nonzero()[:, 0].tolist()
                ends = [token for token in may if token == tokenizer.eos_id]
                marks = [token for token in may if token in grammar._separator]
                answer.append(rng.choice(rng.choice([kinds for kinds in (may, may, marks, ends) if kinds])))
            found, remarks = parse(tokenizer.decode(answer), 100, 100)
            assert found and not remarks and all(detection.label for detection in found), tokenizer.decode(answer)
            assert all(bool(detection.codes) == (task == "segment") for detection in found)
            walks, boxes_read = walks + 1, boxes_read + len(found)
print(f"{walks} walks, {boxes_read} boxes, nothing to remark")

# %% [markdown]
# `tests/test_grammar.py` does the same with a thousand random models, greedy, drawn and with beams.
#
# A word of warning. A grammar makes answers readable, not true. A model that has nothing to say must now say something:
# forced to draw a box, it draws one.

# %% [markdown]
# ## How good is a box?
#
# Two boxes are compared by the area that they share, divided by the area that they cover together: *intersection over union*,
# IoU. 1 is perfect, 0 is a miss, and by custom 0.5 counts as found.

# %%
figure, axes = plt.subplots(1, 4, figsize=(7.2, 1.9))
for axis, shift in zip(axes, (0, 1, 10 / 3, 6), strict=True):
    true, given = (0, 0, 10, 10), (0, shift, 10, shift + 10)
    shared = max(0, 10 - shift) * 10
    axis.add_patch(plt.Rectangle((0, 0), 10, 10, fill=False, ec=PICTURE, lw=2))
    axis.add_patch(plt.Rectangle((shift, 0), 10, 10, fill=False, ec=PROMPT, lw=2, ls="--"))
    axis.add_patch(plt.Rectangle((shift, 0), 10 - shift, 10, color=ANSWER, alpha=0.35, lw=0))
    axis.set(xlim=(-1, 17), ylim=(-1, 11), aspect="equal")
    axis.set_title(f"IoU {shared / (200 - shared):.2f}", fontsize=9)
    axis.axis("off")
save(figure, "14_iou")
plt.show()

# %% [markdown]
# *Figure: four pairs of equal squares, the second (dashed) moved ever farther to the right; the shared part is filled. At a tenth of the
# width IoU is 0.82, at a third 0.50.*
#
# On drawn boxes we could simply count pixels: those in both, and those in either.


# %%
def iou_naive(one: tuple, other: tuple) -> float:
    cover = [{(y, x) for y in range(b[0], b[2]) for x in range(b[1], b[3])} for b in (one, other)]
    either = len(cover[0] | cover[1])
    return len(cover[0] & cover[1]) / either if either else 0.0


iou_naive((0, 0, 10, 10), (0, 5, 10, 15))

# %% [markdown]
# With edges that are not whole numbers, we compute the areas. The shared part is a box too: it begins at the later beginning
# and ends at the earlier end.


# %%
# | export
def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (y_min, x_min, y_max, x_max), 0 to 1; a box without area overlaps nothing."""
    height = min(first[2], second[2]) - max(first[0], second[0])
    width = min(first[3], second[3]) - max(first[1], second[1])
    if not (height > 0 and width > 0):
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - height * width
    return min(1.0, height * width / union) if union > 0 else 0.0


# %%
for _ in range(300):
    pair = []
    for _ in range(2):
        (y0, y1), (x0, x1) = sorted(rng.sample(range(20), 2)), sorted(rng.sample(range(20), 2))
        pair.append((y0, x0, y1, x1))
    assert abs(iou(*pair) - iou_naive(*pair)) < 1e-12

# %% [markdown]
# ## Which box is which?
#
# With two stars, the answer may begin with either. Boxes must be paired, one to one, before they are compared. The naive
# way tries every pairing and keeps the one with the largest sum.


# %%
def best_pairing_naive(scores: list[list[float]]) -> float:
    columns = range(len(scores[0]))
    return max(
        sum(row[column] for row, column in zip(scores, chosen, strict=True))
        for chosen in permutations(columns, len(scores))
    )


overlaps = [[0.6, 0.9], [0.1, 0.8]]
best_pairing_naive(overlaps)

# %% [markdown]
# Taking the largest overlap first would pair with 0.9 and be left with 0.1: a sum of 1.0, where 1.4 can be had. So we do not
# take the greedy way.
#
# But trying all is slow: 5 boxes have 120 pairings, 12 boxes 479,001,600.

# %%
assert math.factorial(5) == 120 and math.factorial(12) == 479_001_600

# %% [markdown]
# A better way adds one row at a time. The new row may push a paired row out of its column, which then takes another, and
# pushes out a third. Each move gains or loses something. Of all such chains to a free column we take the one that gains
# most. A chain in the best pairing cannot run in a circle, or the pairing would not have been the best.


# %%
# | export
def _best_pairing(scores: Sequence[Sequence[float]]) -> list[int]:
    """For each row its column, no column twice, with the largest sum of scores; rows must not outnumber columns.

    The Hungarian method (Kuhn 1955): rows come one by one, each along the chain of moves that gains most.
    """
    row_of: dict[int, int] = {}  # the row that each paired column has
    for new_row, values in enumerate(scores):
        gain, pushed_from = list(values), {}  # of the best chain that ends in each column, and the column before
        better = True
        while better:
            better = False
            for column, row in row_of.items():
                for other, value in enumerate(scores[row]):
                    moved = gain[column] - scores[row][column] + value
                    if moved > gain[other] + 1e-12:  # more than the rounding of sums
                        gain[other], pushed_from[other], better = moved, column, True
        column = max(set(range(len(values))) - row_of.keys(), key=gain.__getitem__)
        while column in pushed_from:
            row_of[column] = row_of[pushed_from[column]]
            column = pushed_from[column]
        row_of[column] = new_row
    column_of = {row: column for column, row in row_of.items()}
    return [column_of[row] for row in range(len(scores))]


# %%
assert _best_pairing(overlaps) == [0, 1]
for _ in range(300):
    rows = rng.randint(1, 5)
    columns = rows + rng.randint(0, 2)
    scores = [[rng.choice((0, 0, 0.5, rng.random())) for _ in range(columns)] for _ in range(rows)]
    chosen = _best_pairing(scores)
    assert len(set(chosen)) == rows
    reached = sum(row[column] for row, column in zip(scores, chosen, strict=True))
    assert math.isclose(reached, best_pairing_naive(scores), abs_tol=1e-9)

# %% [markdown]
# Now the verdict on a whole answer. It is right if every true box has a partner of its own with IoU 0.5 or more, and no box is
# left over. Besides, we want the mean overlap.


# %%
# | export
def compare_boxes(found: Sequence[Box], truth: Sequence[Box], threshold: float = 0.5) -> tuple[bool, float]:
    """Were all things found and none too many, and how well do the boxes fit?

    Both answers come from the best of all one-to-one pairings: for the first, the one with most pairs of an IoU of at least
    `threshold`; for the second, the one with the largest sum of IoU.

    Returns
    -------
    tuple
        Whether the boxes are as many as the true ones and all have partners; and the mean IoU over the true boxes, where
        one without a partner counts 0. A box too many does not lower the mean.

    Raises
    ------
    ValueError
        If there is no true box.
    """
    if not truth:
        raise ValueError("there is no true box to compare with")
    spare = [0.0] * max(0, len(truth) - len(found))
    overlap = [[iou(box, true) for box in found] + spare for true in truth]
    hits = [[float(value >= threshold) for value in row] for row in overlap]
    all_found = len(found) == len(truth) and _paired_sum(hits) == len(truth)
    return all_found, _paired_sum(overlap) / len(truth)


def _paired_sum(scores: list[list[float]]) -> float:
    return sum(row[column] for row, column in zip(scores, _best_pairing(scores), strict=True))


# %%
truth = [(0, 0, 10, 10), (20, 20, 30, 30)]
assert compare_boxes(truth[::-1], truth) == (True, 1.0)  # the order does not matter
assert compare_boxes(truth[:1], truth) == (False, 0.5)  # one is missing
assert compare_boxes([*truth, (50, 50, 60, 60)], truth) == (False, 1.0)  # one too many
compare_boxes([(21, 20, 30, 30), (0, 0, 10, 9)], truth)

# %% [markdown]
# ## A shape in sixteen words
#
# A box says where a thing is, not which pixels it covers. The prompt `segment red star` asks for that too. The answer
# puts 16 *seg* tokens between the box and the label. There are 128 of them, so each carries 7 bits. Together that is 112
# bits, for a **mask**: a picture with a yes or a no for each pixel of the box.

# %%
assert 16 * math.log2(128) == 112 and 64 * 64 == 4096

# %% [markdown]
# A mask of 64 x 64 pixels has 4,096 bits. How can 112 tell it? The sender and the receiver agree on a list of patterns
# beforehand, a **codebook**. Then a pattern is sent by its number. That is *vector quantization*: a vector is replaced by
# the nearest one in a list.
#
# By hand, with tiles of 2 x 2 pixels and a codebook of six:

# %%
codebook = [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]


def nearest_naive(tile: list[float], codebook: list[list[float]]) -> int:
    best, smallest = 0, math.inf
    for number, pattern in enumerate(codebook):
        distance = sum((one - other) ** 2 for one, other in zip(tile, pattern, strict=True))
        if distance < smallest:
            best, smallest = number, distance
    return best


triangle = [[0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
tiles = [[triangle[y + i][x + j] for i in (0, 1) for j in (0, 1)] for y in (0, 2) for x in (0, 2)]
[nearest_naive(tile, codebook) for tile in tiles]

# %% [markdown]
# Right half, left half, full, full: four numbers for sixteen pixels. In a formula, for a vector $z$ and the codes $e_k$:
#
# $$ k^* = \arg\min_k \lVert z - e_k \rVert^2 $$
#
# Where do good patterns come from? From examples. We draw shapes, cut each mask to its box, bring it to 64 x 64 pixels,
# and cut that into 4 x 4 tiles of 16 x 16. Then the codebook is learned in the simplest way, *k-means*: begin with some
# tiles as codes; give each tile to its nearest code; move each code to the mean of its tiles; repeat.


# %%
def mask_of(thing, size: int = 112) -> torch.Tensor:
    """Which pixels a drawn thing covers, (H, W): painted alone, black on white."""
    alone = Scene((replace(thing, rgb=(0, 0, 0)),), (255, 255, 255), size)
    return torch.from_numpy(np.array(draw_scene(alone).convert("L")) < 128)


def tiles_of(masks: torch.Tensor) -> torch.Tensor:
    """(N, 64, 64) to (N, 16, 256), row by row."""
    return masks.unflatten(2, (4, 16)).unflatten(1, (4, 16)).transpose(2, 3).reshape(len(masks), 16, 256)


def whole_of(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.reshape(-1, 4, 4, 16, 16).transpose(2, 3).reshape(-1, 64, 64)


# %% [markdown]
# Cutting a mask to its box and putting one back are two functions that we need for the real thing too. The edges of a box
# are rounded to whole pixels, one pixel at least. Sizes change by bilinear interpolation, which weighs the four nearest
# values; when a picture shrinks, all values that fall together are averaged, so that thin lines do not vanish.


# %%
# | export
MASK_SIDE = 64  # a mask is coded as a square of so many pixels


def cut_mask(mask: torch.Tensor, box: Box) -> torch.Tensor:
    """What a mask holds inside a box, as the encoder wants it.

    Parameters
    ----------
    mask : torch.Tensor
        Boolean (H, W), of the whole picture.
    box : (y_min, x_min, y_max, x_max)
        In pixels; its edges are rounded.

    Returns
    -------
    torch.Tensor
        Float32 (64, 64), -1 outside the shape and 1 inside.

    Raises
    ------
    ValueError
        If the mask is no boolean (H, W), or the box is not four finite numbers.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"a mask is boolean, (H, W), got {mask.dtype} of shape {list(mask.shape)}")
    left, top, right, bottom = _pixels_of(box, mask.shape[1], mask.shape[0])
    inside = mask[top : bottom + 1, left : right + 1].float()
    return 2 * _resize(inside, MASK_SIDE, MASK_SIDE) - 1


def paste_mask(square: torch.Tensor, box: Box, height: int, width: int) -> torch.Tensor:
    """A decoded mask (64, 64) stretched over its box: boolean (H, W), True where the stretched value is above 0."""
    left, top, right, bottom = _pixels_of(box, width, height)
    mask = torch.zeros(height, width, dtype=torch.bool)
    stretched = _resize(square.float(), bottom + 1 - top, right + 1 - left)
    mask[top : bottom + 1, left : right + 1] = stretched > 0
    return mask


def _pixels_of(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """First and last column and row of a box, all inside the picture."""
    if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
        raise ValueError(f"a box is four finite numbers (y_min, x_min, y_max, x_max), got {tuple(box)}")
    top, bottom = sorted((box[0], box[2]))
    left, right = sorted((box[1], box[3]))
    first = (round(min(max(left, 0), width - 1)), round(min(max(top, 0), height - 1)))
    last = (round(min(max(right, 0), width)) - 1, round(min(max(bottom, 0), height)) - 1)
    return *first, max(first[0], last[0]), max(first[1], last[1])


def _resize(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Float32 (H, W) to another size by Pillow: bilinear, averaging where it shrinks."""
    resized = Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))


# %%
things = [thing for seed in range(400) for thing in make_scene(seed).things]
squares = torch.stack([cut_mask(mask_of(thing), thing.box) for thing in things])  # (N, 64, 64)
known, unseen = tiles_of(squares[:900]).flatten(0, 1), squares[900:1100]
generator = torch.Generator().manual_seed(0)
codes = known[torch.randperm(len(known), generator=generator)[:128]]  # (128, 256)
for _ in range(6):
    owner = torch.cdist(known, codes).argmin(-1)
    codes = torch.stack([known[owner == k].mean(0) if (owner == k).any() else codes[k] for k in range(128)])
sent = torch.cdist(tiles_of(unseen), codes).argmin(-1)  # (N, 16): all that is sent
received = whole_of(codes[sent])
both = (received > 0) & (unseen > 0)
mean_iou = (both.sum((1, 2)) / ((received > 0) | (unseen > 0)).sum((1, 2))).mean().item()
assert mean_iou > 0.85
print(f"mean overlap of {len(unseen)} masks that the codebook was not made from: {mean_iou:.3f}")

# %%
shown = [
    next(n for n, thing in enumerate(things[900:1100]) if thing.shape == shape) for shape in ("star", "heart", "ring")
]
figure, axes = plt.subplots(1, 6, figsize=(9, 1.9), width_ratios=(1, 1, 1, 1, 1, 1))
for pair, number in zip(axes.reshape(3, 2), shown):
    for axis, square, title in zip(pair, (unseen[number], received[number]), ("mask", "from 16 numbers")):
        axis.imshow(square, cmap="Greys", vmin=-1, vmax=1)
        axis.set_title(title, size=8)
        axis.axis("off")
        for edge in (15.5, 31.5, 47.5):
            axis.axhline(edge, color=GREY, lw=0.4)
            axis.axvline(edge, color=GREY, lw=0.4)
    for place, code in enumerate(sent[number].tolist()):
        pair[1].text(place % 4 * 16 + 7.5, place // 4 * 16 + 7.5, code, ha="center", va="center", size=6, color=PROMPT)
save(figure, "14_codes")
plt.show()

# %% [markdown]
# *Figure: a star, a heart and a ring, each as a mask and as what comes back from 16 numbers, one for each tile of a 4 x 4
# grid. The outlines are a little frayed where tiles meet.*
#
# Sixteen numbers tell a shape well enough. But each tile was chosen alone, so edges do not quite meet. PaliGemma goes one
# step further. A small network of convolutions looks at the whole mask and makes 16 vectors of it; the nearest codes are
# sent; a second network paints the mask from the 16 codes at once. Both networks and the codes were learned together, from
# many masks. Such a pair is an *autoencoder* (the V of VAE is for *variational*, the name of one kind); with a codebook in
# the middle it is a VQ-VAE, from *vector quantization*: hence the names below.
#
# ## The real networks
#
# Their weights come in a file of their own, `vae-oid.npz`, that big_vision publishes. It is not part of this package, and
# we did not have it here. So what follows is built from the published program and tested with random numbers: it computes
# the right thing, and shows noise until somebody puts the file in.
#
# A *convolution* with stride 2 halves height and width; a *transposed* one doubles them. Between them stand residual
# blocks, as in chapter 04: compute something, add it to what was there. The names inside are those of the arrays in the
# file, such as `decoder.2.net.0.weight`, so that the numbers find their places by themselves.


# %%
# | export
class MaskResidual(nn.Module):
    """Three convolutions (3 x 3, 3 x 3, 1 x 1) whose result is added to what went in."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.net(features)


class MaskVAE(nn.Module):
    """Masks of 64 x 64 pixels to 16 codes, and back.

    Parameters
    ----------
    down, up : sequence of int
        Widths of the four convolutions that shrink a mask; and of the five that a mask is painted through.
    code_width : int
        Numbers in one of the 128 codes.

    References
    ----------
    van den Oord et al. 2017, "Neural Discrete Representation Learning"; big_vision, evaluators/proj/paligemma/transfers/
    segmentation.py (decoder) and pp/proj/paligemma/segmentation.py (encoder).
    """

    def __init__(self, down: Sequence[int], up: Sequence[int], code_width: int):
        super().__init__()
        encoder: list[nn.Module] = []
        for before, after in zip((1, *down), down):
            encoder += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        encoder += [MaskResidual(down[-1]), MaskResidual(down[-1]), nn.Conv2d(down[-1], code_width, 1)]
        decoder: list[nn.Module] = [
            nn.Conv2d(code_width, up[0], 1),
            nn.ReLU(),
            MaskResidual(up[0]),
            MaskResidual(up[0]),
        ]
        for before, after in zip(up, up[1:]):
            decoder += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(up[-1], 1, 1))
        self._vq_vae = nn.Module()  # named as in the file
        self._vq_vae._embedding = nn.Parameter(torch.zeros(MASK_CODES, code_width))

    @torch.no_grad()
    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (N, 64, 64), -1 to 1, to codes (N, 16), row by row of a 4 x 4 grid."""
        features = self.encoder(masks[:, None]).flatten(2).transpose(1, 2)  # (N, 16, code_width)
        return torch.cdist(features, self._vq_vae._embedding.expand(len(masks), -1, -1)).argmin(-1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (N, 16) to masks (N, 64, 64), about -1 outside and 1 inside."""
        features = self._vq_vae._embedding[codes]  # (N, 16, code_width)
        return self.decoder(features.transpose(1, 2).unflatten(2, (4, 4)))[:, 0]

    def codes_of(self, mask: torch.Tensor, box: Box) -> tuple[int, ...]:
        """The 16 codes of what a boolean mask (H, W) holds inside a box; see `cut_mask`."""
        return tuple(self.encode(cut_mask(mask, box)[None])[0].tolist())

    def mask_of(self, detection: Detection, height: int, width: int) -> torch.Tensor:
        """The mask of a detection with codes, boolean (H, W), in a picture of that size; see `paste_mask`."""
        return paste_mask(self.decode(torch.tensor([detection.codes]))[0], detection.box, height, width)


# %% [markdown]
# The loader reads the sizes from the arrays, and says what to do where there is no file.


# %%
# | export
MASKS_VARIABLE = "SIGMA_BOOK_MASKS"  # environment variable: where vae-oid.npz lies
_MASKS_MISSING = (
    "seg tokens become masks, and masks seg tokens, by vae-oid.npz, which is not part of this package: big_vision "
    f"publishes it at gs://big_vision/paligemma/vae-oid.npz; give its path, or set {MASKS_VARIABLE} to it"
)


def load_mask_vae(path: str | Path | None = None) -> MaskVAE:
    """The networks between masks and seg tokens, from big_vision's file `vae-oid.npz`.

    Parameters
    ----------
    path : path, optional
        The file; without it the environment variable SIGMA_BOOK_MASKS says where it is.

    Raises
    ------
    FileNotFoundError
        If no file is named, or there is none of that name.
    ValueError
        If the file is damaged, or its arrays are not those of the two networks.
    """
    path = path or os.environ.get(MASKS_VARIABLE)
    if path is None:
        raise FileNotFoundError(_MASKS_MISSING)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}; {_MASKS_MISSING}")
    header = {name: shape for name, (shape, _) in read_npz_header(path).items()}
    try:
        down = [header[f"encoder.{layer}.weight"][0] for layer in (0, 2, 4, 6)]
        up = [header["decoder.0.weight"][0], *(header[f"decoder.{layer}.weight"][1] for layer in (4, 6, 8, 10))]
        _, code_width = header["_vq_vae._embedding"]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} lacks {error}: expected the arrays of big_vision's vae-oid.npz") from error
    with torch.device("meta"):
        vae = MaskVAE(down, up, code_width)
    for name, tensor in vae.state_dict().items():
        if header.get(name) != tuple(tensor.shape):
            found = f"has the shape {list(header[name])}" if name in header else "is missing"
            raise ValueError(f"{path}: array {name} {found}, expected {list(tensor.shape)}")
    arrays = {name: read_npz_array(path, name).float() for name in vae.state_dict()}
    vae.load_state_dict(arrays, assign=True)
    return vae.eval().requires_grad_(False)


# %% [markdown]
# Proof: a file of random numbers. Reading gives the same networks, and one value of the first convolution is what four
# loops say. (`tests/test_masks.py` computes both networks to the end in plain numpy.)

# %%
here = Path(tempfile.mkdtemp())
torch.manual_seed(0)
random_vae = MaskVAE(down=(8, 12, 16, 24), up=(24, 20, 16, 12, 8), code_width=10)
for parameter in random_vae.parameters():
    parameter.data = torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5
np.savez(here / "random.npz", **{name: tensor.numpy() for name, tensor in random_vae.state_dict().items()})
vae = load_mask_vae(here / "random.npz")
assert all(torch.equal(tensor, random_vae.state_dict()[name]) for name, tensor in vae.state_dict().items())

square, kernel, bias = unseen[0], vae.encoder[0].weight[3, 0], vae.encoder[0].bias[3]
total = float(bias)
for i in range(4):
    for j in range(4):
        total += float(
            kernel[i, j] * square[2 * 10 - 1 + i, 2 * 7 - 1 + j]
        )  # output place (10, 7), one pixel of padding
assert abs(float(vae.encoder[0](square[None, None])[0, 3, 10, 7]) - total) < 1e-5

star = next(thing for thing in things if thing.shape == "star")
star_codes = vae.codes_of(mask_of(star), star.box)
text = encode_boxes([star.box], [star.kind], 112, 112, [star_codes])
(found,), remarks = parse(text, 112, 112)
assert found.codes == star_codes and not remarks
print(text)
print(f"{vae.mask_of(found, 112, 112).sum()} pixels of noise")

# %% [markdown]
# And without the file:

# %%
try:
    load_mask_vae(here / "vae-oid.npz")
except FileNotFoundError as error:
    print(str(error).replace(str(here), "..."))

# %% [markdown]
# ## Drawing
#
# A line of one colour is lost on a ground of the same colour. So each line has black on both sides, and each label stands on a
# plate. A mask is laid over the picture half transparent, with a rim. Lines and letters grow with the picture; nothing leaves
# it.


# %%
# | export
def draw_boxes(
    image: Image.Image, detections: Sequence[Detection], masks: Sequence[torch.Tensor | None] | None = None
) -> Image.Image:
    """A copy of a picture with named boxes and masks on it, readable on light and on dark ground.

    Boxes are clipped to the picture. A label goes over its box, or into it, or under it, where it hides no other label; it
    is cut if it is too long, and left out where the picture is too small for a letter. Letters that Pillow's own font lacks
    appear as empty frames.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any mode. It becomes RGB as the processor makes it, turned as its EXIF says.
    detections : sequence of Detection
        In pixels of that upright picture.
    masks : sequence, optional
        For each detection a boolean (H, W), or None.

    Returns
    -------
    PIL.Image.Image
        RGB; the picture given stays as it is.

    Raises
    ------
    ValueError
        If a box is not four finite numbers, or masks do not belong to these detections and this picture.
    """
    picture = load_image(image).copy()
    shapes = {tuple(mask.shape) for mask in masks or [] if mask is not None}
    if masks is not None and (len(masks) != len(detections) or shapes - {(picture.height, picture.width)}):
        raise ValueError(
            f"{len(detections)} detections on {picture.height} x {picture.width} pixels (height x width), but "
            f"{len(masks)} masks of the sizes {sorted(shapes)}: give one of the picture's size, or None, for each"
        )
    line = max(1, round(min(picture.size) / 200))
    for number, (_, mask) in enumerate(zip(detections, masks or [None] * len(detections), strict=True)):
        if mask is not None:
            _paint_mask(picture, mask, _COLOURS[number % len(_COLOURS)], line)
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(9, round(min(picture.size) / 24)))
    plates: list[tuple[int, int, int, int]] = []
    frames = []
    for number, detection in enumerate(detections):
        colour = _COLOURS[number % len(_COLOURS)]
        left, top, right, bottom = _pixels_of(detection.box, picture.width, picture.height)
        frames.append((colour, (left, top, right, bottom), detection.label))
        for grown, paint in ((line, "black"), (0, colour), (-line, "black")):
            edges = (left - grown, top - grown, right + grown, bottom + grown)
            if edges[0] <= edges[2] and edges[1] <= edges[3]:
                canvas.rectangle(edges, outline=paint, width=line)
    for colour, frame, label in frames:  # labels last, so that no line runs through one
        _draw_label(canvas, picture.size, font, line, colour, frame, label, plates)
    return picture


_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7")


def _paint_mask(picture: Image.Image, mask: torch.Tensor, colour: str, line: int) -> None:
    """Lay a colour over a mask, half transparent, with a full rim inside its edge and a black one outside."""
    reach = {"kernel_size": 2 * line + 1, "stride": 1, "padding": line}
    around = (F.max_pool2d(mask.float()[None], **reach)[0] > 0) & ~mask
    rim = (F.max_pool2d(1 - mask.float()[None], **reach)[0] > 0) & mask
    for paint, cover in (("black", 255 * around), (colour, 115 * mask + 140 * rim)):
        picture.paste(paint, mask=Image.fromarray(cover.to(torch.uint8).numpy()))


def _draw_label(canvas, size, font, line, colour, frame, label, plates) -> None:
    # A lone surrogate is a code that no encoding can write: it is replaced. No label needs more than 200 letters.
    text = " ".join(label.encode("utf-8", "replace").decode().split())[:200]
    whole, room = text, size[0] - 4 * line
    while text and canvas.textlength(text if text == whole else f"{text}…", font=font) > room:
        text = text[:-1]
    ascent, descent = font.getmetrics()
    height = ascent + descent + 2 * line
    if not text or height > size[1]:
        return
    text = text if text == whole else f"{text}…"
    width = math.ceil(canvas.textlength(text, font=font)) + 4 * line
    left, top, right, bottom = frame
    x = min(left, size[0] - width)
    places = [(x, y, x + width - 1, y + height - 1) for y in (top - height, top + line, bottom + 1, size[1] - height)]
    inside = [place for place in places if place[1] >= 0 and place[3] < size[1]]
    plate = next((place for place in inside if not any(_touch(place, other) for other in plates)), inside[0])
    plates.append(plate)
    canvas.rectangle(plate, fill=colour, outline="black", width=line)
    canvas.text((plate[0] + 2 * line, plate[1] + line), text, fill="black", font=font)


def _touch(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


# %% [markdown]
# From an answer to a picture is one call more. Programs want numbers instead: the second function gives plain values that
# JSON can hold, with boxes in pixels, and masks as *run lengths*, the way COCO writes them. One goes down the columns and
# notes how many pixels are outside, then inside, then outside, and so on.


# %%
# | export
def draw(image: str | Path | Image.Image, answer: str, vae: MaskVAE | None = None) -> Image.Image:
    """A picture with the boxes, masks and labels of an answer to `detect` or `segment`.

    Parameters
    ----------
    image : picture
        Anything that `load_image` takes.
    answer : str
        As the model gave it; what cannot be read is left out.
    vae : MaskVAE, optional
        Makes masks of seg tokens; `load_mask_vae()` by default, and only where there are any.

    Returns
    -------
    PIL.Image.Image
        RGB, of the size of the upright picture. One whose shorter side is below 100 pixels is enlarged, each pixel to a
        square of pixels, so that labels can be read and hide nothing.

    Raises
    ------
    FileNotFoundError
        If there is no such picture; or if the answer holds masks and there is no file to decode them.
    ValueError
        If the picture cannot be read.
    """
    picture = load_image(image)
    shorter, longer = sorted(picture.size)
    if shorter < 100:
        times = max(1, min(math.ceil(200 / shorter), 2000 // longer))
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    found, _ = parse(answer, picture.height, picture.width)
    if vae is None and any(detection.codes for detection in found):
        vae = load_mask_vae()
    masks = [vae.mask_of(thing, picture.height, picture.width) if thing.codes else None for thing in found]
    return draw_boxes(picture, found, masks)


def describe(answer: str, height: int, width: int, vae: MaskVAE | None = None) -> dict:
    """An answer to `detect` or `segment` as plain values, ready for JSON.

    Parameters
    ----------
    answer : str
    height, width : int
        Of the picture, in pixels.
    vae : MaskVAE, optional
        With it, masks are decoded.

    Returns
    -------
    dict
        `width` and `height`; `things`, a list with `label`, `x_min`, `y_min`, `x_max`, `y_max` (floats, in pixels from
        the upper left corner), and where there is a mask `codes` (16 numbers) and, with `vae`, `mask` (COCO's run
        lengths: `size` [H, W] and `counts`, column by column, beginning with pixels outside); `remarks`, sentences
        about what could not be read.
    """
    found, remarks = parse(answer, height, width)
    things = []
    for detection in found:
        edges = dict(zip(("y_min", "x_min", "y_max", "x_max"), detection.box))
        thing = {"label": detection.label} | {name: edges[name] for name in ("x_min", "y_min", "x_max", "y_max")}
        if detection.codes:
            thing["codes"] = list(detection.codes)
            if vae is not None:
                counts = run_lengths(vae.mask_of(detection, height, width))
                thing["mask"] = {"size": [height, width], "counts": counts}
        things.append(thing)
    if vae is None and any(detection.codes for detection in found):
        remarks = [*remarks, f"Masks are given by their codes alone: {_MASKS_MISSING}."]
    return {"width": width, "height": height, "things": things, "remarks": remarks}


def run_lengths(mask: torch.Tensor) -> list[int]:
    """A boolean (H, W) as COCO writes it: lengths of runs, column by column, the first one of pixels outside."""
    flat = torch.cat([torch.tensor([False]), mask.t().flatten()])
    edges = (flat[1:] != flat[:-1]).nonzero()[:, 0].tolist()
    return [end - start for start, end in zip([0, *edges], [*edges, mask.numel()])]


# %%
assert run_lengths(torch.tensor([[False, True], [True, True]])) == [1, 3]
assert run_lengths(torch.tensor([[True, True], [False, True]])) == [0, 1, 1, 2]
describe(f"{cat} cat", 1023, 1023)

# %% [markdown]
# How it looks, with masks made by hand.

# %%
figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7))
grounds = {"light": "#f4f4f4", "dark": "#101018", "orange": "#e69f00"}
for axis, (name, ground) in zip(axes, grounds.items(), strict=True):
    boxes = [(60, 30, 230, 180), (90, 140, 290, 300), (0, 200, 80, 300)]
    labels = ["a box", "another, over it", "at the rim"]
    y, x = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    masks = [(y - 145) ** 2 / 85**2 + (x - 105) ** 2 / 75**2 < 1, None, None]  # an ellipse in the first box
    detections = [Detection(*both) for both in zip(labels, boxes)]
    drawn = draw_boxes(Image.new("RGB", (300, 300), ground), detections, masks)
    axis.imshow(drawn)
    axis.set_title(f"on {name} ground", fontsize=9)
    axis.axis("off")
save(figure, "14_grounds")
plt.show()

# %% [markdown]
# *Figure: three boxes, one of them with an ellipse as mask, on light, dark and orange ground. All lines, rims and labels can
# be seen, also the orange ones on orange.*
#
# ## A look inside
#
# What the pocket model (or the one in `SIGMA_BOOK_MODEL`) points at, asked about two things in one scene and one thing in
# another. A number over each picture says how well its boxes fit.

# %%
model = load(os.environ.get("SIGMA_BOOK_MODEL"))
figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.9))
for axis, (seed, kind) in zip(axes, ((155, "red star"), (155, "brown heart"), (5, "purple heart")), strict=True):
    scene = make_scene(seed)
    large = draw_scene(scene).resize((448, 448), Image.Resampling.NEAREST)
    answer = generate(draw_scene(scene), f"detect {kind}", model=model)
    found, remarks = parse(answer, 448, 448)
    truth = [tuple(4 * edge for edge in thing.box) for thing in scene.things if thing.kind == kind]
    _, overlap = compare_boxes([detection.box for detection in found], truth)
    axis.imshow(draw(large, answer))
    axis.set_title(f"detect {kind}\nmean IoU {overlap:.2f}", fontsize=9)
    axis.axis("off")
    print(answer, *remarks, sep="\n  ")
save(figure, "14_found")
plt.show()

# %% [markdown]
# *Figure: three pictures, the first two of the same scene, with the boxes that the model gave, each with its label on a
# plate.*
#
# Two boxes in one picture are one answer, with
# ` ; ` between them. Chapter 17 counts how often the boxes are right.
#
# What happens if we ask for a thing that is not there? When the pocket model was taught, every `detect` had something to find.

# %%
picture = draw_scene(make_scene(155))
for kind in ("green ring", "blue square"):
    answer = generate(picture, f"detect {kind}", model=model)
    found, remarks = parse(answer, 112, 112)
    print(answer, *(detection.label for detection in found), *remarks, sep="\n  ")

# %% [markdown]
# A model that never saw "nothing" as an answer has none to give, and what comes instead is not to be trusted. The remarks say
# where it broke the rules of the format. They cannot say where a well-formed box is invented: ask
# `answer en is there a green ring?` first.
#
# ## The bill
#
# How coarse is a bin? The largest error is half of it.

# %%
for name, size in (("112 px", 112), ("224 px", 224), ("a photograph of 4,000 px", 4000)):
    print(f"{name}: a bin is {size / 1023:.2f} pixels, the error at most {size / 1023 / 2:.2f}")
assert 224 / 1023 < 0.22 and 3.9 < 4000 / 1023 < 4

# %% [markdown]
# At 224 pixels a bin is far finer than a patch of 14. On the photograph it is 4 pixels wide: enough for a cat, not for a
# letter. But no model that looks at 224 pixels sees that letter anyway.
#
# The parameters: one row of the embedding for each mark, and since the table is also the output head, that is all.

# %%
for name, width, total in (
    ("loaded model", model.config.text.hidden_size, count_parameters(model)),
    ("PaliGemma 3B", 2048, 2_923_466_480),
):
    marks = 1024 * width
    print(f"{name}: {marks:,} parameters, {marks * 2 / 1e6:.2f} MB in 16 bits, {marks / total:.2%} of the model")
assert 1024 * 2048 / 2_923_466_480 < 0.001

# %% [markdown]
# No operation is added: a mark is chosen like any word. What costs is the length of the answer, one step of the decoder for
# each token.

# %%
tokenizer = model.processor.tokenizer
for count in (1, 2, 5):
    answer = encode_boxes([(0, 0, 9, 9)] * count, ["red star"] * count, 112, 112)
    print(f"boxes: {count}, tokens: {len(tokenizer.encode(answer))}, against {len(tokenizer.encode('yes'))} for 'yes'")

# %% [markdown]
# A mask adds 16 tokens to each box. The grammar adds a yes or no for each word of the vocabulary to each step: a quarter
# of a megabyte for PaliGemma, beside the five gigabytes of weights that a step reads.

# %%
assert torch.zeros(257_216, dtype=torch.bool).nbytes == 257_216

# %% [markdown]
# ## Your turn
#
# **1.** ★ Turn a box in pixels into (x, y, width, height), as the files of the COCO data set have it.


# %%
def to_coco(box: tuple) -> tuple: ...


check(to_coco, (((10, 20, 40, 80),), (20, 10, 60, 30)))

# %% [markdown]
# **2.** ★ How many loc tokens does an answer hold?


# %%
def count_locs(answer: str) -> int: ...


check(count_locs, ((written,), 4), (("cat",), 0))

# %% [markdown]
# **3.** ★★ What is the IoU of a box with itself, moved sideways by a share of its width? For 0.25 it is 0.6.


# %%
def moved_iou(share: float) -> float: ...


check(moved_iou, ((0.25,), 0.6), ((0.0,), 1.0), ((1 / 3,), 0.5), ((1.5,), 0.0))

# %% [markdown]
# **4.** ★★ A flipped picture needs flipped boxes. Mirror an answer left to right, token by token, with labels left as they are.


# %%
def mirror(answer: str) -> str: ...


flipped = "<loc0100><loc0623><loc0300><loc0823> cat"
check(mirror, ((f"{cat} cat",), flipped), ((f"{cat} cat ; {cat} cat",), f"{flipped} ; {flipped}"))

# %% [markdown]
# **5.** ★★★ Read run lengths back: from the counts and the size to the mask, as rows of True and False.


# %%
def from_runs(counts: list[int], height: int, width: int) -> list[list[bool]]: ...


check(
    from_runs,
    (([1, 3], 2, 2), [[False, True], [True, True]]),
    (([0, 1, 1, 2], 2, 2), [[True, True], [False, True]]),
    (([6], 2, 3), [[False] * 3] * 2),
)

# %% [markdown]
# Next: from answering to learning.
