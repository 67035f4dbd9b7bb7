"""Where seeing meets speaking.

How do features of a picture become words of a prompt, and who may look at whom?

Tangled from chapters/09_projector.py: edit there, then run python -m sigma_book.tangle.
"""

import torch
from torch import nn

__all__ = ["Projector", "prefix_mask", "replace_image_tokens", "step_mask"]


class Projector(nn.Module):
    """One linear map from the tower's width to the decoder's: (B, P, Dv) to (B, P, D)."""

    def __init__(self, vision_size: int, text_size: int):
        super().__init__()
        self.linear = nn.Linear(vision_size, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)


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
