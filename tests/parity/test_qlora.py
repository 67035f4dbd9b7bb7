"""NF4 against `bitsandbytes` (its CPU build): codes, scales and dequantized values byte for byte.

One exception, measured here: where a row does not hold whole blocks of 64, the CPU kernel of bitsandbytes 0.50 that turns
codes into numbers reads the scales of other blocks. There the reference is the library's own plain implementation.
"""

import logging

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes import functional as reference  # noqa: E402
from bitsandbytes.backends.default import ops as plain  # noqa: E402

from sigma_book import qlora  # noqa: E402
from sigma_book.qlora import (  # noqa: E402
    BLOCK,
    NF4_LEVELS,
    NF4Linear,
    dequantize_blocks,
    dequantize_scales,
    dynamic_levels,
    quantize_blocks,
    quantize_scales,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def plain_without_compiling(monkeypatch):
    """The library compiles its plain implementation for each new shape; uncompiled it gives the same numbers."""
    monkeypatch.setattr(plain, "_dequantize_4bit_compute", plain._dequantize_4bit_compute.__wrapped__)


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of every size, some with a block of zeros, some heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn((), generator=generator) * 0.1
    if seed % 4 == 0:
        values = values**3
    if seed % 3 == 0:
        values[: rows // 2] = 0
    return values.clamp(-6e4, 6e4).to(dtype)  # what float16 can hold


def theirs(values: torch.Tensor):
    return reference.quantize_4bit(values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")


def test_the_levels_are_theirs():
    assert torch.equal(torch.tensor(NF4_LEVELS), reference.get_4bit_type("nf4", "cpu"))
    assert torch.equal(dynamic_levels(), reference.create_dynamic_map())


@given(rows=st.integers(1, 40), columns=st.integers(1, 200), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
@example(rows=1, columns=1, dtype=torch.float32, seed=1)
@example(rows=130, columns=256, dtype=torch.bfloat16, seed=3)  # more than 256 scales, the last block of scales short
@example(rows=1, columns=64, dtype=torch.float16, seed=2)  # a single scale: less its mean, it is 0
@settings(max_examples=150, deadline=None)
def test_codes_and_scales_byte_for_byte(rows, columns, dtype, seed):
    values = numbers(rows, columns, dtype, seed)
    codes, state = theirs(values)
    ours = NF4Linear(values)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.scale_codes, state.absmax)
    assert torch.equal(ours.scales, state.state2.absmax)
    assert torch.equal(ours.mean_scale, state.offset)
    scales = reference.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(dequantize_scales(ours.scale_codes, ours.scales, ours.mean_scale), scales)
    expected = plain._dequantize_4bit_compute(codes.flatten(), scales, state.code, BLOCK, state.shape, dtype)
    assert torch.equal(ours.weight, expected) and ours.weight.dtype == dtype
    if columns % BLOCK == 0:
        assert torch.equal(ours.weight, reference.dequantize_4bit(codes, state))


def test_every_sixteen_bit_number_finds_the_same_level():
    """All finite bfloat16 numbers from -1 to 1, each in a block whose largest is 1."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 1]
    rows = torch.nn.functional.pad(every, (0, -len(every) % (BLOCK - 1))).view(-1, BLOCK - 1)
    values = torch.cat((torch.ones(len(rows), 1, dtype=torch.bfloat16), rows), dim=1)
    codes, _ = quantize_blocks(values)
    assert torch.equal(codes, theirs(values)[0].flatten())


def test_scales_at_the_borders_between_levels():
    levels = dynamic_levels()
    middles = (levels[:-1] + levels[1:]) / 2
    generator = torch.Generator().manual_seed(0)
    near = (middles[None] + 2e-5 * torch.randn(40, 255, generator=generator)).clamp(-1, 1)
    scales = torch.cat((torch.ones(40, 1), near), dim=1).flatten()
    mean = scales.mean()
    codes, state = reference.quantize_blockwise(scales - mean, blocksize=256)
    ours, largest, ours_mean = quantize_scales(scales)
    assert torch.equal(ours, codes) and torch.equal(largest, state.absmax) and ours_mean == mean


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_and_without_their_kernels_the_numbers_are_one(monkeypatch, dtype):
    layer = NF4Linear(numbers(33, 320, dtype, 1))
    with_kernels = layer.weight
    monkeypatch.setattr(qlora, "_bitsandbytes", lambda: None)
    assert torch.equal(layer.weight, with_kernels)


def test_the_product_and_its_gradient_are_theirs():
    """In float32 to 1e-5 of the largest: both sum 320 products, in other orders."""
    values = numbers(48, 320, torch.float32, 1)
    codes, state = theirs(values)
    inputs = torch.randn(2, 5, 320, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (NF4Linear(values), lambda rows: bitsandbytes.matmul_4bit(rows, codes, state)):
        rows = inputs.clone().requires_grad_()
        output = forward(rows)
        output.square().sum().backward()
        results.append((output.detach(), rows.grad))
    for ours, expected in zip(*results):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_plain_numpy_version_agrees():
    """Written apart, one number at a time, for float32 numbers that fill their blocks."""
    values = numbers(3, 128, torch.float32, 1)
    layer = NF4Linear(values)
    codes = [code for byte in layer.codes.tolist() for code in (byte >> 4, byte & 15)]
    scales = dequantize_scales(layer.scale_codes, layer.scales, layer.mean_scale).tolist()
    flat = values.flatten().tolist()
    for place, (value, code) in enumerate(zip(flat, codes, strict=True)):
        most = max(abs(other) for other in flat[place // 64 * 64 : place // 64 * 64 + 64])
        assert min(range(16), key=lambda k: abs(NF4_LEVELS[k] - value / most)) == code
        assert layer.weight.flatten()[place] == pytest.approx(NF4_LEVELS[code] * scales[place // 64], rel=1e-6)
    assert torch.equal(layer.weight, dequantize_blocks(layer.codes, torch.tensor(scales), (3, 128)))
