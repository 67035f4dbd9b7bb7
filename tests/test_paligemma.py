"""The whole model: configuration, where logits are computed, the loss. `tests/parity` compares its numbers."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import sigma_book
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig, count_parameters

TEXT = {
    "model_type": "gemma",
    "hidden_size": 20,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 50,
}
VISION = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def values(text: dict | None = None, vision: dict | None = None, **top) -> dict:
    return {
        "model_type": "paligemma",
        "image_token_index": 49,
        "text_config": TEXT | (text or {}),
        "vision_config": VISION | (vision or {}),
        **top,
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PaliGemma(PaliGemmaConfig.from_dict(values())).eval()


@pytest.fixture
def batch():
    """Two rows, the second one token shorter and padded on the right: ids, pixels, mask, types, labels."""
    ids = torch.tensor([[49] * 4 + [2, 7, 8, 3, 20, 21, 1], [49] * 4 + [2, 9, 3, 22, 23, 1, 0]])
    mask = (ids != 0).long()
    types = torch.tensor([[0] * 8 + [1] * 3, [0] * 7 + [1] * 3 + [0]])
    labels = torch.where(types == 1, ids, -100)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return ids, pixels, mask, types, labels


BAD = {
    "model_type is 'llava'": {"model_type": "llava"},
    "model_type is None": {},
    "text_config.model_type is 'llama': expected 'gemma' or 'gemma2'": values({"model_type": "llama"}),
    "vision_config.model_type is 'clip_vision_model'": values(vision={"model_type": "clip_vision_model"}),
    "vision_config.hidden_act is 'quick_gelu'": values(vision={"hidden_act": "quick_gelu"}),
    "text_config.hidden_act is 'silu'": values({"hidden_act": "silu"}),
    "text_config.hidden_activation is 'silu'": values({"model_type": "gemma2", "hidden_activation": "silu"}),
    "text_config.attention_bias is True": values({"attention_bias": True}),
    "text_config.rope_parameters.rope_type is 'yarn'": values({"rope_parameters": {"rope_type": "yarn"}}),
    "text_config.rope_parameters.type is 'linear'": values({"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "text_config.layer_types is ['full_attention']": values(
        {"model_type": "gemma2", "layer_types": ["full_attention"]}
    ),
    "'chunked_attention'": values({"model_type": "gemma2", "layer_types": ["full_attention", "chunked_attention"]}),
    "text_config.hidden_size is None": values({"hidden_size": None}),
    "text_config.num_hidden_layers is 0": values({"num_hidden_layers": 0}),
    "text_config.vocab_size is '50'": values({"vocab_size": "50"}),
    "vision_config.patch_size is 4.0": values(vision={"patch_size": 4.0}),
    "text_config.num_attention_heads is 4: expected a multiple of 3": values({"num_key_value_heads": 3}),
    "text_config.head_dim is 7: expected a multiple of 2": values({"head_dim": 7}),
    "vision_config.hidden_size is 12: expected a multiple of 5": values(vision={"num_attention_heads": 5}),
    "vision_config.image_size is 9: expected a multiple of 4": values(vision={"image_size": 9}),
    "eos_token_id is []": values({"eos_token_id": []}),
    "eos_token_id is [1, 'x']": values({"eos_token_id": [1, "x"]}),
    "pad_token_id is 50: expected a token below 50": values(pad_token_id=50),
    "quantization_config is set": values(quantization_config={"quant_method": "bitsandbytes"}),
    "text_config.model_type is ['gemma']": values({"model_type": ["gemma"]}),
    "text_config.rope_parameters is [1]": values({"rope_parameters": [1]}),
    "text_config.rope_scaling is 'linear'": values({"rope_scaling": "linear"}),
    "text_config.rope_parameters is {'full_attention'": values(
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6}}}
    ),
    "text_config.layer_types is [['a'], {}]": values({"model_type": "gemma2", "layer_types": [["a"], {}]}),
    "text_config.layer_types is 3": values({"model_type": "gemma2", "layer_types": 3}),
    "text_config.layer_types is 'full_attention'": values({"model_type": "gemma2", "layer_types": "full_attention"}),
    "text_config.num_hidden_layers is '4'": values({"model_type": "gemma2", "num_hidden_layers": "4"}),
    "image_token_id is '<image>'": values(image_token_index="<image>"),
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_cannot_be_built_is_an_error_that_names_the_key(sentence):
    with pytest.raises(ValueError) as caught:
        PaliGemmaConfig.from_dict(BAD[sentence])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_from_dict_leaves_its_argument_alone():
    given = values({"model_type": "gemma2", "rope_parameters": {"rope_theta": 5.0}})
    before = json.dumps(given)
    PaliGemmaConfig.from_dict(given)
    assert json.dumps(given) == before


def test_the_first_of_several_stop_tokens_is_the_end_of_sequence():
    assert PaliGemmaConfig.from_dict(values({"eos_token_id": [3, 7]})).eos_token_id == 3


def test_a_whole_number_is_written_as_transformers_reads_it():
    config = PaliGemmaConfig.from_dict(values({"model_type": "gemma2", "query_pre_attn_scalar": 7.0}))
    assert repr(config.to_dict()["text_config"]["query_pre_attn_scalar"]) == "7"
    half = PaliGemmaConfig.from_dict(values({"model_type": "gemma2", "query_pre_attn_scalar": 7.5}))
    assert half.to_dict()["text_config"]["query_pre_attn_scalar"] == 7.5


def test_gemma_1_ignores_what_only_gemma_2_has():
    plain = PaliGemmaConfig.from_dict(values())
    noisy = values(
        {"sliding_window": 3, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 7, "layer_types": ["?"]}
    )
    assert PaliGemmaConfig.from_dict(noisy) == plain
    assert not {"sliding_window", "layer_types"} & set(plain.to_dict()["text_config"])  # transformers would take them


def test_loss_is_cross_entropy_over_the_labelled_places(model, batch):
    *inputs, labels = batch
    loss = model.loss(*inputs, labels)
    logits = model(*inputs)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)  # sums in another order


def test_logits_are_computed_only_where_they_are_needed(model, batch, monkeypatch):
    ids, pixels, mask, types, labels = batch
    asked = []
    head = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: asked.append(tuple(hidden.shape)) or head(hidden))
    model.loss(*batch)
    assert asked.pop() == (6, 20)  # six labels in two rows
    with torch.no_grad():
        caches = model.language_model.new_caches(2, 12)
        assert model.prefill(ids, model.encode_images(pixels), mask, caches).shape == (2, 50)
        assert asked.pop() == (2, 20)  # one place for each row
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        assert model.decode(torch.tensor([[5], [6]]), mask, caches).shape == (2, 50)
        assert asked.pop() == (2, 20)


def test_loss_in_half_precision_is_float32(model, batch):
    exact = model.loss(*batch)
    rough = model.to(torch.bfloat16).loss(*batch)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)  # bfloat16 keeps 8 bits: 0.4 % a step, several steps


def test_the_answer_cannot_look_ahead_and_the_prompt_cannot_see_it(model, batch):
    ids, pixels, mask, types, _ = batch
    changed = ids.clone()
    changed[0, 9] = 30  # the second answer token
    with torch.no_grad():
        before, after = model(ids, pixels, mask, types)[0], model(changed, pixels, mask, types)[0]
    assert torch.equal(before[:9], after[:9])
    assert not torch.allclose(before[9:], after[9:])


def test_the_prompt_sees_itself_in_both_directions(model, batch):
    ids, pixels, mask, types, _ = batch
    changed = ids.clone()
    changed[0, 6] = 30  # a word of the prompt, behind the picture
    with torch.no_grad():
        before, after = model(ids, pixels, mask, types)[0], model(changed, pixels, mask, types)[0]
    assert (before - after).abs().amax(-1).min() > 0  # every place moves, the patches too


def test_padding_changes_nothing(model, batch):
    """A row alone, padded on the left, padded on the right: the same scores, and positions from 1."""
    ids, pixels, _, types, _ = batch
    row, kind, pixels = ids[1:, :10], types[1:, :10], pixels[1:]
    with torch.no_grad():
        alone = model(row, pixels, torch.ones_like(row), kind)
        for side in ((3, 0), (0, 3)):
            padded = model(F.pad(row, side), pixels, F.pad(torch.ones_like(row), side), F.pad(kind, side))
            torch.testing.assert_close(padded[:, side[0] : side[0] + 10], alone, rtol=0, atol=1e-5)


def test_a_model_reads_text_alone(model):
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        assert model(ids, None, torch.ones_like(ids), torch.zeros_like(ids)).isfinite().all()


def test_an_image_token_that_was_generated_has_its_own_row(model):
    """A model may say `<image>`, as transformers lets it: without pictures its embedding is read like any other."""
    embedded = model.embed(torch.tensor([[49]]))
    torch.testing.assert_close(embedded[0, 0], model.language_model.embed_tokens.weight[49] * 20**0.5)


def test_an_image_token_behind_the_last_row(batch):
    ids, pixels, mask, types, _ = batch
    torch.manual_seed(0)
    outside = PaliGemma(PaliGemmaConfig.from_dict(values(image_token_index=50)))
    torch.manual_seed(0)
    inside = PaliGemma(PaliGemmaConfig.from_dict(values()))
    with torch.no_grad():
        shifted = ids.masked_fill(ids == 49, 50)
        torch.testing.assert_close(outside(shifted, pixels, mask, types), inside(ids, pixels, mask, types))


def test_too_few_placeholders_are_an_error(model, batch):
    ids, pixels, mask, types, _ = batch
    with pytest.raises(ValueError, match="8 <image> tokens for 4 patches"):
        model(ids, pixels[:1], mask, types)


def test_shared_parameters_count_once():
    linear = torch.nn.Linear(3, 4)
    both = torch.nn.ModuleList([linear, torch.nn.Linear(3, 4)])
    both[1].weight = linear.weight
    assert count_parameters(both) == 12 + 4 + 4
    config = PaliGemmaConfig.from_dict(values(tie_word_embeddings=False))
    tied = PaliGemma(PaliGemmaConfig.from_dict(values()))
    assert count_parameters(PaliGemma(config)) - count_parameters(tied) == 50 * 20


POCKET_CONFIG = json.loads((Path(sigma_book.__file__).parent / "pocket_model" / "config.json").read_text())


@pytest.mark.parametrize("bad", [None, "x", -1, [], True, math.nan], ids=repr)
@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("text_config", "max_position_embeddings"),
        ("text_config", "rms_norm_eps"),
        ("text_config", "vocab_size"),
        ("vision_config", "num_channels"),
        ("vision_config", "layer_norm_eps"),
    ],
)
def test_a_size_that_is_none_is_named(part, key, bad):
    values = copy.deepcopy(POCKET_CONFIG)
    values[part][key] = bad
    with pytest.raises(ValueError, match=rf"{part}\.{key} is .*: expected a"):
        PaliGemmaConfig.from_dict(values)


@pytest.mark.parametrize("bad", ["x", -1, [], True], ids=repr)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_that_is_no_table_is_named(part, bad):
    with pytest.raises(ValueError, match=f"{part} is .*: expected a table"):
        PaliGemmaConfig.from_dict(POCKET_CONFIG | {part: bad})
