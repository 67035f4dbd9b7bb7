"""Beam search against `transformers`: the same tokens, and sequence scores to 1e-5 of their size.

The reference runs with `early_stopping=False`, its default. Scores are float32 sums of at most 24 log-probabilities, whose
order of summation differs by rounding; with a negative length penalty they are multiplied by the length, so the bound is
relative where a score is larger than 1.
"""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from sigma_book.assemble import generate, load
from sigma_book.generation import generate_answers, search_beams

PROMPTS = ["caption en", "", "how many red stars are there?", "detect circle ; heart", "x y", "is there a blue ring?"]
GEMMA_2 = {
    "four_norms": True,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 5,
    "layer_types": ("sliding_attention", "full_attention"),
}
PENALTIES = (0.0, 0.6, 1.0, 2.0, -1.0)


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma, tied"])
def both(request, tmp_path_factory, make_tiny):
    options = {"gemma": {}, "gemma2": GEMMA_2, "gemma, tied": {"tie_word_embeddings": True}}[request.param]
    folder = make_tiny(tmp_path_factory.mktemp("beams") / "model", seed=1, **options)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return load(folder, device="cpu"), reference.eval()


def reference_beams(reference, batch, **options) -> tuple[list[list[int]], list[float]]:
    output = reference.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        pixel_values=batch.pixel_values,
        do_sample=False,
        early_stopping=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return output.sequences[:, batch.input_ids.shape[1] :].tolist(), output.sequences_scores.tolist()


def assert_same(beams, expected, scores) -> None:
    longest = max(len(beam.tokens) for beam in beams)
    for beam, row, score in zip(beams, expected, scores, strict=True):
        assert len(row) == longest and beam.tokens == row[: len(beam.tokens)]
        assert len(set(row[len(beam.tokens) :])) <= 1  # the reference fills with one token (eos, where padding is 0)
        assert abs(beam.score - score) <= 1e-5 * max(1.0, abs(score))


@pytest.mark.parametrize("width", [2, *(pytest.param(width, marks=pytest.mark.slow) for width in (3, 4))])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_padded_batch(both, pictures, width, penalty):
    """Stop tokens that some beams reach early, some late and some never; rows of different length, padded on the left."""
    model, reference = both
    batch = model.processor.prepare(pictures, PROMPTS)
    assert (batch.attention_mask == 0).any()
    free = [answer.tokens for answer in generate_answers(model, batch, str, max_new_tokens=12)]
    ended_early = 0
    for stop_ids in ([1], [free[0][3], free[1][7], free[2][1]]):
        given = {"num_beams": width, "length_penalty": penalty, "max_new_tokens": 12}
        expected, scores = reference_beams(reference, batch, eos_token_id=stop_ids, **given)
        beams = search_beams(model, batch, stop_ids=stop_ids, **given)
        assert_same(beams, expected, scores)
        ended_early += sum(len(beam.tokens) < 12 for beam in beams)
    assert ended_early or penalty > 0.6  # long answers are what a high penalty rewards


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_answers(both, pictures, width):
    """Through `generate_answers`: one beam is greedy decoding, here and there. Log-probabilities sum to the score."""
    model, reference = both
    batch = model.processor.prepare(pictures[:3], PROMPTS[:3])
    answers = generate_answers(model, batch, str, max_new_tokens=10, num_beams=width, length_penalty=0.6)
    if width == 1:
        output = reference.generate(
            **{
                name: getattr(batch, name) for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
            },
            do_sample=False,
            max_new_tokens=10,
        )
        expected, scores = output[:, batch.input_ids.shape[1] :].tolist(), None
    else:
        expected, scores = reference_beams(
            reference, batch, num_beams=width, length_penalty=0.6, max_new_tokens=10, eos_token_id=1
        )
    for row, answer in enumerate(answers):
        assert answer.tokens == expected[row][: len(answer.tokens)]
        if scores:
            assert sum(answer.logprobs) / len(answer.tokens) ** 0.6 == pytest.approx(scores[row], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("eager", [6.0, 30.0])
def test_endings_that_all_beams_want(tmp_path, make_tiny, pictures, width, eager):
    """The end's score is raised until it comes early in most beams, or at once in all."""
    folder = make_tiny(tmp_path / "model", seed=2)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = load(folder, device="cpu")
    head = model.lm_head.weight.clone()
    batch = model.processor.prepare(pictures, PROMPTS)
    with torch.no_grad():
        hidden = model.hidden_states(
            batch.input_ids, model.encode_images(batch.pixel_values), batch.attention_mask, batch.token_type_ids
        )[:, -1].mean(0)
        head[1] = eager * hidden / hidden.norm() ** 2 + 0.3 * head[1]
        model.lm_head.weight.copy_(head)
        reference.lm_head.weight.copy_(head)
    for penalty in PENALTIES:
        given = {"num_beams": width, "length_penalty": penalty, "max_new_tokens": 12}
        expected, scores = reference_beams(reference.eval(), batch, eos_token_id=1, **given)
        beams = search_beams(model, batch, **given)
        assert_same(beams, expected, scores)
        assert any(beam.tokens[-1] == 1 for beam in beams)


@pytest.mark.parametrize("longest", [1, 2])
def test_the_shortest_answers(both, pictures, longest):
    model, reference = both
    batch = model.processor.prepare(pictures[:2], PROMPTS[:2])
    given = {"num_beams": 3, "length_penalty": 1.0, "max_new_tokens": longest}
    assert_same(search_beams(model, batch, **given), *reference_beams(reference, batch, eos_token_id=1, **given))


@pytest.mark.parametrize("penalty", [1.4, 0.5])
def test_repetition_penalty(both, pictures, penalty):
    """The reference lowers log-probabilities, prompt included. One row: in a padded batch it would count padding as seen."""
    model, reference = both
    batch = model.processor.prepare(pictures[:1], PROMPTS[2:3])
    given = {"num_beams": 3, "max_new_tokens": 10, "repetition_penalty": penalty}
    expected, scores = reference_beams(reference, batch, eos_token_id=1, **given)
    [beam] = search_beams(model, batch, **given)
    assert_same([beam], expected, scores)
    if penalty < 1:  # tokens are repeated, and what is reported is the model's own
        assert sum(beam.logprobs) < beam.total - 0.1


def test_a_batch_is_what_one_by_one_is(both, pictures):
    model, _ = both
    together = generate(pictures, PROMPTS, model=model, max_new_tokens=10, num_beams=3)
    for picture, prompt, answer in zip(pictures, PROMPTS, together):
        assert generate(picture, prompt, model=model, max_new_tokens=10, num_beams=3) == answer


def test_two_images(both, pictures):
    model, reference = both
    batch = model.processor.prepare([pictures[:2], [pictures[2]]], PROMPTS[:2])
    given = {"num_beams": 2, "max_new_tokens": 8}
    assert_same(search_beams(model, batch, **given), *reference_beams(reference, batch, eos_token_id=1, **given))
