"""The cache against attention over everything at once, and its contents against the caches of `transformers`."""

import pytest
import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sigma_book.gemma import Gemma, GemmaConfig
from sigma_book.gqa import cache_bytes, grouped_attention
from sigma_book.kv_cache import KVCache
from sigma_book.rope import rotary_angles, rotate

WINDOWS = (None, 1, 2, 5, 9, 30, 100)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def columns_of(cache: KVCache, tensor: torch.Tensor) -> torch.Tensor:
    """What a cache holds, put in the order of the text."""
    return tensor[:, :, cache.columns().argsort()]


@pytest.mark.parametrize("prompt", (1, 6, 9))
@pytest.mark.parametrize("window", WINDOWS)
def test_cached_equals_uncached_at_every_step(window, prompt):
    """Three rows of different lengths, padded on the left; a prompt that sees itself whole; then one token at a time."""
    rows, heads, kv_heads, head_dim, total = 3, 4, 2, 10, 30
    generator = torch.Generator().manual_seed(prompt)
    query = torch.randn(rows, heads, total, head_dim, generator=generator)
    key, value = torch.randn(2, rows, kv_heads, total, head_dim, generator=generator)
    real = torch.arange(total) >= torch.tensor([0, prompt // 2, prompt - 1])[:, None]  # (B, T)
    angles = rotary_angles(real.long().cumsum(-1), head_dim)
    query, key = rotate(query, *angles), rotate(key, *angles)

    back = torch.arange(total)[:, None] - torch.arange(total)
    allowed = (back >= 0) & (back < (window or total))
    allowed[:prompt, :prompt] = True
    allowed = allowed & real[:, None, None, :]  # (B, 1, T, T)
    whole = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)

    cache = KVCache(rows, kv_heads, total, head_dim, window=window)
    steps = [(0, prompt)] + [(place, place + 1) for place in range(prompt, total)]
    for start, end in steps:
        keys, values = cache.update(key[:, :, start:end], value[:, :, start:end])
        seen = allowed[:, :, :prompt, :prompt] if start == 0 else real[:, cache.columns()][:, None, None, :]
        step = grouped_attention(query[:, :, start:end], keys, values, seen)
        there = real[:, start:end].nonzero(as_tuple=True)  # what a pad would say has no meaning
        difference = (step - whole[:, :, start:end]).transpose(1, 2)[there]
        assert difference.abs().max() <= 1e-5, (start, end)


@pytest.mark.parametrize("prompt", (1, 4, 5, 6, 13))
@pytest.mark.parametrize("window", (1, 2, 5, 8))
def test_ring_holds_what_the_sliding_layer_of_transformers_holds(window, prompt):
    """theirs keeps window - 1 old tokens and hands out the new one with them."""
    key, value = torch.randn(2, 2, 3, 25, 4)
    ours = KVCache(2, 3, 25, 4, window=window)
    theirs = DynamicSlidingWindowLayer(sliding_window=window)
    ours.update(key[:, :, :prompt], value[:, :, :prompt])
    theirs.update(key[:, :, :prompt], value[:, :, :prompt])
    for place in range(prompt, 25):
        new = key[:, :, place : place + 1], value[:, :, place : place + 1]
        our_keys, our_values = ours.update(*new)
        their_keys, their_values = theirs.update(*new)
        kept = min(window, place + 1)
        assert torch.equal(columns_of(ours, our_keys), their_keys[:, :, -kept:])
        assert torch.equal(columns_of(ours, our_values), their_values[:, :, -kept:])


def test_whole_cache_holds_what_transformers_holds_also_in_pieces():
    key, value = torch.randn(2, 2, 3, 25, 4)
    ours, theirs = KVCache(2, 3, 25, 4), DynamicLayer()
    for start, end in ((0, 7), (7, 8), (8, 15), (15, 25)):
        new = key[:, :, start:end], value[:, :, start:end]
        for mine, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, expected)
    assert ours.columns().tolist() == list(range(25))


@pytest.mark.parametrize("window", WINDOWS)
def test_columns_before_and_after(window):
    """`columns(n)` tells beforehand what `columns()` tells after."""
    cache = KVCache(1, 1, 40, 2, window=window)
    planned = {length: cache.columns(length).tolist() for length in range(7, 41)}
    cache.update(*torch.zeros(2, 1, 1, 7, 2))
    for length in range(7, 41):
        assert cache.length == length
        assert cache.columns().tolist() == planned[length]
        assert sorted(planned[length]) == list(range(max(0, length - (window or 40)), length))
        if length < 40:
            cache.update(*torch.zeros(2, 1, 1, 1, 2))


@pytest.mark.parametrize("window", (None, 5))
def test_buffers_stay_in_place_and_are_no_larger_than_needed(window):
    cache = KVCache(2, 1, 40, 8, window=window, dtype=torch.bfloat16)
    places = cache.key.data_ptr(), cache.value.data_ptr()
    for _ in range(40):
        keys, values = cache.update(*torch.randn(2, 2, 1, 1, 8, dtype=torch.bfloat16))
        if cache.length > 1:  # the first call hands back what it was given
            assert keys.data_ptr() == places[0] and values.data_ptr() == places[1]
    assert (cache.key.data_ptr(), cache.value.data_ptr()) == places
    assert cache.key.nbytes + cache.value.nbytes == cache_bytes(1, 1, 8, window or 40, batch=2)


def test_a_prompt_longer_than_the_window_gets_all_of_itself_back():
    key, value = torch.randn(2, 1, 1, 9, 2)
    cache = KVCache(1, 1, 20, 2, window=4)
    keys, values = cache.update(key, value)
    assert torch.equal(keys, key) and torch.equal(values, value)
    assert sorted(cache.columns().tolist()) == [5, 6, 7, 8]


@pytest.mark.parametrize("window", (None, 3))
def test_no_room_is_said_and_changes_nothing(window):
    cache = KVCache(1, 1, 5, 2, window=window)
    cache.update(*torch.ones(2, 1, 1, 5, 2))
    with pytest.raises(ValueError, match="room for 5 tokens, 6"):
        cache.update(*torch.zeros(2, 1, 1, 1, 2))
    assert cache.length == 5 and (cache.key == 1).all()
    with pytest.raises(ValueError, match="room for 5 tokens, 6"):
        KVCache(1, 1, 5, 2).update(*torch.zeros(2, 1, 1, 6, 2))


def test_several_tokens_at_once_do_not_fit_through_a_used_ring():
    cache = KVCache(1, 1, 20, 2, window=4)
    cache.update(*torch.ones(2, 1, 1, 2, 2))
    cache.update(*torch.ones(2, 1, 1, 2, 2))  # the ring is full, not yet overwritten
    with pytest.raises(ValueError, match="one token at a time"):
        cache.update(*torch.zeros(2, 1, 1, 2, 2))
    assert cache.length == 4 and (cache.key == 1).all()
    cache.update(*torch.zeros(2, 1, 1, 1, 2))
    assert cache.columns().tolist() == [4, 1, 2, 3]


def test_select_keeps_rows_in_the_order_asked():
    key, value = torch.randn(2, 3, 1, 6, 2)
    cache = KVCache(3, 1, 10, 2)
    cache.update(key, value)
    cache.select(torch.tensor([2, 0, 0]))
    keys, values = cache.update(*torch.zeros(2, 3, 1, 1, 2))
    assert torch.equal(keys[:, :, :6], key[[2, 0, 0]]) and torch.equal(values[:, :, :6], value[[2, 0, 0]])


def test_wider_numbers_are_kept_in_the_dtype_of_the_buffers():
    cache = KVCache(1, 1, 4, 2, dtype=torch.bfloat16)
    key = torch.randn(1, 1, 2, 2)
    cache.update(key, key)
    keys, _ = cache.update(key[:, :, :1], key[:, :, :1])
    assert keys.dtype == torch.bfloat16
    assert torch.equal(keys, torch.cat((key, key[:, :, :1]), dim=2).bfloat16())


def test_5050_against_100_in_a_real_decoder():
    """Rows that pass through the key projection of a layer, counted by a hook; and both ways say the same."""
    config = GemmaConfig(16, 24, 2, 2, 1, 8, 30)
    torch.manual_seed(0)
    decoder = Gemma(config).eval()
    counts = {"rows": 0}
    decoder.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, given, output: counts.update(rows=counts["rows"] + output.shape[1])
    )
    ids = torch.randint(0, 30, (1, 100))
    positions = torch.arange(1, 101)[None]
    with torch.no_grad():
        last = []
        for length in range(1, 101):
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            last.append(decoder(decoder.embed(ids[:, :length]), positions[:, :length], {None: causal})[:, -1])
        assert counts["rows"] == 5050
        counts["rows"] = 0
        caches = decoder.new_caches(1, 100)
        for place, expected in enumerate(last):
            step = slice(place, place + 1)
            hidden = decoder(decoder.embed(ids[:, step]), positions[:, step], {None: None}, caches)
            assert (hidden[:, -1] - expected).abs().max() <= 1e-5
        assert counts["rows"] == 100
