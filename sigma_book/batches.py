"""Batches that can be made again.

How do examples become batches, so that a run which stopped goes on with the very next one?

Tangled from chapters/15b_batches.py: edit there, then run python -m sigma_book.tangle.
"""

import errno
import hashlib
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from sigma_book.data import Example, Examples, located, picture_of
from sigma_book.generation import whole_number
from sigma_book.locate import draw_boxes, parse
from sigma_book.processor import Batch, Processor, encode_picture, file_beside, load_image, make_folder

__all__ = [
    "Batches",
    "Survey",
    "TrainingBatch",
    "collate",
    "contact_sheet",
    "draw_lengths",
    "epoch_order",
    "survey",
    "token_counts",
    "write_survey",
]


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
        The most tokens in a row: picture, prompt and answer together.
    truncate : bool
        Cut what is longer, in place of refusing it. Prompt and answer may each have half of the room for text, and what
        the other leaves. What is cut loses its end; a cut answer is not followed by the end token.

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
        image = picture_of(example).resize((side, side), Image.Resampling.BICUBIC)
    except (ValueError, OSError) as error:
        raise located(error, example.where) from error
    return _Ready(image, prefix, example.suffix, cut)


def token_counts(processor: Processor, example: Example) -> tuple[int, int, int]:
    """Tokens of the picture with the beginning, of the prompt with its newline, of the answer with its end.

    Raises
    ------
    ValueError
        If prompt or answer holds `<image>`.
    """
    for name, text in (("prompt", example.prefix), ("suffix", example.suffix)):
        if "<image>" in text:
            raise ValueError(f"{name} {text!r} contains <image>: leave it out, the picture's place is set for you")
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
        prefix = decode(ids[:keep], skip_special_tokens=False).rstrip("\ufffd")  # part of a letter that was cut
        keep -= 1
    return prefix, True


def _lay_out(processor: Processor, rows: Sequence[_Ready], max_length: int | None) -> Batch:
    batch = processor.prepare([row.image for row in rows], [row.prefix for row in rows], [row.suffix for row in rows])
    if max_length is None or batch.input_ids.shape[1] <= max_length:
        return batch
    wide = ("input_ids", "attention_mask", "token_type_ids", "labels")
    return replace(batch, **{name: getattr(batch, name)[:, :max_length] for name in wide})


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch.

    Parameters
    ----------
    count : int
        How many examples there are.
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
        The most tokens in a row: the model's context.
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
            worker_init_fn=_go_on_reading,
            generator=torch.Generator(),  # its own, so that the global one stays as it is
        )
        return iter(loader)


def _as_it_is(made: "_Made") -> "_Made":
    """What the loader does to a batch: nothing, it is one already."""
    return made


def _go_on_reading(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal. A worker leaves it to the run, which ends its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        Lengths of the rows that can be read.
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
    seen: dict[bytes, str | None] = {}  # a picture's digest, and why it cannot be used
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
            new = {name: example for _, _, example, name in rows if name not in seen}
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


def _why_broken(example: Example) -> str | None:
    try:
        picture_of(example)
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
    make_folder(folder)
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
