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

from sigma_book.style import PICTURE, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A transformer reads a row of vectors. A picture is a grid of pixels, 112 x 112 of them here and three numbers in each.
# Taking every pixel as a token would give 12,544 tokens, and attention compares every token with every other.
#
# So we cut the picture into squares of 14 x 14 pixels. Each square is a *patch*, and each patch becomes one token.

# %%
scene = make_scene(5)
image = draw_scene(scene)
raw = torch.tensor(list(image.get_flattened_data())).reshape(112, 112, 3).permute(2, 0, 1) / 127.5 - 1  # (3, 112, 112)

figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0))
left.imshow(image)
for edge in range(14, 112, 14):
    left.axhline(edge - 0.5, color=PICTURE, lw=0.8)
    left.axvline(edge - 0.5, color=PICTURE, lw=0.8)
left.set_title("8 x 8 patches of 14 x 14 pixels")
row = 4
strip = image.crop((0, 14 * row, 112, 14 * (row + 1)))
right.imshow(strip)
for edge in range(14, 112, 14):
    right.axvline(edge - 0.5, color="white", lw=4)
right.set_title("row 5 of 8, as the model reads it")
for axis in (left, right):
    axis.axis("off")
save(figure, "02_patches")
plt.show()

# %% [markdown]
# *Left, a drawn scene with a grid over it: 64 squares. Right, one row of the grid, cut apart: eight tokens.*
#
# ## First by hand
#
# A patch is a small picture. To make a vector of it, we write its numbers one after the other: all reds, then all
# greens, then all blues, each row by row.


# %%
def patchify_naive(picture: torch.Tensor, size: int) -> torch.Tensor:
    patches = []
    for top in range(0, picture.shape[1], size):  # down the picture
        for start in range(0, picture.shape[2], size):  # and along each row
            numbers = []
            for channel in range(3):
                for y in range(top, top + size):
                    for x in range(start, start + size):
                        numbers.append(picture[channel, y, x].item())
            patches.append(numbers)
    return torch.tensor(patches)


naive = patchify_naive(raw, 14)
naive.shape

# %% [markdown]
# 64 patches of 588 numbers: 3 channels times 14 times 14 pixels.
#
# ## The formula
#
# A patch vector $x_p$ has 588 numbers. The model works with tokens of width $D$. One matrix $W$ and one vector $b$,
# the same for every patch, make the token. A learned vector $e_p$ for each place says where the patch was.
#
# $$ t_p = W x_p + b + e_p, \qquad p = 1 \dots P, \qquad P = \left(\frac{S}{14}\right)^2 $$
#
# ## All patches at once
#
# PyTorch cuts the patches in one call.


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
# ## Proof
#
# It gives the same numbers in the same order as the six loops.

# %%
torch.testing.assert_close(patchify(raw[None], 14)[0], naive)

# %% [markdown]
# ## A convolution that does not overlap
#
# Checkpoints do not store $W$ as a matrix. They store the weight of a convolution, with shape $(D, 3, 14, 14)$. A
# convolution slides a small window over the picture, and at each stop multiplies and adds. If the window is 14 pixels
# wide and takes steps of 14 pixels, the stops are exactly our patches.

# %%
convolution = torch.nn.Conv2d(3, 32, kernel_size=14, stride=14)
slid = convolution(raw[None])  # (1, 32, 8, 8)

matrix = convolution.weight.flatten(1)  # (32, 588): each filter written as one row
multiplied = patchify(raw[None], 14) @ matrix.T + convolution.bias  # (1, 64, 32)

torch.testing.assert_close(slid.flatten(2).transpose(1, 2), multiplied)

# %% [markdown]
# The two are one operation under two names. We keep the weight in the shape that files have, and compute with the
# matrix product.
#
# ## The embedding
#
# The position vectors are learned like any other weight. They are needed: attention (next chapter) does not know
# the order of its tokens, so a patch must carry its place with it.


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
# The reference is the embedding of `transformers`, with our random weights in it.

# %%
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

ours = PatchEmbeddings(image_size=112, patch_size=14, hidden_size=32)
reference = SiglipVisionEmbeddings(SiglipVisionConfig(image_size=112, patch_size=14, hidden_size=32))
print(reference.load_state_dict(ours.state_dict(), strict=False))
torch.testing.assert_close(ours(raw[None]), reference(raw[None]))

# %% [markdown]
# The names of the weights agree too. That is on purpose: chapter 12 will load real files into these modules.
#
# ## A look inside: what a patch loses
#
# A token of width $D$ is made of 588 numbers. If $D$ is smaller, something must go. To see how much, we take many
# patches of drawn scenes and ask for the best linear map to $k$ numbers and back. (The answer is a singular value
# decomposition.)

# %%
many = torch.stack(
    [
        torch.tensor(list(draw_scene(make_scene(seed)).get_flattened_data())).reshape(112, 112, 3).permute(2, 0, 1)
        for seed in range(100, 160)
    ]
)
cut = patchify(many / 127.5 - 1, 14).flatten(0, 1)  # (3840, 588)
mean = cut.mean(0)
_, _, directions = torch.linalg.svd(cut - mean, full_matrices=False)

figure, axes = plt.subplots(1, 4, figsize=(6.4, 1.9))
errors = {}
for axis, k in zip(axes, (2, 16, 128, 588), strict=True):
    kept = (cut[: 0 + 64] - mean) @ directions[:k].T  # (64, k)
    back = kept @ directions[:k] + mean
    errors[k] = (back - cut[:64]).square().mean().sqrt().item()
    shown = torch.nn.functional.fold(back.T[None], 112, 14, stride=14)[0].permute(1, 2, 0)
    axis.imshow((shown * 0.5 + 0.5).clamp(0, 1))
    axis.set_title(f"k = {k}")
    axis.axis("off")
save(figure, "02_loss")
plt.show()
assert errors[2] > errors[16] > errors[128] > errors[588]

# %% [markdown]
# *The same scene, rebuilt from 2, 16, 128 and all 588 numbers a patch.* Shapes come back long before the last pixel
# does. The real model has $D = 1152$, more than 588, so the cut itself loses nothing. What is lost is resolution: what
# is smaller than a pixel of the resized picture was gone before.
#
# There is one more loss. Inside a patch, the map is linear, so a token cannot say "here is an edge, wherever it lies".
# Finding that out is the work of the layers behind it.
#
# ## The bill


# %%
def bill(image_size: int, hidden_size: int, patch_size: int = 14) -> dict[str, int]:
    patches = (image_size // patch_size) ** 2
    numbers = 3 * patch_size**2
    return {
        "tokens": patches,
        "parameters": hidden_size * numbers + hidden_size + patches * hidden_size,
        "multiplications": patches * numbers * hidden_size,
    }


pocket, large = bill(112, 128), bill(224, 1152)
assert large["tokens"] == 256 and pocket["tokens"] == 64
assert large["parameters"] == sum(p.numel() for p in PatchEmbeddings(224, 14, 1152).parameters()) == 973_440
{"pocket": pocket, "PaliGemma 3B at 224 px": large, "at 448 px": bill(448, 1152), "at 896 px": bill(896, 1152)}

# %% [markdown]
# Twice the side gives four times the tokens: 256, 1,024, 4,096. Each costs the same here, but attention will compare
# all pairs.
#
# ## Your turn
#
# **1.** How many tokens does a picture of side `size` give, with patches of side `patch`?


# %%
def token_count(size: int, patch: int) -> int: ...


check(token_count, ((224, 14), 256), ((448, 14), 1024), ((112, 16), 49))

# %% [markdown]
# **2.** Which patch does the pixel in row `y`, column `x` belong to? Count patches row by row from 0.


# %%
def patch_of(y: int, x: int, size: int, patch: int) -> int: ...


check(patch_of, ((0, 0, 112, 14), 0), ((13, 14, 112, 14), 1), ((14, 0, 112, 14), 8), ((111, 111, 112, 14), 63))

# %% [markdown]
# **3.** Put the picture together again: patches `(P, 3 * p * p)` to `(3, S, S)`. (The chapter used a PyTorch function
# for it. Can you do it with `reshape` and `permute`?)


# %%
def unpatchify(patches: torch.Tensor, size: int, patch: int) -> torch.Tensor: ...


check(unpatchify, ((naive, 112, 14), raw))

# %% [markdown]
# Next: 64 tokens that know nothing of each other learn to look around.
