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
# # Where seeing meets speaking
#
# *How do features of a picture become words of a prompt, and who may look at whom?*
#
# **You build** the projector, token replacement and the prefix mask.
# **You need** chapters 04 (the eyes) and 08 (the voice).
# **Exports** the module `sigma_book.projector`.

# %%
# | export
import torch
from torch import nn


# %%
import random

import os

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from sigma_book import load
from sigma_book.kv_cache import KVCache
from sigma_book.processor import pixels
from sigma_book.style import ANSWER, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import COLOURS, SHAPES, caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A decoder reads a row of vectors. It does not ask where they came from.
# So a picture can sit in the row beside the words: cut it into patches, give each patch a vector, and put these
# vectors in front.
#
# Below is such a row for one drawn scene, with patches whose sides are four times as long as the real ones, to fit the page.

# %%
scene = make_scene(22, max_things=1)
drawn = draw_scene(scene)
side = drawn.width // 2  # 2 x 2 patches
assert side == 4 * 14
crops = [drawn.crop((x, y, x + side, y + side)) for y in (0, side) for x in (0, side)]
prompt, answer = ["<bos>", "caption", "en", "\\n"], [*caption(scene).split(), "<eos>"]
assert len(answer) == 4

figure, axis = plt.subplots(figsize=(8.6, 1.7))
for place in range(len(crops) + len(prompt) + len(answer)):
    if place < len(crops):
        colour = PICTURE
        axis.imshow(crops[place], extent=(place + 0.08, place + 0.92, 0.08, 0.92), zorder=2)
    else:
        colour = PROMPT if place < len(crops) + len(prompt) else ANSWER
        axis.text(
            place + 0.5,
            0.5,
            (prompt + answer)[place - len(crops)],
            ha="center",
            va="center",
            color="black" if colour == PROMPT else "white",
            size=9,
        )
    axis.add_patch(Rectangle((place + 0.03, 0.03), 0.94, 0.94, facecolor=colour, edgecolor=colour, zorder=1))
for left, width, name in ((0, 4, "picture"), (4, 4, "prompt"), (8, 4, "answer")):
    axis.annotate("", (left + 0.05, 1.12), (left + width - 0.05, 1.12), arrowprops={"arrowstyle": "-", "color": "0.4"})
    axis.text(left + width / 2, 1.2, name, ha="center", va="bottom", size=10)
axis.text(4, -0.35, "prefix: given", ha="center", size=9, color="0.3")
axis.text(10, -0.35, "suffix: to be written", ha="center", size=9, color="0.3")
axis.set(xlim=(0, 12), ylim=(-0.5, 1.6), aspect="equal")
axis.axis("off")
save(figure, "09_row")

# %% [markdown]
# *Figure: twelve boxes in a row. Four hold quarters of a drawn scene, four hold the words of the prompt, four the
# words of the answer.
# Picture and prompt together are called the prefix, the answer is the suffix.*
#
# Three questions stand between us and that row.
# How does a feature of the tower get the decoder's width? How does it get to its place? And who, in this row, may
# look at whom?
#
# ## One number at a time
#
# The tower speaks vectors of one width, 1,152 in PaliGemma. The decoder listens to another, 2,048.
# The simplest bridge is a weighted sum: each new number is made of all old ones. Here from 3 to 2.


# %%
def project_naive(feature: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
    projected = []
    for row, start in zip(weight, bias):
        total = start
        for number, factor in zip(feature, row):
            total += number * factor
        projected.append(total)
    return projected


project_naive([1.0, 2.0, 3.0], weight=[[1.0, 0.0, 0.0], [0.5, 0.5, 0.5]], bias=[0.0, 10.0])

# %% [markdown]
# ## The formula
#
# $$ z_i = W f_i + b, \qquad W \in \mathbb{R}^{D \times D_v} $$
#
# $f_i$ is the feature of patch $i$, of the tower's width $D_v$; $z_i$ has the decoder's width $D$. Every patch goes
# through the same $W$ and $b$.
#
# ## All patches at once


# %%
# | export
class Projector(nn.Module):
    """One linear map from the tower's width to the decoder's: (B, P, Dv) to (B, P, D)."""

    def __init__(self, vision_size: int, text_size: int):
        super().__init__()
        self.linear = nn.Linear(vision_size, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)


# %% [markdown]
# One layer, no more. The two big parts were first taught on their own: the eyes as in chapter 04, the voice by guessing the
# next word of texts. One matrix joins them, and then all three go on learning together, with nothing frozen: first at 224
# pixels, then for a shorter while at 448 and at 896 (Beyer et al. 2024, "PaliGemma", section 3.2).
#
# Other models join the two in other ways. Flamingo's decoder looks at the picture through attention layers of its own
# (*cross-attention*). BLIP-2 puts a few learned queries to the picture, and hands only what they found to the decoder (its
# *Q-Former*). LLaVA 1.5 has a small MLP where PaliGemma has one matrix.
#
# Ours equals the loops.

# %%
projector = Projector(vision_size=3, text_size=2)
features = torch.randn(2, 4, 3)  # (B, P, Dv): two pictures of four patches
weight, bias = projector.linear.weight.tolist(), projector.linear.bias.tolist()
by_hand = torch.tensor([[project_naive(patch, weight, bias) for patch in picture] for picture in features.tolist()])
torch.testing.assert_close(projector(features), by_hand)
projector(features).shape

# %% [markdown]
# ## What the map must do
#
# The tower has its own directions for "red" and "star". The decoder has others: the rows of its embedding.
# The map must lay the first where the decoder can read them. The plainest place is near the word *red* itself.
#
# We can play that through with invented vectors. Eight ideas have a direction each in a tower of width 24 and another
# in a decoder of width 16.
# The features are noisy mixtures of the tower's directions, one strong idea in each.

# %%
ideas, vision_size, text_size = 8, 24, 16
tower_directions = torch.randn(ideas, vision_size)
word_directions = torch.randn(ideas, text_size)  # what the decoder would call each idea


def look(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (count, 24) and the idea that is strongest in each."""
    strongest = torch.randint(ideas, (count,))
    amounts = 0.15 * torch.randn(count, ideas)
    amounts[range(count), strongest] += 1.0
    return amounts @ tower_directions + 0.1 * torch.randn(count, vision_size), strongest


def named_rightly(projected: torch.Tensor, strongest: torch.Tensor) -> float:
    """The share of features whose most similar word, by cosine, is the right one."""
    similarity = nn.functional.normalize(projected, dim=-1) @ nn.functional.normalize(word_directions, dim=-1).T
    return (similarity.argmax(-1) == strongest).float().mean().item()


seen, names = look(400)
unseen, true_names = look(1000)
untaught = Projector(vision_size, text_size)
solution = torch.linalg.lstsq(seen, word_directions[names]).solution  # (24, 16): least squares, no training loop
before, after = named_rightly(untaught(unseen), true_names), named_rightly(unseen @ solution, true_names)
assert before < 0.4 and after > 0.85
print(f"right word: {before:.0%} before, {after:.0%} after")

# %% [markdown]
# One linear map is enough, because the ideas were already apart in the tower. It can turn and stretch, not invent:
# what the tower mixes up, no matrix after it can part. That is why chapter 04 came first.
#
# Two vectors that live in one space should also be of comparable length. Word embeddings are multiplied by $\sqrt{D}$
# (chapter 08).
# Projected patches are not: the matrix learns their length itself.
#
# ## To the right place
#
# The prompt's ids hold placeholders: the token `<image>`, once for each patch. Here with 9 as its id, and two
# patches.
# We walk along the row, and each time we meet a 9, we take the next patch.

# %%
IMAGE = 9


def replace_naive(ids: list[int], words: dict[int, list[float]], patches: list[list[float]]) -> list[list[float]]:
    waiting = list(patches)
    return [waiting.pop(0) if token == IMAGE else words[token] for token in ids]


words = {2: [0.2, 0.2], 5: [0.5, 0.5], 7: [0.7, 0.7]}
replace_naive([IMAGE, IMAGE, 2, 5, 7], words, patches=[[10.0, 11.0], [20.0, 21.0]])

# %% [markdown]
# For a whole batch, torch has this walk as one operation: `masked_scatter` fills the marked places, row by row, with
# the next value of a second tensor.
#
# It would not notice if patches were left over. So we count first: a wrong count means that a picture and its prompt
# do not belong together.


# %%
# | export
def replace_image_tokens(
    embeddings: torch.Tensor, image_features: torch.Tensor, is_image: torch.Tensor
) -> torch.Tensor:
    """Put projected patches, in order, where the `<image>` placeholders stand.

    Parameters
    ----------
    embeddings : torch.Tensor
        (B, T, D).
    image_features : torch.Tensor
        (N, P, D) of N pictures; row by row of the batch, left to right.
    is_image : torch.Tensor
        Boolean (B, T), True at placeholders: N * P of them.

    Returns
    -------
    torch.Tensor
        (B, T, D).

    Raises
    ------
    ValueError
        If placeholders and patches differ in number.
    """
    patches = image_features.flatten(0, 1)  # (N*P, D)
    has_values = type(is_image) is torch.Tensor and not is_image.is_meta  # fake and meta tensors have shapes alone
    if has_values and int(is_image.sum()) != len(patches):
        raise ValueError(f"{int(is_image.sum())} <image> tokens for {len(patches)} patches: one patch for each token")
    return embeddings.masked_scatter(is_image[..., None], patches.to(embeddings.dtype))


# %% [markdown]
# The proof: it equals the walk.

# %%
ids = torch.tensor([[IMAGE, IMAGE, 2, 5, 7], [IMAGE, IMAGE, 2, 7, 7]])
table = torch.zeros(10, 2)
for token, vector in words.items():
    table[token] = torch.tensor(vector)
features = torch.randn(2, 2, 2)  # (N, P, D)
merged = replace_image_tokens(table[ids], features, ids == IMAGE)  # (B, T, D)
waiting = iter(features.tolist())
for row, expected in zip(ids.tolist(), merged):
    torch.testing.assert_close(torch.tensor(replace_naive(row, words, next(waiting))), expected)

# %% [markdown]
# Nothing in it knows how many pictures a prompt has. Two pictures are twice the placeholders, in order, wherever they
# stand.
# The first row below holds two pictures with a word between them, the second row one picture.

# %%
ids = torch.tensor([[IMAGE, IMAGE, 5, IMAGE, IMAGE], [IMAGE, IMAGE, 2, 5, 7]])
three = torch.tensor([[[1.0, 1.0]] * 2, [[2.0, 2.0]] * 2, [[3.0, 3.0]] * 2])  # (3, 2, 2): picture n is all n
merged = replace_image_tokens(table[ids], three, ids == IMAGE)
torch.testing.assert_close(merged[..., 0], torch.tensor([[1, 1, 0.5, 2, 2], [3, 3, 0.2, 0.5, 0.7]]))
merged[..., 0]

# %%
try:
    replace_image_tokens(table[ids], three[:2], ids == IMAGE)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Who may look at whom
#
# The answer is written from left to right, so an answer token may look only at what stands before it. That is the
# causal mask of chapter 03.
#
# The prefix is another matter. All of it is there from the start, and nothing in it has to be guessed.
# So it may look at itself in both directions: the first patch sees the last one, and patches see the question that is
# asked about them.
#
# Three rules, then, for a token *i* that looks at a token *j*:
#
# 1. the past is open;
# 2. inside the prefix everything is open;
# 3. padding is seen by nobody.


# %%
def prefix_mask_naive(attention_mask: list[int], token_type_ids: list[int]) -> list[list[bool]]:
    length = len(attention_mask)
    allowed = [[False] * length for _ in range(length)]
    for i in range(length):  # the token that looks
        for j in range(length):  # the token that is looked at
            past = j <= i
            both_in_prefix = token_type_ids[i] == 0 and token_type_ids[j] == 0
            allowed[i][j] = (past or both_in_prefix) and attention_mask[j] == 1
    return allowed


for line in prefix_mask_naive([1] * 5, token_type_ids=[0, 0, 0, 1, 1]):
    print(" ".join("x" if seen else "." for seen in line))

# %% [markdown]
# Rows look, columns are looked at. Three tokens of prefix see each other whole; two tokens of answer see the prefix
# and their own past.
#
# ## The formula
#
# $$ \text{allowed}_{ij} = \big(\,j \le i \;\lor\; (s_i = 0 \land s_j = 0)\,\big) \land a_j = 1 $$
#
# $s$ is `token_type_ids`, 0 in the prefix and 1 in the suffix; $a$ is `attention_mask`, 0 at padding.
# Some layers of Gemma 2 look back only $w$ tokens, themselves included: there $j \le i$ becomes $0 \le i - j < w$.
# The prefix stays open all the same.
#
# ## The whole batch at once


# %%
# | export
def prefix_mask(attention_mask: torch.Tensor, token_type_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Who may look at whom: the prefix sees itself whole, the suffix sees the prefix and its own past.

    Parameters
    ----------
    attention_mask : torch.Tensor
        (B, T), 0 at padding: nobody sees it.
    token_type_ids : torch.Tensor
        (B, T), 0 in the prefix (picture and prompt), 1 in the suffix (the answer).
    window : int, optional
        How far back a token sees, itself included. The prefix sees itself whole all the same.

    Returns
    -------
    torch.Tensor
        Boolean (B, 1, T, T), True where row may look at column.

    References
    ----------
    Beyer et al. 2024, "PaliGemma", section 3.1 and figure 2.
    """
    column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    back = column[:, None] - column[None, :]  # (T, T): how many columns back
    causal = back >= 0
    if window is not None:
        causal = causal & (back < window)
    prefix = token_type_ids == 0  # (B, T)
    both_prefix = prefix[:, :, None] & prefix[:, None, :]  # (B, T, T)
    return ((causal | both_prefix) & attention_mask[:, None, :].bool())[:, None]


# %% [markdown]
# The proof: two hundred random batches, padded on either side, with and without a window, against the loops.


# %%
def random_row(length: int) -> tuple[list[int], list[int]]:
    real = random.randint(1, length)
    prefix = random.randint(1, real)
    padding = [0] * (length - real)
    mask, types = [1] * real, [0] * prefix + [1] * (real - prefix)
    return (padding + mask, padding + types) if random.random() < 0.5 else (mask + padding, types + padding)


random.seed(0)
for _ in range(200):
    rows = [random_row(length=9) for _ in range(3)]
    attention_mask, token_type_ids = (torch.tensor(part) for part in zip(*rows))
    window = random.choice([None, 1, 3, 20])
    allowed = prefix_mask(attention_mask, token_type_ids, window)  # (B, 1, T, T)
    for row, (mask, types) in enumerate(rows):
        expected = torch.tensor(prefix_mask_naive(mask, types))
        if window is not None:  # what is far back is closed, unless both stand in the prefix
            kind, place = torch.tensor(types), torch.arange(len(mask))
            near = place[:, None] - place[None, :] < window
            expected &= near | ((kind == 0)[:, None] & (kind == 0)[None, :])
        assert torch.equal(allowed[row, 0], expected)

# %% [markdown]
# ## A look inside
#
# Here is the mask of a row like the one at the top of the chapter, with nine patches, four words of prompt and five
# of answer.
# A filled square means: the token of this row may look at the token of this column. The colour is that of the token
# looked at.
# On the right the same row in a sliding layer of Gemma 2 with a window of three.

# %%
counts = {"picture": 9, "prompt": 4, "answer": 5}
colours = {"picture": PICTURE, "prompt": PROMPT, "answer": ANSWER}
kinds = [kind for kind, count in counts.items() for _ in range(count)]
types = torch.tensor([[int(kind == "answer") for kind in kinds]])
everything = torch.ones_like(types)

figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
for axis, window, title in zip(axes, (None, 3), ("full attention", "a window of 3")):
    allowed = prefix_mask(everything, types, window)[0, 0]
    for i, j in allowed.nonzero().tolist():
        axis.add_patch(Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, facecolor=colours[kinds[j]]))
    edges = np.cumsum([0, *counts.values()])
    for edge in edges:
        axis.plot([edge, edge], [0, len(kinds)], color="0.75", lw=0.8, zorder=0)
        axis.plot([0, len(kinds)], [edge, edge], color="0.75", lw=0.8, zorder=0)
    for name, start, stop in zip(counts, edges, edges[1:]):
        axis.text((start + stop) / 2, -0.4, name, ha="center", size=9)
        axis.text(-0.4, (start + stop) / 2, name, ha="center", va="center", rotation=90, size=9)
    axis.set(xlim=(-1.2, len(kinds)), ylim=(len(kinds), -1.2), aspect="equal")
    axis.axis("off")
    axis.set_title(title, size=10)
save(figure, "09_mask")

# %% [markdown]
# *Figure: two grids, 18 by 18. In the left one the block of picture and prompt is filled whole, and the answer's rows
# form a staircase behind it.
# In the right one the block is the same, and each answer row keeps only itself and the two tokens before it.*
#
# How much does the open prefix give? For 256 patches, count the pairs that can see each other.

# %%
patches = torch.zeros(1, 256, dtype=torch.long)
open_pairs = int(prefix_mask(patches + 1, patches).sum())
causal_pairs = int(prefix_mask(patches + 1, patches + 1).sum())
assert open_pairs == 256 * 256 == 65_536
assert causal_pairs == 256 * 257 // 2 == 32_896
print(f"{open_pairs:,} pairs in a prefix, {causal_pairs:,} if pictures were read from left to right")

# %% [markdown]
# Nearly half of all looks would be lost, and the first patch would see nothing but itself.
#
# ## One token at a time
#
# While an answer is written, the keys and values of all earlier tokens wait in the cache of chapter 07.
# A new token may look at all of them, except padding. A sliding cache keeps its slots in another order, so we ask it
# which column each slot holds.


# %%
# | export
def step_mask(attention_mask: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The mask of one new token over a cache: padding stays unseen.

    Parameters
    ----------
    attention_mask : torch.Tensor
        (B, S) of all columns so far, 0 at padding.
    columns : torch.Tensor
        (C,), the column that each slot of the cache holds, as `KVCache.columns` tells.

    Returns
    -------
    torch.Tensor
        Boolean (B, 1, 1, C).
    """
    return attention_mask[:, columns].bool()[:, None, None]


# %% [markdown]
# The proof: over a real cache, each step sees what the last row of the whole mask sees. Two prompts of different
# length, padded on the left.

# %%
attention_mask = torch.tensor([[1] * 10, [0, 0] + [1] * 8])
token_type_ids = torch.tensor([[0] * 5 + [1] * 5] * 2)
for window in (None, 3):
    cache = KVCache(batch=2, num_kv_heads=1, max_length=10, head_dim=4, window=window)
    cache.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4))  # the prompt
    for column in range(5, 10):
        columns = cache.columns(column + 1)
        cache.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
        so_far = attention_mask[:, : column + 1]
        seen = torch.zeros_like(so_far, dtype=torch.bool)
        seen[:, columns] = step_mask(so_far, columns)[:, 0, 0]
        assert torch.equal(seen, prefix_mask(so_far, token_type_ids[:, : column + 1], window)[:, 0, -1])

# %% [markdown]
# ## One space for both
#
# In the pocket model it can be seen directly what the map has learnt: a patch of a red star lies near the words "red" and
# "star". Here is the test on it (or on the model in `SIGMA_BOOK_MODEL`): take the patch in the middle of each thing in forty
# scenes, and ask which of eight colour words and which of eight shape words its projected vector resembles most.

# %%
trained = load(os.environ.get("SIGMA_BOOK_MODEL"))
size = trained.config.vision.image_size
side = size // trained.config.vision.patch_size
tokenizer = trained.processor.tokenizer
rows = trained.language_model.embed_tokens.weight.float()
vectors = {word: rows[tokenizer.encode(f" {word}")[0]] for word in [*COLOURS, *SHAPES]}
centre = torch.stack(list(vectors.values())).mean(0)  # what all words share tells nothing


def nearest(vector: torch.Tensor, names: list[str]) -> str:
    return max(names, key=lambda name: torch.cosine_similarity(vector, vectors[name] - centre, dim=0).item())


right = {"colour": 0, "shape": 0}
looked_at = 0
with torch.no_grad():
    for seed in range(70_000_000, 70_000_040):
        scene = make_scene(seed)
        projected = trained.encode_images(pixels(draw_scene(scene), size)[None])[0].float()  # (P, D)
        for thing in scene.things:
            down, along = ((thing.box[i] + thing.box[i + 2]) * side // (2 * scene.size) for i in (0, 1))
            patch = projected[down * side + along]
            right["colour"] += nearest(patch, list(COLOURS)) == thing.colour
            right["shape"] += nearest(patch, list(SHAPES)) == thing.shape
            looked_at += 1
print({name: f"{count / looked_at:.0%} of {looked_at}" for name, count in right.items()}, "by guessing: 12.5 %")

# %% [markdown]
# In the pocket model nearly every patch points at its own words: chapter 17 teaches it so from the first step. A large
# model need not do this: it is taught with whole sentences only, and its blocks can read directions that are no word's.

# %% [markdown]
# ## The bill
#
# The projector is the smallest part of PaliGemma by far. Its share of the whole is below a thousandth.

# %%
parameters = {
    name: 1152 * width + width for name, width in (("3B", 2048), ("2 3B", 2304), ("2 10B", 3584), ("2 28B", 4608))
}
assert parameters["3B"] == 2_361_344 == sum(p.numel() for p in Projector(1152, 2048).parameters())
assert parameters["3B"] / 2_923_466_480 < 1 / 1000
parameters

# %% [markdown]
# A multiplication and an addition for each weight and each patch make its work. The mask costs a byte for each pair
# of tokens,
# and is shared by all layers and heads.

# %%
flops = 2 * 256 * 1152 * 2048
assert flops == 1_207_959_552  # 1.2 GFLOP for 256 patches
tokens = 256 + 30 + 20  # picture, prompt, answer
mask = prefix_mask(torch.ones(1, tokens), torch.zeros(1, tokens))
assert mask.nbytes == tokens**2 == 93_636
large = 4096 + 50  # 896 x 896 pixels
print(f"{flops / 1e9:.1f} GFLOP, mask {mask.nbytes / 1e3:.0f} kB; at 896 px {large**2 / 1e6:.0f} MB")

# %% [markdown]
# ## Your turn
#
# **1.** ★ Which share of the row is picture? Write `picture_share(image_size, words)` for patches of 14 pixels and
# that many words behind them.


# %%
def picture_share(image_size: int, words: int) -> float: ...


check(picture_share, ((224, 0), 1.0), ((224, 256), 0.5), ((448, 256), 0.8))

# %% [markdown]
# **2.** ★★ A classic mistake hands `attention_mask` over as the mask, so the answer sees itself whole and the loss
# looks too good.
# Write `leaks(prefix, suffix)`: how many pairs (i, j) of answer tokens with j in the future would then be open?


# %%
def leaks(prefix: int, suffix: int) -> int: ...


check(leaks, ((5, 1), 0), ((5, 2), 1), ((100, 5), 10))

# %% [markdown]
# **3.** ★★ Write `open_pairs_of(prefix, suffix)`: how many squares are filled in the left grid? No loops over pairs.


# %%
def open_pairs_of(prefix: int, suffix: int) -> int: ...


check(open_pairs_of, ((3, 0), 9), ((3, 2), 18), ((13, 5), 249))

# %% [markdown]
# **4.** ★★★ Several questions can share one picture in one row. The picture sees itself whole; each question sees the
# picture and its own past, and no other question.
# Write `packed(owner)`, where `owner[i]` is 0 for the picture and 1, 2, ... for the questions.


# %%
def packed(owner: list[int]) -> list[list[bool]]: ...


check(
    packed,
    (
        ([0, 0, 1, 1, 2],),
        [
            [True, True, False, False, False],
            [True, True, False, False, False],
            [True, True, True, False, False],
            [True, True, True, True, False],
            [True, True, False, False, True],
        ],
    ),
)

# %% [markdown]
# Next: chapter 10 puts eyes, bridge and voice into one class, and counts every parameter.
