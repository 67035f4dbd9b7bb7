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
# # Four bits a number: QLoRA
#
# *How can a frozen model be stored in four bits and still teach?*
#
# **You build** NF4, the sixteen levels of a normal curve, and linear maps stored in it.
# **You need** chapters 12 (weights) and 18 (LoRA).
# **Exports** the module `sigma_book.qlora`.

# %%
# | export
import logging
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.lora import DECODER_LINEARS, LoraLinear, find_linears

# %%
import copy
import time
from statistics import NormalDist

import matplotlib.pyplot as plt

from sigma_book import generate, load
from sigma_book.lora import LoraConfig, add_lora
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig, count_parameters
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.training import recompute_activations
from sigma_book.world import caption, draw_scene, make_scene

use_style()
torch.set_num_threads(1)  # such small products gain little from a second one, and lose much on a busy machine
_ = torch.manual_seed(0)

# %% [markdown]
# ## The picture
#
# With LoRA (chapter 18) the large matrices are frozen. Gradients and averages are gone for them; what is left is their
# storage: 16 bits a number. But who never changes a number need not keep it exactly.
#
# Four bits have sixteen values. Weights lie like a bell around zero, many small, few large. Where should the sixteen values
# stand?

# %%
curve = NormalDist()
line = torch.linspace(-1, 1, 300)
top = curve.inv_cdf(0.9677083)  # the outermost level, before it is called 1
bell = torch.tensor([curve.pdf(x * top) for x in line.tolist()])
levels = [
    -1.0,
    -0.696,
    -0.525,
    -0.395,
    -0.284,
    -0.185,
    -0.091,
    0.0,
    0.080,
    0.161,
    0.246,
    0.338,
    0.441,
    0.563,
    0.723,
    1.0,
]
figure, axis = plt.subplots(figsize=(7, 2.6))
axis.fill_between(line, bell, color=GREY, alpha=0.3, lw=0)
for place in range(16):
    even = -1 + 2 * place / 15
    axis.plot([even, even], [-0.09, -0.02], color=PROMPT, lw=2)
    axis.plot([levels[place]] * 2, [-0.19, -0.12], color=PICTURE, lw=2)
axis.text(1.07, -0.055, "even steps", va="center", color="0.2", size=9)
axis.text(1.07, -0.155, "NF4", va="center", color=PICTURE, size=9)
axis.text(0, 0.2, "the bell that NF4 supposes", ha="center", size=9, color="0.3")
axis.set(xlim=(-1.2, 1.4), ylim=(-0.22, 0.42), yticks=[], xlabel="weight, divided by the largest of its block")
axis.spines["left"].set_visible(False)
save(figure, "19_bell")

# %% [markdown]
# *Figure: a grey bell over a line from -1 to 1, where it is cut off: no weight is larger than the largest. Below it two rows of
# sixteen strokes: the first evenly spaced, the second close together under the middle of the bell and far apart under its
# ends.*
#
# ## By hand: sixteen even steps
#
# The naive way: find the largest magnitude, divide by it, and take the nearest of sixteen evenly spaced values.


# %%
def nearest(number: float, levels: list[float]) -> int:
    return min(range(len(levels)), key=lambda place: abs(levels[place] - number))


def quantize_naive(block: list[float], levels: list[float]) -> tuple[list[int], float]:
    largest = max(abs(number) for number in block)
    return [nearest(number / largest, levels) for number in block], largest


even = [-1 + 2 * place / 15 for place in range(16)]
codes, largest = quantize_naive([0.1, -0.4, 0.05, 0.8], even)
codes, [round(even[code] * largest, 2) for code in codes]

# %% [markdown]
# A code takes four bits. The largest must be kept as well; it is shared by a block of 64.
#
# ## Sixteen values for a bell
#
# If each value is to be used equally often, they must stand at the *quantiles* of the bell: the places that cut it into
# parts of equal area. Two wishes bend the plain recipe: zero shall be a value, for zeros occur, and both ends shall be -1
# and 1, for the largest of a block occurs in every block. So the negative half has eight values with zero as its last, and
# the positive half has nine with zero as its first.
#
# The outermost quantile cannot be at the area 1, which lies at infinity. Half a part before it: between 1/30, the half part
# of fifteen, and 1/32, that of sixteen, the authors take the middle.


# %%
def normal_levels() -> torch.Tensor:
    outermost = 0.9677083  # 1 - (1/30 + 1/32) / 2, in the digits that the first program had
    positive = [curve.inv_cdf(area) for area in torch.linspace(outermost, 0.5, 9)[:-1].tolist()]
    negative = [-curve.inv_cdf(area) for area in torch.linspace(outermost, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]))
    return levels / levels.max()


assert round(1 - (1 / 30 + 1 / 32) / 2, 7) == 0.9677083
normal_levels()

# %% [markdown]
# Since files are made with them, we write the sixteen down, and let a cell hold them against the recipe, bit by bit.
# (`tests/parity/test_qlora.py` holds them against those of `bitsandbytes`, the library that made NF4 known.)

# %%
# | export
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own
PART = 2**22  # weights read at once, a multiple of BLOCK
TINY = 1e-38  # the least divisor

# %%
assert torch.equal(torch.tensor(NF4_LEVELS), normal_levels())

# %% [markdown]
# ## The formula
#
# For a block of 64 weights $w_i$:
#
# $$ s = \max_i |w_i|, \qquad c_i = \arg\min_k \left| \ell_k - \tfrac{w_i}{s} \right|, \qquad \hat{w}_i = s\, \ell_{c_i} $$
#
# $s$ is the block's scale, $c_i$ a code from 0 to 15, and $\ell_k$ the sixteen levels.
#
# ## All blocks at once
#
# The borders between levels are their middles, and `bucketize` finds between which borders a number lies. Two codes go
# into a byte.


# %%
# | export
def quantize_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers to 4-bit codes: each block of 64 is divided by its largest, each quotient becomes its nearest level.

    Parameters
    ----------
    values : torch.Tensor
        Any shape; read row by row. The last block may be short.

    Returns
    -------
    codes : torch.Tensor
        uint8 (ceil(N / 2),), two codes in a byte, the first in its upper half; a last half byte holds the code of zero.
    largest : torch.Tensor
        float32 (ceil(N / 64),), the largest magnitude of each block.

    Raises
    ------
    ValueError
        If a value is not finite.

    References
    ----------
    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
    """
    levels = torch.tensor(NF4_LEVELS, device=values.device)
    borders = (levels[:-1] + levels[1:]) / 2  # (15,)
    codes, largest = [], []
    for part in values.flatten().split(PART):  # so that the float32 copies stay small
        part = part.float()
        blocks = F.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)  # (N / 64, 64)
        most = blocks.abs().amax(1)
        if not most.isfinite().all():
            raise ValueError("a weight is not finite: it cannot be quantized")
        scaled = blocks * (1 / most.clamp(min=TINY))[:, None]  # a block of zeros stays one
        if len(part) % BLOCK:  # bitsandbytes divides in a short block, and multiplies in a full one
            most[-1:].clamp_(min=TINY)
            scaled[-1] = blocks[-1] / most[-1]
        index = torch.bucketize(scaled.clamp(-1, 1), borders).to(torch.uint8).flatten()[: len(part) + len(part) % 2]
        codes.append(index[::2] << 4 | index[1::2])
        largest.append(most)
    return torch.cat(codes), torch.cat(largest)


# %% [markdown]
# And back: a byte stands for a pair of levels, so a table of 256 pairs undoes two codes with one look.


# %%
# | export
def dequantize_blocks(codes: torch.Tensor, largest: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Codes and scales of `quantize_blocks` back to float32 numbers of a shape."""
    levels = torch.tensor(NF4_LEVELS, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): what each byte stands for
    values = pairs[codes.int()].flatten()  # (N,), and one more if N is odd
    values = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) * largest[:, None]
    return values.flatten()[: math.prod(shape)].view(shape)


# %% [markdown]
# ## Proof
#
# It equals the loops. Then the question of the picture: who is nearer to the weights, the even steps or NF4?

# %%
weights = torch.randn(40, 64)
codes, scales = quantize_blocks(weights)
back = dequantize_blocks(codes, scales, (40, 64))
for row, line in enumerate(weights.tolist()):
    by_hand, largest = quantize_naive(line, list(NF4_LEVELS))
    expected = torch.tensor([NF4_LEVELS[code] * largest for code in by_hand])
    torch.testing.assert_close(back[row], expected, rtol=1e-6, atol=0)
assert len(codes) == 40 * 64 // 2 and len(scales) == 40


# %%
def error(levels: torch.Tensor, weights: torch.Tensor, block: int) -> float:
    """Root mean square of the difference, as a share of the weights' own."""
    blocks = weights.view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    code = torch.bucketize(blocks / scale, (levels[:-1] + levels[1:]) / 2)
    return ((levels[code] * scale - blocks).norm() / blocks.norm()).item()


weights = torch.randn(2**20)
blocks = [16, 32, 64, 128, 256, 512, 1024, 4096]
errors = {
    name: [error(levels, weights, block) for block in blocks]
    for name, levels in (("even steps", torch.tensor(even)), ("NF4", torch.tensor(NF4_LEVELS)))
}
at_64 = {name: values[blocks.index(64)] for name, values in errors.items()}
assert at_64["NF4"] < 0.93 * at_64["even steps"]
assert errors["NF4"][-1] < 0.8 * errors["even steps"][-1] and errors["NF4"][0] > errors["even steps"][0]
at_64

# %%
figure, axis = plt.subplots(figsize=(6, 2.7))
for (name, values), colour, mark in zip(errors.items(), (PROMPT, PICTURE), "so"):
    axis.semilogx(blocks, values, color=colour, marker=mark, ms=4, base=2)
    axis.annotate(name, (blocks[-1], values[-1]), xytext=(6, 0), textcoords="offset points", va="center", color="0.2")
axis.axvline(64, color="0.8", lw=1, zorder=0)
axis.annotate("64, as in QLoRA", (64, 0.02), xytext=(4, 0), textcoords="offset points", size=8, color="0.4")
axis.set(xlabel="weights that share a scale", ylabel="error, share of the weights", ylim=(0, 0.2), xlim=(14, 12_000))
axis.set_xticks(blocks, blocks)
axis.minorticks_off()
save(figure, "19_error")

# %% [markdown]
# *Figure: two rising lines over the size of a block. The line of even steps rises faster and ends far above that of NF4; at 16 they meet; a
# thin upright line marks blocks of 64.*
#
# Larger blocks are worse for both: the largest of many weights is larger, and the others crowd around zero. There NF4
# gains most, a quarter of the error; at 64 it is a twelfth, and at 16 nothing. And zero is one of its values, which the
# even steps have not. Smaller blocks need more scales: at 64 the scales, in 32 bits, cost half a bit a weight.
#
# ## The scales, quantized too
#
# Half a bit is a ninth of the whole. So the scales are quantized themselves, this time with eight bits, 256 values. They
# are all positive and of similar size: first their mean is taken off, then blocks of 256 share a scale of their own.
#
# The 256 levels are an older invention: like numbers with a decimal point that moves. Seven decades, and the larger the
# decade, the finer it is cut.


# %%
# | export
@cache
def dynamic_levels() -> torch.Tensor:
    """The 256 levels of bitsandbytes' 8-bit "dynamic" numbers, sorted, float32.

    Seven decades, 1e-7 to 1; each finer than the one below it: 1, 2, 4, ... 64 levels of either sign; then 0 and 1.

    References
    ----------
    Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning", section 2.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


@cache
def _nearest_level() -> torch.Tensor:
    """For each of 65,536 steps from -1 to 1, the number of the nearest level, uint8."""
    levels = dynamic_levels()
    steps = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.bucketize(steps, 0.5 * (levels[:-1] + levels[1:])).to(torch.uint8)


# %%
# | export
def quantize_scales(largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scales of blocks, quantized themselves: less their mean, in blocks of 256, to 8-bit dynamic levels.

    Parameters
    ----------
    largest : torch.Tensor
        float32 (S,).

    Returns
    -------
    codes : torch.Tensor
        uint8 (S,).
    scales : torch.Tensor
        float32 (ceil(S / 256),).
    mean : torch.Tensor
        float32, a scalar.
    """
    mean = largest.mean()
    blocks = F.pad(largest - mean, (0, -len(largest) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scales = blocks.abs().amax(1)
    factor = torch.where(scales > 0, 1 / scales, 0)
    # rounded to 65,536 steps first, as the CPU build of bitsandbytes does
    steps = ((blocks * factor[:, None]).clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5
    codes = _nearest_level().to(largest.device)[steps.int()]
    codes = torch.where(scales[:, None] > 0, codes, 0)  # a block of zeros has the scale 0 and any code
    return codes.flatten()[: len(largest)], scales, mean


def dequantize_scales(codes: torch.Tensor, scales: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What `quantize_scales` gave back to float32 (S,)."""
    levels = dynamic_levels().to(codes.device)
    spread = scales.repeat_interleave(SCALE_BLOCK)[: len(codes)]
    return levels[codes.int()] * spread + mean


# %%
bits = 4 + 8 / 64 + 32 / (64 * 256)
assert abs(bits - 4.127) < 0.001
levels = dynamic_levels()
assert len(levels) == 256 and len(levels.unique()) == 256
_, scales = quantize_blocks(weights)
again = dequantize_scales(*quantize_scales(scales))
spread = ((again - scales).norm() / scales.norm()).item()
assert spread < 0.01
print(f"{bits:.3f} bits a weight; the scales are off by {spread:.2%}")

# %% [markdown]
# There is a price. A block with one very large weight has a very large scale, and its 255 neighbours must share the scale of
# scales with it. A hundred times too large does no harm yet: the levels have decades to spare. But blow up one weight of
# 16,384 ten thousand times, and all the others suffer:

# %%
outlier = weights[: BLOCK * SCALE_BLOCK].clone()
outlier[0] = 10_000.0
codes, scales = quantize_blocks(outlier)
others = outlier[BLOCK:]
off = {}
for name, kept in (("exact scales", scales), ("quantized scales", dequantize_scales(*quantize_scales(scales)))):
    back = dequantize_blocks(codes, kept, outlier.shape)[BLOCK:]
    off[name] = ((back - others).norm() / others.norm()).item()
assert off["exact scales"] < 0.1 and off["quantized scales"] > 0.3
off

# %% [markdown]
# Taught weights are not like that, as we see below. And a map for which it mattered would say so in its error.
#
# One detail is for those who compare bytes. The program for CPUs in `bitsandbytes` rounds each scale to one of 65,536 steps
# before it looks for a level. We do the same, so our bytes are its bytes.
#
# ## A linear map that is stored so
#
# To multiply, the weight is made anew from its codes, used, and thrown away. On the way back it is needed once more:
# the gradient of the input is the gradient of the output times the weight. If torch kept the weight in between, each layer's
# full matrix would wait in memory for its turn, and nothing would be saved. So we say how to go back ourselves: make it
# a second time.
#
# The codes get no gradient. A step of four bits cannot be taken a little. All that flows is the gradient *through* the map,
# to the adapters before it. That is the answer to this chapter's question: a frozen map teaches others by passing their
# gradients on, and for that it need not change, and need not be exact.


# %%
# | export
class NF4Linear(nn.Module):
    """A frozen linear map of 4.127 bits a weight, for whose input gradients flow.

    Parameters
    ----------
    weight : torch.Tensor
        (out_features, in_features), float32, bfloat16, float16 or float64: the dtype it computes in.
    bias : torch.nn.Parameter, optional
        Is kept as it is.
    """

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        codes, largest = quantize_blocks(weight.detach())
        self.register_buffer("codes", codes)
        for name, tensor in zip(("scale_codes", "scales", "mean_scale"), quantize_scales(largest), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The weights as the codes say them, in the dtype to compute in; made anew each time."""
        shape, dtype = (self.out_features, self.in_features), self.like.dtype
        largest = dequantize_scales(self.scale_codes, self.scales, self.mean_scale)
        # the CPU kernel of bitsandbytes 0.50 takes wrong scales where a row does not hold whole blocks
        if dtype == torch.float64 or self.in_features % BLOCK or _bitsandbytes() is None:
            return dequantize_blocks(self.codes, largest, shape).to(dtype)
        return _bitsandbytes().dequantize_4bit(self.codes, largest, BLOCK, "nf4", shape, dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result = _FrozenLinear.apply(hidden_states, self)
        return result if self.bias is None else result + self.bias

    def _apply(self, fn: Callable, recurse: bool = True) -> "NF4Linear":
        exact = self.scales, self.mean_scale
        super()._apply(fn, recurse)
        self.scales, self.mean_scale = (tensor.to(self.codes.device) for tensor in exact)  # moved, never cast
        return self


class _FrozenLinear(torch.autograd.Function):
    """Multiply by a quantized weight, and by its transpose on the way back, without keeping it in between."""

    @staticmethod
    def forward(context, hidden_states: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        context.layer = layer
        return F.linear(hidden_states, layer.weight)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ context.layer.weight.to(gradient.dtype), None


@cache
def _bitsandbytes():
    """The kernels of bitsandbytes where it is installed: the same numbers, several times faster."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of kernels that are not used here
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    return torch.ops.bitsandbytes


# %%
layer = NF4Linear(torch.randn(32, 128) / 128**0.5)
inputs = torch.randn(5, 128, requires_grad=True)
layer(inputs).square().sum().backward()

plain = inputs.detach().requires_grad_()
(plain @ layer.weight.T).square().sum().backward()  # the reference: torch's own way back
torch.testing.assert_close(inputs.grad, plain.grad, rtol=1e-5, atol=1e-6)
assert not list(layer.parameters())

# %% [markdown]
# Where `bitsandbytes` is installed, its program makes the weights from the codes. It gives the same numbers, many times
# faster, and so there is no switch. We do not use its product, which for inputs of 16 bits rounds the scales first on some
# CPUs: an answer would depend on what is installed.


# %%
def seconds(work: Callable) -> float:
    """The shortest of five."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


layer = NF4Linear(torch.randn(2048, 2048))


def reference() -> torch.Tensor:
    scales = dequantize_scales(layer.scale_codes, layer.scales, layer.mean_scale)
    return dequantize_blocks(layer.codes, scales, (2048, 2048))


assert torch.equal(layer.weight, reference())
if _bitsandbytes() is not None:
    print(f"bitsandbytes makes the weights {seconds(reference) / seconds(lambda: layer.weight):.0f} times faster")

# %% [markdown]
# ## What is quantized, and what never
#
# - **The decoder's seven maps of each block**: most of the model, and frozen under an adapter.
# - **Never the embedding**: it is the output head as well. An error there is an error in every word.
# - **Never the norms**: they are tiny, and each multiplies all that its attention or MLP reads.
# - **Not the tower, by default**: a seventh of the model, and what it blurs nobody can see sharp again.
# - **Not the projector**: less than a thousandth, and every patch passes through it.


# %%
# | export
@torch.no_grad()
def quantize_nf4(model: nn.Module, targets: str | tuple[str, ...] = DECODER_LINEARS) -> None:
    """Store the target maps in NF4, in place, and freeze the model. Each full weight is freed before the next is read.

    Parameters
    ----------
    model : torch.nn.Module
    targets : str or tuple of str
        As in `LoraConfig`. By default the decoder's seven maps a block; embedding and head, norms, the projector and
        the tower stay as they are.

    Raises
    ------
    ValueError
        If a target matches nothing, the model has an adapter or NF4 weights already, or a weight is not finite.
    """
    if any(isinstance(module, LoraLinear | NF4Linear) for module in model.modules()):
        raise ValueError("this model has an adapter or NF4 weights already: quantize first, once, then add an adapter")
    model.requires_grad_(False)
    for name in find_linears(model, targets):
        model.set_submodule(name, _quantized(name, model.get_submodule(name)))


def _quantized(name: str, linear: nn.Module) -> NF4Linear:
    try:
        return NF4Linear(linear.weight, linear.bias).train(linear.training)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def nf4_on_arrival() -> Callable[[nn.Module, str, torch.Tensor], dict[str, torch.Tensor]]:
    """For `load_model`: quantizes each of the decoder's maps as it comes from the file, so the whole is never there."""
    chosen: set[str] = set()

    def place(model: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not chosen:
            chosen.update(f"{owner}.weight" for owner in find_linears(model, DECODER_LINEARS))
        if name not in chosen:
            return {name: tensor}
        owner = name.removesuffix(".weight")
        linear = model.get_submodule(owner)
        linear.weight = nn.Parameter(tensor, requires_grad=False)
        layer = _quantized(owner, linear)
        model.set_submodule(owner, layer)
        return {f"{owner}.{key}": value for key, value in layer.state_dict().items() if key != "bias"}

    return place


# %%
model = load()
full = copy.deepcopy(model)
quantize_nf4(model)
scenes = [draw_scene(make_scene(seed)) for seed in range(71_000_000, 71_000_024)]
truth = [caption(make_scene(seed)) for seed in range(71_000_000, 71_000_024)]
right = {
    name: sum(said == true for said, true in zip(generate(scenes, "caption en", model=one), truth))
    for name, one in (("16 bits", full), ("NF4", model))
}
assert right["NF4"] >= right["16 bits"] - 6
print(f"captions right, of {len(truth)}: {right}")

# %% [markdown]
# A folder can be quantized while it is read: `load(folder, quantize="nf4")`. Each matrix comes from the file, is turned into
# codes, and is gone before the next one comes. The whole in 16 bits is never in memory.
#
# ## A step of QLoRA
#
# Rank 64 and alpha 16, the adapters in float32, the base in four bits. And one more saving, *activation checkpointing*: of
# each block only the input is kept, and the block is computed again on the way back, as chapter 16 does it.

# %%
add_lora(model, LoraConfig())
model.train()
recompute_activations(model.language_model.layers)

pictures = [draw_scene(make_scene(seed)) for seed in range(4)]
answers = [caption(make_scene(seed)) for seed in range(4)]
batch = model.processor.prepare(pictures, ["caption en"] * 4, answers)
frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
optimizer = torch.optim.AdamW(learning.values(), lr=1e-3)
losses = []
for _ in range(8):
    given = (batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids, batch.labels)
    loss = model.loss(*given)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

assert len(learning) == 2 * 7 * 4 and all("lora_" in name for name in learning)
assert all((parameter.grad is not None) == (name in learning) for name, parameter in model.named_parameters())
assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.state_dict().items() if name in frozen)
assert losses[-1] < losses[0]
print(f"loss on four pictures, before and after eight steps: {losses[0]:.4f}, {losses[-1]:.4f}")

# %% [markdown]
# Gradients in the adapters only, and the base the same to the bit. When the lesson is over, `merge_lora` makes the base anew
# from its codes, adds the update, and leaves a plain model, or the adapter is saved alone, as in chapter 18.
#
# ## A look inside
#
# Are taught weights a bell at all? Then the sixteen codes would be used more evenly than even steps. Not quite evenly: the
# largest of 64 weights lies further out than the outermost quantile, so after the division the bell is a little narrower
# than the levels suppose. Here is how often the pocket model's decoder uses each code, and how
# often it would use sixteen even steps.

# %%
used = {"NF4": torch.zeros(16), "even steps": torch.zeros(16)}
off = []
for linear in find_linears(full, DECODER_LINEARS).values():
    blocks = linear.weight.reshape(-1, BLOCK)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
    for name, levels in (("NF4", torch.tensor(NF4_LEVELS)), ("even steps", torch.tensor(even))):
        codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)
        used[name] += codes.bincount(minlength=16)
    off.append(((NF4Linear(linear.weight).weight - linear.weight).norm() / linear.weight.norm()).item())
share = {name: count / count.sum() for name, count in used.items()}
assert share["NF4"][1:-1].min() > 0.03 and share["even steps"].max() > 1.3 * share["NF4"].max()
assert min(off) > 0.08 and max(off) < 0.11
print(f"error of a map, as a share of its weights: {min(off):.3f} to {max(off):.3f}")

figure, axis = plt.subplots(figsize=(6.4, 2.6))
for values, colour, mark in zip(share.values(), (PICTURE, PROMPT), "os"):
    axis.plot(range(16), values, color=colour, marker=mark, ms=4)
axis.annotate("even steps", (9, share["even steps"][9]), xytext=(8, 2), textcoords="offset points", color="0.2")
axis.annotate("NF4", (13, share["NF4"][13]), xytext=(6, 4), textcoords="offset points", color=PICTURE)
axis.set(xlabel="code", ylabel="share of the weights", ylim=(0, 0.18), xticks=range(16))
save(figure, "19_codes")

# %% [markdown]
# *Figure: two lines over the sixteen codes. That of even steps is a bell: the codes in the middle are used most, those at
# the ends hardly. That of NF4 is flatter.*
#
# Taught weights are bells, so nearly so that the error of every map is that of the random numbers above, about a tenth. It
# sounds like much. But the errors of thousands of weights point all ways and mostly cancel in a sum, and the adapter is
# taught on the rounded base: it learns around what is left.
#
# ## The bill
#
# Now the promise that one reads everywhere: QLoRA saves 75 %. Of what? A quantized weight takes 4.127 bits in place of 16.


# %%
# | export
def nf4_bytes(count: int) -> int:
    """Bytes of `count` weights in NF4: codes, a byte for each block's scale, 4 for each 256 scales, 4 for their mean."""
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // SCALE_BLOCK) + 4


# %%
assert nf4_bytes(2048 * 2048) == sum(buffer.nbytes for buffer in NF4Linear(torch.randn(2048, 2048)).buffers())
saved = 1 - 8 * nf4_bytes(2048 * 16_384) / (16 * 2048 * 16_384)
assert round(saved, 3) == 0.742
print(f"of a matrix: {saved:.1%}")

# %% [markdown]
# So 74.2 % of what is quantized, not quite 75. And not all is quantized. For three sizes, on the meta device, where matrices
# have shapes and no numbers: the pocket model, one of some 300 million numbers, and PaliGemma 3B.


# %%
def on_meta(vision: tuple, text: tuple, vocabulary: int) -> PaliGemma:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision_config = dict(zip(keys, vision)) | {"patch_size": 14}
    text_config = dict(zip((*keys, "num_key_value_heads"), text)) | {"vocab_size": vocabulary}
    sizes = {"vision_config": vision_config, "text_config": text_config, "image_token_index": vocabulary - 1}
    with torch.device("meta"):
        return PaliGemma(PaliGemmaConfig.from_dict({"model_type": "paligemma"} | sizes))


middle = on_meta((768, 3072, 12, 12), (1024, 4096, 12, 4, 1), 32_000)
large = on_meta((1152, 4304, 27, 16), (2048, 16384, 18, 8, 1), 257_216)
assert count_parameters(large) == 2_923_466_480
for name, one in (("pocket", full), ("middle", middle), ("3B", large)):
    quantized = [linear.weight.numel() for linear in find_linears(one, DECODER_LINEARS).values()]
    total = count_parameters(one)
    rest = 2 * (total - sum(quantized))
    left = (rest + sum(map(nf4_bytes, quantized))) / (2 * total)
    print(f"{name}: {total / 1e6:,.0f} M, {sum(quantized) / total:.0%} quantized, weights saved {1 - left:.0%}")
assert 0.45 < 1 - left < 0.55

# %% [markdown]
# Of the 3B model's weights half is saved, not three quarters: its embedding alone is more than half a billion numbers, and
# tower and embedding stay in 16 bits.
#
# The saving that counts is another. Here is the whole bill for teaching the 3B model, in GB. Full fine-tuning keeps master
# weights, gradients and two averages in float32. LoRA keeps the base in 16 bits, QLoRA in four; both keep those four only
# for the adapters.

# %%
quantized = [linear.weight.numel() for linear in find_linears(large, DECODER_LINEARS).values()]
adapters = sum(
    64 * (linear.in_features + linear.out_features) for linear in find_linears(large, DECODER_LINEARS).values()
)
total = count_parameters(large)
packed = sum(map(nf4_bytes, quantized)) + 2 * (total - sum(quantized))
bill = {  # weights, gradients, optimizer
    "full": (4 * total, 4 * total, 8 * total),
    "LoRA": (2 * total + 4 * adapters, 4 * adapters, 8 * adapters),
    "QLoRA": (packed + 4 * adapters, 4 * adapters, 8 * adapters),
}
print(f"{'GB':8}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'together':>10}")
for name, parts in bill.items():
    print(f"{name:8}" + "".join(f"{part / 1e9:{w}.2f}" for part, w in zip((*parts, sum(parts)), (10, 11, 11, 10))))
together = {name: sum(parts) for name, parts in bill.items()}
assert together["QLoRA"] < 0.1 * together["full"] and together["QLoRA"] < 0.65 * together["LoRA"]

# %%
figure, axis = plt.subplots(figsize=(6.4, 2.2))
for row, parts in enumerate(bill.values()):
    left = 0.0
    for part, colour in zip(parts, (PICTURE, PROMPT, ANSWER)):
        axis.barh(row, part / 1e9, left=left, color=colour, height=0.6)
        left += part / 1e9
    axis.text(left + 0.6, row, f"{left:.1f} GB", va="center", size=9)
for text, place in (("weights", 5.8), ("gradients", 17.5), ("optimizer", 35)):
    axis.text(place, 0, text, ha="center", va="center", color="white", size=9)
axis.set_yticks(range(3), bill)
axis.invert_yaxis()
axis.set(xlabel="GB to teach the 3B model, without activations", xlim=(0, 56))
save(figure, "19_bill")

# %% [markdown]
# *Figure: three bars. Full fine-tuning takes over forty-five gigabytes, of which the optimizer's part is half. LoRA and QLoRA
# are short bars; most of each is weights, in QLoRA's about three quarters.*
#
# Against full fine-tuning QLoRA saves more than nine tenths, and LoRA had saved most of that. What QLoRA adds is the step
# from seven gigabytes to four, before the activations. The promise of 75 % holds for the matrices, nearly; of a whole
# PaliGemma's weights it is half.
#
# All that is arithmetic. `tests/test_qlora.py` measures it too, on the model of 300 million in a process of its own: the
# same step of teaching, with the base in 16 bits and in NF4 (marked `slow`).
#
# What it costs is time: each weight is made anew twice a step, three times with checkpointing.
#
# ## Your turn
#
# **1.** ★ Write `bits_per_weight(block)` for NF4 with blocks of that size and scales kept in 32 bits, not quantized again.


# %%
def bits_per_weight(block: int) -> float: ...


check(bits_per_weight, ((64,), 4.5), ((32,), 5.0), ((4096,), 4.0078125))

# %% [markdown]
# **2.** ★★ `unpack(byte)`: the two codes in a byte, the first in its upper half.


# %%
def unpack(byte: int) -> tuple[int, int]: ...


check(unpack, ((0x77,), (7, 7)), ((0xF0,), (15, 0)), ((18,), (1, 2)))

# %% [markdown]
# **3.** ★★ A block has one weight of 8 among 63 of size 1. Write `surviving(levels)`: how many of these 63 do not become
# zero, if they are all 1? (Divide, then take the nearest level.)


# %%
def surviving(levels: list[float]) -> int: ...


check(surviving, ((list(NF4_LEVELS),), 63), (([-1.0, 0.0, 1.0],), 0))

# %% [markdown]
# **4.** ★★★ Three bits have eight values. Write `three_bits(weights)`: the eight quantiles (areas 1/16,
# 3/16, ... 15/16) of the given weights, divided by the largest magnitude among the eight. `torch.quantile` finds them.


# %%
def three_bits(weights: torch.Tensor) -> torch.Tensor: ...


bell = torch.tensor([-9.0, -3.0, -1.0, 0.0, 0.5, 1.0, 2.0])
areas = torch.tensor([1, 3, 5, 7, 9, 11, 13, 15]) / 16
check(three_bits, ((bell,), bell.quantile(areas) / bell.quantile(areas).abs().max()))

# %% [markdown]
# Next: chapter 20 measures how good the answers are, by the rules that papers use.
