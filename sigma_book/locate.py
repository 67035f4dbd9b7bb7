"""Saying where.

How can a model that only speaks point at a thing?

Tangled from chapters/14_locate.py: edit there, then run python -m sigma_book.tangle.
"""

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

from sigma_book.npz import read_npz_array, read_npz_header
from sigma_book.processor import Tokenizer, load_image

__all__ = [
    "BINS",
    "MASKS_VARIABLE",
    "MASK_CODES",
    "MASK_SIDE",
    "MASK_TOKENS",
    "AnswerGrammar",
    "Box",
    "Detection",
    "MaskResidual",
    "MaskVAE",
    "compare_boxes",
    "cut_mask",
    "describe",
    "draw",
    "draw_boxes",
    "encode_box",
    "encode_boxes",
    "iou",
    "load_mask_vae",
    "parse",
    "paste_mask",
    "run_lengths",
]

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


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (y_min, x_min, y_max, x_max), 0 to 1; a box without area overlaps nothing."""
    height = min(first[2], second[2]) - max(first[0], second[0])
    width = min(first[3], second[3]) - max(first[1], second[1])
    if not (height > 0 and width > 0):
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - height * width
    return min(1.0, height * width / union) if union > 0 else 0.0


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
