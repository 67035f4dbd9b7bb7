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
# # What to learn from: data
#
# *What does a model see of an example, and which part of it should it learn to say?*
#
# **You build** examples and batches of them. **You need** chapter 11 (the processor). **Exports** the module `sigma_book.data`.

# %%
# | export
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from sigma_book.processor import Batch, Processor

# %%
# | export
@dataclass(frozen=True)
class Example:
    """One thing to learn: a picture, what is asked about it (prefix), and what to answer (suffix)."""

    image: Image.Image
    prefix: str
    suffix: str


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
