"""Attention against loops in float64, torch's multi-head attention and the attention of `transformers`."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, SiglipVisionConfig
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.siglip.modeling_siglip import SiglipAttention

from sigma_book.attention import MultiHeadAttention, attention, merge_heads, split_heads

# Results are averages of numbers near 1; float32 rounds them, and the scores before, at some 1e-7.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(batch=2, heads=3, queries=5, keys=7, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention_loops(query, key, value, mask=None, scale=None, softcap=None):
    """The formula, one number at a time, in Python's float64."""
    batch, heads, queries, width = query.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    result = torch.zeros(query.shape, dtype=torch.float64)
    allowed = torch.ones(batch, heads, queries, key.shape[2], dtype=torch.bool)
    if mask is not None:
        allowed = allowed & mask
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                seen = [s for s in range(key.shape[2]) if allowed[b, h, t, s]]
                scores = []
                for s in seen:
                    score = scale * math.fsum(
                        x * y for x, y in zip(query[b, h, t].tolist(), key[b, h, s].tolist(), strict=True)
                    )
                    scores.append(score if softcap is None else softcap * math.tanh(score / softcap))
                powers = [math.exp(score - max(scores)) for score in scores]
                for s, power in zip(seen, powers, strict=True):
                    result[b, h, t] += power / math.fsum(powers) * value[b, h, s].double()
    return result.float()


@pytest.mark.parametrize("softcap", [None, 0.5, 50.0])
@pytest.mark.parametrize("scale", [None, 1.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loops(masked, scale, softcap):
    query, key, value = draw()
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True  # every query sees something
    mask = mask if masked else None
    ours = attention(query, key, value, mask, scale, softcap)
    torch.testing.assert_close(ours, attention_loops(query, key, value, mask, scale, softcap), **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch(masked):
    query, key, value = draw(queries=6, keys=6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril() if masked else None
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=masked)
    torch.testing.assert_close(attention(query, key, value, mask), expected, **CLOSE)
    torch.testing.assert_close(attention(query, key, value, mask, softcap=1e4), expected, **CLOSE)


@pytest.mark.parametrize("softcap", [0.3, 2.0, 50.0])
def test_softcap_equals_gemma2_of_transformers(softcap):
    query, key, value = draw(heads=2, queries=6, keys=6)
    config = Gemma2Config(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    module = modeling_gemma2.Gemma2Attention(config, layer_idx=0).eval()
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected, _ = modeling_gemma2.eager_attention_forward(
        module, query, key, value, added, scaling=8**-0.5, softcap=softcap, dropout=0.0
    )
    ours = attention(query, key, value, allowed, softcap=softcap)
    torch.testing.assert_close(ours.transpose(1, 2), expected, **CLOSE)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_large_scores_stay_finite(softcap):
    query, key, value = (1e4 * tensor for tensor in draw())
    assert attention(query, key, value, softcap=softcap).isfinite().all()


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_query_that_sees_nothing_is_finite_and_leaves_the_others_alone(softcap):
    query, key, value = draw(queries=6, keys=6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = attention(query, key, value, mask, softcap=softcap)
    mask[2] = False
    blind = attention(query, key, value, mask, softcap=softcap)
    assert blind.isfinite().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(blind[:, :, others], expected[:, :, others], **CLOSE)


def test_causal_hides_the_future_and_bidirectional_does_not():
    query, key, value = draw(queries=6, keys=6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    changed = value.clone()
    changed[:, :, -1] += 1
    same = attention(query, key, changed, mask)[:, :, :-1] - attention(query, key, value, mask)[:, :, :-1]
    assert same.abs().max() == 0
    assert (attention(query, key, changed) - attention(query, key, value)).abs().amin(dim=(0, 1, 3)).min() > 0


def test_heads_are_runs_of_the_width():
    hidden = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = split_heads(hidden, 4)
    assert heads.shape == (2, 4, 3, 2)
    for head in range(4):
        assert torch.equal(heads[:, head], hidden[..., 2 * head : 2 * head + 2])
    assert torch.equal(merge_heads(heads), hidden)


@pytest.mark.parametrize(("width", "heads"), [(24, 1), (24, 4), (30, 5), (36, 36)])
def test_multi_head_equals_torch(width, heads):
    ours = MultiHeadAttention(width, heads)
    theirs = nn.MultiheadAttention(width, heads, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter) / width**0.5)
        three = (ours.q_proj, ours.k_proj, ours.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in three]))
        theirs.in_proj_bias.copy_(torch.cat([projection.bias for projection in three]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    tokens = torch.randn(2, 9, width)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens, need_weights=False)[0], **CLOSE)


@pytest.mark.parametrize(("width", "heads"), [(24, 4), (36, 3)])
def test_multi_head_equals_transformers(width, heads):
    config = SiglipVisionConfig(hidden_size=width, num_attention_heads=heads, attn_implementation="eager")
    theirs = SiglipAttention(config).eval()
    ours = MultiHeadAttention(width, heads)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, 9, width)
    torch.testing.assert_close(ours(tokens), theirs(tokens)[0], **CLOSE)


def test_shuffled_tokens_give_shuffled_answers():
    layer, tokens, order = MultiHeadAttention(24, 4), torch.randn(2, 9, 24), torch.randperm(9)
    torch.testing.assert_close(layer(tokens[:, order]), layer(tokens)[:, order], **CLOSE)


def test_a_shift_of_all_keys_changes_nothing():
    """Why the gradient of `k_proj.bias` is zero in theory: softmax ignores what all keys share."""
    layer, tokens = MultiHeadAttention(24, 4), torch.randn(2, 9, 24)
    before = layer(tokens)
    with torch.no_grad():
        layer.k_proj.bias += 3 * torch.randn(24)
    torch.testing.assert_close(layer(tokens), before, **CLOSE)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="30.*multiple.*4"):
        MultiHeadAttention(30, 4)
