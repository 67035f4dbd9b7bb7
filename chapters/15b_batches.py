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
# # Batches that can be made again
#
# *How do examples become batches, so that a run which stopped goes on with the very next one?*
#
# **You build** rows with labels, batches of them in an order that a seed decides, and a look at a file before anyone trains
# on it. **You need** chapters 11 (the processor) and 15 (data). **Exports** the module `sigma_book.batches`.

# %%
# | export
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


# %%
import random
import tempfile

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from sigma_book import load
from sigma_book.data import read_examples
from sigma_book.style import ANSWER, GREY, HEADS, PICTURE, PROMPT, check, draw_tokens, save, use_style
from sigma_book.world import SHAPES, SIZE, ask, caption, draw_scene, make_scene

use_style()

# %% [markdown]
# ## The picture
#
# A model learns by being asked, at each place of a row, what comes next. Most of the row is not its business: it should
# not learn to write our questions, and nobody can write a picture token. Only the answer is to be learned.

# %%
row = ["pic", "pic", "...", "pic", "bos", "what", "colour", "?", "\\n", "red", "eos"]
kinds = ["picture"] * 4 + ["prompt"] * 5 + ["answer"] * 2
figure, axis = plt.subplots(figsize=(7, 1.5))
draw_tokens(axis, row, kinds)
for place in range(len(kinds)):
    learns = place + 1 < len(kinds) and kinds[place + 1] == "answer"
    axis.text(
        place + 0.46,
        -0.45,
        row[place + 1] if learns else "-",
        ha="center",
        fontsize=8,
        color=ANSWER if learns else GREY,
    )
axis.set_ylim(-0.7, 1.1)
save(figure, "15b_labels")
plt.show()

# %% [markdown]
# *Figure: a row of tokens, four of the picture, five of the prompt, two of the answer; below each, what that place is
# asked for, and a dash where nothing is asked. Only the newline (asked for "red") and "red" (asked for the end) have
# something to learn.*
#
# A few questions about the drawn world, to try things on:


# %%
def examples_from(seeds, task="colour") -> list[Example]:
    found = []
    for seed in seeds:
        scene = make_scene(seed)
        question = ask(scene, task, random.Random(seed))
        if question is not None:
            found.append(Example(draw_scene(scene), question.prompt, question.answer, f"scene {seed}"))
    return found


examples = examples_from(range(40))
[(example.prefix, example.suffix) for example in examples[:3]]

# %% [markdown]
# ## First by hand
#
# One row. A label stands at its token's own place; the loss of chapter 10 moves it one to the left, so that each place is
# asked for the label of the next. Where there is nothing to learn the label is -100: that number is a convention, and the
# loss skips it.

# %%
processor = load().processor
tokenizer = processor.tokenizer
one = examples[0]
prefix = [tokenizer.image_id] * processor.num_image_tokens + [tokenizer.bos_id] + tokenizer.encode(one.prefix + "\n")
suffix = tokenizer.encode(one.suffix) + [tokenizer.eos_id]
ids_by_hand = prefix + suffix
labels_by_hand = [-100] * len(prefix) + suffix
len(ids_by_hand), [tokenizer.decode([token], skip_special_tokens=False) for token in suffix]

# %% [markdown]
# ## Several rows, one tensor
#
# Rows differ in length, so short ones are filled up with padding. For *answering* the padding stands on the left, so
# that all rows end at the same place and go on together. For *learning* it stands on the right, where no answer token
# can see it.


# %%
# | export
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


# %% [markdown]
# Before rows are laid side by side, each is looked at alone: is there an answer, does the text fit, can the picture
# be opened? What is wrong is said with the example's place in front. The picture is made small at once, so that a
# batch never holds all its photographs at full size.


# %%
# | export
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


# %% [markdown]
# Three examples in one batch. The first row is the one that we wrote by hand.

# %%
batch = collate(processor, examples[:3])
assert batch.input_ids[0, : len(ids_by_hand)].tolist() == ids_by_hand
assert batch.labels[0, : len(labels_by_hand)].tolist() == labels_by_hand
{name: tuple(value.shape) for name, value in vars(batch).items()}

# %% [markdown]
# ## Proof
#
# The processor of `transformers` gives the same three examples the same ids, masks and labels.

# %%
from transformers import AutoProcessor

import sigma_book

reference = AutoProcessor.from_pretrained(Path(sigma_book.__file__).parent / "pocket_model")
expected = reference(
    images=[example.image for example in examples[:3]],
    text=[f"<image>{example.prefix}" for example in examples[:3]],
    suffix=[example.suffix for example in examples[:3]],
    return_tensors="pt",
    padding=True,
    padding_side="right",
)
assert torch.equal(batch.input_ids, expected["input_ids"])
real = batch.attention_mask == 1
assert torch.equal(batch.labels[real], expected["labels"][real])
assert torch.equal(batch.attention_mask, expected["attention_mask"])

# %% [markdown]
# ## What an open mask does wrong
#
# If every token could see every other, the answer would stand there to be copied. The loss would fall beautifully,
# and the model would learn nothing. To see the leak, change the last answer token and watch the scores before it. A token
# type of 0 declares a token to be prefix, and in the prefix every token sees every other: a row of zeros is an open mask.

# %%
model = load()
with torch.no_grad():
    row = collate(processor, examples[:1])
    changed = row.input_ids.clone()
    changed[0, -1] = tokenizer.encode(" blue")[0]  # the end is replaced by a word
    inputs = (row.pixel_values, row.attention_mask)
    right = [model(ids, *inputs, row.token_type_ids) for ids in (row.input_ids, changed)]
    leaky = [model(ids, *inputs, torch.zeros_like(row.token_type_ids)) for ids in (row.input_ids, changed)]
asked_at = row.input_ids.shape[1] - 2  # the place that is asked for the end
moved = {
    name: (a - b)[0, asked_at].abs().max().item() for name, (a, b) in (("prefix mask", right), ("open mask", leaky))
}
assert moved["prefix mask"] < 1e-4 < moved["open mask"]
moved

# %% [markdown]
# With the right mask the scores move by no more than rounding. With everything declared prefix they move far more:
# the future leaks.
#
# ## What does not fit
#
# A model has a context, the most tokens it can read at once. What to do with a row that is longer? A silent cut would
# teach answers that stop in the middle of a word. So it is an error, with the counts in it.

# %%
long = Example(examples[0].image, "caption en", " and ".join(["a red star"] * 12), "scene 0")
room = processor.num_image_tokens + 1 + 20
try:
    collate(processor, [long], max_length=room)
except ValueError as error:
    print(error)

# %% [markdown]
# One may ask for a cut. Prompt and answer then may each have half of the room for text, and what the other does not
# need. The answer loses its end, and the end token with it: the model should not learn that one stops there.

# %%
cut = collate(processor, [long], max_length=room, truncate=True)
assert cut.input_ids.shape[1] == room and tokenizer.eos_id not in cut.input_ids[0].tolist()
tokenizer.decode(cut.labels[0][cut.labels[0] != -100])

# %% [markdown]
# ## In a new order each time
#
# One pass over all examples is an *epoch*. Its order is shuffled: neighbours in a file are often alike, and a batch of
# near-copies teaches little. The shuffle comes from a seed, so that a run can be repeated. We draw a random number for each
# example, and sort by it.


# %%
# | export
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


# %%
for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
    print(f"seed {seed}, epoch {epoch}:", *epoch_order(12, seed, epoch))
assert sorted(epoch_order(1000, 0, 0)) == list(range(1000))

# %% [markdown]
# When several processes train together, each has a number, its *rank*, and takes its share: rank 0 of 3 takes the
# first of the order, the fourth, the seventh; rank 1 the second, the fifth, the eighth. No example goes to two, none
# to nobody.
#
# Eleven examples on three ranks, in batches of two, do not come out even. In each step the ranks add up their gradients,
# and each waits for all the others (chapter 22). If one took fewer steps, the rest would wait for ever. So the last
# batch of an epoch may be short. If nothing at all is left for a rank, it gets a batch without labels, which teaches
# nothing and keeps it in step.

# %%
figure, axes = plt.subplots(2, 1, figsize=(7, 2.7))
for axis, epoch in zip(axes, (0, 1)):
    for place, example in enumerate(epoch_order(11, 0, epoch)):
        step, rank = place // 6, place % 3
        axis.add_patch(Rectangle((place + 0.35 * step, 0), 0.92, 1, color=HEADS[rank], lw=0, alpha=0.85))
        axis.text(place + 0.35 * step + 0.46, 0.5, example, ha="center", va="center", color="white")
        axis.text(place + 0.35 * step + 0.46, -0.35, f"rank {rank}", ha="center", va="center", fontsize=7)
    axis.text(-0.3, 0.5, f"epoch {epoch}", ha="right", va="center")
    axis.set(xlim=(-1.8, 11.5), ylim=(-0.6, 1.5))
    axis.text(2.96, 1.25, "step 0", ha="center", va="center", fontsize=8)
    axis.text(8.8, 1.25, "step 1", ha="center", va="center", fontsize=8)
    axis.axis("off")
save(figure, "15b_ranks")
plt.show()

# %% [markdown]
# *Figure: two epochs of eleven examples, each in its own order. The colour of an example, and the words below it, say
# which rank takes it: 0, 1, 2, 0, 1, 2. A gap parts the two steps of an epoch; in the second, rank 2 has one example
# where the others have two.*
#
# The place in all this is one number: how many steps are done. The batch of step *s* depends on the settings, the seed
# and *s*, and on nothing that happened before. So any process can make any batch. *Workers*, processes that prepare batches
# while the model learns, may be as many as one likes, and a run that was stopped goes on exactly where it was.


# %%
# | export
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


# %%
# | export
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


# %% [markdown]
# One object makes the batches, and it can be sent to workers. An error in a worker comes back as a value, so that its
# sentence arrives unchanged.


# %%
# | export
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


# %% [markdown]
# Forty drawn scenes in two files try it: rows of captions, and instances in the layout of COCO (chapter 15).

# %%
folder, names = Path(tempfile.mkdtemp()), list(SHAPES)
rows, images, instances = [], [], []
for seed in range(40):
    scene = make_scene(seed)
    draw_scene(scene).save(folder / f"{seed}.png")
    rows.append({"image": f"{seed}.png", "text": caption(scene)})
    images.append({"id": seed, "file_name": f"{seed}.png", "height": SIZE, "width": SIZE})
    for thing in scene.things:
        top, left, bottom, right = thing.box
        entry = {"id": len(instances), "image_id": seed, "category_id": names.index(thing.shape), "iscrowd": 0}
        instances.append(entry | {"bbox": [left, top, right - left, bottom - top]})
(folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
categories = [{"id": number, "name": name} for number, name in enumerate(names)]
whole = {"images": images, "annotations": instances, "categories": categories}
_ = (folder / "instances.json").write_text(json.dumps(whole))

# %% [markdown]
# Two epochs in batches of sixteen. Then two workers go on behind the second batch, and make the same ones.

# %%
found = read_examples(folder / "train.jsonl")
batches = list(Batches(found, processor, 16, seed=0, epochs=2))
assert [len(made.where) for made in batches] == [16, 16, 8] * 2
ahead = list(Batches(found, processor, 16, seed=0, epochs=2, workers=2, start=batches[1].state))
assert [made.where for made in ahead] == [made.where for made in batches[2:]]
assert all(torch.equal(a.batch.input_ids, b.batch.input_ids) for a, b in zip(ahead, batches[2:]))
batches[1].state

# %% [markdown]
# And three ranks share an epoch.

# %%
shares = [list(Batches(found, processor, 2, seed=0, epochs=1, rank=rank, world_size=3)) for rank in range(3)]
assert len({len(share) for share in shares}) == 1  # as many steps for each
taken = sorted(where for share in shares for made in share for where in made.where)
assert taken == sorted(example.where for example in found)  # all of them, none twice

# %% [markdown]
# ## What is broken
#
# In a million rows some are broken. The default is to stop at the first, with its place. One may ask to go on without
# them: then each is counted and listed, once, in a file. Never silently, because a set that lost a tenth of its rows
# is another set.


# %%
# | export
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


# %% [markdown]
# Four rows: one is cut off, one names a picture that is not there.

# %%
rows = [{"image": f"{seed}.png", "text": "a scene"} for seed in (0, 1, 99, 2)]
lines = [json.dumps(row) for row in rows]
lines[1] = lines[1][:-5]
(folder / "rough.jsonl").write_text("\n".join(lines))
going_on = Batches(
    read_examples(folder / "rough.jsonl"),
    processor,
    2,
    seed=0,
    epochs=3,
    on_error="skip",
    skipped=folder / "skipped.jsonl",
)
assert sum(len(made.where) for made in going_on) == 3 * 2  # two good rows, three times
assert going_on.num_skipped == 2
print((folder / "skipped.jsonl").read_text().replace(f"{folder}/", ""))

# %% [markdown]
# ## Look before you train
#
# An hour of training on a file that one has not looked at is an hour lost. A survey reads all of it: what is broken,
# what is too long, what stands there twice, how long the texts are, which answers are common. If half of all answers
# are "yes", a model that always says yes is half right, and one should know that before being proud of it.


# %%
# | export
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


# %% [markdown]
# Here too the rows are not kept. The survey remembers two lengths of each row and two *fingerprints*, short hashes of the row
# and of its answer. Equal texts have equal fingerprints, so repeated rows are found without keeping the texts. Only of the
# answers the first 100,000 different ones are kept as text, to name the most common.


# %%
# | export
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


# %% [markdown]
# Four hundred questions of the drawn world, for a model whose context has 90 tokens.

# %%
sample = examples_from(range(400), "count")
print("\n".join(survey(sample, processor, max_length=90).lines()))

# %% [markdown]
# The lengths become two histograms. Pillow draws them, so that the command line does not need matplotlib.


# %%
# | export
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


# %% [markdown]
# Numbers do not show that all boxes stand upside down. A few pictures with their answers do. The sheet writes prompt and
# answer under each picture. If the answer holds boxes, they are drawn.


# %%
# | export
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


# %% [markdown]
# Pictures to look at, numbers and lists for other programs: all go into one folder.


# %%
# | export
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


# %% [markdown]
# We survey the file of instances. Nothing in it is broken or repeated.

# %%
found = read_examples(folder / "instances.json")
looked = survey(found, processor)
assert looked.broken == looked.duplicates == ()
figure, axis = plt.subplots(figsize=(7.2, 4.6))
axis.imshow(draw_lengths(looked), interpolation="bilinear")
axis.axis("off")
save(figure, "15b_lengths")
plt.show()

# %% [markdown]
# *Figure: two histograms for the file of instances. All prompts have 3 tokens; answers have 6 for one box, and 8 more
# for each box besides.*

# %%
one, two = np.unique(looked.answer_tokens)[:2]
assert set(looked.prompt_tokens.tolist()) == {3} and (one, two - one) == (6, 8)

# %% [markdown]
# And the sheet, with eight of its examples.

# %%
sheet = contact_sheet([found[int(index)] for index in epoch_order(len(found), 0, 0)[:8]])
figure, axis = plt.subplots(figsize=(8.2, 6))
axis.imshow(sheet, interpolation="bilinear")
axis.axis("off")
save(figure, "15b_sheet")
plt.show()

# %% [markdown]
# *Figure: eight pictures of drawn shapes in a grid. Under each stand the prompt, such as "detect heart", and the answer
# with its loc tokens, cut after three lines; on each picture the boxes of that answer are drawn, and they fit.*
#
# The command `sigma-book data FILE` does all this, with twelve pictures, and writes the pictures and lists into a
# folder.
#
# ## A look inside
#
# How much of a batch is learned from? For captions, whose answers are long, and for colours.

# %%
shares = {}
for task in ("colour", "caption"):
    batch = collate(processor, examples_from(range(100, 132), task))
    kinds = {
        "picture": (batch.input_ids == tokenizer.image_id),
        "answer": batch.labels != -100,
        "padding": batch.attention_mask == 0,
    }
    kinds["prompt"] = ~(kinds["picture"] | kinds["answer"] | kinds["padding"])
    shares[task] = {name: where.float().mean().item() for name, where in kinds.items()}

figure, axis = plt.subplots(figsize=(6.4, 2.1))
colours = {"picture": PICTURE, "prompt": PROMPT, "answer": ANSWER, "padding": "#d9d9d9"}
for place, parts in enumerate(shares.values()):
    left = 0.0
    for name in colours:
        axis.barh(place, parts[name], left=left, height=0.6, color=colours[name])
        middle, label = left + parts[name] / 2, f"{name}\n{parts[name]:.0%}"
        if parts[name] > 0.08:
            ink = "black" if name in ("prompt", "padding") else "white"
            axis.text(middle, place, label, ha="center", va="center", fontsize=7, color=ink)
        elif parts[name] > 0:  # too narrow for words: they stand above
            axis.text(middle, place + 0.32, label, ha="center", va="bottom", fontsize=7)
        left += parts[name]
axis.set_yticks(range(2), list(shares))
axis.xaxis.set_visible(False)
axis.spines[["bottom", "left"]].set_visible(False)
save(figure, "15b_shares")
plt.show()
assert shares["colour"]["answer"] < 0.05 < shares["caption"]["answer"]

# %% [markdown]
# *Figure: two bars, cut by kind of token: picture, prompt, answer, padding. Most of a row is picture; the answer is a small
# part, and smallest for colours.*
#
# This is why chapter 17 lays many questions behind one picture.
#
# ## The bill
#
# Beside the index of chapter 15, memory holds the order of an epoch: one number of 8 bytes for each example.

# %%
order = epoch_order(500_000, 0, 0)
assert order.nbytes == 8 * len(order)
f"{order.nbytes / 1e6:.0f} MB for {len(order):,} examples"


# %% [markdown]
# And a batch. The sum is checked on a batch of the pocket model, then made for the large one: 256 picture tokens and 30 of
# text in each row.


# %%
def bytes_of_batch(rows: int, side: int, tokens: int) -> int:
    return rows * (3 * side**2 * 4 + 4 * tokens * 8)  # three planes in 32 bits; ids, types, mask and labels in 64


rows, tokens = batch.input_ids.shape
assert bytes_of_batch(rows, processor.image_size, tokens) == sum(part.nbytes for part in vars(batch).values())
f"{bytes_of_batch(8, 224, 256 + 30) / 1e6:.1f} MB for 8 rows: next to nothing beside the weights"

# %% [markdown]
# ## Your turn
#
# **1.** ★ The labels of a row, from the length of the prefix, the ids of the suffix, and the number of padding tokens.


# %%
def labels_of(prefix_length: int, suffix: list, padding: int) -> list: ...


check(labels_of, ((2, [7, 1], 1), [-100, -100, 7, 1, -100]), ((1, [1], 0), [-100, 1]))

# %% [markdown]
# **2.** ★ How many steps has an epoch of `n` examples, in batches of `size` on each of `ranks`?


# %%
def steps_of(n: int, size: int, ranks: int) -> int: ...


check(steps_of, ((40, 16, 1), 3), ((32, 16, 1), 2), ((11, 2, 3), 2), ((1, 16, 4), 1))

# %% [markdown]
# **3.** ★★★ Put the lengths of rows into batches of `size`, of which at most one may be shorter, so that as few padding tokens
# as possible are needed; return how many. Sorting is half of the answer. The other half: which batch is the short one?


# %%
def least_padding(lengths: list, size: int) -> int: ...


check(
    least_padding,
    (([3, 9, 3, 9], 2), 0),
    (([5, 1, 4, 2], 4), 8),
    (([1, 5, 5], 2), 0),
    (([5, 1, 1], 2), 0),
    (([9, 1, 4, 9, 1], 2), 0),
    (([1, 1, 5, 5, 5], 3), 0),
)

# %% [markdown]
# Next: the loop that learns from such batches.
