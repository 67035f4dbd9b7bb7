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
# # The eyes: SigLIP
#
# *What turns patches into features that already know what they show?*
#
# **You build** the vision tower and the loss that taught it. **You need** chapters 02 and 03.
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
import os

import matplotlib.pyplot as plt

from sigma_book import load
from sigma_book.processor import pixels
from sigma_book.style import GREY, PICTURE, check, draw_matrix, save, use_style
from sigma_book.world import COLOURS, SHAPES, caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# One block does two things. First tokens *exchange*: attention, from chapter 03. Then each token *thinks* by itself: two
# linear maps with a bend between them. What comes out is added to what went in. SigLIP stacks 27 such blocks.

# %%
figure, axis = plt.subplots(figsize=(6.6, 1.9))
steps = ["normalize", "attend", "+", "normalize", "think", "+"]
for place, name in enumerate(steps):
    colour = PICTURE if name in ("attend", "think") else "white"
    ink = "white" if colour == PICTURE else "black"
    axis.text(place, 0, name, ha="center", va="center", color=ink, bbox={"boxstyle": "round", "fc": colour, "ec": GREY})
for place in range(len(steps) - 1):
    axis.annotate("", (place + 0.63, 0), (place + 0.37, 0), arrowprops={"arrowstyle": "->", "color": GREY})
for start, end in ((-0.7, 2), (2.25, 5)):
    arc = {"arrowstyle": "->", "color": GREY, "connectionstyle": "arc3,rad=-0.35", "shrinkB": 9}
    axis.annotate("", (end, 0.1), (start, 0.1), arrowprops=arc)
axis.set(xlim=(-1, 5.6), ylim=(-0.5, 1.4))
axis.axis("off")
save(figure, "04_block")
plt.show()

# %% [markdown]
# *A block from left to right. The two arcs are the shortcuts: the input is carried round each half and added.*
#
# The shortcuts matter. Each block only has to say what to *change*. A signal, and a gradient, can pass 27 blocks
# unharmed.
#
# ## First by hand
#
# Before each half, every token is brought to a common size: subtract its mean, divide by its spread. Then each
# dimension has a learned gain and shift. This is *LayerNorm*.

# %%
token = [1.0, 2.0, 3.0, 6.0]
mean = sum(token) / 4
spread = (sum((number - mean) ** 2 for number in token) / 4 + 1e-6) ** 0.5
by_hand = [(number - mean) / spread for number in token]
torch.testing.assert_close(torch.tensor(by_hand), F.layer_norm(torch.tensor(token), (4,), eps=1e-6))
[round(number, 3) for number in by_hand]

# %% [markdown]
# The bend between the two maps is the *GELU*: a number times the chance that a normal random number lies below it.
# SigLIP was trained with an approximation of it by a hyperbolic tangent, and we must use the same.

# %%
line = torch.linspace(-4, 4, 400)
exact, tanh = F.gelu(line), F.gelu(line, approximate="tanh")
by_hand = 0.5 * line * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (line + 0.044715 * line**3)))
torch.testing.assert_close(tanh, by_hand)
figure, axis = plt.subplots(figsize=(5, 2.4))
axis.plot(line, tanh, color=PICTURE)
axis.annotate("gelu, by tanh", (2, 2), xytext=(-6, 4), textcoords="offset points", ha="right", color=PICTURE)
axis.plot(line, 1000 * (tanh - exact), color=GREY, lw=1)
axis.annotate("1000 times its distance\nfrom the exact one", (-2.4, -0.4), xytext=(-3.9, 1.4), color=GREY, fontsize=9)
axis.set(xlabel="x")
save(figure, "04_gelu")
plt.show()
worst = (tanh - exact).abs().max().item()
assert 1e-4 < worst < 1e-3

# %% [markdown]
# *The curve is zero on the far left, the line x on the far right. The grey line is the error of the approximation,
# a thousand times enlarged.* An error of under a thousandth sounds like nothing. Over 27 blocks it is enough to
# change answers, so it is one of the first things to check in a port.
#
# ## The formula
#
# $$ h \leftarrow h + \mathrm{attend}(\mathrm{norm}_1(h)) $$
#
# $$ h \leftarrow h + W_2\,\mathrm{gelu}(W_1\,\mathrm{norm}_2(h) + b_1) + b_2 $$
#
# ## The tensor version
#
# The sizes first, under the names that `config.json` uses.


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
# The whole tower against `transformers`, with random weights and sizes that are not powers of two.

# %%
from transformers import SiglipVisionConfig, SiglipVisionModel

sizes = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3}
sizes |= {"image_size": 42, "patch_size": 14}
reference = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False)).eval()
ours = SiglipVisionTower(SiglipConfig(**sizes))
ours.load_state_dict({name.removeprefix("vision_model."): value for name, value in reference.state_dict().items()})
picture = torch.randn(2, 3, 42, 42)
torch.testing.assert_close(ours(picture), reference(picture).last_hidden_state, atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## What taught it: the sigmoid loss
#
# A tower can be taught with pictures and their captions from the web. Nobody labels a thing. A second tower reads the
# caption, and both give one vector. The wish: vectors of a picture and its own caption point the same way, all other
# pairs do not.
#
# SigLIP asks of *each pair* a yes-or-no question: do you belong together? With $z = 1$ for a pair and $-1$ for
# strangers, and $x, y$ vectors of length 1, the chance of a right answer is a sigmoid, and the loss its negative
# logarithm:
#
# $$ -\frac{1}{N} \sum_{i} \sum_{j} \log \sigma\!\left( z_{ij}\,(t\, x_i \cdot y_j + b) \right) $$
#
# $t$ sharpens, $b$ starts very low, because almost all pairs are strangers. Every pair stands for itself, so a
# batch can be spread over many machines without a sum over all of it. That is what sets SigLIP apart from CLIP.


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
# By hand, for two pictures and two captions:

# %%
import math

x = F.normalize(torch.tensor([[1.0, 0.2], [0.1, 1.0]]), dim=-1)
y = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=-1)
total = 0.0
for i in range(2):
    for j in range(2):
        z = 1 if i == j else -1
        total += -math.log(1 / (1 + math.exp(-z * (10 * float(x[i] @ y[j]) - 5))))
torch.testing.assert_close(sigmoid_loss(x, y, torch.tensor(10.0), torch.tensor(-5.0)), torch.tensor(total / 2))

# %% [markdown]
# ## Taught for a few seconds
#
# A small tower, and captions of scenes with one thing. The text side is as simple as can be: the mean of a vector for
# each word. Pairs that say the same count as matches, since in our world captions repeat.

# %%
words = sorted({word for shape in SHAPES for colour in COLOURS for word in (shape, colour, "a", "an")})
config = SiglipConfig(64, 128, 2, 4, image_size=112, patch_size=14)
tower, text, project = SiglipVisionTower(config), nn.Embedding(len(words), 64), nn.Linear(64, 64)
scale, bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-8.0))
nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.1)

matrices = [p for p in tower.encoder.parameters() if p.ndim == 2]
chosen = {id(p) for p in matrices}
others = [p for m in (tower, text, project) for p in m.parameters() if id(p) not in chosen] + [scale, bias]
optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=2e-3)]


def show(seeds) -> tuple[torch.Tensor, list[str]]:
    scenes = [make_scene(seed, max_things=1) for seed in seeds]
    return torch.stack([pixels(draw_scene(scene), 112) for scene in scenes]), [caption(scene) for scene in scenes]


def both(pictures: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    seen = F.normalize(project(tower(pictures).mean(1)), dim=-1)  # (N, 64)
    read = torch.stack([text(torch.tensor([words.index(word) for word in line.split()])).mean(0) for line in captions])
    return seen, F.normalize(read, dim=-1)


losses = []
for step in range(120):
    pictures, captions = show(range(1000 + 64 * step, 1064 + 64 * step))
    matches = torch.tensor([[one == other for other in captions] for one in captions])
    loss = sigmoid_loss(*both(pictures, captions), scale, bias, matches)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    losses.append(loss.item())
f"loss {losses[0]:.2f} at the start, {sum(losses[-10:]) / 10:.2f} at the end"

# %% [markdown]
# Two optimizers share the work: *Muon* for the matrices inside the blocks, *AdamW* for the rest. Chapter 17 shows how
# much that pays.
#
# Eight scenes that it never saw, and their captions in another order: each picture should pick its own.

# %%
kinds, seeds = [], []
for seed in range(500_000, 500_400):  # eight scenes with eight different captions
    line = caption(make_scene(seed, 1))
    if line not in kinds and len(kinds) < 8:
        kinds.append(line)
        seeds.append(seed)
with torch.no_grad():
    seen, read = both(*show(seeds))
agreement = seen @ read.T  # (8, 8)
figure, axis = plt.subplots(figsize=(5.4, 3.6))
draw_matrix(axis, agreement, [f"picture {i + 1}" for i in range(8)], kinds, cmap="Blues")
save(figure, "04_matches")
plt.show()
found = (agreement.argmax(1) == torch.arange(8)).sum().item()
assert sum(losses[-10:]) < sum(losses[:10])
print(f"{found} of 8 pictures find their caption; guessing finds 1")

# %% [markdown]
# *Rows are pictures, columns their captions; dark means that they point the same way. The diagonal is the right
# answer.* After a few seconds, colour is learned and shape begins. The real tower saw billions of pairs.
#
# ## A look inside
#
# How alike are the features of patches? We take one patch of a thing and compare it with all others, before the first
# block and after the last.

# %%
model = load(os.environ.get("SIGMA_BOOK_MODEL"))
vision = model.config.vision
side = vision.image_size // vision.patch_size
scene = make_scene(11)
with torch.no_grad():
    tensor = pixels(draw_scene(scene), vision.image_size)[None]
    early, late = model.vision_tower.embeddings(tensor)[0], model.vision_tower(tensor)[0]
thing = scene.things[0]
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
# *A scene with a dot on one patch; how like that patch all others are, before and after the blocks (red alike, blue
# opposed).* Before, likeness is a matter of colour and of place. After, all patches of the same thing say the same.
#
# ## The bill
#
# SigLIP-So400m, the tower of PaliGemma: 27 blocks of width 1152, 16 heads, MLP of 4304. (Descriptions with 12 blocks
# and 86 M parameters confuse it with a smaller ViT.)

# %%
large = SiglipConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
)
with torch.device("meta"):  # shapes without numbers
    eyes = SiglipVisionTower(large)
parts = {name: sum(p.numel() for p in part.parameters()) for name, part in eyes.named_children()}
total = sum(parts.values())
assert total == 412_442_352
block = sum(p.numel() for p in eyes.encoder.layers[0].parameters())
flops = 2 * 256 * (total - parts["embeddings"]) + 27 * 4 * 256**2 * 1152
parts | {
    "total": total,
    "one block": block,
    "GFLOP for a picture": round(flops / 1e9),
    "MB in 16 bits": round(2 * total / 1e6),
}

# %% [markdown]
# 412 million parameters, and more than two hundred billion operations for one look.
#
# ## Your turn
#
# **1.** LayerNorm by hand: mean, spread, divide (no gain, no shift).


# %%
def normalize(numbers: torch.Tensor) -> torch.Tensor: ...


check(normalize, ((torch.tensor([1.0, 3.0]),), torch.tensor([-1.0, 1.0])))

# %% [markdown]
# **2.** How many parameters has one block of width `d` and MLP width `f`?


# %%
def block_size(d: int, f: int) -> int: ...


check(block_size, ((1152, 4304), block), ((2, 3), 49))

# %% [markdown]
# **3.** Before it has learned anything, with `scale` 0: what is the loss of `n` pairs for a given bias?


# %%
def first_loss(n: int, bias: float) -> float: ...


check(first_loss, ((1, 0.0), math.log(2)), ((64, -10.0), 10.0 + 64 * math.log(1 + math.exp(-10.0))))

# %% [markdown]
# Next: the other half. Before a model can speak, its words need an order.
