"""Twins: a `transformers` PaliGemma with random weights, and ours with the same ones."""

import json
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import PaliGemmaForConditionalGeneration

from sigma_book.paligemma import PaliGemma, PaliGemmaConfig

PAD, EOS, BOS, NEWLINE = 0, 1, 2, 3
FIRST_WORD = 4  # ids below have a meaning of their own


@dataclass
class Twins:
    reference: PaliGemmaForConditionalGeneration
    ours: PaliGemma

    def redraw(self, seed: int) -> None:
        """New random weights in both, of a size that keeps activations near 1: softcaps bend, and do not saturate."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.reference.named_parameters():
                random = torch.randn(parameter.shape, generator=generator)
                if name.endswith("norm.weight") and "language_model" in name:
                    parameter.copy_(0.2 * random)  # the model adds 1
                elif "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.2 * random)
                elif parameter.dim() == 1:
                    parameter.copy_(0.2 * random)
                elif "position_embedding" in name:
                    parameter.copy_(random)
                else:
                    parameter.copy_(random / parameter[0].numel() ** 0.5)
        self.ours.load_state_dict(self.state_dict())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The reference's tensors under our names."""
        tied = self.ours.config.text.tie_word_embeddings
        return {
            name.removeprefix("model."): tensor
            for name, tensor in self.reference.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }

    def prompt(self, words: int, generator: torch.Generator, images: int = 1) -> list[int]:
        """<image> * P for each picture, bos, words, newline."""
        config = self.ours.config
        body = torch.randint(FIRST_WORD, config.image_token_id, (words,), generator=generator).tolist()
        return [config.image_token_id] * (images * config.num_image_tokens) + [BOS, *body, NEWLINE]

    def pictures(self, count: int, generator: torch.Generator) -> torch.Tensor:
        side = self.ours.config.vision.image_size
        return torch.rand(count, 3, side, side, generator=generator) * 2 - 1


def build(config: dict, attention: str = "eager") -> Twins:
    """Both models from the same `config.json`: what ours reads is what the reference would write."""
    reference_config = transformers.PaliGemmaConfig(**json.loads(json.dumps(config)))
    reference_config._attn_implementation = attention  # eager is the only one that knows softcaps
    reference = PaliGemmaForConditionalGeneration(reference_config).float().eval()
    ours = PaliGemma(PaliGemmaConfig.from_dict(json.loads(reference.config.to_json_string()))).eval()
    return Twins(reference, ours)


def pad(rows: list[list[int]], side: str, fill: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one tensor (B, T), and its attention mask."""
    length = max(map(len, rows))
    if side == "left":
        ids = [[fill] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    else:
        ids = [row + [fill] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models run faster on one thread, and the sums come out the same on every machine with the same kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_twins():
    return build


@pytest.fixture
def pad_rows():
    return pad
