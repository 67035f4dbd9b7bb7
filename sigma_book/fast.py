"""The same answers, sooner.

How does one model answer faster, and how little of its precision does that cost?

Tangled from chapters/21b_fast.py: edit there, then run python -m sigma_book.tangle.
"""

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

__all__ = [
    "FLOAT_SUM",
    "GROUP",
    "LARGE_HEAD",
    "PART_ROWS",
    "PIECE_ROWS",
    "SMALLEST",
    "ExactEmbedding",
    "FastPaliGemma",
    "FixedSlots",
    "FusedAttention",
    "FusedNorm",
    "FusedVisionAttention",
    "Int4Linear",
    "Int8Linear",
    "PackedLinear",
    "PictureCache",
    "Preparation",
    "ShortlistHead",
    "compile_step",
    "dense_map",
    "input_steps",
    "int8_levels",
    "int8_libraries",
    "map_groups",
    "pack_for_fbgemm",
    "prepare",
    "quantize_groups",
    "quantize_rows",
    "reach_of_rows",
    "static_step",
    "step_inputs",
    "torchao_map",
    "wants_shortlist",
]


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
