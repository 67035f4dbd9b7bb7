"""Positions by rotation.

How does a token know how far away another one is?

Tangled from chapters/05_rope.py: edit there, then run python -m sigma_book.tangle.
"""

import torch

__all__ = ["half_split_order", "rotary_angles", "rotate"]


def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines by which a query or key at each position is turned.

    Parameters
    ----------
    positions : torch.Tensor
        (B, T), integers.
    head_dim : int
        Dh, even. Pair i turns by position * theta ** (-2 i / Dh).
    theta : float
        The base: the larger, the slower the slowest pair.

    Returns
    -------
    tuple of torch.Tensor
        Cosine and sine, float32, each (B, 1, T, Dh / 2).

    Raises
    ------
    ValueError
        If `head_dim` is odd.

    References
    ----------
    Su et al. 2021, "RoFormer", section 3.2.
    """
    if head_dim % 2:
        raise ValueError(f"rotation needs pairs of dimensions, got an odd head_dim {head_dim}")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float()
    frequencies = 1.0 / (theta ** (pairs / head_dim))  # (Dh/2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, Dh/2)
    return angles.cos(), angles.sin()


def rotate(vectors: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys (B, H, T, Dh): dimension i is paired with i + Dh/2, the half-split layout.

    `cosine` and `sine` come from `rotary_angles`; the result has the dtype of `vectors`.
    """
    first, second = vectors.float().chunk(2, dim=-1)  # (B, H, T, Dh/2)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(vectors.dtype)


def half_split_order(head_dim: int) -> torch.Tensor:
    """Indices (Dh,) that reorder interleaved dimensions (0 with 1, 2 with 3, ...) to the half-split layout."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
