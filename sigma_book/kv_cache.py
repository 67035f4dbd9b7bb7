"""Remembering keys and values.

Why does a model not read its whole text again for each new word?

Tangled from chapters/07_kv_cache.py: edit there, then run python -m sigma_book.tangle.
"""

import torch

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of one layer, in two buffers that are filled in place.

    A column is a place in the padded batch, counted from 0: the same for every row. With a window, only the
    last `window` columns stay once the prompt has been read, in a ring: column c lies in slot c % window.

    Parameters
    ----------
    batch, num_kv_heads, head_dim : int
        B, K and Dh.
    max_length : int
        Columns there is room for.
    window : int, optional
        How many columns a token sees, itself included; None for all.
    dtype, device
        Of the buffers.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.window = window
        self.max_length = max_length
        self.length = 0  # columns seen so far
        slots = max_length if window is None else min(window, max_length)
        self.key = torch.zeros(batch, num_kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)

    @property
    def slots(self) -> int:
        return self.key.shape[2]

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values (B, K, T, Dh) and return all that the new tokens may look at.

        The first call may bring any number of columns, and gets them all back: a prompt sees itself whole,
        whatever the window. Later calls get what the buffers hold, in the order that `columns` tells.

        Raises
        ------
        ValueError
            If there is no room left, or if several columns arrive at a ring that is already in use.
        """
        count = key.shape[2]
        if self.length + count > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens, {self.length + count} were written")
        if self.length and count > 1 and self.length + count > self.slots:
            raise ValueError("a sliding cache takes one token at a time once the prompt is in")
        first, self.length = self.length, self.length + count
        if first == 0:
            kept = min(count, self.slots)
            slots = torch.arange(count - kept, count, device=key.device) % self.slots
            self.key[:, :, slots] = key[:, :, -kept:].to(self.key.dtype)
            self.value[:, :, slots] = value[:, :, -kept:].to(self.value.dtype)
            return key, value
        start = first % self.slots
        self.key[:, :, start : start + count] = key
        self.value[:, :, start : start + count] = value
        filled = min(self.length, self.slots)
        return self.key[:, :, :filled], self.value[:, :, :filled]

    def columns(self, length: int | None = None) -> torch.Tensor:
        """The column that each filled slot holds once `length` columns were seen (now, by default): (C,)."""
        length = self.length if length is None else length
        slots = torch.arange(min(length, self.slots), device=self.key.device)
        return length - 1 - (length - 1 - slots) % self.slots

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be taken more than once."""
        key, value = self.key[rows], self.value[rows]
        if len(rows) == len(self.key):  # in its place: a step that was compiled for a GPU knows the address
            self.key.copy_(key)
            self.value.copy_(value)
        else:
            self.key, self.value = key, value
