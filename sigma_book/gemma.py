"""The voice: Gemma.

What stands between a row of vectors and the next word?

Tangled from chapters/08_gemma.py: edit there, then run python -m sigma_book.tangle.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.attention import merge_heads, split_heads
from sigma_book.gqa import grouped_attention
from sigma_book.kv_cache import KVCache
from sigma_book.rope import rotary_angles, rotate

__all__ = ["GeGLU", "Gemma", "GemmaAttention", "GemmaBlock", "GemmaConfig", "RMSNorm", "tied_logits"]


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of the decoder, named as in `text_config` of `config.json`.

    `layer_types` says for each layer whether it slides; `sliding_window`, the softcaps and `four_norms` are Gemma 2's.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 8192
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    four_norms: bool = False
    tie_word_embeddings: bool = True

    def window(self, layer: int) -> int | None:
        """The window of a layer: how many tokens it looks back, itself included; None for all."""
        slides = self.layer_types is not None and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, in float32, then multiply by 1 + weight, then cast back.

    References
    ----------
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; the 1 + weight is Gemma's.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normal * (1.0 + self.weight.float())).to(hidden_states.dtype)


class GeGLU(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)): D -> F -> D, without biases.

    References
    ----------
    Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = F.gelu(self.gate_proj(hidden_states), approximate="tanh")
        return self.down_proj(gate * self.up_proj(hidden_states))


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        query = rotate(split_heads(self.q_proj(hidden_states), self.num_heads), *angles)  # (B, H, T, Dh)
        key = rotate(split_heads(self.k_proj(hidden_states), self.num_kv_heads), *angles)  # (B, K, T, Dh)
        value = split_heads(self.v_proj(hidden_states), self.num_kv_heads)  # (B, K, T, Dh)
        if cache is not None:
            key, value = cache.update(key, value)  # (B, K, S, Dh)
        output = grouped_attention(query, key, value, mask, self.scale, self.softcap)
        return self.o_proj(merge_heads(output))  # (B, T, D)


class GemmaBlock(nn.Module):
    """Attention and GeGLU, each on normalized input, each added to the stream.

    Gemma 1 has two norms. Gemma 2 has four: it also normalizes what attention and GeGLU give, before adding it.
    In checkpoints `post_attention_layernorm` is the norm before the GeGLU in Gemma 1, and the one after attention in Gemma 2.
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.self_attn = GemmaAttention(config)
        self.mlp = GeGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.four_norms = config.four_norms
        if config.four_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), angles, mask, cache)
        if not self.four_norms:
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        thought = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.post_feedforward_layernorm(thought)


class Gemma(nn.Module):
    """Embeddings to hidden states: the blocks and the last norm. The head stands outside, since it is the embedding.

    Parameters
    ----------
    config : GemmaConfig
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to embeddings (B, T, D), multiplied by sqrt(D) rounded to the weights' dtype."""
        embeddings = self.embed_tokens(input_ids)
        return embeddings * torch.tensor(self.config.hidden_size**0.5, dtype=embeddings.dtype, device=embeddings.device)

    def forward(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        masks: dict[int | None, torch.Tensor | None],
        caches: list[KVCache] | None = None,
    ) -> torch.Tensor:
        """Run all blocks.

        Parameters
        ----------
        embeddings : torch.Tensor
            (B, T, D).
        positions : torch.Tensor
            (B, T), counted as the model counts them (PaliGemma from 1).
        masks : dict
            For each window that occurs in the layers (None for full attention), a boolean mask (B, 1, T, S) or None.
        caches : list of KVCache, optional
            One for each layer, as `new_caches` makes them.

        Returns
        -------
        torch.Tensor
            (B, T, D), normalized: ready for the head.
        """
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        hidden_states = embeddings
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            hidden_states = layer(hidden_states, angles, masks[self.config.window(index)], cache)
        return self.norm(hidden_states)

    def windows(self) -> set[int | None]:
        """The different windows of the layers: {None} for Gemma 1, {None, 4096} for Gemma 2."""
        return {self.config.window(index) for index in range(self.config.num_hidden_layers)}

    def new_caches(self, batch: int, max_length: int) -> list[KVCache]:
        """Empty caches for `max_length` columns, one for each layer, in the weights' dtype and place."""
        weight = self.norm.weight
        config = self.config
        return [
            KVCache(
                batch,
                config.num_key_value_heads,
                max_length,
                config.head_dim,
                window=config.window(index),
                dtype=weight.dtype,
                device=weight.device,
            )
            for index in range(config.num_hidden_layers)
        ]


def tied_logits(hidden_states: torch.Tensor, weight: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """Hidden states (..., D) times the rows of the embedding (V, D): a score for every token of the vocabulary."""
    logits = F.linear(hidden_states, weight)  # (..., V)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
