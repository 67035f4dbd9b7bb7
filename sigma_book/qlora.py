"""Four bits a number: QLoRA.

How can a frozen model be stored in four bits and still teach?

Tangled from chapters/19_qlora.py: edit there, then run python -m sigma_book.tangle.
"""

import logging
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.lora import DECODER_LINEARS, LoraLinear, find_linears

__all__ = [
    "BLOCK",
    "NF4_LEVELS",
    "PART",
    "SCALE_BLOCK",
    "TINY",
    "NF4Linear",
    "dequantize_blocks",
    "dequantize_scales",
    "dynamic_levels",
    "nf4_bytes",
    "nf4_on_arrival",
    "quantize_blocks",
    "quantize_nf4",
    "quantize_scales",
]

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


def dequantize_blocks(codes: torch.Tensor, largest: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Codes and scales of `quantize_blocks` back to float32 numbers of a shape."""
    levels = torch.tensor(NF4_LEVELS, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): what each byte stands for
    values = pairs[codes.int()].flatten()  # (N,), and one more if N is odd
    values = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) * largest[:, None]
    return values.flatten()[: math.prod(shape)].view(shape)


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


def nf4_bytes(count: int) -> int:
    """Bytes of `count` weights in NF4: codes, a byte for each block's scale, 4 for each 256 scales, 4 for their mean."""
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // SCALE_BLOCK) + 4
