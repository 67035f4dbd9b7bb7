"""What to learn from: data.

How does a stranger's file become examples to learn from, without ever being held in memory whole?

Tangled from chapters/15_data.py: edit there, then run python -m sigma_book.tangle.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image

from sigma_book.generation import is_finite
from sigma_book.locate import Box, encode_box
from sigma_book.processor import load_image

__all__ = [
    "FORMS",
    "ROW_FORMS",
    "Example",
    "Examples",
    "Table",
    "find_picture",
    "has_boxes",
    "index_document",
    "index_lines",
    "located",
    "picture_of",
    "read_examples",
    "read_mask",
]


@dataclass(frozen=True)
class Example:
    """One thing to learn: a picture, what is asked about it, and what to answer.

    Parameters
    ----------
    image : path, bytes, array or PIL image
        What `load_image` takes. A path is opened when a batch is made, not before.
    prefix : str
        What is asked.
    suffix : str
        What to answer. Empty where the file has only a question; a batch for learning refuses that.
    where : str
        Where it stands, such as `train.jsonl, line 17`: for messages, and no two alike in a file.
    answers : tuple of str
        All the reference answers that the file has.
    facts : mapping
        What else the file says, in JSON values: ids, kinds of question, boxes in pixels.
    """

    image: str | Path | bytes | np.ndarray | Image.Image
    prefix: str
    suffix: str
    where: str = ""
    answers: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Table:
    """Where the rows of a file lie; the rows themselves stay on the disk.

    Parameters
    ----------
    path : Path
    size, changed : int
        Of the file when it was indexed: bytes, and nanoseconds of its last change.
    starts, ends : numpy.ndarray
        First byte of each row, and the byte behind its last.
    columns : mapping
        A few values of each row: line numbers or ids.
    """

    path: Path
    size: int
    changed: int
    starts: np.ndarray
    ends: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, indices: Sequence[int]) -> list[dict]:
        """Read some rows from the disk.

        Raises
        ------
        ValueError
            If one is not a JSON object in UTF-8.
        RuntimeError
            If the file is not the one that was indexed, or cannot be read now.
        """
        found = []
        try:
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                if (state.st_size, state.st_mtime_ns) != (self.size, self.changed):
                    raise RuntimeError(f"{self.path} was changed while it was in use: start again")
                for index in indices:
                    file.seek(int(self.starts[index]))
                    found.append(_read_object(file.read(int(self.ends[index] - self.starts[index]))))
        except OSError as error:  # a broken row is another thing: it may be left out
            said = f"{self.path} cannot be read now ({error.strerror})"
            raise RuntimeError(f"{said}: check the disk, then go on") from error
        return found


def _read_object(raw: bytes) -> dict:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"found {json.dumps(value)[:40]}, expected a JSON object: {{...}}")
    return value


_BYTES_AT_ONCE = 1 << 24  # 16 MiB: as much of a file is read in one go


_LONGEST_ENTRY = 1 << 26  # 64 MiB: an entry of a JSON array that has no end by then is taken for broken


_MARK = b"\xef\xbb\xbf"  # some editors begin a UTF-8 file with it


def index_lines(path: Path) -> Table:
    """Find the lines of a JSONL file that are not blank.

    Returns
    -------
    Table
        With the column `line`: numbers of lines, counted from 1.
    """
    starts, lines = [], []
    before, number = 0, 1  # bytes and lines that lie behind us
    with path.open("rb") as file:
        state = os.fstat(file.fileno())
        if file.read(3) == _MARK:
            before = 3
        file.seek(before)
        while chunk := file.read(_BYTES_AT_ONCE):
            chunk += file.readline()  # up to the end of a line
            values = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(values == ord("\n")) + 1
            begins = np.concatenate([[0], ends])
            begins = begins[begins < len(values)]
            kept = values[begins] > ord(" ")
            for place in np.flatnonzero(~kept):  # few lines begin with white space: look at each
                end = begins[place + 1] if place + 1 < len(begins) else len(values)
                kept[place] = bool(chunk[begins[place] : end].strip())
            starts.append(begins[kept] + before)
            lines.append(np.flatnonzero(kept) + number)
            before += len(chunk)
            number += len(begins)
    first = np.concatenate(starts).astype(np.int64) if starts else np.zeros(0, np.int64)
    ends = np.append(first[1:], before)[: len(first)]
    columns = {"line": np.concatenate(lines)} if lines else {"line": first}
    return Table(path, state.st_size, state.st_mtime_ns, first, ends, columns)


ROW_FORMS = {  # what a row says, by its keys; the first that fits counts
    "prefix": ("prefix", "suffix"),
    "vqa": ("question", "answer"),
    "text": ("text",),
}


FORMS = (*ROW_FORMS, "vqav2", "coco-captions", "coco-detect", "coco-segment")


@dataclass(frozen=True)
class _RowSource:
    """Rows that say everything themselves."""

    table: Table
    form: str
    folders: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        lines = self.table.columns.get("line")
        place = f"entry {index + 1}" if lines is None else f"line {lines[index]}"
        return f"{self.table.path.name}, {place}"

    def example(self, index: int) -> Example:
        (row,) = self.table.rows([index])
        wanted = ("image", *ROW_FORMS[self.form])
        if missing := [key for key in wanted if key not in row]:
            raise ValueError(
                f"no {_quoted(missing)} in this row, its keys are {_quoted(row)}: expected {_quoted(wanted)}"
            )
        facts = {key: value for key, value in row.items() if key not in wanted}
        image = find_picture(row["image"], self.folders)
        if self.form == "prefix":
            prefix, suffix = _text(row["prefix"], "prefix"), _text(row["suffix"], "suffix")
            return Example(image, prefix, suffix, answers=(suffix,), facts=facts)
        if self.form == "text":
            text = _text(row["text"], "text").strip()
            return Example(image, "caption en", text, answers=(text,), facts=facts)
        question, answers = _text(row["question"], "question").strip(), _answers(row["answer"])
        facts["question"] = question
        return Example(image, f"answer en {question}", _most_common(answers), answers=answers, facts=facts)


def _quoted(names) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def _text(value: object, key: str) -> str:
    """A text, or a number as text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}: expected a text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        shown = json.dumps(value)
        raise ValueError(f"{key} is {shown if len(shown) <= 60 else shown[:57] + '...'}: expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} holds half of a letter (a lone surrogate at place {error.start}): repair it"
        ) from error
    return value


def _answers(value: object) -> tuple[str, ...]:
    """One answer or a list of them; an entry may be an object with the key `answer`, as in VQAv2."""
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError("answer is an empty list: expected at least one")
    return tuple(_text(item.get("answer") if isinstance(item, dict) else item, "answer").strip() for item in listed)


def _most_common(answers: Sequence[str]) -> str:
    return Counter(answers).most_common(1)[0][0]  # of equally common ones, the first


def find_picture(name: object, folders: Sequence[Path]) -> Path:
    """The path of a picture: in the first folder that has it; where none has, in the first.

    Raises
    ------
    ValueError
        If the name is no path, or is a URL.
    """
    name = _text(name, "image") if isinstance(name, str) else name
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"image is {name!r:.80}: expected the path of a picture")
    if "://" in name or name.startswith("data:"):
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        if name.startswith("file://"):
            raise ValueError(f"image is {shown!r}: write the path alone, without file://")
        raise ValueError(f"image is {shown!r}, a URL: download the pictures first and write their paths")
    names = [name] if os.sep == "\\" or "\\" not in name else [name, PureWindowsPath(name).as_posix()]
    paths = [folder / spelled for folder in folders for spelled in names]
    try:
        return next((path for path in paths if path.exists()), paths[len(names) - 1])
    except OSError as error:  # too long, for one: somebody has put the picture itself there
        raise ValueError(f"image is {name!r:.80}: expected the path of a picture ({error.strerror})") from error


class _Window:
    """A part of a JSON file, moved on as it is read. One byte is one letter here, so that places are places in the file."""

    def __init__(self, file):
        self._file, self._ended = file, False
        self.text, self.base, self.at, self._taken = "", 0, 0, 0
        self._decode = json.JSONDecoder().raw_decode
        self._more()
        if self.text.startswith(_MARK.decode("latin-1")):
            self.at = 3

    def _more(self) -> None:
        kept = self.text[self.at :]
        new = self._file.read(max(_BYTES_AT_ONCE // 4, len(kept))).decode("latin-1")
        self._ended = not new
        self.text, self.base, self.at = kept + new, self.base + self.at, 0

    def next(self) -> str:
        """The next letter that is no white space; it is not taken. '' at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def take(self, allowed: str) -> str:
        letter = self.next()
        if not letter or letter not in allowed:
            shown = f"found {letter!r}" if letter else "the file ends"
            raise ValueError(f"broken JSON: expected {' or '.join(allowed)} at byte {self.base + self.at:,}, {shown}")
        self.at += 1
        return letter

    def value(self) -> object:
        """Take a whole value."""
        self.next()
        while True:
            try:
                value, end = self._decode(self.text, self.at)
                if len(self.text) - end > 2 or self._ended:  # two letters may be a number's: the "e-" of 1e-3
                    self._taken, self.at = self.at, end
                    return value
            except (ValueError, RecursionError) as error:
                if self._ended or len(self.text) - self.at > _LONGEST_ENTRY:
                    place = self.base + getattr(error, "pos", self.at)
                    raise ValueError(f"broken JSON at byte {place:,} ({getattr(error, 'msg', error)})") from error
            self._more()

    def exact(self) -> object:
        """The value that was taken last, with its letters as UTF-8 has them; the text must not have moved since."""
        return json.loads(self.text[self._taken : self.at].encode("latin-1").decode("utf-8"))


_COLUMNS = {
    "": (),
    "questions": ("question_id", "image_id"),
    "annotations": ("id", "image_id", "question_id", "category_id", "iscrowd"),
    "images": ("id",),
    "categories": ("id",),
}


def _whole(one: object) -> object:
    return int(one) if isinstance(one, float) and one.is_integer() else one  # some write 7.0


def _column(values: Sequence[object]) -> np.ndarray:
    """Whole numbers as numbers, texts as texts, both together as texts; anything else as it is."""
    kinds = {type(value) for value in values}
    if kinds == {int} and max(map(abs, values)) < 2**63:
        return np.array(values, np.int64)
    if kinds and kinds <= {int, str}:
        return np.array([str(value) for value in values])
    column = np.empty(len(values), object)
    for place, value in enumerate(values):
        column[place] = value
    return column


class _Rows:
    """Places and columns of one array while a file is read through; kept as numbers, not as Python objects."""

    def __init__(self, names: Sequence[str]):
        self.names, self._waiting, self._done = names, [], []

    def add(self, start: int, window: _Window, value: object) -> None:
        ids = [value.get(name) if isinstance(value, dict) else None for name in self.names]
        if any(isinstance(one, str) and not one.isascii() for one in ids):
            value = window.exact()
            ids = [value.get(name) for name in self.names]
        self._waiting.append((start, window.base + window.at, *map(_whole, ids)))
        if len(self._waiting) >= 20_000:
            self._pack()

    def _pack(self) -> None:
        if self._waiting:
            self._done.append([_column(values) for values in zip(*self._waiting)])
            self._waiting = []

    def columns(self) -> dict[str, np.ndarray]:
        self._pack()
        names = ("start", "end", *self.names)
        parts = zip(*self._done) if self._done else [[np.zeros(0, np.int64)]] * len(names)
        return {name: np.concatenate(part) for name, part in zip(names, parts)}


def index_document(path: Path) -> tuple[dict[str, Table], dict[str, object]]:
    """Read through a JSON file once and note where the rows of its outer arrays lie.

    Returns
    -------
    tuple
        Tables of the arrays that are known (`questions`, `annotations`, `images`, `categories`; "" is an array that is the
        whole file), and the outer values that are text or numbers.

    Raises
    ------
    ValueError
        If the file is not one whole JSON value.
    """
    arrays: dict[str, _Rows] = {}
    plain: dict[str, object] = {}
    with path.open("rb") as file:
        state = os.fstat(file.fileno())
        window = _Window(file)
        if window.next() == "[":
            _read_array(window, arrays.setdefault("", _Rows(())))
        else:
            window.take("{")
            more = window.next() != "}" or window.take("}") == ","  # an empty object ends here
            while more:
                window.value()
                name = window.exact()
                window.take(":")
                if window.next() == "[" and name in _COLUMNS and name:
                    _read_array(window, arrays.setdefault(name, _Rows(_COLUMNS[name])))
                elif isinstance(window.value(), str | int | float):
                    plain[name] = window.exact()
                more = window.take(",}") == ","
        if window.next():
            raise ValueError(f"broken JSON: something follows the end at byte {window.base + window.at:,}")
    tables = {}
    for name, rows in arrays.items():
        columns = rows.columns()
        starts, ends = columns.pop("start"), columns.pop("end")
        tables[name] = Table(path, state.st_size, state.st_mtime_ns, starts, ends, columns)
    return tables, plain


def _read_array(window: _Window, rows: _Rows) -> None:
    window.take("[")
    more = window.next() != "]" or window.take("]") == ","  # an empty array ends here
    while more:
        window.next()
        start = window.base + window.at
        value = window.value()
        rows.add(start, window, value)
        more = window.take(",]") == ","


def _ids(table: Table, name: str, what: str) -> np.ndarray:
    """A column of ids, whole numbers or texts, with none missing."""
    ids = table.columns[name]
    if ids.dtype.kind == "O" and len(ids):
        bad = next((i for i, value in enumerate(ids) if type(value) not in (int, str)), 0)
        raise ValueError(f"{table.path.name}, {what} {bad + 1}: {name} is {ids[bad]!r}, expected a whole number")
    return ids


class _Find:
    """Which row has an id: a sorted copy and a search, a few bytes for each row."""

    def __init__(self, ids: np.ndarray):
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def all(self, value) -> np.ndarray:
        """Rows with this id, in the order of the file."""
        value = str(value) if self._sorted.dtype.kind == "U" else value
        if self._sorted.dtype.kind != "U" and isinstance(value, str):
            return self._order[:0]
        return self._order[np.searchsorted(self._sorted, value, "left") : np.searchsorted(self._sorted, value, "right")]

    def repeated(self):
        """An id that stands twice, or None."""
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        return self._sorted[twice[0]].item() if len(twice) else None


@dataclass(frozen=True)
class _QuestionSource:
    """The official VQAv2 pair: questions, and answers in a second file."""

    questions: Table
    annotations: Table | None
    find_answer: _Find | None
    subset: str
    folders: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.questions)

    def where(self, index: int) -> str:
        return f"{self.questions.path.name}, question {index + 1}"

    def example(self, index: int) -> Example:
        (row,) = self.questions.rows([index])
        question = _text(row.get("question"), "question").strip()
        image_id, question_id = _whole(row.get("image_id")), _whole(row.get("question_id"))
        if isinstance(image_id, bool) or not isinstance(image_id, int | str):
            raise ValueError(f"image_id is {image_id!r}: expected a number")
        facts = {"question": question, "question_id": question_id, "image_id": image_id}
        answers, suffix = (), ""
        if self.annotations is not None:
            found = self.find_answer.all(question_id)
            if len(found) == 0:
                raise ValueError(f"question_id {question_id} has no entry in {self.annotations.path.name}")
            (entry,) = self.annotations.rows(found[:1])
            facts |= {key: entry[key] for key in ("question_type", "answer_type") if key in entry}
            answers = _answers(entry.get("answers", entry.get("multiple_choice_answer")))
            suffix = _most_common(answers)
            if "multiple_choice_answer" in entry:
                suffix = _text(entry["multiple_choice_answer"], "multiple_choice_answer").strip()
        number = f"{image_id:012d}" if isinstance(image_id, int) else f"{image_id}"
        name = f"COCO_{self.subset}_{number}.jpg" if self.subset else f"{number}.jpg"
        image = find_picture(name, self.folders)
        return Example(image, f"answer en {question}", suffix, answers=answers, facts=facts)


@dataclass(frozen=True)
class _CaptionSource:
    """COCO captions: an example for each caption, or for each picture with all its captions."""

    images: Table
    annotations: Table
    find_image: _Find
    find_captions: _Find
    pictures: np.ndarray | None  # ids, where there is an example for each
    folders: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.annotations if self.pictures is None else self.pictures)

    def where(self, index: int) -> str:
        if self.pictures is None:
            return f"{self.annotations.path.name}, annotation {index + 1}"
        return f"{self.annotations.path.name}, image {self.pictures[index]}"

    def example(self, index: int) -> Example:
        image_id = self.annotations.columns["image_id"][index] if self.pictures is None else self.pictures[index]
        numbers = self.find_captions.all(image_id)
        rows = self.annotations.rows(numbers)
        own = 0 if self.pictures is not None else int(np.flatnonzero(numbers == index)[0])
        suffix, captions = _text(rows[own].get("caption"), "caption").strip(), []
        for row in rows:
            try:
                captions.append(_text(row.get("caption"), "caption").strip())
            except ValueError:
                if self.pictures is not None:
                    raise  # else it is said where that caption is the example
        image = _image_row(self.images, self.find_image, image_id)
        facts = {"image_id": image_id.item(), "file_name": image.get("file_name")}
        if self.pictures is None:
            facts["annotation_id"] = rows[own].get("id")
        path = find_picture(image.get("file_name"), self.folders)
        return Example(path, "caption en", suffix, answers=tuple(captions), facts=facts)


def _image_row(images: Table, find: _Find, image_id) -> dict:
    found = find.all(image_id)
    if len(found) == 0:
        raise ValueError(f"image_id {image_id} has no entry in 'images' of {images.path.name}")
    return images.rows(found[:1])[0]


@dataclass(frozen=True)
class _InstanceSource:
    """COCO instances: an example for each picture and each category in it."""

    images: Table
    annotations: Table
    find_image: _Find
    order: np.ndarray  # of annotations: those of one picture and category stand together
    begins: np.ndarray  # of each such group in `order`, and the end
    crowds: np.ndarray  # of annotations
    find_crowds: _Find  # among these, by picture
    categories: Mapping[object, str]
    encode_mask: Callable[[torch.Tensor, Box], Sequence[int]] | None
    folders: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.begins) - 1

    def _group(self, index: int) -> tuple:
        first = self.order[self.begins[index]]
        return tuple(self.annotations.columns[name][first].item() for name in ("image_id", "category_id"))

    def where(self, index: int) -> str:
        image_id, category_id = self._group(index)
        name = self.categories.get(category_id, "no name")
        return f"{self.annotations.path.name}, image {image_id}, category {category_id} ({name})"

    def example(self, index: int) -> Example:
        image_id, category_id = self._group(index)
        if category_id not in self.categories:
            raise ValueError(f"category_id {category_id} has no entry in 'categories'")
        label = self.categories[category_id]
        image = _image_row(self.images, self.find_image, image_id)
        size = image.get("height"), image.get("width")
        if not all(isinstance(edge, int) and edge > 0 for edge in size):
            raise ValueError(f"image {image_id} has height {size[0]!r} and width {size[1]!r}: expected pixels")
        rows = self.annotations.rows(self.order[self.begins[index] : self.begins[index + 1]])
        things = sorted(((_corners(row), row) for row in rows), key=lambda pair: (pair[0][1], pair[0][0]))
        for (top, left, bottom, right), row in things:
            if top > size[0] or left > size[1] or bottom < 0 or right < 0:
                raise ValueError(
                    f"annotation {row.get('id')} has bbox {row['bbox']}, which lies outside of its picture of "
                    f"{size[1]} x {size[0]} pixels: mend the box, or the picture's width and height"
                )
        facts = {"image_id": image_id, "category_id": category_id, "height": size[0], "width": size[1]}
        facts |= {"file_name": image.get("file_name"), "boxes": [list(box) for box, _ in things]}
        facts |= {"labels": [label] * len(things), "annotation_ids": [row.get("id") for _, row in things]}
        crowds = self.crowds[self.find_crowds.all(image_id)]
        kinds = [self.categories.get(number.item()) for number in self.annotations.columns["category_id"][crowds]]
        facts["crowds"] = [  # of all categories: an answer may name others than it was asked for
            {"label": kind, "box": list(_corners(row))}
            for kind, row in zip(kinds, self.annotations.rows(crowds))
            if kind
        ]
        answer = [encode_box(box, *size) for box, _ in things]
        if self.encode_mask is not None:
            facts["segmentations"] = [row.get("segmentation") for _, row in things]
            masks = [torch.from_numpy(read_mask(row.get("segmentation"), *size).copy()) for _, row in things]
            codes = [self.encode_mask(mask, box) for mask, (box, _) in zip(masks, things)]
            answer = [loc + "".join(f"<seg{code:03d}>" for code in row) for loc, row in zip(answer, codes)]
        suffix = " ; ".join(f"{tokens} {label}" for tokens in answer)
        prefix = f"{'detect' if self.encode_mask is None else 'segment'} {label}"
        path = find_picture(image.get("file_name"), self.folders)
        return Example(path, prefix, suffix, answers=(suffix,), facts=facts)


def _corners(row: dict) -> Box:
    """COCO's box (x, y, width, height) as (y_min, x_min, y_max, x_max)."""
    box = row.get("bbox")
    good = isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))
    if not good or box[2] < 0 or box[3] < 0:
        raise ValueError(f"annotation {row.get('id')} has bbox {box!r:.80}: expected [x, y, width, height] in pixels")
    x, y, width, height = map(float, box)
    return y, x, y + height, x + width


def has_boxes(example: Example) -> bool:
    """Whether its facts are those of COCO; a row of one's own may use one of their names for something else."""
    sizes = [example.facts.get(edge) for edge in ("height", "width")]
    return {"annotation_ids", "boxes", "labels"} <= example.facts.keys() and all(isinstance(one, int) for one in sizes)


def picture_of(example: Example) -> Image.Image:
    """The picture of an example, upright and in RGB.

    Raises
    ------
    ValueError
        If it is damaged, or is of another shape than its boxes in a COCO file need.
    FileNotFoundError, RuntimeError
        As `load_image`.
    """
    picture = load_image(example.image)
    if has_boxes(example):
        (width, height), high, wide = picture.size, example.facts["height"], example.facts["width"]
        if abs(width * high - height * wide) > max(width + height, wide + high):
            raise ValueError(
                f"the file says {wide} x {high}, the picture is {width} x {height} once turned as its EXIF says: its boxes "
                "would lie elsewhere, so mend the file, or give the pictures that it was made for"
            )
    return picture


def read_mask(segmentation: object, height: int, width: int) -> np.ndarray:
    """COCO's three ways to write a mask: polygons, runs as numbers, runs as text.

    Runs count pixels column by column, first those outside the thing, then inside, and so on.

    Parameters
    ----------
    segmentation : list or dict
        [[x, y, x, y, ...], ...] in pixels; or {"size": [height, width], "counts": list or str}.
    height, width : int
        Of the picture.

    Returns
    -------
    numpy.ndarray
        Boolean (height, width).

    Raises
    ------
    ValueError
        If it is none of the three, or belongs to a picture of another size.
    RuntimeError
        If polygons are to be filled and pycocotools is not installed.
    """
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"a mask of size {segmentation.get('size')} for a picture of {[height, width]}")
        runs = segmentation.get("counts")
        runs = _runs_of_text(runs) if isinstance(runs, str) else runs
        whole = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
        if not whole or sum(runs) != height * width:
            raise ValueError(f"the runs of a mask do not fill its {height} x {width} pixels")
        inside = np.arange(len(runs)) % 2 == 1
        return np.repeat(inside, runs).reshape(width, height).T
    reach = 4 * max(height, width)  # far outside lies a damaged number
    if (
        not isinstance(segmentation, list)
        or not segmentation
        or not all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in segmentation)
        or not all(isinstance(place, int | float) and abs(place) <= reach for part in segmentation for place in part)
    ):
        raise ValueError("a segmentation that is neither polygons of 3 or more corners nor runs")
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise RuntimeError("polygons are filled by pycocotools: pip install pycocotools") from error
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))).astype(bool)


def _runs_of_text(text: str) -> list[int]:
    """Runs from COCO's text. A letter holds five bits of a number, the lowest first, and one that says whether more follow.
    From the fourth run on, the number is the difference to the run two before."""
    runs, place = [], 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            letter = ord(text[place]) - 48 if place < len(text) else -1
            if not 0 <= letter < 64 or shift > 60:
                raise ValueError(f"the runs of a mask are damaged at letter {place + 1}")
            value |= (letter & 31) << shift
            shift += 5
            place += 1
            more = bool(letter & 32)
        if letter & 16:  # a negative number
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def located(error: Exception, where: str) -> Exception:
    """The same sentence with its place in front, as an error that a reader may expect."""
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"{where}: {error}" if where else str(error))


class Examples(Sequence):
    """The examples of a file, read one by one when they are asked for. It can be sent to other processes.

    Attributes
    ----------
    form : str
        One of `FORMS`: what the file was taken for.
    remarks : tuple of str
        Sentences about what was left aside.
    """

    def __init__(self, source, form: str, remarks: Sequence[str] = ()):
        self._source, self.form, self.remarks = source, form, tuple(remarks)

    def __len__(self) -> int:
        return len(self._source)

    def where(self, index: int) -> str:
        """Where an example stands, also where it cannot be read."""
        return self._source.where(index)

    def __getitem__(self, index):
        """The example; a list of them for a slice.

        Raises
        ------
        ValueError
            If the row is broken. The sentence begins with its place.
        RuntimeError
            If the file was changed since it was opened, or cannot be read now.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        try:
            return replace(self._source.example(index), where=self.where(index))
        except (ValueError, OSError) as error:
            raise located(error, self.where(index)) from error


def read_examples(
    path: str | Path,
    *,
    form: str = "auto",
    root: str | Path | None = None,
    annotations: str | Path | None = None,
    encode_mask: Callable[[torch.Tensor, Box], Sequence[int]] | None = None,
    per_image: bool = False,
) -> Examples:
    """Open a file of examples; only ids and places in the file are held in memory, no rows.

    | form | file | prefix | suffix |
    |---|---|---|---|
    | `prefix` | rows `{"image", "prefix", "suffix"}` | as it stands | as it stands |
    | `vqa` | rows `{"image", "question", "answer"}` | `answer en {question}` | the answer; of a list, the most common |
    | `text` | rows `{"image", "text"}` | `caption en` | the text |
    | `vqav2` | the official pair of files | `answer en {question}` | `multiple_choice_answer` |
    | `coco-captions` | COCO captions | `caption en` | the caption |
    | `coco-detect` | COCO instances | `detect {category}` | all boxes of that category, from left to right |
    | `coco-segment` | COCO instances | `segment {category}` | the same, with masks |

    Rows are the lines of a JSONL file, or the entries of a JSON array.

    Parameters
    ----------
    path : path
        The file; of VQAv2, the questions.
    form : str
        One of `FORMS`; `auto` looks into the file. COCO instances are taken for `coco-detect`.
    root : path, optional
        Where the paths of pictures begin; by default the file's folder, and for COCO and VQAv2 the places where the
        official archives put them.
    annotations : path, optional
        The answers of VQAv2. Without them each suffix is empty.
    encode_mask : callable, optional
        For `coco-segment`: takes a mask, a boolean tensor (height, width), and its box in pixels, and gives the numbers of
        16 seg tokens.
    per_image : bool
        For COCO captions: an example for each picture, with all its captions as `answers`, to measure with. It changes
        nothing about the other forms.

    Raises
    ------
    FileNotFoundError
        If a file or the root is missing.
    ValueError
        If the file is empty, of no known form, or not of the form that is asked for.
    """
    path = _data_file(path)
    if form not in ("auto", *FORMS):
        raise ValueError(f"form is {form!r}: expected auto or one of {', '.join(FORMS)}")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(f"no such folder: {root} (root, where the paths of pictures begin)")
    folders = (path.parent,) if root is None else (Path(root),)
    tables, plain = _open_tables(path)
    found = _detect(path, tables) if form == "auto" else form
    if annotations is not None and found != "vqav2":
        raise ValueError(f"{path.name} is of the form {found}, which has no second file: leave annotations out")
    if found in ROW_FORMS:
        if "" not in tables:
            raise ValueError(f"{path.name} has no rows of the form {found}: it is one JSON object, expected JSON lines")
        examples = Examples(_RowSource(tables[""], found, folders), found)
    elif found == "vqav2":
        examples = _open_questions(path, tables, plain, annotations, folders, root is None)
    else:
        folders = _coco_folders(path.stem.rpartition("_")[2], folders, root is None)
        if found == "coco-captions":
            examples = _open_captions(path, tables, folders, per_image)
        else:
            examples = _open_instances(path, tables, folders, found, encode_mask)
    if len(examples) == 0:
        raise ValueError("; ".join((f"{path} holds no example", *examples.remarks)))
    return examples


def _data_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a JSONL or JSON file that names the pictures in it")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():  # a pipe, say, which can be read only once
        raise ValueError(f"{path} is no file: write the rows into one first")
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] in (b"\x1f\x8b", b"PK", b"BZ") or head == b"\xfd7zX":
        raise ValueError(f"{path} is compressed: unpack it first")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        raise ValueError(f"{path} is not UTF-8 (it may be UTF-16): save it as UTF-8")
    return path


def _open_tables(path: Path) -> tuple[dict[str, Table], dict[str, object]]:
    """The arrays of a JSON file, or one table of lines."""
    with path.open("rb") as file:
        window = _Window(file)
        first = window.next()
        if first == "":
            raise ValueError(f"{path} is empty")
        is_document = first == "[" or (first == "{" and _is_document(window))
    try:
        return index_document(path) if is_document else ({"": index_lines(path)}, {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_document(window: _Window) -> bool:
    """Whether one JSON object with a known array follows, and not a line with a row."""
    with suppress(ValueError, RecursionError):  # a document may go on in the next line, a row does not
        first, _, rest = window.text[window.at :].partition("\n")
        if "image" in json.loads(first) or rest.strip():
            return False
    try:
        window.take("{")
        while window.next() != "}":
            name = window.value()
            window.take(":")
            if name == "image":
                return False
            if window.next() == "[" and name in _COLUMNS and name:
                return True
            window.value()
            if window.next() != "}":
                window.take(",")
    except ValueError:
        pass
    return False


def _detect(path: Path, tables: Mapping[str, Table]) -> str:
    if "questions" in tables:
        return "vqav2"
    if "annotations" in tables:
        try:
            keys = set().union(*tables["annotations"].rows(range(len(tables["annotations"]))[:1]))
        except ValueError as error:
            raise ValueError(f"{path}, annotation 1: {error}") from error
        if "caption" in keys:
            return "coco-captions"
        if "bbox" in keys:
            return "coco-detect"
        if "question_id" in keys:
            raise ValueError(
                f"{path} holds the answers of VQAv2: give the file of questions, and this one as annotations"
            )
        raise ValueError(f"{path}: its annotations have the keys {_quoted(keys)}, expected 'caption' or 'bbox'")
    if "" not in tables:
        raise ValueError(f"{path} has no 'annotations' and no 'questions': expected a COCO or VQAv2 file")
    seen = []
    for index in range(min(100, len(tables[""]))):
        try:
            row = tables[""].rows([index])[0]
        except ValueError as error:
            seen.append(f"of the first: {error}")
            continue
        for form, keys in ROW_FORMS.items():
            if all(key in row for key in keys):
                return form
        seen.append(f"the first has the keys {_quoted(row)}")
    with path.open("rb") as file:
        line = file.readline(200).decode("utf-8", "replace").strip("\ufeff \r\n")
    if line[:1] not in ("", "{", "["):
        raise ValueError(
            f"{path} is neither JSON lines nor JSON, it begins with {line[:60]!r}: write one object like "
            '{"image": "a.png", "text": "a cat"} in each line'
        )
    wanted = "; ".join(_quoted(("image", *keys)) for keys in ROW_FORMS.values())
    raise ValueError(f"{path} is of no known form: expected rows with {wanted}; {seen[0] if seen else 'there is none'}")


def _coco_folders(subset: str, folders: tuple[Path, ...], look_around: bool) -> tuple[Path, ...]:
    """Where the official archives put pictures: beside the file, in a folder named as the subset, or one level up."""
    around = (*folders, folders[0].parent) if look_around else folders
    return tuple(place for folder in around for place in ((folder, folder / subset) if subset else (folder,)))


def _tables_for(path: Path, tables: Mapping[str, Table], names: Sequence[str], form: str) -> list[Table]:
    if missing := [name for name in names if name not in tables]:
        raise ValueError(f"{path} has no array {_quoted(missing)}, which the form {form} needs")
    return [tables[name] for name in names]


def _open_questions(path, tables, plain, annotations, folders, look_around) -> Examples:
    (questions,) = _tables_for(path, tables, ["questions"], "vqav2")
    subset = str(plain.get("data_subtype", ""))
    folders = _coco_folders(subset, folders, look_around)
    if annotations is None:
        remark = "there are no answers: they stand in a second file, which is given as annotations"
        return Examples(_QuestionSource(questions, None, None, subset, folders), "vqav2", [remark])
    second = _data_file(annotations)
    others, _ = _open_tables(second)
    (answers,) = _tables_for(second, others, ["annotations"], "vqav2")
    asked, answered = _ids(questions, "question_id", "question"), _ids(answers, "question_id", "annotation")
    for ids, file in ((asked, path), (answered, second)):
        if (twice := _Find(ids).repeated()) is not None:
            raise ValueError(f"{file}: question_id {twice} stands twice")
    both = np.isin(asked, answered).sum()
    if both == 0:
        raise ValueError(f"no question of {path.name} is answered in {second.name}: they are of different parts")
    spare = len(answered) - both
    remarks = [f"{spare} answers of {second.name} belong to no question here and are left aside"] if spare else []
    return Examples(_QuestionSource(questions, answers, _Find(answered), subset, folders), "vqav2", remarks)


def _find_images(path: Path, images: Table) -> _Find:
    find = _Find(_ids(images, "id", "image"))
    if (twice := find.repeated()) is not None:
        raise ValueError(f"{path}: image id {twice} stands twice in 'images'")
    return find


def _open_captions(path, tables, folders, per_image) -> Examples:
    images, annotations = _tables_for(path, tables, ["images", "annotations"], "coco-captions")
    image_ids = _ids(annotations, "image_id", "annotation")
    find_image, pictures, remarks = _find_images(path, images), None, []
    if per_image:
        _, first = np.unique(image_ids, return_index=True)
        pictures = image_ids[np.sort(first)]
        bare = len(images) - np.isin(images.columns["id"], pictures).sum()
        remarks = [f"{bare} pictures have no caption and are left aside"] if bare else []
    source = _CaptionSource(images, annotations, find_image, _Find(image_ids), pictures, folders)
    return Examples(source, "coco-captions", remarks)


def _open_instances(path, tables, folders, form, encode_mask) -> Examples:
    if form == "coco-segment" and encode_mask is None:
        raise ValueError(
            "coco-segment turns masks into seg tokens by the encoder in big_vision's vae-oid.npz, which is not given "
            "(encode_mask); without it the file can be read as coco-detect"
        )
    names = ["images", "annotations", "categories"]
    images, annotations, categories = _tables_for(path, tables, names, form)
    columns = [_ids(annotations, name, "annotation") for name in ("image_id", "category_id")]
    crowd = _crowds(path, annotations)
    kept, crowds = np.flatnonzero(~crowd), np.flatnonzero(crowd)
    order = kept[np.lexsort([column[kept] for column in reversed(columns)])]
    new = np.zeros(len(order), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[order][1:] != column[order][:-1]
    begins = np.append(np.flatnonzero(new), len(order))
    category_ids = _ids(categories, "id", "category")
    if (twice := _Find(category_ids).repeated()) is not None:
        raise ValueError(f"{path}: category id {twice} stands twice in 'categories'")
    numbers = category_ids.tolist()
    named = {number: row.get("name") for number, row in zip(numbers, categories.rows(range(len(numbers))))}
    for number, name in named.items():
        if (
            not isinstance(name, str)
            or not name.strip()
            or not name.isprintable()
            or any(sign in name for sign in (";", "<loc", "<seg"))
        ):
            raise ValueError(
                f"{path}: category {number} is named {name!r}, expected a name in one line without ';', <loc and <seg"
            )
        named[number] = " ".join(name.split())  # as a prompt has it, and as an answer is read
    used: dict[str, object] = {}
    for number in np.unique(columns[1]).tolist():  # some tools add a category that nothing has
        name = named.get(number)
        if name is not None and used.setdefault(name, number) != number:
            raise ValueError(
                f"{path}: categories {used[name]} and {number} are both named {name!r}: 'detect {name}' would have two "
                "answers, give each a name of its own"
            )
    remarks = [f"{crowd.sum()} crowds (iscrowd) are left aside"] if crowd.any() else []
    encode = encode_mask if form == "coco-segment" else None
    find_image, find_crowds = _find_images(path, images), _Find(columns[0][crowds])
    groups = (order, begins, crowds, find_crowds)
    return Examples(_InstanceSource(images, annotations, find_image, *groups, named, encode, folders), form, remarks)


def _crowds(path: Path, annotations: Table) -> np.ndarray:
    """For each annotation, whether it is a crowd."""
    values = annotations.columns["iscrowd"].tolist()
    known = (0, 1, None)  # true and false among them; a text is not: "0" would count as true
    for index, value in enumerate(values):
        if value not in known and (said := annotations.rows([index])[0].get("iscrowd")) not in known:
            raise ValueError(f"{path}, annotation {index + 1}: iscrowd is {said!r}, expected 0 or 1")
    return np.asarray([value in (1, "1") for value in values], bool)
