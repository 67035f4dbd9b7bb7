"""What to learn from: data.

How does a folder of pictures and a file of answers become what a model learns from?

Tangled from chapters/15_data.py: edit there, then run python -m sigma_book.tangle.
"""

import errno
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from sigma_book.generation import whole_number
from sigma_book.locate import Box, draw_boxes, encode_box, parse
from sigma_book.processor import Batch, Processor, encode_picture, file_beside, load_image

__all__ = [
    "FORMS",
    "ROW_FORMS",
    "Batches",
    "Example",
    "Examples",
    "Survey",
    "Table",
    "TrainingBatch",
    "collate",
    "contact_sheet",
    "draw_lengths",
    "epoch_order",
    "find_picture",
    "index_document",
    "index_lines",
    "read_examples",
    "read_mask",
    "survey",
    "token_counts",
    "write_survey",
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
        What to answer; empty where the file has only a question, which no batch for learning takes.
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


def collate(
    processor: Processor, examples: Sequence[Example], *, max_length: int | None = None, truncate: bool = False
) -> Batch:
    """Examples to one batch, padded on the right, with labels on the suffixes only.

    Parameters
    ----------
    processor : Processor
    examples : sequence of Example
        At least one.
    max_length : int, optional
        Most tokens in a row: picture, prompt and answer together.
    truncate : bool
        Cut what is longer, in place of refusing it. Prompt and answer may each have half of the room for text, and what
        the other leaves. Both lose their ends; a cut answer is not followed by the end token.

    Raises
    ------
    ValueError
        If there is no example; if one has an empty suffix, a picture that cannot be read, or more than `max_length`
        tokens. The sentence begins with the example's `where`.
    FileNotFoundError
        If a picture is missing.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    rows = [_ready(processor, example, max_length, truncate) for example in examples]
    return _lay_out(processor, rows, max_length)


@dataclass(frozen=True)
class _Ready:
    """A row that is known to be good: its picture is open and as small as the model sees it."""

    image: Image.Image
    prefix: str
    suffix: str
    cut: bool


def _ready(processor: Processor, example: Example, max_length: int | None, truncate: bool) -> _Ready:
    try:
        if not example.suffix:
            raise ValueError("the answer is empty: there is nothing to learn")
        prefix, cut = _fit_text(processor, example.prefix, example.suffix, max_length, truncate)
        side = processor.image_size  # a batch of whole photographs would fill the memory
        image = load_image(example.image).resize((side, side), Image.Resampling.BICUBIC)
    except (ValueError, OSError) as error:
        raise _located(error, example.where) from error
    return _Ready(image, prefix, example.suffix, cut)


def _located(error: Exception, where: str) -> Exception:
    """The same sentence with its place in front, as an error that a reader may expect."""
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"{where}: {error}" if where else str(error))


def token_counts(processor: Processor, example: Example) -> tuple[int, int, int]:
    """Tokens of the picture with the beginning, of the prompt with its newline, of the answer with its end.

    Raises
    ------
    ValueError
        If the prompt holds `<image>`.
    """
    if "<image>" in example.prefix:
        raise ValueError(
            f"prompt {example.prefix!r} contains <image>: leave it out, the picture's place is set for you"
        )
    encode = processor.tokenizer.encode
    return processor.num_image_tokens + 1, len(encode(f"{example.prefix}\n")), len(encode(example.suffix)) + 1


def _fit_text(
    processor: Processor, prefix: str, suffix: str, max_length: int | None, truncate: bool
) -> tuple[str, bool]:
    """The prompt, cut if it must be, and whether the row is too long; an answer is cut when the row is laid out."""
    picture, prompt, answer = token_counts(processor, Example(b"", prefix, suffix))
    if max_length is None or picture + prompt + answer <= max_length:
        return prefix, False
    if not truncate:
        raise ValueError(
            f"{picture} tokens of picture, {prompt} of prompt and {answer} of answer do not fit into {max_length}: "
            "shorten the text, or ask for a cut (truncate, on the command line --truncate)"
        )
    room = max_length - picture - 1  # beside the newline
    if room < 2:
        raise ValueError(f"{max_length} tokens leave no room for text beside {picture} of the picture")
    answer_room = max(room // 2, room - (prompt - 1))
    prompt_room = room - min(answer, answer_room)
    encode, decode = processor.tokenizer.encode, processor.tokenizer.decode
    ids, keep = encode(prefix), prompt_room
    while len(encode(f"{prefix}\n")) - 1 > prompt_room:  # a cut text may be cut into other pieces, even into more
        prefix = decode(ids[:keep], skip_special_tokens=False)
        keep -= 1
    return prefix, True


def _lay_out(processor: Processor, rows: Sequence[_Ready], max_length: int | None) -> Batch:
    batch = processor.prepare([row.image for row in rows], [row.prefix for row in rows], [row.suffix for row in rows])
    if max_length is None or batch.input_ids.shape[1] <= max_length:
        return batch
    wide = ("input_ids", "attention_mask", "token_type_ids", "labels")
    return replace(batch, **{name: getattr(batch, name)[:, :max_length] for name in wide})


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
            If the file is not the one that was indexed.
        """
        with self.path.open("rb") as file:
            state = os.fstat(file.fileno())
            if (state.st_size, state.st_mtime_ns) != (self.size, self.changed):
                raise RuntimeError(f"{self.path} was changed while it was in use: start again")
            found = []
            for index in indices:
                file.seek(int(self.starts[index]))
                found.append(_read_object(file.read(int(self.ends[index] - self.starts[index]))))
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


_BYTES_AT_ONCE = 1 << 24


_LONGEST_ENTRY = 1 << 26


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
        raise ValueError(f"image is {name!r}: expected the path of a picture")
    if "://" in name or name.startswith("data:"):
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        raise ValueError(f"image is {shown!r}, a URL: download the pictures first and write their paths")
    names = [name] if os.sep == "\\" or "\\" not in name else [name, PureWindowsPath(name).as_posix()]
    paths = [folder / spelled for folder in folders for spelled in names]
    return next((path for path in paths if path.exists()), paths[len(names) - 1])


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
                if end < len(self.text) or self._ended:
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
        ids = [int(one) if isinstance(one, float) and one.is_integer() else one for one in ids]  # some write 7.0
        self._waiting.append((start, window.base + window.at, *ids))
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
        image_id, question_id = row.get("image_id"), row.get("question_id")
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
        captions = tuple(_text(row.get("caption"), "caption").strip() for row in rows)
        own = 0 if self.pictures is not None else int(np.flatnonzero(numbers == index)[0])
        image = _image_row(self.images, self.find_image, image_id)
        facts = {"image_id": image_id.item(), "file_name": image.get("file_name")}
        if self.pictures is None:
            facts["annotation_id"] = rows[own].get("id")
        path = find_picture(image.get("file_name"), self.folders)
        return Example(path, "caption en", captions[own], answers=captions, facts=facts)


def _image_row(images: Table, find: _Find, image_id) -> dict:
    found = find.all(image_id)
    if len(found) == 0:
        raise ValueError(f"image_id {image_id} has no entry in 'images' of {images.path.name}")
    return images.rows(found[:1])[0]


@dataclass(frozen=True)
class _InstanceSource:
    """COCO instances: an example for each picture and each category on it."""

    images: Table
    annotations: Table
    find_image: _Find
    order: np.ndarray  # of annotations: those of one picture and category stand together
    begins: np.ndarray  # of each such group in `order`, and the end
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
        facts = {"image_id": image_id, "category_id": category_id, "height": size[0], "width": size[1]}
        facts |= {"file_name": image.get("file_name"), "boxes": [list(box) for box, _ in things]}
        facts |= {"labels": [label] * len(things), "annotation_ids": [row.get("id") for _, row in things]}
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
    good = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
    if not good or not all(math.isfinite(edge) for edge in box) or box[2] < 0 or box[3] < 0:
        raise ValueError(f"annotation {row.get('id')} has bbox {box!r}: expected [x, y, width, height] in pixels")
    x, y, width, height = map(float, box)
    return y, x, y + height, x + width


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
    """Runs from COCO's text: six bits in a letter, five of them a number's; from the fourth run on, the difference to the
    run two before."""
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
            If the file was changed since it was opened.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        try:
            return replace(self._source.example(index), where=self.where(index))
        except (ValueError, OSError) as error:
            raise _located(error, self.where(index)) from error


def read_examples(
    path: str | Path,
    *,
    form: str = "auto",
    root: str | Path | None = None,
    annotations: str | Path | None = None,
    encode_mask: Callable[[torch.Tensor, Box], Sequence[int]] | None = None,
    per_image: bool = False,
) -> Examples:
    """Open a file of examples; nothing but places in the file is held in memory.

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
        For COCO captions: an example for each picture, with all its captions as `answers`, to measure with.

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
    if per_image and found != "coco-captions":
        raise ValueError(f"{path.name} is of the form {found}: per_image is for coco-captions")
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
        raise ValueError(f"{path} holds no example")
    return examples


def _data_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a JSONL or JSON file that names the pictures in it")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
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
    crowd = np.asarray([bool(value) for value in annotations.columns["iscrowd"]], bool)
    kept = np.flatnonzero(~crowd)
    order = kept[np.lexsort([column[kept] for column in reversed(columns)])]
    new = np.zeros(len(order), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[order][1:] != column[order][:-1]
    begins = np.append(np.flatnonzero(new), len(order))
    numbers = _ids(categories, "id", "category").tolist()
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
    remarks = [f"{crowd.sum()} crowds (iscrowd) are left aside"] if crowd.any() else []
    encode = encode_mask if form == "coco-segment" else None
    source = _InstanceSource(images, annotations, _find_images(path, images), order, begins, named, encode, folders)
    return Examples(source, form, remarks)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch.

    Parameters
    ----------
    count : int
        Of examples.
    seed, epoch : int
        0 or more.

    Returns
    -------
    numpy.ndarray
        Each number below `count` once.

    Notes
    -----
    Examples stand in the order of random numbers drawn for them. NumPy promises that the bits of PCG64 never change, so the
    order is the same on any machine, with any version.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(draws, kind="stable")


@dataclass(frozen=True)
class TrainingBatch:
    """A batch to learn from.

    Parameters
    ----------
    batch : Batch
        Padded on the right, with labels.
    where : tuple of str
        Its rows, in order. Empty for a batch that only keeps this rank in step: all its labels are -100.
    state : dict
        JSON values; `Batches(..., start=state)` goes on with the batch behind this one.
    truncated : tuple of str
        Those of its rows that were cut.
    """

    batch: Batch
    where: tuple[str, ...]
    state: dict
    truncated: tuple[str, ...] = ()


class Batches:
    """Batches of all examples in an order that the seed decides, a new one in each epoch.

    Rank r of R takes the examples r, r + R, r + 2R, ... of that order, so that the ranks share the examples without overlap
    or loss, and all take the same number of steps. The last batch of an epoch may be short; where nothing is left for a
    rank, it gets a batch without rows (see `TrainingBatch.where`).

    Parameters
    ----------
    examples : sequence of Example
        From `read_examples`, or a list.
    processor : Processor
    batch_size : int
        Examples in a batch, on each rank.
    seed : int
        0 or more.
    epochs : int, optional
        How often each example is shown; None goes on for ever.
    rank, world_size : int
        Which share is taken, and of how many.
    workers : int
        Processes that read and prepare ahead; 0 does it here. The batches are the same.
    on_error : str
        `stop` raises at a row that cannot be read. `skip` leaves it out, so that its batch is shorter, counts it, and lists
        it once in the file `skipped`.
    skipped : path, optional
        A JSONL file, {"where", "reason"} in each line. It is added to, and what stands there from before is counted.
    max_length : int, optional
        Most tokens in a row: the model's context.
    truncate : bool
        Cut rows that are longer, and count them; see `collate`.
    start : dict, optional
        The `state` of a batch: go on behind it.

    Attributes
    ----------
    steps_per_epoch : int
    num_skipped, num_truncated : int
        Rows so far, each counted once.

    Raises
    ------
    ValueError
        If there is no example, an argument is out of its range, or `start` belongs to another run.
    RuntimeError
        While iterating, if an epoch passes without one row that can be read.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        batch_size: int,
        seed: int,
        *,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        on_error: str = "stop",
        skipped: str | Path | None = None,
        max_length: int | None = None,
        truncate: bool = False,
        start: dict | None = None,
    ):
        if len(examples) == 0:
            raise ValueError("batches need at least 1 example, got none")
        whole_number("batch_size", batch_size, least=1)
        whole_number("seed", seed, least=0)
        whole_number("world_size", world_size, least=1)
        whole_number("rank", rank, least=0, most=world_size - 1)
        whole_number("workers", workers, least=0)
        if epochs is not None:
            whole_number("epochs", epochs, least=1)
        if max_length is not None:
            whole_number("max_length", max_length, least=1)
        if truncate and max_length is None:
            raise ValueError("truncate=True needs max_length, the most tokens in a row")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is {on_error!r}: expected 'stop' or 'skip'")
        if on_error == "skip" and skipped is None:
            raise ValueError("on_error='skip' needs the path of a file (skipped) in which the rows are listed")
        self._run = {"seed": seed, "examples": len(examples), "batch_size": batch_size, "world_size": world_size}
        self.steps_per_epoch = -(-len(examples) // (batch_size * world_size))
        self._maker = _Maker(
            examples,
            processor,
            batch_size,
            seed,
            rank,
            world_size,
            self.steps_per_epoch,
            on_error,
            max_length,
            truncate,
        )
        self._workers = workers
        self._first = 0 if start is None else self._position(start)
        self._end = None if epochs is None else epochs * self.steps_per_epoch
        self._skipped = None if skipped is None else _SkippedRows(Path(skipped))
        self._cut = np.zeros(len(examples), bool)

    def _position(self, start: dict) -> int:
        for name, value in self._run.items():
            if start.get(name) != value:
                raise ValueError(
                    f"the place to go on from belongs to another run: {name} was {start.get(name)!r} and is {value!r}"
                )
        return whole_number("next", start.get("next"), least=0)

    @property
    def num_skipped(self) -> int:
        return 0 if self._skipped is None else self._skipped.count

    @property
    def num_truncated(self) -> int:
        return int(self._cut.sum())

    def __iter__(self) -> Iterator[TrainingBatch]:
        idle = 0  # steps without a batch
        for step, made in enumerate(self._made(), start=self._first):
            for where, reason in made.skipped:
                self._skipped.add(where, reason)
            if made.error is not None:
                raise made.error
            idle = idle + 1 if made.batch is None else 0
            if idle >= self.steps_per_epoch:
                raise RuntimeError(f"no row could be read in a whole epoch: see {self._skipped.path}")
            if made.batch is None:
                continue
            self._cut[list(made.cut)] = True
            state = {**self._run, "next": step + 1, "epoch": step // self.steps_per_epoch}
            yield TrainingBatch(made.batch, tuple(made.where.values()), state, tuple(made.where[i] for i in made.cut))

    def _made(self) -> Iterator["_Made"]:
        steps = count(self._first) if self._end is None else range(self._first, self._end)
        if self._workers == 0:
            return map(self._maker.__getitem__, steps)
        loader = torch.utils.data.DataLoader(
            self._maker,
            batch_size=None,
            sampler=steps,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its own, so that the global one stays as it is
        )
        return iter(loader)


def _as_it_is(made: "_Made") -> "_Made":
    return made


@dataclass(frozen=True)
class _Made:
    """What came of a step, to be sent from a worker: an error is a value here, so that its sentence arrives as it is."""

    batch: Batch | None = None
    where: Mapping[int, str] = field(default_factory=dict)  # of each row, by its number among the examples
    cut: tuple[int, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    error: Exception | None = None


class _Maker:
    """Makes the batch of any step; it holds no place, so any process can make any batch."""

    def __init__(
        self, examples, processor, batch_size, seed, rank, world_size, steps_per_epoch, on_error, max_length, truncate
    ):
        self.examples, self.processor = examples, processor
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.steps_per_epoch, self.on_error = steps_per_epoch, on_error
        self.max_length, self.truncate = max_length, truncate
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))  # of the epoch that was asked for last

    def __getitem__(self, step: int) -> _Made:
        epoch, step = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.examples), self.seed, epoch))
        share = self._order[1][self.rank :: self.world_size]
        good: list[tuple[int, str, _Ready]] = []
        skipped: list[tuple[str, str]] = []
        try:
            for index in share[step * self.batch_size : (step + 1) * self.batch_size]:
                self._take(int(index), good, skipped)
            if not good and self.world_size > 1:
                return self._in_step(skipped)
            if not good:
                return _Made(skipped=tuple(skipped))
            batch = _lay_out(self.processor, [row for _, _, row in good], self.max_length)
        except (ValueError, OSError, RuntimeError) as error:
            return _Made(error=error, skipped=tuple(skipped))
        where = {index: name for index, name, _ in good}
        return _Made(batch, where, tuple(index for index, _, row in good if row.cut), tuple(skipped))

    def _take(self, index: int, good: list, skipped: list) -> None:
        where = self.examples.where(index) if hasattr(self.examples, "where") else None
        try:
            example = self.examples[index]
            where = where or example.where or f"example {index + 1}"
            good.append((index, where, _ready(self.processor, example, self.max_length, self.truncate)))
        except (ValueError, OSError) as error:
            if self.on_error == "stop":
                raise
            where = where or f"example {index + 1}"
            skipped.append((where, str(error).removeprefix(f"{where}: ")))

    def _in_step(self, skipped: list) -> _Made:
        """A batch that teaches nothing, for a rank that has no row where others have one: a row without labels."""
        found: list[tuple[int, str, _Ready]] = []
        for index in self._order[1]:
            self._take(int(index), found, [])
            if found:
                batch = _lay_out(self.processor, [row for _, _, row in found], self.max_length)
                batch.labels.fill_(-100)
                return _Made(batch, skipped=tuple(skipped))
        return _Made(skipped=tuple(skipped))


class _SkippedRows:
    """The list of rows that were left out, in a file that several ranks may add to; each row stands in it once."""

    def __init__(self, path: Path):
        self.path, self._read, self._known = path, 0, set()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    @property
    def count(self) -> int:
        self._catch_up()
        return len(self._known)

    def _catch_up(self) -> None:
        if self.path.stat().st_size <= self._read:
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            lines = file.read().split(b"\n")
        self._read += sum(len(line) + 1 for line in lines[:-1])  # what has no end yet is read the next time
        for line in lines[:-1]:
            with suppress(ValueError, KeyError, TypeError):  # a full disk may have cut a line
                self._known.add(json.loads(line)["where"])

    def add(self, where: str, reason: str) -> None:
        self._catch_up()
        if where in self._known:
            return
        line = json.dumps({"where": where, "reason": reason}, ensure_ascii=False) + "\n"
        if self._read < self.path.stat().st_size:  # behind a line that was cut
            line = f"\n{line}"
        raw = line.encode("utf-8", "replace")
        try:
            with self.path.open("ab", buffering=0) as file:  # in one piece, so that lines of two processes do not mix
                written = file.write(raw)
            if written < len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError(f"{self.path} cannot be written ({error.strerror}): make room and go on") from error
        self._catch_up()


@dataclass(frozen=True)
class Survey:
    """What stands in a file of examples, found by reading all of it and opening each picture once.

    Parameters
    ----------
    examples, pictures : int
        Rows, and different pictures in them.
    picture_tokens : int
        Tokens of a row before the prompt.
    prompt_tokens, answer_tokens : numpy.ndarray
        Of the rows that can be read.
    max_length : int or None
        The context that rows must fit into.
    too_long : tuple
        (where, tokens too many) of rows that do not fit; cutting them is a choice that training has to be told.
    broken : tuple
        (where, reason) of rows that cannot be read or have nothing to learn.
    duplicates : tuple of str
        Where an earlier row is repeated: the same picture, prompt and answer.
    answers : tuple
        The most common answers, each with its number of rows; how many different ones there are stands in `num_answers`.
    """

    examples: int
    pictures: int
    picture_tokens: int
    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray
    max_length: int | None
    too_long: tuple[tuple[str, int], ...]
    broken: tuple[tuple[str, str], ...]
    duplicates: tuple[str, ...]
    answers: tuple[tuple[str, int], ...]
    num_answers: int

    def lines(self) -> list[str]:
        """The report, a sentence or two in each line."""
        good = len(self.prompt_tokens)
        said = [f"{self.examples:,} examples with {self.pictures:,} pictures, {good:,} of them can be learned from"]
        for name, tokens in (("prompt", self.prompt_tokens), ("answer", self.answer_tokens)):
            if good:
                middle, most = np.percentile(tokens, [50, 95], method="lower")
                said.append(
                    f"tokens of the {name}: half have {middle} or fewer, 95 % {most}, the longest {tokens.max()}"
                )
        if self.max_length is not None:
            said.append(
                f"too long for {self.max_length} tokens, {self.picture_tokens} of them before the prompt: "
                f"{len(self.too_long):,} rows"
            )
            if self.too_long:
                where, most = max(self.too_long, key=lambda pair: pair[1])
                said.append(f"  by up to {most} tokens ({where}): shorten them, or train with --truncate")
        said.append(f"broken: {len(self.broken):,} rows")
        said += [f"  {where}: {reason}" for where, reason in self.broken[:5]]
        said += ["  ..."] * (len(self.broken) > 5)
        again = f", the first is {self.duplicates[0]}" if self.duplicates else ""
        said.append(f"repeated: {len(self.duplicates):,} rows{again}")
        common = ", ".join(f"{_short_text(answer, 30)} ({number:,})" for answer, number in self.answers)
        said.append(f"different answers: {self.num_answers:,}; the most common: {common or 'none'}")
        return said


def survey(examples: Sequence[Example], processor: Processor, max_length: int | None = None) -> Survey:
    """Read all examples, count their tokens and open each picture once; a bar shows how far it is.

    Parameters
    ----------
    examples : sequence of Example
        From `read_examples`, or a list.
    processor : Processor
        Its tokenizer counts.
    max_length : int, optional
        The model's context, in tokens.

    Returns
    -------
    Survey
    """
    prompts, answers = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.int32)
    digests = np.zeros((len(examples), 2), np.uint64)  # of the whole row, and of the answer
    seen: dict[bytes, str | None] = {}  # a picture's digest, and why it cannot be opened
    broken: list[tuple[str, str]] = []
    kept: list[int] = []
    too_long: list[tuple[str, int]] = []
    texts: Counter = Counter()
    with ThreadPoolExecutor() as pool, tqdm(total=len(examples), desc="reading", disable=None) as bar:
        for start in range(0, len(examples), 256):
            rows = []
            for index in range(start, min(start + 256, len(examples))):
                where = _where_in(examples, index)
                try:
                    example = examples[index]
                    if not example.suffix:
                        raise ValueError("the answer is empty: there is nothing to learn")
                    _, prompts[index], answers[index] = token_counts(processor, example)
                    rows.append((index, where, example, _digest(_picture_name(example.image))))
                except (ValueError, OSError) as error:
                    broken.append((where, str(error).removeprefix(f"{where}: ")))
            new = {name: example.image for _, _, example, name in rows if name not in seen}
            seen.update(zip(new, pool.map(_why_broken, new.values())))
            for index, where, example, name in rows:
                if seen[name] is not None:
                    broken.append((where, seen[name]))
                    continue
                kept.append(index)
                excess = int(processor.num_image_tokens + 1 + prompts[index] + answers[index]) - (
                    max_length or math.inf
                )
                if excess > 0:
                    too_long.append((where, excess))
                digests[index] = [
                    int.from_bytes(_digest(part)[:8], "big")
                    for part in (f"{name.hex()} {example.prefix!r} {example.suffix!r}", example.suffix)
                ]
                if len(texts) < 100_000 or example.suffix in texts:  # enough to find the most common ones
                    texts[example.suffix] += 1
            bar.update(min(256, len(examples) - start))
    good = np.asarray(kept, np.int64)
    _, first = np.unique(digests[good, 0], return_index=True)
    again = np.delete(good, first)
    return Survey(
        len(examples),
        len(seen),
        processor.num_image_tokens + 1,
        prompts[good],
        answers[good],
        max_length,
        tuple(too_long),
        tuple(broken),
        tuple(_where_in(examples, int(index)) for index in again),
        tuple(texts.most_common(5)),
        len(np.unique(digests[good, 1])),
    )


def _where_in(examples: Sequence[Example], index: int) -> str:
    """Where an example stands, also where it cannot be read."""
    where = examples.where(index) if isinstance(examples, Examples) else examples[index].where
    return where or f"example {index + 1}"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _picture_name(image: object) -> str:
    return str(image) if isinstance(image, str | Path) else f"in memory {id(image)}"


def _why_broken(image: object) -> str | None:
    try:
        load_image(image)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _short_text(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


_ORANGE, _GREEN, _GROUND = "#e69f00", "#009e73", "#8c8c8c"  # prompts, answers and the rest, as in the book's figures


def draw_lengths(found: Survey) -> Image.Image:
    """A histogram of the tokens of prompts, and one of answers."""
    picture = Image.new("RGB", (900, 560), "white")
    canvas = ImageDraw.Draw(picture)
    for top, name, tokens, colour in (
        (0, "prompt", found.prompt_tokens, _ORANGE),
        (280, "answer", found.answer_tokens, _GREEN),
    ):
        _draw_bars(canvas, top, f"tokens of the {name}", tokens, colour)
    return picture


def _draw_bars(canvas: ImageDraw.ImageDraw, top: int, title: str, tokens: np.ndarray, colour: str) -> None:
    left, right, base, high = 80, 870, top + 230, top + 50
    font = ImageFont.load_default(size=16)
    canvas.text((left, top + 14), f"{title}, rows in each bar", fill="black", font=font)
    canvas.line((left, base, right, base), fill="black")
    if not len(tokens):
        return
    longest = int(tokens.max())
    width = -(-(longest + 1) // 60)  # lengths in a bar: at most 60 bars
    rows = np.bincount(tokens // width, minlength=longest // width + 1)
    step = (right - left) / len(rows)
    for place, number in enumerate(rows):
        height = (base - high) * number / rows.max()
        if number:  # a single row stays visible
            canvas.rectangle(
                (left + place * step, base - max(2, height), left + (place + 0.85) * step, base), fill=colour
            )
    for place in range(0, len(rows), -(-len(rows) // 10)):
        middle = left + (place + 0.43) * step
        canvas.text((middle, base + 6), str(place * width), fill="black", font=font, anchor="ma")
    canvas.text((left - 8, high), f"{rows.max():,}", fill="black", font=font, anchor="rm")


def contact_sheet(examples: Sequence[Example], columns: int = 4) -> Image.Image:
    """Pictures in a grid, with prompt and answer under each; boxes of an answer are drawn.

    Letters that Pillow's own font lacks appear as empty frames.

    Raises
    ------
    ValueError, FileNotFoundError
        If a picture cannot be read.
    """
    side, gap, text_height = 260, 16, 108
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text_height + gap) + gap), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, example in enumerate(examples):
        left = gap + number % columns * (side + gap)
        top = gap + number // columns * (side + text_height + gap)
        picture = load_image(example.image)
        picture = ImageOps.contain(picture, (side, side), Image.Resampling.BICUBIC)
        if "<loc" in example.suffix:
            picture = draw_boxes(picture, parse(example.suffix, picture.height, picture.width)[0])
        sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
        canvas.rectangle((left, top, left + side - 1, top + side - 1), outline=_GROUND)
        used = _write(canvas, (left, top + side + 4), example.prefix, "#9c6b00", font, side, 2)
        _write(canvas, (left, top + side + 8 + used), example.suffix, "#00694c", font, side, 3)
    return sheet


def _write(canvas, place, text: str, colour: str, font, width: int, most: int) -> int:
    """Write a text in at most so many lines; returns how high they are."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())[:600]
    lines = [""]
    for letter in text:
        if canvas.textlength(lines[-1] + letter, font=font) > width:
            space = lines[-1].rfind(" ") + 1 or len(lines[-1])  # break behind a word where there is one
            lines[-1], rest = lines[-1][:space], lines[-1][space:]
            lines.append(rest)
        lines[-1] += letter
    if len(lines) > most:
        lines = lines[:most]
        while canvas.textlength(f"{lines[-1]}…", font=font) > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    for number, line in enumerate(lines):
        canvas.text((place[0], place[1] + 19 * number), line, fill=colour, font=font)
    return 19 * len(lines)


def write_survey(found: Survey, examples: Sequence[Example], folder: str | Path) -> list[Path]:
    """Write `lengths.png`, `examples.png` with twelve examples, `survey.json`, and lists of rows: `broken.jsonl`,
    `too_long.jsonl` and `repeated.jsonl`.

    The twelve are the first of the order with seed 0 that can be read.

    Returns
    -------
    list of Path
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bad, chosen = {where for where, _ in found.broken}, []
    for index in epoch_order(len(examples), 0, 0):
        if len(chosen) < 12 and _where_in(examples, int(index)) not in bad:
            chosen.append(examples[int(index)])
    numbers = {
        "examples": found.examples,
        "pictures": found.pictures,
        "broken": len(found.broken),
        "repeated": len(found.duplicates),
        "max_length": found.max_length,
        "too_long": len(found.too_long),
        "picture_tokens": found.picture_tokens,
        "prompt_tokens": dict(sorted(Counter(found.prompt_tokens.tolist()).items())),  # rows of each length
        "answer_tokens": dict(sorted(Counter(found.answer_tokens.tolist()).items())),
        "different_answers": found.num_answers,
        "common_answers": [list(pair) for pair in found.answers],
    }
    lists = {
        "broken": [{"where": where, "reason": reason} for where, reason in found.broken],
        "too_long": [{"where": where, "tokens_too_many": excess} for where, excess in found.too_long],
        "repeated": [{"where": where} for where in found.duplicates],
    }
    contents = {"survey.json": f"{json.dumps(numbers, indent=2, ensure_ascii=False)}\n".encode()}
    for name, rows in lists.items():
        contents[f"{name}.jsonl"] = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    contents["lengths.png"] = encode_picture(draw_lengths(found), "PNG")
    if chosen:
        contents["examples.png"] = encode_picture(contact_sheet(chosen), "PNG")
    for name, content in contents.items():
        with file_beside(folder / name) as fresh:
            fresh.write_bytes(content)
    return [folder / name for name in contents]
