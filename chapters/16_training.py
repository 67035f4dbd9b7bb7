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
# # The loop that teaches
#
# *How does a model change, step by step, until its answers are right, and what if the power fails on the way?*
#
# **You build** the training loop, and a run that can be killed at any moment and loses no more than the steps since its last
# checkpoint. **You need** chapters 10 (the loss), 11 (folders that appear whole), 12 (files) and 15b (batches).
# **Exports** the module `sigma_book.training`.

# %%
# | export
import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sigma_book.batches import collate
from sigma_book.data import Example
from sigma_book.generation import Sampling, generate_answers, is_finite
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Batch, Processor, file_beside, folder_beside, load_image, make_folder


# %%
import copy
import subprocess
import tempfile
from dataclasses import astuple, replace

import matplotlib.pyplot as plt

from sigma_book import load
from sigma_book.batches import Batches
from sigma_book.gemma import GemmaConfig
from sigma_book.siglip import SiglipConfig
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A loss says how wrong the model is. Its gradient says, for each number in the model, in which direction the loss rises.
# So we take a small step in the other direction, and look again.


# %%
def hill(x: float) -> float:
    return (x - 3) ** 2 / 4 + 0.5


figure, axis = plt.subplots(figsize=(5.2, 2.4))
line = torch.linspace(-2, 7, 200)
axis.plot(line, hill(line), color=GREY)
x, path = -1.5, []
for _ in range(7):
    path.append(x)
    x -= 0.6 * (x - 3) / 2
axis.plot(path, [hill(x) for x in path], color=PICTURE, marker="o", ms=5, lw=1)
axis.annotate("start", (path[0], hill(path[0])), xytext=(8, 0), textcoords="offset points")
axis.set(xlabel="one number of the model", ylabel="loss")
save(figure, "16_hill")
plt.show()

# %% [markdown]
# *Figure: a curve like a valley, and seven dots that walk down its left side. The steps between them shorten as the
# slope flattens.*
#
# ## First by hand
#
# One number, ten steps. At $x$ this curve has the slope $(x - 3) / 2$. A step is the slope times a number that we choose, the
# *learning rate*; here it is 0.6, as in the figure.

# %%
x = 0.0
for _ in range(10):
    gradient = (x - 3) / 2  # the slope of `hill`
    x = x - 0.6 * gradient
assert abs(x - 3) < 0.1
x

# %% [markdown]
# Real models have millions of numbers, and their slopes differ by a thousand times. One step size does not fit all.
# *AdamW* gives each number its own: it keeps a running mean of the gradient and one of its square, and divides the first
# by the root of the second.


# %%
def adamw_naive(x, gradients, rate=0.1, b1=0.9, b2=0.999, eps=1e-8, decay=0.01):
    mean = square = 0.0
    for t, g in enumerate(gradients, start=1):
        x -= rate * decay * x  # weights shrink a little, apart from the gradient
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * g * g
        x -= rate * (mean / (1 - b1**t)) / ((square / (1 - b2**t)) ** 0.5 + eps)
    return x


gradients = [2.0, -1.0, 0.5, 0.5]
number = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
optimizer = torch.optim.AdamW([number], lr=0.1, weight_decay=0.01)
for g in gradients:
    number.grad = torch.tensor(g, dtype=torch.float64)
    optimizer.step()
assert abs(adamw_naive(1.0, gradients) - number.item()) < 1e-12

# %% [markdown]
# The two agree to 1e-12, so we use PyTorch's. It also has a *fused* form, which updates all numbers in one go over the
# memory.
#
# ## The formula
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 $$
#
# $$ w \leftarrow w - \eta \left( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda w \right), \qquad
# \hat m = \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t} $$
#
# $w$ is a weight, $g$ its gradient, $\eta$ the learning rate, $\lambda$ the decay, $t$ the number of the step. The means begin
# at zero and are too small at first; $\hat m$ and $\hat v$ make up for it. PaliGemma was taught with $\beta_2 = 0.999$; we
# use the same.
#
# ## Warm up, come down
#
# The first steps of a run are wild, because the running means know nothing yet; so the rate $\eta$ rises in a line.
# The last steps should settle, so it falls to zero: in a line, or along half a wave.


# %%
# | export
def learning_rate_factor(step: int, steps: int, warmup: int, hold: float = 0.0, schedule: str = "linear") -> float:
    """The share of the peak learning rate at a step: up in a line, then held, then down to zero.

    Parameters
    ----------
    step : int
        From 0.
    steps : int
        All steps of the run.
    warmup : int
        Steps until the peak.
    hold : float
        Share of the run, 0 to 1, after which the descent begins (never before the end of the warmup).
    schedule : str
        How it comes down: `linear`, or `cosine` (half a wave, from its crest to its trough).
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    left = min(1.0, max(0.0, (steps - step) / max(1.0, steps - start)))
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


# %%
figure, axis = plt.subplots(figsize=(5.6, 2.4))
ways = {"linear": {}, "cosine": {"schedule": "cosine"}, "held for 40 %": {"hold": 0.4}}
for (name, way), colour, at in zip(ways.items(), (PICTURE, ANSWER, PROMPT), (300, 700, 560)):
    factors = [learning_rate_factor(step, 1000, 100, **way) for step in range(1001)]
    axis.plot(factors, color=colour)
    beside = (5, 4) if "held" in name else (-34, -14)
    axis.annotate(name, (at, factors[at]), xytext=beside, textcoords="offset points", color=colour)
    assert factors[99] == 1.0 and factors[1000] == 0.0
axis.set(xlabel="step", ylabel="share of the peak rate")
save(figure, "16_rate")
plt.show()

# %% [markdown]
# *Figure: three schedules of a thousand steps. All rise in a line for a hundred steps. One then falls in a line, one along
# half a wave, one stays up until step 400 and falls in a line from there.*
#
# ## Never too far
#
# Now and then a batch has a huge gradient. One such step can undo a hundred good ones. So the gradient, all numbers
# taken as one long arrow, is shortened to a given length if it is longer. Its direction stays.

# %%
arrow = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
arrow[0].grad, arrow[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
assert torch.nn.utils.clip_grad_norm_(arrow, 1.0) == 5.0
torch.testing.assert_close(torch.cat([p.grad for p in arrow]), torch.tensor([0.6, 0.8]))

# %% [markdown]
# ## A large batch in small pieces
#
# A gradient over many examples is less noisy than one over few. But many examples at once do not fit into memory. So we take
# them in small batches, add up the gradients, and step once. That is called *accumulation*.
#
# Here is the trap. Our loss is a mean over answer *tokens*. Say one small batch has 2 tokens, the other 8. These are the
# losses of the tokens:

# %%
short, long = [4.0, 6.0], [1.0] * 8
mean_of_all = sum(short + long) / 10
mean_of_means = (sum(short) / 2 + sum(long) / 8) / 2
assert (mean_of_all, mean_of_means) == (1.8, 3.0)

# %% [markdown]
# The mean of the two means is another number: in it, a token of the short batch weighs four times as much as one of the long
# batch. The cure: each small batch weighs by its tokens. (PaliGemma itself was taught with the mean of the means, one for each
# example: there a short answer counts as much as a long one. What matters is that the groups change nothing. We weigh as
# `transformers` does.)

# %%
by_tokens = (2 / 10) * (sum(short) / 2) + (8 / 10) * (sum(long) / 8)
assert abs(by_tokens - mean_of_all) < 1e-12

# %% [markdown]
# For that, the tokens of the whole group must be counted before the first gradient is taken. The labels stand in the
# batches, so counting costs nothing.


# %%
# | export
def answer_loss(model: PaliGemma, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answers of a batch: what the ordinary batches of chapter 15b are for."""
    return model.loss(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids, batch.labels)


def answer_tokens(batch: Batch) -> int:
    """How many tokens the mean of `answer_loss` is taken over."""
    return int((batch.labels[:, 1:] != -100).sum())  # no place stands before the first, to be asked for it


# %% [markdown]
# The large batch may also be cut over several processes, on several graphics cards: chapter 22. Then the loop has to ask the
# others: how many tokens are there together, when are gradients added up, how long is the whole gradient, who writes? One
# small object answers, so that the loop is the same here and there. This is the object of a process that is alone: the sum
# over all processes is its own number, the whole gradient is its own, and it is the one that writes.


# %%
# | export
class Alone:
    """What the loop asks of other processes where there are none; `Ranks` of chapter 22 is the one for many.

    Attributes
    ----------
    rank, size : int
        Which process this is, and of how many. Rank 0 writes and speaks for all.
    """

    rank, size = 0, 1

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number, added up over all processes."""
        return numbers

    def first(self, number: float) -> float:
        """What rank 0 says, for all."""
        return number

    def adding(self, last: bool) -> AbstractContextManager:
        """Around each small batch of a step: gradients of all processes are added up, at the latest around the last."""
        return nullcontext()

    def clip(self, parameters: list[nn.Parameter], most: float) -> float:
        """Shorten the gradient to at most this length, and give the length that it had."""
        return nn.utils.clip_grad_norm_(parameters, most).item()

    def leave(self) -> None:
        """Say goodbye to the others."""


ALONE = Alone()


# %% [markdown]
# Now the group itself. Each small batch adds its gradients to those before it, weighed by its share of the tokens.


# %%
# | export
def add_gradients(
    loss: Callable[..., torch.Tensor],
    group: Sequence,
    counts: Sequence[int],
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ranks: Alone = ALONE,
) -> float:
    """Add to each `.grad` what one large batch would, from the small ones it was cut into.

    Parameters
    ----------
    loss : callable
        Takes a small batch, gives the mean loss over its tokens.
    group : sequence
        The small batches.
    counts : sequence of int
        How many tokens each mean is over. All must be known before the first gradient: a token weighs one over
        the tokens of the whole group.
    scale : callable
        What is done to a loss before its gradient is taken.
    ranks : Alone
        Who else has a part of the group.

    Returns
    -------
    float
        The mean over all tokens of the group; of several processes each has a part of it, and the sum is the mean.

    Raises
    ------
    FloatingPointError
        At the first small batch whose loss is not a finite number; it names none of them.
    """
    (total,), mean = ranks.sum(sum(counts)), 0.0
    for place, (small, count) in enumerate(zip(group, counts, strict=True), start=1):
        share = count / total if count else 0.0
        with ranks.adding(last=place == len(group)):
            value = loss(small)
            mean += value.item() * share
            if not math.isfinite(mean):
                raise FloatingPointError(str(value.item()))
            # many processes take the mean of their gradients, where the sum is wanted: hence the size
            scale(value * (share * ranks.size)).backward()  # frees the activations before the next small batch comes
    return mean


# %% [markdown]
# The proof, on a tiny PaliGemma with four picture tokens. Eight captions of different lengths: as one batch, in three
# uneven pieces, and in three pieces with the mistake.

# %%
tiny = PaliGemmaConfig(
    SiglipConfig(32, 64, 2, 2, image_size=28, patch_size=14),  # width, MLP, blocks, heads
    GemmaConfig(32, 64, 2, 2, 1, 16, 1856),  # width, MLP, blocks, heads, key/value heads, head width, vocabulary
    image_token_id=1850,
)
pocket = load(device="cpu", dtype="float32")
processor = Processor(pocket.processor.tokenizer, 28, 4)


def tiny_model(seed: int = 1) -> PaliGemma:
    torch.manual_seed(seed)
    model = PaliGemma(tiny)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.processor = processor
    return model


def captions(seeds) -> list[Example]:
    scenes = [make_scene(seed) for seed in seeds]
    return [Example(draw_scene(scene), "caption en", caption(scene)) for scene in scenes]


def gradient_of(model: nn.Module) -> torch.Tensor:
    """All gradients as one arrow; they are taken off the model."""
    arrow = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return arrow


model = tiny_model()
loss = partial(answer_loss, model)
examples = sorted(captions(range(8)), key=lambda example: len(example.suffix))
pieces = [collate(processor, part) for part in (examples[:1], examples[1:5], examples[5:])]
tokens = [answer_tokens(piece) for piece in pieces]

loss(collate(processor, examples)).backward()
whole = gradient_of(model)
add_gradients(loss, pieces, tokens)
right = gradient_of(model)
add_gradients(loss, pieces, [1, 1, 1])  # as if all weighed the same
wrong = gradient_of(model)


def apart(arrow: torch.Tensor) -> float:
    return ((arrow - whole).norm() / whole.norm()).item()


assert apart(right) < 1e-5 and apart(wrong) > 0.1
print(f"{tokens} tokens; by tokens {apart(right):.1e} away from the whole, the mean of means {apart(wrong):.0%}")

# %% [markdown]
# In 32 bits the order of a sum shows in the seventh digit. `tests/test_training.py` does it in 64 bits, with any cuts,
# and finds the same gradient to 1e-10; and the gradient of `transformers` for the same examples, to the same bound.
#
# ## The loop
#
# One step, written out:

# %%
batch = collate(processor, examples)
written = tiny_model()
optimizer = torch.optim.AdamW(written.parameters(), lr=1e-2)
answer_loss(written, batch).backward()
nn.utils.clip_grad_norm_(written.parameters(), 1.0)
optimizer.step()

# %% [markdown]
# The loop is a straight line of such steps: rate, batches, loss, gradients, clip, step, log. The loss is a function that one
# hands in, so the same loop teaches eyes and speech in chapter 17.
#
# First, what a run must remember beside its weights.


# %%
# | export
@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside weights and optimizers.

    Parameters
    ----------
    rows : list
        A row a step, as in the log: step, loss, gradient norm, share of the peak rate, tokens read, seconds.
    data : dict, optional
        The place in the data, as chapter 15b gives it.
    notes : list of dict
        What was found at intervals.
    scale : dict, optional
        The state of the scaler, in float16.
    """

    rows: list[list[float]] = field(default_factory=list)
    data: dict | None = None
    notes: list[dict] = field(default_factory=list)
    scale: dict | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.rows)

    @property
    def losses(self) -> list[float]:
        return [row[1] for row in self.rows]


# %% [markdown]
# Then the small things around the loop: the log, a CSV file with a line a step; what is said when a loss is not a number;
# and Ctrl-C, which should not tear a step apart.


# %%
# | export
LOG_COLUMNS = ("step", "loss", "gradient_norm", "rate", "tokens", "seconds")


def remark(text: str) -> None:
    """Say something on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def _log(path: Path | None, rows: list[list[float]]) -> Iterator[Callable[[list], None]]:
    """A function that adds a line to a CSV file, which first becomes a head and `rows`; or to nowhere."""
    if path is None:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_beside(path) as fresh, fresh.open("w", newline="") as file:
        csv.writer(file).writerows([LOG_COLUMNS, *map(_as_text, rows)])
    # lines behind the checkpoint are gone, and none is there twice
    with path.open("ab", buffering=0) as file:

        def write(row: list[float]) -> None:
            try:
                file.write((",".join(_as_text(row)) + "\r\n").encode())
            except OSError as error:
                raise RuntimeError(
                    f"{path} cannot be written ({error.strerror}): make room, then give the same command again"
                ) from error

        yield write


def _as_text(row: list[float]) -> list[str]:
    step, loss, norm, rate, tokens, seconds = row
    return [f"{step:.0f}", repr(loss), repr(norm), f"{rate:.6g}", f"{tokens:.0f}", f"{seconds:.2f}"]


def _speed(rows: list[list[float]]) -> str:
    """The mean loss of some rows, and how many tokens a second they read."""
    text = f"loss {sum(row[1] for row in rows) / len(rows):.3f}"
    seconds, tokens = rows[-1][5] - rows[0][5], sum(row[4] for row in rows[1:])
    return f"{text}, {tokens / seconds:,.0f} tokens/s" if tokens and seconds else text


def _tokens_read(batch) -> int:
    if not getattr(batch, "where", True):
        return 0  # it only keeps a rank without rows in step with the others
    ordinary = getattr(batch, "batch", batch)
    return int(ordinary.attention_mask.sum()) if isinstance(ordinary, Batch) else 0


def _not_finite(what: str, step: int, small: list, autocast: torch.dtype | None) -> str:
    places = [str(place) for batch in small for place in getattr(batch, "where", ())]
    text = f"{what} at step {step}: nothing was changed by this step"
    if places:
        text += f"; its examples: {', '.join(places[:16])}" + (f" and {len(places) - 16} more" if places[16:] else "")
    cure = "take bfloat16 or float32" if autocast == torch.float16 else "look at these examples, or lower the rate"
    return f"{text}; {cure}"


@contextmanager
def _asked_to_stop(listen: bool) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    asked = threading.Event()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    usual, here = signal.getsignal(signal.SIGINT), os.getpid()

    def hear(number, frame) -> None:
        if os.getpid() == here:  # processes that read ahead hear it too, and go on
            asked.set()
            signal.signal(signal.SIGINT, usual)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, hear)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


# %% [markdown]
# Now the loop itself. A loss that is not a number stops it before it changes anything. Three words in it are explained
# further down: `autocast`, `scaler`, and `checkpoints`.


# %%
# | export
def train(
    modules: nn.Module,
    loss: Callable[..., torch.Tensor],
    batches: Iterable,
    optimizers: list[torch.optim.Optimizer],
    *,
    steps: int,
    warmup: int = 100,
    hold: float = 0.0,
    schedule: str = "linear",
    clip: float = 1.0,
    accumulate: int = 1,
    count: Callable[..., int] = lambda batch: 1,
    autocast: torch.dtype | None = None,
    log: Path | None = None,
    label: str = "train",
    report_every: int = 500,
    report: Callable[[int], str] | None = None,
    each: Callable[[list[float]], None] | None = None,
    progress: Progress | None = None,
    checkpoints: "Checkpoints | None" = None,
    ranks: Alone = ALONE,
) -> list[float]:
    """Take steps: loss, gradients, clipping, update.

    Parameters
    ----------
    modules : torch.nn.Module
        All that may learn; parameters with `requires_grad` off stay as they are.
    loss : callable
        Takes a batch, gives a scalar tensor, a mean over some tokens.
    batches : iterable
        At least `steps` times `accumulate` batches; the last group may be short. A `TrainingBatch` of chapter 15b
        also says where its examples come from and how to go on behind it.
    optimizers : list
        Their learning rates are the peaks; the schedule scales them all alike.
    steps, warmup, hold, schedule
        The length of the run and the shape of the schedule, as in `learning_rate_factor`.
    clip : float
        The gradient, all parameters taken as one vector, is scaled down to at most this length.
    accumulate : int
        Batches whose gradients make one step.
    count : callable
        How many tokens the loss of a batch is a mean over; without it all batches of a group weigh the same.
    autocast : torch.dtype, optional
        bfloat16 or float16: products are computed in it, from weights that stay what they are. float16 brings
        a scaled loss.
    log : Path, optional
        A CSV file that grows by a line a step.
    report : callable, optional
        Called every `report_every` steps with the step; its text is shown beside the progress bar.
    each : callable, optional
        Called after each step with the new row of the log.
    progress : Progress, optional
        Where to go on; it grows with the run.
    checkpoints : Checkpoints, optional
        Where the run is saved. With it, Ctrl-C ends the step that runs, saves, and stops.
    ranks : Alone
        The processes that take each step together, each with its part of the batches. `log` and `each` are for one of
        them alone; all call `report` and `checkpoints`.

    Returns
    -------
    list of float
        The loss at each step, from the first of the run.

    Raises
    ------
    ValueError
        If the batches end too soon.
    RuntimeError
        If a loss or gradient is not a finite number, or a file cannot be written.
    KeyboardInterrupt
        After Ctrl-C; its text says how to go on.
    """
    progress = Progress() if progress is None else progress
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    device = parameters[0].device.type
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    scaler = torch.amp.GradScaler(device, enabled=autocast == torch.float16)
    if progress.scale:
        scaler.load_state_dict(progress.scale)
    stream: Iterator = iter(batches)
    started = time.perf_counter() - (progress.rows[-1][-1] if progress.rows else 0.0)

    def cast_loss(batch) -> torch.Tensor:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return loss(batch)

    with (
        _log(log, progress.rows) as write,
        tqdm(total=steps, initial=progress.step, desc=label, mininterval=2.0, disable=ranks.rank > 0) as bar,
        _asked_to_stop(checkpoints is not None) as asked,
    ):
        while progress.step < steps:
            step = progress.step
            factor = learning_rate_factor(step, steps, warmup, hold, schedule)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                optimizer.zero_grad()
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            small, counts = _next_group(stream, accumulate, count, ranks)
            if not small:
                raise ValueError(f"the batches ended after {step} of {steps} steps: give more examples or fewer steps")
            try:
                mean = add_gradients(cast_loss, small, counts, scaler.scale, ranks)
            except FloatingPointError as error:
                raise RuntimeError(_not_finite(f"the loss is {error}", step, small, autocast)) from error
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = ranks.clip(parameters, clip)
            if not math.isfinite(norm) and not scaler.is_enabled():  # a scaler skips such a step, and scales less
                raise RuntimeError(_not_finite(f"the gradient is {norm}", step, small, autocast))
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            seconds = time.perf_counter() - started
            mean, read, stop = ranks.sum(mean, sum(map(_tokens_read, small)), asked.is_set())
            progress.rows.append([step, mean, norm, factor, read, seconds])
            progress.data = getattr(small[-1], "state", None)
            progress.scale = scaler.state_dict() if scaler.is_enabled() else None
            write(progress.rows[-1])
            if each is not None:
                each(progress.rows[-1])
            bar.update()
            bar.set_postfix_str(_speed(progress.rows[-50:]), refresh=False)
            if report is not None and (step + 1) % report_every == 0:
                found = report(step + 1)
                if ranks.rank == 0:
                    remark(f"{label} {step + 1}: {found}")
            if checkpoints is not None and (stop or checkpoints.is_due(step + 1, steps)):
                checkpoints.save(progress)
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after step {step + 1} of {steps}, which is saved: give the same command again to go on"
                )
    return progress.losses


def _next_group(stream: Iterator, accumulate: int, count: Callable[..., int], ranks: Alone) -> tuple[list, list[int]]:
    """The batches of the next step, and their counts. One in which no process has a token is left out by all of them."""
    group, counts = [], []
    for batch in stream:
        counted = count(batch)
        if ranks.size == 1 or ranks.sum(counted)[0]:
            group.append(batch)
            counts.append(counted)
        if len(group) == accumulate:
            break
    return group, counts


# %% [markdown]
# ## Proof
#
# One step of the loop equals the one written out, bit by bit. The tests go on from there: ten steps of the pocket model in
# 64 bits, against AdamW over the loss of `transformers`, end with the same weights to 1e-8. (1e-10 is reached.)

# %%
looped = tiny_model()
optimizers = [torch.optim.AdamW(looped.parameters(), lr=1e-2)]
train(looped, partial(answer_loss, looped), [batch], optimizers, steps=1, warmup=1, label="one step")
assert all(torch.equal(a, b) for a, b in zip(looped.parameters(), written.parameters()))

# %% [markdown]
# ## The settings of a run
#
# Everything that decides the numbers of a run stands in one place. Parts can be frozen, or learn at a rate of their own: a
# projector alone is a thousandth of PaliGemma, and often a good first try.


# %%
# | export
PARTS = {  # how the names of their parameters begin
    "vision": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "decoder": ("language_model.", "lm_head."),
}
METHODS = ("full", "lora", "qlora")  # the last two are built in chapters 18 and 19


@dataclass(frozen=True)
class TrainingConfig:
    """What decides the numbers of a run: the same values on the same data give the same model.

    Parameters
    ----------
    method : str
        full, lora or qlora.
    max_steps, epochs : int, optional
        The run ends at whichever comes first; one epoch if neither is given.
    batch_size, accumulate : int
        Examples in a batch, and batches in a step.
    learning_rate : float, optional
        The peak, for all parts that have none of their own. By default 1e-5, PaliGemma's for VQAv2 at 224 pixels;
        with lora and qlora 2e-4 (Dettmers et al. 2023, "QLoRA", appendix B).
    vision_rate, projector_rate, decoder_rate : float, optional
        The peak for one part.
    freeze : tuple of str
        Parts that do not learn: vision, projector, decoder.
    schedule : str
        linear or cosine, down to zero.
    warmup : float
        Below 1 a share of all steps, else a number of steps.
    weight_decay, clip : float
    optimizer : str
        adamw, or adamw8bit, which keeps its two means in 8 bits and needs bitsandbytes.
    dtype : str
        What products are computed in: float32, bfloat16 or float16; the weights that learn are float32 in any case.
        auto is bfloat16 on cuda, else float32.
    recompute : bool
        Keep no activations inside blocks, compute them again in the backward pass; qlora always does.
    rank, alpha, dropout
        Of the adapters that lora and qlora teach, as in `LoraConfig` of chapter 18.
    seed : int
        Of the order of the data, and of dropout.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    method: str = "full"
    max_steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    vision_rate: float | None = None
    projector_rate: float | None = None
    decoder_rate: float | None = None
    freeze: tuple[str, ...] = ()
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    dtype: str = "auto"
    recompute: bool = False
    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self):
        choices = {"method": METHODS, "schedule": ("linear", "cosine"), "optimizer": ("adamw", "adamw8bit")}
        choices["dtype"] = ("auto", "float32", "bfloat16", "float16")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected {', '.join(allowed)}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-5 if self.method == "full" else 2e-4)
        for name in ("max_steps", "epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}: expected a whole number, 1 or more")
        for name in (
            "learning_rate",
            "vision_rate",
            "projector_rate",
            "decoder_rate",
            "warmup",
            "weight_decay",
            "clip",
        ):
            value = getattr(self, name)
            least = 0 if name in ("warmup", "weight_decay") else math.ulp(0)  # the smallest number above 0
            if value is None:
                continue
            if not is_finite(value) or value < least:
                raise ValueError(
                    f"{name} is {value!r}: expected a number {'of 0 or more' if least == 0 else 'above 0'}"
                )
            object.__setattr__(self, name, float(value))  # JSON knows no numbers of numpy
        if isinstance(self.freeze, str):
            raise ValueError(f"freeze is {self.freeze!r}: expected a tuple of parts, such as ('vision',)")
        if unknown := sorted(set(self.freeze) - set(PARTS)):
            raise ValueError(f"freeze names {unknown[0]!r}: expected parts among {', '.join(PARTS)}")
        if self.freeze and self.method != "full":
            raise ValueError(f"freeze goes with method full: {self.method} teaches adapters of the decoder alone")
        if set(self.freeze) == set(PARTS):
            raise ValueError("freeze names all three parts: nothing would learn, leave one out")
        for part in PARTS:
            learns = part not in self.freeze and (self.method == "full" or part == "decoder")
            if not learns and getattr(self, f"{part}_rate") is not None:
                raise ValueError(f"{part}_rate is given, but the part {part} does not learn: leave the rate out")
        for name in ("rank", "alpha", "dropout"):
            if self.method == "full" and getattr(self, name) != getattr(TrainingConfig, name):
                raise ValueError(f"{name} goes with the methods lora and qlora: leave it out, or choose one of them")

    def warmup_steps(self, steps: int) -> int:
        return round(self.warmup * steps if self.warmup < 1 else self.warmup)

    def rate(self, part: str) -> float:
        own = getattr(self, f"{part}_rate")
        return self.learning_rate if own is None else own


def adamw_by_part(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """One AdamW over all that may learn, a group for each part with its own peak rate.

    Raises
    ------
    RuntimeError
        If adamw8bit is asked for and bitsandbytes is not installed.
    """
    groups = []
    for part, beginnings in PARTS.items():
        learning = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(beginnings)]
        if learning:
            groups.append({"params": learning, "lr": config.rate(part)})
    settings = {"lr": config.learning_rate, "betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        one_kernel = groups[0]["params"][0].device.type in ("cpu", "cuda")  # where torch has the fused form
        return torch.optim.AdamW(groups, fused=one_kernel, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise RuntimeError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or take adamw") from error
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def freeze_parts(model: nn.Module, frozen: Sequence[str]) -> None:
    """Let all parameters learn but those of some parts."""
    beginnings = tuple(beginning for part in frozen for beginning in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(beginnings))


# %% [markdown]
# ## A look inside: a run of seconds
#
# The pocket model knows the shapes of its world. It was never asked how many corners they have. We ask, before and after
# forty steps in which its tower is frozen.
#
# What do we ask? Not what it learned from. A model with millions of numbers can learn its examples by heart: their loss goes
# on falling while answers to everything else get worse. That is *overfitting*, and the training loss cannot show it. So some
# examples are *held out*: never learned from, only asked. Where their loss turns and rises, the run should have stopped. That
# is why the best model so far, by held-out examples, is kept beside the last.
#
# Asking is a function of its own: the loss on examples that are held out, and how many greedy answers are exact.


# %%
# | export
@torch.no_grad()
def examine(
    model: PaliGemma,
    processor: Processor,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
    shown: int = 4,
) -> dict:
    """Ask a model what it does not learn from: the loss, greedy answers, and how many of them are exact.

    Parameters
    ----------
    examples : sequence of Example
        Where an example has several `answers`, any of them is right.
    autocast : torch.dtype, optional
        As in `train`.
    shown : int
        So many answers are given back.

    Returns
    -------
    dict
        `asked`, `loss` (nats, mean over answer tokens), `exact` (share, spaces around answers aside), and
        `answers`: the first few as {"prefix", "suffix", "answer"}.
    """
    was_training = model.training
    model.eval()
    device, decode = model.device, processor.tokenizer.decode
    total = tokens = right = 0
    answers = []
    for start in range(0, len(examples), batch_size):
        part = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        taught = collate(processor, part).to(device)
        asked = processor.prepare([load_image(one.image) for one in part], [one.prefix for one in part]).to(device)
        longest = int((taught.labels != -100).sum(1).max())
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            count = answer_tokens(taught)
            total, tokens = total + answer_loss(model, taught).item() * count, tokens + count
            said = generate_answers(
                model, asked, decode, max_new_tokens=longest + 8, sampling=Sampling(seed=0),
                stop_ids=getattr(model, "stop_ids", None),
            )  # fmt: skip
        for one, answer in zip(part, said, strict=True):
            right += answer.text.strip() in {truth.strip() for truth in (one.answers or (one.suffix,))}
            if len(answers) < shown:
                answers.append({"prefix": one.prefix, "suffix": one.suffix, "answer": answer.text})
    model.train(was_training)
    return {"asked": len(examples), "loss": total / tokens, "exact": right / len(examples), "answers": answers}


# %%
CORNERS = {"circle": 0, "ring": 0, "heart": 2, "triangle": 3, "square": 4, "diamond": 4, "star": 10, "cross": 12}


def corners(seeds) -> list[Example]:
    scenes = [make_scene(seed, max_things=1) for seed in seeds]
    return [Example(draw_scene(scene), "corners", str(CORNERS[scene.things[0].shape])) for scene in scenes]


config = TrainingConfig(learning_rate=1e-3, freeze=("vision",))
model = copy.deepcopy(pocket)
freeze_parts(model, config.freeze)
unseen = corners(range(10_000, 10_040))
before = examine(model, model.processor, unseen)
log = Path(tempfile.mkdtemp()) / "run.csv"
losses = train(
    model,
    lambda one: answer_loss(model, one.batch),
    Batches(corners(range(320)), model.processor, 8, seed=0),
    [adamw_by_part(model, config)],
    steps=40,
    warmup=5,
    log=log,
    label="corners",
)
after = examine(model, model.processor, unseen)
for name, found in (("before", before), ("after", after)):
    said = ", ".join(f"{answer['answer']!r} for {answer['suffix']}" for answer in found["answers"])
    print(f"{name}: {found['exact']:.0%} exact; {said}")
assert after["exact"] > 0.8 > 0.3 > before["exact"]

# %% [markdown]
# Before, it says what it sees. After, it says the number that belongs to the shape: it has learned a table, not to count.

# %%
with log.open() as file:
    lines = list(csv.DictReader(file))
assert [float(line["loss"]) for line in lines] == losses  # the log has every digit
figure, axis = plt.subplots(figsize=(5.6, 2.4))
axis.plot([float(line["loss"]) for line in lines], color=ANSWER)
axis.set(xlabel="step", ylabel="loss, in nats", ylim=(0, None))
save(figure, "16_run")
lines[0]

# %% [markdown]
# *Figure: the loss of the run over forty steps, read back from its log. In the first five steps, while the rate still rises,
# it jumps up and down; then it falls fast, and then slowly.*
#
# ## Stopped, and gone on
#
# A run of days will be stopped: the power fails, the time is up, someone kills it. What must be kept so that it goes on as
# if nothing had happened? Here is a small model with *dropout*, which while learning sets a randomly chosen half of the
# numbers that pass through to zero, and doubles the rest. We stop it after 20 of 40 steps, and go on three times: from its
# weights, from weights and AdamW's means, and from both and the state of the random numbers.


# %%
class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return (F.dropout(self.layer(numbers), 0.5) - numbers).square().mean()


torch.manual_seed(3)
numbers = list(torch.randn(40, 16, 8))


def new_run() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(4)
    model = Dropped()
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def steps(model, optimizer, some) -> list[float]:
    found = []
    for one in some:
        value = model(one)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


model, optimizer = new_run()
first = steps(model, optimizer, numbers[:20])
kept = (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state())
expected = steps(model, optimizer, numbers[20:])


def gone_on(what: int) -> list[float]:
    """The second half, from weights (1), and the optimizer's means (2), and the random numbers (3)."""
    model, optimizer = new_run()
    model.load_state_dict(kept[0])
    if what >= 2:
        optimizer.load_state_dict(copy.deepcopy(kept[1]))
    if what >= 3:
        torch.set_rng_state(kept[2])
    return steps(model, optimizer, numbers[20:])


ways = {"weights": gone_on(1), "and AdamW's means": gone_on(2), "and random numbers": gone_on(3)}
assert ways["and random numbers"] == expected  # every bit
assert ways["weights"] != expected and ways["and AdamW's means"] != expected

figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.3), sharey=True)
for axis, (name, losses), colour in zip(axes, ways.items(), (PROMPT, PICTURE, ANSWER)):
    axis.plot(first + expected, color=GREY, lw=3, alpha=0.5)
    axis.plot(range(20, 40), losses, color=colour)
    axis.axvline(20, color="0.7", ls=":")
    axis.set(title=name, xlabel="step")
axes[0].set_ylabel("loss")
save(figure, "16_resume")
plt.show()

# %% [markdown]
# *Figure: three times the same loss in grey, stopped at step 20 (dotted), and gone on in colour. From weights alone it leaves
# the grey line; with AdamW's means too it still does; with the random numbers as well it lies on it.*
#
# One thing more: the place in the data. Chapter 15b gives it with each batch, and goes on from it.
#
# ## A folder that is whole or absent
#
# All that goes into a *checkpoint*. The kill may come while it is written. So it is written under another name beside its
# place, forced onto the disk, and only then renamed (`folder_beside` of chapter 11). A list of sizes and checksums tells
# later whether a disk has lost something. And nothing in it is a pickle: numbers are safetensors (chapter 12), the rest
# is JSON.


# %%
# | export
class Checkpoints:
    """The last few states of a run, each a folder that appears whole or not at all.

    `step-000123/` holds `weights.safetensors` (of the parameters that are trained), `optimizer.safetensors`,
    `state.json`, and `manifest.json` with size and checksum of the others.

    Parameters
    ----------
    folder : Path
        Made if need be.
    modules : torch.nn.Module
    optimizers : list
    every : int
        Save after so many steps, and after the last one.
    keep : int
        So many stay.
    """

    def __init__(self, folder: Path, modules: nn.Module, optimizers: list, *, every: int, keep: int = 3):
        self.folder, self.every, self.keep = folder, every, keep
        self.learning = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        self.optimizers = optimizers

    def is_due(self, step: int, steps: int) -> bool:
        return step % self.every == 0 or step == steps

    def save(self, progress: Progress) -> None:
        """Write a checkpoint and remove the oldest.

        Raises
        ------
        RuntimeError
            If it cannot be written; the ones before it stand.
        """
        tensors, state = _pack_optimizers(self.optimizers)
        tensors |= {"random.torch": torch.get_rng_state(), "rows": torch.tensor(progress.rows, dtype=torch.float64)}
        for index in range(torch.cuda.device_count()):
            tensors[f"random.cuda.{index}"] = torch.cuda.get_rng_state(index)
        if torch.backends.mps.is_available():
            tensors["random.mps"] = torch.mps.get_rng_state()
        kept = {"data": progress.data, "notes": progress.notes, "scale": progress.scale}
        state |= kept | {"step": progress.step, "random": random.getstate()}
        weights = {name: parameter.detach().contiguous() for name, parameter in self.learning.items()}
        try:
            with folder_beside(self.folder / f"step-{progress.step:06d}") as fresh:
                save_file(weights, fresh / "weights.safetensors")
                save_file(tensors, fresh / "optimizer.safetensors")
                (fresh / "state.json").write_text(json.dumps(state))
                manifest = {path.name: [path.stat().st_size, file_checksum(path)] for path in sorted(fresh.iterdir())}
                (fresh / "manifest.json").write_text(json.dumps(manifest))
        except (RuntimeError, SafetensorError, OSError) as error:
            raise self._unwritten(progress, error) from error
        for old in self._found()[self.keep :]:
            shutil.rmtree(old)

    def restore(self) -> Progress:
        """Load the newest checkpoint that is whole into weights, optimizers and random numbers.

        Returns
        -------
        Progress
            An empty one if there is no checkpoint.

        Raises
        ------
        ValueError
            If all checkpoints are damaged, or the newest is of other weights.
        RuntimeError
            If one cannot be read now, which says nothing about its bytes: it stays where it is.
        """
        for rest in self.folder.glob(".step-*"):  # of a save that was killed
            shutil.rmtree(rest)
        found = self._found()
        for path in found:
            try:
                state, weights, tensors = _read_checkpoint(path)
            except OSError as error:
                raise self._unreadable(path, error) from error
            except ValueError as error:
                aside = self._set_aside(path)
                remark(f"{path} is damaged ({error}): set aside as {aside.name}, the one before it is used")
                continue
            self._load(path, weights, tensors, state)
            return Progress(tensors["rows"].tolist(), state["data"], state["notes"], state["scale"])
        return self._nothing_whole(found)

    def _found(self) -> list[Path]:
        """Newest first; a copy that somebody put beside them is none of ours."""
        ours = (path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
        return sorted(ours, key=lambda path: int(path.name[5:]), reverse=True)

    def _unwritten(self, progress: Progress, what: object) -> RuntimeError:
        return RuntimeError(
            f"the checkpoint of step {progress.step} cannot be written ({what}); those before it stand: "
            "make room, then give the same command again"
        )

    def _unreadable(self, path: Path, what: object) -> RuntimeError:
        return RuntimeError(f"{path} cannot be read now ({what}): nothing was changed, check disk and permissions")

    def _set_aside(self, path: Path) -> Path:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        return aside

    def _nothing_whole(self, found: list[Path]) -> Progress:
        """A run that begins; but not where there were checkpoints, and all are damaged."""
        if found or any(self.folder.glob("damaged-*")):
            raise ValueError(
                f"no checkpoint in {self.folder} is whole: rename damaged-step-N back to step-N if the disk was at fault, "
                "or remove the folder to begin anew"
            )
        return Progress()

    def _expect_same(self, path: Path, shapes: dict[str, Sequence[int]], stored: dict[str, Sequence[int]]) -> None:
        if shapes != stored:
            name = min(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
            there, here = stored.get(name, "absent"), shapes.get(name, "not trained")
            raise ValueError(f"{path} is of another configuration: {name} is {there} there and {here} here")

    def _load(self, path: Path, weights: dict, tensors: dict, state: dict) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in self.learning.items()}
        self._expect_same(path, shapes, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        with torch.no_grad():
            for name, parameter in self.learning.items():
                parameter.copy_(weights[name])
        _unpack_optimizers(self.optimizers, tensors, state)
        version, numbers, spare = state["random"]
        random.setstate((version, tuple(numbers), spare))
        torch.set_rng_state(tensors["random.torch"])
        for index in range(torch.cuda.device_count()):
            if f"random.cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)
        if torch.backends.mps.is_available() and "random.mps" in tensors:
            torch.mps.set_rng_state(tensors["random.mps"])


def _pack_optimizers(optimizers: list) -> tuple[dict, dict]:
    """What optimizers remember, as tensors by name and a table of plain numbers."""
    tensors, numbers, seen = {}, [], set()
    for place, optimizer in enumerate(optimizers):
        numbers.append({})
        for index, memory in optimizer.state_dict()["state"].items():
            wrapped = [value for value in memory.values() if isinstance(value, dict)]  # bitsandbytes does so
            for key, value in itertools.chain(memory.items(), *(inner.items() for inner in wrapped)):
                if isinstance(value, torch.Tensor):  # two that share memory cannot be written as they are
                    value = value.detach().contiguous()
                    tensors[f"{place}.{index}.{key}"] = value.clone() if value.data_ptr() in seen else value
                    seen.add(value.data_ptr())
                elif not isinstance(value, dict):
                    numbers[-1].setdefault(str(index), {})[key] = value
    return tensors, {"optimizers": numbers}


def _unpack_optimizers(optimizers: list, tensors: dict, state: dict) -> None:
    for place, (optimizer, numbers) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
        memory = {int(index): dict(values) for index, values in numbers.items()}
        for name, tensor in tensors.items():
            if name.startswith(f"{place}."):
                _, index, key = name.split(".", 2)
                memory.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": memory, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_checkpoint(path: Path) -> tuple[dict, dict, dict]:
    """State, weights and the other tensors of a checkpoint; a ValueError says what is wrong with its bytes."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
            size, checksum = manifest[name]
            if (path / name).stat().st_size != size or file_checksum(path / name) != checksum:
                raise ValueError(f"{name} is not as it was written")
        state = json.loads((path / "state.json").read_text())
        return state, load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{Path(error.filename or path).name} is missing") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def file_checksum(path: Path, most: int | None = None) -> int:
    """CRC-32 of a file, or of its first `most` bytes."""
    value, left = 0, path.stat().st_size if most is None else most
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 22))):
            value, left = zlib.crc32(piece, value), left - len(piece)
    return value


# %% [markdown]
# The proof: a run of twelve steps; the same run, whose process "dies" after step 7 (its batches end there, and everything in
# memory is thrown away); and then a disk that loses half of a file of the newest checkpoint.


# %%
def saved_run(folder: Path, until: int) -> tuple[nn.Module, Progress, int]:
    model, optimizer = new_run()
    checkpoints = Checkpoints(folder, model, [optimizer], every=1, keep=2)
    progress = checkpoints.restore()
    begun = progress.step
    given = numbers[begun:until]
    try:
        # the model stands twice: what `Dropped` gives is its loss
        train(model, model, given, [optimizer], steps=12, warmup=3, progress=progress, checkpoints=checkpoints)
    except ValueError as error:
        print(error)
    return model, progress, begun


here = Path(tempfile.mkdtemp())
whole, expected, _ = saved_run(here / "whole", until=12)
saved_run(here / "cut", until=7)
spoilt = here / "cut" / "step-000007" / "optimizer.safetensors"
os.truncate(spoilt, spoilt.stat().st_size // 2)
again, progress, begun = saved_run(here / "cut", until=12)
assert begun == 6
assert progress.losses == expected.losses
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))
sorted(path.name for path in (here / "cut").iterdir())

# %% [markdown]
# The damaged one was set aside, the one of step 6 was used, and the end is the same to the last bit. The tests do it with
# real kills of the real command, at random moments and in the middle of saves. A file that cannot be read for another reason,
# such as its permissions, is no proof of damage: then the run ends with a sentence and changes nothing.
#
# ## Half the bits
#
# A number in 32 bits has 24 binary digits. In 16 bits there are two ways to save: *bfloat16* keeps the range and drops digits
# (8 are left), *float16* keeps 11 digits and drops range. Products of matrices, where the time goes, are faster in 16
# bits on most hardware. Their results, which are kept for the gradients and are called *activations*, take half the memory.
#
# The weights must stay in 32 bits. A step changes a weight by a small part of it, and in 16 bits a small change is rounded
# away, in bfloat16 even a larger one:

# %%
for dtype, change in ((torch.bfloat16, 1e-3), (torch.float16, 1e-4)):
    assert torch.tensor(1.0, dtype=dtype) - change == 1.0  # nothing happened

# %% [markdown]
# So weights are kept in 32 bits, and copies in 16 bits are multiplied. PyTorch calls that `autocast`.
#
# With float16 the range is a second trap: what is smaller than $2^{-25}$ is rounded to zero, and many gradients are. Here are
# those of the pocket model for four captions.

# %%
batch = collate(pocket.processor, captions(range(4)))
pocket.requires_grad_(True).zero_grad()
answer_loss(pocket, batch).backward()
of_words = pocket.language_model.embed_tokens.weight.grad.abs()
sizes = gradient_of(pocket).abs()
sizes, of_words = sizes[sizes > 0], of_words[of_words > 0]
lost = (sizes.half() == 0).float().mean().item()
lost_when_scaled = ((sizes * 2.0**16).half() == 0).float().mean().item()
share_of_words = ((of_words.half() == 0).sum() / (sizes.half() == 0).sum()).item()
assert lost > 20 * lost_when_scaled and share_of_words > 0.9

figure, axis = plt.subplots(figsize=(6.2, 2.4))
heights = torch.histc(sizes.log2(), bins=50, min=-45, max=5)
axis.stairs(heights.tolist(), list(range(-45, 6)), fill=True, color=PICTURE)
for edge, name in ((-25, "float16"), (-41, "float16, loss times 65,536")):
    axis.axvline(edge, color=PROMPT)
    axis.annotate(name, (edge, axis.get_ylim()[1] * 0.9), xytext=(3, 0), textcoords="offset points", fontsize=8)
axis.set(xlabel="size of a gradient, power of two", ylabel="how many", yticks=[])
save(figure, "16_small")
print(f"lost in float16: {lost:.1%}; with the loss times 65,536: {lost_when_scaled:.2%}")
print(f"{share_of_words:.0%} of the lost ones belong to rows of the embedding")

# %% [markdown]
# *Figure: gradients by size, in two hills. A line at $2^{-25}$, where float16 rounds to zero, has the whole smaller hill on its
# left. A second line, sixteen powers further left, has next to nothing.*
#
# The smaller hill is nearly all embedding. It is the output layer too, and there the gradient of a word's row goes with the
# probability that the model gave the word: next to nothing for words that nobody would expect in these answers. In another
# model, or late in a run, the large hill moves left too.
#
# The cure is a multiplication. Multiply the loss by 65,536, and all gradients are multiplied by it; divide them, in 32
# bits, before the step. If one overflows, the step is left out and the factor halved; after 2,000 good steps it is doubled.
# That is the `scaler` of the loop. For bfloat16 it does nothing: the range is that of 32 bits.

# %%
small = torch.tensor(2e-8)
assert small.half() == 0.0
assert abs((small * 65536).half().float() / 65536 / small - 1) < 1e-3


# %% [markdown]
# Now the loop with each of the three. A *hook* is a function that PyTorch calls after a module has run; this one notes in
# which numbers the products came out.


# %%
def first_and_last(dtype: torch.dtype | None) -> tuple[float, float, set]:
    model, seen = tiny_model(), set()
    model.language_model.layers[0].mlp.up_proj.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=4e-3)]
    batch = collate(processor, captions(range(4)))
    losses = train(
        model,
        partial(answer_loss, model),
        [batch] * 12,
        optimizers,
        steps=12,
        warmup=1,
        autocast=dtype,
        label=str(dtype),
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return losses[0], losses[-1], seen


runs = {dtype: first_and_last(dtype) for dtype in (None, torch.bfloat16, torch.float16)}
for dtype, (start, end, seen) in runs.items():
    assert seen == {dtype or torch.float32} and end < start
    print(f"products in {dtype or torch.float32}: loss {start:.3f} -> {end:.3f}")

# %% [markdown]
# Gemma's activations can leave the range of float16 (65,504 is its end) in large models. Then the loss is not a number, and the
# loop stops and says so. bfloat16 is the safe choice where the hardware has it.
#
# ## Remember less, compute again
#
# To compute a loss, from the first block to the last, is the *forward pass*. To find its gradients, from the last block back to
# the first, is the *backward pass*; the part of PyTorch that does it is called *autograd*. The backward pass needs what the
# forward pass computed, the activations. They are kept for all blocks at once. One can
# keep only what goes into each block, and compute the inside again when its turn comes. It costs one more forward pass.
# (It is called activation checkpointing, and has nothing to do with the checkpoints above.)


# %%
# | export
def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Let each block keep only its input, and run again when its gradient is asked for.

    References
    ----------
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks_of(model: PaliGemma) -> list[nn.Module]:
    """The blocks of tower and decoder, from first to last."""
    return [*model.vision_tower.encoder.layers, *model.language_model.layers]


# %% [markdown]
# To see what it saves we count what autograd keeps; the first function below does that. With it the *bill* of a step can be
# written before the step is taken: the model is built of *fake tensors*, which have shapes and no numbers, so even a large one
# runs through in seconds.


# %%
# | export
def saved_bytes(run: Callable[[], torch.Tensor], besides: Iterable[torch.Tensor] = ()) -> tuple[torch.Tensor, int]:
    """Run something and count what autograd keeps for the backward pass.

    Parameters
    ----------
    run : callable
    besides : iterable of torch.Tensor
        Not counted: weights are there anyway.

    Returns
    -------
    torch.Tensor, int
        What `run` gave, and bytes; memory that several tensors share counts once.
    """
    known = {tensor.untyped_storage()._cdata for tensor in besides}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


CGROUP = Path("/sys/fs/cgroup")  # where Linux tells the limits of a container


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left, or None where nobody says; of a container with a limit, at most up to that."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    line = next(line for line in table.read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(line.split()[1]) * 1024
    limit = CGROUP / "memory.max"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return free
    table = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    # pages of files that nobody has used of late are held only as long as nobody else wants the room
    held = int((CGROUP / "memory.current").read_text()) - int(table["inactive_file"])
    return min(free, max(0, int(most) - held))


@dataclass(frozen=True)
class Bill:
    """What a step costs: numbers that learn and that do not, bytes by part, and operations."""

    learning: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    operations: int

    @property
    def bytes(self) -> int:
        """At the worst moment: all gradients are there and a small batch is on its way."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def lines(self) -> list[str]:
        """The bill as a table, a part a line."""
        parts = ("weights", "gradients", "optimizer", "activations", "bytes")
        sizes = [f"{'together' if part == 'bytes' else part:12} {getattr(self, part) / 1e6:,.1f} MB" for part in parts]
        learning = f"{'learning':12} {self.learning:,} of {self.learning + self.frozen:,} parameters"
        return [learning, *sizes, f"{'operations':12} {self.operations / 1e9:,.1f} billion a step"]


def training_bill(
    sizes: PaliGemmaConfig,
    config: TrainingConfig,
    batch: Batch,
    prepare: Callable[[PaliGemma], None],
    device: torch.device | str = "cpu",
) -> Bill:
    """The bill of a step, without taking it: shapes run through the model, numbers do not.

    Parameters
    ----------
    sizes : PaliGemmaConfig
        Of the model.
    config : TrainingConfig
        With a real dtype, not auto.
    batch : Batch
        A typical small batch; only its shapes and the number of its answer tokens matter.
    prepare : callable
        Makes the model ready to learn: freezes parts, or swaps modules.
    """
    answers = answer_tokens(batch)
    with FakeTensorMode(), torch.device(device):
        model = PaliGemma(sizes)
        prepare(model)
        tensors = [*model.parameters(), *model.buffers()]
        shaped = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in vars(batch).items()}
        forward = partial(_loss_of_shapes, model, Batch(**shaped), answers, AUTOCAST[config.dtype])
        largest = _largest_block(model, forward, tensors) if config.recompute else 0
        if config.recompute:
            recompute_activations(blocks_of(model))
        with FlopCounterMode(display=False) as counter:
            loss, activations = saved_bytes(forward, tensors)
            loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    return Bill(
        learning=sum(p.numel() for p in learning),
        frozen=sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in learning),
        weights=sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        gradients=sum(p.nbytes for p in learning),
        optimizer=sum(_adamw_bytes(p, config.optimizer) for p in learning),
        activations=activations + largest,
        operations=counter.get_total_flops() * config.accumulate,
    )


def _loss_of_shapes(model: PaliGemma, batch: Batch, answers: int, autocast: torch.dtype | None) -> torch.Tensor:
    """As `PaliGemma.loss`, but the places that are asked are the first ones: labels have no values to choose by."""
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        features = model.encode_images(batch.pixel_values)
        hidden_states = model.hidden_states(batch.input_ids, features, batch.attention_mask, batch.token_type_ids)
        asked = hidden_states[:, :-1].flatten(0, 1)[:answers]  # (M, D)
        targets = torch.zeros(len(asked), dtype=torch.long, device=asked.device)
        return F.cross_entropy(model.logits(asked).float(), targets)


def _largest_block(model: PaliGemma, forward: Callable[[], torch.Tensor], besides: list[torch.Tensor]) -> int:
    """Bytes that the costliest block keeps: with recomputing, one block at a time is whole again."""
    kept = []

    def measure(whole: Callable, *arguments) -> torch.Tensor:
        result, size = saved_bytes(partial(whole, *arguments), besides)
        kept.append(size)
        return result

    for block in blocks_of(model):
        block.forward = partial(measure, block.forward)
    forward()
    for block in blocks_of(model):
        del block.forward  # the class has its own again
    return max(kept)


def _adamw_bytes(parameter: torch.Tensor, optimizer: str) -> int:
    """Two means for each number: 4 bytes each, or 1 and a scale for each 256, which small tensors are spared."""
    if optimizer == "adamw" or parameter.numel() < 4096:
        return 8 * parameter.numel()
    return 2 * parameter.numel() + 2 * 4 * math.ceil(parameter.numel() / 256)


AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # None: no autocast is needed


# %% [markdown]
# The gradients must not change by a single bit. And the real model keeps what the fake one said.

# %%
batch = collate(pocket.processor, captions(range(8)))
config = TrainingConfig(dtype="float32", accumulate=2)
kept, arrows = {}, {}
for name, recompute in (("all kept", False), ("recomputed", True)):
    model = copy.deepcopy(pocket)
    if recompute:
        recompute_activations(blocks_of(model))
    value, kept[name] = saved_bytes(partial(answer_loss, model, batch), model.parameters())
    value.backward()
    arrows[name] = gradient_of(model)
assert torch.equal(arrows["all kept"], arrows["recomputed"])
assert kept["recomputed"] < kept["all kept"] / 8
bills = {
    "all kept": training_bill(pocket.config, config, batch, lambda model: None),
    "recomputed": training_bill(pocket.config, replace(config, recompute=True), batch, lambda model: None),
}
assert abs(bills["all kept"].activations / kept["all kept"] - 1) < 0.02
more = bills["recomputed"].operations / bills["all kept"].operations
assert bills["all kept"].activations > bills["all kept"].bytes / 2
assert bills["recomputed"].activations < bills["all kept"].activations / 3
assert 1.2 < more < 1.34  # a backward pass is two forward passes: at most a third more
print(f"operations: {more:.2f} times as many")
{name: f"{size / 1e6:.1f} MB" for name, size in kept.items()}

# %%
figure, axis = plt.subplots(figsize=(6.4, 1.9))
colour_of = {"weights": PICTURE, "gradients": PROMPT, "optimizer": ANSWER, "activations": "0.75"}
for place, bill in enumerate(bills.values()):
    left = 0.0
    for part, colour in colour_of.items():
        size = getattr(bill, part) / 1e6
        axis.barh(place, size, left=left, color=colour)
        if size > 9:
            ink = "white" if part in ("weights", "optimizer") else "black"
            axis.text(left + size / 2, place, f"{part}\n{size:.0f} MB", ha="center", va="center", fontsize=7, color=ink)
        left += size
axis.set_yticks(range(2), list(bills))
axis.invert_yaxis()
axis.xaxis.set_visible(False)
axis.spines[["bottom", "left"]].set_visible(False)
save(figure, "16_memory")
plt.show()

# %% [markdown]
# *Figure: two bars of memory for the pocket model and eight captions. Weights, gradients and AdamW's two means are the same in
# both. Activations are more than half of the upper bar; in the lower one they have less than a third of that length.*
#
# With recomputing, the bill counts what goes into the blocks, and one block whole.
#
# ## The bill against a measured run
#
# Is that what a process really takes? We start one, let it take two steps of two small batches, and ask the system for
# the most memory it ever held; then the same with recomputing. (The system's allocator is told to give freed memory back
# at once; else it keeps some for later, and one measures its habits.)

# %%
PROGRAM = """
import gc, torch
from pathlib import Path
from sigma_book import load
from sigma_book.batches import collate
from sigma_book.data import Example
from sigma_book.training import TrainingConfig, adamw_by_part, answer_loss, answer_tokens, blocks_of
from sigma_book.training import recompute_activations, train
from sigma_book.world import caption, draw_scene, make_scene

torch.set_num_threads(1)

def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def steps(count, number, recompute):
    model = load(device="cpu", dtype="float32").requires_grad_(True)
    scenes = [make_scene(seed) for seed in range(count)]
    batch = collate(model.processor, [Example(draw_scene(scene), "caption en", caption(scene)) for scene in scenes])
    if recompute:
        recompute_activations(blocks_of(model))
    optimizers = [adamw_by_part(model, TrainingConfig())]
    batches = [batch] * 2 * number
    train(model, lambda batch: answer_loss(model, batch), batches, optimizers, steps=number, accumulate=2, count=answer_tokens)

steps(1, 1, True)  # code and buffers that every run needs
for recompute in (False, True):
    gc.collect()
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    steps(8, 2, recompute)
    print(held("VmHWM") - before)
"""
if sys.platform == "linux":
    frugal = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=frugal)
    for (name, bill), size in zip(bills.items(), map(int, done.stdout.split())):
        print(f"{name}: {size / 1e6:.0f} MB measured, {bill.bytes / 1e6:.0f} MB on the bill")
        assert abs(size / bill.bytes - 1) < 0.15

# %% [markdown]
# And the time? Only a step can tell: a dry run takes three steps in memory, times the last two, and throws them away. The run
# of the corners has such steps in its log. Do they foretell the mean of all? (It depends on what else the machine has to do,
# so there is no assertion here; a slow test holds the two together, in seconds of the processor instead of the clock.)

# %%
seconds = [float(line["seconds"]) for line in lines]
told, needed = (seconds[2] - seconds[0]) / 2, (seconds[-1] - seconds[0]) / (len(seconds) - 1)
print(f"a step: {told:.2f} s by the first three, {needed:.2f} s in the whole run")

# %% [markdown]
# ## The bill of the large one
#
# Weights, gradients and two means are sixteen bytes for each number that learns, in 32 bits. The bill below is that of
# PaliGemma 3B and a single example with thirty tokens of text.
#
# Its 45 blocks would take a while even as shapes. But each block costs what the block before it did. So three models of one
# block or two tell the whole: no estimate, the same whole numbers.

# %%
large = PaliGemmaConfig(
    SiglipConfig(1152, 4304, 27, 16, image_size=224, patch_size=14),
    GemmaConfig(2048, 16384, 18, 8, 1, 256, 257_216),
)
ids = torch.full((1, 256 + 30), large.image_token_id)
ids[:, 256:] = 5
labels = torch.where(torch.arange(286) >= 276, ids, -100)
one = Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.zeros(1, 3, 224, 224), labels)

settings = {
    "in 32 bits": TrainingConfig(dtype="float32"),
    "in 16 bits": TrainingConfig(dtype="bfloat16"),
    "in 16 bits, recomputed": TrainingConfig(dtype="bfloat16", recompute=True),
}


def bill_of_blocks(sizes: PaliGemmaConfig, config: TrainingConfig, batch: Batch) -> Bill:
    """As `training_bill`, from three models of one or two blocks: each further block costs what the second did."""
    tower, decoder = sizes.vision.num_hidden_layers, sizes.text.num_hidden_layers
    bills = []
    for in_tower, in_decoder in ((1, 1), (2, 1), (1, 2)):
        vision, text = (
            replace(part, num_hidden_layers=count)
            for part, count in ((sizes.vision, in_tower), (sizes.text, in_decoder))
        )
        bills.append(
            astuple(training_bill(replace(sizes, vision=vision, text=text), config, batch, lambda model: None))
        )
    return Bill(*(a + (tower - 1) * (b - a) + (decoder - 1) * (c - a) for a, b, c in zip(*bills)))


assert bill_of_blocks(pocket.config, config, batch) == bills["all kept"]
table = {name: bill_of_blocks(large, setting, one) for name, setting in settings.items()}
print(f"{'GB':28}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'together':>10}")
for name, bill in table.items():
    row = (bill.weights, bill.gradients, bill.optimizer, bill.activations, bill.bytes)
    print(f"{name:28}" + "".join(f"{size / 1e9:>{width}.1f}" for size, width in zip(row, (9, 11, 11, 13, 10))))
whole = table["in 16 bits"]
copies = 2 * 2_923_466_480  # bytes of all weights in 16 bits
assert whole.weights + whole.gradients + whole.optimizer == 8 * copies
assert whole.activations - copies < table["in 32 bits"].activations < whole.activations
assert table["in 16 bits, recomputed"].activations < 0.5 * whole.activations

# %% [markdown]
# 47 GB before a single activation: too much for most graphics cards. Chapters 18 and 19 do with far less.
#
# In the second line the activations are more than in the first, though many of them are half as long: the copies of the weights
# in 16 bits, 5.8 GB, are kept for the backward pass too, and counted here. With recomputing, one block's copies at a time are
# enough. With larger batches the copies stay the same and the activations grow, and 16 bits save memory.
#
# `adamw8bit` keeps the two means in 8 bits: two bytes and a little for each number in place of eight.

# %%
cheap = training_bill(pocket.config, replace(config, optimizer="adamw8bit"), batch, lambda model: None)
print(f"AdamW's means: {bills['all kept'].optimizer / 1e6:.1f} MB, in 8 bits {cheap.optimizer / 1e6:.1f} MB")
assert cheap.optimizer < 0.3 * bills["all kept"].optimizer

# %% [markdown]
# ## A run from a file
#
# What is left is to tie it all to a file of examples and a folder.
#
# A folder belongs to one run. If its settings differ from those asked for, someone has mistyped, and going on would mix two
# runs into one.


# %%
# | export
def claim_folder(
    out: Path,
    identity: dict,
    saved: Sequence[str] = ("checkpoints/*", "best", "final"),
    alone: bool = True,
    later: Collection[str] = (),
) -> None:
    """Make a folder the home of a run, or make sure that it is the home of this one already.

    Parameters
    ----------
    out : Path
        Gets `run.json`.
    identity : dict
        All that decides the numbers of the run, of plain values.
    saved : sequence of str
        Patterns of what a run leaves there. As long as there is nothing like it, a run with other values may take over.
    alone : bool
        Whether a folder without `run.json` must be empty (a `.lock` aside), or may hold all but what is `saved`.
    later : collection of str
        Keys that came with a later version: in a run that has none of them they count as the same.

    Raises
    ------
    ValueError
        If it is a file, or the folder holds another run, or something else; the sentence names what differs.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder that is empty or new")
    path, begun = out / "run.json", any(any(out.glob(pattern)) for pattern in saved)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is broken ({error}): give another folder, or remove this one") from error
        wanted = json.loads(json.dumps(identity))
        asked = [key for key in wanted if key in known or key not in later]
        differing = [key for key in asked if key not in known or known[key] != wanted[key]]
        if not differing:
            return
        if begun:
            key = differing[0]
            raise ValueError(
                f"{out} holds a run with {key} = {known.get(key)!r}, this one has {wanted[key]!r}: "
                "give the same to go on with it, or another folder for a new run"
            )
    elif begun or (alone and out.exists() and {entry.name for entry in out.iterdir()} - {".lock", ".run.json.part"}):
        raise ValueError(f"{out} holds something else and no run.json: give a folder that is empty or new")
    make_folder(out)
    with file_beside(path) as fresh:
        fresh.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


# %%
claim_folder(here / "run", {"seed": 0, "learning_rate": 1e-5})
(here / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
try:
    claim_folder(here / "run", {"seed": 0, "learning_rate": 1e-4})
except ValueError as error:
    print(error)

# %% [markdown]
# And a picture at the end.


# %%
# | export
def draw_losses(progress: Progress, path: Path) -> None:
    """Write a picture of the losses of a run: each step, and what was found at intervals.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # no window, no global state

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    losses = torch.tensor(progress.losses)
    axis.plot(range(1, len(losses) + 1), losses, color="0.75", lw=0.8)
    run = max(1, len(losses) // 50)
    means = losses[: len(losses) // run * run].view(-1, run).mean(1)
    axis.plot(torch.arange(1, len(means) + 1) * run, means, color="#0072b2")
    axis.annotate(f"training, mean of {run}", (len(losses), means[-1]), xytext=(4, 0), textcoords="offset points")
    if progress.notes:
        steps, held = [note["step"] for note in progress.notes], [note["loss"] for note in progress.notes]
        axis.plot(steps, held, color="#d55e00", marker="o", ms=4, ls=":", lw=1)
        axis.annotate("held out", (steps[-1], held[-1]), xytext=(4, -10), textcoords="offset points", color="#d55e00")
    axis.set(xlabel="step", ylabel="loss, in nats", ylim=(0, None))
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


# %% [markdown]
# `sigma_book.finetune` puts these together, and the command `sigma-book train` hands its arguments
# over:
#
#     sigma-book train --data train.jsonl --evaluate test.jsonl --out runs/first --dry-run
#     sigma-book train --data train.jsonl --evaluate test.jsonl --out runs/first
#
# The first prints the bill and the seconds of a step, and writes nothing. The second trains; the same command on the same
# folder goes on where it stopped. The finished model stands in `runs/first/final`; with
# `--evaluate`, the best one so far stands in `runs/first/best`.
#
# ## A world that is not ours
#
# The package `easy-vqa` (`pip install easy-vqa`) ships 4,000 small pictures with 38,575 questions for training, and 1,000 with
# 9,673 for testing: one shape each, a circle, a triangle or a rectangle, in colours of which the pocket model knows some.
# These lines write its questions in the form of chapter 15.
#
# ```python
# import json
# from pathlib import Path
#
# import easy_vqa
#
# folder = Path("easy_vqa")
# folder.mkdir(exist_ok=True)
# for part in ("train", "test"):
#     questions, answers, pictures = getattr(easy_vqa, f"get_{part}_questions")()
#     paths = getattr(easy_vqa, f"get_{part}_image_paths")()
#     with (folder / f"{part}.jsonl").open("w") as file:
#         for question, answer, picture in zip(questions, answers, pictures):
#             row = {"image": paths[picture], "question": question, "answer": answer}
#             file.write(json.dumps(row) + "\n")
# ```
#
# And this command teaches the pocket model with 4,800 of the questions:
#
#     sigma-book train --data easy_vqa/train.jsonl --evaluate easy_vqa/test.jsonl --out runs/easy-vqa \
#         --max-steps 300 --batch-size 16 --learning-rate 1e-3 --evaluate-limit 300
#
# Our run was stopped after step 131, and went on with the same command. Here is what became of 300 of the test questions.

# %%
# Exact answers before and after, by kind of question (2026-11-24, two CPU cores shared with other work, 9 minutes).
kinds = {
    "what color?": (0, 35, 37),
    "what shape?": (0, 16, 41),
    "is there?": (56, 93, 114),
    "is there not?": (14, 95, 108),
}
asked = sum(total for _, _, total in kinds.values())
before, after = (sum(row[place] for row in kinds.values()) for place in (0, 1))
assert asked == 300
print(f"{before / asked:.1%} exact before, {after / asked:.1%} after")

figure, axis = plt.subplots(figsize=(5.6, 2.3))
for place, (first, last, total) in enumerate(kinds.values()):
    axis.plot([first / total, last / total], [place, place], color="0.8", lw=3, zorder=0)
    axis.scatter([first / total], [place], color=GREY, s=40)
    axis.scatter([last / total], [place], color=ANSWER, s=40)
    axis.annotate(f"{last / total:.0%}", (last / total, place), xytext=(7, 0), textcoords="offset points", va="center")
axis.set_yticks(range(4), list(kinds))
axis.set(xlabel="exact answers, before (grey) and after (green)", xlim=(-0.03, 1.08), ylim=(-0.6, 3.6))
save(figure, "16_easy_vqa")
assert len(pocket.processor.tokenizer.encode("circle")) == 1 < len(pocket.processor.tokenizer.encode("rectangle"))

# %% [markdown]
# *Figure: four kinds of question, a grey dot for before and a green one for after. Colours rise from nothing to 95 %,
# questions with "not" from 13 % to 88 %, "is there" from 49 % to 82 %, shapes from nothing to 39 %.*
#
# Shapes are the slowest. One reason may be "rectangle": a word that its tokenizer has to spell, and a thing that its eyes were
# never shown.
#
# ## Your turn
#
# **1.** ★ The factor of the learning rate in a warmup of `warmup` steps, at step `step` from 0.


# %%
def warm(step: int, warmup: int) -> float: ...


check(warm, ((0, 10), 0.1), ((9, 10), 1.0), ((4, 10), 0.5))

# %% [markdown]
# **2.** ★ Shorten a list of numbers, taken as one arrow, to a length of at most `most`.


# %%
def shorten(numbers: list, most: float) -> list: ...


check(shorten, (([3.0, 4.0], 1.0), [0.6, 0.8]), (([0.3, 0.4], 1.0), [0.3, 0.4]))

# %% [markdown]
# **3.** ★★ Means of small batches, and how many tokens each is over: the mean over all tokens.


# %%
def mean_over_tokens(means: list, tokens: list) -> float: ...


check(mean_over_tokens, (([5.0, 1.0], [2, 8]), 1.8), (([2.0], [7]), 2.0))

# %% [markdown]
# **4.** ★★ After how many steps has a scaler that starts at `scale` and is halved at each overflow come down to a factor at
# which a gradient of size `gradient` no longer exceeds 65,504?


# %%
def halvings(scale: float, gradient: float) -> int: ...


check(halvings, ((65536.0, 1.0), 1), ((65536.0, 0.01), 0), ((65536.0, 1000.0), 10))

# %% [markdown]
# **5.** ★★★ A run of `steps` steps saves every `every` steps, which takes as long as `cost` steps. It is killed once, at a
# moment that may be anywhere with equal chance, so on average half of `every` is done twice. Which `every` wastes least?
# (Write the waste as a function of `every` and find its lowest point.)


# %%
def best_interval(steps: int, cost: float) -> float: ...


check(best_interval, ((5000, 1.0), 100.0), ((20_000, 0.25), 100.0))

# %% [markdown]
# Next: all of it at once, from random numbers to true answers.
