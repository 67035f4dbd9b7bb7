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
# # The voice: Gemma
#
# *What stands between a row of vectors and the next word?*
#
# **You build** the decoder, Gemma 1 and 2 in one class. **You need** chapters 05, 06 and 07.
# **Exports** the module `sigma_book.gemma`.

# %%
# | export
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.attention import merge_heads, split_heads
from sigma_book.gqa import grouped_attention
from sigma_book.kv_cache import KVCache
from sigma_book.rope import rotary_angles, rotate

# %%
import os

import matplotlib.pyplot as plt
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaForCausalLM
from transformers import GemmaConfig as ReferenceConfig

from sigma_book import load
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import caption, draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# A decoder is a stack of blocks much like those of the eyes: exchange, think, add. At the bottom a table turns each token
# into a vector. At the top *the same table* turns a vector back into a score for every token. There it is called the
# *head*, which has nothing to do with the heads of attention. Two tables that are one and the same are called *tied*.

# %%
figure, axis = plt.subplots(figsize=(6.8, 1.7))
stages = [
    ("ids", "white"),
    ("table", PROMPT),
    ("18 blocks", PICTURE),
    ("norm", PICTURE),
    ("table again", PROMPT),
    ("scores", "white"),
]
for place, (name, colour) in enumerate(stages):
    ink = "white" if colour == PICTURE else "black"  # white is hard to read on orange
    axis.text(place, 0, name, ha="center", va="center", color=ink, bbox={"boxstyle": "round", "fc": colour, "ec": GREY})
    if place:
        axis.annotate("", (place - 0.38, 0), (place - 0.62, 0), arrowprops={"arrowstyle": "->", "color": GREY})
arc = {"arrowstyle": "<->", "color": PROMPT, "connectionstyle": "arc3,rad=-0.3", "ls": "--"}
axis.annotate("", (4, 0.16), (1, 0.16), arrowprops=arc)
axis.text(2.5, 0.98, "one and the same", ha="center", fontsize=9, color=PROMPT)
axis.set(xlim=(-0.5, 5.5), ylim=(-0.4, 1.2))
axis.axis("off")
save(figure, "08_stack")
plt.show()

# %% [markdown]
# *Figure: boxes in a row, from ids to scores: table, 18 blocks, a last norm, and the table again. A dashed line joins the
# two tables: one and the same.*
#
# What differs from the eyes: another norm, another way to think, positions by rotation, shared key/value heads, no biases,
# and a mask. Heads and positions we know (chapters 05 and 06). We take the others one by one.
#
# ## RMSNorm, by hand
#
# LayerNorm subtracts the mean and divides by the spread. Gemma leaves the mean alone and divides by the root of the
# mean square. Then comes a gain for each dimension. Gemma stores the gain *minus one*.

# %%
token = [3.0, 4.0, 0.0, 0.0]
root = (sum(number**2 for number in token) / 4 + 1e-6) ** 0.5
by_hand = [number / root for number in token]
[round(number, 3) for number in by_hand]

# %% [markdown]
# $$ \mathrm{norm}(x) = \frac{x}{\sqrt{\frac{1}{D} \sum_i x_i^2 + \epsilon}} \odot (1 + w) $$
#
# With $w = 0$ nothing is scaled, so a fresh model starts plain. Who forgets the 1 makes the inputs of both halves of a block
# far too small, and zero in a fresh model. Nothing crashes; the blocks only add too little.


# %%
# | export
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


# %%
# | export
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


# %%
norm = RMSNorm(4)
torch.testing.assert_close(norm(torch.tensor([token]))[0], torch.tensor(by_hand))
reference = torch.nn.RMSNorm(4, eps=1e-6)
norm.weight.data = torch.tensor([0.5, -0.2, 0.0, 1.0])
reference.weight.data = 1 + norm.weight.data
some = torch.randn(3, 4)
torch.testing.assert_close(norm(some), reference(some))

# %% [markdown]
# The mean of squares is taken in float32. In float16 a square beyond 65,504 is infinite, and activations of Gemma are
# large enough for that.

# %%
big = torch.full((1, 4), 300.0, dtype=torch.float16)
assert big.square().isinf().all()
assert RMSNorm(4)(big).isfinite().all()

# %% [markdown]
# ## GeGLU
#
# The eyes think with two maps and a bend. Gemma uses three maps. One makes a *gate*, one makes the content, and they are
# multiplied: the gate decides, number by number, what may pass.

# %%
gate, up, down = torch.randn(6, 3), torch.randn(6, 3), torch.randn(3, 6)
x = torch.randn(3)
middle = []
for i in range(6):
    g = sum(gate[i, j] * x[j] for j in range(3))
    u = sum(up[i, j] * x[j] for j in range(3))
    bent = 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)))
    middle.append(bent * u)
by_hand = torch.stack([sum(down[i, j] * middle[j] for j in range(6)) for i in range(3)])

# %% [markdown]
# $$ \mathrm{GeGLU}(x) = W_{down}\big(\mathrm{gelu}(W_{gate}\,x) \odot W_{up}\,x\big) $$


# %%
# | export
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


# %%
ours = GeGLU(3, 6)
ours.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down})
torch.testing.assert_close(ours(x), by_hand)

# %% [markdown]
# **Not SwiGLU.** One often reads that Gemma uses SwiGLU, as Llama does. The two differ in the bend: SwiGLU has
# $g\,\sigma(g)$, called SiLU. Gemma has the tanh form of GELU, and with the other bend the answers change. (Files of Gemma 1
# may say `gelu` and mean that form; those of Gemma 2 say `gelu_pytorch_tanh`.)

# %%
line = torch.linspace(-4, 3, 300)
figure, axis = plt.subplots(figsize=(4.6, 2.4))
axis.plot(line, F.gelu(line, approximate="tanh"), color=PICTURE)
axis.plot(line, F.silu(line), color=PROMPT)
axis.annotate("gelu: Gemma", (1.4, 1.35), ha="right", color=PICTURE)
axis.annotate("silu: Llama", (-3.6, -0.65), color=PROMPT)
axis.set(xlabel="gate before the bend", ylim=(-0.9, 3.1))
save(figure, "08_bends")
plt.show()
gap = (F.gelu(line, approximate="tanh") - F.silu(line)).abs().max().item()
assert 0.1 < gap < 0.25
gap

# %% [markdown]
# *Figure: both curves are near zero far left and near the line x far right; between, they are up to 0.2 apart.* That is
# hundreds of times more than the small error of the tanh form in chapter 04.
#
# ## Attention in the decoder
#
# Chapter 05 turns queries and keys, chapter 07 remembers, chapter 06 attends. This class only joins them.


# %%
# | export
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


# %% [markdown]
# ## The block, and Gemma 2 as options
#
# Gemma 1 has two norms in a block, before attention and before the GeGLU. Gemma 2, the decoder of PaliGemma 2, changes
# five things:
#
# - **Four norms.** It also normalizes what attention and the GeGLU *give*, before adding it.
# - **Soft caps.** Scores of attention are squeezed by $50 \tanh(s / 50)$, the last scores by $30 \tanh(s / 30)$.
# - **The scale** of attention is a number in the file, `query_pre_attn_scalar`, not the width of a head.
# - **A window** of 4,096 tokens in every other layer, beginning with layer 0.
# - **More key/value heads.**

# %%
line = torch.linspace(-150, 150, 300)
figure, axis = plt.subplots(figsize=(4.6, 2.2))
axis.plot(line, line, color=GREY, lw=0.8)
for cap, colour in ((50, PICTURE), (30, ANSWER)):
    axis.plot(line, cap * torch.tanh(line / cap), color=colour)
    axis.annotate(f"cap {cap}", (150, cap), ha="right", va="bottom", color=colour)
axis.set(xlabel="score", ylabel="after the cap", ylim=(-80, 80))
save(figure, "08_caps")
plt.show()

# %% [markdown]
# *Figure: a straight line, and two curves that leave it and bend to 50 and to 30. Small scores pass almost unchanged,
# large ones never exceed the cap.* However large a score grows, with a cap of 50 it stands at most 100 above another.
#
# One trap: `post_attention_layernorm` means two things. In Gemma 1 it is the norm *before the GeGLU*. In Gemma 2 it
# is the norm *after attention*. The name is the same; the place is not.


# %%
# | export
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


# %% [markdown]
# One class serves both. The options are fields of the configuration, and the window is a matter of which mask a layer is
# given.
#
# ## The whole decoder
#
# Embeddings are multiplied by $\sqrt{D}$. The rows of the table are short, because the same table makes the scores; the
# blocks want numbers of a size near 1. The factor is first rounded to the dtype of the weights: in bfloat16
# $\sqrt{2048} = 45.25$.

# %%
assert torch.tensor(2048**0.5, dtype=torch.bfloat16).item() == 45.25
assert abs(2048**0.5 - 45.2548) < 1e-4


# %%
# | export
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


# %%
# | export
def tied_logits(hidden_states: torch.Tensor, weight: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """Hidden states (..., D) times the rows of the embedding (V, D): a score for every token of the vocabulary."""
    logits = F.linear(hidden_states, weight)  # (..., V)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# %% [markdown]
# ## Proof
#
# Gemma 1 and Gemma 2 against `transformers`, with sizes that fit nowhere neatly, a window shorter than the text, and
# a causal mask made by hand.

# %%
sizes = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 4}
sizes |= {"num_key_value_heads": 2, "head_dim": 10, "vocab_size": 90}
two = {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window": 5}
layer_types = ("sliding_attention", "full_attention") * 2


def causal(length: int, window: int | None) -> torch.Tensor:
    column = torch.arange(length)
    back = column[:, None] - column[None, :]
    return ((back >= 0) & (back < (window or length)))[None, None]


ids = torch.randint(0, 90, (2, 12))
places = torch.arange(12).expand(2, 12)
for name, reference_class, reference_config, ours_config in (
    ("Gemma 1", GemmaForCausalLM, ReferenceConfig(**sizes), GemmaConfig(**sizes)),
    (
        "Gemma 2",
        Gemma2ForCausalLM,
        Gemma2Config(**sizes, **two),
        GemmaConfig(**sizes, **two, layer_types=layer_types, four_norms=True),
    ),
):
    reference = reference_class(reference_config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    decoder = Gemma(ours_config)
    decoder.load_state_dict({key.removeprefix("model."): value for key, value in reference.model.state_dict().items()})
    masks = {window: causal(12, window) for window in decoder.windows()}
    hidden = decoder(decoder.embed(ids), places, masks)
    logits = tied_logits(hidden, decoder.embed_tokens.weight, ours_config.final_logit_softcapping)
    expected = reference(ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5
    print(f"{name}: largest error {error:.1e} of the largest score")

# %% [markdown]
# ## A look inside
#
# How does a word come to be? We can stop after each block and ask the table what the model would say there. The pocket
# model reads a scene and the prompt `caption en`; here is what its last token thinks.

# %%
model = load(os.environ.get("SIGMA_BOOK_MODEL"))
processor, scene = model.processor, make_scene(5)
batch = processor.prepare([draw_scene(scene)], ["caption en"])
gemma = model.language_model
with torch.no_grad():
    hidden = model.embed(batch.input_ids, model.encode_images(batch.pixel_values))
    count = hidden.shape[1]
    everything = torch.ones(1, 1, count, count, dtype=torch.bool)  # a prompt sees itself whole
    angles = rotary_angles(torch.arange(1, count + 1)[None], gemma.config.head_dim, gemma.config.rope_theta)
    for number, layer in enumerate(gemma.layers, start=1):
        hidden = layer(hidden, angles, everything, None)
        chances = model.logits(gemma.norm(hidden[:, -1])).float().softmax(-1)[0]
        best = chances.topk(3)
        words = [
            f"{processor.tokenizer.decode([int(i)])!r} {p:.0%}" for p, i in zip(best.values, best.indices, strict=True)
        ]
        print(f"after block {number}: {', '.join(words)}")
print("the truth:", caption(scene))

# %% [markdown]
# The first word becomes clear in the last blocks. Before, the pocket model's vector still says the line end, the token that it
# came from: it was a row of the table, and the same table asks what it looks like.
#
# ## The bill


# %%
def bill(config: GemmaConfig) -> dict[str, int]:
    d, f, h, k, w = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    attention = d * w * (2 * h + 2 * k)
    thinking = 3 * d * f
    norms = (4 if config.four_norms else 2) * d
    return {"table": config.vocab_size * d, "one block": attention + thinking + norms, "of it GeGLU": thinking}


large = GemmaConfig(2048, 16384, 18, 8, 1, 256, 257_216)
parts = bill(large)
with torch.device("meta"):
    voice = Gemma(large)
total = sum(p.numel() for p in voice.parameters())
assert parts["table"] + 18 * parts["one block"] + 2048 == total == 2_508_662_784
assert sum(p.numel() for p in voice.layers[0].parameters()) == parts["one block"]
parts | {"total": total, "share of GeGLU in a block": round(parts["of it GeGLU"] / parts["one block"], 3)}

# %% [markdown]
# Nine tenths of a block is GeGLU. And the table alone is half a billion numbers, more than the eyes: 257,216 tokens
# times 2,048. Tying it to the head saves a second one.
#
# ## Your turn
#
# **1.** ★ The soft cap, and what it makes of a score of 1,000.


# %%
def soft_cap(score: float, cap: float) -> float: ...


check(soft_cap, ((0.0, 30.0), 0.0), ((1000.0, 30.0), 30.0), ((30.0, 30.0), 22.8478), ((30.0, 50.0), 26.8525))

# %% [markdown]
# **2.** ★ Does layer `i` of Gemma 2 slide?


# %%
def slides(i: int) -> bool: ...


check(slides, ((0,), True), ((1,), False), ((2,), True), ((24,), True), ((25,), False))

# %% [markdown]
# **3.** ★ How many parameters would untying the head add to PaliGemma 3B?


# %%
def untied_head(vocabulary: int, width: int) -> int: ...


check(untied_head, ((257_216, 2048), 526_778_368))

# %% [markdown]
# **4.** ★★ RMSNorm of a vector, with Gemma's gain `w`.


# %%
def rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor: ...


check(rms_norm, ((torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])), torch.tensor([0.8485, 2.2627])))

# %% [markdown]
# Next: eyes and voice meet.
