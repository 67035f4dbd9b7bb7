"""Grouped attention against torch's own, Gemma 2's with the soft cap against `transformers`; bytes against real caches."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from sigma_book.gqa import cache_bytes, grouped_attention

HEADS = ((8, 1), (8, 2), (8, 4), (8, 8), (6, 3), (5, 1), (1, 1))
# float32 rounds at 6e-8; the sums here have at most 24 terms of size near 1
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(heads: int, kv_heads: int, length: int = 5, others: int = 7, head_dim: int = 24, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, length, head_dim, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, others, head_dim, generator=generator)
    return query, key, value


def random_mask(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True  # every query may look somewhere
    assert not mask.all()
    return mask


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("length", (1, 5))
def test_equals_torch(heads, kv_heads, length):
    query, key, value = tensors(heads, kv_heads, length)
    for mask in (None, random_mask(2, 1, length, 7), random_mask(1, 1, length, 7)):
        for scale in (None, 0.3):
            expected = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
            torch.testing.assert_close(grouped_attention(query, key, value, mask, scale), expected, **CLOSE)


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_a_mask_that_is_the_same_for_all_queries(heads, kv_heads):
    """(B, 1, 1, S), as a batch with padding has it."""
    query, key, value = tensors(heads, kv_heads)
    mask = random_mask(2, 1, 1, 7)
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(grouped_attention(query, key, value, mask), expected, **CLOSE)


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("length", (1, 5))
def test_soft_cap_equals_transformers(heads, kv_heads, length):
    query, key, value = tensors(heads, kv_heads, length)
    mask = random_mask(2, 1, length, 7)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False, head_dim=24)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(module, query, key, value, added, scaling=0.7, softcap=2.0)
    ours = grouped_attention(query, key, value, mask, scale=0.7, softcap=2.0)
    torch.testing.assert_close(ours, expected.transpose(1, 2), **CLOSE)
    assert (ours - grouped_attention(query, key, value, mask, scale=0.7)).abs().max() > 0.01  # the cap does something


def test_gradients_equal_torch():
    query, key, value = (tensor.requires_grad_() for tensor in tensors(8, 2))
    target = torch.randn(2, 8, 5, 24)
    gradients = []
    for output in (
        grouped_attention(query, key, value),
        F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
    ):
        gradients.append(torch.autograd.grad((output * target).sum(), (query, key, value)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # sums over 20 queries


def test_which_query_heads_read_which_key_value_head():
    query, key, value = tensors(8, 4)
    before = grouped_attention(query, key, value)
    for shared in range(4):
        other = value.clone()
        other[:, shared] += 1
        changed = (grouped_attention(query, key, other) - before).abs().amax(dim=(0, 2, 3)) > 1e-3
        assert changed.nonzero().flatten().tolist() == [2 * shared, 2 * shared + 1]


@pytest.mark.parametrize("softcap", (None, 50.0))
def test_keys_are_not_copied(softcap):
    query, key, value = tensors(8, 1, length=1, others=4096, head_dim=64)
    query, key, value = query[:1], key[:1], value[:1]

    def largest_piece(function) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            function()
        return max(event.self_cpu_memory_usage for event in record.events())

    def with_copies():
        return F.scaled_dot_product_attention(query, key.repeat_interleave(8, 1), value.repeat_interleave(8, 1))

    assert largest_piece(with_copies) >= 8 * key.nbytes  # the measure sees copies where there are some
    # with a cap the scores themselves are written down, 8 rows of 4,096: still a small part of the keys
    assert largest_piece(lambda: grouped_attention(query, key, value, softcap=softcap)) <= key.nbytes // 8


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="8 query heads do not divide among 3"):
        grouped_attention(*tensors(8, 3))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_cache_bytes_equal_those_of_a_real_cache(dtype):
    layers, kv_heads, head_dim, length, batch = 3, 2, 24, 11, 4
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*torch.zeros(2, batch, kv_heads, length, head_dim, dtype=dtype), layer)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(layers, kv_heads, head_dim, length, batch, dtype.itemsize) == held


def test_eight_times_less_in_paligemma_3b():
    assert cache_bytes(18, 8, 256, 8192) == 8 * cache_bytes(18, 1, 256, 8192) == 1_207_959_552
