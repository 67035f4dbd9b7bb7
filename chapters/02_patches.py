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
# # From pixels to tokens
#
# *How does a picture become a short list of vectors that a transformer can read?*
#
# **You build** patches and their embedding. **You need** chapter 01 (the world).
# **Exports** the module `sigma_book.patches`.

# %%
# | export
import torch
from torch import nn
from torch.nn import functional as F


# %%
import matplotlib.pyplot as plt
import numpy as np

from sigma_book.style import HEADS, PICTURE, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A transformer reads a row of vectors, called **tokens**. A sentence comes as a row of words already.
# A picture does not: it is a grid of pixels, and nothing says where one "word" of it ends.
#
# The answer is almost rude. Lay a grid over the picture, cut along the lines, and call every square a word.
# The squares are called **patches**.

# %%
drawn = draw_scene(make_scene(5))
patch_size, size = 14, drawn.width
per_side = size // patch_size
assert (size, per_side, per_side**2) == (112, 8, 64)

figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 4.0))
left.imshow(drawn)
for line in range(0, size + 1, patch_size):
    left.axhline(line - 0.5, color=PICTURE, lw=0.8)
    left.axvline(line - 0.5, color=PICTURE, lw=0.8)
left.set_title("one picture, 112 x 112 pixels")
gap = 5
for patch in range(per_side**2):
    row, column = divmod(patch, per_side)
    box = (column * patch_size, row * patch_size, (column + 1) * patch_size, (row + 1) * patch_size)
    x, y = column * (patch_size + gap), row * (patch_size + gap)
    right.imshow(drawn.crop(box), extent=(x, x + patch_size, y + patch_size, y))
    if patch in (0, 1, 2, 8, 63):
        right.text(x + 7, y + 7, patch, ha="center", va="center", fontsize=8, color=PICTURE)
end = per_side * (patch_size + gap) - gap
right.set(xlim=(-2, end + 2), ylim=(end + 2, -2), title="64 patches, 14 x 14 pixels each")
for axis in (left, right):
    axis.axis("off")
save(figure, "02_patches")

# %% [markdown]
# *Figure: a drawn scene with a grid of eight by eight over it; beside it the same scene cut apart into 64 squares.
# Patch 0 is at the top left, patch 8 begins the second row, patch 63 ends the last.*
#
# The order is the order of reading: row by row from the top left.
#
# ## One number at a time
#
# First the picture as numbers: three channels (red, green, blue), rows, columns. A pixel value between 0 and 255
# becomes a number between -1 and 1. (Chapter 11 does this with all the care that real photographs need.)

# %%
picture = torch.from_numpy(np.array(drawn)).permute(2, 0, 1) / 127.5 - 1  # (C, S, S)
assert picture.shape == (3, 112, 112)
assert picture.min() >= -1 and picture.max() <= 1

# %% [markdown]
# Now the cutting, in plain loops. For each patch we walk over channels, then rows, then columns, and write down what
# we meet. That makes one list of numbers for each patch.


# %%
def patchify_naive(picture: torch.Tensor, patch_size: int) -> torch.Tensor:
    channels, height, width = picture.shape
    patches = []
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            numbers = []
            for channel in range(channels):
                for row in range(top, top + patch_size):
                    for column in range(left, left + patch_size):
                        numbers.append(picture[channel, row, column].item())
            patches.append(numbers)
    return torch.tensor(patches)


naive = patchify_naive(picture, patch_size)
naive.shape

# %% [markdown]
# 64 patches, and $3 \cdot 14 \cdot 14$ numbers in each. Nothing is lost so far: the same numbers stand in
# another order.

# %%
assert naive.shape == (64, 3 * 14 * 14) == (64, 588)
assert naive.numel() == picture.numel()
assert torch.equal(naive.flatten().sort().values, picture.flatten().sort().values)

# %% [markdown]
# 588 numbers are a clumsy token. The model wants vectors of its own width $D$. The cheapest way there is a linear
# map: each new number is a weighted sum of all 588, plus a constant. Every patch goes through the same weights.


# %%
def embed_naive(patch: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
    token = []
    for weights, constant in zip(weight, bias, strict=True):
        total = constant
        for number, factor in zip(patch, weights, strict=True):
            total += number * factor
        token.append(total)
    return token


embed_naive([1.0, -1.0, 0.5], weight=[[1.0, 1.0, 1.0], [2.0, 0.0, 4.0]], bias=[0.0, 10.0])

# %% [markdown]
# A patch of three numbers became a token of two.
#
# ## The formula
#
# $$ z_i = W x_i + b + e_i, \qquad i = 0 \dots P - 1, \qquad P = \left(\frac{S}{p}\right)^2 $$
#
# $S$ is the picture's side in pixels, $p$ the patch's side; $x_i$ holds the $C p^2$ numbers of patch $i$;
# $W$ is a $D \times C p^2$ matrix. $e_i$ is new: a vector for the *place* $i$. We come to it below.
#
# ## All patches at once
#
# From here on a tensor holds several pictures at once, a *batch*. Its size B stands first in every shape; `picture[None]` is a
# batch of one.
#
# PyTorch calls the cutting `unfold`. It hands back one patch a column, so we turn the result around.


# %%
# | export
def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut pictures into square patches, each flattened in the order channel, row, column.

    Parameters
    ----------
    pixel_values : torch.Tensor
        Pictures (B, C, S, S); S must be a multiple of `patch_size`.
    patch_size : int
        Side p of a patch, in pixels.

    Returns
    -------
    torch.Tensor
        Patches (B, P, C * p * p), row by row from the top left.

    Raises
    ------
    ValueError
        If the pictures do not divide into whole patches.
    """
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"a picture of {height} x {width} pixels does not divide into patches of {patch_size}")
    return F.unfold(pixel_values, kernel_size=patch_size, stride=patch_size).transpose(1, 2)  # (B, P, C*p*p)


# %% [markdown]
# It equals the five loops, number for number.

# %%
patches = patchify(picture[None], patch_size)  # (1, P, C*p*p)
assert torch.equal(patches[0], naive)

# %% [markdown]
# ## The same thing by another name
#
# Look into most implementations of a vision transformer, and you find no cutting at all. You find a **convolution**: a
# small window of weights that slides over the picture and gives a weighted sum at each stop.
#
# When the window is as large as a patch and each step as long as the window, no pixel is seen twice and none is left
# out. That is cutting and mapping in one stroke. The weights are the same, only folded back into a square.

# %%
convolution = nn.Conv2d(3, 128, kernel_size=patch_size, stride=patch_size)
by_convolution = convolution(picture[None])  # (1, D, S/p, S/p)
by_convolution = by_convolution.flatten(2).transpose(1, 2)  # (1, P, D)

weight = convolution.weight.flatten(1)  # (D, C*p*p)
by_linear = F.linear(patches, weight, convolution.bias)  # (1, P, D)

torch.testing.assert_close(by_linear, by_convolution, rtol=1e-5, atol=1e-5)

# %% [markdown]
# Trained models on disk, called *checkpoints*, store the folded shape, (D, 3, 14, 14). We keep it, so that files load
# without a conversion, and flatten it when we use it.
#
# This only works because `patchify` writes channel, row, column, and `flatten` reads in that order. A patch written
# row, column, channel has the same 588 numbers and the same shape. Nothing crashes. The tokens are wrong.

# %%
shuffled = patches.unflatten(-1, (3, 14, 14)).permute(0, 1, 3, 4, 2).flatten(2)  # row, column, channel
wrong = F.linear(shuffled, weight, convolution.bias)
assert wrong.shape == by_linear.shape
assert (wrong - by_linear).abs().max() > 0.1

# %% [markdown]
# ## A place for every patch
#
# One map for all patches has a price: it does not know where a patch comes from. Take the 64 patches, shuffle them,
# and the tokens are the old ones, shuffled.

# %%
order = torch.randperm(64)
tokens_of_shuffled = F.linear(patches[:, order], weight, convolution.bias)
torch.testing.assert_close(tokens_of_shuffled, by_linear[:, order])

# %% [markdown]
# Chapter 03 will show that attention does not care about order either. So a model without places could not tell these
# two pictures apart.

# %%
mixed = F.fold(patches[:, order].transpose(1, 2), size, kernel_size=patch_size, stride=patch_size)[0]
figure, axes = plt.subplots(1, 2, figsize=(5.2, 2.7))
for axis, shown, title in zip(axes, (picture, mixed), ("the scene", "the same 64 patches")):
    axis.imshow(shown.permute(1, 2, 0) / 2 + 0.5)
    axis.set_title(title)
    axis.axis("off")
save(figure, "02_shuffled")

# %% [markdown]
# *Figure: the scene, and beside it the same squares in random order, a mosaic in which no shape is left.*
#
# The remedy is a table with one row for each place. Row $i$ is added to whatever token stands at place $i$. The rows
# are learned like any other weight: the model finds out for itself what is worth knowing about a place.
#
# The class below holds both parts. In `forward`, read the shapes.


# %%
# | export
class PatchEmbeddings(nn.Module):
    """Pictures to tokens: one linear map for every patch, plus a learned vector for every place.

    The weight keeps the shape of the convolution that checkpoints store, (D, C, p, p).

    Parameters
    ----------
    image_size, patch_size : int
        Sides in pixels; (image_size // patch_size) ** 2 patches.
    hidden_size : int
        D, width of a token.
    num_channels : int
        C, 3 for RGB.

    References
    ----------
    Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1.
    """

    def __init__(self, image_size: int, patch_size: int, hidden_size: int, num_channels: int = 3):
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.patch_embedding = nn.Conv2d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2, hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"this model looks at {self.image_size} x {self.image_size} pixels, got {height} x {width}"
            )
        patches = patchify(pixel_values.to(self.patch_embedding.weight.dtype), self.patch_size)  # (B, P, C*p*p)
        tokens = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)  # (B, P, D)
        return tokens + self.position_embedding.weight


# %% [markdown]
# ## Proof
#
# The class equals the loops: cut by hand, map by hand, add the row of the place. We check three of the 64 patches,
# because pure Python is slow.

# %%
embed = PatchEmbeddings(image_size=112, patch_size=14, hidden_size=128)
with torch.no_grad():
    tokens = embed(picture[None])  # (1, P, D)
    flat = embed.patch_embedding.weight.flatten(1).tolist()
    for place in (0, 27, 63):
        by_hand = torch.tensor(embed_naive(naive[place].tolist(), flat, embed.patch_embedding.bias.tolist()))
        by_hand += embed.position_embedding.weight[place]
        torch.testing.assert_close(tokens[0, place], by_hand, rtol=1e-5, atol=1e-5)

# %% [markdown]
# And it equals torch's convolution plus the table, for a batch. (`tests/test_patches.py` compares with the SigLIP of
# `transformers`, weight for weight.)

# %%
batch = torch.randn(2, 3, 112, 112)
with torch.no_grad():
    reference = embed.patch_embedding(batch).flatten(2).transpose(1, 2) + embed.position_embedding.weight
    torch.testing.assert_close(embed(batch), reference, rtol=1e-5, atol=1e-5)

# %% [markdown]
# Now order matters: the shuffled picture gives other tokens, not the old ones shuffled.

# %%
with torch.no_grad():
    assert (embed(mixed[None]) - tokens[:, order]).abs().max() > 0.1

# %% [markdown]
# ## How many tokens
#
# PaliGemma cuts patches of 14 pixels and comes in three picture sizes. Twice the side is four times the tokens.

# %%
token_counts = {side: (side // 14) ** 2 for side in (112, 224, 448, 896)}
assert token_counts == {112: 64, 224: 256, 448: 1024, 896: 4096}
token_counts

# %% [markdown]
# 112 is the pocket model of this book, the others are PaliGemma's. 224 pixels make $224 / 14 = 16$ patches a side and
# 256 tokens. A page of text to read wants 896: at 224 pixels a letter of a printed page would be squeezed into one or two
# pixels.
#
# A side that 14 does not divide is an error. Silently dropping the last columns would be worse.

# %%
try:
    patchify(torch.zeros(1, 3, 112, 120), 14)
except ValueError as error:
    print(error)

# %% [markdown]
# ## What a patch loses
#
# Three things can go missing between pixels and tokens. The first is **detail, in the linear map**. It depends on the
# width. PaliGemma's tokens have 1,152 numbers, more than the 588 that come in. So such a map need not lose anything: here a
# random one is undone, and we get the pixels back.

# %%
wide = torch.randn(1152, 588, dtype=torch.float64)
pixels_back = (patches[0].double() @ wide.T) @ torch.linalg.pinv(wide).T  # (P, 588)
torch.testing.assert_close(pixels_back, patches[0].double(), rtol=0, atol=1e-9)

# %% [markdown]
# The pocket's tokens have 128 numbers. 588 do not fit in. But patches are not noise: neighbouring pixels are nearly
# equal, so a few directions say nearly everything. The best ones are among the eigenvectors of $X^\top X$, where each row of
# $X$ is a patch less the mean of all patches. Each eigenvector is a direction, and its eigenvalue says how much the patches
# differ along it: `energy` in the code. We take 200 scenes, sort by it, keep the first $D$ directions, and look at what comes
# back. (This is called *principal component analysis*.)

# %%
many = torch.stack([torch.from_numpy(np.array(draw_scene(make_scene(seed)))) for seed in range(200)])
many = patchify(many.permute(0, 3, 1, 2) / 127.5 - 1, patch_size).flatten(0, 1)  # (200 * P, 588)
centre = many.mean(dim=0)
energy, directions = torch.linalg.eigh((many - centre).T @ (many - centre))  # smallest first
energy, directions = energy.flip(0), directions.flip(1)  # (588,), (588, 588)
kept = {width: (energy[:width].sum() / energy.sum()).item() for width in (1, 8, 32, 128)}
assert kept[8] > 0.85 and kept[128] > 0.99
{width: f"{share:.1%}" for width, share in kept.items()}

# %%
figure, axes = plt.subplots(1, 5, figsize=(8.4, 2))
for axis, width in zip(axes, (1, 8, 32, 128, 588)):
    basis = directions[:, :width]
    returned = (patches - centre) @ basis @ basis.T + centre  # (1, P, 588)
    shown = F.fold(returned.transpose(1, 2), size, kernel_size=patch_size, stride=patch_size)[0]
    axis.imshow((shown.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
    axis.set_title(f"{width} number{'s' if width > 1 else ''}", fontsize=9)
    axis.axis("off")
save(figure, "02_width")

# %% [markdown]
# *Figure: the scene rebuilt from tokens of 1, 8, 32, 128 and 588 numbers. With one, patches are grey squares; with
# eight, blocks of colour; with 32 edges appear; from 128 on the eye sees no difference.*
#
# The second loss is **what happens before the cut**. The picture is resized to the model's side, and what is smaller
# than a pixel then is gone. No width of token brings it back. Here is the scene, made small, as a model of 28 pixels
# would get it: four tokens.

# %%
figure, axes = plt.subplots(1, 3, figsize=(6.6, 2.5))
for axis, side in zip(axes, (112, 56, 28)):
    axis.imshow(drawn.resize((side, side)))
    axis.set_title(f"{side} pixels, {(side // patch_size) ** 2} tokens", fontsize=9)
    axis.axis("off")
save(figure, "02_resize")

# %% [markdown]
# *Figure: the scene at 112, 56 and 28 pixels. At 28 the tips of the star are blurred, and the small
# diamond could as well be a cross.*
#
# The third loss is subtler: **a thing that moves does not give the same tokens at another place**. Move the scene by
# a whole patch, and (without positions) the tokens move along. Move it by a few pixels, and every patch that holds an
# edge looks different. The line shows how far the tokens are from the nearest whole-patch shift.


# %%
def tokens_without_places(shown: torch.Tensor) -> torch.Tensor:
    return F.linear(patchify(shown[None], patch_size), weight)[0].unflatten(0, (per_side, per_side))  # (8, 8, D)


still = tokens_without_places(picture)
distances = []
for shift in range(29):
    moved = tokens_without_places(picture.roll(shift, dims=2))
    candidates = [(moved - still.roll(whole, dims=1)).norm() for whole in range(3)]
    distances.append((min(candidates) / (still - still.mean((0, 1))).norm()).item())
assert max(distances[0], distances[14], distances[28]) < 1e-5
assert min(distances[4:11]) > 0.5

figure, axis = plt.subplots(figsize=(6.4, 2.6))
axis.plot(range(29), distances, color=PICTURE, marker="o", ms=3)
for whole in (0, 14, 28):
    axis.text(whole, -0.14, "same tokens", ha="center", fontsize=8, color="0.3")
axis.set(
    xlabel="pixels moved to the right",
    ylabel="relative distance",
    xticks=range(0, 29, 7),
    xlim=(-4, 32),
    ylim=(-0.2, 1.05),
)
save(figure, "02_shift")

# %% [markdown]
# *Figure: a line that touches zero at shifts of 0, 14 and 28 pixels and rises steeply between.*
#
# So the tokens of this chapter know what colour stands in a square, and where. That two squares hold halves of one
# star, they do not know. Someone has to compare them.
#
# ## A look inside
#
# The directions that we kept above are patches themselves, so we can look at them. They are the best alphabet for
# squares of this world: first brightness, then edges from one side to the other, then colours, then finer patterns.

# %%
figure, axes = plt.subplots(2, 8, figsize=(7.4, 2.1))
for number, axis in enumerate(axes.flat):
    filter_ = directions[:, number].unflatten(0, (3, 14, 14)).permute(1, 2, 0)  # (14, 14, 3)
    axis.imshow(filter_ / filter_.abs().max() / 2 + 0.5)
    axis.set_title(number + 1, fontsize=8, color=HEADS[0])
    axis.axis("off")
save(figure, "02_alphabet")

# %% [markdown]
# *Figure: sixteen small squares. The first is even and light. The next two change from top to bottom and from left to
# right, the fourth and the fifth are even colours. Later ones show corners, stripes and checks.*
#
# ## The bill
#
# One matrix, one bias, one table. For PaliGemma at 224 pixels that is less than a million numbers.


# %%
def embedding_parameters(image_size: int, hidden_size: int, patch_size: int = 14, num_channels: int = 3) -> int:
    linear = num_channels * patch_size**2 * hidden_size + hidden_size
    return linear + (image_size // patch_size) ** 2 * hidden_size


with torch.device("meta"):  # shapes without numbers: nothing is allocated
    for sizes in ((112, 128), (224, 1152), (448, 1152), (896, 1152)):
        built = PatchEmbeddings(sizes[0], 14, sizes[1])
        assert sum(parameter.numel() for parameter in built.parameters()) == embedding_parameters(*sizes)
assert embedding_parameters(112, 128) == 83_584
assert embedding_parameters(224, 1152) == 973_440

# %% [markdown]
# Work: each of $P$ patches costs $C p^2 D$ multiplications and as many additions. We count both, and call that FLOPs.

# %%
flops = {side: 2 * 588 * width * (side // 14) ** 2 for side, width in ((112, 128), (224, 1152), (896, 1152))}
assert flops[112] == 9_633_792  # ten million
assert flops[224] == 346_816_512  # a third of a billion
assert flops[896] == 16 * flops[224]

# %% [markdown]
# Bytes: the tokens of one 224-pixel picture, in 16 bits, take four times as many bytes as the picture's pixels.
# Tokens are not compression. They are a form in which a model can think.

# %%
token_bytes = 256 * 1152 * 2
pixel_bytes = 224 * 224 * 3
assert token_bytes == 589_824 and pixel_bytes == 150_528
assert round(token_bytes / pixel_bytes) == 4

# %% [markdown]
# ## Your turn
#
# **1.** ★ Which patch holds the pixel in row `row` and column `column`? Write `patch_of(row, column, image_size)` for
# patches of 14 pixels.


# %%
def patch_of(row: int, column: int, image_size: int) -> int: ...


check(patch_of, ((0, 0, 112), 0), ((0, 14, 112), 1), ((14, 0, 112), 8), ((223, 223, 224), 255), ((100, 30, 448), 226))

# %% [markdown]
# **2.** ★★ Undo the cut. Write `unpatchify(patches, patch_size)`: patches (B, P, 3 * p * p) back to pictures
# (B, 3, S, S). `F.fold` is one way; `unflatten`, `permute` and `flatten` another.


# %%
def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor: ...


check(unpatchify, ((patches, 14), picture[None]), ((patchify(batch, 28), 28), batch))

# %% [markdown]
# **3.** ★★ A model taught at 224 pixels has a table of 256 places. To read 448 pixels it needs 1,024. Write
# `grow(table, side)`: a table (P, D) as a square of places, resized to `side` x `side` places with
# `F.interpolate(..., mode="bilinear")`, and back to (side * side, D).


# %%
def grow(table: torch.Tensor, side: int) -> torch.Tensor: ...


places = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
doubled = [0, 0.25, 0.75, 1, 0.5, 0.75, 1.25, 1.5, 1.5, 1.75, 2.25, 2.5, 2, 2.25, 2.75, 3]
wide = torch.tensor(doubled)[:, None]
check(grow, ((places, 2), places), ((torch.cat((places, -places), 1), 4), torch.cat((wide, -wide), 1)))

# %% [markdown]
# **4.** ★★★ `patchify` without `unfold`: a picture (B, C, S, S) is already all the numbers, and only the order is
# wrong. Write `patchify_by_hand(pictures, patch_size)` with `unflatten`, `permute` and `flatten` alone.


# %%
def patchify_by_hand(pictures: torch.Tensor, patch_size: int) -> torch.Tensor: ...


check(patchify_by_hand, ((picture[None], 14), patches), ((batch, 28), patchify(batch, 28)))

# %% [markdown]
# Next: the 64 tokens look at each other.
