"""Generation against `transformers`: the same tokens, and logits processors equal on random scores.

Scores are compared exactly where both sides do the same float32 operation, and to 1e-5 (absolute, on log-probabilities
around -5) where sums may run in another order.
"""

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sigma_book.assemble import load
from sigma_book.generation import (
    Sampling,
    apply_temperature,
    choose,
    generate_answers,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    row_generators,
    seen_tokens,
)

PROMPTS = ["caption en", "", "how many red stars are there?", "detect circle ; heart", "x y", "is there a blue ring?"]
GEMMA_2 = {
    "four_norms": True,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 5,
    "layer_types": ("sliding_attention", "full_attention"),
}


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma, tied"])
def both(request, tmp_path_factory, make_tiny):
    """Our model and the reference, both loaded from one folder."""
    options = {"gemma": {}, "gemma2": GEMMA_2, "gemma, tied": {"tie_word_embeddings": True}}[request.param]
    folder = make_tiny(tmp_path_factory.mktemp("parity") / "model", seed=1, **options)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return load(folder, device="cpu"), reference.eval()


def ask_reference(reference, batch, **options) -> list[list[int]]:
    """What the reference answers to our batch: ids behind the prompt, one list for each row."""
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": batch.pixel_values}
    output = reference.generate(**given, token_type_ids=batch.token_type_ids, **options)
    return output[:, batch.input_ids.shape[1] :].tolist()


def one_row(model, picture, prompt):
    return model.processor.prepare([picture], [prompt])


@pytest.mark.parametrize("penalty", [1.0, 1.3, pytest.param(0.7, marks=pytest.mark.slow)])
def test_greedy_one_by_one(both, pictures, penalty):
    model, reference = both
    said = []
    for picture, prompt in zip(pictures, PROMPTS):
        batch = one_row(model, picture, prompt)
        expected = ask_reference(
            reference, batch, max_new_tokens=24, do_sample=False, repetition_penalty=penalty, eos_token_id=1
        )
        [answer] = generate_answers(model, batch, str, max_new_tokens=24, sampling=Sampling(repetition_penalty=penalty))
        assert answer.tokens == expected[0]
        said.append(tuple(answer.tokens))
    assert len(set(said)) == len(said)  # else the test could not tell one picture from another


def test_greedy_batch(both, pictures):
    model, reference = both
    batch = model.processor.prepare(pictures, PROMPTS)
    assert (batch.attention_mask == 0).any()  # rows differ in length
    expected = ask_reference(reference, batch, max_new_tokens=24, do_sample=False, eos_token_id=1)
    answers = generate_answers(model, batch, str, max_new_tokens=24)
    assert [answer.tokens for answer in answers] == expected


def test_rows_that_stop_early(both, pictures):
    """Stop tokens that come up in the middle of some answers: the reference pads those rows, we end them."""
    model, reference = both
    batch = model.processor.prepare(pictures, PROMPTS)
    free = [answer.tokens for answer in generate_answers(model, batch, str, max_new_tokens=16)]
    stop_ids = [1, free[0][3], free[1][7], free[2][12]]
    expected = ask_reference(
        reference, batch, max_new_tokens=16, do_sample=False, eos_token_id=stop_ids, pad_token_id=0
    )
    answers = generate_answers(model, batch, str, max_new_tokens=16, stop_ids=stop_ids)
    assert len({len(answer.tokens) for answer in answers}) > 1
    for answer, row in zip(answers, expected):
        assert answer.tokens == row[: len(answer.tokens)]
        assert set(row[len(answer.tokens) :]) <= {0}


def test_two_images(both, pictures):
    model, reference = both
    batch = model.processor.prepare([pictures[:2], [pictures[2]]], PROMPTS[:2])
    expected = ask_reference(reference, batch, max_new_tokens=12, do_sample=False, eos_token_id=1)
    assert [answer.tokens for answer in generate_answers(model, batch, str, max_new_tokens=12)] == expected


def test_logprobs(both, pictures):
    """`compute_transition_scores` on the raw logits, normalized: the model's own distribution."""
    model, reference = both
    batch = model.processor.prepare(pictures, PROMPTS)
    output = reference.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        pixel_values=batch.pixel_values,
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=1.2,  # must leave no trace in the log-probabilities
        eos_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = reference.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
    answers = generate_answers(model, batch, str, max_new_tokens=16, sampling=Sampling(repetition_penalty=1.2))
    for answer, row in zip(answers, expected):
        torch.testing.assert_close(torch.tensor(answer.logprobs), row[: len(answer.logprobs)], rtol=0, atol=1e-5)


def random_scores(seed: int, rows: int = 5, vocab: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    logits[0, 10:20] = logits[0].max()  # ties at the top
    logits[1] = 0.0  # all equal
    logits[2, 7] = 60.0  # one token has all the probability
    ids = torch.randint(vocab + 3, (rows, 40), generator=generator)  # some behind the last score, as <image> is
    return logits, ids


@pytest.mark.parametrize("seed", range(5))
def test_processors_on_random_logits(seed):
    logits, ids = random_scores(seed)
    everything = torch.ones_like(ids)
    for temperature in (0.1, 0.7, 1.0, 3.0):
        assert torch.equal(apply_temperature(logits, temperature), TemperatureLogitsWarper(temperature)(ids, logits))
    for k in (1, 2, 7, 299, 300, 5000):
        assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(ids, logits))
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(ids, logits))
    seen = seen_tokens(ids, everything, logits.shape[-1])
    for penalty in (0.5, 1.0, 1.2, 10.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_all_processors_in_order():
    """What may be drawn after penalty, temperature, top-k and top-p, and how often, is what the reference says."""
    logits, ids = random_scores(0)
    reference = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.5),
            TemperatureLogitsWarper(2.0),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.8),
        ]
    )
    expected = reference(ids, logits.clone()).softmax(-1)  # (B, V)
    sampling = Sampling(temperature=2.0, top_k=12, top_p=0.8, repetition_penalty=1.5)
    seen = seen_tokens(ids, torch.ones_like(ids), logits.shape[-1])
    generators = row_generators(0, len(logits))
    counts = torch.zeros_like(logits)
    draws = 4000
    for _ in range(draws):
        counts.scatter_add_(-1, choose(logits, sampling, seen, generators)[:, None], torch.ones(len(logits), 1))
    assert not counts[expected == 0].any()
    # five standard deviations of a binomial share, the widest of which is 0.5 / sqrt(draws)
    assert (counts / draws - expected).abs().max() < 5 * 0.5 / draws**0.5
