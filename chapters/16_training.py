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
# *How does a model change, step by step, until its answers are right?*
#
# **You build** the training loop. **You need** chapters 10 and 15.
# **Exports** the module `sigma_book.training`.

# %%
# | export
import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch

# %%
import tempfile

import matplotlib.pyplot as plt

from sigma_book import load
from sigma_book.data import Example, batches, collate
from sigma_book.gemma import GemmaConfig
from sigma_book.paligemma import PaliGemmaConfig, count_parameters
from sigma_book.siglip import SiglipConfig
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import COLOURS, draw_scene, make_scene

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
axis.plot(line, (line - 3) ** 2 / 4 + 0.5, color=GREY)
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
# *A valley, and seven steps down into it. The steps shorten as the slope flattens.*
#
# ## First by hand
#
# One number, one gradient, ten steps.

# %%
x = 0.0
for _ in range(10):
    gradient = (x - 3) / 2
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
# The two agree to the last digit, so we use PyTorch's.
#
# ## The formula
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 $$
#
# $$ w \leftarrow w - \eta \left( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda w \right) $$
#
# $\hat m$ and $\hat v$ are corrected for having started at zero.
#
# ## Warm up, hold, come down
#
# The first steps of a run are wild, because the running means know nothing yet; so the rate $\eta$ rises in a line.
# The last steps should settle, so it falls to zero.


# %%
# | export
def learning_rate_factor(step: int, steps: int, warmup: int, hold: float = 0.0) -> float:
    """The share of the peak learning rate at a step: up in a line, then held, then down in a line to zero.

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
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    return min(1.0, max(0.0, (steps - step) / max(1.0, steps - start)))


# %%
figure, axis = plt.subplots(figsize=(5.2, 2.2))
for hold, colour, name in ((0.0, PICTURE, "down at once"), (0.4, PROMPT, "held until 40 %")):
    factors = [learning_rate_factor(step, 1000, 100, hold) for step in range(1001)]
    axis.plot(factors, color=colour)
    axis.annotate(name, (520, factors[520]), xytext=(6, 4), textcoords="offset points", color=colour)
axis.set(xlabel="step", ylabel="share of the peak rate")
save(figure, "16_rate")
plt.show()
assert learning_rate_factor(99, 1000, 100) == 1.0 and learning_rate_factor(1000, 1000, 100) == 0.0

# %% [markdown]
# *Two schedules of a thousand steps: both rise for a hundred steps; one falls from there on, the other stays up for a
# while.*
#
# ## Never too far
#
# Now and then a batch has a huge gradient. One such step can undo a hundred good ones. So the gradient, all numbers taken as
# one long arrow, is shortened to a given length if it is longer. Its direction stays.

# %%
arrow = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
arrow[0].grad, arrow[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
assert torch.nn.utils.clip_grad_norm_(arrow, 1.0) == 5.0
torch.testing.assert_close(torch.cat([p.grad for p in arrow]), torch.tensor([0.6, 0.8]))

# %% [markdown]
# ## The loop
#
# It is a straight line: rate, batch, loss, gradient, clip, step, log. The loss is a function that one hands in, so the same
# loop teaches eyes and speech in chapter 17. A loss that is not a number stops it, before it changes anything.


# %%
# | export
def answer_loss(model: PaliGemma, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answers of a batch: what the ordinary batches of chapter 15 are for."""
    return model.loss(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids, batch.labels)


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
    clip: float = 1.0,
    log: Path | None = None,
    label: str = "train",
    report_every: int = 500,
    report: Callable[[int], str] | None = None,
) -> list[float]:
    """Take steps: loss, gradients, clipping, update.

    Parameters
    ----------
    modules : torch.nn.Module
        All that may learn; parameters with `requires_grad` off stay as they are.
    loss : callable
        Takes a batch, gives a scalar tensor.
    batches : iterable
        At least `steps` batches.
    optimizers : list
        Their learning rates are the peaks; the schedule scales them all alike.
    steps, warmup, hold
        The length of the run and the shape of the schedule, as in `learning_rate_factor`.
    clip : float
        The gradient, all parameters taken as one vector, is scaled down to at most this length.
    log : Path, optional
        A CSV file that grows by a line a step: step, loss, gradient_norm, rate, seconds.
    report : callable, optional
        Called every `report_every` steps with the step; its text is shown beside the progress bar.

    Returns
    -------
    list of float
        The loss at each step.

    Raises
    ------
    ValueError
        If the batches end too soon.
    RuntimeError
        If a loss is not a finite number.
    """
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    stream: Iterator = iter(batches)
    started = time.perf_counter()
    with _log(log) as write, tqdm(total=steps, desc=label, mininterval=2.0) as bar:
        for step in range(steps):
            factor = learning_rate_factor(step, steps, warmup, hold)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            batch = next(stream, None)
            if batch is None:
                raise ValueError(f"the batches ended after {step} of {steps} steps: give more examples or fewer steps")
            value = loss(batch)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss is {losses[-1]} at step {step}: nothing was changed by this step")
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip).item()
            for optimizer in optimizers:
                optimizer.step()
            write([step, f"{losses[-1]:.5f}", f"{norm:.4f}", f"{factor:.5f}", f"{time.perf_counter() - started:.1f}"])
            bar.update()
            if report is not None and (step + 1) % report_every == 0:
                bar.write(f"{label} {step + 1}: {report(step + 1)}")
            bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    return losses


@contextmanager
def _log(path: Path | None) -> Iterator[Callable[[list], None]]:
    """A function that writes one line to a CSV file with a head, or to nowhere."""
    if path is None:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", buffering=1) as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "gradient_norm", "rate", "seconds"])
        yield writer.writerow


# %% [markdown]
# ## Proof
#
# One step of the loop equals one step written out, with a loss and a gradient from `transformers`: chapter 10 has shown
# that those are ours too.

# %%
tiny = PaliGemmaConfig(
    SiglipConfig(32, 64, 2, 2, image_size=28, patch_size=14),
    GemmaConfig(32, 64, 2, 2, 1, 16, 1856),
    image_token_id=1850,
)


def tiny_model() -> PaliGemma:
    torch.manual_seed(1)
    model = PaliGemma(tiny)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


from sigma_book.processor import Processor

processor = Processor(load().processor.tokenizer, 28, 4)
names = list(COLOURS)


def colour_examples(seeds) -> list[Example]:
    scenes = [make_scene(seed, max_things=1) for seed in seeds]
    return [Example(draw_scene(scene), "colour", scene.things[0].colour) for scene in scenes]


batch = collate(processor, colour_examples(range(4)))
looped, written = tiny_model(), tiny_model()
train(
    looped,
    lambda batch: answer_loss(looped, batch),
    [batch],
    [torch.optim.AdamW(looped.parameters(), lr=1e-2)],
    steps=1,
    warmup=1,
    label="one step",
)
optimizer = torch.optim.AdamW(written.parameters(), lr=1e-2)
answer_loss(written, batch).backward()
nn.utils.clip_grad_norm_(written.parameters(), 1.0)
optimizer.step()
assert all(torch.equal(a, b) for a, b in zip(looped.parameters(), written.parameters(), strict=True))

# %% [markdown]
# ## A look inside: a run of seconds
#
# A tiny PaliGemma of four picture tokens learns to name a colour. It has never seen anything. We write a log, and ask on
# scenes that it was not shown.

# %%
model = tiny_model()
print(f"{count_parameters(model):,} parameters")
unseen = collate(processor, colour_examples(range(10_000, 10_100)))


@torch.no_grad()
def right_on_unseen() -> float:
    logits = model(unseen.input_ids, unseen.pixel_values, unseen.attention_mask, unseen.token_type_ids)
    asked = unseen.labels != -100
    first = asked.int().argmax(1)  # the colour stands first in the answer
    rows = torch.arange(len(first))
    return (logits[rows, first - 1].argmax(-1) == unseen.labels[rows, first]).float().mean().item()


before = right_on_unseen()
log = Path(tempfile.mkdtemp()) / "run.csv"
losses = train(
    model,
    lambda batch: answer_loss(model, batch),
    batches(colour_examples(range(600)), processor, 16, seed=0),
    [torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)],
    steps=150,
    warmup=20,
    log=log,
    label="naming colours",
)
after = right_on_unseen()
print(f"right on unseen scenes: {before:.0%} before, {after:.0%} after")
assert losses[-1] < 0.5 * losses[0] and after > before

# %%
with log.open() as file:
    lines = list(csv.DictReader(file))
loss = [float(line["loss"]) for line in lines]
figure, axis = plt.subplots(figsize=(5.6, 2.4))
axis.plot(loss, color=ANSWER, lw=1)
axis.set(xlabel="step", ylabel="loss, in nats", ylim=(0, None))
save(figure, "16_run")
plt.show()
lines[0]

# %% [markdown]
# *The loss of the run, read back from its log. It falls fast at first, when the model learns that answers are colours, then
# slowly, while it learns which.*
#
# ## The bill
#
# What must be in memory to train: the weights, a gradient for each, and AdamW's two means.


# %%
def training_bytes(parameters: int) -> dict[str, float]:
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "two means": 8 * parameters}


large = training_bytes(2_923_466_480)
assert sum(large.values()) == 16 * 2_923_466_480
{name: f"{size / 1e9:.1f} GB" for name, size in large.items()} | {"all": f"{sum(large.values()) / 1e9:.1f} GB"}

# %% [markdown]
# Sixteen bytes for each number, in 32 bits: 47 GB for PaliGemma 3B before a single activation. Chapters 18 and 19 of the
# full book, which come next, are about doing with far less.
#
# ## Your turn
#
# **1.** The factor of the learning rate in a warmup of `warmup` steps, at step `step` from 0.


# %%
def warm(step: int, warmup: int) -> float: ...


check(warm, ((0, 10), 0.1), ((9, 10), 1.0), ((4, 10), 0.5))

# %% [markdown]
# **2.** Shorten a list of numbers, taken as one arrow, to a length of at most `most`.


# %%
def clip(numbers: list, most: float) -> list: ...


check(clip, (([3.0, 4.0], 1.0), [0.6, 0.8]), (([0.3, 0.4], 1.0), [0.3, 0.4]))

# %% [markdown]
# **3.** The loss of a model that gives each of `n` answers the same chance.


# %%
def ignorance(n: int) -> float: ...


check(ignorance, ((8,), math.log(8)), ((1,), 0.0))

# %% [markdown]
# Next: all of it at once, from random numbers to true answers.
