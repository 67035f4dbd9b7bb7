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
# # The same answers, sooner
#
# *How does one model answer faster, and how little of its precision does that cost?*
#
# **You build** maps laid out for the kernels, weights of eight and four bits, a head that knows how far off it is, a memory for
# pictures, a step of fixed shapes.
# **You need** chapters 10 (PaliGemma), 12 (weights) and 19 (four bits). **Exports** the module `sigma_book.fast`.

# %%
# | export
import ctypes
import hashlib
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.attention import MultiHeadAttention, attention, merge_heads, split_heads
from sigma_book.gemma import GemmaAttention, RMSNorm
from sigma_book.gqa import grouped_attention
from sigma_book.kv_cache import KVCache
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import SharedContext
from sigma_book.rope import rotate

# %%
import math
import time

import matplotlib.pyplot as plt

from sigma_book import generate, load
from sigma_book.paligemma import PaliGemmaConfig, count_parameters
from sigma_book.pocket import evaluate_pocket
from sigma_book.speed import inference_bill
from sigma_book.style import GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
_ = torch.manual_seed(0)
_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## The picture
#
# For each new token, every weight of the decoder and of the head is read once. Each is used for one product and one sum.
# A processor could do many sums in the time that one weight takes to arrive. So the time of a token is the time of
# *reading*, and a bar of bytes is a bar of seconds. Here are the bytes of PaliGemma 3B.

# %%
text = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8}
text |= {"num_key_value_heads": 1, "vocab_size": 257_216}
vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
vision |= {"image_size": 224, "patch_size": 14}
sizes = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "image_token_index": 257_152}
with torch.device("meta"):
    large = PaliGemma(PaliGemmaConfig.from_dict(sizes))
blocks = count_parameters(large.language_model.layers)
head = large.language_model.embed_tokens.weight.numel()
read = {  # bytes: the blocks, the head
    "float32": (4 * blocks, 4 * head),
    "16 bits": (2 * blocks, 2 * head),
    "8 bits": (blocks, head),
    "4 bits": (blocks * 5 / 8, head),  # 4 bits, and one for steps and offsets; the head keeps 8
}
figure, axis = plt.subplots(figsize=(6.4, 2.2))
for row, (of_blocks, of_head) in enumerate(read.values()):
    axis.barh(row, of_blocks / 1e9, color=PICTURE, height=0.6)
    axis.barh(row, of_head / 1e9, left=of_blocks / 1e9, color=PROMPT, height=0.6)
    axis.text((of_blocks + of_head) / 1e9 + 0.1, row, f"{(of_blocks + of_head) / 1e9:.1f} GB", va="center", size=9)
axis.text(3.9, 0, "18 blocks", ha="center", va="center", color="white", size=9)
axis.text(8.9, 0, "head", ha="center", va="center", size=9)
axis.set_yticks(range(4), read)
axis.invert_yaxis()
axis.set(xlabel="GB read for one token", xlim=(0, 11.6))
save(figure, "21b_bytes")
assert sum(read["float32"]) > 10e9 and sum(read["8 bits"]) < 2.6e9

# %% [markdown]
# *Figure: four bars of bytes read for one token. Float32 reads ten gigabytes, of which the head is a fifth; 16 bits half of
# that; eight bits a quarter; four bits less again, and there the head is nearly a third.*
#
# Two ways lead to a faster token: read at the full speed of the memory, or read less. We take them in this order, since
# the first changes no answer. Two more savings follow: a picture is encoded once, and on a GPU a token is one program.
#
# ## First way: the layout that the kernel wants
#
# The naive version is the one we have: `F.linear`. It takes the weight as it lies in the file, row behind row. We time it for
# 1, 8 and 264 rows: one token, one token of each of eight answers, and a whole prompt with its picture.


# %%
def milliseconds(function, *given) -> float:
    """The middle one of seven runs, after one to warm up."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        function(*given)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[1:])[3]


weight = torch.randn(8192, 2048) / 2048**0.5  # 67 MB, more than a cache holds; outputs stay near 1
plain_times = {}
for rows in (1, 8, 264):
    given = torch.randn(rows, 2048)
    plain_times[rows] = milliseconds(F.linear, given, weight)
    rate = weight.nbytes / plain_times[rows] / 1e6
    print(f"{rows:4} rows: {plain_times[rows]:6.1f} ms, {rate:5.1f} GB/s of weights")

# %% [markdown]
# Eight rows read the same weights as one. If reading were all, they would take the same time. Where they do not, you see the
# trap of chapter 21: the general kernel was not made for a few rows.
#
# A matrix product is fast when the numbers that are used together lie together: blocks that fit the registers, one behind the
# other. Big products copy the weight into such blocks each time. For a weight that never changes we can do that once, before
# the first question. oneDNN, a library inside of torch, has both the copying and the kernel.


# %%
# | export
class PackedLinear(nn.Module):
    """A frozen linear map whose weight lies in memory as oneDNN's kernels read it.

    Parameters
    ----------
    weight : torch.Tensor
        (out_features, in_features), float32 or bfloat16, on the CPU.
    bias : torch.Tensor, optional
        (out_features,).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_width, self.in_width = weight.shape
        # laid out for one row; the kernel takes any number
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight, 1), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        nothing_behind = ("none", [], "")  # no activation after the product
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.packed, self.bias, *nothing_behind)


# %%
packed = PackedLinear(weight)
for rows in (1, 8, 264):
    given = torch.randn(rows, 2048)
    torch.testing.assert_close(packed(given), F.linear(given, weight), rtol=1e-4, atol=1e-5)
    packed_time = milliseconds(packed, given)
    print(f"{rows:4} rows: {packed_time:6.1f} ms, {packed_time / plain_times[rows]:.2f} of the time before")

# %% [markdown]
# The same numbers, up to the order of sums. What it costs: the packed weight is a copy in memory of its own, no longer a
# window into the file.
#
# ## One map where there were three
#
# Queries, keys and values are three maps of the same input. Laid one below the other they are one. The numbers are the
# same; what is saved is the start of two kernels, which counts when a kernel is short. Gate and up are long, and stay apart:
# together they would give 264 rows of 32,768 numbers, 35 MB. Above 32 MB the C library asks the system for fresh memory at
# each call, and the system fills every page with zeros first.


# %%
# | export
class FusedAttention(nn.Module):
    """The decoder's attention with one map for queries, keys and values.

    Parameters
    ----------
    plain : GemmaAttention
        For its sizes.
    qkv_proj, o_proj : torch.nn.Module
    """

    def __init__(self, plain: GemmaAttention, qkv_proj: nn.Module, o_proj: nn.Module):
        super().__init__()
        self.num_heads, self.num_kv_heads = plain.num_heads, plain.num_kv_heads
        self.scale, self.softcap = plain.scale, plain.softcap
        self.qkv_proj, self.o_proj = qkv_proj, o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        heads = split_heads(self.qkv_proj(hidden_states), self.num_heads + 2 * self.num_kv_heads)  # (B, H+2K, T, Dh)
        turned = rotate(heads[:, : -self.num_kv_heads], *angles)  # queries and keys at once
        query, key = turned.split((self.num_heads, self.num_kv_heads), dim=1)
        value = heads[:, -self.num_kv_heads :]  # (B, K, T, Dh)
        if cache is not None:
            key, value = cache.update(key, value)  # (B, K, S, Dh)
        output = grouped_attention(query, key, value, mask, self.scale, self.softcap)
        return self.o_proj(merge_heads(output))  # (B, T, D)


class FusedVisionAttention(nn.Module):
    """The tower's attention with one map for queries, keys and values."""

    def __init__(self, plain: MultiHeadAttention, qkv_proj: nn.Module, out_proj: nn.Module):
        super().__init__()
        self.num_heads = plain.num_heads
        self.qkv_proj, self.out_proj = qkv_proj, out_proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = split_heads(self.qkv_proj(hidden_states), 3 * self.num_heads).chunk(3, dim=1)
        return self.out_proj(merge_heads(attention(query, key, value)))  # (B, T, D)


# %% [markdown]
# ## Second way: read less
#
# Take a row of weights. Divide each by the largest magnitude of the row, multiply by 127, and round. Now each is a whole number
# that fits a byte. By hand:

# %%
row = [0.5, -1.27, 0.1, 0.004]
step = max(abs(number) for number in row) / 127
[round(number / step) for number in row]

# %% [markdown]
# The last one became zero. No number is off by more than half a *step*, the distance between two neighbouring whole numbers
# (chapters 19 and 21 called it a scale). The step is set by the largest: one giant would take the precision of all others. So each
# row gets a step of its own.


# %%
# | export
SMALLEST = 1e-30  # the smallest step, so that a row of zeros stays one
PART_ROWS = 1024  # quantized at once, so that the float32 copies stay small


def quantize_rows(weight: torch.Tensor, levels: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix to whole numbers from -levels to levels, each row with a step of its own.

    Parameters
    ----------
    weight : torch.Tensor
        (out_features, in_features).
    levels : int
        127 for eight bits.

    Returns
    -------
    codes : torch.Tensor
        int8 (out_features, in_features).
    steps : torch.Tensor
        float32 (out_features,): row times step is about the weight, no number further off than half a step.

    Raises
    ------
    ValueError
        If a weight is not finite.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    steps = torch.empty(len(weight), device=weight.device)
    for first in range(0, len(weight), PART_ROWS):
        rows = weight[first : first + PART_ROWS].float()
        step = (rows.abs().amax(1) / levels).clamp_(min=SMALLEST)
        if not step.isfinite().all():
            raise ValueError("a weight is not finite: it cannot be quantized")
        codes[first : first + PART_ROWS] = (rows / step[:, None]).round_()
        steps[first : first + PART_ROWS] = step
    return codes, steps


# %%
codes, steps = quantize_rows(torch.tensor([row]))
assert codes.tolist() == [[50, -127, 10, 0]]
codes, steps = quantize_rows(weight)
assert ((codes * steps[:, None] - weight).abs() <= 0.5001 * steps[:, None]).all()

# %% [markdown]
# Weights in bytes, with the input left as it is, would already help a token: less to read. But a prompt of 264 rows is bound by
# arithmetic, not by reading. There the gain comes from multiplying bytes by bytes, many at a time. So the input is rounded too.
# Write $s_i$ for the step of token $i$ and $t_o$ for the step of row $o$ of the weights, $q$ and $w$ for their codes, $b$ for
# the bias:
#
# $$ y_{io} = s_i\, t_o \sum_k q_{ik}\, w_{ok} + b_o, \qquad q_{ik} = \mathrm{round}(x_{ik} / s_i), \quad
# s_i = \max_k |x_{ik}| / 127 $$
#
# The sum runs over whole numbers and is exact. Why a step for each *token*? The ready-made way is one step for the whole
# batch. Then what stands in the next row changes your answer:


# %%
def per_batch(rows: torch.Tensor) -> torch.Tensor:
    step = rows.abs().max() / 127
    return (rows / step).round() * step


quiet_row, loud_row = torch.randn(1, 64), 50 * torch.randn(1, 64)
alone, together = per_batch(quiet_row), per_batch(torch.cat([quiet_row, loud_row]))[:1]
assert not torch.equal(alone, together)
assert (together == 0).float().mean() > 3 * (alone == 0).float().mean()

# %% [markdown]
# Beside a loud neighbour most of the quiet row became zero. With a step for each token no row knows of the others.
#
# Torch brings two libraries that multiply bytes, FBGEMM and oneDNN. The map below can use either. Both want inputs without
# a sign: 128 is added to each code, and $128 \sum_k w_{ok}$ taken off again.


# %%
# | export
PIECE_ROWS = 16_384  # packed at once: FBGEMM packs column by column, and taller ones outgrow a cache


def int8_libraries() -> list[str]:
    """The libraries of this torch that multiply bytes, the one that reads faster first: "fbgemm", "onednn".

    Raises
    ------
    RuntimeError
        If there is none.
    """
    # torch calls the tensors that FBGEMM packs deprecated: a later one may come without them
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch, "qint8")
    found = ["fbgemm"] * fbgemm + ["onednn"] * torch.backends.mkldnn.is_available()
    if not found:
        raise RuntimeError("this torch has no kernels for bytes, which int8 and int4 need: load without quantize")
    return found


def pack_for_fbgemm(codes: torch.Tensor, steps: torch.Tensor) -> list[torch.ScriptObject]:
    """Codes and steps, as `quantize_rows` gives them, in FBGEMM's own layout: a byte a weight, at most 16,384 rows each."""
    pieces = zip(codes.split(PIECE_ROWS), steps.double().split(PIECE_ROWS), strict=True)
    with _FBGEMM:
        return [_pack_piece(*piece) for piece in pieces]


@contextmanager
def _fbgemm_engine() -> Iterator[None]:
    """Within it, torch's engine is FBGEMM, whose layout `linear_prepack` makes."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated.*")
        torch.backends.quantized.engine = "fbgemm"
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


_FBGEMM = SharedContext(_fbgemm_engine)


def _pack_piece(codes: torch.Tensor, steps: torch.Tensor) -> torch.ScriptObject:
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    weight = torch._empty_per_channel_affine_quantized(
        codes.shape, scales=steps, zero_points=zeros, axis=0, dtype=torch.qint8
    )
    weight.set_(codes.untyped_storage(), codes.storage_offset(), codes.shape, codes.stride())  # no copy
    return torch.ops.quantized.linear_prepack(weight, None)


def input_steps(rows: torch.Tensor) -> torch.Tensor:
    """The step that each row (N, in) of what goes into a map is rounded with: (N, 1)."""
    return rows.abs().amax(1, keepdim=True).div_(127).clamp_(min=SMALLEST)


class Int8Linear(nn.Module):
    """A frozen linear map of eight bits a weight, which also rounds what goes in to eight bits, token by token.

    Parameters
    ----------
    codes, steps : torch.Tensor
        As `quantize_rows` gives them, with `int8_levels()`.
    bias : torch.Tensor, optional
        (out_features,), float32; added unrounded.
    library : str, optional
        One of `int8_libraries()`, the first unless you say. Their results are equal to the bit.

    Raises
    ------
    RuntimeError
        If this build of torch has no kernel for bytes.

    Notes
    -----
    Products and sums of the codes are whole numbers and exact; only the two roundings lose something.
    """

    def __init__(
        self, codes: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None = None, library: str | None = None
    ):
        super().__init__()
        self.out_width, self.in_width = codes.shape
        self.library = library or int8_libraries()[0]
        if self.library == "fbgemm":
            self.packed = pack_for_fbgemm(codes, steps)
        else:
            self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(codes, None), persistent=False)
            self.register_buffer("steps", steps, persistent=False)
            self.register_buffer("zeros", torch.zeros(len(codes), dtype=torch.int64), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, self.in_width).float()  # (N, in)
        step = input_steps(rows)  # (N, 1)
        scaled = rows / step  # from -127 to 127; the kernels round it
        output = self._multiply(scaled).mul_(step)  # (N, out)
        if self.bias is not None:
            output.add_(self.bias)
        return output.view(*hidden_states.shape[:-1], self.out_width).to(hidden_states.dtype)

    def _multiply(self, scaled: torch.Tensor) -> torch.Tensor:
        if self.library == "fbgemm":
            multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
            pieces = [multiply(scaled, 1.0, 128, packed) for packed in self.packed]  # step 1.0, and 128 stands for 0
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        codes = scaled.add_(128).round_().to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, self.packed, self.steps, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )


# %% [markdown]
# ## A trap: sixteen bits in between
#
# Older processors multiply two pairs of bytes and add them in 16 bits before they go on in 32. Can that overflow?

# %%
largest_16 = 2**15 - 1
assert largest_16 < 2 * 255 * 127  # yes: two large products do not fit
assert largest_16 > 2 * 255 * 63  # with weights of seven bits they always do

# %% [markdown]
# It does not stop and does not warn: the sum sticks at 32,767 and the answer is wrong. So we ask the kernel itself, once, with
# the worst codes there are.


# %%
# | export
@cache
def int8_levels() -> int:
    """How far codes of weights may go on this CPU: to 127, or to 63 where its kernel adds pairs in 16 bits.

    Raises
    ------
    RuntimeError
        If this build of torch has no kernel for bytes.
    """
    largest = Int8Linear(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16))
    # 255 is the largest code of an input; two products of it and 127 are more than 16 bits hold
    exact = largest(torch.full((1, 64), 127.0))
    return 127 if exact.eq(127 * 127 * 64).all() else 63


# %%
levels = int8_levels()
print(f"on this machine codes of weights go to {levels}")
assert levels in (63, 127)

# %% [markdown]
# A row now gives the same in company as alone, to the bit:

# %%
small = Int8Linear(*quantize_rows(weight[:512], levels))
company = torch.cat([torch.randn(1, 2048), 50 * torch.randn(7, 2048)])
assert torch.equal(small(company)[:1], small(company[:1]))
exact = F.linear(company, weight[:512])
print(f"error of eight bits: {(small(company) - exact).norm() / exact.norm():.2%}")

# %% [markdown]
# Which of the two libraries? The answers do not depend on it, since whole numbers give the same sum in any order. So we
# measure, as we did for float32.

# %%
codes, steps = quantize_rows(weight, levels)
maps = {library: Int8Linear(codes, steps, library=library) for library in int8_libraries()}
for rows in (1, 8, 264):
    given = torch.randn(rows, 2048)
    first, *others = (linear(given) for linear in maps.values())
    assert all(torch.equal(first, other) for other in others)
    times = {library: milliseconds(linear, given) for library, linear in maps.items()}
    print(f"{rows:4} rows:" + "".join(f"  {library} {time:5.1f} ms" for library, time in times.items()))

# %% [markdown]
# On the machines that we tried FBGEMM was much the faster one with one row, most of all on a processor without units for bytes.
# With a whole prompt they were near each other. An answer has one prompt and many tokens: we take FBGEMM where torch has it.
#
# ## Four bits
#
# Sixteen values are few, so a step serves only 32 neighbours, and an offset comes with it: the smallest of the 32 becomes
# code 0, the largest 15. A step and an offset of 16 bits each, for 32 weights, are one bit more for each weight. The kernel is
# torch's own; it unpacks the codes and multiplies in bfloat16. For one token that is less to read. For a prompt it is slow,
# since it multiplies in bfloat16 and not in bytes.


# %%
# | export
GROUP = 32  # weights that share a step and an offset


def quantize_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix to codes from 0 to 15, with a step and an offset for each 32 numbers of a row.

    Parameters
    ----------
    weight : torch.Tensor
        (out_features, in_features); the width a multiple of 32.

    Returns
    -------
    codes : torch.Tensor
        uint8 (out_features, in_features); a weight is about (code - 8) * step + offset.
    steps : torch.Tensor
        bfloat16 (in_features / 32, out_features, 2): step and offset, as the kernel wants them.

    Raises
    ------
    ValueError
        If a weight is not finite.
    """
    codes, steps = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), []
    for first in range(0, len(weight), PART_ROWS):
        groups = weight[first : first + PART_ROWS].float().unflatten(1, (-1, GROUP))  # (out, in / 32, 32)
        low, high = groups.aminmax(dim=-1)
        if not (high - low).isfinite().all():
            raise ValueError("a weight is not finite: it cannot be quantized")
        step = ((high - low) / 15).clamp_(min=SMALLEST).bfloat16()
        offset = (low + 8 * step.float()).bfloat16()
        found = ((groups - offset.float()[..., None]) / step.float()[..., None]).round_().add_(8).clamp_(0, 15)
        codes[first : first + PART_ROWS] = found.flatten(1)
        steps.append(torch.stack((step, offset), -1))  # (out, in / 32, 2)
    return codes, torch.cat(steps).transpose(0, 1).contiguous()


class Int4Linear(nn.Module):
    """A frozen linear map of five bits a weight, steps counted; computed in bfloat16.

    Parameters
    ----------
    codes, steps : torch.Tensor
        As `quantize_groups` gives them; `out_features` must be a multiple of 16.
    """

    def __init__(self, codes: torch.Tensor, steps: torch.Tensor):
        super().__init__()
        self.out_width, self.in_width = codes.shape
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("steps", steps, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, self.in_width).bfloat16()  # (N, in)
        output = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.steps)  # (N, out)
        return output.view(*hidden_states.shape[:-1], self.out_width).to(hidden_states.dtype)


# %%
rough = Int4Linear(*quantize_groups(weight[:512]))
for name, module in (("eight", small), ("four", rough)):
    error = (module(company).float() - exact).norm() / exact.norm()
    print(f"error of {name} bits: {error:.1%}")
assert error > 0.05  # of four, the last one

# %% [markdown]
# ## A head that knows how far off it is
#
# In float32 the head is a fifth of what a token reads: two gigabytes, to find *one* of 257,216 tokens, the one with the largest
# score. In eight bits it is half a gigabyte. But then each score is off by a little, and the wrong token may win by a hair. We
# can have both, small and right, if we know how far off a score can be.
#
# Take a row $w$ of the head, and $\hat w$, what eight bits made of it. The score of hidden state $x$ is the dot product
# $x \cdot w$. Rounding moves it by $x \cdot (w - \hat w)$, and no dot product is larger than the product of the two lengths
# (the inequality of Cauchy and Schwarz):
#
# $$ |x \cdot w - x \cdot \hat w| \;\le\; \|x\| \, \|w - \hat w\| $$
#
# The second length does not depend on $x$. It is computed once, when the model is loaded: one number for each row. So each
# rounded score comes with a *reach*, and the true score lies within it.
#
# By hand: three tokens have the rounded scores 5.0, 4.8 and 3.0, each with a reach of 0.3. We look up the first row in full
# precision, and its true score is 4.9. Who may still beat that? The second may have up to 5.1, so its row is looked up too. The
# third has 3.3 at most, and needs no look-up.

# %%
rounded, reach, to_beat = torch.tensor([5.0, 4.8, 3.0]), 0.3, 4.9
assert (rounded + reach >= to_beat).tolist() == [True, True, False]

# %% [markdown]
# One thing is left. The kernel rounds $x$ too. So we hand it two rows: $x$ as rounded, and what the rounding left over, which is
# rounded in its turn. Two rows read the weights once, so they cost hardly more than one.
#
# What is still lost of $x$? Its first step is $s = \max|x| / 127$, no more than $\|x\| / 127$. It leaves at most $s/2$ of each
# number, so the second step is at most $s/254$, and that leaves at most $s/508$. A vector of $D$ such numbers is no longer
# than $\sqrt D \, s / 508$: what is lost is no longer than $\|x\| \sqrt D \, / \, (127 \cdot 508)$.


# %%
# | export
FLOAT_SUM = 1e-5  # what the order of float32 sums may change, as a share of both lengths
LARGE_HEAD = 2**25  # bytes; a smaller head fits into caches, and there is no reading to save


def wants_shortlist(vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a head is to be a `ShortlistHead`: large, in float32, on a CPU whose torch multiplies bytes."""
    if device.type != "cpu" or dtype != torch.float32 or vocab_size * hidden_size * dtype.itemsize < LARGE_HEAD:
        return False
    try:
        return int8_levels() > 0
    except RuntimeError:  # no kernels for bytes
        return False


def reach_of_rows(weight: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """How far off a score from rounded rows may be, for a hidden state of length 1: (out_features,).

    Parameters
    ----------
    weight : torch.Tensor
        (out_features, in_features), float32.
    codes, steps : torch.Tensor
        What `quantize_rows` made of it.
    """
    of_input = weight.shape[1] ** 0.5 / (127 * 508) + FLOAT_SUM
    reach = torch.empty(len(weight))
    for first in range(0, len(weight), PART_ROWS):
        part = slice(first, first + PART_ROWS)
        lost = (codes[part] * steps[part, None]).sub_(weight[part]).norm(dim=1)
        reach[part] = lost + of_input * (lost + weight[part].norm(dim=1))
    return reach


class ShortlistHead(nn.Module):
    """Scores of the next token from eight bits a weight, and exact ones of every token that could be the best.

    Parameters
    ----------
    codes, steps : torch.Tensor
        As `quantize_rows` gives them for the head, with `int8_levels()`.
    reach : torch.Tensor
        (V,), as `reach_of_rows` gives it.
    table : torch.Tensor
        (V, D), the head as it was, to look up rows in; a window into a file will do.

    Notes
    -----
    The best token is that of the exact scores, always. Of the others those within reach of it are exact too, the rest is
    off by the rounding of the weights.
    """

    def __init__(self, codes: torch.Tensor, steps: torch.Tensor, reach: torch.Tensor, table: torch.Tensor):
        super().__init__()
        self.rounded = Int8Linear(codes, steps)
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def rough(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, D) to rounded scores (B, V), and how far off each may be (B, V)."""
        step = input_steps(hidden_states)  # those of the kernel, so that it finds `coarse` whole
        coarse = (hidden_states / step).round_().mul_(step)
        of_coarse, of_rest = self.rounded(torch.cat([coarse, hidden_states - coarse])).chunk(2)
        return of_coarse + of_rest, hidden_states.norm(dim=1, keepdim=True) * self.reach

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, D) to scores (B, V)."""
        scores, reach = self.rough(hidden_states)
        to_beat = self._exact(hidden_states, scores.argmax(1))  # (B,)
        rows, tokens = (reach.add_(scores) >= to_beat[:, None]).nonzero(as_tuple=True)
        if len(tokens) > len(self.table) // 16:  # rows looked up one by one take longer than the whole table
            return self.all_exact(hidden_states)
        scores[rows, tokens] = self._exact(hidden_states[rows], tokens)
        return scores

    def _exact(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """For each hidden state (N, D) the score of one token: (N,)."""
        parts = zip(hidden_states.split(PART_ROWS), tokens.split(PART_ROWS), strict=True)
        return torch.cat([(states * self.table[which]).sum(1) for states, which in parts])

    def all_exact(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) to scores (..., V), all of them exact: this reads the whole table."""
        rows = hidden_states.flatten(0, -2).T  # (D, N); this way round a few rows take a third of the time
        parts = self.table.split(PIECE_ROWS if self.table.dtype != rows.dtype else len(self.table))
        scores = torch.cat([part.to(rows.dtype) @ rows for part in parts])  # (V, N)
        return scores.T.contiguous().unflatten(0, hidden_states.shape[:-1])


# %%
codes, steps = quantize_rows(weight, levels)
short_head = ShortlistHead(codes, steps, reach_of_rows(weight, codes, steps), weight)
hidden = torch.randn(1, 2048)
exact, found = F.linear(hidden, weight)[0], short_head(hidden)[0]
assert found.argmax() == exact.argmax()

rounded, reach = (of_row[0] for of_row in short_head.rough(hidden))
assert ((rounded - exact).abs() < reach).all()
to_beat = exact[rounded.argmax()]
listed = (rounded + reach >= to_beat).sum().item()
print(
    f"{listed} of {len(weight):,} rows looked up; largest error {((rounded - exact).abs() / reach).max():.2f} of the reach"
)

order = rounded.argsort(descending=True)[:40]
figure, axis = plt.subplots(figsize=(6.4, 2.6))
axis.errorbar(range(40), rounded[order], yerr=reach[order], fmt="none", ecolor=GREY, elinewidth=1)
axis.plot(range(40), rounded[order], "_", color=GREY, ms=5)
axis.plot(range(40), exact[order], "o", color=PICTURE, ms=3)
axis.axhline(to_beat, color=PROMPT, lw=1)
axis.annotate("to beat", (39, to_beat), xytext=(0, 4), textcoords="offset points", color=PROMPT, ha="right")
axis.set(xlabel="tokens, best rounded score first", ylabel="score")
save(figure, "21b_shortlist")

# %% [markdown]
# *Figure: the 40 tokens with the best rounded scores. Grey: the rounded score and its reach; blue: the true score, well within
# it. Only tokens whose reach crosses the line may be the best.*
#
# The bound is careful: it allows for the worst direction that the error could have, and the errors we see are a tenth of it. So
# the list has some more tokens than it needs. That costs little, and in return nothing is left to chance: the best token is the
# true one.
#
# The pocket model has no use for it: 1,856 rows of 192 numbers lie in a cache, where they are read soon enough.
#
# What is not exact: the scores of tokens far from the best. So this head is used where the best token is all that is asked
# for. Sampling, beams, and grammars (chapters 13, 14) look at other scores too, and a log-probability is measured against the
# sum of them all. Whoever asks for one of these gets the product with the whole table.
#
# ## A memory for pictures
#
# The tower sees no prompt. The same picture gives the same features, whatever is asked about it. So features are kept under
# a fingerprint of the pixels, up to a number of bytes. The second question skips the tower. Features that are not finite are
# not kept: a failure that passes would come back with each question about that picture.


# %%
# | export
class PictureCache:
    """Features of the last pictures, found again by what the pictures show.

    Parameters
    ----------
    most_bytes : int
        The features kept together take no more; the ones unused for longest go first.
    """

    def __init__(self, most_bytes: int = 64 * 2**20):
        self.most_bytes = most_bytes
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes_held(self) -> int:
        return sum(features.nbytes for features in list(self._kept.values()))

    def clear(self) -> None:
        """Forget all pictures."""
        with self._lock:
            self._kept.clear()

    def encode(self, encoder: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (N, P, D) of pictures (N, 3, S, S); only pictures not seen lately, each once, go to the encoder."""
        contents = [picture.flatten().view(torch.uint8).numpy() for picture in pixel_values.cpu()]
        keys = [hashlib.blake2b(content, digest_size=32).digest() for content in contents]
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
        fresh: dict[bytes, int] = {}  # key to the first row that shows it
        for row, key in enumerate(keys):
            if key not in found:
                fresh.setdefault(key, row)
        if fresh:
            encoded = encoder(pixel_values[list(fresh.values())])
            found |= {key: features.clone() for key, features in zip(fresh, encoded, strict=True)}
        with self._lock:
            for key in keys:
                if key in fresh and not found[key].isfinite().all():
                    continue  # a failure may pass: what it left is not kept
                self._kept[key] = found[key]
                self._kept.move_to_end(key)
            while self._kept and self.bytes_held > self.most_bytes:
                self._kept.popitem(last=False)
        return torch.stack([found[key] for key in keys])


# %%
shown = []


def encoder(pictures: torch.Tensor) -> torch.Tensor:
    """In place of the tower: the pixels themselves. It notes how many pictures it was shown."""
    shown.append(len(pictures))
    return pictures.flatten(1)[:, None]


store = PictureCache()
pixels = torch.randn(2, 3, 8, 8)
for batch in (pixels, pixels[[1, 0, 1]]):
    store.encode(encoder, batch)
assert shown == [2]  # asked once, for two pictures; the second batch was there already

# %% [markdown]
# ## Why not the keys and values too?
#
# The tower is the smaller part of reading a prompt. The decoder reads 256 picture tokens as well, and their keys and values
# lie in the cache. Other models keep them for the next prompt that begins alike. May we?
#
# Follow one picture token through the decoder. In block 1 its key depends on its own embedding and position: no prompt in
# it. But then it attends, and in PaliGemma a picture token sees the *whole* prefix, the prompt behind it included. What leaves
# block 1 holds some of the prompt, and with it each key from block 2 on. With a causal mask it would not: nothing behind a
# token could reach it. So what the prefix gains by looking both ways, it pays for here: another prompt, another cache.
#
# We measure it on the pocket model: two prompts of equal length behind one picture, and how much the keys of picture tokens
# differ, block by block; with our mask, and with a causal one.

# %%
pocket = load()
scene = draw_scene(make_scene(3))
places = pocket.config.num_image_tokens


def picture_keys(prompt: str, causal: bool) -> list[torch.Tensor]:
    batch = pocket.processor.prepare([scene], [prompt])
    caches = pocket.language_model.new_caches(1, batch.input_ids.shape[1])
    kinds = torch.full_like(batch.input_ids, int(causal))  # all suffix: each sees only what came before
    pocket.hidden_states(batch.input_ids, pocket.encode_images(batch.pixel_values), batch.attention_mask, kinds, caches)
    return [held.key[:, :, :places] for held in caches]


change = {}
for causal in (False, True):
    one, other = (
        picture_keys("how many circles are there?", causal),
        picture_keys("how many squares are there?", causal),
    )
    change[causal] = [((a - b).norm() / a.norm()).item() for a, b in zip(one, other, strict=True)]
assert change[False][0] < 1e-6 and min(change[False][1:]) > 1e-3
assert max(change[True]) < 1e-6

figure, axis = plt.subplots(figsize=(6.4, 2.4))
for causal, colour, name in ((False, PICTURE, "both ways, as PaliGemma reads"), (True, GREY, "causal")):
    axis.plot(range(1, len(change[causal]) + 1), change[causal], color=colour, marker="o", ms=4)
    axis.annotate(name, (3, change[causal][2]), xytext=(-8, 9), textcoords="offset points", color=colour, ha="right")
axis.set(xlabel="block", ylabel="change of picture keys", xticks=range(1, len(change[False]) + 1))
axis.set_ylim(bottom=-0.005)
save(figure, "21b_prefix")

# %% [markdown]
# *Figure: how much the keys of picture tokens change when one word of the prompt does: the length of the difference, as a share
# of the length of the keys. Read causally they do not change in any block. Read both ways they are equal in block 1 and differ
# from block 2 on.*
#
# ## The whole, prepared
#
# The embedding is used twice: as a table, row by row, and as the head, all of it for each token. The head is quantized, in
# float32 as a short list. The table stays as it is in the file, and stays *in* the file: only rows that are looked up come into
# memory. The norm, several passes over its numbers in our own code (chapter 21), becomes one kernel of torch's, with $1 + w$
# added up beforehand.


# %%
# | export
class ExactEmbedding(nn.Module):
    """Look-ups in a table that stays as the file has it: only the rows asked for are read, then cast."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.dtype = dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.weight).to(self.dtype)


class FusedNorm(nn.Module):
    """RMSNorm by torch's own kernel, with 1 + weight added up beforehand."""

    def __init__(self, plain: RMSNorm):
        super().__init__()
        self.eps = plain.eps
        self.register_buffer("factor", 1.0 + plain.weight.detach().float(), persistent=False)
        self.register_buffer("weight", plain.weight.detach(), persistent=False)  # its dtype is that of the model

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = F.rms_norm(hidden_states.float(), self.factor.shape, self.factor, self.eps)
        return wide.to(hidden_states.dtype)


class FastPaliGemma(PaliGemma):
    """A PaliGemma made ready for answering, and for nothing else: it cannot learn, move or be saved.

    Parameters
    ----------
    plain : PaliGemma
        Whose blocks hold prepared maps already.
    head : torch.nn.Module
        Maps hidden states to scores.

    Attributes
    ----------
    picture_cache : PictureCache
        Used by `encode_images`.
    """

    def __init__(self, plain: PaliGemma, head: nn.Module):
        nn.Module.__init__(self)
        self.config = plain.config
        self.vision_tower = plain.vision_tower
        self.multi_modal_projector = plain.multi_modal_projector
        self.language_model = plain.language_model
        self.head = head
        self.picture_cache = PictureCache()
        self.compiled_step = None
        super().train(False)
        self.requires_grad_(False)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if type(pixel_values) is not torch.Tensor or pixel_values.is_meta:  # fake tensors have no content
            return super().encode_images(pixel_values)
        return self.picture_cache.encode(super().encode_images, pixel_values)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        head = self.head.all_exact if isinstance(self.head, ShortlistHead) else self.head
        return self._softcapped(head(hidden_states))

    def next_token_logits(self, hidden_states: torch.Tensor, best_only: bool = False) -> torch.Tensor:
        return self._softcapped(self.head(hidden_states[:, -1])) if best_only else self.logits(hidden_states[:, -1])

    def _softcapped(self, logits: torch.Tensor) -> torch.Tensor:
        softcap = self.config.text.final_logit_softcapping
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def decode(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        caches: list[KVCache],
        best_only: bool = False,
    ) -> torch.Tensor:
        if self.compiled_step is None:
            return super().decode(token_ids, attention_mask, caches, best_only)
        return self.compiled_step(*step_inputs(self, token_ids, attention_mask, caches))

    def train(self, mode: bool = True) -> "FastPaliGemma":
        if mode:
            raise RuntimeError(
                "this model is packed for answering and cannot learn: load it without quantize and compile"
            )
        return super().train(False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "FastPaliGemma":
        raise RuntimeError("a packed model stays where it is: load it with the device and dtype that you want")


# %% [markdown]
# A packed model cannot learn and says so. Since its weights stay, it may keep features of pictures without fear that they go
# stale: that is why `picture_cache` is here and not on every model. It holds 67 MB at most.
#
# ## Filling it, tensor by tensor
#
# `load_model` hands over one tensor at a time (chapter 12). Each is quantized at once and let go; when the last part of a
# fused map is there, the map is packed. The full model is never in memory as a whole. Packing is work for one core and takes
# longer than all the rest, so it runs beside it, on as many cores as torch has threads, up to four.


# %%
# | export
def map_groups(model: PaliGemma) -> dict[str, list[str]]:
    """The maps of a prepared model, each with the plain maps that it is made of, one below the other."""
    groups = {}
    for index in range(len(model.language_model.layers)):
        block = f"language_model.layers.{index}"
        groups[f"{block}.self_attn.qkv_proj"] = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
        groups[f"{block}.self_attn.o_proj"] = [f"{block}.self_attn.o_proj"]
        groups |= {f"{block}.mlp.{part}_proj": [f"{block}.mlp.{part}_proj"] for part in ("gate", "up", "down")}
    for index in range(len(model.vision_tower.encoder.layers)):
        block = f"vision_tower.encoder.layers.{index}"
        groups[f"{block}.self_attn.qkv_proj"] = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
        groups |= {f"{block}.{part}": [f"{block}.{part}"] for part in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2")}
    return groups


class Preparation:
    """Takes the tensors of a model one by one, as `load_model` hands them to its `place`, and makes it ready to answer.

    Parameters
    ----------
    quantize : str, optional
        "int8": tower, decoder and head in eight bits. "int4": the decoder in four, the rest in eight. None: all in
        the dtype they come in, with a `ShortlistHead` if `wants_shortlist`.
    reopen : callable, optional
        Gives a tensor, by our name, once more as the file has it, memory-mapped: rows of the embedding are looked up
        in that, and what was read to make the head is let go.
    """

    def __init__(self, quantize: str | None = None, reopen: Callable[[str], torch.Tensor] | None = None):
        self.quantize, self.reopen = quantize, reopen
        self.maps: dict[str, nn.Module] = {}  # without biases; filled by `finish`
        self._cores = min(4, torch.get_num_threads())
        self._packers = ThreadPoolExecutor(self._cores)  # each map is packed by one core
        self._packing: dict[str, Future] = {}
        self._parts: dict[str, tuple[torch.Tensor, ...]] = {}  # weights that wait for others
        self._group: dict[str, str] = {}  # plain map to prepared map
        self._groups: dict[str, list[str]] = {}

    def __call__(self, model: PaliGemma, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take one tensor; what comes back is what stays in the model as it was."""
        if not self._groups:
            self._groups = map_groups(model)
            self._group = {part: group for group, parts in self._groups.items() for part in parts}
        owner, _, kind = name.rpartition(".")
        is_table = owner == "language_model.embed_tokens"
        if owner == "lm_head" or (is_table and model.config.text.tie_word_embeddings):
            self._start_head(name, tensor)
        if owner == "lm_head":
            model.lm_head = nn.Identity()
            return {}
        if is_table and self.reopen is not None:
            model.language_model.embed_tokens = ExactEmbedding(self.reopen(name), tensor.dtype)
            return {}
        if owner not in self._group or kind != "weight":
            return {name: tensor}
        model.get_submodule(owner).weight = None  # so that `load_model` waits for none
        group = self._group[owner]
        plain = [model.get_submodule(part) for part in self._groups[group]]
        fits = tensor.shape[1] % GROUP == 0 and sum(linear.out_features for linear in plain) % 16 == 0
        in_four = self.quantize == "int4" and owner.startswith("language_model") and fits
        self._parts[owner] = self._shrink(owner, tensor, in_four)
        if all(part in self._parts for part in self._groups[group]):
            self._start(group, self._build, [self._parts.pop(part) for part in self._groups[group]], in_four)
        return {}

    def _start(self, group: str, make: Callable[..., nn.Module], *given) -> None:
        """Make a map in the background; not too many at a time, for what they are made of waits in memory."""
        under_way = [future for future in self._packing.values() if not future.done()]
        if len(under_way) > self._cores:
            wait(under_way, return_when=FIRST_COMPLETED)
        self._packing[group] = self._packers.submit(make, *given)

    def _start_head(self, name: str, weight: torch.Tensor) -> None:
        owner = name.rpartition(".")[0]
        if self.quantize is not None or not wants_shortlist(*weight.shape, weight.dtype, weight.device):
            self._start("head", self._build, [self._shrink(owner, weight)])
            return
        codes, steps = _named(owner, quantize_rows, weight, int8_levels())
        table = weight if self.reopen is None else self.reopen(name)
        self._start("head", ShortlistHead, codes, steps, reach_of_rows(weight, codes, steps), table)

    def _shrink(self, owner: str, weight: torch.Tensor, in_four: bool = False) -> tuple[torch.Tensor, ...]:
        """The weight in fewer bits, at once: the full one is freed before the next is read."""
        if self.quantize is None or weight.device.type != "cpu":
            return (weight,)
        if in_four:
            return _named(owner, quantize_groups, weight)
        return _named(owner, quantize_rows, weight, int8_levels())

    def _build(self, parts: list[tuple[torch.Tensor, ...]], in_four: bool = False) -> nn.Module:
        first, *steps = (list(kind) for kind in zip(*parts))
        whole = torch.cat(first) if len(first) > 1 else first[0]
        parts.clear()
        del first  # both hold what `whole` was made of
        if not steps:
            return dense_map(whole, self.quantize and ("int4" if in_four else "int8"))
        if whole.dtype == torch.int8:
            return Int8Linear(whole, torch.cat(steps[0]))
        return Int4Linear(whole, torch.cat(steps[0], dim=1))

    def finish(self, model: PaliGemma) -> FastPaliGemma:
        """Put the prepared blocks in the places of the plain ones, once all tensors were handed over."""
        self.maps = {group: future.result() for group, future in self._packing.items()}
        self._packers.shutdown()
        for group, parts in self._groups.items():
            biases = [model.get_submodule(part).bias for part in parts]
            if biases[0] is not None:
                _set_bias(self.maps[group], torch.cat(biases))
        for index, block in enumerate(model.language_model.layers):
            maps = self._of(f"language_model.layers.{index}")
            block.self_attn = FusedAttention(block.self_attn, maps["qkv_proj"], maps["o_proj"])
            for part in ("gate_proj", "up_proj", "down_proj"):
                setattr(block.mlp, part, maps[part])
        for index, block in enumerate(model.vision_tower.encoder.layers):
            maps = self._of(f"vision_tower.encoder.layers.{index}")
            block.self_attn = FusedVisionAttention(block.self_attn, maps["qkv_proj"], maps["out_proj"])
            block.mlp.fc1, block.mlp.fc2 = maps["fc1"], maps["fc2"]
        for name, module in list(model.language_model.named_modules()):
            if isinstance(module, RMSNorm):
                model.language_model.set_submodule(name, FusedNorm(module))
        _give_back_freed_memory()
        return FastPaliGemma(model, self.maps.pop("head"))

    def _of(self, block: str) -> dict[str, nn.Module]:
        names = [name for name in self.maps if name.startswith(f"{block}.")]
        return {name.rpartition(".")[2]: self.maps.pop(name) for name in names}


# %%
# | export
def _named(owner: str, quantize: Callable, *given) -> tuple[torch.Tensor, ...]:
    """What `quantize` gives; its complaint names the map."""
    try:
        return quantize(*given)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error


def _give_back_freed_memory() -> None:
    """The C library keeps freed blocks for later, and after so many short-lived copies they are a good part of the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc has it
    if trim is not None:
        trim(0)


def _set_bias(linear: nn.Module, bias: torch.Tensor) -> None:
    if isinstance(linear, nn.Linear):
        linear.bias = nn.Parameter(bias, requires_grad=False)
    else:
        linear.bias = bias.float() if isinstance(linear, Int8Linear) else bias


# %% [markdown]
# Maps that are not rounded, and those on a GPU. There eight and four bits are left to torchao, a library of torch's makers.
# It has several layouts for four bits. We take the one whose kernel comes with torch itself: it wants weights in bfloat16 and
# a card of compute capability 8.0 or more.


# %%
# | export
def dense_map(weight: torch.Tensor, quantize: str | None = None) -> nn.Module:
    """A map whose weight keeps its dtype: packed where oneDNN has kernels for it, else a plain one.

    On other devices than the CPU, "int8" and "int4" leave the weight to torchao.

    Raises
    ------
    RuntimeError
        As `torchao_map`, where torchao is wanted.
    """
    packable = torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # from AVX-512 on
    )
    if weight.device.type == "cpu" and packable and type(weight) in (torch.Tensor, nn.Parameter):
        return PackedLinear(weight.detach())
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear if quantize is None else torchao_map(linear, quantize)


def torchao_map(linear: nn.Linear, quantize: str) -> nn.Linear:
    """The same map with a weight that torchao keeps in eight or four bits, for accelerators; its input is not rounded.

    Four bits want a weight in bfloat16 and a GPU of compute capability 8.0 or more, as torchao's source says; here they
    were tried with shapes alone.

    Raises
    ------
    RuntimeError
        If torchao is not installed, or cannot do it with this weight on this device.
    """
    if linear.weight.dtype == torch.float16:  # codes go up to 127, and are multiplied before they are scaled
        raise RuntimeError(
            f"quantize={quantize!r} on this device may overflow in float16: load with dtype='bfloat16', or without quantize"
        )
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise RuntimeError(f"quantize={quantize!r} on this device needs torchao: pip install torchao") from error
    whole = nn.Sequential(linear)  # torchao replaces weights inside of something
    as_it_is = {"set_inductor_config": False}  # settings of torch belong to the whole process
    try:
        if quantize == "int4":  # its default layout needs a third package
            how = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", **as_it_is)
        else:
            how = Int8WeightOnlyConfig(**as_it_is)
        quantize_(whole, how)
    except (ImportError, AssertionError, ValueError) as error:
        weight, why = linear.weight, " ".join(str(error).split()).rstrip(".")
        raise RuntimeError(
            f"torchao cannot keep a {str(weight.dtype).removeprefix('torch.')} weight on {weight.device.type} in {quantize} "
            f"({why}): {'take int8, or ' * (quantize == 'int4')}load without quantize"
        ) from error
    return whole[0]


# %%
# | export
@torch.no_grad()
def prepare(model: PaliGemma, quantize: str | None = None) -> FastPaliGemma:
    """A loaded model made ready to answer. It is used up: each of its matrices is freed when its copy is made.

    Parameters
    ----------
    model : PaliGemma
        A plain one; an adapter must be merged.
    quantize : str, optional
        As `Preparation` takes it.

    Raises
    ------
    ValueError
        If the model has an adapter or quantized weights, or a weight is not finite.
    """
    modules = dict(model.named_modules())
    if any(not isinstance(modules.get(part), nn.Linear) for parts in map_groups(model).values() for part in parts):
        raise ValueError("this model has an adapter or quantized maps: merge the adapter, or load it plainly, first")
    ready = Preparation(quantize)
    tensors = model.state_dict()
    for name in list(tensors):
        ready(model, name, tensors.pop(name))
    return ready.finish(model)


# %% [markdown]
# ## Proof
#
# Packed and fused, the pocket model gives the same scores, up to the order of sums. `tests/test_fast.py` holds its tokens
# against those of `transformers`.

# %%
ready = prepare(load())
batch = pocket.processor.prepare([draw_scene(make_scene(seed)) for seed in range(4)], ["caption en"] * 4)
given = (batch.input_ids, batch.pixel_values, batch.attention_mask, torch.zeros_like(batch.input_ids))
torch.testing.assert_close(ready(*given), pocket(*given), rtol=1e-3, atol=1e-3)

# %% [markdown]
# And the time of a token? Too small a model spends it on starting kernels (chapter 21), so we take a decoder of two blocks, a
# quarter as wide as PaliGemma's in its MLP, with random weights.

# %%
decoder = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8}
decoder |= {"num_key_value_heads": 1, "vocab_size": 8192, "tie_word_embeddings": False}
tiny_tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
tiny_tower |= {"image_size": 28, "patch_size": 14}
config = PaliGemmaConfig.from_dict(
    sizes | {"text_config": decoder, "vision_config": tiny_tower, "image_token_index": 8191}
)


def token_time(model: PaliGemma) -> float:
    """Milliseconds of a decoding step, four places behind the prompt."""
    ids = torch.tensor([[8191] * config.num_image_tokens + [5] * 8])
    held = model.language_model.new_caches(1, 64)
    model.prefill(ids, model.encode_images(torch.zeros(1, 3, 28, 28)), torch.ones_like(ids), held)
    seen = torch.ones(1, ids.shape[1], dtype=torch.long)

    def step() -> None:
        nonlocal seen
        seen = F.pad(seen, (0, 1), value=1)
        model.decode(torch.tensor([[5]]), seen, held)

    return milliseconds(step)


for name, make in {
    "plain": PaliGemma.eval,
    "packed": prepare,
    "8 bits": lambda model: prepare(model, "int8"),
    "4 bits": lambda model: prepare(model, "int4"),
}.items():
    torch.manual_seed(0)
    print(f"{name:7}: {token_time(make(PaliGemma(config))):5.1f} ms for a token")

# %% [markdown]
# Four bits are fewer bytes than eight, and may take longer all the same: their kernel makes a bfloat16 of each weight before it
# multiplies. A processor that has no units for bfloat16 loses more time with that than it saves in reading.
#
# `sigma-book bench --size 3b --random --quantize int8 --against transformers` takes the whole model and asks the library that
# everyone uses too. README has the table.
#
# ## A decoding step of fixed shapes
#
# A GPU has another trouble: a token is hundreds of small kernels, and starting each one takes longer than its work.
# `torch.compile` melts small ones together and records the rest, to be replayed as one. It needs the same shapes at each step.
# Our cache hands out what is filled, which grows. So the step below takes the whole buffers, and the mask hides the empty slots.


# %%
# | export
class FixedSlots:
    """What a layer of a static step takes for its cache: whole buffers, and the slot that the new token gets."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, slot: torch.Tensor):
        self.key, self.value, self.slot = key, value, slot

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column, and give the buffers with all their slots, empty ones too: the mask hides those."""
        self.key.index_copy_(2, self.slot, key)
        self.value.index_copy_(2, self.slot, value)
        return self.key, self.value


def step_inputs(
    model: PaliGemma, token_ids: torch.Tensor, attention_mask: torch.Tensor, caches: list[KVCache]
) -> tuple[torch.Tensor, torch.Tensor, dict, dict, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What `static_step` takes, with shapes that are the same at each step; counts the new column in the caches.

    Raises
    ------
    ValueError
        If there is no room left.
    """
    slots, masks, rows = {}, {}, len(token_ids)
    if caches[0].length >= caches[0].max_length:
        raise ValueError(f"the cache has room for {caches[0].max_length} tokens, one more was written")
    for index, held in enumerate(caches):
        window = model.config.text.window(index)
        if window not in masks:
            columns = held.columns(held.length + 1)  # (C,)
            seen = torch.zeros(rows, 1, 1, held.slots, dtype=torch.bool, device=token_ids.device)
            seen[:, 0, 0, : len(columns)] = attention_mask[:, columns].bool()
            masks[window] = seen
            slots[window] = torch.tensor([held.length % held.slots], device=token_ids.device)
        held.length += 1
    positions = attention_mask.long().sum(-1, keepdim=True)  # (B, 1)
    return token_ids, positions, slots, masks, [(held.key, held.value) for held in caches]


def static_step(
    model: PaliGemma,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: dict[int | None, torch.Tensor],
    masks: dict[int | None, torch.Tensor],
    buffers: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """One decoding step in which no shape depends on how much was said already: scores (B, V).

    Parameters
    ----------
    model : PaliGemma
    token_ids, positions : torch.Tensor
        (B, 1).
    slots, masks : dict
        For each window: the slot that the token is written to, (1,), and which slots it sees, (B, 1, 1, S).
    buffers : list
        Keys and values (B, K, S, Dh) of each layer, written in place.
    """
    caches = [
        FixedSlots(key, value, slots[model.config.text.window(index)]) for index, (key, value) in enumerate(buffers)
    ]
    hidden_states = model.language_model(model.embed(token_ids), positions, masks, caches)
    return model.logits(hidden_states[:, -1])


# %%
caches = [ready.language_model.new_caches(4, given[0].shape[1] + 3) for _ in range(2)]
for held in caches:
    first = ready.prefill(given[0], ready.encode_images(given[1]), given[2], held)
token, mask = first.argmax(-1, keepdim=True), F.pad(given[2], (0, 1), value=1)
grown = ready.decode(token, mask, caches[0])
fixed = static_step(ready, *step_inputs(ready, token, mask, caches[1]))
torch.testing.assert_close(fixed, grown, rtol=1e-4, atol=1e-4)


# %%
# | export
def compile_step(model: FastPaliGemma, mode: str | None = None) -> None:
    """Let `torch.compile` make one program of a whole decoding step; it is made at the first token, which takes long.

    Parameters
    ----------
    model : FastPaliGemma
    mode : str, optional
        torch's: "reduce-overhead" records the kernels of a GPU once and replays them; "max-autotune" also looks for
        better ones.
    """

    def step(*inputs) -> torch.Tensor:
        return static_step(model, *inputs)

    compiled = torch.compile(step, mode=mode)

    def run(*inputs) -> torch.Tensor:
        for tensor in (tensor for pair in inputs[-1] for tensor in pair):
            torch._dynamo.mark_static_address(tensor, guard=False)  # written in place, and never elsewhere
        return compiled(*inputs)

    model.compiled_step = run


# %% [markdown]
# `load(..., compile=True)` does all of this chapter that changes no answer: it lays out and fuses the maps, gives a large head
# its short list, and on a GPU it compiles the step too. On a CPU it does not: a large model spends its time reading weights,
# which no compiler shortens. For the pocket model, compiling took 9.5 s on two cores, and an answer then 0.14 s in place of
# 0.10: it never pays (2026-11-30, a processor without units for bytes or bfloat16; a slow test of `tests/test_fast.py`).
# Exercise 2 counts when it would.
#
# ## A look inside: what is lost
#
# The pocket model, asked every kind of question about scenes it has never seen, with each kind of weights.

# %%
kinds = {"float32": pocket, "8 bits": load(quantize="int8"), "4 bits": load(quantize="int4")}
scores = {name: evaluate_pocket(model, model.processor, scenes=16) for name, model in kinds.items()}
print(f"{'share right':12}" + "".join(f"{name:>10}" for name in kinds))
for task in scores["float32"]:
    print(f"{task:12}" + "".join(f"{scores[name][task]['right']:10.0%}" for name in kinds))
mean = {name: sum(score["right"] for score in of.values()) / len(of) for name, of in scores.items()}
assert mean["8 bits"] > mean["float32"] - 0.05

# %% [markdown]
# Few scenes make coarse shares. With 500 (2026-11-30), in per cent, NF4 of chapter 19 beside them:
#
# | | float32 | int8 | int4 | NF4 |
# |---|---|---|---|---|
# | captions | 96.0 | 96.0 | 95.8 | 95.4 |
# | colour | 100.0 | 100.0 | 100.0 | 100.0 |
# | counting | 98.4 | 98.2 | 98.2 | 98.6 |
# | yes or no | 99.2 | 99.6 | 99.2 | 99.4 |
# | left of | 99.4 | 99.4 | 99.4 | 100.0 |
# | all boxes | 96.6 | 96.0 | 95.8 | 96.8 |
#
# Nothing is lost that 500 scenes would show: one in 500 is 0.2. The scores behind the answers tell more: how far they are off,
# and how often the best token stays the best.

# %%
true_scores = pocket(*given)
lost = {}
for name, model in kinds.items():
    found = model(*given)
    agree = (found.argmax(-1) == true_scores.argmax(-1)).float().mean().item()
    lost[name] = ((found - true_scores).norm() / true_scores.norm()).item()
    print(f"{name:8}: scores off by {lost[name]:.2%}, same best token at {agree:.1%} of the places")
assert lost["8 bits"] < 0.5 * lost["4 bits"]

# %% [markdown]
# Eight bits move the scores less than half as far as four do. A score has to move past its neighbour before an answer changes,
# so small errors mostly change nothing.
#
# Where neighbours are near, they do change something. At the full size with random weights the best token leads by an eighth
# of the scores' spread only. There eight bits (seven for a weight, see above) move the scores by 17 % and keep 57 % of the
# best tokens, four bits 51 % and 13 % (`tests/test_full_size.py`, 2026-11-30, the same processor).
#
# And sixteen bits? Few digits are lost in them, but float16 has an end, 65,504 (chapter 16). What flows from block to block
# reaches it first: each block adds to it, and only the copy that goes into a block is normalized. The pocket model stays far
# below. We let its second block add 3,000 times as much, and ask again.

# %%
halves, largest = load(dtype="float16"), []
for block in halves.language_model.layers:
    block.register_forward_hook(lambda module, given, flow: largest.append(flow.abs().max().item()))
sentence = generate(draw_scene(make_scene(5)), "caption en", model=halves)
assert sentence == generate(draw_scene(make_scene(5)), "caption en", model=pocket)
print(f"at most {max(largest):.0f} flows from block to block")
with torch.no_grad():
    halves.language_model.layers[1].mlp.down_proj.weight *= 3000
largest.clear()
try:
    generate(draw_scene(make_scene(5)), "caption en", model=halves)
except RuntimeError as error:
    print(largest, error, sep="\n")
assert [math.isfinite(value) for value in largest] == [True, False, False, False]
generate(draw_scene(make_scene(5)), "caption en", model=halves.float(), max_new_tokens=3)  # float32 knows no such end

# %% [markdown]
# ## The bill
#
# Bytes held for answering with the 3B model. The table of look-ups is not counted: it stays in the file.

# %%
tower = count_parameters(large.vision_tower)
held = {  # bytes: decoder and tower, head
    "float32": (4 * (blocks + tower), 4 * head),
    "short list": (4 * (blocks + tower), head),
    "8 bits": (blocks + tower, head),
    "4 bits": (blocks * 5 / 8 + tower, head),
}
read["short list"] = (4 * blocks, head)
for name, parts in held.items():
    print(f"{name:10}: {sum(parts) / 1e9:5.2f} GB held, {sum(read[name]) / 1e9:5.2f} GB read for a token")
assert sum(held["short list"]) < 0.87 * sum(held["float32"]) and sum(read["short list"]) < 0.85 * sum(read["float32"])
assert sum(held["8 bits"]) < 0.26 * sum(held["float32"]) and sum(held["4 bits"]) < 0.8 * sum(held["8 bits"])

# %% [markdown]
# And on a GPU in 16 bits, with nothing quantized? Chapter 21's bill counts weights, the cache of a picture, a prompt and 100 new
# tokens, and the largest activations at once.

# %%
peak = inference_bill(large.config, batch=1, prompt_length=256 + 32, new_tokens=100, precision="bfloat16").held
print(f"{peak / 1e9:.2f} GB")
assert 5.8e9 < peak < 6.6e9

# %% [markdown]
# ## Your turn
#
# **1.** ★ `head_share(blocks, head, bits)`: the decoder's blocks have so many weights, kept in `bits` bits each; the head's are
# kept in eight. Which share of the bytes read for a token is the head's?


# %%
def head_share(blocks: int, head: int, bits: float) -> float: ...


check(head_share, ((3_000, 1_000, 8), 0.25), ((2_000, 1_000, 4), 0.5), ((1_000, 1_000, 24), 0.25))

# %% [markdown]
# **2.** ★ `break_even(compiling, before, after)`: from how many tokens on does compiling pay? In seconds, and seconds a token; a
# whole number. If a token is no faster, it never pays: give -1.


# %%
def break_even(compiling: float, before: float, after: float) -> int: ...


check(break_even, ((64.0, 0.5, 0.25), 256), ((10.0, 0.5, 0.5), -1), ((1.0, 3.0, 1.5), 1), ((10.0, 0.5, 0.2), 34))

# %% [markdown]
# **3.** ★★ `safe_levels(bits)`: the largest code of a weight so that two products with 255 fit a signed sum of that many bits.
# (We took 63 above, the largest code of seven bits.)


# %%
def safe_levels(bits: int) -> int: ...


check(safe_levels, ((16,), 64), ((17,), 128), ((12,), 4))

# %% [markdown]
# **4.** ★★★ `prefix_reuse(prompts)`: prompts are lists of token ids behind one picture. With a causal model, how many prompt
# tokens need not be read again, when each prompt may reuse its longest common beginning with any earlier one?


# %%
def prefix_reuse(prompts: list[list[int]]) -> int: ...


check(
    prefix_reuse,
    (([[1, 2, 3], [1, 2, 4], [1, 2, 4, 5]],), 5),
    (([[1, 2, 3], [9], [1, 2, 4]],), 2),
    (([[1, 2, 3], [4, 2, 3], [1, 5, 3]],), 1),
)

# %% [markdown]
# Next: chapter 21c answers many at once.
