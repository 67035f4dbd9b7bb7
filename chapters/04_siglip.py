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
# # The eyes: SigLIP
#
# *What turns patches into features that already know what they show?*
#
# **You build** the vision tower and the loss that taught it. **You need** chapters 02 (patches) and 03 (attention).
# **Exports** the module `sigma_book.siglip`.

# %%
# | export
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.attention import MultiHeadAttention
from sigma_book.patches import PatchEmbeddings


# %%
import math
import os
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sigma_book import load
from sigma_book.pocket import Muon
from sigma_book.processor import pixels
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import Scene, caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# Chapter 02 made tokens of patches. Chapter 03 let tokens look at each other. The tower is these two, repeated:
# look around, think, look around again. It is called SigLIP, after the loss that taught it, which we derive below.
#
# One round is a **block**. It has two halves, and each half *adds* something to the token instead of replacing it.

# %%
figure, axis = plt.subplots(figsize=(8.4, 2.3))
parts = [("patches", 0.6, GREY), ("LayerNorm", 2.3, PROMPT), ("attention", 3.9, PICTURE)]
parts += [("LayerNorm", 6.0, PROMPT), ("MLP", 7.6, PICTURE), ("features", 9.8, GREY)]
for name, x, colour in parts:
    axis.add_patch(FancyBboxPatch((x - 0.6, 0.1), 1.2, 0.5, boxstyle="round,pad=0.05", facecolor=colour, lw=0))
    ink = "black" if colour == PROMPT else "white"  # white is hard to read on orange
    axis.text(x, 0.35, name, ha="center", va="center", color=ink, fontsize=9)
arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
for start, end in ((1.25, 1.65), (2.95, 3.25), (4.55, 4.8), (5.1, 5.35), (6.65, 6.95), (8.25, 8.45), (8.75, 9.15)):
    axis.annotate("", (end, 0.35), (start, 0.35), arrowprops=arrow)
for plus, start in ((4.95, 1.42), (8.6, 5.2)):
    axis.text(plus, 0.35, "+", ha="center", va="center", fontsize=14)
    axis.plot([start, start, plus, plus], [0.35, 1.0, 1.0, 0.5], color="0.3", lw=1)
axis.annotate("", (1.42, -0.2), (8.75, -0.2), arrowprops={"arrowstyle": "<->", "color": "0.6"})
axis.text(5.1, -0.32, "one block, repeated 27 times", ha="center", va="top", fontsize=9, color="0.3")
axis.set(xlim=(-0.1, 10.5), ylim=(-0.6, 1.15))
axis.axis("off")
save(figure, "04_block")

# %% [markdown]
# *Figure: patches enter from the left and pass LayerNorm, attention, a plus, LayerNorm, MLP and another plus.
# A line runs around each half straight to its plus: the token itself, unchanged.*
#
# We know attention. Three words are new: LayerNorm, MLP, and why there is a plus.
#
# ## LayerNorm, by hand
#
# Take one token. Subtract its mean, divide by its standard deviation. Whatever the spread of its numbers was, now it is 1.


# %%
def layer_norm_naive(token: list[float], weight: list[float], bias: list[float], eps: float) -> list[float]:
    mean = sum(token) / len(token)
    variance = sum((number - mean) ** 2 for number in token) / len(token)
    return [
        (number - mean) / math.sqrt(variance + eps) * factor + shift
        for number, factor, shift in zip(token, weight, bias, strict=True)
    ]


layer_norm_naive([1.0, 2.0, 3.0], weight=[1.0] * 3, bias=[0.0] * 3, eps=1e-6)

# %% [markdown]
# $$ \mathrm{LayerNorm}(x)_d = \frac{x_d - \mu}{\sqrt{\sigma^2 + \epsilon}}\, w_d + b_d $$
#
# $\mu$ and $\sigma^2$ are mean and variance over the $D$ numbers of *one* token; $w$ and $b$ are learned; $\epsilon$
# keeps a token of equal numbers from a division by zero. Each token stands alone: what else is in the batch makes no
# difference.

# %%
token, weight, bias = torch.randn(3, 48)
by_hand = layer_norm_naive(token.tolist(), weight.tolist(), bias.tolist(), 1e-6)
torch.testing.assert_close(F.layer_norm(token, (48,), weight, bias, 1e-6), torch.tensor(by_hand))

larger = F.layer_norm(1000 * token, (48,), eps=1e-6)
torch.testing.assert_close(larger, F.layer_norm(token, (48,), eps=1e-6), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## Why the plus needs the norm
#
# With a plus, a token keeps what it had, and a gradient (what teaches a model; we meet it below) finds a straight way back
# through all 27 blocks. But sums grow.
# Let each block add a random map of the token. Its variance doubles every time: $2^{27}$ is 134 million.
#
# Put a norm in front of the map, and each block adds the same amount, 1. After 27 blocks the variance is 28.

# %%
width, depth = 256, 27
plain = normed = torch.randn(512, width)
spread = {"without": [1.0], "with": [1.0]}
for _ in range(depth):
    mixing = torch.randn(width, width) / width**0.5
    plain = plain + plain @ mixing
    normed = normed + F.layer_norm(normed, (width,)) @ mixing
    spread["without"].append(plain.var().item())
    spread["with"].append(normed.var().item())
assert spread["without"][-1] > 1e7
assert 20 < spread["with"][-1] < 36

figure, axis = plt.subplots(figsize=(6.4, 2.6))
for name, colour in (("without", PROMPT), ("with", PICTURE)):
    axis.semilogy(spread[name], color=colour)
    axis.annotate(f"{name} norm", (depth, spread[name][-1]), xytext=(5, 0), textcoords="offset points", va="center")
axis.set(xlabel="blocks passed", ylabel="variance of the tokens", xlim=(0, depth + 5), xticks=range(0, 28, 9))
save(figure, "04_norm")

# %% [markdown]
# *Figure: two lines over 27 blocks, on a logarithmic axis. Without norm the variance climbs straight to over ten
# million; with it the line bends and stays below 40.*
#
# Note where the norm stands: in front of each half, not on the straight line. The straight line is left alone, up to
# one last norm behind block 27.
#
# ## The MLP, and a soft corner
#
# Attention moves information between tokens. The other half works on each token alone: widen from $D$ to $F$ numbers,
# bend, narrow back. Without the bend, two linear maps would be one.
#
# The bend is GELU: multiply $x$ by the chance that a standard normal number is smaller than $x$.
#
# $$ \mathrm{GELU}(x) = x\,\Phi(x)
# \approx \tfrac{x}{2}\left(1 + \tanh\left(\sqrt{\tfrac{2}{\pi}}\,(x + 0.044715\,x^3)\right)\right) $$
#
# SigLIP was taught with the right-hand side, `gelu_tanh`, so we must use that one. The two differ by less than 0.0005,
# but 27 blocks of small differences are not a small difference.


# %%
def gelu_naive(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


line = torch.linspace(-4, 4, 801)
soft = torch.tensor([gelu_naive(x) for x in line.tolist()])
torch.testing.assert_close(F.gelu(line, approximate="tanh"), soft, rtol=1e-5, atol=1e-6)
difference = (F.gelu(line) - soft).abs().max().item()
assert 0.0004 < difference < 0.0005

figure, axis = plt.subplots(figsize=(5.2, 2.6))
axis.plot(line, F.relu(line), color=GREY, lw=1, ls="--")
axis.plot(line, soft, color=PICTURE)
axis.annotate("gelu_tanh", (1.3, gelu_naive(1.3)), xytext=(1.6, 0.5), color=PICTURE)
axis.annotate("max(x, 0)", (-3, 0), xytext=(-3.4, 0.25), color="0.4")
axis.set(xlabel="x", xlim=(-4, 3), ylim=(-0.4, 3))
save(figure, "04_gelu")

# %% [markdown]
# *Figure: the dashed corner of max(x, 0), and GELU, a curve that follows it far from zero, dips a little below zero on
# the left, and turns without a corner.*
#
# ## The tower, exported
#
# First the sizes, under the names that `config.json` gives them.


# %%
# | export
@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the vision tower, named as in `vision_config` of `config.json`.

    The defaults are those of transformers' `SiglipVisionConfig`; PaliGemma's own files say the rest.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


# %% [markdown]
# Then the half that thinks.


# %%
# | export
class SiglipMLP(nn.Module):
    """Two linear maps with a tanh-approximated GELU between them: D -> F -> D."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


# %% [markdown]
# A block: normalize, attend, add; normalize, think, add. Compare `forward` with the drawing at the top.


# %%
# | export
class SiglipBlock(nn.Module):
    """Normalize, attend, add; normalize, think, add."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = MultiHeadAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


# %% [markdown]
# A stack of blocks. The shape never changes on the way, so there is nothing more to say.


# %%
# | export
class SiglipEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


# %% [markdown]
# And the whole: embed, stack, one last norm. (SigLIP has a pooling head behind that, which makes one vector of a whole
# picture. PaliGemma leaves it out: its decoder wants all the patches.)


# %%
# | export
class SiglipVisionTower(nn.Module):
    """Pictures (B, 3, S, S) to features (B, P, D), one for each patch.

    References
    ----------
    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = PatchEmbeddings(config.image_size, config.patch_size, config.hidden_size, config.num_channels)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


# %% [markdown]
# ## Proof
#
# The reference is torch's own transformer layer, told to put its norms in front. We give it the weights of our block.
# (`tests/test_siglip.py` compares the whole tower with the SigLIP of `transformers`.)

# %%
small = SiglipConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
)
block = SiglipBlock(small)
reference = nn.TransformerEncoderLayer(
    48,
    4,
    80,
    dropout=0.0,
    activation=partial(F.gelu, approximate="tanh"),
    layer_norm_eps=1e-6,
    batch_first=True,
    norm_first=True,
)
with torch.no_grad():
    for parameter in block.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    three = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    reference.self_attn.in_proj_weight.copy_(torch.cat([projection.weight for projection in three]))
    reference.self_attn.in_proj_bias.copy_(torch.cat([projection.bias for projection in three]))
pairs = ((reference.self_attn.out_proj, block.self_attn.out_proj), (reference.linear1, block.mlp.fc1))
pairs += (
    (reference.linear2, block.mlp.fc2),
    (reference.norm1, block.layer_norm1),
    (reference.norm2, block.layer_norm2),
)
for theirs, ours in pairs:
    theirs.load_state_dict(ours.state_dict())

tokens = torch.randn(2, 16, 48)
torch.testing.assert_close(block(tokens), reference(tokens), rtol=1e-5, atol=1e-5)

# %% [markdown]
# ## 27 blocks, 412 million numbers
#
# PaliGemma's tower is called So400m: about 400 million parameters, in a shape that was found to be the best for its
# cost. We build it on the `meta` device, where a tensor has a shape but no numbers, and count.

# %%
so400m = SiglipConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)
with torch.device("meta"):
    large = SiglipVisionTower(so400m)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


first = large.encoder.layers[0]
table = {
    "embeddings": count(large.embeddings),
    "attention, one block": count(first.self_attn),
    "MLP, one block": count(first.mlp),
    "two norms, one block": count(first.layer_norm1) + count(first.layer_norm2),
    "27 blocks": count(large.encoder),
    "last norm": count(large.post_layernorm),
    "the tower": count(large),
}
assert table["27 blocks"] == 27 * sum(table[name] for name in table if name.endswith("one block"))
assert table["the tower"] == table["embeddings"] + table["27 blocks"] + table["last norm"] == 412_442_352
assert table["MLP, one block"] > 1.8 * table["attention, one block"]
for name, number in table.items():
    print(f"{name:22}{number:>14,}")

# %% [markdown]
# Nearly two thirds of it is MLP. Looking around is the cheaper half.
#
# ## What to teach it
#
# The tower now has a shape and no knowledge. Which task makes it see? Naming things would need someone to choose the
# names. But the web is full of pictures with a sentence beside them. So: *here are a picture and a sentence; do they
# belong together?* Who answers that well must have seen what the sentence says.
#
# We need one vector $x_i$ for picture $i$ and one vector $y_j$ for text $j$, both of length 1. Their dot product says
# how much they agree, between -1 and 1. Two learned numbers, $t$ and $b$, make a score of it:
#
# $$ \ell_{ij} = t\, x_i \cdot y_j + b $$
#
# ## The loss, derived
#
# A score becomes a probability through the sigmoid $\sigma(\ell) = 1 / (1 + e^{-\ell})$. The pair matches with
# probability $\sigma(\ell)$, and does not with $1 - \sigma(\ell)$, which is $\sigma(-\ell)$.
# Write $z_{ij} = 1$ for a match and $z_{ij} = -1$ for none, and both cases are one expression: the truth has
# probability $\sigma(z_{ij}\,\ell_{ij})$.

# %%
scores = torch.linspace(-5, 5, 11)
torch.testing.assert_close(1 - scores.sigmoid(), (-scores).sigmoid(), rtol=1e-5, atol=1e-6)

# %% [markdown]
# All $N \times N$ pairs of a batch are questions of their own. The probability that all answers are right is a product;
# its negative logarithm is a sum, and that is the loss. We divide by the number of pictures.
#
# $$ \mathcal{L} = -\frac{1}{N} \sum_{i=1}^{N} \sum_{j=1}^{N} \log \sigma\left(z_{ij}\,\ell_{ij}\right) $$


# %%
def sigmoid_loss_naive(image_features: list, text_features: list, scale: float, bias: float) -> float:
    total = 0.0
    for i, image in enumerate(image_features):
        for j, text in enumerate(text_features):
            score = scale * sum(x * y for x, y in zip(image, text, strict=True)) + bias
            sign = 1 if i == j else -1
            total -= math.log(1 / (1 + math.exp(-sign * score)))
    return total / len(image_features)


agree, differ = [1.0, 0.0], [0.0, 1.0]
right = sigmoid_loss_naive([agree, differ], [agree, differ], scale=10.0, bias=-5.0)
wrong = sigmoid_loss_naive([agree, differ], [differ, agree], scale=10.0, bias=-5.0)
assert right < 0.02 and wrong > 9.9
right, wrong

# %% [markdown]
# The older way, CLIP's, asks of each picture: *which* of these $N$ texts is yours? That is a softmax over a row, and a
# row must be complete before it can be divided by its sum. Here every pair stands alone. A batch can be computed in
# pieces, on many machines, and the pieces simply add up. And a picture may match two texts, or none.
#
# One trap on the way to the tensor version: for a score of -200, $\sigma$ is 0 in float32, and its logarithm is minus
# infinity. `logsigmoid` computes the logarithm directly.

# %%
hopeless = torch.tensor(-200.0)
assert hopeless.sigmoid().log() == -math.inf
assert F.logsigmoid(hopeless) == -200


# %%
# | export
def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    matches: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every pair of picture and text is a yes-or-no question of its own: do they belong together?

    Parameters
    ----------
    image_features : torch.Tensor
        (N, D), normalized to length 1.
    text_features : torch.Tensor
        (M, D), normalized to length 1.
    scale, bias : torch.Tensor
        Learned scalars, the temperature's inverse and the prior.
    matches : torch.Tensor, optional
        Boolean (N, M), True for the pairs that match. None: picture i matches text i alone.

    Returns
    -------
    torch.Tensor
        Scalar: the sum over texts, averaged over pictures.

    References
    ----------
    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1.
    """
    logits = scale * image_features @ text_features.T + bias  # (N, M)
    if matches is None:
        matches = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    signs = matches.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum(dim=-1).mean()


# %% [markdown]
# It equals the loops, and what torch calls binary cross-entropy, summed over all pairs and divided by $N$.

# %%
images, texts = F.normalize(torch.randn(2, 6, 16), dim=-1)
scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
loss = sigmoid_loss(images, texts, scale, bias)
torch.testing.assert_close(
    loss.item(), sigmoid_loss_naive(images.tolist(), texts.tolist(), 10.0, -10.0), rtol=1e-5, atol=1e-5
)

truth = torch.rand(6, 6) < 0.3  # several matches in a row, or none
cross_entropy = F.binary_cross_entropy_with_logits(10 * images @ texts.T - 10, truth.float(), reduction="sum") / 6
torch.testing.assert_close(sigmoid_loss(images, texts, scale, bias, truth), cross_entropy, rtol=1e-5, atol=1e-5)

# %% [markdown]
# What does it pull on? The derivative with respect to a score is
#
# $$ \frac{\partial \mathcal{L}}{\partial \ell_{ij}} = -\frac{z_{ij}}{N}\,\sigma(-z_{ij}\,\ell_{ij}) $$
#
# and $\sigma(-z\,\ell)$ is the probability given to the *wrong* answer. A pair pulls exactly as hard as it is wrong.

# %%
logits = torch.randn(6, 6, requires_grad=True)
signs = truth.float() * 2 - 1
(-F.logsigmoid(signs * logits).sum() / 6).backward()
torch.testing.assert_close(logits.grad, -signs / 6 * (-signs * logits.detach()).sigmoid(), rtol=1e-5, atol=1e-7)

# %% [markdown]
# That explains the bias $b$. In a batch of 64, one pair in 64 matches. At the start all dot products are near zero.
# With $b = 0$ every pair is held for half likely, and 63 of 64 pull apart: all they can teach is "no". The paper
# starts at
# $b = -10$, where "no" is known already, and only the matches pull.

# %%
for start in (0.0, -10.0):
    match, other = F.softplus(torch.tensor([-start, start])).tolist()
    pull = 63 * torch.tensor(start).sigmoid() / torch.tensor(-start).sigmoid()
    print(f"b = {start:5}: loss {match + 63 * other:5.1f} a picture; pull apart : pull together = {pull:.3g} : 1")
assert round(64 * math.log(2), 1) == 44.4
assert 63 * torch.tensor(-10.0).sigmoid() < 0.003

# %% [markdown]
# ## Teaching it, in seconds
#
# Two thousand scenes with one thing in each. A whole scene has 64 tokens, most of them empty, and seeing in
# it takes minutes to learn (chapter 17 does it). So we cut a window of 42 pixels around the thing: nine patches.
# There are 8 shapes and 8 colours, so 64 different captions.


# %%
def window(scene: Scene, side: int = 42):
    """The part of a drawn scene around its first thing, moved where the picture ends."""
    top, left, bottom, right = scene.things[0].box
    y, x = (min(max((low + high - side) // 2, 0), scene.size - side) for low, high in ((top, bottom), (left, right)))
    return draw_scene(scene).crop((x, y, x + side, y + side))


def collect(seeds: range) -> tuple[torch.Tensor, list[str]]:
    scenes = [make_scene(seed, max_things=1) for seed in seeds]
    drawn = torch.from_numpy(np.stack([np.array(window(scene)) for scene in scenes]))
    return drawn.permute(0, 3, 1, 2) / 127.5 - 1, [caption(scene) for scene in scenes]  # (N, 3, 42, 42)


seen, seen_captions = collect(range(2000))
unseen, unseen_captions = collect(range(10_000, 10_256))
choices = sorted(set(seen_captions))
words = sorted({word for text in choices for word in text.split()})
assert len(choices) == 64 and set(unseen_captions) <= set(choices)
spelled = torch.tensor([[words.index(word) for word in text.split()] for text in choices])  # (64, 3)
label = torch.tensor([choices.index(text) for text in seen_captions])  # (N,)
true_label = torch.tensor([choices.index(text) for text in unseen_captions])

# %% [markdown]
# Two towers. The picture's is ours, two blocks of width 64; over its nine features we take the largest of each number,
# and scale to length 1. The text's is the smallest that works: a vector for each word, summed.

# %%
torch.manual_seed(0)
tower = SiglipVisionTower(SiglipConfig(64, 256, 2, 4, image_size=42, patch_size=14))
nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.02)
word_vectors = nn.Embedding(len(words), 64)
log_scale = nn.Parameter(torch.tensor(10.0).log())
offset = nn.Parameter(torch.tensor(-10.0))


def embed_pictures(pixel_values: torch.Tensor) -> torch.Tensor:
    return F.normalize(tower(pixel_values).amax(dim=1), dim=-1)  # (N, P, D) -> (N, D)


def embed_captions(labels: torch.Tensor) -> torch.Tensor:
    return F.normalize(word_vectors(spelled[labels]).sum(dim=1), dim=-1)  # (N, 3, D) -> (N, D)


@torch.no_grad()
def found() -> float:
    """Share of unseen pictures whose caption is the nearest of all 64."""
    similarity = embed_pictures(unseen) @ embed_captions(torch.arange(64)).T  # (256, 64)
    return (similarity.argmax(dim=-1) == true_label).float().mean().item()


before = found()
assert before < 0.1

# %% [markdown]
# For each number of the model, `backward` finds in which direction the loss rises: its *gradient*. An *optimizer* then moves
# each number a small step the other way. Chapter 16 takes this apart.
#
# Two optimizers. Muon makes each step of a matrix equally strong in all directions; AdamW takes the rest. (It is PyTorch's Muon;
# chapter 17 says how it works, and has it multiply in float32.) In a batch, two red stars may meet: then both captions match
# both pictures, and `matches` says so. We draw 64 pictures, and there are 64 captions. So a picture has two matches on average,
# its own and one by chance, and the loss begins near 20 rather than 10.
#
# In the code, the formula's $t$ is `log_scale.exp()`: $t$ must stay above zero, so we learn its logarithm. The bias $b$ is called
# `offset`.

# %%
matrices = [parameter for parameter in tower.encoder.parameters() if parameter.ndim == 2]
others = [parameter for parameter in tower.parameters() if all(parameter is not matrix for matrix in matrices)]
others += [*word_vectors.parameters()]
optimizers = [
    Muon(matrices, lr=0.02, weight_decay=0.0),
    torch.optim.AdamW([{"params": others, "lr": 3e-3}, {"params": [log_scale, offset], "lr": 1e-2}]),
]
steps = 160
schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(1, 2 * (1 - step / steps))) for one in optimizers]

losses, shares = [], {0: before}
for step in range(1, steps + 1):
    batch = torch.randint(len(seen), (64,))
    same = label[batch, None] == label[batch]  # (64, 64)
    loss = sigmoid_loss(embed_pictures(seen[batch]), embed_captions(label[batch]), log_scale.exp(), offset, same)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        schedule.step()
    losses.append(loss.item())
    if step % 20 == 0:
        shares[step] = found()

assert shares[steps] > 0.7
assert losses[0] > 15 and sum(losses[-10:]) / 10 < 3
print(f"the right caption of 64: {shares[0]:.0%} before, {shares[steps]:.0%} after {steps} steps")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.5))
left.plot(range(1, steps + 1), losses, color=PICTURE)
left.set(xlabel="step", ylabel="loss, one batch", ylim=(0, None))
right.plot(list(shares), [100 * share for share in shares.values()], color=ANSWER, marker="o", ms=3)
right.axhline(100 / 64, color=GREY, ls="--", lw=1)
right.annotate("guessing", (steps, 100 / 64), xytext=(0, 4), textcoords="offset points", ha="right", color="0.4")
right.set(xlabel="step", ylabel="right caption found, %", ylim=(0, 100))
save(figure, "04_training")

# %% [markdown]
# *Figure: the loss falls from above 15 to below 3; the share of unseen pictures that find their caption among all 64
# rises from chance to above 70 percent.*
#
# ## A look inside
#
# Eight pictures that the tower has never seen, eight captions. Each square is one of the questions of the loss: how
# likely do these two belong together? The diagonal should be dark, the rest light.

# %%
shown = []
for place, text in enumerate(unseen_captions):
    if all(unseen_captions[other] != text for other in shown):
        shown.append(place)
    if len(shown) == 8:
        break
with torch.no_grad():
    logits = log_scale.exp() * embed_pictures(unseen[shown]) @ embed_captions(true_label[shown]).T + offset
    chances = logits.sigmoid()  # (8, 8)

figure, axis = plt.subplots(figsize=(6.2, 4.6))
axis.imshow(chances, cmap="Greys", vmin=0, vmax=1)
for row, place in enumerate(shown):
    picture = axis.inset_axes([-1.45, row - 0.42, 0.84, 0.84], transform=axis.transData)
    picture.imshow(unseen[place].permute(1, 2, 0) / 2 + 0.5)
    picture.axis("off")
    for column in range(8):
        chance = chances[row, column].item()
        ink = "white" if chance > 0.4 else "0.4"
        axis.text(column, row, f"{100 * chance:.0f}", ha="center", va="center", fontsize=8, color=ink)
axis.set_xticks(range(8), [unseen_captions[place] for place in shown], rotation=40, ha="left")
axis.xaxis.tick_top()
axis.set_yticks([])
axis.tick_params(length=0)
axis.spines[:].set_visible(False)
save(figure, "04_matches")
assert chances.diagonal().mean() > 4 * chances[~torch.eye(8, dtype=torch.bool)].mean()

# %% [markdown]
# *Figure: eight windows with one thing each down the left side, eight captions along the top, and a grid of chances in
# percent. The diagonal is dark. Where another square has some grey, picture and caption share a colour or a shape.*
#
# Nobody told the tower what a star is. It found out because "star" was in the right sentences.

# %% [markdown]
# ## What a trained tower sees alike
#
# The pocket model's tower has the same classes. How alike are the features of its patches? We take one patch of the
# star and compare it with all others, before the first block and after the last.

# %%
model = load(os.environ.get("SIGMA_BOOK_MODEL"))
vision = model.config.vision
side = vision.image_size // vision.patch_size
scene = make_scene(155)
with torch.no_grad():
    tensor = pixels(draw_scene(scene), vision.image_size)[None]
    early, late = model.vision_tower.embeddings(tensor)[0], model.vision_tower(tensor)[0]
thing = next(thing for thing in scene.things if thing.shape == "star")
row, column = (int((thing.box[i] + thing.box[i + 2]) / 2 / scene.size * side) for i in (0, 1))
figure, axes = plt.subplots(1, 3, figsize=(6.4, 2.2))
axes[0].imshow(draw_scene(scene).resize((side * 14, side * 14)))
axes[0].plot(column * 14 + 6.5, row * 14 + 6.5, "wo", mec="black")
for axis, features, name in zip(axes[1:], (early, late), ("before the blocks", "after the blocks"), strict=True):
    likeness = F.cosine_similarity(features, features[row * side + column][None], dim=-1).float()
    axis.imshow(likeness.reshape(side, side), vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_title(name, fontsize=9)
for axis in axes:
    axis.axis("off")
save(figure, "04_alike")
plt.show()

# %% [markdown]
# *Figure: a scene with a dot on a patch of the star; how like that patch all others are, before and after the blocks
# (red alike, blue opposed).* Before, the other patches of the star are hardly more like it than the empty ground is. After,
# the patches of the star stand out against all else.
#
# ## The bill
#
# Parameters first, as a formula, for the pocket model and for the 3B one.


# %%
def tower_parameters(config: SiglipConfig) -> int:
    width, wide = config.hidden_size, config.intermediate_size
    block = 4 * (width**2 + width) + (2 * width * wide + wide + width) + 4 * width
    embeddings = (config.num_channels * config.patch_size**2 + 1 + config.num_patches) * width
    return embeddings + config.num_hidden_layers * block + 2 * width


pocket = SiglipConfig(128, 512, 4, 4, image_size=112, patch_size=14)
with torch.device("meta"):
    assert tower_parameters(pocket) == count(SiglipVisionTower(pocket)) == 876_928
assert tower_parameters(so400m) == count(large)
assert round(2 * tower_parameters(so400m) / 1e6) == 825  # megabytes in 16 bits

# %% [markdown]
# FLOPs: a linear map costs two for each weight and token. Attention adds $4 T^2 D$ a block: scores and mixture. Torch
# counts the same when it runs the tower without numbers.


# %%
def tower_flops(config: SiglipConfig) -> int:
    tokens, width, wide = config.num_patches, config.hidden_size, config.intermediate_size
    block = 2 * tokens * (4 * width**2 + 2 * width * wide) + 4 * tokens**2 * width
    return 2 * tokens * config.num_channels * config.patch_size**2 * width + config.num_hidden_layers * block


with FlopCounterMode(display=False) as counter, torch.no_grad():
    large(torch.empty(1, 3, 224, 224, device="meta"))
assert counter.get_total_flops() == tower_flops(so400m)
assert round(tower_flops(so400m) / 1e9) == 219
assert round(tower_flops(pocket) / 1e6) == 119

reading = SiglipConfig(1152, 4304, 27, 16, image_size=896, patch_size=14)
assert round(tower_flops(reading) / tower_flops(so400m)) == 25
f"{tower_flops(so400m):,}"

# %% [markdown]
# 219 billion for one picture of 224 pixels, more than 1,800 times the pocket's. A picture of 896 pixels has 16 times the
# tokens but costs 25 times as much: there the squared term of attention shows.

# %%
assert 1800 < tower_flops(so400m) / tower_flops(pocket) < 2000

# %% [markdown]
# ## Your turn
#
# **1.** ★ How many parameters has one block? Write `block_parameters(hidden_size, intermediate_size)`. Do not forget
# the biases, nor the two norms.


# %%
def block_parameters(hidden_size: int, intermediate_size: int) -> int: ...


check(block_parameters, ((128, 512), 198_272), ((1152, 4304), table["27 blocks"] // 27))

# %% [markdown]
# **2.** ★★ All dot products are zero, as at the start. Write `start_loss(pictures, bias)`: what is the loss, when
# picture $i$ matches text $i$ alone?


# %%
def start_loss(pictures: int, bias: float) -> float: ...


cases = [(2, 0.0), (64, 0.0), (64, -10.0), (1000, -10.0)]
zeros = [sigmoid_loss(*torch.zeros(2, n, 4), torch.tensor(10.0), torch.tensor(b)).item() for n, b in cases]
check(start_loss, *zip(cases, zeros, strict=True))

# %% [markdown]
# **3.** ★★ Write CLIP's loss. Among all texts, which is picture $i$'s? A softmax along each row of the scores gives every
# text a share; the loss is minus the logarithm of the right one's, the mean over the rows. (It is called
# *cross-entropy*.) The same the other way round, along the columns; then the mean of the two. There is no bias: why would
# it change nothing?


# %%
def clip_loss(image_features: torch.Tensor, text_features: torch.Tensor, scale: float) -> torch.Tensor: ...


check(
    clip_loss,
    ((torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1.0), torch.tensor(0.753204)),
    ((torch.eye(4), torch.eye(4), 0.0), torch.tensor(4.0).log()),
)

# %% [markdown]
# **4.** ★★★ A machine holds all pictures, but the texts come in pieces of `size`. Write `loss_in_pieces(images, texts,
# scale, bias, size)` that never makes a score matrix wider than `size`, and gives the same loss. `sigmoid_loss` takes
# `matches`, which says what matches within a piece. The check looks on: of the matrices of floats with a row for a picture
# and a column for a text, none may be wider than `size`. (A mask may be, if it is boolean.)


# %%
def loss_in_pieces(images, texts, scale, bias, size: int) -> torch.Tensor: ...


class Narrow(TorchFunctionMode):
    """Within it, a matrix of scores with more than `size` columns is an error. (Features have 16 columns.)"""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        floats = isinstance(result, torch.Tensor) and result.is_floating_point() and result.ndim == 2
        if floats and len(result) <= 6 and self.size < result.shape[1] <= 6:
            raise ValueError(f"a score matrix of shape {tuple(result.shape)}: make none wider than {self.size}")
        return result


def watched(*arguments) -> torch.Tensor:
    with Narrow(arguments[-1]):
        return loss_in_pieces(*arguments)


watched.__name__ = "loss_in_pieces"
whole = sigmoid_loss(images, texts, torch.tensor(10.0), torch.tensor(-10.0))
check(watched, *(((images, texts, torch.tensor(10.0), torch.tensor(-10.0), size), whole) for size in (6, 2, 4)))

# %% [markdown]
# Next: the eyes are done. The voice begins with a clock: how words know their place.
