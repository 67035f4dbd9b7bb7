"""Attention.

How can each token take from the others just what it needs?

Tangled from chapters/03_attention.py: edit there, then run python -m sigma_book.tangle.
"""

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["MultiHeadAttention", "attention", "merge_heads", "split_heads"]


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


def split_heads(hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, H * Dh) to (B, H, T, Dh): head h takes the h-th run of Dh numbers."""
    return hidden_states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, H, T, Dh) back to (B, T, H * Dh)."""
    return hidden_states.transpose(1, 2).flatten(-2)


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
