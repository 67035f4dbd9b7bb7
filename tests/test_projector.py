"""The projector, token replacement and the masks: against loops, and against what `transformers` builds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, PaliGemmaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from sigma_book.kv_cache import KVCache
from sigma_book.projector import Projector, prefix_mask, replace_image_tokens, step_mask


def test_projector_equals_the_reference():
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 22, "num_attention_heads": 2},
        text_config={"model_type": "gemma", "hidden_size": 34},
        projection_dim=34,
    )
    torch.manual_seed(0)
    reference = PaliGemmaMultiModalProjector(config)
    ours = Projector(22, 34)
    ours.load_state_dict(reference.state_dict())
    features = torch.randn(3, 5, 22)
    torch.testing.assert_close(ours(features), reference(features), rtol=0, atol=0)  # one and the same matrix product


def naive_replacement(embeddings, image_features, is_image):
    rows = [list(row) for row in embeddings]
    patches = [patch for picture in image_features for patch in picture]
    for row, flags in enumerate(is_image.tolist()):
        for place, flag in enumerate(flags):
            if flag:
                rows[row][place] = patches.pop(0)
    assert not patches
    return torch.stack([torch.stack(row) for row in rows])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_replacement_equals_loops(batch, length, patches, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(batch * length, generator=generator)
    pictures = int(torch.randint(0, batch * length // patches + 1, (), generator=generator))
    is_image = torch.zeros(batch * length, dtype=torch.bool)
    is_image[places[: pictures * patches]] = True
    is_image = is_image.view(batch, length)
    embeddings = torch.randn(batch, length, 6, generator=generator)
    features = torch.randn(pictures, patches, 6, generator=generator)
    before = embeddings.clone()
    merged = replace_image_tokens(embeddings, features, is_image)
    assert torch.equal(merged, naive_replacement(embeddings, features, is_image))
    assert torch.equal(embeddings, before)


def test_replacement_in_half_precision_keeps_the_embeddings_dtype():
    is_image = torch.tensor([[True, False]])
    merged = replace_image_tokens(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 1, 3), is_image)
    assert merged.dtype == torch.bfloat16
    assert merged.tolist() == [[[1, 1, 1], [0, 0, 0]]]


def test_gradients_reach_patches_and_words_but_not_placeholders():
    embeddings = torch.randn(1, 3, 2, requires_grad=True)
    features = torch.randn(1, 2, 2, requires_grad=True)
    is_image = torch.tensor([[True, False, True]])
    replace_image_tokens(embeddings, features, is_image).sum().backward()
    assert embeddings.grad.tolist() == [[[0, 0], [1, 1], [0, 0]]]
    assert features.grad.tolist() == [[[1, 1], [1, 1]]]


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_a_wrong_number_of_placeholders_is_an_error(pictures):
    is_image = torch.tensor([[True, True, False], [True, True, False]])
    with pytest.raises(ValueError, match=f"4 <image> tokens for {2 * pictures} patches"):
        replace_image_tokens(torch.zeros(2, 3, 2), torch.zeros(pictures, 2, 2), is_image)


def sequences(rows, side):
    """(prefix, suffix) lengths of each row to attention_mask and token_type_ids."""
    length = max(prefix + suffix for prefix, suffix in rows)
    mask, types = [], []
    for prefix, suffix in rows:
        padding = [0] * (length - prefix - suffix)
        row, kind = [1] * (prefix + suffix), [0] * prefix + [1] * suffix
        mask.append(padding + row if side == "left" else row + padding)
        types.append(padding + kind if side == "left" else kind + padding)
    return torch.tensor(mask), torch.tensor(types)


def naive_mask(mask, types, window):
    batch, length = mask.shape
    allowed = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                past = j <= i and (window is None or i - j < window)
                both_prefix = types[b, i] == 0 and types[b, j] == 0
                allowed[b, 0, i, j] = mask[b, j] == 1 and (past or both_prefix)
    return allowed


ROWS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=3)
WINDOWS = st.one_of(st.none(), st.integers(1, 12))


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from(["left", "right"]), WINDOWS)
def test_mask_equals_loops(rows, side, window):
    mask, types = sequences(rows, side)
    assert torch.equal(prefix_mask(mask, types, window), naive_mask(mask, types, window))


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from(["left", "right"]), WINDOWS)
def test_mask_equals_the_references(rows, side, window):
    mask, types = sequences(rows, side)
    config = Gemma2Config(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, sliding_window=window)
    config._attn_implementation = "eager"
    build = create_causal_mask if window is None else create_sliding_window_causal_mask
    reference = build(
        config=config,
        inputs_embeds=torch.zeros(*mask.shape, 8),
        attention_mask=mask,
        past_key_values=None,
        position_ids=mask.cumsum(-1),
        block_sequence_ids=torch.where(types == 0, 0, -1),
    )
    if reference is None:  # nothing hidden
        reference = torch.zeros(1)
    expected = (reference == 0).expand(len(mask), 1, *mask.shape[-1:] * 2)
    real = mask.bool()[:, None, :, None].expand_as(expected)  # rows of padding are read by nobody
    assert torch.equal(prefix_mask(mask, types, window)[real], expected[real])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 9), WINDOWS)
def test_a_step_sees_what_the_last_row_of_the_whole_mask_sees(prompts, steps, window):
    """Over a real cache, with the ring of a sliding window, in whatever order its slots lie."""
    mask, types = sequences([(prompt, steps) for prompt in prompts], "left")
    start, length = max(prompts), mask.shape[1]
    cache = KVCache(len(prompts), 1, length, 2, window=window)
    entry = torch.zeros(len(prompts), 1, 1, 2)
    cache.update(entry.expand(-1, -1, start, -1), entry.expand(-1, -1, start, -1))
    for column in range(start, length):
        columns = cache.columns(column + 1)
        key, _ = cache.update(entry, entry)
        so_far = mask[:, : column + 1]
        row = prefix_mask(so_far, types[:, : column + 1], window)[:, 0, -1]  # (B, S)
        seen = torch.zeros_like(row)
        step = step_mask(so_far, columns)
        assert step.shape == (len(prompts), 1, 1, key.shape[2])
        seen[:, columns] = step[:, 0, 0]
        assert torch.equal(seen, row)
