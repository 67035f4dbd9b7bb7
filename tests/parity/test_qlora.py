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


def test_a_quantized_model_with_an_adapter_is_theirs(make_twins, tmp_path):
    """The whole of QLoRA: `transformers` loads the folder in NF4 through bitsandbytes, `peft` puts our adapter on it.

    The weights are the same to the bit. Logits in float32 agree to 1e-5 of the largest, gradients, which pass through all
    layers and back, to 1e-4.
    """
    import peft
    import transformers

    from sigma_book.lora import LoraConfig, add_lora, save_adapter
    from sigma_book.qlora import nf4_on_arrival
    from sigma_book.weights import load_model

    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"model_type": "gemma", "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 150}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 12, "patch_size": 4, "vision_use_head": False}
    sizes = {"model_type": "paligemma", "image_token_index": 149, "hidden_size": 64, "projection_dim": 64}
    twins = make_twins(sizes | {"text_config": text, "vision_config": vision})
    twins.redraw(seed=3)
    twins.reference.save_pretrained(tmp_path / "base")
    quantized = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "base",
        attn_implementation="eager",
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        ),
    )
    ours = load_model(tmp_path / "base", "cpu", "float32", nf4_on_arrival())
    theirs = quantized.model.language_model.layers[1].mlp.up_proj
    assert torch.equal(theirs.weight.flatten(), ours.language_model.layers[1].mlp.up_proj.codes)
    add_lora(ours, LoraConfig(rank=3))
    generator = torch.Generator().manual_seed(0)
    for parameter in (parameter for parameter in ours.parameters() if parameter.requires_grad):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_adapter(ours, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(quantized, tmp_path / "adapter", is_trainable=True)
    adapted.train()  # there is no dropout; in eval mode the library multiplies in bfloat16 on some CPUs
    words = torch.randint(4, 149, (2, 7), generator=generator)
    ids = torch.cat([torch.full((2, 9), 149), words], dim=1)
    given = {"input_ids": ids, "pixel_values": twins.pictures(2, generator), "attention_mask": torch.ones_like(ids)}
    given["token_type_ids"] = (torch.arange(16) >= 14).long().expand_as(ids).contiguous()
    expected, found = adapted(**given).logits, ours(**given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for logits in (expected, found):
        logits.square().mean().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    checked = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = gradients[f"base_model.model.model.{name}.default.weight"]
            assert (parameter.grad - other).abs().max() <= 1e-4 * largest
            checked += 1
    assert checked == len(gradients) == 2 * 7 * 2
