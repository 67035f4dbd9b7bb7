"""The model against `transformers`, on 48 generated configurations with random float32 weights.

The bounds: 1e-5 of the largest logit, of the loss, of the largest gradient. Float32 sums taken in another order differ
by about 1e-6; a wrong mask, scale, norm or position by 1e-2 and more (the last tests show it).
"""

import json
import random

import pytest
import torch
import transformers
from transformers import PaliGemmaForConditionalGeneration

from sigma_book.paligemma import TEXT_DEFAULTS, VISION_WHEN_ABSENT, PaliGemma, PaliGemmaConfig, count_parameters

TOLERANCE = 1e-5
STEPS = 32
BOS, NEWLINE, EOS = 2, 3, 1
WIDTHS = (20, 24, 36, 40, 44, 52, 60, 72)  # none is a power of two


def configuration(index: int) -> dict:
    """`config.json` number `index`: the demanded cases by turns, the rest drawn from the index."""
    draw = random.Random(index)
    kind = ("gemma", "gemma2")[index % 2]
    kv = (1, 2, "all")[index // 2 % 3]
    tied = index // 6 % 2 == 0
    grid = 2 + index % 9  # 4, 9, ... 100 image tokens
    heads = draw.choice((2, 4, 6) if kv == 2 else (2, 3, 4))
    if kv == 2 and heads == 2:
        heads = 4  # 2 is "all" there
    width = draw.choice([width for width in WIDTHS if width % heads == 0])
    head_dim = draw.choice([size for size in (6, 10, 14, 18) if size != width // heads])
    vocab = draw.randrange(101, 260)
    text = {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": draw.randrange(30, 90),
        "num_hidden_layers": draw.choice((2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv == "all" else kv,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": draw.choice((1e-6, 1e-5)),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice((10_000.0, 300.0))},
    }
    if kind == "gemma2":
        text |= {
            "sliding_window": (2, 3, 7, 20, 1000)[index // 2 % 5],  # 1000 is longer than any prompt here
            "query_pre_attn_scalar": draw.choice((8, 16, 40)),
            "attn_logit_softcapping": draw.choice((50.0, 2.0, None)),
            "final_logit_softcapping": draw.choice((30.0, 8.0, None)),
        }
        if index % 7 == 0:
            layers = text["num_hidden_layers"]
            text["layer_types"] = ["full_attention"] + ["sliding_attention"] * (layers - 1)
    vision_heads = draw.choice((1, 2, 3))
    patch = draw.choice((2, 3, 4))
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision_heads * draw.choice((12, 14, 17)),
        "intermediate_size": draw.randrange(20, 60),
        "num_hidden_layers": draw.choice((1, 2)),
        "num_attention_heads": vision_heads,
        "image_size": grid * patch,
        "patch_size": patch,
        "layer_norm_eps": draw.choice((1e-6, 1e-4)),
        "vision_use_head": False,
    }
    return {
        "model_type": "paligemma",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": vocab + index % 2 - 1,  # the last row of the embedding, or one behind it
        "hidden_size": width,
        "projection_dim": width,
        "tie_word_embeddings": tied,
    }


CONFIGURATIONS = {index: configuration(index) for index in range(48)}


def name(index: int) -> str:
    text = CONFIGURATIONS[index]["text_config"]
    return f"{index}-{text['model_type']}-kv{text['num_key_value_heads']}of{text['num_attention_heads']}"


every = pytest.mark.parametrize("index", CONFIGURATIONS, ids=name)
FEW = [index for index in CONFIGURATIONS if index % 7 < 2]
a_third = pytest.mark.parametrize(  # the others are slow
    "index",
    [pytest.param(i, marks=[pytest.mark.slow] * (i not in FEW), id=name(i)) for i in CONFIGURATIONS],
)


def test_the_configurations_hold_what_they_should():
    texts = [config["text_config"] for config in CONFIGURATIONS.values()]
    tokens = {
        (c["vision_config"]["image_size"] // c["vision_config"]["patch_size"]) ** 2 for c in CONFIGURATIONS.values()
    }
    assert len(texts) >= 40 and len(FEW) <= 16
    for chosen in ([*CONFIGURATIONS.values()], [CONFIGURATIONS[index] for index in FEW]):
        for kind in ("gemma", "gemma2"):
            ours = [text for text in (config["text_config"] for config in chosen) if text["model_type"] == kind]
            assert any(text["num_key_value_heads"] == 1 for text in ours)
            assert any(text["num_key_value_heads"] == 2 < text["num_attention_heads"] for text in ours)
            assert any(text["num_key_value_heads"] == text["num_attention_heads"] for text in ours)
            assert len({config["tie_word_embeddings"] for config in chosen if config["text_config"] in ours}) == 2
        assert {text["sliding_window"] for text in ours} == {2, 3, 7, 20, 1000}
        assert any("layer_types" in text for text in ours)
    assert all(text["head_dim"] * text["num_attention_heads"] != text["hidden_size"] for text in texts)
    assert all(text["hidden_size"] & (text["hidden_size"] - 1) for text in texts)  # no power of two
    assert min(tokens) == 4 and max(tokens) == 100
    assert any(text.get("sliding_window", 1000) < 4 for text in texts)  # shorter than any prompt


@pytest.fixture(scope="module")
def measured():
    """The largest value of each kind over all configurations, printed at the end (pytest -s shows it)."""
    worst: dict[str, float] = {}
    yield lambda kind, value: worst.update({kind: max(value, worst.get(kind, 0.0))})
    print("\nlargest:", ", ".join(f"{kind} {value:.1e}" for kind, value in sorted(worst.items())))


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape and ours.dtype == reference.dtype == torch.float32
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def reference_greedy(model, input_ids, attention_mask, pixel_values):
    """`generate` of the reference: tokens (B, STEPS + 1) and logits, a list of (B, V)."""
    out = model.generate(
        input_ids=input_ids,
        pixel_values=pixel_values,
        attention_mask=attention_mask,
        token_type_ids=torch.zeros_like(input_ids),
        max_new_tokens=STEPS + 1,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, input_ids.shape[1] :], out.logits


@torch.no_grad()
def our_greedy(model, input_ids, attention_mask, pixel_values):
    """The same with `prefill` and `decode`."""
    caches = model.language_model.new_caches(len(input_ids), input_ids.shape[1] + STEPS)
    logits = [model.prefill(input_ids, model.encode_images(pixel_values), attention_mask, caches)]
    tokens = [logits[0].argmax(-1, keepdim=True)]
    for _ in range(STEPS):
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens[-1])], dim=1)
        logits.append(model.decode(tokens[-1], attention_mask, caches))
        tokens.append(logits[-1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1), logits


def margin(logits) -> float:
    """The smallest lead of a best token over the second, as a share of the largest logit."""
    best, second = torch.stack(list(logits)).topk(2, dim=-1).values.unbind(-1)
    return ((best - second).min() / torch.stack(list(logits)).abs().max()).item()


@a_third
def test_prefill_and_32_cached_steps(index, make_twins, pad_rows, measured):
    twins = make_twins(CONFIGURATIONS[index])
    generator = torch.Generator().manual_seed(index)
    rows = [twins.prompt(words, generator) for words in (5, 0, 2)]
    input_ids, attention_mask = pad_rows(rows, "left")
    pixel_values = twins.pictures(3, generator)
    # Greedy choices are compared where they are choices: weights whose two best tokens come within 1e-4 of each other
    # somewhere, ten tolerances, are drawn again. The bound on the logits stands for any weights.
    for attempt in range(20):
        twins.redraw(1000 * attempt + index)
        expected_tokens, expected = reference_greedy(twins.reference, input_ids, attention_mask, pixel_values)
        if margin(expected) > 10 * TOLERANCE:
            break
    else:
        pytest.fail("no weights without near ties")
    tokens, logits = our_greedy(twins.ours, input_ids, attention_mask, pixel_values)
    errors = [relative(*pair) for pair in zip(logits, expected, strict=True)]
    measured("logits of prefill", errors[0])
    measured("logits of 32 steps", max(errors[1:]))
    assert len(errors) == STEPS + 1
    assert max(errors) <= TOLERANCE
    assert torch.equal(tokens, expected_tokens)
    measured("different tokens in a batch", len(tokens.unique()))
    for row, ids in enumerate(rows):  # one by one, without any padding
        alone = torch.tensor([ids])
        single, single_logits = our_greedy(twins.ours, alone, torch.ones_like(alone), pixel_values[row : row + 1])
        assert torch.equal(single[0], expected_tokens[row])
        assert max(relative(o[0], r[row]) for o, r in zip(single_logits, expected, strict=True)) <= TOLERANCE
        if row == 0:
            reference, _ = reference_greedy(twins.reference, alone, torch.ones_like(alone), pixel_values[:1])
            assert torch.equal(single, reference)


@pytest.mark.parametrize("side", ["left", "right"])
@every
def test_forward_loss_and_gradients(index, side, make_twins, pad_rows, measured):
    if side == "left" and index % 4 > 1:  # half of them: the masks are the same, the padding stands elsewhere
        side = "none"
    twins = make_twins(CONFIGURATIONS[index])
    twins.redraw(index)
    generator = torch.Generator().manual_seed(index)
    prompts = [twins.prompt(words, generator) for words in (4, 1, 0)]
    answers = [torch.randint(4, 90, (count,), generator=generator).tolist() + [EOS] for count in (3, 9, 0)]
    if side == "none":
        prompts, answers = prompts[:1], answers[:1]
    input_ids, attention_mask = pad_rows(
        [p + a for p, a in zip(prompts, answers)], "left" if side == "left" else "right"
    )
    types, _ = pad_rows(
        [[0] * len(p) + [1] * len(a) for p, a in zip(prompts, answers)], "left" if side == "left" else "right"
    )
    labels = torch.where(types == 1, input_ids, -100)
    pixel_values = twins.pictures(len(prompts), generator)

    out = twins.reference(
        input_ids=input_ids,
        pixel_values=pixel_values,
        attention_mask=attention_mask,
        token_type_ids=types,
        position_ids=attention_mask.cumsum(-1).clamp(min=1),
        labels=labels,
    )
    out.loss.backward()
    loss = twins.ours.loss(input_ids, pixel_values, attention_mask, types, labels)
    loss.backward()
    with torch.no_grad():
        logits = twins.ours(input_ids, pixel_values, attention_mask, types)
    real = attention_mask.bool()
    logit_error = relative(logits[real], out.logits.detach()[real])
    loss_error = abs(loss.item() - out.loss.item())
    reference = {key.removeprefix("model."): value.grad for key, value in twins.reference.named_parameters()}
    ours = {key: value.grad for key, value in twins.ours.named_parameters()}
    assert reference.keys() == ours.keys()
    largest = max(gradient.abs().max() for gradient in reference.values())
    gradient_error = (max((ours[key] - reference[key]).abs().max() for key in ours) / largest).item()
    measured("logits of forward", logit_error)
    measured("loss", loss_error)
    measured("gradient", gradient_error)
    assert logit_error <= TOLERANCE
    assert loss_error <= TOLERANCE
    assert gradient_error <= TOLERANCE


@pytest.mark.parametrize("index", [0, 1, 3, 8, 9], ids=name)
def test_two_images_in_a_prompt(index, make_twins, pad_rows):
    """Rows with two pictures, with one, and with two that words stand between, in one batch."""
    twins = make_twins(CONFIGURATIONS[index])
    twins.redraw(index)
    generator = torch.Generator().manual_seed(index)
    image = [twins.ours.config.image_token_id] * twins.ours.config.num_image_tokens
    rows = [
        twins.prompt(3, generator, images=2),
        twins.prompt(1, generator),
        image + [7, 8] + image + [BOS, 9, NEWLINE],
    ]
    input_ids, attention_mask = pad_rows(rows, "left")
    pixel_values = twins.pictures(5, generator)
    tokens, logits = our_greedy(twins.ours, input_ids, attention_mask, pixel_values)
    _, expected = reference_greedy(twins.reference, input_ids, attention_mask, pixel_values)
    assert relative(logits[0], expected[0]) <= TOLERANCE
    types = torch.zeros_like(input_ids)
    with torch.no_grad():
        everywhere = twins.ours(input_ids, pixel_values, attention_mask, types)
        reference = twins.reference(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            token_type_ids=types,
            position_ids=attention_mask.cumsum(-1).clamp(min=1),
        ).logits
        swapped = twins.ours(input_ids, pixel_values[[1, 0, 2, 3, 4]], attention_mask, types)
    real = attention_mask.bool()
    assert relative(everywhere[real], reference[real]) <= TOLERANCE
    assert relative(swapped[0], everywhere[0]) > 1e-3  # their order matters
    torch.testing.assert_close(swapped[1:], everywhere[1:], rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind, attention, reads",
    [("gemma", "sdpa", "everything"), ("gemma", "eager", "the past"), ("gemma2", "eager", "the past")],
)
def test_what_the_reference_does_without_token_type_ids(kind, attention, reads, make_twins):
    """Both ways are wrong: the answer leaks into what comes before it, or the prompt is read left to right.

    Which one it is depends on the attention kernel: Gemma 1 runs with sdpa by default, Gemma 2 with eager.
    """
    index = next(i for i, config in CONFIGURATIONS.items() if config["text_config"]["model_type"] == kind and i > 20)
    config = json.loads(json.dumps(CONFIGURATIONS[index]))
    if kind == "gemma2":
        config["text_config"]["sliding_window"] = 1000
    twins = make_twins(config, attention)
    twins.redraw(index)
    generator = torch.Generator().manual_seed(index)
    ids = torch.tensor([[*twins.prompt(4, generator), 10, 11, 12]])
    types = torch.tensor([[0] * (ids.shape[1] - 3) + [1] * 3])
    attention_mask = torch.ones_like(ids)
    pixel_values = twins.pictures(1, generator)
    answer_changed, prompt_changed = ids.clone(), ids.clone()
    answer_changed[0, -1] = 20
    prompt_changed[0, -5] = 4 + (ids[0, -5] + 1) % 80  # the last word of the prompt

    @torch.no_grad()
    def first(model_ids, **more):  # the logits at the first place, a patch of the picture
        out = twins.reference(input_ids=model_ids, attention_mask=attention_mask, pixel_values=pixel_values, **more)
        return out.logits[0, 0]

    def moved(changed, **more) -> bool:
        return relative(first(changed, **more), first(ids, **more)) > 1e-4

    # handed over: the prompt sees itself whole, and nobody sees the answer to come
    assert moved(prompt_changed, token_type_ids=types)
    assert not moved(answer_changed, token_type_ids=types)
    # left out
    assert moved(prompt_changed) is (reads == "everything")
    assert moved(answer_changed) is (reads == "everything")
    with torch.no_grad():
        ours = twins.ours(ids, pixel_values, attention_mask, types)[0, 0]
        as_if = torch.zeros_like(types) if reads == "everything" else torch.ones_like(types)
        wrong = twins.ours(ids, pixel_values, attention_mask, as_if)[0, 0]
    assert relative(ours, first(ids, token_type_ids=types)) <= TOLERANCE
    assert relative(ours, first(ids)) > 1e-3
    assert relative(wrong, first(ids)) <= TOLERANCE


# ---- config.json --------------------------------------------------------------------------------------------------

SPARSE = {
    "nothing": {},
    "gemma alone": {"text_config": {"model_type": "gemma"}},
    "gemma2 alone": {"text_config": {"model_type": "gemma2"}},
    "empty text": {"text_config": {}},
    "empty vision": {"vision_config": {}},
    "vision by name": {"vision_config": {"model_type": "siglip_vision_model"}, "text_config": {"model_type": "gemma2"}},
    "the 3B file": {
        "image_token_index": 257152,
        "projection_dim": 2048,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 256,
            "num_key_value_heads": 1,
            "vocab_size": 257216,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "projection_dim": 2048,
            "vision_use_head": False,
        },
    },
    "heads untied above": {"tie_word_embeddings": False, "text_config": {"model_type": "gemma"}},
    "heads untied below": {"text_config": {"model_type": "gemma", "tie_word_embeddings": False}},
    "old rope": {"text_config": {"model_type": "gemma", "rope_theta": 500.0}},
    "new rope": {"text_config": {"model_type": "gemma2", "rope_parameters": {"rope_theta": 700.0}}},
    "image_token_id": {"image_token_id": 77},
    "no window, no caps": {
        "text_config": {
            "model_type": "gemma2",
            "sliding_window": None,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
    },
    "other layers": {
        "text_config": {"model_type": "gemma2", "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    },
    "odd layers": {"text_config": {"model_type": "gemma2", "num_hidden_layers": 5}},
    "another eos": {"text_config": {"model_type": "gemma", "eos_token_id": 107, "pad_token_id": 5}},
}
TEXT_FIELDS = [*TEXT_DEFAULTS["gemma"], "rms_norm_eps", "max_position_embeddings"]
GEMMA_2_FIELDS = [key for key in TEXT_DEFAULTS["gemma2"] if key not in TEXT_DEFAULTS["gemma"]]
VISION_FIELDS = [*VISION_WHEN_ABSENT, "num_channels", "layer_norm_eps"]


def same_meaning(ours: PaliGemmaConfig, reference: transformers.PaliGemmaConfig) -> None:
    """Everything the model is built from, field by field."""
    text, vision = reference.text_config, reference.vision_config
    for field in TEXT_FIELDS:
        assert getattr(ours.text, field) == getattr(text, field), field
    for field in VISION_FIELDS:
        assert getattr(ours.vision, field) == getattr(vision, field), field
    two = text.model_type == "gemma2"
    assert ours.text.four_norms is two
    for field in GEMMA_2_FIELDS:
        assert getattr(ours.text, field) == (getattr(text, field) if two else None), field
    assert ours.text.layer_types == (tuple(text.layer_types) if two else None)
    assert ours.text.rope_theta == text.rope_parameters["rope_theta"]
    assert ours.text.tie_word_embeddings == reference.tie_word_embeddings
    assert ours.image_token_id == reference.image_token_index
    assert ours.num_image_tokens == text.num_image_tokens
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(ours, field) == getattr(text, field), field


@pytest.mark.parametrize("case", SPARSE)
def test_absent_keys_mean_the_defaults_of_the_reference(case):
    values = {"model_type": "paligemma", **SPARSE[case]}
    reference = transformers.PaliGemmaConfig(**json.loads(json.dumps(SPARSE[case])))
    ours = PaliGemmaConfig.from_dict(values)
    same_meaning(ours, reference)
    assert PaliGemmaConfig.from_dict(json.loads(reference.to_json_string())) == ours  # what the reference writes


@pytest.mark.parametrize("case", SPARSE)
def test_to_dict_goes_round_and_the_reference_reads_it(case, tmp_path):
    ours = PaliGemmaConfig.from_dict({"model_type": "paligemma", **SPARSE[case]})
    text = json.dumps(ours.to_dict())
    assert PaliGemmaConfig.from_dict(json.loads(text)) == ours
    (tmp_path / "config.json").write_text(text)
    reference = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(reference) is transformers.PaliGemmaConfig
    same_meaning(ours, reference)
    assert reference.vision_config.vision_use_head is False
    assert reference.projection_dim == reference.vision_config.projection_dim == ours.text.hidden_size


@every
def test_generated_configurations_go_round(index):
    reference = transformers.PaliGemmaConfig(**json.loads(json.dumps(CONFIGURATIONS[index])))
    ours = PaliGemmaConfig.from_dict(json.loads(reference.to_json_string()))
    same_meaning(ours, reference)
    same_meaning(ours, transformers.PaliGemmaConfig(**json.loads(json.dumps(ours.to_dict()))))


# ---- full sizes, without memory -----------------------------------------------------------------------------------


def full_size(text: dict, image_size: int = 224) -> dict:
    return {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "hidden_size": text["hidden_size"],
        "projection_dim": text["hidden_size"],
        "text_config": {"vocab_size": 257216, **text},
        "vision_config": SPARSE["the 3B file"]["vision_config"] | {"image_size": image_size},
    }


def gemma_2(layers, width, inner, heads, kv_heads, head_dim, scalar) -> dict:
    return {
        "model_type": "gemma2",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
    }


FULL_SIZES = {
    "PaliGemma 3B": full_size(SPARSE["the 3B file"]["text_config"]),
    "PaliGemma 3B, 896 px": full_size(SPARSE["the 3B file"]["text_config"], 896),
    "PaliGemma 2 3B": full_size(gemma_2(26, 2304, 9216, 8, 4, 256, 256)),
    "PaliGemma 2 10B": full_size(gemma_2(42, 3584, 14336, 16, 8, 256, 256)),
    "PaliGemma 2 28B": full_size(gemma_2(46, 4608, 36864, 32, 16, 128, 144), 448),
}


@pytest.mark.parametrize("case", FULL_SIZES)
def test_full_structure_on_the_meta_device(case):
    with torch.device("meta"):
        reference = PaliGemmaForConditionalGeneration(
            transformers.PaliGemmaConfig(**json.loads(json.dumps(FULL_SIZES[case])))
        )
        ours = PaliGemma(PaliGemmaConfig.from_dict(FULL_SIZES[case]))
    expected = {key.removeprefix("model."): tuple(value.shape) for key, value in reference.named_parameters()}
    assert {key: tuple(value.shape) for key, value in ours.named_parameters()} == expected
    assert set(ours.state_dict()) == set(expected)  # and no buffers beside them
    assert count_parameters(ours) == reference.num_parameters()
    if case == "PaliGemma 3B":
        assert count_parameters(ours) == 2_923_466_480


def test_the_bounds_can_fail(make_twins, pad_rows):
    """A mistake of each usual kind moves the logits by far more than the tolerance."""
    index = next(i for i, c in CONFIGURATIONS.items() if c["text_config"].get("sliding_window") == 3)
    twins = make_twins(CONFIGURATIONS[index])
    twins.redraw(index)
    generator = torch.Generator().manual_seed(index)
    ids, mask = pad_rows(
        [[*twins.prompt(6, generator), 10, 11, 12, 13, 14], [*twins.prompt(1, generator), 9, 8]], "left"
    )
    types = torch.zeros_like(ids)
    types[0, -5:] = types[1, -2:] = 1
    pixels = twins.pictures(2, generator)
    with torch.no_grad():
        right = twins.ours(ids, pixels, mask, types)[0]
        wrong = {
            "all causal": twins.ours(ids, pixels, mask, torch.ones_like(ids))[0],
            "all prefix": twins.ours(ids, pixels, mask, torch.zeros_like(ids))[0],
        }
        padded = twins.ours(ids, pixels, torch.ones_like(mask), types)[1, -1]
        assert relative(padded, twins.ours(ids, pixels, mask, types)[1, -1]) > 1e-3
        for layer in twins.ours.language_model.layers:
            layer.input_layernorm.weight -= 1  # weight in place of 1 + weight
        wrong["norm"] = twins.ours(ids, pixels, mask, types)[0]
    for kind, logits in wrong.items():
        assert relative(logits, right) > 1e-3, kind
