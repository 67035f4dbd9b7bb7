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
# # Attention
#
# *How can each token take from the others just what it needs?*
#
# **You build** attention, from one query by hand to many heads. **You need** chapter 02 (patches).
# **Exports** the module `sigma_book.attention`.

# %%
# | export
import torch
from torch import nn
from torch.nn import functional as F

# %%
import math
import os

import matplotlib.pyplot as plt
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipAttention

from sigma_book import load
from sigma_book.processor import pixels
from sigma_book.style import PICTURE, check, draw_matrix, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A patch in the middle of a star sees one colour and no edge. To know that it is part of a star it must ask its
# neighbours. Each token asks with a *query*. Each token also offers a *key*, which says what it has, and a *value*,
# which is what it gives. Where query and key agree, much of the value flows.

# %%
figure, axis = plt.subplots(figsize=(6.0, 2.4))
agreement = [0.9, 0.1, 0.6]
for place, (name, strength) in enumerate(zip(("edge", "sky", "tip"), agreement, strict=True)):
    axis.annotate(
        "",
        (1, 1),
        (3, 2 - place),
        arrowprops={"arrowstyle": "-|>", "lw": 6 * strength, "color": PICTURE, "shrinkA": 22, "shrinkB": 26},
    )
    axis.text(3, 2 - place, name, ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": PICTURE})
    axis.text(3.6, 2 - place, f"key agrees: {strength}", va="center", fontsize=9)
axis.text(1, 1, "asking\npatch", ha="center", va="center", bbox={"boxstyle": "round", "fc": "#e8f1f8", "ec": PICTURE})
axis.set(xlim=(0.4, 5), ylim=(-0.5, 2.5))
axis.axis("off")
save(figure, "03_ask")
plt.show()

# %% [markdown]
# *Figure: one patch asks three others, an edge, a sky and a tip. Each arrow is as thick as query and key agree.*
#
# ## One query, by hand
#
# Three tokens, each with a key and a value of two numbers. One query.

# %%
query = [1.0, 0.0]
keys = [[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]
values = [[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]]

scores = [sum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
scores

# %% [markdown]
# The dot product is large where query and key point the same way: the first token agrees most.
#
# Scores become shares that add up to 1. Take the exponential of each, divide by the sum: this is the *softmax*.

# %%
powers = [math.exp(score) for score in scores]
shares = [power / sum(powers) for power in powers]
assert abs(sum(shares) - 1) < 1e-12

answer = [sum(share * value[i] for share, value in zip(shares, values, strict=True)) for i in range(2)]
[round(share, 3) for share in shares], [round(number, 3) for number in answer]

# %% [markdown]
# The answer lies near the first value, with a little of the others mixed in.
#
# ## Why the scores are divided
#
# With more dimensions, dot products of random vectors grow: their spread is the square root of the number of
# dimensions $D_h$. Large scores make the softmax take one token and ignore the rest, and then it learns nothing more.

# %%
for width in (4, 64, 1024):
    dots = (torch.randn(2000, width) * torch.randn(2000, width)).sum(-1)
    print(f"{width:5d} dimensions: spread {dots.std():6.2f}, divided by the root {dots.std() / width**0.5:.2f}")
    assert abs(dots.std() / width**0.5 - 1) < 0.15

# %% [markdown]
# So scores are divided by $\sqrt{D_h}$. A second point is safety: `exp(1000)` is infinite. Taking the largest score
# away from all of them changes no share, and keeps every exponent at 0 or below.

# %%
large = torch.tensor([1000.0, 999.0, 0.0])
unsafe = large.exp() / large.exp().sum()
safe = (large - large.max()).exp() / (large - large.max()).exp().sum()
assert unsafe.isnan().any() and not safe.isnan().any()
torch.testing.assert_close(safe, large.softmax(-1))
safe

# %% [markdown]
# ## The naive version
#
# The tensors hold many such rows at once: one for each picture of the batch, and in it one for each *head*, a set of queries,
# keys and values of its own. (Why there are several, we see below.) For every head and every query, the steps from above.
# A mask may forbid some pairs.


# %%
def attention_naive(query, key, value, mask=None):
    output = torch.zeros_like(query)
    batch, heads, length, width = query.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                scores = []
                for s in range(key.shape[2]):
                    score = sum(query[b, h, t, i] * key[b, h, s, i] for i in range(width)) / math.sqrt(width)
                    scores.append(score if mask is None or mask[t, s] else torch.tensor(-math.inf))
                shares = torch.stack(scores).softmax(0)
                output[b, h, t] = sum(share * value[b, h, s] for s, share in enumerate(shares))
    return output


# %% [markdown]
# ## The formula
#
# $$ \mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{D_h}}\right) V $$
#
# $Q$ is $(T, D_h)$, $K$ and $V$ are $(S, D_h)$. Row $t$ of the product holds the scores of query $t$ with all keys.
#
# ## The tensor version
#
# PyTorch has a fast kernel for it, which never writes the whole matrix of shares to memory. We use it wherever we can.
# Gemma 2 (the later generation, chapter 08) squeezes its scores before the softmax, which the kernel cannot do; for that there
# is the long form.


# %%
# | export
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, T, Dh).
    key, value : torch.Tensor
        (B, H, S, Dh).
    mask : torch.Tensor, optional
        Boolean, broadcastable to (B, H, T, S); True where a query may look. None: everywhere.
    scale : float, optional
        Factor on the scores; 1 / sqrt(Dh) by default.
    softcap : float, optional
        Scores are squeezed into (-softcap, softcap) by tanh before the mask (Gemma 2, section 2).

    Returns
    -------
    torch.Tensor
        (B, H, T, Dh). A query that may look nowhere gets some finite vector without meaning.

    References
    ----------
    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale  # (B, H, T, S)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


# %% [markdown]
# ## Proof
#
# It equals the loops, without a mask and with one.

# %%
query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
causal = torch.ones(5, 5).tril().bool()
torch.testing.assert_close(attention(query, key, value), attention_naive(query, key, value))
torch.testing.assert_close(attention(query, key, value, causal), attention_naive(query, key, value, causal))

# %% [markdown]
# The long form with a very wide squeeze is the same again.

# %%
long_form = attention(query, key, value, causal, softcap=1e6)
torch.testing.assert_close(long_form, attention(query, key, value, causal), atol=1e-4, rtol=1e-4)

# %% [markdown]
# ## Both ways, or only back
#
# A picture is there all at once, so its patches look in all directions. A sentence that is being written has no
# future yet: each word may look only at itself and back. That is the *causal* mask. SigLIP uses no mask; Gemma, when
# it answers, uses the causal one; chapter 09 joins the two.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(5.2, 2.6))
draw_matrix(left, torch.ones(5, 5), vmin=0, vmax=1.6, cmap="Blues")
draw_matrix(right, causal.float(), vmin=0, vmax=1.6, cmap="Blues")
left.set(title="both ways", xlabel="looked at", ylabel="looks")
right.set(title="causal", xlabel="looked at")
save(figure, "03_masks")
plt.show()

# %% [markdown]
# *Figure: two squares of five by five. Rows look, columns are looked at; dark means: may look. On the left everything
# is dark, on the right only the diagonal and what lies before it.*
#
# ## Many heads
#
# One set of shares is one way to look. A token may want several at once: who has my colour, who is above me. So the
# width $D$ is cut into $H$ heads of $D_h = D / H$ numbers, and each head attends for itself.


# %%
# | export
def split_heads(hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, H * Dh) to (B, H, T, Dh): head h takes the h-th run of Dh numbers."""
    return hidden_states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, H, T, Dh) back to (B, T, H * Dh)."""
    return hidden_states.transpose(1, 2).flatten(-2)


# %%
# | export
class MultiHeadAttention(nn.Module):
    """Self-attention in which every token sees every token, with biases, as SigLIP has it.

    Parameters
    ----------
    hidden_size : int
        D.
    num_attention_heads : int
        H; D must be a multiple of it.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
            )
        self.num_heads = num_attention_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            split_heads(projection(hidden_states), self.num_heads)  # (B, H, T, Dh)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(merge_heads(attention(query, key, value)))  # (B, T, D)


# %% [markdown]
# Four linear maps: three make queries, keys and values, the last mixes what the heads found.
#
# ## Proof
#
# The reference is the attention of SigLIP in `transformers`, which has the same four maps under the same names.

# %%
ours = MultiHeadAttention(hidden_size=32, num_attention_heads=4)
reference = SiglipAttention(SiglipVisionConfig(hidden_size=32, num_attention_heads=4, attn_implementation="eager"))
reference.load_state_dict(ours.state_dict())
tokens = torch.randn(2, 9, 32)
torch.testing.assert_close(ours(tokens), reference(tokens)[0], atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## A look inside
#
# What do heads look at once they have learned? We take one patch in the middle of a thing and ask each head of one
# layer of the pocket model where it looks. (If you have set `SIGMA_BOOK_MODEL` to the folder of a real PaliGemma, the
# figure shows its heads; the question is the same.)

# %%
model = load(os.environ.get("SIGMA_BOOK_MODEL"))
scene = make_scene(5)
thing = scene.things[0]
side = model.config.vision.image_size // model.config.vision.patch_size
centre = [(thing.box[i] + thing.box[i + 2]) / 2 / scene.size for i in (0, 1)]
asking = int(centre[0] * side) * side + int(centre[1] * side)

hidden = model.vision_tower.embeddings(pixels(draw_scene(scene), model.config.vision.image_size)[None])
layers = model.vision_tower.encoder.layers
last = len(layers) - 1
with torch.no_grad():
    for layer in layers[:last]:
        hidden = layer(hidden)
    block = layers[last].self_attn
    normal = layers[last].layer_norm1(hidden)
    query, key = (split_heads(f(normal), block.num_heads) for f in (block.q_proj, block.k_proj))
    looks = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)[0, :, asking]  # (H, P)

shown = looks[:4]
figure, axes = plt.subplots(1, 5, figsize=(7.4, 1.8))
axes[0].imshow(draw_scene(scene).resize((side * 14, side * 14)))
axes[0].plot(asking % side * 14 + 6.5, asking // side * 14 + 6.5, "wo", ms=6, mec="black")
axes[0].set_title("asks here", fontsize=9)
for number, (axis, share) in enumerate(zip(axes[1:], shown, strict=True), start=1):
    axis.imshow(share.float().reshape(side, side), cmap="viridis")
    axis.set_title(f"head {number}", fontsize=9)
for axis in axes:
    axis.axis("off")
save(figure, "03_heads")
plt.show()
spread = (-(looks * looks.clamp(min=1e-12).log()).sum(-1)).exp()
print("patches that each head spreads over:", [round(number.item(), 1) for number in spread])

# %% [markdown]
# *Figure: a scene with a white dot on the asking patch, and four maps of where heads look: bright is much.* Heads
# differ: some stay on the thing itself, some look at other things. Nobody told them to; it paid.
#
# The printed numbers are $e$ to the power of $-\sum_s p_s \ln p_s$, with the shares $p_s$ of a head. If $n$ patches have equal
# shares, that is $n$.
#
# ## The bill
#
# Per layer: four maps of $D \times D$ with biases, and two products that grow with the square of the tokens.


# %%
def bill(tokens: int, width: int) -> dict[str, int]:
    return {"parameters": 4 * (width * width + width), "maps": 4 * tokens * width**2, "pairs": 2 * tokens**2 * width}


assert bill(64, 32)["parameters"] == sum(p.numel() for p in ours.parameters())
for name, tokens in (("224 px", 256), ("448 px", 1024), ("896 px", 4096)):
    part = bill(tokens, 1152)
    print(
        f"{name}: {part['maps'] / 1e9:.1f} billion multiplications in the maps, {part['pairs'] / 1e9:.1f} in the pairs"
    )
assert bill(256, 1152)["pairs"] / bill(256, 1152)["maps"] == 256 / (2 * 1152)

# %% [markdown]
# The pairs cost more than the maps only beyond $2 D$ tokens: at 896 pixels they do.
#
# ## Your turn
#
# **1.** ★ How many `True` does a causal mask of `n` tokens hold?


# %%
def allowed_pairs(n: int) -> int: ...


check(allowed_pairs, ((1,), 1), ((5,), 15), ((100,), 5050))

# %% [markdown]
# **2.** ★★ Write the softmax of a list of numbers, safe for large ones.


# %%
def softmax(numbers: list) -> list: ...


check(softmax, (([0.0, 0.0],), [0.5, 0.5]), (([1000.0, 999.0, 0.0],), [0.7310586, 0.2689414, 0.0]))

# %% [markdown]
# **3.** ★★ At how many tokens do the pairs cost as much as the maps, for width `D`?


# %%
def break_even(width: int) -> int: ...


check(break_even, ((1152,), 2304), ((128,), 256))

# %% [markdown]
# Next: attention and a little thinking, 27 times over, become eyes.
