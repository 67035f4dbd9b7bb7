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

import matplotlib.pyplot as plt

from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# Attention compares a query with keys, whatever their order. "Dog bites man" and "man bites dog" would be the same to
# it. The eyes of chapter 04 added a learned vector to each patch. Gemma does something else: it *turns* queries and
# keys, by an angle that grows with the position.
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
# *Left, a query at position 1 and a key at 4. Right, 7 and 10. The hands moved, the angle between them did not.*
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
# Number $i$ is paired with number $i + D_h/2$. The first pair turned by a whole radian, the second by a hundredth.
#
# ## The formula
#
# $$ \begin{pmatrix} x_i' \\ x_{i + D_h/2}' \end{pmatrix} =
# \begin{pmatrix} \cos m\theta_i & -\sin m\theta_i \\ \sin m\theta_i & \cos m\theta_i \end{pmatrix}
# \begin{pmatrix} x_i \\ x_{i + D_h/2} \end{pmatrix}, \qquad \theta_i = 10000^{-2i/D_h} $$
#
# $m$ is the position. Why only differences count: turning by $a$ and then by $-b$ is turning by $a - b$, so
# $(R_a q) \cdot (R_b k) = q \cdot (R_{b-a}\, k)$.
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
# (At position 8,000 the naive version counts in 64 bits and ours in 32. We come back to that.)
#
# It equals Gemma in `transformers`.

# %%
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding, apply_rotary_pos_emb

reference = GemmaRotaryEmbedding(GemmaConfig(head_dim=8, hidden_size=8, num_attention_heads=1))
expected, _ = apply_rotary_pos_emb(vectors, vectors, *reference(vectors, positions))
torch.testing.assert_close(turned, expected)

# %% [markdown]
# And scores depend on differences only, for a whole head of 256 numbers.

# %%
query, key = torch.randn(2, 1, 1, 1, 256, dtype=torch.float32)


def score(query_at: int, key_at: int) -> float:
    turned_query = rotate(query, *rotary_angles(torch.tensor([[query_at]]), 256))
    turned_key = rotate(key, *rotary_angles(torch.tensor([[key_at]]), 256))
    return (turned_query * turned_key).sum().item()


size = (query.norm() * key.norm()).item()
for shift in (1, 10, 1000):
    assert abs(score(20, 5) - score(20 + shift, 5 + shift)) < 1e-4 * size

# %% [markdown]
# ## A look inside: near is loud
#
# If query and key are the same vector, the score is largest at distance 0 and falls as the hands come apart. Slow
# hands keep a memory of far tokens.

# %%
distance = torch.arange(0, 400)
cosine, _ = rotary_angles(distance[None], 256)
figure, axis = plt.subplots(figsize=(6, 2.5))
axis.plot(distance, cosine[0, 0].mean(-1), color=PICTURE, lw=2)
axis.annotate(
    "all 128 pairs", (150, cosine[0, 0, 150].mean()), xytext=(0, 12), textcoords="offset points", color=PICTURE
)
for pair, colour in ((40, GREY), (70, PROMPT)):
    axis.plot(distance, cosine[0, 0, :, pair], color=colour, lw=0.8)
    axis.annotate(f"pair {pair}", (390, cosine[0, 0, 390, pair]), fontsize=8, color=colour, va="bottom")
axis.set(xlabel="tokens apart", ylabel="score / size", ylim=(-1.05, 1.1))
save(figure, "05_near")
plt.show()
assert cosine[0, 0, 0].mean() == 1 and cosine[0, 0, 100].mean() < 0.7

# %% [markdown]
# *The thick line is the score of a vector with itself, by distance: high at 0, then falling. The thin lines are two
# single pairs: one swings several times, the other hardly moves.*
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
# Positions go up to 8,192. In bfloat16 a number has 8 significant bits: 8,000 and 8,001 are the same.

# %%
assert torch.tensor(8000.0).bfloat16() == torch.tensor(8001.0).bfloat16()
place = torch.tensor([8001.0])
exact = torch.cos(place.double())
error = {
    str(kind): (torch.cos(place.to(kind)).double() - exact).abs().item() for kind in (torch.float32, torch.bfloat16)
}
assert error["torch.float32"] < 1e-3 < 0.05 < error["torch.bfloat16"]
error

# %% [markdown]
# So angles are computed in float32, whatever the dtype of the weights, and the result is cast back.
#
# ## The bill
#
# No parameters. Three multiplications or so for each number of each query and key: nothing beside the maps around it.

# %%
heads, kv_heads, width, head_dim = 8, 1, 2048, 256
rotation = 4 * (heads + kv_heads) * head_dim
maps = 2 * (heads + kv_heads) * head_dim * width
assert maps / rotation == width / 2 == 1024

# %% [markdown]
# A thousandth of the cost of making the queries and keys.
#
# ## Your turn
#
# **1.** After how many positions does pair `i` of a head of `d` numbers come round (a full circle, rounded)?


# %%
def full_circle(i: int, d: int) -> int: ...


check(full_circle, ((0, 256), 6), ((64, 256), 628), ((127, 256), round(2 * math.pi * 10_000 ** (254 / 256))))

# %% [markdown]
# **2.** Undo the rotation.


# %%
def unrotate(turned: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor: ...


check(unrotate, ((turned, *rotary_angles(positions, 8)), vectors))

# %% [markdown]
# **3.** The inverse of `half_split_order`: indices that bring the half-split layout back to neighbours.


# %%
def neighbour_order(head_dim: int) -> torch.Tensor: ...


check(neighbour_order, ((4,), torch.tensor([0, 2, 1, 3])), ((8,), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])))

# %% [markdown]
# Next: eight heads ask. Must eight heads also answer?
