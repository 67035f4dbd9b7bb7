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
# # Positions by rotation
#
# *How does a token know how far away another one is?*
#
# **You build** rotary position embeddings. **You need** chapter 03 (attention).
# **Exports** the module `sigma_book.rope`.

# %%
# | export
import torch

# %%
import math
import os

import matplotlib.pyplot as plt
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding, apply_rotary_pos_emb

from sigma_book import load
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# Attention compares a query with keys, whatever their order. "Dog bites man" and "man bites dog" would be the same to
# it. The eyes add a learned vector to each patch (chapter 02). Gemma, the part that speaks, does something else: it
# *turns* queries and keys, by an angle that grows with the position.
#
# Think of the hands of a clock. Two tokens, three steps apart, have hands three ticks apart, at noon as in the evening.

# %%
figure, axes = plt.subplots(1, 2, figsize=(5.4, 2.6))
for axis, first in zip(axes, (1, 7), strict=True):
    axis.add_patch(plt.Circle((0, 0), 1, fill=False, ec=GREY))
    for position, colour, name in ((first, PROMPT, "query"), (first + 3, ANSWER, "key")):
        angle = 0.4 * position
        x, y = math.cos(angle), math.sin(angle)
        axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
        axis.text(1.25 * x, 1.2 * y, f"{name}\nat {position}", ha="center", va="center", fontsize=8, color=colour)
    axis.set(xlim=(-1.6, 1.6), ylim=(-1.5, 1.5), aspect="equal")
    axis.axis("off")
save(figure, "05_clock")
plt.show()

# %% [markdown]
# *Figure: two clocks. The left one has a query at position 1 and a key at 4, the right one 7 and 10. The hands moved,
# the angle between them did not.*
#
# ## First by hand
#
# A vector of two numbers, turned by an angle. This is school geometry.


# %%
def turn(x: float, y: float, angle: float) -> tuple[float, float]:
    return x * math.cos(angle) - y * math.sin(angle), y * math.cos(angle) + x * math.sin(angle)


def dot(one, other):
    return one[0] * other[0] + one[1] * other[1]


query, key = (1.0, 0.3), (0.5, 0.8)
near = dot(turn(*query, 0.4 * 1), turn(*key, 0.4 * 4))
far = dot(turn(*query, 0.4 * 101), turn(*key, 0.4 * 104))
assert abs(near - far) < 1e-12
near, far

# %% [markdown]
# The dot product at positions 1 and 4 is the one at 101 and 104. Only the difference counts.
#
# With one speed, a hand comes round again: after some 16 steps of 0.4 the angle repeats, and position 17 looks like
# position 1. So a head of $D_h$ numbers has $D_h / 2$ hands, from fast to very slow, like seconds, minutes and hours.


# %%
def rotate_naive(vector: list[float], position: int, theta: float = 10_000.0) -> list[float]:
    width = len(vector)
    turned = [0.0] * width
    for i in range(width // 2):
        angle = position * theta ** (-2 * i / width)
        turned[i], turned[i + width // 2] = turn(vector[i], vector[i + width // 2], angle)
    return turned


[round(number, 3) for number in rotate_naive([1.0, 1.0, 0.0, 0.0], position=1)]

# %% [markdown]
# Number $i$ is paired with number $i + D_h/2$. The first pair turned by a whole radian, the second by a hundredth:

# %%
turned_once = rotate_naive([1.0, 1.0, 0.0, 0.0], position=1)
assert math.isclose(math.atan2(turned_once[2], turned_once[0]), 1.0)
assert math.isclose(math.atan2(turned_once[3], turned_once[1]), 0.01)

# %% [markdown]
# ## The formula
#
# $$ \begin{pmatrix} x_i' \\ x_{i + D_h/2}' \end{pmatrix} =
# \begin{pmatrix} \cos m\theta_i & -\sin m\theta_i \\ \sin m\theta_i & \cos m\theta_i \end{pmatrix}
# \begin{pmatrix} x_i \\ x_{i + D_h/2} \end{pmatrix}, \qquad \theta_i = 10000^{-2i/D_h} $$
#
# $m$ is the position; the code calls the 10000 `theta`. Write $R_m$ for the turn at position $m$. In a dot product one
# may turn both vectors back by the same angle, since a turn changes neither lengths nor the angle between two vectors.
# Turn back by $R_a$, and only the difference is left:
#
# $$ (R_a\, q) \cdot (R_b\, k) = q \cdot (R_{b-a}\, k) $$
#
# ## The tensor version
#
# The angles depend on positions alone. They are computed once for all layers.


# %%
# | export
def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines by which a query or key at each position is turned.

    Parameters
    ----------
    positions : torch.Tensor
        (B, T), integers.
    head_dim : int
        Dh, even. Pair i turns by position * theta ** (-2 i / Dh).
    theta : float
        The base: the larger, the slower the slowest pair.

    Returns
    -------
    tuple of torch.Tensor
        Cosine and sine, float32, each (B, 1, T, Dh / 2).

    Raises
    ------
    ValueError
        If `head_dim` is odd.

    References
    ----------
    Su et al. 2021, "RoFormer", section 3.2.
    """
    if head_dim % 2:
        raise ValueError(f"rotation needs pairs of dimensions, got an odd head_dim {head_dim}")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float()
    frequencies = 1.0 / (theta ** (pairs / head_dim))  # (Dh/2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, Dh/2)
    return angles.cos(), angles.sin()


# %%
# | export
def rotate(vectors: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys (B, H, T, Dh): dimension i is paired with i + Dh/2, the half-split layout.

    `cosine` and `sine` come from `rotary_angles`; the result has the dtype of `vectors`.
    """
    first, second = vectors.float().chunk(2, dim=-1)  # (B, H, T, Dh/2)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(vectors.dtype)


# %% [markdown]
# ## Proof
#
# It equals the naive version, pair by pair.

# %%
vectors = torch.randn(1, 1, 6, 8)
positions = torch.tensor([[1, 2, 3, 50, 700, 8000]])
turned = rotate(vectors, *rotary_angles(positions, 8))
by_hand = [rotate_naive(vectors[0, 0, t].tolist(), int(positions[0, t])) for t in range(6)]
torch.testing.assert_close(turned[0, 0], torch.tensor(by_hand), atol=1e-3, rtol=1e-3)

# %% [markdown]
# (At position 8,000 the naive version counts in 64 bits and ours in 32, so the tolerance is wide. We come back to that.)
#
# It equals Gemma in `transformers`, which counts in 32 bits too.

# %%
reference = GemmaRotaryEmbedding(GemmaConfig(head_dim=8, hidden_size=8, num_attention_heads=1))
expected, _ = apply_rotary_pos_emb(vectors, vectors, *reference(vectors, positions))
torch.testing.assert_close(turned, expected)

# %% [markdown]
# And the claim of this chapter, for a whole head of 256 numbers: shift both tokens, and the score stays. Turn the key by
# the difference alone, and the score is the same again. Change the difference, and it changes.

# %%
query, key = torch.randn(2, 1, 1, 1, 256, dtype=torch.float32)


def score(query_at: int, key_at: int) -> float:
    turned_query = rotate(query, *rotary_angles(torch.tensor([[query_at]]), 256))
    turned_key = rotate(key, *rotary_angles(torch.tensor([[key_at]]), 256))
    return (turned_query * turned_key).sum().item()


size = (query.norm() * key.norm()).item()
for shift in (1, 10, 1000):
    assert abs(score(20, 5) - score(20 + shift, 5 + shift)) < 1e-4 * size  # rounding of angles up to 1,020
assert abs(score(20, 5) - score(0, -15)) < 1e-5 * size  # q turned by 0, k by b - a
assert abs(score(20, 5) - score(20, 6)) > 1e-3 * size

# %% [markdown]
# ## Near is loud
#
# If query and key are the same vector, the score is largest at distance 0 and falls as the hands come apart. Slow
# hands keep a memory of far tokens. How it falls depends on how long the vector is in each pair. Here all are equally long.

# %%
distance = torch.arange(0, 400)
cosine, _ = rotary_angles(distance[None], 256)
figure, axis = plt.subplots(figsize=(6, 2.7))
for name, curve, colour, place, lift in (
    ("pair 40", cosine[0, 0, :, 40], GREY, 222, 4),
    ("pair 70", cosine[0, 0, :, 70], PROMPT, 120, 5),
    ("all 128 pairs", cosine[0, 0].mean(-1), PICTURE, 272, 6),
):
    axis.plot(distance, curve, color=colour, lw=2 if colour == PICTURE else 0.8)
    axis.annotate(name, (place, curve[place]), xytext=(4, lift), textcoords="offset points", fontsize=9, color=colour)
axis.set(xlabel="tokens apart", ylabel="score / size", ylim=(-1.1, 1.25))
save(figure, "05_near")
plt.show()
assert cosine[0, 0, 0].mean() == 1 and cosine[0, 0, 100].mean() < 0.7

# %% [markdown]
# *Figure: the thick line is the score of a vector with itself, by distance, if all its pairs are equally long: high at 0, then
# falling. The thin lines are two single pairs: pair 40 swings several times, pair 70 has not come round once.* A head that puts
# all its length into one pair would see that pair's line instead: learning may use both.
#
# ## Two layouts
#
# Papers pair neighbours: 0 with 1, 2 with 3 (*interleaved*). Gemma's files pair $i$ with $i + D_h/2$ (*half-split*).
# Both are the same idea; only the order of the numbers differs. Mixing them up gives a model that speaks fluent
# nonsense, so the difference deserves a function.


# %%
# | export
def half_split_order(head_dim: int) -> torch.Tensor:
    """Indices (Dh,) that reorder interleaved dimensions (0 with 1, 2 with 3, ...) to the half-split layout."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))


# %%
def rotate_interleaved(vectors, cosine, sine):
    first, second = vectors[..., 0::2], vectors[..., 1::2]
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-1).flatten(-2)


order = half_split_order(8)
angles = rotary_angles(positions, 8)
there = rotate(vectors[..., order], *angles)
here = rotate_interleaved(vectors, *angles)[..., order]
torch.testing.assert_close(there, here)
order.tolist()

# %% [markdown]
# Reordering first and rotating in halves is rotating neighbours and reordering after. Since a score is a sum over all
# numbers, their order is free, as long as queries and keys share it.
#
# ## Why float32
#
# Weights often come in bfloat16, a format of 16 bits of which 7 hold the digits behind the first. Whole numbers up to 256
# fit. 257 does not: it becomes 256. PaliGemma counts from 1 and has 256 picture tokens, so the last patch and the first
# token of the text would stand at one place.

# %%
assert torch.tensor(257.0).bfloat16() == torch.tensor(256.0).bfloat16() == 256
assert torch.tensor(8001.0).bfloat16() == torch.tensor(8000.0).bfloat16()  # and the farther, the coarser

# %% [markdown]
# What that does to a score: two tokens, always three apart, moved from the start of a text to its end. The score ought
# to be a flat line.

# %%
places = torch.arange(1, 8000, 39)  # 39 shares no divisor with the steps of bfloat16, so all remainders occur
same = torch.ones(1, 1, len(places), 256)  # queries and keys all alike: what varies comes from the angles


def scores_by_place(kind: torch.dtype) -> torch.Tensor:
    frequencies = 10_000.0 ** (-torch.arange(0, 256, 2) / 256)
    turned = []
    for at in (places, places + 3):
        angles = at[:, None].to(kind) * frequencies.to(kind)  # the product is rounded to `kind` as well
        turned.append(rotate(same, angles.double().cos().float(), angles.double().sin().float()))
    return (turned[0] * turned[1]).sum(-1)[0, 0] / 256


wide, narrow = scores_by_place(torch.float32), scores_by_place(torch.bfloat16)
figure, axis = plt.subplots(figsize=(6, 2.5))
axis.plot(places, narrow, color=GREY, lw=0.8)
axis.plot(places, wide, color=PICTURE, lw=2)
axis.annotate(
    "angles in float32", (7900, wide[-1]), (7900, 0.25), ha="right", color=PICTURE, arrowprops={"arrowstyle": "-"}
)
axis.annotate("angles in bfloat16", (7900, 1.04), ha="right", color=GREY)
axis.set(xlabel="position of the query; the key is three further", ylabel="score / size", ylim=(-0.05, 1.15))
save(figure, "05_float")
plt.show()
assert wide.max() - wide.min() < 1e-3
far = narrow[places > 2048]
assert far.min() < 0.6 and (far > 0.99).float().mean() > 0.8

# %% [markdown]
# *Figure: in float32 the line is flat. In bfloat16 the score jumps about with the place. Beyond position 2,048 it is mostly
# 1, as if the two tokens stood at one place. Where the rounding puts them on two neighbouring places, it drops to half, as if
# they stood far apart.*
#
# So angles are computed in float32, whatever the weights' *dtype* (the kind of number they are kept in); queries and keys are
# turned in float32 and rounded back once, at the end. Float32 is not exact either. Pair 1 has turned by 7,622 radians at
# position 8,191. There, half of the last digit is 0.00024, and the rounding of the pair's speed comes on top.

# %%
exact = torch.cos(torch.arange(8192, dtype=torch.float64) * 10_000.0 ** (-2 / 256))  # pair 1
error = (rotary_angles(torch.arange(8192)[None], 256)[0][0, 0, :, 1] - exact).abs()
assert error[:100].max() < 1e-5 and error.max() < 1e-3
error[:100].max().item(), error.max().item()

# %% [markdown]
# ## A look inside
#
# If only differences count, then we may tell a taught model that its text begins at position 1,001 instead of 1, and it
# must say the same. If we tell it that all tokens stand at one place, or stand in reverse, it must not.
#
# (How picture and prompt get in is chapters 09 to 11. Here only `positions` matters.)

# %%
# float32 on the CPU, so that rounding stays small whatever the file and the machine
model = load(os.environ.get("SIGMA_BOOK_MODEL"), device="cpu", dtype="float32")
batch = model.processor.prepare([draw_scene(make_scene(5))], ["caption en"])
decoder = model.language_model
with torch.no_grad():
    embeddings = model.embed(batch.input_ids, model.encode_images(batch.pixel_values))  # (1, T, D)
    count = embeddings.shape[1]
    whole = {window: torch.ones(1, 1, count, count, dtype=torch.bool) for window in decoder.windows()}

    def last_scores(positions: torch.Tensor) -> torch.Tensor:
        return model.logits(decoder(embeddings, positions[None], whole)[0, -1])

    usual = torch.arange(1, count + 1)
    expected = last_scores(usual)
    moved = {
        "shifted by 1,000": last_scores(usual + 1000),
        "all at one place": last_scores(torch.ones_like(usual)),
        "in reverse": last_scores(usual.flip(0)),
    }
change = {name: ((scores - expected).abs().max() / expected.abs().max()).item() for name, scores in moved.items()}
assert change["shifted by 1,000"] < 1e-3 < 1e-2 < min(change["all at one place"], change["in reverse"])
{name: f"{value:.1e}" for name, value in change.items()}

# %% [markdown]
# The largest change of a score, as a part of the largest score. Shifting is rounding. The other two change what the
# model says.
#
# ## The bill
#
# No parameters. A pair costs four multiplications and two additions, so a number costs three operations. That is for
# each number of each query and key, and nothing beside the maps that make them.


# %%
def operations(heads: int, kv_heads: int, head_dim: int, width: int) -> tuple[int, int]:
    numbers = (heads + kv_heads) * head_dim  # of the queries and keys of one token in one layer
    return 3 * numbers, 2 * numbers * width  # turning them, making them


for name, sizes in (("pocket", (4, 2, 64, 192)), ("3B", (8, 1, 256, 2048))):
    turning, making = operations(*sizes)
    print(f"{name}: {turning:,} operations to turn, {making:,} to make: one in {making / turning:,.0f}")
assert operations(8, 1, 256, 2048) == (6_912, 9_437_184)
assert operations(4, 2, 64, 192) == (1_152, 147_456)

# %% [markdown]
# And bytes: cosine and sine for a text of 8,192 tokens, made once and used by all layers.

# %%
angles = rotary_angles(torch.arange(8192)[None], 256)
assert sum(part.nbytes for part in angles) == 2 * 8192 * 128 * 4 == 8_388_608

# %% [markdown]
# ## Your turn
#
# **1.** ★ After how many positions does pair `i` of a head of `d` numbers come round (a full circle, rounded)?


# %%
def full_circle(i: int, d: int) -> int: ...


check(full_circle, ((0, 256), 6), ((64, 256), 628), ((127, 256), round(2 * math.pi * 10_000 ** (254 / 256))))

# %% [markdown]
# **2.** ★★ Undo the rotation.


# %%
def unrotate(turned: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor: ...


angles = rotary_angles(positions, 8)
check(unrotate, ((rotate(vectors, *angles), *angles), vectors))

# %% [markdown]
# **3.** ★★ The inverse of `half_split_order`: indices that bring the half-split layout back to neighbours.


# %%
def neighbour_order(head_dim: int) -> torch.Tensor: ...


check(neighbour_order, ((4,), torch.tensor([0, 2, 1, 3])), ((8,), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])))

# %% [markdown]
# **4.** ★★ Position interpolation: a model taught on texts of up to `taught` tokens shall read one of `length`. Give
# the positions of its tokens, from 0, each multiplied by `taught / length`, so that the last one stays below `taught`. A
# text that is short enough keeps its own. (Rotation takes any real number.)


# %%
def squeezed(length: int, taught: int) -> list[float]: ...


check(squeezed, ((4, 4), [0.0, 1.0, 2.0, 3.0]), ((4, 2), [0.0, 0.5, 1.0, 1.5]), ((2, 4), [0.0, 1.0]))

# %% [markdown]
# Next: eight heads ask. Must eight heads also answer?
