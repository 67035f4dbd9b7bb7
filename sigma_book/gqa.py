"""Grouped queries.

Do all heads need keys and values of their own?

Tangled from chapters/06_gqa.py: edit there, then run python -m sigma_book.tangle.
"""

import torch

from sigma_book.attention import attention

__all__ = ["cache_bytes", "grouped_attention"]


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention in which H / K query heads share each key/value head, and nothing is copied.

    The queries of a group are laid one below the other, as if they were more tokens of one head.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, T, Dh).
    key, value : torch.Tensor
        (B, K, S, Dh); H must be a multiple of K. Query head h reads key/value head h // (H / K).
    mask : torch.Tensor, optional
        Boolean (B, 1, T, S), True where a query may look. B and T may be 1: the same for all rows or all queries.
    scale, softcap : float, optional
        As in `attention`.

    Returns
    -------
    torch.Tensor
        (B, H, T, Dh).

    Raises
    ------
    ValueError
        If the heads do not divide into groups.

    References
    ----------
    Ainslie et al. 2023, "GQA", section 2.2; Shazeer 2019, "Fast Transformer Decoding", section 3.
    """
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} key/value heads")
    groups = num_heads // num_kv_heads
    query = query.reshape(batch, num_kv_heads, groups * length, head_dim)  # (B, K, G*T, Dh)
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat(1, 1, groups, 1)  # (B, 1, G*T, S): booleans, not keys
    output = attention(query, key, value, mask, scale, softcap)  # (B, K, G*T, Dh)
    return output.reshape(batch, num_heads, length, head_dim)


def cache_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, length: int, batch: int = 1, bytes_per_number: int = 2
) -> int:
    """Bytes that the keys and values of `length` tokens take, all layers together."""
    return 2 * num_layers * batch * num_kv_heads * length * head_dim * bytes_per_number
