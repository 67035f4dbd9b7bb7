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
# # Many at once
#
# *How do requests that come and go share one reading of the weights?*
#
# **You build** an engine that answers many requests at a time. **You need** chapters 07 (the cache) and 13 (generation).
# **Exports** the module `sigma_book.batching`.

# %%
# | export
import atexit
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from sigma_book.generation import (
    Allow,
    AnswerText,
    Sampling,
    answer_limits,
    ask_allow,
    choose,
    finite_scores,
    read_stop_strings,
    row_generators,
    seen_tokens,
    whole_number,
)
from sigma_book.kv_cache import KVCache
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch, Processor, load_image

# %%
import math
import os
import random
from contextlib import closing

import matplotlib.pyplot as plt

from sigma_book import generate, load
from sigma_book.attention import attention
from sigma_book.fast import Int8Linear, int8_levels, quantize_rows
from sigma_book.generation import generate_tokens
from sigma_book.gqa import cache_bytes
from sigma_book.style import ANSWER, GREY, HEADS, PROMPT, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# To write one token, every weight of the decoder is fetched from memory (chapters 13 and 21). A batch of eight answers
# shares one fetch. So whoever answers many people should answer them together.
#
# But people do not come together, and their answers are not equally long. Take eleven requests and three rows. A *static*
# batch starts three, waits until the longest is done, and starts the next three. A *continuous* one lets the next
# request in as soon as any row is free.


# %%
def static_schedule(lengths: list[int], rows: int) -> list[tuple[int, int, int]]:
    """Row, first step and end of each request, when a batch starts together and the next one waits for all of it."""
    bars, start = [], 0
    for first in range(0, len(lengths), rows):
        batch = lengths[first : first + rows]
        bars += [(row, start, start + length) for row, length in enumerate(batch)]
        start += max(batch)
    return bars


def continuous_schedule(lengths: list[int], rows: int) -> list[tuple[int, int, int]]:
    """The same when each request takes the row that is free first."""
    bars, free = [], [0] * rows
    for length in lengths:
        row = min(range(rows), key=free.__getitem__)
        bars.append((row, free[row], free[row] + length))
        free[row] += length
    return bars


def last_step(bars: list[tuple[int, int, int]]) -> int:
    return max(end for _, _, end in bars)


lengths = [3, 14, 5, 4, 6, 16, 2, 3, 9, 12, 4]
figure, axes = plt.subplots(2, 1, figsize=(7.4, 3.2), sharex=True)
for axis, schedule in zip(axes, (static_schedule, continuous_schedule)):
    bars = schedule(lengths, rows=3)
    for number, (row, start, end) in enumerate(bars):
        axis.barh(row, end - start - 0.12, left=start, height=0.78, color=ANSWER)
        axis.text((start + end) / 2, row, str(number + 1), ha="center", va="center", color="white", fontsize=9)
    for row in range(3):
        axis.barh(row, last_step(bars), height=0.78, color="#e4e4e4", zorder=0)
    axis.set(yticks=[], ylim=(2.5, -0.5))
    axis.set_ylabel(schedule.__name__.split("_")[0])
    axis.spines[["left", "bottom"]].set_visible(False)
axes[1].set_xlabel("steps of the model")
save(figure, "21c_gantt")
static, continuous = (last_step(schedule(lengths, 3)) for schedule in (static_schedule, continuous_schedule))
assert (static, continuous) == (51, 28)

# %% [markdown]
# *Figure: two charts of three rows. Green bars are answers, numbered in the order in which they came; grey is a row that
# has none. In the static batch each group of three waits for its longest, and half of the chart is grey. In the
# continuous one the bars stand close together, and it ends at step 28 in place of 51.*
#
# In a static batch the grey is not free: a row that is over is fed padding and goes through the model like the others.
#
# ## How good can it get?
#
# Let $n_i$ be the lengths and $R$ the rows. The static batch takes its requests in groups $g$ of $R$.
#
# $$ T_{\text{static}} = \sum_g \max_{i \in g} n_i
# \qquad\qquad
# T_{\text{continuous}} \le \frac{1}{R} \sum_i n_i + \Big(1 - \frac{1}{R}\Big) \max_i n_i $$
#
# The second is Graham's bound of 1966, and its proof is short. Look at the request that ends last. Before it started no row
# was free, so all $R$ rows were busy with other requests, whose lengths sum to $\sum_i n_i - n_{\text{last}}$ at most. So it
# started at $(\sum_i n_i - n_{\text{last}}) / R$ at the latest, and ended $n_{\text{last}}$ later, at
# $\sum_i n_i / R + (1 - 1/R)\, n_{\text{last}}$. And $n_{\text{last}}$ is no more than $\max_i n_i$.
#
# The first term is the work. The second does not grow with the number of requests: in a long day it is nothing.
#
# We try the bound on 500 short days drawn at random, and compare the two schedules on a long one.

# %%
random.seed(0)
for _ in range(500):
    rows, drawn = random.randint(1, 9), [random.randint(1, 60) for _ in range(random.randint(1, 80))]
    total, longest = sum(drawn), max(drawn)
    assert total / rows <= last_step(continuous_schedule(drawn, rows)) <= total / rows + (1 - 1 / rows) * longest
    assert last_step(continuous_schedule(drawn, rows)) <= last_step(static_schedule(drawn, rows))
day = [min(200, 1 + int(random.expovariate(1 / 30))) for _ in range(4000)]
shares = {
    schedule.__name__: sum(day) / 8 / last_step(schedule(day, 8)) for schedule in (static_schedule, continuous_schedule)
}
assert shares["static_schedule"] < 0.45 and shares["continuous_schedule"] > 0.99
{name: f"{share:.1%} of the rows at work" for name, share in shares.items()}

# %% [markdown]
# ## First by hand
#
# An engine needs no new mathematics: chapter 13's loop, for several requests in turn. Each has a cache of its own. One
# turn of the outer loop gives one token to each request that runs, and lets a waiting one in where a row is free.

# %%
model = load()  # the pocket model
tokenizer = model.processor.tokenizer
questions = ["caption en", "how many things are there?", "detect circle", "caption en", "is there a red star?"]
batches = [model.processor.prepare([draw_scene(make_scene(seed))], [text]) for seed, text in enumerate(questions)]


@torch.no_grad()
def serve_naive(batches: list[Batch], rows: int, most: int) -> tuple[list[list[int]], int]:
    """The greedy answers, and how often the weights were read to write them."""
    answers, waiting, running, readings = [[] for _ in batches], list(range(len(batches))), {}, 0
    while waiting or running:
        while waiting and len(running) < rows:
            number = waiting.pop(0)
            batch = batches[number]
            caches = model.language_model.new_caches(1, batch.input_ids.shape[1] + most)
            features = model.encode_images(batch.pixel_values)
            scores = model.prefill(batch.input_ids, features, batch.attention_mask, caches)
            running[number] = scores, batch.attention_mask, caches
        for number in list(running):
            scores, mask, caches = running[number]
            token = int(scores.argmax())
            answers[number].append(token)
            if token == tokenizer.eos_id or len(answers[number]) == most:
                del running[number]
                continue
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            running[number] = model.decode(torch.tensor([[token]]), mask, caches), mask, caches
            readings += 1
    return answers, readings


naive_answers, naive_readings = serve_naive(batches, rows=2, most=24)
for text, answer in zip(questions, naive_answers):
    print(f"{text:28}{tokenizer.decode(answer)}")
assert naive_readings == sum(len(answer) - 1 for answer in naive_answers)  # first tokens come out of the prompts
naive_readings

# %% [markdown]
# The answers are right, but nothing is gained: each row reads the weights for itself. All rows must go through the model
# in *one* call.
#
# ## Rows of different lengths
#
# What stands in the way? `KVCache` (chapter 07) has one length for all of its rows. Ours joined at different times, so
# each has its own: row $b$ holds $n_b$ tokens. Three numbers become three lists:
#
# - where to write: row $b$ writes its new key into column $n_b$, behind its own last;
# - the position, by which the key is turned: $n_b + 1$, since positions count from 1;
# - the mask: row $b$ sees the columns below $n_b + 1$, and not what lies behind them.
#
# We take the memory for all rows once. Rows in use lie side by side at the front, so that a step is a slice of the
# buffers: it costs what runs, not what might. When a row leaves, the last one moves into its place.

# %%
blue, red, green, pink = (HEADS[number] for number in (4, 1, 2, 3))  # a colour for each request
stages = [
    ("three rows run", [(7, blue), (4, red), (9, green)]),
    ("a step later", [(8, blue), (5, red), (10, green)]),
    ("the middle row leaves", [(8, blue), (10, green)]),
    ("a new one joins", [(8, blue), (10, green), (6, pink)]),
]
figure, axes = plt.subplots(1, 4, figsize=(8.6, 1.7))
for axis, (name, rows) in zip(axes, stages):
    for row in range(4):
        length, colour = rows[row] if row < len(rows) else (0, None)
        for column in range(12):
            shade = colour if column < length else "#eeeeee"
            axis.add_patch(plt.Rectangle((column, -row), 0.88, 0.8, lw=0, color=shade))
        if name == "a step later" and length:
            axis.text(length - 0.56, -row + 0.36, "•", ha="center", va="center", color="white", fontsize=11)
    right, bottom = max(length for length, _ in rows) + 0.05, 0.93 - len(rows)
    axis.plot([-0.2, right, right, -0.2, -0.2], [bottom, bottom, 0.9, 0.9, bottom], color="0.3", lw=0.9)
    axis.set(xlim=(-0.5, 12.4), ylim=(-3.3, 1.1), title=name)
    axis.axis("off")
save(figure, "21c_rows")

# %% [markdown]
# *Figure: a cache of four rows and twelve columns, four times; each colour is one request. The frame is what is in use: the
# next step takes these rows, up to the end of the longest, and the column that it writes. In a step each row grows by one
# column (white dots), each at its own end. When the middle row leaves, the last moves up. A new one joins behind.*
#
# ## The tensor version
#
# In Gemma 2's sliding layers a row is a ring of $w$ columns, as in chapter 07: token $t$ lies in column $t \bmod w$. Once a
# row is longer than $w$, its columns hold the last $w$ tokens, and its new token may look at all of them. So the mask
# needs no second rule: all $w$ columns are below $n_b + 1$.


# %%
# | export
class SlotCache:
    """Keys and values of one layer for rows that come and go, each with a length of its own.

    The rows in use lie side by side at the front: a row that joins is put behind them, and when one leaves, the last
    takes its place. Token t of a row, counted from 0, lies in column t; with a window, in column t % window.

    Parameters
    ----------
    rows : int
        R, most rows at a time.
    num_kv_heads, head_dim : int
        K and Dh.
    max_length : int
        Tokens that there is room for in each row.
    window : int, optional
        How many tokens a token sees, itself included; None for all.
    dtype, device
        Of the buffers.
    """

    def __init__(
        self,
        rows: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.window = window
        self.max_length = max_length
        columns = max_length if window is None else min(window, max_length)
        self.key = torch.empty(rows, num_kv_heads, columns, head_dim, dtype=dtype, device=device)
        self.value = torch.empty_like(self.key)
        self.lengths: list[int] = []  # of the rows in use
        self.first = 0  # the row that the next step begins with
        self._cleared = 0  # columns that have been wiped once: an empty tensor holds anything, nan too

    @property
    def columns(self) -> int:
        return self.key.shape[2]

    def _reach(self, columns: int) -> None:
        """Wipe columns that are needed for the first time. Until then the system need not find memory for them."""
        if columns > self._cleared:
            end = min(columns + 64, self.columns)
            self.key[:, :, self._cleared : end] = 0
            self.value[:, :, self._cleared : end] = 0
            self._cleared = end

    def join(self, filled: KVCache, row: int, length: int) -> None:
        """Copy the last `length` tokens of one row of a cache that was just filled, behind the rows in use.

        Raises
        ------
        ValueError
            If no row is free, or if the row is too long.
        """
        place = len(self.lengths)
        if place == len(self.key) or length > self.max_length:
            raise ValueError(
                f"{place} of {len(self.key)} rows are in use, and a row of {length} tokens wants to join: there must be "
                f"one free, and it has room for {self.max_length} tokens"
            )
        token = filled.columns() - (filled.length - length)  # (C,): which token each column holds; below 0 is padding
        kept = (token >= max(0, length - self.columns)).nonzero()[:, 0]
        self._reach(min(length, self.columns))
        column = token[kept] % self.columns
        self.key[place, :, column] = filled.key[row, :, kept]
        self.value[place, :, column] = filled.value[row, :, kept]
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Free a row: the last one moves into its place, and what is left over is wiped.

        Wiped, because a mask gives hidden columns weight 0, and 0 times nan is nan.
        """
        last = len(self.lengths) - 1
        # one column more than a row holds, since a step that failed may have written it
        freed, moved = (min(self.lengths[index] + 1, self.columns) for index in (row, last))
        for buffer in (self.key, self.value):
            if row != last:
                buffer[row, :, :moved] = buffer[last, :, :moved]
                buffer[row, :, moved:freed] = 0
            buffer[last, :, :moved] = 0
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Free all rows, and wipe columns when they are needed again: this works whatever has failed before."""
        self.lengths, self._cleared = [], 0

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new token for each row of a step, (B, K, 1, Dh), and return what the step looks at, (B, K, C, Dh).

        The B rows from `first` on take part: as a rule all that are in use. C is the length of the longest; `mask` hides
        what lies behind the end of the others.

        Raises
        ------
        ValueError
            If a row is full or not in use, or if there is more than one new token.
        """
        rows = range(self.first, self.first + len(key))
        lengths = self.lengths[rows.start : rows.stop]
        if key.shape[2] != 1 or len(lengths) != len(key) or max(lengths) >= self.max_length:
            raise ValueError(
                f"a step takes one token a row, for rows in use with less than {self.max_length} tokens: got "
                f"{key.shape[2]} for each of {len(key)} rows, and in use are rows of {lengths} tokens"
            )
        end = min(max(lengths) + 1, self.columns)
        self._reach(end)
        place = torch.tensor([rows, [length % self.columns for length in lengths]], device=key.device)  # (2, B)
        self.key[place[0], :, place[1]] = key[:, :, 0].to(self.key.dtype)
        self.value[place[0], :, place[1]] = value[:, :, 0].to(self.value.dtype)
        for row in rows:
            self.lengths[row] += 1
        return self.key[rows.start : rows.stop, :, :end], self.value[rows.start : rows.stop, :, :end]

    def mask(self, positions: torch.Tensor) -> torch.Tensor:
        """Which columns new tokens at these positions (B, 1), counted from 1, may look at: boolean (B, 1, 1, C)."""
        end = min(int(positions.max()), self.columns)
        return (torch.arange(end, device=positions.device) < positions)[:, None, None]


# %% [markdown]
# The proof: rows come and go at random, and each does its attention alone besides, over a list of its own keys. With
# and without a window.

# %%
K, Dh, R = 2, 8, 4
for window in (None, 3, 5):
    cache, lists = SlotCache(R, K, 40, Dh, window=window), []
    for _ in range(300):
        if len(lists) < R and random.random() < 0.3:  # join, with a prompt that was read on the left of some padding
            length, padding = random.randint(1, 12), random.randint(0, 3)
            filled = KVCache(1, K, 40, Dh, window=window)
            key, value = torch.randn(2, 1, K, padding + length, Dh)
            filled.update(key, value)
            cache.join(filled, 0, length)
            lists.append(([*key[0, :, padding:].unbind(1)], [*value[0, :, padding:].unbind(1)]))
        if lists and (random.random() < 0.1 or len(lists[-1][0]) == 40):  # leave
            row = random.randrange(len(lists)) if len(lists[-1][0]) < 40 else len(lists) - 1
            cache.leave(row)
            lists[row] = lists[-1]
            lists.pop()
        if lists and max(len(keys) for keys, _ in lists) < 40:  # a step
            query, key, value = torch.randn(3, len(lists), K, 1, Dh)
            mask = cache.mask(torch.tensor([[length + 1] for length in cache.lengths]))
            together = attention(query, *cache.update(key, value), mask)
            for row, (keys, values) in enumerate(lists):
                keys.append(key[row, :, 0])
                values.append(value[row, :, 0])
                seen = slice(None if window is None else -window, None)
                alone = attention(query[row], torch.stack(keys[seen], 1), torch.stack(values[seen], 1))
                torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)  # sums in another order
    assert cache.lengths == [len(keys) for keys, _ in lists]

# %% [markdown]
# Why `leave` wipes: suppose a request broke, and its values are not numbers any more. The next owner of the row does not
# see them, its mask gives them weight 0. That is not enough.

# %%
weights, values = torch.tensor([1.0, 0.0]), torch.tensor([5.0, math.nan])
assert (weights * values).sum().isnan()

# %% [markdown]
# ## The running batch
#
# Now the caches of all layers, and the model around them. Three moves: *read* prompts, together if several wait; let a
# row of what was read *join*; take a *step* with all rows that run.


# %%
# | export
class RunningBatch:
    """A model with rows that join and leave between steps.

    Parameters
    ----------
    model : PaliGemma
    rows : int
        Most rows at a time.
    max_length : int
        Tokens that a row has room for.
    encode_images : callable, optional
        Pictures (N, 3, S, S) to features (N, P, D), in place of the model's own method.
    """

    def __init__(
        self,
        model: PaliGemma,
        rows: int,
        max_length: int,
        encode_images: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.model = model
        self.encode_images = model.encode_images if encode_images is None else encode_images
        self.caches = [
            SlotCache(
                rows,
                like.key.shape[1],
                max_length,
                like.key.shape[3],
                window=like.window,
                dtype=like.key.dtype,
                device=like.key.device,
            )
            for like in model.language_model.new_caches(1, 1)
        ]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row in use holds."""
        return self.caches[0].lengths

    def read(self, batches: Sequence[Batch], best_only: bool = False) -> tuple[torch.Tensor, list[KVCache]]:
        """Read prompts of one row each: scores (B, V) for their first tokens, and caches to join from.

        With `best_only`, only the best scores must be exact.
        """
        longest = max(batch.input_ids.shape[1] for batch in batches)
        pads = [(longest - batch.input_ids.shape[1], 0) for batch in batches]
        pad_id, device = self.model.config.pad_token_id, self.model.device
        ids = torch.cat([F.pad(batch.input_ids, pad, value=pad_id) for batch, pad in zip(batches, pads)]).to(device)
        mask = torch.cat([F.pad(batch.attention_mask, pad) for batch, pad in zip(batches, pads)]).to(device)
        features = self.encode_images(torch.cat([batch.pixel_values for batch in batches]).to(device))
        caches = self.model.language_model.new_caches(len(batches), longest)
        return self.model.prefill(ids, features, mask, caches, best_only), caches

    def join(self, filled: list[KVCache], row: int, length: int) -> None:
        """A row of what was read takes the place behind the rows in use. If it raises, the rows are as they were."""
        place = len(self.lengths)
        try:
            for cache, read in zip(self.caches, filled):
                cache.join(read, row, length)
        except BaseException:
            for cache in self.caches:
                if len(cache.lengths) > place:
                    cache.leave(place)
            raise

    def leave(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        for cache in self.caches:
            cache.leave(row)

    def step(self, tokens: Sequence[int], first: int = 0, best_only: bool = False) -> torch.Tensor:
        """Feed one token to each of the rows from `first` on, and give the scores (B, V) for the ones after.

        If it raises, the rows are as they were. `best_only` as for `read`.
        """
        before = list(self.lengths)
        device = self.model.device
        ids = torch.tensor(tokens, device=device)[:, None]  # (B, 1)
        positions = torch.tensor(before[first : first + len(tokens)], device=device)[:, None] + 1  # counted from 1
        by_window = {cache.window: cache for cache in self.caches}
        masks = {window: cache.mask(positions) for window, cache in by_window.items()}
        try:
            for cache in self.caches:
                cache.first = first
            hidden_states = self.model.language_model(self.model.embed(ids), positions, masks, self.caches)  # (B, 1, D)
            return self.model.next_token_logits(hidden_states, best_only)
        except BaseException:
            for cache in self.caches:
                cache.lengths = list(before)
            raise


# %% [markdown]
# Look at `step`. It is `decode` of chapter 10, except that position and mask are made of each row's own length. (The program
# that chapter 21b compiles of a step for a GPU has one length for all rows, so it is not used here.)
#
# The naive loop again, with these moves: the same answers, and the weights are read once for all rows.


# %%
@torch.no_grad()
def serve(batches: list[Batch], rows: int, most: int) -> tuple[list[list[int]], int]:
    answers, waiting, running, readings = [[] for _ in batches], list(range(len(batches))), [], 0
    together = RunningBatch(model, rows, max_length=max(batch.input_ids.shape[1] for batch in batches) + most)

    def is_over(number: int) -> bool:
        return answers[number][-1] == tokenizer.eos_id or len(answers[number]) == most

    while waiting or running:
        while waiting and len(running) < rows:
            number = waiting.pop(0)
            scores, filled = together.read([batches[number]])
            answers[number].append(int(scores.argmax()))
            if not is_over(number):
                together.join(filled, 0, batches[number].input_ids.shape[1])
                running.append(number)
        if not running:
            continue
        scores = together.step([answers[number][-1] for number in running])
        readings += 1
        for number, token in zip(running, scores.argmax(-1).tolist()):
            answers[number].append(token)
        for row in reversed(range(len(running))):
            if is_over(running[row]):
                together.leave(row)
                running[row] = running[-1]
                running.pop()
    return answers, readings


answers, readings = serve(batches, rows=2, most=24)
assert answers == naive_answers == serve(batches, rows=5, most=24)[0]
for batch, answer in zip(batches, answers):  # and chapter 13, one by one
    assert [picks[0].token for picks in generate_tokens(model, batch, max_new_tokens=24)] == answer
assert readings < 0.75 * naive_readings
print(f"{naive_readings} readings of the weights one by one, {readings} with two rows")

# %% [markdown]
# ## When to read the next prompt?
#
# Reading a prompt takes much longer than a step, and while it is read the others wait. Should several that wait be read
# together, or one at a time, with a step in between? We measure both.


# %%
def seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median of several runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[times // 2]


together = RunningBatch(model, 16, max_length=256)
reading, stepping = {}, {}
with torch.no_grad():
    for count in (1, 2, 4, 8, 16):
        several = (batches * 4)[:count]
        reading[count] = seconds(lambda several=several: together.read(several))
        scores, filled = together.read(several)
        for row, batch in enumerate(several):
            together.join(filled, row, batch.input_ids.shape[1])
        stepping[count] = seconds(lambda count=count: together.step([5] * count), times=9)
        for _ in several:
            together.leave(0)
print(f"{'rows':>6}{'a step':>12}{'for each':>12}{'reading':>12}{'for each':>12}   in milliseconds")
for count in reading:
    one, other = 1000 * stepping[count], 1000 * reading[count]
    print(f"{count:6}{one:12.2f}{one / count:12.2f}{other:12.2f}{other / count:12.2f}")

# %% [markdown]
# In the pocket model a step with sixteen rows takes little longer than with one: its time goes into starting operations,
# and that is shared. (Large matrices come at the end of the chapter.) Reading is another matter. A prompt has about
# seventy tokens, and that is a batch already. Eight read together cost less than one by one, but the gain is much smaller
# than with steps, and all who run wait until the eight are read. In a large model arithmetic decides (chapter 21), and
# there eight prompts are eight times the work.
#
# So the rule counts tokens: *prompts that wait are read together while they have no more than 512 tokens, padding
# included; and at least one is read.* With so many rows arithmetic is busy already, and to read more at once would only
# make the others wait. For the pocket model that is seven prompts. For PaliGemma at 224 pixels, whose prompts have more
# than 256 tokens, it is one. Between two reads there is always a step. So nobody who runs ever waits longer for a token
# than one step and one read of 512 tokens (or of one prompt, if that is longer).

# %%
length = batches[0].input_ids.shape[1]
assert 512 // length == 7 and 512 // (256 + 5) == 1

# %% [markdown]
# ## Requests, and what they hear
#
# A request does not return its answer. It is handed in, and from then on its *listener* is called, once for each token and
# once at the end. That suits a stream, and a caller that wants it all at once can collect.


# %%
# | export
@dataclass(frozen=True)
class Event:
    """What a listener is told: something for each token, and a last word.

    Parameters
    ----------
    text : str
        New text: whole characters, and nothing that may yet turn out to be the beginning of a stop string.
    token, logprob
        The token that was taken, a stop token too, and the natural logarithm of its probability in the model's own
        distribution; None in the last event.
    top : tuple of (int, float)
        The likeliest tokens at this place with their log-probabilities, best first, as many as were asked for.
    finish : str, optional
        None, or in the last event one of `FINISHES`: at a stop token or string, at the limit, given up by its owner, out
        of time, or failed.
    error : str, optional
        A sentence, if `finish` is `error`.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    error: str | None = None


FINISHES = ("stop", "length", "cancelled", "deadline", "error")


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer."""


class QueueFull(RuntimeError):
    """As many requests as there is room for have come already.

    Parameters
    ----------
    requests : int
        How many are answered or wait for it.
    retry_after : float
        Seconds in which a full queue is likely to be worked off.
    """

    def __init__(self, requests: int, retry_after: float):
        super().__init__(f"{requests} requests are under way: try again in {retry_after:.1f} seconds")
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""

    def __init__(self):
        super().__init__("the engine is closed and takes no more requests")


class Ticket:
    """A request that was taken.

    Parameters
    ----------
    prompt_tokens : int
        Tokens of the prompt, pictures included.
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.cancelled = False

    def cancel(self) -> None:
        """Give the request up: no further token is told, and it ends as `cancelled`, unless it is over already."""
        self.cancelled = True


# %% [markdown]
# On its way a request carries what was asked and what has come of it. Its tools are chapter 13's: `AnswerText` turns
# tokens into text, `choose` and `allow` pick a token, and whoever draws has a generator of its own. A row that takes the
# best score needs no pick of its own: one `argmax` serves all of them.


# %%
# | export
@dataclass(eq=False)
class _Request:
    """A request on its way: what was asked, and what has come of it so far."""

    ticket: Ticket
    batch: Batch
    listener: Callable[[Event], None]
    limit: int
    sampling: Sampling
    generator: torch.Generator
    text: AnswerText
    allow: Allow | None
    logprobs: bool
    top: int
    due: float | None  # on the clock of time.monotonic
    tokens: list[int] = field(default_factory=list)
    seen: torch.Tensor | None = None  # (1, V), only with a repetition penalty
    began: float | None = None
    over: bool = False
    deaf: bool = False

    @property
    def plain(self) -> bool:
        """Whether the best score decides."""
        return self.sampling.takes_best and self.allow is None

    def choose(self, scores: torch.Tensor) -> int:
        """The next token, from scores (1, V)."""
        if self.allow is not None:
            may = ask_allow(self.allow, list(self.tokens), self.limit - len(self.tokens))  # (V,)
            scores = scores.masked_fill(~may.to(scores.device), float("-inf"))
        if self.sampling.repetition_penalty != 1 and self.seen is None:
            seen = seen_tokens(self.batch.input_ids, self.batch.attention_mask, scores.shape[-1])
            self.seen = seen.to(scores.device)
        token = choose(scores, self.sampling, self.seen, [self.generator])  # (1,)
        if self.seen is not None:
            self.seen.scatter_(-1, token[:, None], True)
        return int(token)

    def given_up(self) -> str | None:
        """Why nobody wants more of it, if so."""
        if self.ticket.cancelled:
            return "cancelled"
        return "deadline" if self.due is not None and time.monotonic() >= self.due else None

    def tell(self, event: Event) -> None:
        """A listener that raises is not called again, whatever it raised."""
        if self.deaf:
            return
        try:
            self.listener(event)
        except BaseException:
            self.deaf = True
            logging.getLogger(__name__).exception("a listener failed: its request ends")

    def take(self, event: Event, stop_ids: set[int]) -> str | None:
        """Pass a token on; if the answer ends with it, why."""
        if reason := self.given_up():
            return reason
        self.tokens.append(event.token)
        stopped = event.token in stop_ids or self.text.push(event.token)
        self.tell(replace(event, text=self.text.take()))
        if stopped:
            return "stop"
        return "length" if len(self.tokens) == self.limit else None


# %%
# | export
def _best_only(requests: Sequence[_Request]) -> bool:
    """Whether nobody asks for more than the best token."""
    return all(request.plain and not (request.logprobs or request.top) for request in requests)


def _pick_tokens(requests: Sequence[_Request], logits: torch.Tensor) -> list[Event | Exception]:
    """The next token of each row of scores (B, V), still without text; or what went wrong with this row."""
    scores, finite = logits.float(), logits.isfinite().all(-1).tolist()
    chosen, wrong = scores.argmax(-1).tolist(), {}
    for row, request in enumerate(requests):
        try:
            if not finite[row]:
                finite_scores(logits[row : row + 1])  # raises, with chapter 13's sentence
            if not request.plain:
                chosen[row] = request.choose(scores[row : row + 1])
        except Exception as error:
            wrong[row] = error
    totals = scores.logsumexp(-1, keepdim=True)  # (B, 1)
    logprobs = (scores.gather(-1, torch.tensor(chosen, device=scores.device)[:, None]) - totals)[:, 0].tolist()
    picked: list[Event | Exception] = []
    for row, request in enumerate(requests):
        top = ()
        if request.top and row not in wrong:
            best = (scores[row] - totals[row]).topk(request.top)
            top = tuple(zip(best.indices.tolist(), best.values.tolist()))
        picked.append(wrong[row] if row in wrong else Event("", chosen[row], logprobs[row], top))
    return picked


# %% [markdown]
# ## The engine
#
# One thread runs the model, and nothing else does. Its life is a loop of three moves: end what nobody waits for any more,
# read the prompts whose turn it is, take a step. Between two moves is the only time at which anything joins or leaves, so
# there is little to lock: the queue.
#
# What can go wrong, and who notices:
#
# - *Nobody has room.* Each row has columns for a whole context, so whoever has a row has room. Whoever has none waits in
#   the queue, and is let in in the order of arrival: nobody can be overtaken for ever, and no two can wait for each other. If
#   the queue is full, `submit` says so at once, with the time after which it is worth trying again.
# - *A client goes away,* or its time is up. Its request ends before the next token.
# - *A listener raises.* It is not called again.
# - *Scores of one row are not numbers.* That request ends with an error.
# - *The model raises.* Then we do not know whose fault it is. So the step is repeated for each row alone, and those that
#   fail alone end with an error. The same for prompts that were read together.


# %%
# | export
@dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done.

    Parameters
    ----------
    queued, running, rows : int
        Requests that wait, requests that have a row, and rows that there are.
    batch_sizes : dict
        How many steps were taken with 1, 2, ... rows.
    prompts, prompt_tokens, tokens : int
        Prompts read, their tokens (pictures included, padding not), and tokens told.
    prefill_seconds, decode_seconds : float
        Time spent in reading prompts and in steps.
    finished : dict
        How many requests ended for each reason in `FINISHES`.
    cache_bytes : int
        What keys and values of all rows take.
    """

    queued: int
    running: int
    rows: int
    batch_sizes: dict[int, int]
    prompts: int
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    finished: dict[str, int]
    cache_bytes: int


# %%
# | export
class Engine:
    """Answers many requests at a time: they join and leave the running batch between two tokens.

    A thread of the engine's own runs the model and calls the listeners. Requests start in the order in which they came.

    Parameters
    ----------
    model : PaliGemma
        What `load` returned, with its `processor` and `stop_ids`.
    max_rows : int
        Most requests in the running batch.
    max_length : int, optional
        Tokens that a row has room for, pictures, prompt and answer together; the model's context by default.
    queue_size : int
        Most requests that wait for a row; with 0 whoever finds no row free is sent away.
    prefill_tokens : int
        Prompts that wait are read together while they have no more tokens than this, padding included; one is read in any
        case. There is a step between two reads, so this bounds how long running rows wait for a token.
    encode_images : callable, optional
        Pictures (N, 3, S, S) to features (N, P, D), in place of the model's own method: one that remembers.

    Raises
    ------
    ValueError
        If a number is out of its range, or the model has no processor.

    References
    ----------
    Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", section 3.1.
    """

    def __init__(
        self,
        model: PaliGemma,
        *,
        max_rows: int = 8,
        max_length: int | None = None,
        queue_size: int = 64,
        prefill_tokens: int = 512,
        encode_images: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if not isinstance(getattr(model, "processor", None), Processor):
            raise ValueError("this model has no processor: take one from sigma_book.load, or set model.processor")
        self.processor = model.processor
        self.max_rows = whole_number("max_rows", max_rows, least=1)
        self.context = model.config.text.max_position_embeddings
        length = self.context if max_length is None else max_length
        self.max_length = whole_number("max_length", length, least=1, most=self.context)
        self.queue_size = whole_number("queue_size", queue_size, least=0)
        self.prefill_tokens = whole_number("prefill_tokens", prefill_tokens, least=1)
        self._vocab_size = model.config.text.vocab_size
        self._stop_ids = set(getattr(model, "stop_ids", None) or [model.config.eos_token_id])
        self._batch = RunningBatch(model, self.max_rows, self.max_length, encode_images)
        self._waiting: deque[_Request] = deque()
        self._reading: list[_Request] = []
        self._running: list[_Request] = []  # request i has row i of the batch
        self._steps, self._finished = Counter(), Counter()
        self._prompts = self._prompt_tokens = self._tokens = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._held = 1.0  # seconds that a request keeps its row, as seen of late
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="sigma_book engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, finish=False)  # a thread that runs on while Python ends would crash it

    def submit(
        self,
        image,
        prompt: str,
        listener: Callable[[Event], None],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        allow: Allow | None = None,
        logprobs: bool = False,
        top: int = 0,
        deadline: float | None = None,
    ) -> Ticket:
        """Hand in a request, from any thread; returns when the picture is prepared, long before the answer.

        Parameters
        ----------
        image : path, bytes, array, PIL image, or a list of them
            One picture, or several for this prompt.
        prompt : str
        listener : callable
            Called with an `Event` for each token and with a last one, from the engine's thread: it must return quickly.
        max_new_tokens : int
            At least 1; the room that the prompt leaves bounds it too.
        sampling : Sampling, optional
            Greedy by default. A seed draws what a call of its own with this seed draws.
        stop : sequence of str
            Strings that end the answer and are left out of it.
        allow : callable, optional
            Which tokens may come next, see `Allow`; called from the engine's thread.
        logprobs : bool
            Whether log-probabilities are wanted. If not, a model that was made ready for speed may round them.
        top : int
            How many of the likeliest tokens an event lists.
        deadline : float, optional
            Seconds from now: no token is told later.

        Raises
        ------
        ValueError
            If an argument is out of its range; if the prompt contains `<image>`; if a picture cannot be read.
        PromptTooLong
            If the prompt leaves no room for an answer.
        FileNotFoundError
            If there is no such picture.
        QueueFull
            If too many requests wait already.
        EngineClosed
            If it has been closed.
        """
        due = _read_deadline(deadline)
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling is {sampling!r:.80}: expected a Sampling")
        for name, value in (("listener", listener), ("allow", allow)):
            if not callable(value) and (name == "listener" or value is not None):
                raise ValueError(f"{name} is {value!r:.80}: expected a function")
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        top = whole_number("top", top, least=0, most=self._vocab_size)
        text = AnswerText(self.processor.tokenizer.decode, read_stop_strings(stop))
        self._check_place()  # before the work of preparing a picture
        shown = list(image) if isinstance(image, list | tuple) else [image]
        batch = self.processor.prepare([[load_image(source) for source in shown]], [prompt])
        length = batch.input_ids.shape[1]
        if length >= self.max_length:
            raise PromptTooLong(
                f"the prompt has {length} tokens, pictures included: the context here has room for {self.max_length}, prompt "
                f"and answer together, so shorten it by {length - self.max_length + 1} or more"
            )
        [limit] = answer_limits(batch.attention_mask, max_new_tokens, self.max_length)
        [generator] = row_generators(sampling.seed, 1)
        request = _Request(Ticket(length), batch, listener, limit, sampling, generator, text, allow, logprobs, top, due)
        with self._changed:
            self._check_place()
            self._waiting.append(request)
            self._changed.notify_all()
        return request.ticket

    def _check_place(self) -> None:
        with self._changed:
            if self._closed:
                raise EngineClosed
            requests = len(self._waiting) + len(self._reading) + len(self._running)
            if requests >= self.max_rows + self.queue_size:
                raise QueueFull(requests, self.retry_after())

    def retry_after(self) -> float:
        """Seconds in which a full queue is likely to be worked off, as things go of late."""
        # each of `max_rows` rows takes a new request every `_held` seconds
        return max(0.1, self._held * max(1, self.queue_size) / self.max_rows)

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and wait until the engine's thread has ended. Called from a listener, it does not wait.

        Parameters
        ----------
        finish : bool
            Answer what was taken, waiting requests included; otherwise all of it is cancelled.
        timeout : float, optional
            Seconds after which what is not finished is cancelled.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        inside = threading.current_thread() is self._thread
        if finish and not inside:
            self._thread.join(timeout)
        if not finish or (timeout is not None and not inside):
            with self._changed:
                for request in (*self._waiting, *self._reading, *self._running):
                    request.ticket.cancel()
        if not inside:
            self._thread.join()
            atexit.unregister(self.close)  # called from a listener, the thread runs on, and is waited for at exit

    def stats(self) -> EngineStats:
        """Plain numbers, for metrics."""
        with self._changed:
            return EngineStats(
                queued=len(self._waiting),
                running=len(self._reading) + len(self._running),
                rows=self.max_rows,
                batch_sizes=dict(sorted(self._steps.items())),
                prompts=self._prompts,
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                finished={reason: self._finished[reason] for reason in FINISHES},
                cache_bytes=sum(cache.key.nbytes + cache.value.nbytes for cache in self._batch.caches),
            )

    @torch.no_grad()  # here, since the setting is each thread's own
    def _work(self) -> None:
        """The engine's thread: move after move, until it is closed and nothing is left to do."""
        while self._has_work():
            try:
                self._sweep()
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:  # what nothing below foresaw ends the requests under way, not the engine
                logging.getLogger(__name__).exception("the engine failed: the requests under way end")
                for request in (*self._reading, *self._running):
                    self._end(request, "error", f"the engine failed: {error}")
                with self._changed:
                    self._reading, self._running = [], []
                for cache in self._batch.caches:
                    cache.clear()

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            return bool(self._waiting or self._running)

    def _sweep(self) -> None:
        """End the requests that nobody wants any more, waiting or running."""
        with self._changed:
            gone = [(request, reason) for request in self._waiting if (reason := request.given_up())]
            for request, _ in gone:
                self._waiting.remove(request)
        for request, reason in gone:
            self._end(request, reason)
        for row in reversed(range(len(self._running))):
            if reason := self._running[row].given_up():
                self._leave(row, reason)

    def _admit(self) -> None:
        """Read the prompts whose turn it is."""
        with self._changed:
            longest = 0
            while self._waiting and len(self._reading) + len(self._running) < self.max_rows:
                longest = max(longest, self._waiting[0].ticket.prompt_tokens)
                if self._reading and longest * (len(self._reading) + 1) > self.prefill_tokens:
                    break
                self._reading.append(self._waiting.popleft())
        if self._reading:
            self._read(list(self._reading))

    def _read(self, requests: list[_Request]) -> None:
        """Read prompts together; whoever is not over with the first token gets a row."""
        start = time.perf_counter()
        try:
            logits, filled = self._batch.read([request.batch for request in requests], _best_only(requests))
        except Exception as error:
            if len(requests) > 1:
                for request in requests:  # one of them is at fault: each by itself
                    self._read([request])
            else:
                self._end(requests[0], "error", _sentence(error))
            return
        picked = _pick_tokens(requests, logits)
        with self._changed:
            self._prefill_seconds += time.perf_counter() - start
            self._prompts += len(requests)
            self._prompt_tokens += sum(request.ticket.prompt_tokens for request in requests)
        for row, request in enumerate(requests):
            request.began = start
            over = self._take(request, picked[row])
            if over is not None:
                self._end(request, *over)
                continue
            try:
                self._batch.join(filled, row, request.ticket.prompt_tokens)
            except Exception as error:  # no memory for it, say
                self._end(request, "error", _sentence(error))
                continue
            with self._changed:
                self._reading.remove(request)
                self._running.append(request)

    def _step(self) -> None:
        """One token for each running row."""
        start = time.perf_counter()
        tokens = [request.tokens[-1] for request in self._running]
        try:
            logits = self._batch.step(tokens, best_only=_best_only(self._running))
        except Exception:  # some row is at fault: each by itself
            picked = [self._step_alone(row, token) for row, token in enumerate(tokens)]
        else:
            picked = _pick_tokens(self._running, logits)
        with self._changed:
            self._decode_seconds += time.perf_counter() - start
            self._steps[len(tokens)] += 1
        for row in reversed(range(len(tokens))):  # from the end, since a row that leaves is filled from there
            if (over := self._take(self._running[row], picked[row])) is not None:
                self._leave(row, *over)

    def _step_alone(self, row: int, token: int) -> Event | Exception:
        """A step of one row, after one of all rows has failed."""
        try:
            alone = [self._running[row]]
            return _pick_tokens(alone, self._batch.step([token], row, _best_only(alone)))[0]
        except Exception as error:
            return error

    def _take(self, request: _Request, picked: Event | Exception) -> tuple[str, str | None] | None:
        """Pass a token on. If the request is over with it: why, and a sentence if it failed."""
        try:
            if isinstance(picked, Exception):
                raise picked
            reason = request.take(picked, self._stop_ids)
        except Exception as error:
            return "error", _sentence(error)
        with self._changed:
            self._tokens += reason not in ("cancelled", "deadline")
        if request.deaf:
            return "error", "its listener failed"
        return None if reason is None else (reason, None)

    def _leave(self, row: int, finish: str, error: str | None = None) -> None:
        """End the request of a row. The last row takes its place."""
        request = self._running[row]
        self._batch.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        self._end(request, finish, error)

    def _end(self, request: _Request, finish: str, error: str | None = None) -> None:
        """The last word to a listener."""
        if request.over:
            return
        request.over = True
        request.text.finish()
        with self._changed:
            if request in self._reading:
                self._reading.remove(request)
            self._finished[finish] += 1
            if request.began is not None:
                self._held += 0.1 * (time.perf_counter() - request.began - self._held)
        request.tell(Event(request.text.take(), finish=finish, error=error))


def _read_deadline(seconds: float | None) -> float | None:
    """The time at which so many seconds will be over, on the clock of time.monotonic."""
    if seconds is None:
        return None
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < float("inf"):
        raise ValueError(f"deadline is {seconds!r}: expected a number of seconds above 0")
    return time.monotonic() + seconds


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__


# %% [markdown]
# The proof. Twenty requests of all kinds arrive at random: pictures, prompts and lengths differ, some are drawn, some have
# a stop string, some penalize repetition. Five rows, and a budget that lets few be read together. Each must get what
# `generate` gives it alone.


# %%
class Collect:
    """A listener that keeps what it is told, and when."""

    def __init__(self):
        self.events, self.times, self.over = [], [], threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(time.perf_counter())
        if event.finish is not None:
            self.over.set()

    @property
    def text(self) -> str:
        self.over.wait()
        return "".join(event.text for event in self.events)


chance = random.Random(1)
kinds_of_choice = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 8},
    {"repetition_penalty": 1.3},
    {"stop": [" and"]},
]
asked = []
for number in range(20):
    options = dict(chance.choice(kinds_of_choice))
    options["max_new_tokens"] = chance.choice([1, 5, 12, 40])
    asked.append((draw_scene(make_scene(number)), chance.choice(questions), options))

heard = []
with closing(Engine(model, max_rows=5, prefill_tokens=200)) as engine:
    for picture, text, options in asked:
        chosen = {name: options[name] for name in options if name not in ("max_new_tokens", "stop")}
        heard.append(Collect())
        others = {"max_new_tokens": options["max_new_tokens"], "stop": options.get("stop", ())}
        engine.submit(picture, text, heard[-1], sampling=Sampling(**chosen), **others)
        time.sleep(chance.random() * 0.03)
    texts = [one.text for one in heard]
    stats = engine.stats()
for (picture, text, options), answer in zip(asked, texts):
    assert answer == generate(picture, text, model=model, **options)
print(f"{sum(stats.finished.values())} answers, {stats.tokens} tokens; steps by rows: {stats.batch_sizes}")

# %% [markdown]
# Word for word the same, whatever the company. Two remarks on that. In company sums run in another order. In float32 that
# changes the last digits of scores and almost never the choice; with 16 bits it changes more, and where two tokens are
# about equally good either may come. And drawn tokens are the same because each request draws from a generator of its own
# (chapter 13).
#
# (`tests/test_batching.py` does this with hundreds of requests from many threads, with the windows and softcaps of Gemma 2,
# with requests that are cancelled, and with models that break in the middle.)
#
# ## A look inside
#
# One evening of a small service: three rows, nine requests, and one client who loses patience after six tokens. We write
# down when each listener was called. The model is the pocket one, or that of `SIGMA_BOOK_MODEL`.


# %%
class Impatient(Collect):
    """Gives its request up after six tokens."""

    ticket: Ticket | None = None

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if len(self.events) >= 6 and self.ticket is not None:
            self.ticket.cancel()


shown = load(os.environ.get("SIGMA_BOOK_MODEL"))
arrivals = [0, 0, 0.1, 0.2, 0.3, 0.5, 1.4, 1.6, 1.8]  # in times that the first caption takes alone
wishes = ["caption en", "detect circle", "caption en", "how many things are there?", *["caption en"] * 5]
scenes = [draw_scene(make_scene(40 + number)) for number in range(9)]


def play(unit: float) -> tuple[float, list[float], list[Collect]]:
    """An evening on which a unit of `arrivals` is so many seconds: its start, when requests came, what they heard."""
    heard, came = [Collect() for _ in wishes], []
    heard[4] = Impatient()
    with closing(Engine(shown, max_rows=3, max_length=min(512, shown.config.text.max_position_embeddings))) as engine:
        start = time.perf_counter()
        for number, one in enumerate(heard):
            time.sleep(max(0.0, start + arrivals[number] * unit - time.perf_counter()))
            came.append(time.perf_counter())
            one.ticket = engine.submit(scenes[number], wishes[number], one, max_new_tokens=30)
        for one in heard:
            one.over.wait()
    return start, came, heard


play(0.0)  # all at once, to warm up
unit = seconds(lambda: generate(scenes[0], "caption en", model=shown, max_new_tokens=30), times=3)
start, began, evening = play(unit)
figure, axis = plt.subplots(figsize=(7.6, 3.3))
for number, (one, came) in enumerate(zip(evening, began)):
    times = [(moment - start) * 1000 for moment in one.times]
    axis.plot([(came - start) * 1000, times[0]], [number, number], color=PROMPT, lw=5, solid_capstyle="butt")
    axis.plot([times[0], times[-1]], [number, number], color="#cfe8df", lw=5, solid_capstyle="butt", zorder=0)
    axis.plot(times[:-1], [number] * (len(times) - 1), "|", color=ANSWER, ms=7, mew=1.6)
    how = one.events[-1].finish
    axis.text(times[-1], number, f"  {how}", va="center", fontsize=8, color="black" if how == "cancelled" else "0.5")
axis.set(yticks=range(9), yticklabels=wishes, xlabel="milliseconds", ylim=(8.6, -0.6))
axis.margins(x=0.12)
save(figure, "21c_evening")
ended = [one.events[-1].finish for one in evening]
if "SIGMA_BOOK_MODEL" not in os.environ:
    assert ended == ["stop"] * 4 + ["cancelled"] + ["stop"] * 4

# %% [markdown]
# *Figure: a line for each of nine requests over time. Orange: it waits, or its prompt is read. Each green stroke is a token.
# At first three rows are too few: the fourth request and those behind it wait, each until another one ends. While a
# prompt is read nobody gets a token, so the strokes of all who run show the same gaps, several steps wide. One line breaks
# off as cancelled.*
#
# ## What it brings
#
# Sixteen clients, each of which asks again as soon as it has its answer, against the same requests one by one.

# %%
pictures = [draw_scene(make_scene(number)) for number in range(16)]
jobs = [(pictures[number % 16], "caption en") for number in range(64)]
start = time.perf_counter()
alone = [generate(picture, text, model=model, return_logprobs=True) for picture, text in jobs]
one_by_one = sum(len(answer.tokens) for answer in alone) / (time.perf_counter() - start)

answered = {}
waiting = iter(range(len(jobs)))  # one for all: each client takes the next job
with closing(Engine(model, max_rows=16)) as engine:

    def client() -> None:
        for job in waiting:
            collect = Collect()
            engine.submit(*jobs[job], collect, max_new_tokens=100)
            answered[job] = collect.text

    clients = [threading.Thread(target=client) for _ in range(16)]
    start = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    together_rate = engine.stats().tokens / (time.perf_counter() - start)
    stats = engine.stats()
assert [answered[job] for job in range(len(jobs))] == [answer.text for answer in alone]
assert sum(stats.batch_sizes.values()) < (stats.tokens - stats.prompts) / 4  # readings of the weights
print(
    f"{one_by_one:.0f} tokens/s one by one, {together_rate:.0f} with 16 clients: {together_rate / one_by_one:.1f} times"
)
print(f"{stats.prefill_seconds:.2f} s went into {stats.prompts} prompts, {stats.decode_seconds:.2f} s into the steps")

# %% [markdown]
# Why not sixteen times? A request alone takes $p$ seconds to read its prompt, and $n$ steps of $s_1$ seconds. In company it
# takes its share: $p'$ seconds of a prompt read with others, and of each step, which takes $s_R$ seconds with $R$ rows, the
# part $1/R$.
#
# $$ \text{gain} \le \frac{p + n\, s_1}{p' + n\, s_R / R} $$
#
# Company makes the steps much cheaper and the reading a little. With the times measured above ($p'$ is an eighth of reading
# eight together), for short answers and long ones:

# %%
most_gain = {
    count: (reading[1] + count * stepping[1]) / (reading[8] / 8 + count * stepping[16] / 16) for count in (10, 40, 200)
}
assert most_gain[10] < most_gain[200]
for count, times in most_gain.items():
    print(f"answers of {count:3} tokens: at most {times:.1f} times")

# %% [markdown]
# A caption of ten tokens is mostly reading. Long answers gain more. And a second question about the same picture saves a
# part of the reading: chapter 21b keeps the features of pictures.
#
# ## The bill
#
# First the memory that is set aside at the start: columns for every row. (On a CPU the system finds real memory for them
# only when they are written for the first time. On a GPU all of it is taken at once.)

# %%
per_token = cache_bytes(18, 1, 256, length=1)  # PaliGemma 3B, 16 bits
assert per_token == 18_432
whole = cache_bytes(18, 1, 256, length=8192, batch=8)
assert whole == 8 * 8192 * per_token and round(whole / 1e9, 2) == 1.21
assert round(cache_bytes(18, 1, 256, length=512, batch=8) / 1e6) == 75
assert round(cache_bytes(42, 8, 256, length=8192, batch=8) / 1e9, 1) == 22.5  # PaliGemma 2 10B, windows left aside
print(f"8 rows of 8,192 tokens: {whole / 1e9:.2f} GB; of 512 tokens: {cache_bytes(18, 1, 256, 512, 8) / 1e6:.0f} MB")

# %% [markdown]
# Hence `max_length`: who serves captions at 224 pixels needs no more than a few hundred columns.
#
# Now the pace. A step reads the weights once, $W$ bytes, and of each row its own cache, $S$ tokens of $c$ bytes. So with a
# memory that delivers $\beta$ bytes a second, at most
#
# $$ \text{tokens per second} \le \frac{\beta\, R}{W + R\, S\, c} $$
#
# With few rows $W$ is most of the sum, and $R$ rows are nearly $R$ times as fast as one. With many it is the caches, and
# the pace approaches $\beta / (S c)$.

# %%
block = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 16_384 + 2 * 2048  # q and o, k and v, the MLP, two norms
weights = 2 * (18 * block + 2048 + 257_216 * 2048)  # bytes of the 3B decoder and its head in 16 bits
assert weights == 5_017_325_568  # as in chapter 13
counts = [2**power for power in range(11)]
sizes = {"224 px": 256 + 44, "448 px": 1024 + 44, "896 px": 4096 + 44}
figure, axis = plt.subplots(figsize=(6.2, 3.1))
gain = {}
for (name, tokens), colour in zip(sizes.items(), (HEADS[4], HEADS[0], HEADS[6])):
    one_row = weights + tokens * per_token
    gain[name] = [rows * one_row / (weights + rows * tokens * per_token) for rows in counts]
    axis.loglog(counts, gain[name], color=colour)
    axis.annotate(name, (counts[-1], gain[name][-1]), xytext=(5, 0), textcoords="offset points", va="center")
axis.loglog(counts, counts, color=GREY, ls="--", lw=1)
axis.set(
    xlabel="rows", ylabel="tokens a second, one row = 1", xlim=(1, 2600), xticks=[1, 8, 64, 512], yticks=[1, 8, 64, 512]
)
axis.set_xticklabels(["1", "8", "64", "512"])
axis.set_yticklabels(["1", "8", "64", "512"])
axis.minorticks_off()
save(figure, "21c_bound")
assert gain["224 px"][3] > 7.9 and gain["224 px"][6] > 59
assert gain["896 px"][3] > 7 and 32 < gain["896 px"][6] < 34

# %% [markdown]
# *Figure: the bound on the pace against the number of rows, both logarithmic, for three picture sizes. On the dashed line $R$
# rows are $R$ times as fast as one. All three nearly follow it up to eight rows. At 896 pixels, where each row has 4,096
# picture tokens, the line bends from 16 rows on; at 224 pixels only beyond a hundred.*
#
# A bound is what memory allows. Chapter 21's trap keeps float32 away from it: a product with a few rows can take much
# longer than with one. Here it is for one matrix of the 3B decoder's MLP, and beside it the same in eight bits.

# %%
wide = torch.randn(16384, 2048)
kinds = {"float32": lambda given: F.linear(given, wide), "8 bits": Int8Linear(*quantize_rows(wide, int8_levels()))}
for name, product in kinds.items():
    for rows in (1, 2, 4, 8, 16):
        given = torch.ones(rows, 2048)
        moment = seconds(lambda product=product, given=given: product(given), times=7)
        one_row = moment if rows == 1 else one_row
        print(f"{name:8}{rows:3} rows {1000 * moment:7.1f} ms, {moment / one_row:5.1f} times one row")

# %% [markdown]
# Where the last column says much more than 1, a batch of two or four gains little. In float32 that is so on many CPUs. In
# eight bits (chapter 21b) there are fewer bytes to read, and the kernel is made for few rows too.
#
# ## Your turn
#
# **1.** ★ Which share of a static batch's row-steps is run for nothing? All rows run until the longest of the batch is done,
# also those that have no request.


# %%
def wasted(lengths: list[int], rows: int) -> float: ...


check(wasted, (([3, 14, 5], 3), 20 / 42), (([5, 5, 5, 5], 2), 0.0), (([4, 2, 6], 2), 8 / 20))

# %% [markdown]
# **2.** ★ The mask of a step by hand: for each row, which columns may its new token look at, itself included? As many
# columns as the longest row needs.


# %%
def step_mask_by_hand(lengths: list[int]) -> list[list[bool]]: ...


cases = [[2, 0], [1, 3, 1]]
masks = [SlotCache(3, 1, 8, 2).mask(torch.tensor(lengths)[:, None] + 1)[:, 0, 0].tolist() for lengths in cases]
check(step_mask_by_hand, *(((lengths,), mask) for lengths, mask in zip(cases, masks)))

# %% [markdown]
# **3.** ★★ How many of the waiting prompts are read together? `waiting` are their lengths in order of arrival, `free` the free
# rows, `budget` the tokens, padding included. One is read in any case, if a row is free.


# %%
def read_together(waiting: list[int], free: int, budget: int) -> int: ...


check(
    read_together,
    (([70] * 20, 16, 512), 7),
    (([261, 262], 8, 512), 1),
    (([70, 300, 70], 8, 512), 1),
    (([70, 70, 70, 300], 8, 512), 3),
    (([256, 256], 8, 512), 2),
    (([5000], 1, 512), 1),
    (([5, 5, 5], 2, 512), 2),
    (([5], 0, 512), 0),
)

# %% [markdown]
# **4.** ★★ How many rows of so many tokens fit into a memory, beside the weights? All in bytes but `tokens`.


# %%
def rows_that_fit(memory: int, weights: int, tokens: int, per_token: int) -> int: ...


check(
    rows_that_fit,
    ((16 * 10**9, weights, 300, 18_432), 1986),
    ((16 * 10**9, weights, 8192, 18_432), 72),
    ((10, 20, 1, 1), 0),
)

# %% [markdown]
# **5.** ★★★ All requests are there at time 0. What is the mean time until an answer is complete, in steps? With
# `shortest_first` the short ones go first: how much better is it? And why does our engine not do it? (There are two
# reasons. One is that it does not know something.)


# %%
def mean_end(lengths: list[int], rows: int, shortest_first: bool) -> float: ...


check(mean_end, (([9, 1, 2], 1, False), 31 / 3), (([9, 1, 2], 1, True), 16 / 3), ((lengths, 3, True), 135 / 11))

# %% [markdown]
# Next: many machines. Chapter 22 trains on several at once.
