"""From pixels to tokens.

How does a picture become a short list of vectors that a transformer can read?

Tangled from chapters/02_patches.py: edit there, then run python -m sigma_book.tangle.
"""

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["PatchEmbeddings", "patchify"]


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
