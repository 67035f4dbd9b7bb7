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
# # What to learn from: data
#
# *What does a model see of an example, and which part of it should it learn to say?*
#
# **You build** examples and batches of them. **You need** chapter 11 (the processor).
# **Exports** the module `sigma_book.data`.

# %%
# | export
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from sigma_book.processor import Batch, Processor

# %%
import matplotlib.pyplot as plt
import torch

from sigma_book import load
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, draw_tokens, save, use_style
from sigma_book.world import ask, draw_scene, make_scene

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
save(figure, "15_labels")
plt.show()

# %% [markdown]
# *A row of tokens; below each, what that place is asked for. Only the newline (asked for "red") and "red" (asked for the
# end) have something to learn.*
#
# ## An example
#
# A picture, a *prefix* (what is asked) and a *suffix* (what to answer).


# %%
# | export
@dataclass(frozen=True)
class Example:
    """One thing to learn: a picture, what is asked about it (prefix), and what to answer (suffix)."""

    image: Image.Image
    prefix: str
    suffix: str


# %%
def examples_from(seeds, task="colour") -> list[Example]:
    found = []
    for seed in seeds:
        scene = make_scene(seed)
        question = ask(scene, task, random.Random(seed))
        if question is not None:
            found.append(Example(draw_scene(scene), question.prompt, question.answer))
    return found


examples = examples_from(range(40))
[(example.prefix, example.suffix) for example in examples[:3]]

# %% [markdown]
# ## First by hand
#
# One row. The labels are -100 wherever there is nothing to learn: that number is a custom, and the loss of chapter 10
# skips it.

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
# Rows differ in length, so short ones are filled up with padding. For *answering* the padding stands on the left, so that
# all rows end at the same place and go on together. For *learning* it stands on the right, where no answer token
# can see it.


# %%
# | export
def collate(processor: Processor, examples: Sequence[Example]) -> Batch:
    """Examples to one batch, padded on the right, with labels on the suffixes only.

    Raises
    ------
    ValueError
        If there is no example.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    return processor.prepare(
        [example.image for example in examples],
        [example.prefix for example in examples],
        [example.suffix for example in examples],
    )


# %%
batch = collate(processor, examples[:3])
assert batch.input_ids[0, : len(ids_by_hand)].tolist() == ids_by_hand
assert batch.labels[0, : len(labels_by_hand)].tolist() == labels_by_hand
{name: tuple(value.shape) for name, value in vars(batch).items()}

# %% [markdown]
# ## Proof
#
# The processor of `transformers` makes the same of the same three examples.

# %%
from pathlib import Path

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
# If every token could see every other, the answer would stand there to be copied. The loss would fall beautifully, and the
# model would learn nothing. One can see the leak with an untrained eye: change the last answer token and watch the scores
# before it.

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
# With the right mask the scores do not move. With everything declared prefix they do: the future leaks.
#
# ## In a new order each time
#
# One pass over all examples is an *epoch*. The order is shuffled, or the model would learn the order; and the shuffle
# comes from a seed, so that a run can be repeated.


# %%
# | export
def batches(
    examples: Sequence[Example], processor: Processor, batch_size: int, seed: int, epochs: int | None = None
) -> Iterator[Batch]:
    """Batches in an order that the seed decides, a new one in each epoch; the last of an epoch may be short.

    Parameters
    ----------
    examples : sequence of Example
        At least one.
    processor : Processor
    batch_size : int
        Examples in a batch, at least 1.
    seed : int
    epochs : int, optional
        How often each example is shown; None goes on for ever.

    Raises
    ------
    ValueError
        If there is no example, or `batch_size` is below 1.
    """
    if not examples or batch_size < 1:
        raise ValueError(f"batches need an example and a size of at least 1, got {len(examples)} and {batch_size}")
    epoch = 0
    while epochs is None or epoch < epochs:
        order = list(range(len(examples)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), batch_size):
            yield collate(processor, [examples[i] for i in order[start : start + batch_size]])
        epoch += 1


# %%
def first_answers(seed: int) -> list[str]:
    batch = next(iter(batches(examples, processor, 4, seed)))
    return [tokenizer.decode([t for t in row.tolist() if t != -100]) for row in batch.labels]


assert first_answers(0) == first_answers(0)
sizes = [len(batch.input_ids) for batch in batches(examples, processor, 16, seed=0, epochs=1)]
assert sum(sizes) == len(examples)
first_answers(0), first_answers(1), sizes

# %% [markdown]
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

figure, axis = plt.subplots(figsize=(6.4, 1.7))
colours = {"picture": PICTURE, "prompt": PROMPT, "answer": ANSWER, "padding": "#d9d9d9"}
for place, parts in enumerate(shares.values()):
    left = 0.0
    for name in colours:
        axis.barh(place, parts[name], left=left, color=colours[name])
        if parts[name] > 0.06:
            axis.text(left + parts[name] / 2, place, f"{name}\n{parts[name]:.0%}", ha="center", va="center", fontsize=7)
        left += parts[name]
axis.set_yticks(range(2), list(shares))
axis.xaxis.set_visible(False)
axis.spines[["bottom", "left"]].set_visible(False)
save(figure, "15_shares")
plt.show()
assert shares["colour"]["answer"] < 0.05 < shares["caption"]["answer"]

# %% [markdown]
# *Two bars, cut by kind of token. Most of a row is picture; the answer is a small part, and smallest for colours.* This is
# why chapter 17 lays many questions behind one picture.
#
# ## The bill
#
# A batch of the large model: 256 picture tokens and three 224 x 224 planes for each row.

# %%
rows, pixels, tokens = 8, 3 * 224 * 224 * 4, (256 + 30) * 4 * 8
assert rows * pixels == 4_816_896
f"{rows * (pixels + tokens) / 1e6:.1f} MB for 8 rows: next to nothing beside the weights"

# %% [markdown]
# ## Your turn
#
# **1.** The labels of a row, from the lengths of prefix and padding and the ids of the suffix.


# %%
def labels_of(prefix_length: int, suffix: list, padding: int) -> list: ...


check(labels_of, ((2, [7, 1], 1), [-100, -100, 7, 1, -100]), ((1, [1], 0), [-100, 1]))

# %% [markdown]
# **2.** How many batches has an epoch of `n` examples?


# %%
def batch_count(n: int, size: int) -> int: ...


check(batch_count, ((40, 16), 3), ((32, 16), 2), ((1, 16), 1))

# %% [markdown]
# **3.** The share of padding in a batch of rows with these lengths.


# %%
def padding_share(lengths: list) -> float: ...


check(padding_share, (([10, 10],), 0.0), (([5, 10],), 0.25))

# %% [markdown]
# Next: the loop that learns from such batches.
