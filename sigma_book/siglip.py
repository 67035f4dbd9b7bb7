"""The eyes: SigLIP.

What turns patches into features that already know what they show?

Tangled from chapters/04_siglip.py: edit there, then run python -m sigma_book.tangle.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.attention import MultiHeadAttention
from sigma_book.patches import PatchEmbeddings

__all__ = ["SiglipBlock", "SiglipConfig", "SiglipEncoder", "SiglipMLP", "SiglipVisionTower", "sigmoid_loss"]


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


class SiglipMLP(nn.Module):
    """Two linear maps with a tanh-approximated GELU between them: D -> F -> D."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


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


class SiglipEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


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
