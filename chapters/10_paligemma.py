# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The whole: PaliGemma
#
# *How do eyes, projector and voice become one model?*
#
# **You build** the model class and its configuration.
# **You need** chapters 04, 08 and 09.
# **Exports** the module `sigma_book.paligemma`.

# %%
# | export
import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.gemma import Gemma, GemmaConfig, tied_logits
from sigma_book.kv_cache import KVCache
from sigma_book.projector import Projector, prefix_mask, replace_image_tokens, step_mask
from sigma_book.siglip import SiglipConfig, SiglipVisionTower


# %%
import json

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from sigma_book.style import ANSWER, PICTURE, PROMPT, check, save, use_style

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# Nothing new has to be invented in this chapter. All parts lie on the table, and we join them.

# %%
boxes = {  # name: (x, y, colour, shape)
    "pixels": (0, 2, PICTURE, "3 x 224 x 224"),
    "tower": (2, 2, PICTURE, "256 x 1152"),
    "projector": (4, 2, PICTURE, "256 x 2048"),
    "prompt ids": (0, 0, PROMPT, "T"),
    "embedding": (4, 0, PROMPT, "T x 2048"),
    "row": (6, 1, "0.35", "(256 + T) x 2048"),
    "decoder": (8, 1, "0.35", "(256 + T) x 2048"),
    "head": (10, 1, ANSWER, "1 x 257216"),
}
arrows = [
    "pixels tower",
    "tower projector",
    "projector row",
    "prompt ids>embedding",
    "embedding row",
    "row decoder",
    "decoder head",
]

figure, axis = plt.subplots(figsize=(9.4, 2.7))
for name, (x, y, colour, shape) in boxes.items():
    axis.add_patch(FancyBboxPatch((x, y), 1.35, 0.6, boxstyle="round,pad=0.06", facecolor=colour, edgecolor="none"))
    ink = "black" if colour == PROMPT else "white"
    axis.text(x + 0.68, y + 0.3, name, color=ink, ha="center", va="center", size=9)
    axis.text(x + 0.68, y - 0.28, shape, color="0.3", ha="center", va="center", size=7.5)
for arrow in arrows:
    start, stop = arrow.split(">") if ">" in arrow else arrow.split(" ")
    (x0, y0, *_), (x1, y1, *_) = boxes[start], boxes[stop]
    style = {"arrowstyle": "->", "color": "0.5"}
    axis.annotate("", (x1 - 0.08, y1 + 0.3), (x0 + 1.43, y0 + 0.3), arrowprops=style)
axis.set(xlim=(-0.2, 11.6), ylim=(-0.6, 2.8))
axis.axis("off")
save(figure, "10_whole")

# %% [markdown]
# *Figure: pixels go through tower and projector, prompt ids through the embedding. Both become one row of vectors,
# the row goes through the decoder,
# and the head gives 257,216 scores for the next token. Under each box stands the shape that leaves it, for PaliGemma
# 3B.*
#
# ## The whole in one breath
#
# Before there is a class, here is the model as one plain function. It takes the finished parts and calls them in
# order.
# It holds one picture and one prompt, keeps no cache, and computes far more than it needs.


# %%
def next_token_scores_naive(tower, projector, decoder, pixel_values, prompt_ids: list[int]) -> torch.Tensor:
    features = projector(tower(pixel_values[None]))[0]  # (P, D)
    words = decoder.embed(torch.tensor(prompt_ids))  # (T, D)
    row = torch.cat([features, words])[None]  # (1, P+T, D): picture first
    positions = torch.arange(1, row.shape[1] + 1)[None]  # 1, 2, 3, ...
    everyone_sees_everyone = {None: None}  # all of it is prefix
    hidden_states = decoder(row, positions, everyone_sees_everyone)  # (1, P+T, D)
    scores = hidden_states @ decoder.embed_tokens.weight.T  # (1, P+T, V): a score for each word, at each place
    return scores[0, -1]  # (V,): only the last place is asked


# %% [markdown]
# Positions count from 1 in PaliGemma. The picture takes the first 256, so the first token of a prompt, `<bos>`, stands at
# position 257.
#
# What is missing: sizes from a file, batches of different lengths, training, the cache, and thrift. One after the
# other.
#
# ## Sizes from a file
#
# A checkpoint comes with a `config.json`. This is nearly all that PaliGemma 3B's says.

# %%
config_json = """{
  "model_type": "paligemma",
  "image_token_index": 257152,
  "projection_dim": 2048,
  "text_config": {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216
  },
  "vision_config": {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14, "projection_dim": 2048, "vision_use_head": false
  }
}"""
sorted(json.loads(config_json)["text_config"])

# %% [markdown]
# The width of an attention head is not there, nor the size of the picture, nor the base of the rotations. What a file
# leaves out means the default of its model type.
# So whoever reads such files needs a table of defaults, and a wrong entry would build a wrong model without a word.
#
# The defaults of type `gemma` are not those of PaliGemma, but of a larger Gemma. And a part left out whole means
# something else than a part that is there and empty.

# %%
# | export
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


# %% [markdown]
# The configuration itself holds the two parts of chapters 04 and 08, and the ids of four tokens that mean something
# to the model.
# It refuses what our code does not build: a wrong model is worse than none.


# %%
# | export
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


# %%
config_3b = PaliGemmaConfig.from_dict(json.loads(config_json))
assert config_3b.text.head_dim == 256 and config_3b.vision.image_size == 224  # both left out above
assert config_3b.num_image_tokens == 256
assert PaliGemmaConfig.from_dict(config_3b.to_dict()) == config_3b  # written and read again
config_3b.text

# %%
try:
    PaliGemmaConfig.from_dict({"model_type": "paligemma", "text_config": {"model_type": "llama"}})
except ValueError as error:
    print(error)

# %% [markdown]
# ## Positions in a padded batch
#
# Prompts of one batch have different lengths, and short ones are padded on the left. Padding must not count, or a
# word would move away from its picture.
# So a position is the number of real tokens up to here: a running sum of the attention mask.

# %%
attention_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
attention_mask.cumsum(-1)

# %% [markdown]
# Row two stands where it would stand alone: at 1, 2, 3. What padding gets does not matter, since nobody looks at it.
#
# ## Logits where they are needed
#
# Scores before the softmax are called *logits*. The naive function made those of all words at all places and then kept one
# place. With 257,216 words that is by far the largest tensor that the model makes on its way.

# %%
vocabulary, width, prompt_words = 257_216, 2048, 10
places = 256 + prompt_words
bytes_everywhere, bytes_needed = places * vocabulary * 4, vocabulary * 4  # float32
assert bytes_everywhere == 273_677_824 and bytes_needed == 1_028_864
saved = bytes_everywhere - bytes_needed
flops_everywhere, flops_needed = 2 * places * width * vocabulary, 2 * width * vocabulary
at_896_pixels = ((896 // 14) ** 2 + prompt_words) * vocabulary * 4
assert round(at_896_pixels / 1e9, 1) == 4.2
print(
    f"{saved / 1e6:.0f} MB and {(flops_everywhere - flops_needed) / 1e9:.0f} GFLOP saved for one picture and one prompt"
)

# %% [markdown]
# At 896 pixels a side it would be 4,106 places and 4.2 gigabytes. So the head is asked for the last place alone when
# a prompt is read,
# and for the places that have a label when the model is taught.
#
# ## The loss, by hand
#
# Place $t$ is asked for the token at $t + 1$. What it pays is $-\log$ of the probability it gave to the right one.
# Labels are -100 in the prefix, where nothing is asked, and hold the answer in the suffix.


# %%
def loss_naive(logits: list[list[float]], labels: list[int]) -> float:
    paid = []
    for place in range(len(labels) - 1):
        right = labels[place + 1]
        if right == -100:
            continue
        total = sum(math.exp(score) for score in logits[place])
        paid.append(-math.log(math.exp(logits[place][right]) / total))
    return sum(paid) / len(paid)


loss_naive([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]], labels=[-100, 1, 0])

# %% [markdown]
# The first place knows nothing and pays $\log 2$. The second is fairly sure, and right. The logarithm is the natural one; what
# it counts is called *nats*.
#
# ## The formula
#
# $$ \mathcal{L} = -\frac{1}{M} \sum_{t :\, y_{t+1} \ne -100} \log \operatorname{softmax}(h_t E^\top)_{y_{t+1}} $$
#
# $h_t$ is the decoder's output at place $t$, $E$ the embedding (V, D), $y$ the labels and $M$ the number of places
# that are asked. With no picture and no prefix, this is the loss that taught Gemma to speak.
#
# ## The class
#
# Four ways lead through it. `forward` scores every place, for looking and for proofs. `loss` teaches.
# `prefill` reads a prompt and fills the caches; `decode` takes one more token.


# %%
# | export
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


# %% [markdown]
# Its parameters carry the names of real checkpoints, so that chapter 12 needs hardly more than to pour the weights in.
#
# ## Proof
#
# A model small enough to run at once, with random weights: four patches, three blocks, two key/value heads for four
# query heads.

# %%
tiny_json = {
    "model_type": "paligemma",
    "image_token_index": 99,
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 36,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 100,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "projection_dim": 36,
}
model = PaliGemma(PaliGemmaConfig.from_dict(tiny_json)).eval()
for parameter in model.parameters():
    nn.init.normal_(parameter, std=0.2)
IMAGE = model.config.image_token_id
pixel_values = torch.rand(2, 3, 28, 28) * 2 - 1
prompts = [[2, 7, 8, 9, 3], [2, 5, 3]]

# %% [markdown]
# First against the plain function, prompt by prompt. The class gets both at once, the shorter one padded on the left.

# %%
rows = [[IMAGE] * 4 + prompt for prompt in prompts]
length = max(map(len, rows))
input_ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
with torch.no_grad():
    caches = model.language_model.new_caches(batch=2, max_length=length + 8)
    scores = model.prefill(input_ids, model.encode_images(pixel_values), attention_mask, caches)  # (B, V)
    for row, prompt in enumerate(prompts):
        parts = model.vision_tower, model.multi_modal_projector, model.language_model
        expected = next_token_scores_naive(*parts, pixel_values[row], prompt)
        torch.testing.assert_close(scores[row], expected, rtol=1e-5, atol=1e-5)

# %% [markdown]
# Then step by step: eight tokens through the cache, each time against the whole sequence read afresh.
# What was written counts as suffix: `token_type_ids` 1.

# %%
with torch.no_grad():
    ids, mask = input_ids, attention_mask
    types = torch.zeros_like(ids)
    for _ in range(8):
        token = scores.argmax(-1, keepdim=True)  # (B, 1): the best word of each row
        ids = torch.cat([ids, token], dim=1)
        mask, types = (torch.cat([part, torch.ones_like(token)], dim=1) for part in (mask, types))
        scores = model.decode(token, mask, caches)
        afresh = model(ids, pixel_values, mask, types)[:, -1]
        torch.testing.assert_close(scores, afresh, rtol=1e-5, atol=1e-5)

# %% [markdown]
# The loss, against the loops: the last three tokens of each row are its answer.

# %%
types = torch.zeros_like(ids)
types[:, -3:] = 1
labels = torch.where(types == 1, ids, -100)
with torch.no_grad():
    logits = model(ids, pixel_values, mask, types)
    loss = model.loss(ids, pixel_values, mask, types, labels)
by_hand = sum(loss_naive(logits[row].tolist(), labels[row].tolist()) for row in range(2)) / 2
assert abs(loss.item() - by_hand) < 1e-5
loss

# %% [markdown]
# And against a reference that nobody here wrote: the same weights in `transformers`, which must be handed
# `token_type_ids`. `tests/parity` does the same on 48 models, step by step, with gradients.

# %%
from transformers import PaliGemmaConfig as ReferenceConfig
from transformers import PaliGemmaForConditionalGeneration

reference = PaliGemmaForConditionalGeneration(ReferenceConfig(**model.config.to_dict())).eval()
weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
reference.load_state_dict(weights | {"lm_head.weight": model.language_model.embed_tokens.weight})
with torch.no_grad():
    expected = reference(
        input_ids=ids,
        pixel_values=pixel_values,
        attention_mask=mask,
        token_type_ids=types,
        position_ids=mask.cumsum(-1).clamp(min=1),  # it does not count them itself
    ).logits
error = (logits - expected)[mask.bool()].abs().max() / expected.abs().max()
assert error < 1e-5
print(f"largest difference: {error:.1e} of the largest score")

# %% [markdown]
# ## A look inside
#
# Touch one token and see who feels it. We change each token in turn, and measure how far the scores at every place
# move.
# The mask of chapter 09 should show through the whole model, although we never look at it here.

# %%
sequence = torch.tensor([[IMAGE] * 4 + [2, 7, 8, 3, 20, 21, 22]])
kinds = torch.tensor([[0] * 8 + [1] * 3])
everything = torch.ones_like(sequence)
picture = pixel_values[:1]


@torch.no_grad()
def scores_at_every_place(ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return model(ids, pixels, everything, kinds)[0]  # (T, V)


before = scores_at_every_place(sequence, picture)
felt = torch.zeros(sequence.shape[1], sequence.shape[1])
for touched in range(sequence.shape[1]):
    ids, pixels = sequence.clone(), picture.clone()
    if touched < 4:  # a patch: its quarter of the picture turns grey
        y, x = 14 * (touched // 2), 14 * (touched % 2)
        pixels[:, :, y : y + 14, x : x + 14] = 0
    else:
        ids[0, touched] += 30
    felt[:, touched] = (scores_at_every_place(ids, pixels) - before).abs().amax(-1)

allowed = prefix_mask(everything, kinds)[0, 0]
assert (felt[~allowed] == 0).all() and (felt[allowed] > 0).all()

figure, axis = plt.subplots(figsize=(4.6, 4.2))
axis.imshow(felt.clamp(max=felt.quantile(0.9)), cmap="Greys")
axis.set(xlabel="token that was changed", ylabel="place whose scores move")
names = ["patch"] * 4 + ["bos", "word", "word", "newline"] + ["answer"] * 3
axis.set_xticks(range(len(names)), names, rotation=90, size=8)
axis.set_yticks(range(len(names)), names, size=8)
for label, name in zip([*axis.get_xticklabels(), *axis.get_yticklabels()], names * 2):
    label.set_color({"patch": PICTURE, "answer": ANSWER}.get(name, PROMPT))
save(figure, "10_touch")

# %% [markdown]
# *Figure: a square of 11 by 11. Changing a patch or a word of the prompt moves the scores at every place. Changing an
# answer token moves
# only its own place and those after it: the rest of its column is white, which means exactly zero.*
#
# ## The bill
#
# One more function, and the full size can be counted. On the `meta` device tensors have shapes and no memory, so 3
# billion parameters cost nothing.


# %%
# | export
def count_parameters(module: nn.Module) -> int:
    """How many numbers a module has learned; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


# %%
with torch.device("meta"):
    full = PaliGemma(config_3b)

decoder = full.language_model
parts = {
    "patch embedding and positions": full.vision_tower.embeddings,
    "27 blocks that see": full.vision_tower.encoder,
    "last norm of the tower": full.vision_tower.post_layernorm,
    "projector": full.multi_modal_projector,
    "embedding, which is the head too": decoder.embed_tokens,
    "18 blocks that speak": decoder.layers,
    "last norm of the decoder": decoder.norm,
}
total = count_parameters(full)
for name, part in parts.items():
    print(f"{name:<34}{count_parameters(part):>15,}{count_parameters(part) / total:>8.1%}")
print(f"{'together':<34}{total:>15,}")
assert [count_parameters(part) for part in parts.values()] == [
    973_440,
    411_466_608,
    2_304,
    2_361_344,
    526_778_368,
    1_981_882_368,
    2_048,
]
assert total == sum(map(count_parameters, parts.values())) == 2_923_466_480

# %% [markdown]
# Two thirds of the model speak, and a seventh sees. 18 percent are the table of words, paid once because the head is
# the same table.
#
# Its bytes follow: four for each parameter in float32, two in bfloat16. The work of reading a picture and a prompt is
# two operations for each weight and token.

# %%
assert 4 * total == 11_693_865_920  # bytes: 11.7 GB in float32
assert 2 * total == 5_846_932_960  # 5.8 GB in bfloat16
seeing = 2 * 256 * count_parameters(full.vision_tower.encoder)
speaking = 2 * (256 + 10) * count_parameters(decoder.layers)
one_step = 2 * (count_parameters(decoder.layers) + count_parameters(decoder.embed_tokens))
print(f"reading: {seeing / 1e12:.2f} + {speaking / 1e12:.2f} TFLOP; each new token: {one_step / 1e9:.1f} GFLOP")
assert round((seeing + speaking) / one_step) == 252  # reading costs as much as writing that many tokens

# %% [markdown]
# These sums leave out attention's own products, which are small at this length.
#
# ## Your turn
#
# **1.** ★ Write `kilobytes_of_cache(tokens)`: keys and values of PaliGemma 3B in bfloat16, for all 18 layers, in
# units of 1,024 bytes.


# %%
def kilobytes_of_cache(tokens: int) -> float: ...


check(kilobytes_of_cache, ((1,), 18.0), ((256,), 4608.0))

# %% [markdown]
# **2.** ★ Write `untied(config)`: how many parameters would be added if the head were a table of its own?


# %%
def untied(config: PaliGemmaConfig) -> int: ...


check(untied, ((config_3b,), 526_778_368), ((model.config,), 3_600))

# %% [markdown]
# **3.** ★★ A model that knows nothing gives every word the same probability. Write `loss_of_ignorance(vocab_size)`.
# A loss far above it at the start of training is a sign of a mistake.


# %%
def loss_of_ignorance(vocab_size: int) -> float: ...


check(loss_of_ignorance, ((1,), 0.0), ((257_216,), math.log(257_216)))

# %% [markdown]
# **4.** ★★★ Without a model at hand: write `block_parameters(config)` for one block of a Gemma 1 decoder, from its
# sizes alone.


# %%
def block_parameters(config: GemmaConfig) -> int: ...


check(
    block_parameters,
    ((config_3b.text,), 110_104_576),
    ((model.config.text,), count_parameters(model.language_model.layers[0])),
)

# %% [markdown]
# Next: chapter 11 turns a real picture and a real sentence into the tensors that this class takes.
