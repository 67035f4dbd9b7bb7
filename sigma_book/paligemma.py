"""The whole: PaliGemma.

How do eyes, projector and voice become one model?

Tangled from chapters/10_paligemma.py: edit there, then run python -m sigma_book.tangle.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.gemma import Gemma, GemmaConfig, tied_logits
from sigma_book.kv_cache import KVCache
from sigma_book.projector import Projector, prefix_mask, replace_image_tokens, step_mask
from sigma_book.siglip import SiglipConfig, SiglipVisionTower

__all__ = [
    "TEXT_DEFAULTS",
    "TEXT_WHEN_ABSENT",
    "VISION_WHEN_ABSENT",
    "PaliGemma",
    "PaliGemmaConfig",
    "count_parameters",
]

# What a key of `config.json` means when the file leaves it out: the defaults of that model type.
TEXT_DEFAULTS = {
    "gemma": {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "gemma2": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
}
# What a whole part means when the file leaves it out: the first PaliGemma, nearly (its tower is 4304 wide inside).
TEXT_WHEN_ABSENT = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257152,
}
VISION_WHEN_ABSENT = {
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


@dataclass(frozen=True)
class PaliGemmaConfig:
    """The sizes of all parts and the ids of the tokens with a meaning of their own.

    Parameters
    ----------
    vision : SiglipConfig
    text : GemmaConfig
    image_token_id : int
        The placeholder that projected patches replace.
    pad_token_id, bos_token_id, eos_token_id : int
    """

    vision: SiglipConfig
    text: GemmaConfig
    image_token_id: int = 257152
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: dict) -> "PaliGemmaConfig":
        """Read what `config.json` holds; keys that it leaves out mean the defaults of that model type.

        Raises
        ------
        ValueError
            If the file describes another model, or one with a part that this code does not have.
        """
        if values.get("model_type") != "paligemma":
            raise ValueError(f"model_type is {values.get('model_type')!r}: expected 'paligemma'")
        if values.get("quantization_config"):
            raise ValueError(
                "quantization_config is set, so another program stored these weights in few bits: "
                "load the original with quantize='nf4'"
            )
        text, vision = values.get("text_config"), values.get("vision_config")
        for key, part in (("text_config", text), ("vision_config", vision)):
            if part is not None and not isinstance(part, dict):
                raise ValueError(f"{key} is {part!r}: expected a table of keys and values")
        text = dict(TEXT_WHEN_ABSENT if text is None else text)
        vision = dict(VISION_WHEN_ABSENT if vision is None else vision)
        kind = text.get("model_type", "gemma")
        if not isinstance(kind, str) or kind not in TEXT_DEFAULTS:
            raise ValueError(f"text_config.model_type is {kind!r}: expected 'gemma' or 'gemma2'")
        text = TEXT_DEFAULTS[kind] | text
        _expect(vision, "vision_config", "model_type", ("siglip_vision_model",))
        _expect(vision, "vision_config", "hidden_act", ("gelu_pytorch_tanh",))
        _expect(text, "text_config", "attention_bias", (False, None))
        key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
        rope = text.get(key) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(
                f"text_config.{key} is {rope!r}: expected one table for all layers, with keys such as rope_theta"
            )
        _expect(rope, "text_config.rope_parameters", "rope_type", ("default",))
        _expect(rope, "text_config.rope_parameters", "type", ("default",))
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", 10_000.0))
        if kind == "gemma2":
            _expect(text, "text_config", "hidden_activation", ("gelu_pytorch_tanh",))
            text["four_norms"] = True
            layers = text["num_hidden_layers"]
            if (wanted := _wanted(int, layers)) is not None:
                raise ValueError(f"text_config.num_hidden_layers is {layers!r}: expected {wanted}")
            alternating = ("sliding_attention", "full_attention") * ((layers + 1) // 2)
            kinds = text.get("layer_types") or alternating[:layers]
            if not isinstance(kinds, list | tuple) or len(kinds) != layers or any(k not in alternating for k in kinds):
                raise ValueError(
                    f"text_config.layer_types is {kinds!r}: expected a list of {layers} times "
                    "'sliding_attention' or 'full_attention'"
                )
            text["layer_types"] = tuple(kinds)
        else:
            _expect(text, "text_config", "hidden_act", ("gelu_pytorch_tanh", "gelu"))  # Gemma's "gelu" means tanh too
            for key in _ONLY_GEMMA_2:
                text.pop(key, None)
        text["tie_word_embeddings"] = values.get("tie_word_embeddings", True)  # the text part's own key has no say
        special = {}
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            found = [part[key] for part in (values, text) if part.get(key) is not None]
            special |= {key: found[0]} if found else {}
        listed = special.get("eos_token_id")
        if isinstance(listed, list) and listed and all(type(token) is int for token in listed):
            special["eos_token_id"] = listed[0]  # answers may end with any of them: chapter 13 reads the whole list
        image_token_id = values.get("image_token_id", values.get("image_token_index", 256_000))
        config = cls(_pick(SiglipConfig, vision), _pick(GemmaConfig, text), image_token_id, **special)
        config._check()
        return config

    def _check(self) -> None:
        """Raise a ValueError that names the key if the sizes cannot be built."""
        sizes = {}
        for where, part in (("text_config", self.text), ("vision_config", self.vision)):
            for field in fields(part):
                sizes[f"{where}.{field.name}"] = value = getattr(part, field.name)
                if (wanted := _wanted(field.type, value)) is not None:
                    raise ValueError(f"{where}.{field.name} is {value!r}: expected {wanted}")
        for key in ("image_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, key)
            if type(value) is not int or value < 0:
                raise ValueError(f"{key} is {value!r}: expected one token id, a whole number")
        if self.pad_token_id >= self.text.vocab_size:  # an image token may lie behind the vocabulary, padding is read
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}: expected a token below {self.text.vocab_size} "
                "(text_config.vocab_size)"
            )
        for whole, part in (
            ("text_config.num_attention_heads", "text_config.num_key_value_heads"),
            ("vision_config.hidden_size", "vision_config.num_attention_heads"),
            ("vision_config.image_size", "vision_config.patch_size"),
            ("text_config.head_dim", 2),
        ):
            divisor = sizes.get(part, part)
            if sizes[whole] % divisor:
                raise ValueError(f"{whole} is {sizes[whole]}: expected a multiple of {divisor} ({part})")

    def to_dict(self) -> dict:
        """The same as `config.json` spells it, so that `transformers` reads it too."""
        text = asdict(self.text)
        if self.text.layer_types is not None:
            text["layer_types"] = list(self.text.layer_types)
        scalar = self.text.query_pre_attn_scalar
        if scalar is not None and scalar == int(scalar):
            text["query_pre_attn_scalar"] = int(scalar)  # transformers takes no 256.0
        four_norms, tied = text.pop("four_norms"), text.pop("tie_word_embeddings")
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
        text["num_image_tokens"] = self.num_image_tokens
        text |= {
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }
        if four_norms:
            text |= {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
        else:
            text |= {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
            text = {key: value for key, value in text.items() if key not in _ONLY_GEMMA_2}
        vision = asdict(self.vision) | {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "projection_dim": self.text.hidden_size,
            "vision_use_head": False,
        }
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "hidden_size": self.text.hidden_size,
            "projection_dim": self.text.hidden_size,
            "image_token_index": self.image_token_id,
            "tie_word_embeddings": tied,
            "text_config": text | {"tie_word_embeddings": tied},
            "vision_config": vision,
        }


_ONLY_GEMMA_2 = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
)


def _wanted(kind: type, value: object) -> str | None:
    """What a value of a field's type has to be, in words; None if this one is so."""
    whole = type(value) is int and value >= 1
    number = type(value) in (int, float) and 0 < value < math.inf
    rules = {
        int: (whole, "a whole number, 1 or more"),
        int | None: (whole or value is None, "a whole number, 1 or more, or null"),
        float: (number, "a number above 0"),
        float | None: (number or value is None, "a number above 0, or null"),
        bool: (type(value) is bool, "true or false"),
    }
    fits, words = rules.get(kind, (True, ""))
    return None if fits else words


def _expect(values: dict, where: str, key: str, allowed: tuple) -> None:
    if key in values and values[key] not in allowed:
        raise ValueError(f"{where}.{key} is {values[key]!r}: this model knows only {allowed[0]!r}")


def _pick(config_class: type, values: dict):
    names = {field.name for field in fields(config_class)}
    return config_class(**{key: value for key, value in values.items() if key in names})


class PaliGemma(nn.Module):
    """A picture and a prompt in, scores for the next token out.

    Its parameters carry the names of Hugging Face checkpoints, without the prefixes that vary (chapter 12).

    Parameters
    ----------
    config : PaliGemmaConfig

    References
    ----------
    Beyer et al. 2024, "PaliGemma: A versatile 3B VLM for transfer", section 3.
    """

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionTower(config.vision)
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = Gemma(config.text)
        if not config.text.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, S, S) to features in the decoder's space (N, P, D)."""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (B, T) to embeddings (B, T, D), with features (N, P, D) where `<image>` stands."""
        if image_features is None:
            return self.language_model.embed(input_ids)
        is_image = input_ids == self.config.image_token_id  # (B, T)
        # <image> may lie behind the last row of the embedding, so its places are looked up as padding, then replaced
        embeddings = self.language_model.embed(input_ids.masked_fill(is_image, self.config.pad_token_id))
        return replace_image_tokens(embeddings, image_features, is_image)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) to scores (..., V): ask only for the places you need."""
        weight = (
            self.language_model.embed_tokens.weight if self.config.text.tie_word_embeddings else self.lm_head.weight
        )
        return tied_logits(hidden_states, weight, self.config.text.final_logit_softcapping)

    def next_token_logits(self, hidden_states: torch.Tensor, best_only: bool = False) -> torch.Tensor:
        """Hidden states (B, T, D) to the scores (B, V) for the token behind the last place.

        `best_only` says that only the best token will be taken. Here it changes nothing; a model that was prepared for
        speed (chapter 21b) then rounds the scores that cannot be the best.
        """
        return self.logits(hidden_states[:, -1])

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        caches: list[KVCache] | None = None,
    ) -> torch.Tensor:
        """Read whole sequences: (B, T, D), normalized.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids : torch.Tensor
            (B, T): ids; 0 at padding; 0 in the prefix and 1 in the suffix.
        image_features : torch.Tensor, optional
            (N, P, D), from `encode_images`.
        caches : list of KVCache, optional
            Filled on the way.
        """
        masks = {
            window: prefix_mask(attention_mask, token_type_ids, window) for window in self.language_model.windows()
        }
        positions = attention_mask.long().cumsum(-1)  # (B, T): from 1, padding does not count
        return self.language_model(self.embed(input_ids, image_features), positions, masks, caches)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Scores at every place, (B, T, V): for looking and for proofs. Training and generation ask for fewer."""
        features = None if pixel_values is None else self.encode_images(pixel_values)
        return self.logits(self.hidden_states(input_ids, features, attention_mask, token_type_ids))

    def loss(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Mean cross-entropy, in nats, over the tokens whose label is not -100.

        Place t is asked for the label at t + 1, and only places with a label reach the head.

        Parameters
        ----------
        labels : torch.Tensor
            (B, T); the other arguments are those of `forward`.
        """
        features = None if pixel_values is None else self.encode_images(pixel_values)
        hidden_states = self.hidden_states(input_ids, features, attention_mask, token_type_ids)[:, :-1]  # (B, T-1, D)
        targets = labels[:, 1:]  # (B, T-1)
        if not targets.is_meta:  # a meta tensor has a shape but no values to choose by
            wanted = targets != -100
            hidden_states, targets = hidden_states[wanted], targets[wanted]  # (M, D), (M,)
        logits = self.logits(hidden_states).float()
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def prefill(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None,
        attention_mask: torch.Tensor,
        caches: list[KVCache],
        best_only: bool = False,
    ) -> torch.Tensor:
        """Read prompts (B, T), padded on the left, and give the scores (B, V) for the first new token.

        `best_only` is that of `next_token_logits`.
        """
        prefix = torch.zeros_like(input_ids)
        hidden_states = self.hidden_states(input_ids, image_features, attention_mask, prefix, caches)
        return self.next_token_logits(hidden_states, best_only)

    def decode(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        caches: list[KVCache],
        best_only: bool = False,
    ) -> torch.Tensor:
        """Take one new token for each row and give the scores (B, V) for the one after it.

        Parameters
        ----------
        token_ids : torch.Tensor
            (B, 1).
        attention_mask : torch.Tensor
            (B, S) of all columns including the new one.
        caches : list of KVCache
            As `prefill` filled them; they grow by one column.
        best_only : bool
            That of `next_token_logits`.
        """
        column = caches[0].length  # of the new token
        masks = {}
        for index, cache in enumerate(caches):
            window = self.config.text.window(index)
            if window not in masks:
                masks[window] = step_mask(attention_mask, cache.columns(column + 1))
        positions = attention_mask.long().sum(-1, keepdim=True)  # (B, 1)
        hidden_states = self.language_model(self.embed(token_ids), positions, masks, caches)
        return self.next_token_logits(hidden_states, best_only)


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module has learned; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
