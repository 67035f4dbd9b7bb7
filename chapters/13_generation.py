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
# # From scores to sentences
#
# *The model gives a score to every token. How does a sentence come of it, and when does it end?*
#
# **You build** the loop that answers. **You need** chapters 07, 10 and 11.
# **Exports** the module `sigma_book.generation`.

# %%
# | export
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sigma_book.kv_cache import KVCache
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch, read_json


# %%
import os
import time

import matplotlib.pyplot as plt

import sigma_book
from sigma_book import load
from sigma_book.gemma import GemmaConfig
from sigma_book.paligemma import PaliGemmaConfig, count_parameters
from sigma_book.pocket import POCKET
from sigma_book.processor import Processor, Tokenizer
from sigma_book.siglip import SiglipConfig
from sigma_book.style import ANSWER, GREY, check, save, use_style
from sigma_book.world import caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# Say the model has read a picture, the prompt, and the words "a red". Every token of its vocabulary now has a
# score. A softmax makes probabilities of them. Here are eight of them, for a vocabulary of eight words.

# %%
words = ["star", "heart", "circle", "cross", "ring", "square", "moon", "the"]
scores = [3.2, 2.6, 2.1, 1.0, 0.4, 0.1, -0.8, -1.5]
logits = torch.tensor([scores])  # (1, V)
probabilities = logits.softmax(-1)[0]  # (V,)

# %%
figure, axis = plt.subplots(figsize=(8.6, 1.6))
left = 0.0
for word, share in zip(words, probabilities.tolist()):
    axis.barh(0, share, left=left, height=0.6, color=ANSWER, edgecolor="white", linewidth=1.5)
    if share > 0.06:
        axis.text(left + share / 2, 0, f"{word}\n{share:.2f}", ha="center", va="center", color="white", size=9)
    left += share
axis.plot([0.886, 0.886, 0.998, 0.998], [0.36, 0.42, 0.42, 0.36], color="0.4", linewidth=1)
axis.text(0.942, 0.47, "five more", ha="center", size=9)
axis.annotate(
    "a dart at 0.62", (0.62, 0.3), (0.62, 0.75), ha="center", size=9, arrowprops={"arrowstyle": "-|>", "color": "black"}
)
axis.set(xlim=(0, 1), ylim=(-0.45, 1.0), yticks=[], xticks=[0, 0.25, 0.5, 0.75, 1])
axis.spines["left"].set_visible(False)
save(figure, "13_dart")

# %% [markdown]
# *Figure: a bar from 0 to 1, cut into one stretch for each word: star is the longest, then heart, then circle. An
# arrow points into the stretch of heart, at 0.62.*
#
# Two ways to go on. Take the longest stretch: that is **greedy** decoding. Or throw a dart and take the stretch
# that it hits: that is **sampling**. Then the token joins the text, the model scores the next one, and so on.
#
# Everything else in this chapter is about four things: bending that bar, ending in time, looking further ahead than one
# token, and turning tokens into text.
#
# ## By hand


# %%
def softmax_naive(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def draw_naive(shares: list[float], dart: float) -> int:
    end = 0.0
    for token, share in enumerate(shares):
        end += share
        if dart < end:
            return token
    return len(shares) - 1


shares = softmax_naive(scores)
words[draw_naive(shares, dart=0.62)]

# %% [markdown]
# The same word would be drawn again and again by the same dart. A **seed** decides on the darts, so a drawn
# answer can be had a second time.
#
# Now three ways to bend the bar, each a loop. The first divides all scores by a number, the **temperature**.


# %%
def temperature_naive(scores: list[float], temperature: float) -> list[float]:
    return [score / temperature for score in scores]


for temperature in (0.5, 1.0, 2.0):
    print(temperature, [round(share, 2) for share in softmax_naive(temperature_naive(scores, temperature))])

# %% [markdown]
# Below 1 the long stretches grow, above 1 all become alike. At 0 the longest would fill the bar: so 0 is our name
# for greedy.
#
# A flat bar has a danger. One long tail of unlikely words is hit often, because there are so many of them. The
# second and the third way cut the tail off. **Top-k** keeps the k best.


# %%
def top_k_naive(scores: list[float], k: int) -> list[float]:
    lowest = sorted(scores, reverse=True)[min(k, len(scores)) - 1]
    return [score if score >= lowest else -math.inf for score in scores]


top_k_naive(scores, 3)

# %% [markdown]
# But why three? Where the model is sure, two is too many; where it is not, ten may be too few. **Top-p** keeps as
# many as it takes to have probability p together.


# %%
def top_p_naive(scores: list[float], p: float) -> list[float]:
    shares = softmax_naive(scores)
    kept, total = set(), 0.0
    for token in sorted(range(len(scores)), key=lambda token: -shares[token]):
        if total >= p:
            break
        kept.add(token)
        total += shares[token]
    return [score if token in kept else -math.inf for token, score in enumerate(scores)]


top_p_naive(scores, 0.7)

# %% [markdown]
# Last, a **repetition penalty** lowers the score of every token that occurred already. A score may be negative,
# and dividing a negative number would raise it; so positive scores are divided, negative ones multiplied.


# %%
def penalty_naive(scores: list[float], seen: set[int], penalty: float) -> list[float]:
    lowered = [score * penalty if score < 0 else score / penalty for score in scores]
    return [lowered[token] if token in seen else score for token, score in enumerate(scores)]


penalty_naive(scores, seen={0, 7}, penalty=2.0)

# %% [markdown]
# Score 3.2 became 1.6, and -1.5 became -3. Note what this costs: a model that has to say "two stars and two
# hearts" is punished for its second "two". It is a crutch for text that runs in circles; 1, which does nothing,
# is the default.
#
# ## The formula
#
# With scores $s_v$ of the tokens $v$, seen tokens $S$, penalty $r$, temperature $\tau$ and the kept set $\mathcal{K}$:
#
# $$ s'_v = \begin{cases} s_v / r & v \in S,\ s_v \ge 0 \\ s_v\, r & v \in S,\ s_v < 0 \\ s_v & \text{else} \end{cases}
# \qquad
# P(v) = \begin{cases} \dfrac{e^{s'_v/\tau}}{\sum_{u \in \mathcal{K}} e^{s'_u/\tau}} & v \in \mathcal{K} \\ 0 & \text{else} \end{cases} $$
#
# The order matters: penalty, temperature, top-k, top-p. A high temperature makes top-p keep more.
#
# ## A whole batch at once
#
# Scores come as (B, V). The first is one line.


# %%
# | export
def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divide scores (B, V) by a number above 0: below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


# %% [markdown]
# `topk` finds the k-th best of each row. What is lower becomes minus infinity, which the softmax turns to 0.
# Scores equal to the k-th stay, so more than k may remain.


# %%
# | export
def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all scores (B, V) but the k highest of each row to -inf; those equal to the k-th stay."""
    lowest_kept = logits.topk(min(int(k), logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < lowest_kept, -math.inf)


# %% [markdown]
# For top-p we sort upwards, so that the unlikely tail comes first, and drop it while its sum stays within 1 - p.
# Then `scatter` carries each mark back from its sorted place to its token.


# %%
# | export
def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest most probable tokens of each row that reach probability p together; -inf for the rest.

    The most probable token always stays.

    References
    ----------
    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ascending, order = logits.sort(dim=-1)  # (B, V)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p  # the unlikely end, while its sum stays within 1 - p
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


# %%
# | export
def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that occurred less likely, for a penalty above 1.

    Parameters
    ----------
    logits : torch.Tensor
        (B, V).
    seen : torch.Tensor
        Boolean (B, V), True for tokens of the prompt and of the answer so far.
    penalty : float
        Positive scores are divided by it, negative ones multiplied.

    References
    ----------
    Keskar et al. 2019, "CTRL", section 4.1.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


# %% [markdown]
# Each equals its loops, on random scores too. That all four equal the processors of `transformers` is shown in
# `tests/parity/test_generation.py`.

# %%
seen = torch.zeros(1, 8, dtype=torch.bool)
seen[0, [0, 7]] = True
for row in (logits, 3 * torch.randn(1, 8), 3 * torch.randn(1, 8)):
    listed = row[0].tolist()
    for value in (0.3, 0.8, 2.0):
        torch.testing.assert_close(apply_temperature(row, value)[0].tolist(), temperature_naive(listed, value))
        torch.testing.assert_close(
            penalize_repetition(row, seen, value)[0].tolist(), penalty_naive(listed, {0, 7}, value)
        )
    for k in (1, 3, 20):
        assert keep_top_k(row, k)[0].tolist() == top_k_naive(listed, k)
    for p in (0.1, 0.5, 0.8, 0.99):
        assert keep_top_p(row, p)[0].tolist() == top_p_naive(listed, p)

# %%
panels = {
    "as it is": logits,
    "temperature 0.5": apply_temperature(logits, 0.5),
    "temperature 2": apply_temperature(logits, 2.0),
    "top-k 3": keep_top_k(logits, 3),
    "top-p 0.7": keep_top_p(logits, 0.7),
}
figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 2.6), sharey=True, sharex=True)
for axis, (title, bent) in zip(axes, panels.items()):
    axis.barh(words, probabilities, color="none", edgecolor="0.6", linewidth=0.8)
    axis.barh(words, bent.softmax(-1)[0], color=ANSWER, height=0.55)
    axis.set_title(title, size=10)
    axis.set(xlim=(0, 1), xticks=[0, 0.5, 1])
axes[0].invert_yaxis()
axes[2].set_xlabel("probability")
save(figure, "13_bent")

# %% [markdown]
# *Figure: five bar charts of the same eight words. Temperature 0.5 lengthens the first bar, temperature 2 levels
# them. Top-k 3 leaves three bars, top-p 0.7 leaves two, each longer than before. Outlines show the bars as they
# were.*
#
# ## What the user may ask for
#
# All of these settings go together, so they travel together, and are checked once, when they are made. A wrong
# one gets a sentence that says what would be right.


# %%
# | export
@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Parameters
    ----------
    temperature : float
        0 takes the best token always (and so does anything below 1e-6); above, up to 1e6, tokens are drawn.
    top_p : float
        In (0, 1]; 1 keeps all tokens.
    top_k : int, optional
        At least 1; None keeps all tokens.
    repetition_penalty : float
        From 1e-6 to 1e6; 1 does nothing.
    seed : int, optional
        Row i of a batch draws from a generator of its own, seeded with `seed + i`. None takes a seed from
        torch's global generator.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not is_finite(value):
                raise ValueError(f"{name} is {value!r}: expected a finite number")
            object.__setattr__(self, name, float(value))  # torch knows no fractions
        if not 0 <= self.temperature <= 1e6:
            raise ValueError(
                f"temperature is {self.temperature}: expected 0 for greedy, or a number above it up to 1e6"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a probability above 0 and at most 1")
        if not 1e-6 <= self.repetition_penalty <= 1e6:  # beyond, scores leave what 32 bits can hold
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: expected a number from 1e-6 to 1e6, 1 for none"
            )
        if self.top_k is not None:
            whole_number("top_k", self.top_k, least=1)
        if self.seed is not None:
            whole_number("seed", self.seed, least=0, most=2**63 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6

    @property
    def takes_best(self) -> bool:
        """Whether the best score decides as it is."""
        return self.greedy and self.repetition_penalty == 1


# %%
# | export
def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold; NumPy's are numbers too, True is none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def whole_number(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """The value, if it is a whole number in its range.

    Raises
    ------
    ValueError
        If not, with the argument's name, the value and the range.
    """
    wanted = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {value!r}: expected {wanted}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value}: expected {wanted}")
    return int(value)


# %%
try:
    Sampling(top_p=1.5)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Darts
#
# Chance needs care in a batch. If all rows shared one source of darts, the answer to a picture would depend on
# its neighbours. So row i has a generator of its own, seeded with `seed + i`, and each token costs each row
# exactly one dart. The generators live on the CPU: the same seed throws the same darts, whatever computes the
# scores.


# %%
# | export
def row_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """One source of chance for each row, on the CPU whatever the device: row i is seeded with seed + i."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return [torch.Generator().manual_seed(int(seed) + row) for row in range(rows)]


def draw_one(logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw one token for each row of scores (B, V), with one number of each row's generator: (B,).

    The probabilities lie end to end on a line from 0 to 1, in the order of the ids; the token in whose stretch the
    random number falls is drawn.
    """
    ends = logits.softmax(-1).cpu().double().cumsum(-1)  # (B, V): where each stretch ends
    ends = ends / ends[:, -1:]
    darts = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])  # (B, 1)
    return torch.searchsorted(ends, darts, right=True)[:, 0].to(logits.device)


# %% [markdown]
# `cumsum` lays the stretches end to end, in float64, since a quarter of a million of them add up; `searchsorted`
# finds the one that was hit. Does it draw as often as it should?

# %%
generators = row_generators(0, 1)
drawn = torch.cat([draw_one(logits, generators) for _ in range(3000)])
counted = torch.bincount(drawn, minlength=8) / 3000
assert (counted - probabilities).abs().max() < 5 * 0.5 / 3000**0.5  # five standard deviations, at the widest
[(word, round(float(c), 3), round(float(p), 3)) for word, c, p in zip(words, counted, probabilities)]

# %% [markdown]
# One function puts the parts in order. Before a division by a tiny temperature the best score is taken off all:
# the softmax does not see it, and nothing becomes infinite.


# %%
# | export
def choose(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Take the next token of each row: (B, V) scores to (B,) ids.

    The order is that of `transformers`: repetition penalty, temperature, top-k, top-p.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(-1)
    best = logits.amax(-1, keepdim=True)  # (B, 1): a shift that the softmax does not see keeps tiny temperatures finite
    logits = apply_temperature(logits - best, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return draw_one(logits, generators)


# %%
nobody = torch.zeros(1, 8, dtype=torch.bool)
generators = row_generators(1, 1)
print("greedy:", words[choose(logits, Sampling(), nobody, generators)])
for settings in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2), Sampling(temperature=0.1)):
    drawn = [words[choose(logits, settings, nobody, generators)] for _ in range(9)]
    print(f"temperature {settings.temperature}, top-k {settings.top_k}:", *drawn)

# %% [markdown]
# ## The loop, the slow way
#
# Now the model. This one is tiny and was taught nothing: it answers nonsense. But it must answer the *same*
# nonsense whichever way we run the loop, and that is what we want to check. Its tokenizer is the pocket model's.

# %%
tokenizer = Tokenizer.from_folder(Path(sigma_book.__file__).parent / "pocket_model")
processor = Processor(tokenizer, image_size=28, num_image_tokens=4)
eyes = SiglipConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
voice = GemmaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=tokenizer.image_id,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
model = PaliGemma(
    PaliGemmaConfig(eyes, voice, tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
)
for parameter in model.parameters():
    width = parameter[0].numel() if parameter.dim() > 1 else 25
    parameter.data = torch.randn_like(parameter) / width**0.5

scene = draw_scene(make_scene(7))
batch = processor.prepare([scene], ["caption en"])
assert batch.input_ids.shape == (1, 4 + 1 + 2 + 1)
batch.input_ids

# %% [markdown]
# Four picture tokens, the beginning, two words, the newline. The slow loop reads all of that for each new token,
# with the answer so far as suffix.


# %%
@torch.no_grad()
def greedy_naive(batch: Batch, count: int) -> list[int]:
    prompt = batch.input_ids[0].tolist()
    answer = []
    for _ in range(count):
        ids = torch.tensor([prompt + answer])  # (1, T)
        types = torch.tensor([[0] * len(prompt) + [1] * len(answer)])
        logits = model(ids, batch.pixel_values, torch.ones_like(ids), types)[0, -1]  # (V,)
        answer.append(int(logits.argmax()))
    return answer


slow = greedy_naive(batch, 10)
slow

# %% [markdown]
# ## How long may it be?
#
# Three things end an answer. The model says the end-of-sequence token. A string comes up that the user named. Or
# there is no more room.
#
# Room is `max_new_tokens`, or what the prompt leaves of the model's **context**, the number of tokens that it was
# built to read. A long prompt makes the answer shorter; a prompt that leaves no room at all is an error. Padding
# takes no room.


# %%
# | export
def answer_limits(attention_mask: torch.Tensor, max_new_tokens: int, context: int) -> list[int]:
    """How many tokens each row may answer: `max_new_tokens`, or the room that its prompt leaves, if that is less.

    Parameters
    ----------
    attention_mask : torch.Tensor
        (B, T), 0 at padding, which takes no room.
    max_new_tokens : int
        At least 1.
    context : int
        The model's `max_position_embeddings`: prompt (picture included) and answer together.

    Raises
    ------
    ValueError
        If `max_new_tokens` is below 1, or if a prompt leaves no room for one token.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    lengths = (attention_mask != 0).sum(-1).tolist()
    for row, length in enumerate(lengths):
        if length >= context:
            which = "the prompt" if len(lengths) == 1 else f"prompt {row}"
            raise ValueError(
                f"{which} has {length} tokens, pictures included: the model's context is {context} tokens, "
                f"prompt and answer together, so shorten it by {length - context + 1} or more"
            )
    return [min(max_new_tokens, context - length) for length in lengths]


# %%
for length in (8, 60):
    print(length, answer_limits(torch.ones(1, length), max_new_tokens=10, context=64))
try:
    answer_limits(torch.ones(1, 70), max_new_tokens=10, context=64)
except ValueError as error:
    print(error)

# %% [markdown]
# ## The loop
#
# The fast loop reads the prompt once and then takes one token a step, thanks to the cache of chapter 07. Caches
# and mask are made once, for the whole length: nothing grows inside the loop.
#
# Rows of a batch end at different times. A row that is over is fed padding and picks nothing; its neighbours
# never notice, since no row looks at another.
#
# One door is left open: `allow`. Somebody may want to forbid tokens, depending on what was said so far. Chapter 14
# does, so that the answer is always a box. A forbidden token gets the score minus infinity.


# %%
# | export
# Asked before a token is taken, with the answer so far and how many tokens may still come, this one included:
# a boolean (V,), True for each token that is allowed.
Allow = Callable[[list[int], int], torch.Tensor]


class Pick(NamedTuple):
    """A token that a row took.

    `logprob` is the natural logarithm of its probability in the model's own distribution, before penalty,
    temperature, top-k and top-p.
    """

    row: int
    token: int
    logprob: float


# %%
# | export
@torch.no_grad()
def generate_tokens(
    model: PaliGemma,
    batch: Batch,
    *,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    is_over: Callable[[int, int], bool] | None = None,
    allow: Allow | None = None,
    logprobs: bool = False,
) -> Iterator[list[Pick]]:
    """Answer a batch, one token a row at each step.

    A row ends by itself: at a stop token (which is its last pick), when `is_over` says so, or at its limit. It is
    then fed padding, picks nothing more, and the other rows go on undisturbed.

    Parameters
    ----------
    model : PaliGemma
    batch : Batch
        Prompts padded on the left.
    max_new_tokens : int
        The most a row may pick; `answer_limits` bounds it by the model's context.
    sampling : Sampling, optional
        Greedy by default.
    stop_ids : sequence of int, optional
        Tokens that end a row; the end-of-sequence token of the config by default.
    is_over : callable, optional
        Asked with (row, token) after each pick that is no stop token; True ends the row.
    allow : callable, optional
        Which tokens may come next, see `Allow`.
    logprobs : bool
        Whether log-probabilities are wanted. If not, a model that was made ready for speed may round them.

    Yields
    ------
    list of Pick
        The picks of the rows that were not over, in the order of the rows.

    Raises
    ------
    ValueError
        If a prompt is longer than the context, or `max_new_tokens` is below 1.
    RuntimeError
        If the scores are not finite: 16-bit floats overflowed.
    """
    sampling = Sampling() if sampling is None else sampling
    stop_ids = {model.config.eos_token_id} if stop_ids is None else set(stop_ids)
    rows, prompt_length = batch.input_ids.shape
    limits = answer_limits(batch.attention_mask, max_new_tokens, model.config.text.max_position_embeddings)
    generators = row_generators(sampling.seed, rows)
    best_only = sampling.takes_best and allow is None and not logprobs
    logits, seen, mask, caches = _read_prompts(model, batch, max(limits), best_only)
    answers: list[list[int]] = [[] for _ in range(rows)]
    live = list(range(rows))

    for step in range(max(limits)):
        logits = finite_scores(logits)
        steered = logits
        if allow is not None:
            steered = logits.clone()
            for row in live:
                may = ask_allow(allow, answers[row], limits[row] - step)  # (V,)
                steered[row] = logits[row].masked_fill(~may.to(logits.device), -math.inf)
        tokens = choose(steered, sampling, seen, generators)  # (B,)
        of_chosen = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)  # (B,)
        chosen, measured = tokens.tolist(), of_chosen.tolist()
        picks = [Pick(row, chosen[row], measured[row]) for row in live]
        for row, token, _ in picks:
            answers[row].append(token)
        live = [
            row
            for row, token, _ in picks
            if token not in stop_ids and not (is_over and is_over(row, token)) and step + 1 < limits[row]
        ]
        yield picks
        if not live:
            return
        seen.scatter_(-1, tokens[:, None], True)
        over = torch.ones_like(tokens, dtype=torch.bool)
        over[live] = False
        tokens = tokens.masked_fill(over, model.config.pad_token_id)
        logits = model.decode(tokens[:, None], mask[:, : prompt_length + step + 1], caches, best_only)


def _read_prompts(
    model: PaliGemma, batch: Batch, most_new_tokens: int, best_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[KVCache]]:
    """Read a batch once: scores (B, V), seen tokens (B, V), the mask of all columns to come (B, S), filled caches."""
    batch = batch.to(model.device)
    rows, prompt_length = batch.input_ids.shape
    room = prompt_length + most_new_tokens
    # a step that was compiled for a GPU is made anew for each width: few of them
    width = room if getattr(model, "compiled_step", None) is None else -(-room // 128) * 128
    caches = model.language_model.new_caches(rows, width)
    mask = batch.attention_mask.new_ones(rows, room)  # (B, S): columns of the answer are never padding
    mask[:, :prompt_length] = batch.attention_mask
    features = model.encode_images(batch.pixel_values)  # (N, P, D)
    logits = model.prefill(batch.input_ids, features, batch.attention_mask, caches, best_only)  # (B, V)
    return logits, seen_tokens(batch.input_ids, batch.attention_mask, logits.shape[-1]), mask, caches


def ask_allow(allow: Allow, answer: list[int], left: int) -> torch.Tensor:
    """The tokens (V,) that `allow` lets come next, or a ValueError if there are none."""
    may = allow(answer, left)
    if not may.any():
        raise ValueError(
            f"allow forbids every token behind the {len(answer)} that were said: it must leave one or more"
        )
    return may


def finite_scores(logits: torch.Tensor) -> torch.Tensor:
    """Scores in float32, or a RuntimeError if they are not finite."""
    if not logits.isfinite().all():
        raise RuntimeError(
            f"the model's scores hold inf or nan in {str(logits.dtype).removeprefix('torch.')}: its weights are "
            "damaged, or overflow in float16; load it with dtype='bfloat16' or dtype='float32'"
        )
    return logits.float()


# %% [markdown]
# A **log-probability** says how likely a token was: the logarithm of its stretch of the bar. We report the
# stretch of the model's *own* bar, before any bending. So it says what the model thinks, not what our settings
# made of it, and greedy answers have one too.
#
# What a row has seen, for the penalty, is its prompt and its answer; not its padding.


# %%
# | export
def seen_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which tokens a row has read: boolean (B, V). Padding was not read; ids without a score are left out."""
    seen = torch.zeros(len(input_ids), vocab_size + 1, dtype=torch.bool, device=input_ids.device)
    ids = input_ids.masked_fill(attention_mask == 0, vocab_size).clamp(max=vocab_size)  # the last column is thrown away
    return seen.scatter_(-1, ids, True)[:, :vocab_size]


# %% [markdown]
# ## Proof
#
# The fast loop gives the tokens of the slow one, and a batch gives what one row at a time gives: greedy and
# drawn.


# %%
def tokens_of(batch: Batch, **options) -> list[list[int]]:
    rows = [[] for _ in batch.input_ids]
    for picks in generate_tokens(model, batch, **options):
        for pick in picks:
            rows[pick.row].append(pick.token)
    return rows


assert tokens_of(batch, max_new_tokens=10) == [slow]

prompts = ["caption en", "how many red stars are there?", ""]
scenes = [draw_scene(make_scene(seed)) for seed in range(3)]
together = processor.prepare(scenes, prompts)
assert (together.attention_mask == 0).any()  # padded on the left
for settings in (Sampling(), Sampling(temperature=1.0, seed=5), Sampling(repetition_penalty=1.5)):
    rows = tokens_of(together, max_new_tokens=12, sampling=settings)
    for row, (picture, prompt) in enumerate(zip(scenes, prompts)):
        alone = Sampling(settings.temperature, seed=5 + row, repetition_penalty=settings.repetition_penalty)
        assert tokens_of(processor.prepare([picture], [prompt]), max_new_tokens=12, sampling=alone) == [rows[row]]

# %% [markdown]
# The log-probabilities are those of torch's `log_softmax` over the slow loop's scores.

# %%
picked = [picks[0] for picks in generate_tokens(model, batch, max_new_tokens=10)]
ids = torch.cat([batch.input_ids, torch.tensor([slow])], dim=1)
types = torch.cat([torch.zeros_like(batch.input_ids), torch.ones(1, 10, dtype=torch.long)], dim=1)
with torch.no_grad():
    expected = model(ids, batch.pixel_values, torch.ones_like(ids), types)[0, -11:-1].log_softmax(-1)
for step, pick in enumerate(picked):
    assert abs(pick.logprob - float(expected[step, pick.token])) < 1e-4
round(
    sum(pick.logprob for pick in picked), 2
)  # of the whole answer: a product of probabilities, so a sum of logarithms

# %% [markdown]
# ## Looking further: beams
#
# Greedy decoding takes the best token, and never looks back. That can be a mistake. Here is a language of two
# steps: what the first word may be, and what may follow it.

# %%
first = {"a": 0.55, "one": 0.45}
second = {"a": {"star": 0.4, "heart": 0.35, "ring": 0.25}, "one": {"star": 0.9, "heart": 0.1}}
sentences = {(one, two): first[one] * share for one in first for two, share in second[one].items()}
assert abs(sum(sentences.values()) - 1) < 1e-12
likely = max(sentences, key=sentences.get)
greedy = (max(first, key=first.get), max(second["a"], key=second["a"].get))
assert (greedy, likely) == (("a", "star"), ("one", "star"))
{" ".join(words): round(share, 3) for words, share in sentences.items()}

# %%
figure, axis = plt.subplots(figsize=(7.2, 2.7))
ends = {("a", "star"): 4, ("a", "heart"): 3, ("a", "ring"): 2, ("one", "star"): 1, ("one", "heart"): 0}
heights = {"a": 3.0, "one": 0.5}
for word, height in heights.items():
    axis.plot([0.25, 1.75], [2, height], color=ANSWER, lw=7 * first[word])
    axis.text(2, height, f"{word}\n{first[word]:.2f}", ha="center", va="center", size=9)
for (one, two), height in ends.items():
    axis.plot([2.25, 3.7], [heights[one], height], color=ANSWER, lw=7 * second[one][two])
    axis.text(3.8, height, two, va="center", size=9)
    known = {greedy: "greedy takes this", likely: "the most likely of all"}.get((one, two), "")
    axis.text(4.5, height, f"{sentences[one, two]:.3f}   {known}", va="center", size=9)
axis.text(0, 2, "begin", ha="center", va="center", size=9)
axis.set(xlim=(-0.3, 6.3), ylim=(-0.5, 4.5))
axis.axis("off")
save(figure, "13_tree")

# %% [markdown]
# *Figure: a tree of two steps, thicker lines for likelier words. From the start to "a" with 0.55 and to "one" with
# 0.45; from "a" to star, heart and ring, none over 0.4; from "one" nearly always to star. The sentence "one star" is
# the most likely, and greedy decoding cannot reach it.*
#
# The tree of a real model has a quarter of a million branches at each knot, so nobody walks all of it. **Beam
# search** is the compromise: keep not one beginning, but the best few, the *beams*. At each step, look at all their
# continuations and keep the best few of those. Two beams find "one star".
#
# How good is a sentence? The sum of the logarithms of its probabilities, its *log-probability*. One trouble: each
# word adds a negative number, so short answers win too easily. So the sum is divided by a power of the length,
# the **length penalty**. 0 leaves the sum as it is; 1, the usual value, makes it the mean for each token.
#
# $$ \mathrm{score}(y) = \frac{1}{|y|^{\alpha}} \sum_{t} \log P(y_t \mid y_{<t}) $$
#
# Beams are sorted by the plain sum while they run, since all have the same length then. The score decides between
# answers that have ended.
#
# When is the search over? As many answers as beams have ended, and the best beam that still runs, if it ended here,
# would be no better than the worst of them.
#
# ## Beams by hand
#
# In loops, reading everything anew. `next_shares` gives the probability of each token behind a beginning.


# %%
def beams_naive(next_shares, width: int, alpha: float, longest: int, end: int) -> tuple[float, list[int]]:
    running, ended = [(0.0, [])], []
    while running:
        grown = []
        for total, tokens in running:
            for token, share in enumerate(next_shares(tokens)):
                if share > 0:
                    grown.append((total + math.log(share), [*tokens, token]))
        grown.sort(key=lambda beam: -beam[0])
        running = []
        for rank, (total, tokens) in enumerate(grown):
            over = tokens[-1] == end or len(tokens) == longest
            if over and rank < width:  # an ending among the best few counts
                ended.append((total / len(tokens) ** alpha, tokens))
            if not over and len(running) < width:
                running.append((total, tokens))
        ended = sorted(ended, key=lambda beam: -beam[0])[:width]
        if len(ended) == width and running and running[0][0] / len(running[0][1]) ** alpha <= ended[-1][0]:
            break
    return ended[0]


tree = ["a", "one", "star", "heart", "ring"]


def shares_of(tokens: list[int]) -> list[float]:
    shares = first if not tokens else second[tree[tokens[0]]]
    return [shares.get(word, 0.0) for word in tree]


for width in (1, 2):
    score, found = beams_naive(shares_of, width, alpha=0.0, longest=2, end=-1)
    print(width, [tree[token] for token in found], round(math.exp(score), 3))
assert tuple(tree[token] for token in found) == likely

# %% [markdown]
# ## Beams on the cache
#
# Each beam needs the keys and values of its own past. When a beam has two children and another has none, rows of the
# cache are copied and dropped. That is what `KVCache.select` was made for in chapter 07. The prompt is read once for
# all beams.
#
# A row of the batch is a search of its own. `RowSearch` keeps its books.


# %%
# | export
class Beam(NamedTuple):
    """An answer, or the beginning of one.

    Parameters
    ----------
    tokens : list of int
        So far, the stop token included.
    logprobs : list of float
        Of each token, in the model's own distribution.
    total : float
        What beams compete by: the sum of `logprobs`, each changed by the repetition penalty, if there is one.
    score : float
        `total` divided by a power of the length: what ended beams compete by.
    """

    tokens: list[int]
    logprobs: list[float]
    total: float
    score: float


class RowSearch:
    """The search for one answer: beams that run, and beams that have ended.

    Parameters
    ----------
    width : int
        How many beams run, and how many ended ones are kept.
    length_penalty : float
        The power of the length by which the sum of log-probabilities is divided.
    limit : int
        Most tokens of an answer.
    is_end : callable
        Whether a list of tokens is a whole answer.
    """

    def __init__(self, width: int, length_penalty: float, limit: int, is_end: Callable[[list[int]], bool]):
        self.width, self.length_penalty, self.limit, self.is_end = width, length_penalty, limit, is_end
        self.running = [Beam([], [], 0.0, 0.0)]
        self.ended: list[Beam] = []

    def advance(self, totals: torch.Tensor, logprobs: torch.Tensor, count: int) -> list[int]:
        """Take one step, from the sums (R, V) of all continuations of the running beams.

        Parameters
        ----------
        totals, logprobs : torch.Tensor
            (R, V): the sum that each continuation would have, -inf if it is not allowed, and its last summand.
        count : int
            How many of the best continuations to look at: enough to go on if the best have all ended.

        Returns
        -------
        list of int
            For each beam that runs now, which of those before it goes on with; empty when the search is over.
        """
        best = totals.flatten().topk(min(count, totals.numel()))
        summands = logprobs.flatten()[best.indices].tolist()
        parents, grown = [], []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(place, totals.shape[-1])
            if total == -math.inf or len(grown) == self.width:
                break
            tokens = [*self.running[parent].tokens, token]
            measured = [*self.running[parent].logprobs, summands[rank]]
            beam = Beam(tokens, measured, total, total / len(tokens) ** self.length_penalty)
            if len(tokens) < self.limit and not self.is_end(tokens):
                parents.append(parent)
                grown.append(beam)
            elif rank < self.width:
                self.ended.append(beam)
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: self.width]
        full = len(self.ended) == self.width
        if full and grown and grown[0].score <= self.ended[-1].score:
            parents, grown = [], []
        self.running = grown
        return parents


# %% [markdown]
# The loop around it feeds all running beams of all rows as one batch. A row whose search is over leaves the batch.


# %%
# | export
@torch.no_grad()
def search_beams(
    model: PaliGemma,
    batch: Batch,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    max_new_tokens: int = 100,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    is_over: Callable[[list[int]], bool] | None = None,
    allow: Allow | None = None,
) -> list[Beam]:
    """The best answer to every row of a batch that beam search finds.

    The rules are those of `transformers` with `early_stopping=False`. An answer that is reached at the limit counts
    as ended there.

    Parameters
    ----------
    model, batch, max_new_tokens, stop_ids, allow
        As in `generate_tokens`.
    num_beams : int
        How many beginnings run side by side.
    length_penalty : float
        Answers are compared by the sum of their log-probabilities, divided by their length to this power.
    repetition_penalty : float
        As in `Sampling`; it changes log-probabilities here, as it does in `transformers`.
    is_over : callable, optional
        Asked with the tokens of a beam that has no stop token; True ends it.

    Raises
    ------
    ValueError, RuntimeError
        As `generate_tokens`.
    """
    stop_ids = {model.config.eos_token_id} if stop_ids is None else set(stop_ids)
    prompt_length = batch.input_ids.shape[1]
    limits = answer_limits(batch.attention_mask, max_new_tokens, model.config.text.max_position_embeddings)
    logits, seen, mask, caches = _read_prompts(model, batch, max(limits))

    def is_end(tokens: list[int]) -> bool:
        return tokens[-1] in stop_ids or (is_over is not None and is_over(tokens))

    searches = [RowSearch(num_beams, length_penalty, limit, is_end) for limit in limits]
    live, step, most = searches, 0, num_beams * (1 + max(1, len(stop_ids)))
    while True:
        logprobs = finite_scores(logits).log_softmax(-1)  # (N, V), N beams of all rows
        steered = logprobs if repetition_penalty == 1 else penalize_repetition(logprobs, seen, repetition_penalty)
        beams = [(search, beam) for search in live for beam in search.running]
        if allow is not None:
            may = torch.stack([ask_allow(allow, beam.tokens, search.limit - step) for search, beam in beams])  # (N, V)
            steered = steered.masked_fill(~may.to(steered.device), -math.inf)
        totals = steered + steered.new_tensor([beam.total for _, beam in beams])[:, None]
        lines, start = [], 0
        for search in live:
            end = start + len(search.running)
            lines += [start + parent for parent in search.advance(totals[start:end], logprobs[start:end], most)]
            start = end
        live = [search for search in live if search.running]
        if not live:
            return [search.ended[0] for search in searches]
        if lines != list(range(start)):
            kept = torch.tensor(lines, device=mask.device)
            mask, seen = mask[kept], seen[kept]
            for cache in caches:
                cache.select(kept)
        tokens = mask.new_tensor([[beam.tokens[-1]] for search in live for beam in search.running])  # (N, 1)
        seen = seen.scatter(-1, tokens, True)
        step += 1
        logits = model.decode(tokens, mask[:, : prompt_length + step], caches)


def check_beams(num_beams: int, length_penalty: float, sampling: Sampling) -> None:
    """Raise a ValueError if this cannot be searched: a width below 1, a penalty that is no number, drawn tokens."""
    whole_number("num_beams", num_beams, least=1)
    number = isinstance(length_penalty, numbers.Real) and not isinstance(length_penalty, bool)
    if not number or not -50 <= length_penalty <= 50:  # a power of thousands must stay a number
        raise ValueError(f"length_penalty is {length_penalty!r}: expected a number from -50 to 50")
    if num_beams > 1 and not sampling.greedy:
        raise ValueError(
            f"num_beams is {num_beams} and temperature {sampling.temperature}: beams look for the best answer and "
            "draw nothing, so leave one of the two out"
        )


# %% [markdown]
# One thing to weigh. Of the best continuations only those among the first `num_beams` may end; others are there to
# keep the search going if all of the first ones have ended.
#
# Proof: the naive search over the same tiny model, for several widths and penalties. (That both equal `transformers`,
# in batches, is shown in `tests/parity/test_beams.py`.)


# %%
@torch.no_grad()
def next_shares(tokens: list[int]) -> list[float]:
    ids = torch.cat([batch.input_ids, torch.tensor([tokens], dtype=torch.long)], dim=1)
    types = torch.tensor([[0] * batch.input_ids.shape[1] + [1] * len(tokens)])
    shares = model(ids, batch.pixel_values, torch.ones_like(ids), types)[0, -1].softmax(-1)
    best = shares.topk(8).indices  # the rest has no chance, and the loops are slow
    return torch.zeros_like(shares).scatter(0, best, shares[best]).tolist()


end = slow[4]  # a token that comes up early, so that some answers end
for width, alpha in ((2, 1.0), (3, 0.0), (3, -1.0)):
    score, expected = beams_naive(next_shares, width, alpha, longest=7, end=end)
    [found] = search_beams(model, batch, num_beams=width, length_penalty=alpha, max_new_tokens=7, stop_ids=[end])
    assert found.tokens == expected and abs(found.score - score) < 1e-4
    print(f"width {width}, penalty {alpha}: {len(found.tokens)} tokens, score {found.score:.3f}")

# %% [markdown]
# More beams find a more likely answer in most cases, not in all: a beam that is ahead for a while may push out the one
# that would have won in the end. What the pocket model gains from beams is measured below.

# %% [markdown]
# ## Tokens are not text
#
# A token can be a word, a letter, or a single byte: a rare character is spelled in the bytes of UTF-8, and takes
# up to four tokens. Half of it is no text. Decoded too early, it shows as the mark `\ufffd`.

# %%
smile = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
[tokenizer.decode(smile[:count]) for count in (1, 2, 3, 4)]

# %% [markdown]
# A **stop string** is the other reason to wait. If the answer should end before `"; the "`, with its space behind, and the
# text so far ends in ";", we cannot show the semicolon yet. It may be the first piece of the stop string, or just a semicolon.
#
# So text is *settled* only when nothing that may come can change it. This class keeps the books.


# %%
# | export
class AnswerText:
    """The text of one answer while its tokens arrive.

    Text is *settled* when no later token can change it: no half of a character, no beginning of a stop string.

    Parameters
    ----------
    decode : callable
        Token ids to text.
    stop : sequence of str
        The answer ends before the first of these to be complete. Where two are complete at the same character,
        the longer one counts: the rule does not depend on how the text falls into tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode = decode
        self.stop = tuple(stop)
        self.text = ""
        self.stopped = False
        self._tokens: list[int] = []
        self._context, self._open = 0, 0  # tokens from _open on have no text yet; those from _context on stand before
        self._taken = 0  # characters that take() gave away

    def push(self, token: int) -> bool:
        """Take one more token; True if a stop string is complete now."""
        self._tokens.append(token)
        piece = self._new_text()
        if piece and not piece.endswith("\ufffd"):  # the mark of bytes that are no character, or not yet
            self._context, self._open = self._open, len(self._tokens)
            self._add(piece)
        return self.stopped

    def _new_text(self) -> str:
        """What the open tokens say behind those before them, which keep a leading space from being lost."""
        before = self.decode(self._tokens[self._context : self._open])
        return self.decode(self._tokens[self._context :])[len(before) :]

    def _add(self, piece: str) -> None:
        start = max(0, len(self.text) - max(map(len, self.stop), default=0))
        text = self.text + piece
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop, start)) >= 0]
        self.stopped = bool(found)
        self.text = text[: min(found)[1]] if found else text

    def take(self) -> str:
        """The settled text that was not taken yet."""
        piece = self.text[self._taken : len(self.text) - self._held()]
        self._taken += len(piece)
        return piece

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        if self.stopped:
            return 0
        end, settled = len(self.text), len(self.text)
        for stop in self.stop:  # the text is cut, not the stop string, which may be long; what was taken begins none
            starts = range(max(self._taken, end - len(stop) + 1), settled)
            settled = next((at for at in starts if stop.startswith(self.text[at:])), settled)
        return end - settled

    def finish(self) -> str:
        """The whole text, when no more tokens come: bytes that never became a character are marked U+FFFD."""
        if not self.stopped:
            self._add(self._new_text())
        self.stopped = True
        return self.text


# %% [markdown]
# Watch it at work. Token by token: what a reader of the stream has seen, what is held back, and what the stop
# string takes away.

# %%
pieces = [*tokenizer.encode("red star"), *smile, *tokenizer.encode(" two; there; the end")]
text = AnswerText(tokenizer.decode, stop=["; the "])
rows, shown = [], ""
for token in pieces:
    over = text.push(token)
    shown += text.take()
    rows.append((tokenizer.decode([token]), shown, text.text[len(shown) :]))
    if over:
        break
assert shown == text.finish() == "red star🙂 two; there"

# %%
figure, axis = plt.subplots(figsize=(7, 0.27 * len(rows) + 0.6))
for place, (piece, seen_text, held) in enumerate(rows):
    name = "byte" if piece == "\ufffd" else piece.replace(" ", "·")
    axis.text(
        0.0,
        -place,
        name,
        ha="center",
        va="center",
        size=9,
        color="white",
        family="monospace",
        bbox={"boxstyle": "round,pad=0.25", "facecolor": ANSWER, "edgecolor": "none"},
    )
    visible = seen_text.replace(" ", "·").replace("🙂", "☺")
    shown_text = axis.text(1.2, -place, visible, va="center", size=10, family="monospace")
    style = {"boxstyle": "square,pad=0.1", "facecolor": "0.9", "edgecolor": "0.6", "linestyle": ":"}
    if held:
        axis.annotate(
            held.replace(" ", "·"),
            (1.04, 0.5),
            xycoords=shown_text,
            va="center",
            size=10,
            family="monospace",
            color="0.35",
            bbox=style,
        )
axis.annotate("  the answer ends here", (1.0, 0.5), xycoords=shown_text, va="center", size=9, color="0.35")
axis.text(0.0, 1.0, "token", ha="center", size=10)
axis.text(1.2, 1.0, "shown so far, and what is held back", size=10)
axis.set(xlim=(-0.7, 6), ylim=(-len(rows) + 0.4, 1.5))
axis.axis("off")
save(figure, "13_stop")

# %% [markdown]
# *Figure: a row for each token. Words are shown at once. Three of four bytes of a smiley add nothing, the fourth
# shows it. A semicolon waits in a grey box until "there" follows, which is not the stop string: then both are
# shown. The second semicolon waits with "the"; one more token completes "; the ", and the answer ends without
# them.*
#
# Two rules keep stop strings honest. The one that is *complete* first wins, whatever the others might have
# become. And it does not matter how the text falls into tokens.
#
# ## Answers
#
# What is left is thin: run the loop, push tokens into texts. An answer carries its text, its tokens and their
# log-probabilities.


# %%
# | export
class Answer(NamedTuple):
    """An answer.

    Parameters
    ----------
    text : str
        Without stop token and stop string.
    tokens : list of int
        Every token the model took, the stop token or those of a stop string included.
    logprobs : list of float
        Of each token, as `Pick` has it: their sum is the log-probability of the whole answer.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]


# %%
# | export
def generate_answers(
    model: PaliGemma,
    batch: Batch,
    decode: Callable[[list[int]], str],
    *,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    allow: Allow | None = None,
    logprobs: bool = False,
) -> list[Answer]:
    """Answer every row of a batch, in text.

    Parameters
    ----------
    model, batch, max_new_tokens, sampling, stop_ids, allow, logprobs
        As in `generate_tokens`.
    decode : callable
        Token ids to text.
    num_beams, length_penalty
        As in `search_beams`; with one beam the answer is drawn or greedy, as `sampling` says.
    stop : sequence of str
        Strings that end an answer, left out of it.

    Raises
    ------
    ValueError
        If several beams are to be drawn: `check_beams`.
    """
    sampling = Sampling() if sampling is None else sampling
    check_beams(num_beams, length_penalty, sampling)
    texts = [AnswerText(decode, stop) for _ in batch.input_ids]
    if num_beams > 1:
        beams = search_beams(
            model,
            batch,
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            stop_ids=stop_ids,
            is_over=lambda tokens: any(end in decode(tokens) for end in stop),
            allow=allow,
        )
        ends = {model.config.eos_token_id} if stop_ids is None else set(stop_ids)
        for text, beam in zip(texts, beams):
            for token in beam.tokens:
                if token not in ends:  # only the last can be one
                    text.push(token)
        return [Answer(text.finish(), beam.tokens, beam.logprobs) for text, beam in zip(texts, beams)]
    answers = [Answer("", [], []) for _ in batch.input_ids]
    for picks in generate_tokens(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        is_over=lambda row, token: texts[row].push(token),
        allow=allow,
        logprobs=logprobs,
    ):
        for row, token, logprob in picks:
            answers[row].tokens.append(token)
            answers[row].logprobs.append(logprob)
    return [answer._replace(text=text.finish()) for text, answer in zip(texts, answers)]


# %%
# | export
def stream_answer(
    model: PaliGemma,
    batch: Batch,
    decode: Callable[[list[int]], str],
    *,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    allow: Allow | None = None,
) -> Iterator[str]:
    """Answer a batch of one row in pieces of settled text; joined, they are what `generate_answers` gives."""
    text = AnswerText(decode, stop)
    for _ in generate_tokens(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        is_over=lambda row, token: text.push(token),
        allow=allow,
    ):
        if piece := text.take():
            yield piece
    text.finish()
    if piece := text.take():
        yield piece


# %%
whole = generate_answers(model, together, tokenizer.decode, max_new_tokens=12)
pieces = list(stream_answer(model, batch, tokenizer.decode, max_new_tokens=12))
assert "".join(pieces) == generate_answers(model, batch, tokenizer.decode, max_new_tokens=12)[0].text
pieces

# %% [markdown]
# Nonsense in pieces, but the pieces join to the whole. A stop string ends one row, and leaves the others alone.

# %%
stop = whole[0].text[9:12]
stopped = generate_answers(model, together, tokenizer.decode, max_new_tokens=12, stop=[stop])
assert stopped[0].text == whole[0].text[: whole[0].text.find(stop)]
assert all(after.text == before.text for before, after in zip(whole, stopped) if stop not in before.text)
stop, stopped[0].text, whole[0].text

# %% [markdown]
# Two small things remain. People write one stop string, or several, or none.


# %%
# | export
def read_stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """One stop string, several or none, as a list.

    Raises
    ------
    ValueError
        If one is empty, or no string.
    """
    listed = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) and text for text in listed):
        raise ValueError(f"stop is {stop!r}: expected a string, or a list of strings, none of them empty")
    return list(listed)


# %% [markdown]
# And a checkpoint may list its stop tokens in `generation_config.json`, more than one if it
# likes. Some list them in `config.json` instead.


# %%
# | export
def read_stop_ids(folder: Path, eos_token_id: int) -> list[int]:
    """The stop tokens that `generation_config.json` lists, or `config.json`; the one given where both are silent.

    Raises
    ------
    ValueError
        If a file is not JSON, or its `eos_token_id` is neither a token id nor a list of them.
    RuntimeError
        If a file is there and cannot be opened.
    """
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        values = read_json(path) if path.exists() else {}
        for part in (values, values.get("text_config")):
            listed = part.get("eos_token_id") if isinstance(part, dict) else None
            if listed is not None:
                ids = listed if isinstance(listed, list) else [listed]
                if not ids or not all(type(token) is int and token >= 0 for token in ids):
                    raise ValueError(
                        f"{path}: eos_token_id is {listed!r}: expected a token id, 0 or more, or a list of them"
                    )
                return ids
    return [eos_token_id]


# %% [markdown]
# ## A look inside
#
# How sure is a model of what it says? We take a scene and the caption that the pocket model (or the one in
# `SIGMA_BOOK_MODEL`) gives it, read the caption once more as a suffix, and ask at each place for the two likeliest
# tokens.

# %%
trained = load(os.environ.get("SIGMA_BOOK_MODEL"))
speak = trained.processor.tokenizer.decode
picture = draw_scene(make_scene(97_000_011))
asked = trained.processor.prepare([picture], ["caption en"])
[said] = generate_answers(trained, asked, speak, max_new_tokens=40)
with torch.no_grad():
    ids = torch.cat([asked.input_ids, torch.tensor([said.tokens])], dim=1)
    types = torch.cat([asked.token_type_ids, torch.ones(1, len(said.tokens), dtype=torch.long)], dim=1)
    scores = trained(ids, asked.pixel_values, torch.ones_like(ids), types)[0, -len(said.tokens) - 1 : -1].float()
shares, tokens = scores.softmax(-1).topk(2)  # (T, 2)
assert tokens[:, 0].tolist() == said.tokens  # greedy: each was the likeliest at its place
said.text


# %%
def shown(token: int) -> str:
    return speak([token], skip_special_tokens=False).replace(" ", "·").replace("\n", "↵")


figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 2.9), width_ratios=(1, 3.6))
left.imshow(picture)
left.axis("off")
sure = shares[:, 0].tolist()
right.bar(range(len(sure)), sure, color=[ANSWER if share > 0.9 else GREY for share in sure], width=0.75)
for place, share in enumerate(sure):
    if share <= 0.9:
        other = f"or {shown(int(tokens[place, 1]))}: {float(shares[place, 1]):.2f}"
        right.text(place, share + 0.03, other, ha="center", size=8)
right.set_xticks(range(len(sure)), [shown(token) for token in said.tokens], rotation=60, ha="right", size=8)
right.set(ylabel="probability", ylim=(0, 1.1))
save(figure, "13_sure")

# %% [markdown]
# *Figure: a drawn scene, and a bar for each token of the pocket model's caption. Most bars reach 1. Two are lower, in grey:
# at the number of diamonds, and behind the diamonds, where it might go on with a comma. The second best token is written
# over each.*
#
# The pocket model knows nearly every word for certain. It hesitates where the number of diamonds is due, and there it
# is wrong: of the three, one is green. So a low bar is a good place to doubt an answer.
#
# And beams? The same thirty captions, greedy and with three beams:

# %%
scenes = [make_scene(seed) for seed in range(97_000_000, 97_000_030)]
asked = trained.processor.prepare([draw_scene(scene) for scene in scenes], ["caption en"] * len(scenes))
by_width = {width: generate_answers(trained, asked, speak, max_new_tokens=40, num_beams=width) for width in (1, 3)}
for width, answers in by_width.items():
    right_ones = sum(answer.text == caption(scene) for answer, scene in zip(answers, scenes))
    mean = sum(sum(answer.logprobs) / len(answer.logprobs) for answer in answers) / len(answers)
    print(f"{width} beams: {right_ones} of {len(scenes)} right, log-probability for each token {mean:.4f}")
print("answers that differ:", sum(one.text != other.text for one, other in zip(*by_width.values())))

# %% [markdown]
# Where a model is sure, the first beam wins at every step, and three beams do three times the arithmetic for nothing (the
# bill below says what that costs in time). One answer differs, that of the figure above: beams find one that is likelier,
# and it is wrong too. Likely is not true.
#
# Free captions of photographs are another matter: there many sentences are about equally good. PaliGemma's published score
# for the captions of COCO, a public set of photographs with five captions each (chapter 15), was reached with two beams,
# compared by their plain sums: `length_penalty=0`.

# %% [markdown]
# ## The bill
#
# Parameters: none. FLOPs: about two for each weight of the decoder and each token. But at batch size 1 it is
# neither of these that sets the pace. To make one token, *every* weight of the decoder is fetched from memory
# once, used for one multiplication and one addition, and forgotten.

# %%
with torch.device("meta"):  # shapes without memory
    pocket = PaliGemma(POCKET)
    large = PaliGemma(
        PaliGemmaConfig(
            SiglipConfig(1152, 4304, 27, 16, image_size=224, patch_size=14),
            GemmaConfig(2048, 16384, 18, 8, 1, 256, vocab_size=257216),
        )
    )
assert count_parameters(large) == 2_923_466_480
read_each_step = {
    "pocket, 32 bits": 4 * count_parameters(pocket.language_model),
    "3B, 32 bits": 4 * count_parameters(large.language_model),
    "3B, 16 bits": 2 * count_parameters(large.language_model),  # the embedding counts: it is the head
}
assert read_each_step["3B, 16 bits"] == 5017325568
{name: f"{count / 1e6:,.1f} MB" for name, count in read_each_step.items()}

# %% [markdown]
# Five gigabytes for one token. So the pace has a bound: how many bytes a second the memory delivers, divided by
# that number. No cleverness in the arithmetic can lift it. Let us measure the memory of this machine, with a
# matrix too large for any cache of the processor, times a vector.

# %%
matrix, vector = torch.ones(64_000, 1024), torch.ones(1024)  # 262 MB
matrix @ vector
seconds = []
for _ in range(5):
    start = time.perf_counter()
    matrix @ vector
    seconds.append(time.perf_counter() - start)
bandwidth = 4 * matrix.numel() / min(seconds)  # bytes a second
print(f"this machine reads {bandwidth / 1e9:.1f} GB/s, so at best")
for name, count in read_each_step.items():
    print(f"{name:>16}: {bandwidth / count:8.1f} tokens/s")
del matrix

# %% [markdown]
# That is also why batches are cheap: eight rows share one reading of the weights. What each row adds is its own
# cache, small thanks to chapter 06.

# %%
cache_per_token = 2 * 18 * 1 * 256 * 2  # keys and values, layers, one head of 256, 2 bytes each
assert cache_per_token == 18_432
tokens_seen = 256 + 44
for rows in (1, 8, 64):
    total = read_each_step["3B, 16 bits"] + rows * tokens_seen * cache_per_token
    print(f"{rows:3} rows: {total / 1e9:.2f} GB a step, {total / rows / 1e6:7.0f} MB for each token")
assert 64 * tokens_seen * cache_per_token < 0.08 * read_each_step["3B, 16 bits"]

# %% [markdown]
# Beams share the reading of the weights too, as rows of a batch do. But each is a row of cache, and at each step their
# caches are copied: three beams at 300 tokens move twice 3 x 300 x 18,432 bytes, 33 MB, beside the five gigabytes.

# %%
assert 2 * 3 * tokens_seen * cache_per_token == 33_177_600

# %% [markdown]
# And our bending of the bar? For 3B, a row of scores is about one megabyte, 257,216 numbers of four bytes. Even
# sorted it is small beside five thousand. What lifts the bound is fewer bytes for each weight: chapter 21b multiplies
# straight from eight and four bits. (Chapter 19 stores four bits too, but makes the full matrix anew at each use: that saves
# room, not time.)

# %%
assert read_each_step["3B, 16 bits"] > 4000 * (4 * 257_216)

# %% [markdown]
# ## Your turn
#
# **1.** ★ How many choices does a bar really offer? Its *perplexity* says: e to the power of the entropy, where
# the entropy is minus the sum of p ln p. Four equal stretches give 4; one that fills the bar gives 1.


# %%
def choices(shares: list[float]) -> float: ...


check(choices, (([0.25] * 4,), 4.0), (([1.0, 0.0],), 1.0), (([0.5, 0.5, 0.0],), 2.0))

# %% [markdown]
# **2.** ★ Another way to cut the tail, *min-p*: keep a token if its stretch is at least p times the longest one.
# Give the ids of the kept ones, smallest first.


# %%
def keep_min_p(shares: list[float], p: float) -> list[int]: ...


check(
    keep_min_p, (([0.5, 0.3, 0.15, 0.05], 0.25), [0, 1, 2]), (([0.1, 0.8, 0.1], 0.2), [1]), (([0.5, 0.5], 1.0), [0, 1])
)

# %% [markdown]
# **3.** ★★ Where does the text end? Give it up to the first stop string to be complete; of two complete at the
# same character, the longer counts.


# %%
def until(text: str, stops: list[str]) -> str: ...


check(
    until,
    (("a red star. And", ["."]), "a red star"),
    (("abcdef", ["abcde", "c"]), "ab"),
    (("abcdef", ["c", "abc"]), ""),
    (("no end", ["x"]), "no end"),
)

# %% [markdown]
# **4.** ★★★ A stricter cure for circles: say no n tokens in a row twice. Which tokens are forbidden next? Give their
# ids, smallest first. (With `allow` you can try it on the model.)


# %%
def forbidden(tokens: list[int], n: int) -> list[int]: ...


check(
    forbidden,
    (([1, 2, 3, 1, 2], 3), [3]),
    (([1, 4, 1, 2, 1], 2), [2, 4]),
    (([7, 7], 1), [7]),
    (([7, 7], 2), [7]),
    (([7], 2), []),
)

# %% [markdown]
# **5.** ★★ How many tokens a second can a memory of so many bytes a second give at most, over all rows of a
# batch? `weights` are the bytes of the weights, `cache` the bytes of one row's cache.


# %%
def most_tokens(bandwidth: float, weights: float, rows: int, cache: float) -> float: ...


check(most_tokens, ((100e9, 5e9, 1, 0.0), 20.0), ((100e9, 4e9, 10, 1e8), 200.0))

# %% [markdown]
# Next: some answers are not words at all. Chapter 14 reads the tokens that name places in the picture.
