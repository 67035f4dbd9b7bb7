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
# # The bill before the run
#
# *How long must an answer take on this machine, and what decides it?*
#
# **You build** the bill of an answer (operations, bytes moved, bytes held), the machine's own limits, and a prediction.
# **You need** chapters 06 (grouped queries), 10 (PaliGemma) and 19 (four bits).
# **Exports** the module `sigma_book.speed`.

# %%
# | export
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.gemma import Gemma, GemmaBlock, GemmaConfig
from sigma_book.gqa import cache_bytes
from sigma_book.paligemma import PaliGemmaConfig
from sigma_book.qlora import nf4_bytes
from sigma_book.rope import rotary_angles
from sigma_book.siglip import SiglipBlock, SiglipConfig


# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import matplotlib.pyplot as plt

from sigma_book import load
from sigma_book.paligemma import PaliGemma
from sigma_book.style import ANSWER, GREY, PICTURE, check, save, use_style

use_style()
_ = torch.manual_seed(0)
_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## The picture
#
# An answer has two halves that have little in common. First the model reads: 256 patches and a prompt, all at once.
# Then it writes, one token at a time. Here is what PaliGemma 3B does in each half, in two numbers: multiplications and
# additions, and bytes fetched from memory.

# %%
tower, blocks, head = 0.41e9, 1.98e9, 0.53e9  # weights, rounded; the bill below counts them
halves = {"read the question": 2 * (256 * tower + 264 * blocks + head), "write a token": 2 * (blocks + head)}
fetched = [4 * (tower + blocks + head), 4 * (blocks + head)]
figure, axes = plt.subplots(1, 2, figsize=(7.6, 1.9), sharey=True)
for axis, values, label in zip(axes, (list(halves.values()), fetched), ("operations", "bytes fetched")):
    axis.barh([1, 0], values, color=[PICTURE, ANSWER], height=0.6)
    for place, value in zip((1, 0), values):
        axis.text(value, place, f" {value / 1e9:,.0f} billion", va="center", fontsize=8)
    axis.set(title=label, xticks=[], xlim=(0, max(values) * 1.5))
    axis.spines["bottom"].set_visible(False)
axes[0].set_yticks([1, 0], list(halves))
save(figure, "21_halves")

# %% [markdown]
# *Figure: two pairs of bars. Reading the question takes hundreds of times more operations than writing a token, whose
# bar is too short to be seen. The bytes fetched are nearly the same, 12 and 10 billion in float32: every weight once, the
# tower in reading only.*
#
# Reading is work for the arithmetic units. Writing is a delivery service: every weight is carried from memory to the
# processor, used for one multiplication and one addition, and dropped. So the two halves are slow for different
# reasons, and what helps one may do nothing for the other.
#
# ## Count by hand
#
# A linear map of three numbers to two, for four tokens. We count every multiplication and every addition.


# %%
def count_naive(rows: int, inner: int, outer: int) -> int:
    operations = 0
    for _ in range(rows):
        for _ in range(outer):
            for _ in range(inner):
                operations += 2  # multiply, and add to the sum
    return operations


count_naive(rows=4, inner=3, outer=2)

# %% [markdown]
# The weights are 3 x 2 numbers, whatever the number of rows. With one row each weight is used once, with four rows four
# times. How often a weight is used each time it is fetched: that is what matters below.
#
# $$ F = 2\,R\,I\,O \qquad M = w\,I\,O + a\,R\,(I + O) $$
#
# $R$ rows, $I$ numbers in, $O$ numbers out; $w$ and $a$ are the bytes of a weight and of an activation.
# $F$ are operations (the field writes FLOPs), $M$ bytes moved: the matrix once, the rows in, the results out.
#
# A processor does at most $\pi$ operations a second, and memory brings at most $\beta$ bytes a second. Both work at
# the same time, so the slower one decides:
#
# $$ t \;\ge\; \max\left(\frac{F}{\pi},\; \frac{M}{\beta}\right) $$
#
# This is called the **roofline**. Compare $F/M$, the operations for each byte, with $\pi/\beta$: below it memory decides,
# above it arithmetic. We draw it further down.
#
# ## A product


# %%
# | export
@dataclass(frozen=True)
class Product:
    """`count` products of (rows, inner) with (inner, outer), each with matrices of its own."""

    rows: int
    inner: int
    outer: int
    count: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.outer * self.count

    @property
    def numbers(self) -> int:
        """What goes in and comes out, the matrix apart."""
        return self.rows * (self.inner + self.outer) * self.count


# %%
assert Product(4, 3, 2).flops == count_naive(4, 3, 2) == 48

# %% [markdown]
# ## Bytes of a matrix
#
# In float32 a weight has four bytes, in bfloat16 and float16 two. In **int8** it has one, and each row of the matrix
# has a scale of four bytes that turns whole numbers back into real ones. In **int4** it has half a byte, and each 32
# weights share four bytes, for a scale and an offset. NF4 is chapter 19's: half a byte, and a little for scales.
#
# A matrix whose width is no multiple of 32, or whose rows are no multiple of 16, does not suit the kernel of int4: it
# stays in eight bits.
#
# Not everything is stored in few bits. With NF4 only the linear maps of the decoder are. With int8 the maps of the tower
# and the head are too, and with int4 these two have eight bits. Norms, biases, positions, projector and the table of
# embeddings stay exact. So a head in eight bits is a second copy of that table.


# %%
# | export
EXACT_BYTES = {  # of a number that is not in few bits
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 4,
    "int4": 4,
    "nf4": 4,
}
OUTSIDE = {"nf4": "exact", "int4": "int8"}  # how tower and head are stored while the decoder's maps are so


def matrix_bytes(outer: int, inner: int, precision: str, exact: int) -> int:
    """Bytes of a stored matrix.

    Parameters
    ----------
    outer, inner : int
        Rows and columns, as `torch.nn.Linear` stores them.
    precision : str
        int8: a byte a weight and 4 a row; int4: half a byte and 4 for each 32 weights, but as int8 if columns are no
        multiple of 32 or rows none of 16; nf4: as `nf4_bytes` counts; else `exact` bytes a weight.
    exact : int
        Bytes of a number that is not in few bits.
    """
    if precision == "int8" or (precision == "int4" and (inner % 32 or outer % 16)):
        return outer * inner + 4 * outer
    if precision == "int4":
        return outer * inner // 2 + 4 * outer * inner // 32
    return nf4_bytes(outer * inner) if precision == "nf4" else outer * inner * exact


# %%
square = {name: matrix_bytes(2048, 2048, name, exact) / 2048**2 for name, exact in EXACT_BYTES.items()}
assert square["float32"] == 4 and square["int8"] == 1 + 4 / 2048
assert square["int4"] == 5 / 8 and 0.5 < square["nf4"] < 0.52
square

# %% [markdown]
# ## A part of the bill
#
# An answer has five parts: tower, projector, the blocks that read the prompt, the blocks that take a step, and the
# head. Each part has products with stored matrices, products of attention (where both sides are activations), and
# *work in between*: norms, GELU, rotations, sums. It takes few operations but reads and writes every number again and
# again. We count the bytes that pass.


# %%
# | export
@dataclass(frozen=True)
class Part:
    """What one part of an answer costs.

    Parameters
    ----------
    name : str
    products : tuple of Product
        Rows of activations with stored matrices.
    attention : tuple of Product
        Queries with keys, weights with values.
    weight_bytes : int
        Of all that is stored for this part and read once, norms and biases included.
    cache_bytes : int
        Keys and values that are written or read.
    between_bytes : int
        What the work between products reads and writes.
    product_bytes : int
        What goes into the products and comes out, the stored matrices apart.
    curved : int
        Numbers that pass a GELU.
    tower_blocks, decoder_blocks : int
        How many blocks Python runs through.
    """

    name: str
    products: tuple[Product, ...]
    attention: tuple[Product, ...] = ()
    weight_bytes: int = 0
    cache_bytes: int = 0
    between_bytes: int = 0
    product_bytes: int = 0
    curved: int = 0
    tower_blocks: int = 0
    decoder_blocks: int = 0

    @property
    def flops(self) -> int:
        """Multiplications and additions of all products, as torch's `FlopCounterMode` counts them."""
        return sum(product.flops for product in self.products + self.attention)

    @property
    def scores(self) -> int:
        """How often a query is held against a key; in `attention` every second product makes them."""
        return sum(product.rows * product.outer * product.count for product in self.attention[::2])

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.weight_bytes + self.cache_bytes + self.between_bytes + self.product_bytes


# %% [markdown]
# ## The tower
#
# The numbers below are read off the code of chapters 02 to 04. A norm reads a token and writes one; a residual sum
# reads two and writes one; heads are laid out anew once; GELU reads and writes. Scores of attention stay inside a fused
# kernel and are not moved at all.


# %%
# | export
def vision_bill(config: PaliGemmaConfig, pictures: int, precision: str, exact: int) -> Part:
    """The tower over some pictures."""
    sizes = config.vision
    width, inner, layers, patches = (
        sizes.hidden_size,
        sizes.intermediate_size,
        sizes.num_hidden_layers,
        sizes.num_patches,
    )
    few = OUTSIDE.get(precision, precision)
    pixels = sizes.num_channels * sizes.patch_size**2
    rows, heads = pictures * patches, pictures * sizes.num_attention_heads * layers
    products = (
        Product(rows, pixels, width),
        Product(rows, width, width, 4 * layers),
        Product(rows, width, inner, layers),
        Product(rows, inner, width, layers),
    )
    head_dim = width // sizes.num_attention_heads
    attention = (Product(patches, head_dim, patches, heads), Product(patches, patches, head_dim, heads))
    maps = 4 * matrix_bytes(width, width, few, exact)
    maps += matrix_bytes(inner, width, few, exact) + matrix_bytes(width, inner, few, exact)
    vectors = layers * (4 * width + inner + width + 4 * width)  # biases, and two norms with two vectors each
    vectors += pixels * width + width + patches * width + 2 * width  # patch map, positions, last norm
    passes = layers * (2 * 2 + 2 * 3 + 2) * width + 2 * layers * inner  # norms, sums, heads; GELU
    passes += 5 * width + 2 * pixels  # positions added (3) and the last norm (2); pixels laid out as patches
    return Part(
        name="vision",
        products=products,
        attention=attention,
        weight_bytes=layers * maps + exact * vectors,
        between_bytes=exact * rows * passes,
        # of attention: queries, keys and values go in, one result comes out
        product_bytes=exact * (sum(product.numbers for product in products) + layers * rows * 4 * width),
        curved=rows * inner * layers,
        tower_blocks=layers,
    )


# %% [markdown]
# ## The decoder
#
# One function for both halves: `length` new tokens of each row look at `seen[l]` columns in layer l. In prefill both are
# the length of the prompt. In a step `length` is 1, and `seen` is what the cache holds, at most the window where a layer
# slides. (In prefill a sliding layer of ours computes all scores and masks them, so they are on the bill.)
#
# Gemma's RMSNorm and the rotation are written out in plain operations, and each operation reads numbers and writes numbers.
# We say that a number is *passed* when it is read or written. For each number of a token:
#
# | RMSNorm | read | written | | rotation | read | written |
# |---|---|---|---|---|---|---|
# | square | 1 | 1 | | both halves, times cosine and times sine | 2 | 2 |
# | mean of the squares | 1 | 0 | | their difference and their sum | 2 | 1 |
# | times the inverse root | 1 | 1 | | both halves side by side | 1 | 1 |
# | times 1 + w | 1 | 1 | | | | |
# | **together 7** | 4 | 3 | | **together 9** | 5 | 4 |
#
# (Cosines, means and gains are few beside that.) Gemma 2's softcap keeps attention out of the fused kernel, so every score is
# passed fourteen times.


# %%
# | export
def _decoder_bill(
    config: PaliGemmaConfig, batch: int, length: int, seen: list[int], precision: str, exact: int, name: str
) -> Part:
    """The blocks over `length` new tokens in each of `batch` rows; layer l looks at `seen[l]` columns."""
    text = config.text
    width, inner, layers, head_dim = text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim
    asking, answering = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    rows = batch * length
    shapes = (width, asking, 1), (width, answering, 2), (asking, width, 1), (width, inner, 2), (inner, width, 1)
    products = tuple(Product(rows, i, o, count * layers) for i, o, count in shapes)
    attention = []
    for columns in sorted(set(seen)):
        heads = seen.count(columns) * batch * text.num_attention_heads
        attention += [Product(length, head_dim, columns, heads), Product(length, columns, head_dim, heads)]
    # in int4 queries, keys and values are one map (chapter 21b), and its rows decide whether it suits the kernel
    stored = ((width, asking + 2 * answering, 1), *shapes[2:]) if precision == "int4" else shapes
    maps = sum(count * matrix_bytes(o, i, precision, exact) for i, o, count in stored)
    norms = (4 if text.four_norms else 2) * layers + 1
    passes = 7 * norms * width + 6 * width  # and at the entrance: looked up, scaled, pictures put in, 2 each
    # in a block: two sums of 3, rotation of queries and keys, heads laid out anew, GELU (2) and gate times up (3)
    passes += layers * (6 * width + 9 * (asking + answering) + 2 * asking + 5 * inner)
    scores = batch * text.num_attention_heads * length * sum(seen)
    capped = text.attn_logit_softcapping is not None
    # bytes: with a cap the scores themselves, and 3 of the mask; else the mask alone, laid out for each group, made
    # numbers, and read
    a_score = 14 * exact + 3 if capped else 6 + exact
    per_token = 2 * text.num_key_value_heads * head_dim * exact
    return Part(
        name=name,
        products=products,
        attention=tuple(attention),
        weight_bytes=layers * maps + exact * norms * width,
        cache_bytes=batch * per_token * (length * layers + sum(seen)),  # written once, read once
        between_bytes=exact * rows * passes + a_score * scores,
        # of attention: queries go in, results come out; keys and values are on the cache's line
        product_bytes=exact * (sum(product.numbers for product in products) + 2 * layers * rows * asking),
        curved=rows * inner * layers,
        decoder_blocks=layers,
    )


# %% [markdown]
# ## The whole bill
#
# Two parts are one product each: the projector, and the head, which is asked for one place in each row.
#
# How much must be *held* at once is a different question from how much is moved. Held are all weights, the cache at its
# full length, and the activations at their largest moment. In the decoder that moment is inside a GeGLU: the block's input,
# its normalized copy, gate, GELU of the gate, up, and the product of the last two are in memory together. With Gemma 2's
# softcap the largest moment may be another one: scores outside the fused kernel are a table of $T \times T$ for each head,
# and capped, masked and normalized ones stand beside it, three tables in float32 and five of 16 bits.


# %%
# | export
@dataclass(frozen=True)
class InferenceBill:
    """What an answer costs, part by part; `step` gives each token after the first.

    Parameters
    ----------
    config : PaliGemmaConfig
    batch : int
        B, rows.
    prompt_length : int
        T, tokens of a row, those of its pictures included.
    new_tokens : int
        Of each answer, the first included.
    precision : str
    exact : int
        Bytes of a number that is not in few bits.
    head_precision : str
        Of the head: a dtype, int8, or exact beside nf4.
    pictures : int
        N, of all rows together.
    vision, projector, prefill, head : Part
        What the first token takes. Each step takes a head of the same size.
    """

    config: PaliGemmaConfig
    batch: int
    prompt_length: int
    new_tokens: int
    precision: str
    exact: int
    head_precision: str
    pictures: int
    vision: Part
    projector: Part
    prefill: Part
    head: Part

    @property
    def first(self) -> tuple[Part, ...]:
        """The parts of the first token."""
        return self.vision, self.projector, self.prefill, self.head

    def step(self, cache_length: int | None = None) -> tuple[Part, Part]:
        """Blocks and head of one token that looks at `cache_length` columns, itself included.

        By default the token in the middle of the answer.
        """
        text = self.config.text
        length = self.prompt_length + self.new_tokens // 2 if cache_length is None else cache_length
        seen = [min(length, text.window(layer) or length) for layer in range(text.num_hidden_layers)]
        blocks = _decoder_bill(self.config, self.batch, 1, seen, self.precision, self.exact, "step")
        return blocks, replace(self.head, name="step head")

    @property
    def weights_held(self) -> int:
        """Bytes of all weights. A tied head in few bits is a second copy of the embedding."""
        text = self.config.text
        parts = self.vision.weight_bytes + self.projector.weight_bytes + self.prefill.weight_bytes
        rows = text.vocab_size * text.hidden_size * self.exact
        second = self.head_precision == "int8" or not text.tie_word_embeddings
        return parts + rows + (self.head.weight_bytes if second else 0)

    @property
    def cache_held(self) -> int:
        """Bytes of keys and values with room for the whole answer."""
        text, room = self.config.text, self.prompt_length + self.new_tokens
        slots = [min(room, text.window(layer) or room) for layer in range(text.num_hidden_layers)]
        return sum(
            cache_bytes(1, text.num_key_value_heads, text.head_dim, length, self.batch, self.exact) for length in slots
        )

    @property
    def activations_held(self) -> int:
        """Bytes at the largest moment of reading, nearly.

        That is in the tower, in a GeGLU of the decoder, at the head, or, if scores of attention are capped, in their
        tables: (B, H, T, T) stands in memory three times in float32, five times in 16 bits.
        """
        vision, text = self.config.vision, self.config.text
        tower = self.pictures * vision.num_patches * (2 * vision.hidden_size + 2 * vision.intermediate_size)
        decoder = self.batch * self.prompt_length * (2 * text.hidden_size + 4 * text.intermediate_size)
        scores = 0
        if text.attn_logit_softcapping is not None:
            table = self.batch * text.num_attention_heads * self.prompt_length**2
            scores = table * (12 if self.exact == 4 else 10)
        return max(self.exact * tower, self.exact * decoder, scores, 2 * 4 * self.batch * text.vocab_size)

    @property
    def held(self) -> int:
        """Bytes that must be there at once."""
        return self.weights_held + self.cache_held + self.activations_held


def inference_bill(
    config: PaliGemmaConfig,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    precision: str = "float32",
    *,
    pictures: int | None = None,
    exact: int | None = None,
    head: str | None = None,
) -> InferenceBill:
    """Count what an answer costs before it is given.

    Parameters
    ----------
    config : PaliGemmaConfig
    batch : int
        B, rows that are answered together.
    prompt_length : int
        T, tokens of a row, those of its pictures included.
    new_tokens : int
        Of each answer.
    precision : str
        float32, bfloat16, float16, int8, int4 or nf4.
    pictures : int, optional
        N, of all rows together; one for each row by default.
    exact : int, optional
        Bytes of numbers that are not in few bits: 4 beside int8, int4 and nf4, unless you say 2.
    head : str, optional
        int8, if the head is in eight bits whatever the precision.

    Raises
    ------
    ValueError
        If a count is no whole number of 1 or more, `precision`, `exact` or `head` is none of those above, or the
        pictures do not fit the prompt.

    References
    ----------
    Williams, Waterman and Patterson 2009, "Roofline"; Pope et al. 2022, "Efficiently Scaling Transformer Inference".
    """
    pictures = batch if pictures is None else pictures
    for key, value in (("batch", batch), ("prompt_length", prompt_length), ("new_tokens", new_tokens)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} is {value!r}: expected a whole number, 1 or more")
    if type(pictures) is not int or pictures < 0:
        raise ValueError(f"pictures is {pictures!r}: expected a whole number, 0 or more")
    if precision not in EXACT_BYTES:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(EXACT_BYTES)}")
    if exact is not None and (type(exact) is not int or exact not in (2, 4)):
        raise ValueError(f"exact is {exact!r}: expected 2 or 4, the bytes of a number")
    if head not in (None, "int8"):
        raise ValueError(f"head is {head!r}: expected 'int8', or nothing if it is stored as the precision says")
    if pictures * config.num_image_tokens > batch * prompt_length:
        raise ValueError(
            f"{pictures} pictures take {pictures * config.num_image_tokens} tokens, but {batch} rows of prompt_length "
            f"{prompt_length} have only {batch * prompt_length}: prompt_length counts the pictures' tokens too"
        )
    exact = EXACT_BYTES[precision] if exact is None else exact
    text, width = config.text, config.vision.hidden_size
    few = head or OUTSIDE.get(precision, precision)
    rows = pictures * config.num_image_tokens
    project, score = Product(rows, width, text.hidden_size), Product(batch, text.hidden_size, text.vocab_size)
    capped = 0 if text.final_logit_softcapping is None else 6 * score.outer * batch
    prompt = [prompt_length] * text.num_hidden_layers
    return InferenceBill(
        config,
        batch,
        prompt_length,
        new_tokens,
        precision,
        exact,
        few,
        pictures,
        vision=vision_bill(config, pictures, precision, exact),
        projector=Part(
            "projector",
            (project,),
            weight_bytes=matrix_bytes(text.hidden_size, width, "exact", exact) + exact * text.hidden_size,
            product_bytes=exact * project.numbers,
        ),
        prefill=_decoder_bill(config, batch, prompt_length, prompt, precision, exact, "prefill"),
        head=Part(
            "head",
            (score,),
            weight_bytes=matrix_bytes(text.vocab_size, text.hidden_size, few, exact),
            between_bytes=exact * capped,
            product_bytes=exact * score.numbers,
        ),
    )


# %% [markdown]
# ## Proof
#
# Torch can count operations itself while a model runs. Its count and ours are the same integers: here for the pocket
# model, and in `tests/test_speed.py` for every odd shape, with Gemma 2, groups, several pictures, batches. Torch's counter
# does not know the CPU's fused kernel of attention, so `MATH` sends attention through plain products, which it knows. The
# bytes of the weights are those of the state dict.

# %%
pocket = load()
sizes = pocket.config
bill = inference_bill(sizes, batch=1, prompt_length=72, new_tokens=16)
assert bill.weights_held == sum(tensor.nbytes for tensor in pocket.state_dict().values())
ids = torch.tensor([[sizes.image_token_id] * 64 + [2] * 8])
mask, caches = torch.ones(1, 73, dtype=torch.long), pocket.language_model.new_caches(1, 73)
with sdpa_kernel(SDPBackend.MATH):
    with FlopCounterMode(display=False) as counter:
        features = pocket.encode_images(torch.zeros(1, 3, 112, 112))
    assert counter.get_total_flops() == bill.vision.flops + bill.projector.flops
    with FlopCounterMode(display=False) as counter:
        pocket.prefill(ids, features, mask[:, :72], caches)
    assert counter.get_total_flops() == bill.prefill.flops + bill.head.flops
    with FlopCounterMode(display=False) as counter:
        pocket.decode(ids[:, -1:], mask, caches)
    assert counter.get_total_flops() == sum(part.flops for part in bill.step(73))

# %% [markdown]
# And the bill of the real one:

# %%
PALIGEMMA_3B = PaliGemmaConfig.from_dict(
    {
        "model_type": "paligemma",
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 257_216,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
    }
)
whole = inference_bill(PALIGEMMA_3B, batch=1, prompt_length=264, new_tokens=20)
assert whole.weights_held == 4 * 2_923_466_480
assert [round(part.weight_bytes / 4, -7) for part in (whole.vision, whole.prefill, whole.head)] == [tower, blocks, head]
print(f"{'part':10} {'GFLOP':>9} {'MB moved':>9} {'FLOP a byte':>12}")
for part in (*whole.first, *whole.step()):
    print(f"{part.name:10} {part.flops / 1e9:9.1f} {part.bytes / 1e6:9.1f} {part.flops / part.bytes:12.1f}")
for precision in EXACT_BYTES:
    held = inference_bill(PALIGEMMA_3B, 1, 264, 20, precision)
    print(f"{precision:9} weights {held.weights_held / 1e9:5.2f} GB, cache {held.cache_held / 1e6:4.1f} MB")

# %% [markdown]
# Read the last column. Tower and prefill do some eighty operations for each byte, a step does half of one. And read the
# weights of int8: they are more than a quarter of float32's, since the exact table of embeddings is held beside a head of
# eight bits. (Chapter 21b leaves that table in the file.)
#
# ## What this machine can do
#
# No data sheet is needed: we time it.
#
# - *Products.* A map of 67 MB, too large to stay in the processor's own memory (its cache), times some rows of
#   activations. Two such maps take turns.
# - *Work in between.* A product of two tensors, number by number.
# - *GELU and softmax.* They bend every number through a tanh or an exponential, which costs arithmetic, not only bytes.
#
# `load` leaves float32 weights in the file, as a window (chapter 12), and reading through a window can be slower than
# reading memory of one's own. So the maps that we time are windows too. And with one row, two maps of the same size
# differ: each number that comes out is a sum of its own, begun and ended, so 8192 short sums take longer than 2048 long
# ones. Two shapes of $M$ bytes give two equations, for the bandwidth $\beta$ and for what a sum takes besides, $b$:
#
# $$ t_{\text{wide}} = \frac{M}{\beta} + 8192\,b \qquad\qquad t_{\text{narrow}} = \frac{M}{\beta} + 2048\,b $$
#
# And a last measurement: a block of tiny matrices computes next to nothing and still takes time, Python's and torch's own
# for each operation. It takes longer in a large model: the weights that rush by push Python's own data out of the cache,
# again and again. So we time it twice, the second time while weights rush by.


# %%
# | export
def median_seconds(function: Callable[[], object], least: float = 0.05, device: str = "cpu") -> float:
    """Median time of a call, after one that is not counted: at least three calls, and `least` seconds of them."""
    function()
    wait_for(device)
    times = []
    while len(times) < 3 or sum(times) < least:
        started = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def wait_for(device: str | torch.device) -> None:
    """Wait until a device has done what it was asked to; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()


# %% [markdown]
# How fast is a product with 1, 2, 4, ... rows? If a matrix comes from memory anyway, two rows should cost what one
# does: the arithmetic is idle. We measure both shapes that a decoder has, widening (2048 -> 8192) and narrowing
# (8192 -> 2048).


# %%
# | export
def product_rates(
    rows: tuple[int, ...], inner: int = 2048, outer: int = 8192, make_map: Callable | None = None
) -> tuple[tuple[int, float, float], ...]:
    """Operations a second of linear maps, by how many rows they are given.

    Parameters
    ----------
    rows : tuple of int
    inner, outer : int
        Of the widening map; the narrowing one has them the other way round.
    make_map : callable, optional
        Takes (inner, outer) and gives a function of rows (R, inner); torch's float32 map by default.

    Returns
    -------
    tuple of (rows, rate of the widening map, rate of the narrowing map)
    """
    make_map = make_map or _plain_map
    rates = []
    maps = [[make_map(i, o) for _ in range(2)] for i, o in ((inner, outer), (outer, inner))]
    for count in rows:
        measured = []
        for (first, second), width in zip(maps, (inner, outer), strict=True):
            given = torch.randn(count, width)
            least = 0.3 if count == 1 else 0.05  # one row is what bandwidth is taken from
            seconds = median_seconds(lambda a=first, b=second, x=given: (a(x), b(x)), least) / 2
            measured.append(2 * count * inner * outer / seconds)
        rates.append((count, *measured))
    return tuple(rates)


def _plain_map(inner: int, outer: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A float32 map whose weight is a window into a file, as `load` leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight"
        torch.randn(outer, inner).numpy().tofile(path)
        weight = torch.from_file(str(path), size=outer * inner).view(outer, inner)
    return lambda rows: F.linear(rows, weight)


# %%
few = product_rates((1, 2, 4, 8, 16, 32, 64))
size = 2048 * 8192
figure, axis = plt.subplots(figsize=(6.4, 2.8))
for place, (label, colour) in enumerate((("widening", PICTURE), ("narrowing", ANSWER)), start=1):
    times = [2 * row[0] * size / row[place] * 1e3 for row in few]
    axis.plot([row[0] for row in few], times, marker="o", ms=3, color=colour)
    axis.annotate(label, (few[-1][0], times[-1]), xytext=(6, 0), textcoords="offset points", va="center")
one = 2 * size / few[0][1] * 1e3
axis.axhline(one, color=GREY, lw=1, ls="--")
axis.annotate("one row", (20, one), xytext=(0, 3), textcoords="offset points", color="0.4")
axis.set(xscale="log", xticks=[row[0] for row in few], xticklabels=[row[0] for row in few], xlim=(0.9, 120))
axis.minorticks_off()
axis.set(xlabel="rows", ylabel="milliseconds", ylim=(0, None))
save(figure, "21_rows")
print({rows: f"{rows * few[0][1] / rate:.1f} times one row" for rows, rate, _ in few})

# %% [markdown]
# *Figure: the time of a linear map over its rows, from 1 to 64, for a widening and a narrowing map. The dashed line is
# what one row takes. Two rows already lie above it, although the same bytes are fetched. But from four rows to sixteen,
# four times the work, the time hardly grows.*
#
# This is a trap. With one row torch calls a routine for a matrix times a vector, which runs as fast as memory. With a few
# it calls the routine for two matrices, which first copies the weights into an order that suits many rows. That copy takes
# the same time for any number of rows, hence the flat part: for 256 rows it is nothing, for four it is most of the work.
# So two answers at once can cost as much as one after the other, and a prediction for a small batch must ask for the
# measured rate, not for the roofline. (Chapter 21b gets around it.)
#
# ## A machine, exported
#
# The formula takes the larger of two times. `seconds` below adds, for two reasons. A rate that was measured contains both
# limits, since the weights came from memory while we timed. And products, attention and the work in between wait for each
# other. Only for a machine of which we know nothing but the two limits the larger one is taken, part by part.


# %%
# | export
@dataclass(frozen=True)
class Machine:
    """What a processor can do.

    Parameters
    ----------
    name : str
    peak : float
        Operations a second, of products with many rows.
    read : float
        Bytes a second, of weights on their way into a product with one row.
    begin : float
        Seconds that each number which comes out of a product with one row takes besides.
    stream : float
        Bytes a second that the work between products reads and writes.
    copy : float
        Bytes a second, read and written, of copying more than a cache holds; no prediction uses it.
    curve : float
        Seconds for each number that passes a GELU.
    score : float
        Seconds for each score of attention, its multiplications apart: the softmax.
    rates : tuple
        As `product_rates` gives them; none: the roofline alone.
    tower_block, decoder_block : float
        Seconds of a block with nothing in it.
    busy_block : float
        The same of the decoder, while weights rush by.
    measured : bool
        False: from published peaks, so it predicts a run that reaches them.
    """

    name: str
    peak: float
    read: float
    stream: float
    copy: float = 0.0
    begin: float = 0.0
    curve: float = 0.0
    score: float = 0.0
    rates: tuple[tuple[int, float, float], ...] = ()
    tower_block: float = 0.0
    decoder_block: float = 0.0
    busy_block: float = 0.0
    measured: bool = False

    def rate(self, rows: int, widens: bool) -> float:
        """Operations a second of a product with so many rows: between two measured ones on a line of logarithms."""
        known = [(count, wide if widens else narrow) for count, wide, narrow in self.rates]
        lower = max((pair for pair in known if pair[0] <= rows), default=known[0])
        upper = min((pair for pair in known if pair[0] >= rows), default=known[-1])
        if lower[0] == upper[0]:
            return lower[1]
        share = math.log(rows / lower[0]) / math.log(upper[0] / lower[0])
        return lower[1] ** (1 - share) * upper[1] ** share

    def seconds(self, part: Part) -> float:
        """How long a part takes.

        Each product takes its operations over the rate for its rows, or, with one row, its bytes over bandwidth and
        a little for each number that comes out. Attention runs at the peak, or as fast as the cache is read. Work
        between products, GELU and empty blocks come on top, since they wait for each other. Without measured rates
        the whole part takes the longer of operations over peak and bytes over bandwidth.
        """
        if not self.rates:
            return max(part.flops / self.peak, part.bytes / self.read)
        if all(one.rows == 1 for one in part.products):
            products = part.weight_bytes / self.read + self.begin * sum(one.outer * one.count for one in part.products)
        else:
            products = sum(one.flops / self.rate(one.rows, one.outer >= one.inner) for one in part.products)
        attention = max(sum(one.flops for one in part.attention) / self.peak, part.cache_bytes / self.read)
        attention += part.scores * self.score
        between = part.between_bytes / self.stream + part.curved * self.curve
        return products + attention + between + self.overhead(part)

    def overhead(self, part: Part) -> float:
        """Seconds in which a part computes nothing: Python's time, and torch's for each operation.

        A decoder block is as busy as its own weights make it: wholly so from 32 MB on.
        """
        if not part.decoder_blocks:
            return part.tower_blocks * self.tower_block
        share = min(1.0, part.weight_bytes / part.decoder_blocks / 2**25)
        return part.decoder_blocks * (self.decoder_block + share * (self.busy_block - self.decoder_block))


# %% [markdown]
# The empty blocks. The decoder's has Gemma's eight heads of 256 and looks at as many tokens as a picture has.


# %%
# | export
def _tower_block_seconds() -> float:
    block = SiglipBlock(SiglipConfig(32, 32, 1, 4)).eval()
    token = torch.randn(1, 4, 32)
    return median_seconds(lambda: block(token))


def _decoder_block_seconds(passing_bytes: int) -> float:
    """A decoder block with Gemma's heads and next to no weights, while others rush by.

    In front of each of its maps one row goes through a matrix of `passing_bytes`, with the clock stopped: if it fills
    the caches, Python and torch find nothing where they left it, and the other threads have gone to sleep.
    """
    config = GemmaConfig(32, 32, 1, 8, 1, 256, vocab_size=8)
    block, (cache,) = GemmaBlock(config).eval(), Gemma(config).new_caches(1, 512)
    token, mask = torch.randn(1, 1, 32), torch.ones(1, 1, 1, 257, dtype=torch.bool)
    row, passing = torch.randn(1, 2048), torch.zeros(passing_bytes // 8192, 2048)
    angles = rotary_angles(torch.ones(1, 1), 256, 10_000.0)
    away = []

    def interrupt(*_) -> None:
        started = time.perf_counter()
        F.linear(row, passing)
        away.append(time.perf_counter() - started)

    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(interrupt)
    times = []
    for _ in range(16):
        away.clear()
        cache.length = 256
        started = time.perf_counter()
        block(token, angles, mask, cache)
        times.append(time.perf_counter() - started - sum(away))
    return statistics.median(times[1:])


# %% [markdown]
# Now all measurements together. Solving the two equations above gives `begin` and `read`. `copy` enters no prediction: it
# is a second look at memory, to hold `read` against.


# %%
# | export
def measure_machine(make_map: Callable | None = None, name: str = "this machine", weight_bytes: float = 4.0) -> Machine:
    """Time what this processor can do, in some seconds.

    Parameters
    ----------
    make_map : callable, optional
        As in `product_rates`: a linear map in another precision.
    name : str
    weight_bytes : float
        Of a weight in those maps.
    """
    inner, outer = 2048, 8192
    with torch.no_grad():
        rates = product_rates((1, 2, 3, 4, 8, 16, 32, 64, 256), inner, outer, make_map)
        wide, narrow = (2 * inner * outer / rate for rate in rates[0][1:])  # seconds of one row
        # the difference of the two equations; noise must not make it negative, nor more than half of the time
        begin = min(max(0.0, (wide - narrow) / (outer - inner)), 0.5 * narrow / inner)
        numbers = torch.randn(256, 8192)
        passing = median_seconds(lambda: numbers * numbers)
        bending = median_seconds(lambda: F.gelu(numbers, approximate="tanh"))
        heads = torch.randn(1, 16, 256, 72)
        looking = median_seconds(lambda: F.scaled_dot_product_attention(heads, heads, heads))
        peak = max(max(row[1:]) for row in rates)
        large, other = torch.zeros(2, 2**25)
        copying = median_seconds(lambda: other.copy_(large))
        return Machine(
            name=name,
            peak=peak,
            read=weight_bytes * inner * outer / (narrow - inner * begin),
            stream=3 * numbers.nbytes / passing,
            copy=2 * large.nbytes / copying,
            begin=begin,
            curve=max(0.0, bending - passing * 2 / 3) / numbers.numel(),  # GELU passes two numbers, not three
            score=max(0.0, looking / (16 * 256**2) - 4 * 72 / peak),  # without its two products over 72 numbers
            rates=rates,
            tower_block=_tower_block_seconds(),
            decoder_block=_decoder_block_seconds(2**13),
            busy_block=_decoder_block_seconds(2**24),
            measured=True,
        )


# %% [markdown]
# One look may meet a busy moment. The benchmark takes several, and of each number the median.


# %%
# | export
def median_machine(looks: Sequence[Machine]) -> Machine:
    """Of several measurements of one machine, the median of each number."""
    numbers = (
        "peak",
        "read",
        "stream",
        "copy",
        "begin",
        "curve",
        "score",
        "tower_block",
        "decoder_block",
        "busy_block",
    )
    middle = {key: statistics.median(getattr(look, key) for look in looks) for key in numbers}
    rates = [tuple(map(statistics.median, zip(*rows))) for rows in zip(*(look.rates for look in looks))]
    return replace(looks[0], rates=tuple((int(rows), wide, narrow) for rows, wide, narrow in rates), **middle)


# %%
machine = measure_machine()
print(f"peak   {machine.peak / 1e9:7.1f} billion operations a second")
print(f"read   {machine.read / 1e9:7.1f} GB a second into a product with one row; copy {machine.copy / 1e9:.1f}")
print(f"begin  {machine.begin * 1e9:7.1f} ns for each sum with one row")
print(f"stream {machine.stream / 1e9:7.1f} GB a second between products; GELU {machine.curve * 1e9:.2f} ns a number")
print(f"empty  {machine.decoder_block * 1e6:7.0f} microseconds for a decoder block with nothing in it")
print(f"busy   {machine.busy_block * 1e6:7.0f} microseconds while weights rush by")
assert machine.rates[0][1] < machine.peak  # one row never reaches the peak

# %% [markdown]
# ## Predict, then look
#
# A model of 36 million numbers, random ones: speed does not depend on what they are. We predict each half, then time
# it. A ratio above 1 means that it took longer than predicted. `sigma-book bench --bill` does the same for whole models
# in processes of their own.

# %%
small = PaliGemmaConfig(
    SiglipConfig(384, 1536, 6, 6, image_size=224, patch_size=14), GemmaConfig(512, 2048, 6, 4, 1, 128, 4096), 4000
)
model = PaliGemma(small).eval()
assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 36


def read_and_step(model: PaliGemma, batch: int = 1, words: int = 8, tokens: int = 4) -> tuple[float, float, float]:
    """Median seconds of the tower, of reading the prompt, and of one step."""
    sizes = model.config
    ids = torch.tensor([[sizes.image_token_id] * sizes.num_image_tokens + [2] * words] * batch)
    mask = torch.ones(batch, ids.shape[1] + 64, dtype=torch.long)
    side = sizes.vision.image_size
    shown = torch.randn(batch, 3, side, side)
    vision = median_seconds(lambda: model.encode_images(shown), least=0.2)
    features = model.encode_images(shown)

    def read() -> list:
        caches = model.language_model.new_caches(batch, ids.shape[1] + 64)
        model.prefill(ids, features, mask[:, : ids.shape[1]], caches)
        return caches

    reading = median_seconds(read, least=0.2)
    caches = read()
    times = []
    for place in range(tokens * 4):
        started = time.perf_counter()
        model.decode(ids[:, -1:], mask[:, : ids.shape[1] + place + 1], caches)
        times.append(time.perf_counter() - started)
    return vision, reading, statistics.median(times)


def predicted(config: PaliGemmaConfig, batch: int = 1, words: int = 8, new_tokens: int = 16) -> tuple[float, ...]:
    costs = inference_bill(config, batch, config.num_image_tokens + words, new_tokens)
    tower, projector, prefill, head = map(machine.seconds, costs.first)
    return tower + projector, prefill + head, sum(map(machine.seconds, costs.step()))


for name, foreseen, seen in zip(("tower", "prefill", "step"), predicted(small), read_and_step(model)):
    print(f"{name:8} predicted {foreseen * 1e3:7.1f} ms, measured {seen * 1e3:7.1f} ms, ratio {seen / foreseen:.2f}")


# %% [markdown]
# ## Cards that we do not have
#
# A GPU's maker publishes the same two numbers: operations a second of its tensor units on 16-bit numbers, and bytes a
# second of its memory. With them the same bill gives the same kind of prediction. These are **computed, not measured**:
# the time that the plain model takes on a card that reaches both peaks. Code that fuses operations moves fewer bytes and
# can be faster. The units of the older cards, T4 and V100, know float16 and not bfloat16, which such a card computes in
# float32. Nothing in this book was run on a GPU.


# %%
# | export
@dataclass(frozen=True)
class Gpu:
    """Published peaks of a card.

    Parameters
    ----------
    name : str
    words : tuple of str
        That occur in the name which the driver gives it.
    tensor, plain : float
        Operations a second: 16-bit numbers summed in float32 on tensor units, without sparsity; and float32.
    bandwidth : float
        Bytes a second of its memory.
    memory : float
        Bytes.
    source : str
        Where the maker says so.
    bfloat16 : bool
        Whether its tensor units know bfloat16, as all do since Ampere. Without them it is computed in float32.
    """

    name: str
    words: tuple[str, ...]
    tensor: float
    plain: float
    bandwidth: float
    memory: float
    source: str
    bfloat16: bool = True


_ADA = "NVIDIA Ada GPU Architecture, V2.01, appendices"
GPUS = (
    Gpu(
        "H200 SXM",
        ("H200",),
        989e12,
        67e12,
        4800e9,
        141e9,
        "NVIDIA H200 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "H100 PCIe",
        ("H100", "PCIe"),
        756e12,
        51e12,
        2000e9,
        80e9,
        "NVIDIA H100 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "H100 NVL",
        ("H100", "NVL"),
        835e12,
        60e12,
        3900e9,
        94e9,
        "NVIDIA H100 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "H100 SXM",
        ("H100",),
        989e12,
        67e12,
        3350e9,
        80e9,
        "NVIDIA H100 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "A100 SXM4 80 GB",
        ("A100", "SXM4", "80GB"),
        312e12,
        19.5e12,
        2039e9,
        80e9,
        "NVIDIA A100 Tensor Core GPU, datasheet",
    ),
    Gpu("A100 PCIe 80 GB", ("A100", "80GB"), 312e12, 19.5e12, 1935e9, 80e9, "NVIDIA A100 Tensor Core GPU, datasheet"),
    Gpu("A100 40 GB", ("A100",), 312e12, 19.5e12, 1555e9, 40e9, "NVIDIA A100 Tensor Core GPU Architecture, table 1"),
    Gpu("L40S", ("L40S",), 362e12, 91.6e12, 864e9, 48e9, "NVIDIA L40S, datasheet (without sparsity)"),
    Gpu(
        "L4",
        ("L4",),
        121e12,
        30.3e12,
        300e9,
        24e9,
        "NVIDIA L4 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu("T4", ("T4",), 65e12, 8.1e12, 320e9, 16e9, "NVIDIA T4 Tensor Core GPU, product page", bfloat16=False),
    Gpu(
        "V100 SXM2",
        ("V100", "SXM2"),
        125e12,
        15.7e12,
        900e9,
        16e9,
        "NVIDIA V100 Tensor Core GPU, datasheet",
        bfloat16=False,
    ),
    Gpu("RTX 4090", ("RTX 4090",), 165.2e12, 82.6e12, 1008e9, 24e9, _ADA),
    Gpu("RTX 3090", ("RTX 3090",), 71e12, 35.6e12, 936e9, 24e9, "NVIDIA Ampere GA102 GPU Architecture, table 9"),
)


def gpu_machine(name: str, dtype: str = "bfloat16") -> Machine:
    """The limits of a card by the name that its driver gives, from published peaks.

    Raises
    ------
    ValueError
        If the card is not in `GPUS`.
    """
    spelled = name.replace(" GB", "GB").replace("-", " ").lower()
    # other chips, or parts of one, under the same number
    other = {"laptop", "mig", "ti", "d", "super", "nvl"} & set(re.findall(r"\w+", spelled))
    for card in GPUS:
        words = [word.lower() for word in card.words]
        if other <= set(words) and all(re.search(rf"\b{word}\b", spelled) for word in words):
            on_tensor_units = dtype == "float16" or (dtype == "bfloat16" and card.bfloat16)
            peak = card.tensor if on_tensor_units else card.plain
            return Machine(f"{card.name}, computed", peak, card.bandwidth, card.bandwidth, card.bandwidth)
    raise ValueError(
        f"no published peaks of {name!r} are known here: expected one of {', '.join(g.name for g in GPUS)}"
    )


# %%
print(
    f"computed, not measured: PaliGemma 3B, a picture of 224 px, 8 words\n{'':16}{'first token':>12}{'next token':>12}"
)
for card in GPUS:
    limits, costs = gpu_machine(card.name), inference_bill(PALIGEMMA_3B, 1, 264, 20, "bfloat16")
    first, following = (sum(map(limits.seconds, parts)) for parts in (costs.first, costs.step()))
    print(f"{card.name:16}{first * 1e3:9.1f} ms{following * 1e3:9.1f} ms   {card.source}")
    assert costs.held < card.memory  # it fits on every card of the table

# %% [markdown]
# And part by part, as for this machine above.

# %%
parts = (*costs.first, *costs.step())
print(f"computed, in milliseconds\n{'':16}{''.join(f'{part.name:>11}' for part in parts)}")
for card in GPUS:
    seconds = map(gpu_machine(card.name).seconds, parts)
    print(f"{card.name:16}{''.join(f'{1e3 * each:11.3f}' for each in seconds)}")

# %% [markdown]
# ## The roofline
#
# Now the figure that the name comes from. Along the bottom: operations for each byte. Up: operations a second. The
# sloping roof is memory, the flat one arithmetic. Each part of PaliGemma 3B is a point, with one row and with eight.
#
# In int8 a weight has a quarter of the bytes. Step and head move little else, so their points wander to the right by a
# factor of four, and under a slope, right is also up. Tower and prefill move less far: their activations stay float32.
# The points of float32 stand where the measured rates put them, those of int8 on the roof itself.

# %%
figure, axis = plt.subplots(figsize=(7.4, 4))
reach = torch.logspace(-1, 3.2, 100)
axis.loglog(reach, [min(machine.peak, machine.read * x) / 1e9 for x in reach.tolist()], color="0.5")
roof_only = replace(machine, rates=())
marks = {"vision": "s", "projector": "D", "prefill": "o", "step": "v", "step head": "^"}
labels = {
    ("step", "float32", 1): ("step and head,\none row", (10, -14)),
    ("step", "float32", 8): ("step and head, eight rows", (10, -4)),
    ("step", "int8", 1): ("the same in int8, one row", (8, -4)),
    ("step", "int8", 8): ("int8,\neight rows", (-2, -28)),
    ("vision", "float32", 1): ("tower, prefill,\none row", (-30, -28)),
    ("vision", "float32", 8): ("the same,\neight rows", (6, -28)),
}
for precision, limits, colour in (("float32", machine, PICTURE), ("int8", roof_only, ANSWER)):
    for batch, size in ((1, 5), (8, 9)):
        costs = inference_bill(PALIGEMMA_3B, batch, 264, 20, precision)
        for part in (costs.vision, costs.projector, costs.prefill, *costs.step()):
            height = part.flops / limits.seconds(part) / 1e9
            filled = colour if precision == "float32" else "white"
            axis.plot(part.flops / part.bytes, height, marks[part.name], color=colour, mfc=filled, ms=size)
            if label := labels.get((part.name, precision, batch)):
                axis.annotate(
                    label[0], (part.flops / part.bytes, height), label[1], textcoords="offset points", fontsize=8
                )
axis.text(0.12, machine.read * 0.12 / 1e9 * 1.5, "memory", rotation=32, color="0.4")
axis.text(3, machine.peak / 1e9 * 1.15, "arithmetic", color="0.4")
axis.set(xlabel="operations for each byte", ylabel="billion operations a second", xlim=(0.1, 1500))
save(figure, "21_roofline")

# %% [markdown]
# *Figure: a roof that rises with operations per byte and then is flat. Step and head are two triangles that touch, on
# the slope, far left with one row. Squares are the tower and circles prefill, under the flat part on the right; diamonds are
# the projector, which has little to do. Large marks are eight rows. Hollow ones are int8 and lie to the right of their float32
# neighbours, with eight rows even step and head on the flat part. A step of eight rows in float32 hangs well below the roof:
# the trap.*
#
# So fewer bits are worth their factor in a step, and worth nothing in prefill, unless the arithmetic itself is faster
# with whole numbers (it often is). More rows are worth their factor in a step, unless one falls into the trap.
#
# ## Where Python rules
#
# Take six blocks and make them wider and wider. The weights grow; what Python and torch do for each operation does not.

# %%
widths = (32, 64, 128, 256, 512, 1024)
family = [
    PaliGemmaConfig(
        SiglipConfig(32, 32, 1, 2, image_size=28, patch_size=14), GemmaConfig(w, 4 * w, 6, 4, 1, w // 4, 512), 500
    )
    for w in widths
]
foreseen, idle, seen, millions = [], [], [], []
for config in family:
    step = inference_bill(config, 1, 12, 16).step()
    foreseen.append(1e3 * sum(map(machine.seconds, step)))
    idle.append(1e3 * machine.overhead(step[0]))
    seen.append(1e3 * read_and_step(PaliGemma(config).eval())[2])
    millions.append(step[0].weight_bytes / 4e6)
figure, axis = plt.subplots(figsize=(6.4, 3))
axis.loglog(millions, foreseen, color=PICTURE)
axis.annotate("predicted", (millions[-1], foreseen[-1]), (6, 0), textcoords="offset points", va="center")
axis.loglog(millions, idle, color=GREY, ls="--")
axis.annotate("empty blocks", (millions[-1], idle[-1]), (6, 0), textcoords="offset points", va="center")
axis.loglog(millions, seen, "o", color=ANSWER)
axis.annotate("measured", (millions[4], seen[4]), (-6, 8), textcoords="offset points", ha="right")
axis.set(xlabel="million weights read in a step", ylabel="milliseconds", xlim=(None, millions[-1] * 6))
axis.set_yticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
axis.minorticks_off()
save(figure, "21_line")
bytes_per_block = machine.decoder_block * machine.read
print(f"a block of {bytes_per_block / 4e6:.1f} million weights takes as long to read as an empty one takes to run")

# %% [markdown]
# *Figure: time of a step over the weights it reads, both on logarithmic axes. On the left the predicted line runs near
# the dashed line of empty blocks; on the right line and points leave it and rise with the weights. The dashed line rises
# a little too, where the weights push Python's own data out of the cache. The leftmost points lie below it, and the
# prediction is too high there: the empty block that was timed has Gemma's eight heads of 256, theirs are smaller.*
#
# The border between the two is where reading a block takes as long as running an empty one. Below it better arithmetic
# changes nothing, and what helps is fewer operations: fused ones, or a compiler. A block of the 3B model has about 110
# million weights, far above it; one of the pocket model has half a million, and lies below.

# %%
blocks = {
    name: inference_bill(config, 1, config.num_image_tokens + 8, 16).prefill.weight_bytes
    / 4
    / config.text.num_hidden_layers
    for name, config in (("pocket", pocket.config), ("3B", PALIGEMMA_3B))
}
assert 4e5 < blocks["pocket"] < 6e5 and 1.0e8 < blocks["3B"] < 1.2e8

# %% [markdown]
# ## How cost grows
#
# Three ways to ask for more: larger pictures, more pictures at once, longer answers. Lines are predicted, points
# measured, on a model small enough to wait for. (`sigma-book bench --growth --size 300m --random --save growth.png` draws
# the same for a large one.)

# %%
little = PaliGemmaConfig(
    SiglipConfig(128, 512, 2, 2, image_size=224, patch_size=14), GemmaConfig(192, 512, 2, 2, 1, 64, 1000), 999
)


def answer_seconds(model: PaliGemma, batch: int, new_tokens: int) -> float:
    sizes = model.config
    ids = torch.tensor([[sizes.image_token_id] * sizes.num_image_tokens + [2] * 8] * batch)
    mask = torch.ones(batch, ids.shape[1] + new_tokens, dtype=torch.long)
    shown = torch.rand(batch, 3, sizes.vision.image_size, sizes.vision.image_size)
    started = time.perf_counter()
    caches = model.language_model.new_caches(batch, mask.shape[1])
    model.prefill(ids, model.encode_images(shown), mask[:, : ids.shape[1]], caches)
    for place in range(new_tokens - 1):
        model.decode(ids[:, -1:], mask[:, : ids.shape[1] + place + 1], caches)
    return time.perf_counter() - started


def answer_predicted(config: PaliGemmaConfig, batch: int, new_tokens: int) -> float:
    costs = inference_bill(config, batch, config.num_image_tokens + 8, new_tokens)
    steps = (new_tokens - 1) * sum(map(machine.seconds, costs.step()))
    return sum(map(machine.seconds, costs.first)) + steps


ways = {
    "side in pixels": [
        (side, replace(little, vision=replace(little.vision, image_size=side)), 1, 1) for side in (224, 448, 896)
    ],
    "pictures at once": [(batch, little, batch, 1) for batch in (1, 2, 4, 8, 16, 32)],
    "new tokens": [(tokens, little, 1, tokens) for tokens in (1, 4, 16, 64, 256)],
}
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
for axis, (label, points) in zip(axes, ways.items()):
    values = [value for value, *_ in points]
    axis.plot(values, [answer_predicted(*point[1:]) for point in points], color=PICTURE)
    axis.plot(values, [answer_seconds(PaliGemma(point[1]).eval(), *point[2:]) for point in points], "o", color=ANSWER)
    axis.set(xscale="log", yscale="log", xlabel=label, xticks=values, xticklabels=values)
    axis.minorticks_off()
axes[0].set_ylabel("seconds")
save(figure, "21_growth")

# %% [markdown]
# *Figure: three panels on logarithmic axes, predicted lines with measured points beside them. Over the side of the
# picture the line bends upward, over pictures at once it is straight, over new tokens it begins flatter and then rises.
# Measured on a busy machine: up to 1.8 times the prediction; the shapes are what agree.*
#
# Twice the side is four times the patches, and attention between patches grows with their square: the bend. Pictures
# at once cost what they cost one by one; this is arithmetic, and there is nothing to share. New tokens begin flatter,
# because reading comes first, and then each one costs the same.

# %%
flops = [
    inference_bill(config, 1, config.num_image_tokens + 8, 1).vision.flops for _, config, *_ in ways["side in pixels"]
]
assert flops[1] > 4 * flops[0] and flops[2] > 16 * flops[0]

# %% [markdown]
# ## The bill of the bill
#
# Counting takes no time to speak of, and measuring the machine a few seconds. One command holds the prediction against
# a run:
#
# `sigma-book bench --size 300m --random --bill`
#
# It prints predicted, measured and their quotient for each part. Where the quotient is far from 1, something is going
# on that this chapter does not know.
#
# ## Your turn
#
# **1.** ★ Memory brings 20 GB a second. Write `fastest(parameters, bytes_each)`: how many tokens a second can a step
# give at most, in a single row?


# %%
def fastest(parameters: float, bytes_each: float) -> float: ...


check(fastest, ((2.5e9, 4), 2.0), ((2.5e9, 1), 8.0), ((1e9, 2), 10.0))

# %% [markdown]
# **2.** ★★ Write `ridge(peak, bandwidth, bytes_each)`: from how many rows on is a large linear map bound by
# arithmetic? Count the bytes of the weights alone.


# %%
def ridge(peak: float, bandwidth: float, bytes_each: int) -> float: ...


check(ridge, ((140e9, 20e9, 4), 14.0), ((312e12, 2.0e12, 2), 156.0))

# %% [markdown]
# **3.** ★★ The cache is read too. Write `cache_share(weight_bytes, bytes_a_token, length)`: which share of what a
# step fetches is the cache, for one row?


# %%
def cache_share(weight_bytes: float, bytes_a_token: float, length: int) -> float: ...


check(cache_share, ((10e9, 36_864, 0), 0.0), ((9e6, 1000, 1000), 0.1))

# %% [markdown]
# **4.** ★★★ A second, small model guesses `k` tokens, and the large one checks them all at once, as `k + 1` rows. Under
# the roofline a check costs what one step costs. Write `speedup(k, chance, cost)`: how many times as fast as plain steps
# that is, if each guess is right with that chance, guesses after a wrong one are thrown away, the check always gives one
# token more, and a guess costs `cost` of a large step. Then look at the figure of the trap again.


# %%
def speedup(k: int, chance: float, cost: float) -> float: ...


check(speedup, ((1, 1.0, 0.0), 2.0), ((2, 0.5, 0.0), 1.75), ((4, 1.0, 0.25), 2.5))

# %% [markdown]
# Next: chapter 21b makes the bill smaller, with weights of one byte and fused maps.
