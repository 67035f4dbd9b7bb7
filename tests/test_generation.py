"""Generation: what can be told without the reference; tests/parity/test_generation.py has the rest."""

import io
import itertools
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_book import assemble, generate, load
from sigma_book.generation import (
    AnswerText,
    Sampling,
    answer_limits,
    draw_one,
    generate_answers,
    generate_tokens,
    keep_top_k,
    keep_top_p,
    read_stop_ids,
    row_generators,
    search_beams,
    seen_tokens,
    stream_answer,
)
from sigma_book.processor import Tokenizer

PROMPTS = ["caption en", "", "how many red stars are there?", "detect circle ; heart", "x y", "is there a blue ring?"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_folder(tokenizer_folder)


# choosing


def test_draw_follows_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0], [5.0, -math.inf, -math.inf, -math.inf]])
    generators = row_generators(0, 2)
    drawn = torch.stack([draw_one(logits, generators) for _ in range(4000)])  # (4000, 2)
    shares = torch.bincount(drawn[:, 0], minlength=4) / 4000
    assert shares[2] == 0 and (drawn[:, 1] == 0).all()
    assert (shares - logits[0].softmax(-1)).abs().max() < 5 * 0.5 / 4000**0.5  # five standard deviations at most


def test_rows_draw_from_their_own_generators():
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    together = row_generators(7, 3)
    alone = [row_generators(7 + row, 1) for row in range(3)]
    for _ in range(20):
        expected = torch.cat([draw_one(logits[row : row + 1], alone[row]) for row in range(3)])
        assert torch.equal(draw_one(logits, together), expected)


def test_no_seed_follows_torch():
    torch.manual_seed(3)
    first = [torch.rand(1, generator=generator) for generator in row_generators(None, 2)]
    torch.manual_seed(3)
    assert first == [torch.rand(1, generator=generator) for generator in row_generators(None, 2)]
    assert first != [torch.rand(1, generator=generator) for generator in row_generators(None, 2)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40), st.floats(0.01, 1), st.integers(1, 50))
def test_what_is_kept(scores, p, k):
    logits = torch.tensor([scores])
    kept = keep_top_p(logits, p).isfinite()[0]
    probabilities = logits.softmax(-1)[0]
    assert probabilities[kept].sum() >= p - 1e-4  # enough of them, up to float32 sums of 40 numbers
    assert logits[0, kept].max() == logits.max()
    if (~kept).any():
        assert probabilities[kept].min() >= probabilities[~kept].max()
    # and no more than needed: without the least of them there were too few
    assert kept.sum() == 1 or probabilities[kept].sum() - probabilities[kept].min() <= p + 1e-4
    best = keep_top_k(logits, k).isfinite()
    assert best.sum() >= min(k, len(scores))
    assert (logits > logits[best].min()).sum() < k  # ties with the last one stay


def test_padding_was_not_seen():
    ids, mask = torch.tensor([[0, 0, 5, 9], [1, 2, 3, 5]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert seen_tokens(ids, mask, 8).nonzero().tolist() == [[0, 5], [1, 1], [1, 2], [1, 3], [1, 5]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", 10**400),
        ("temperature", math.inf),
        ("temperature", 1e39),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", -1.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", 0),
        ("top_k", -3),
        ("top_k", 2.0),
        ("top_k", True),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e40),
        ("repetition_penalty", math.nan),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", 2**64),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Sampling(**{name: value})


def test_settings_from_numpy():
    Sampling(temperature=np.float32(0.5), top_p=np.float64(0.5), top_k=np.int64(3), seed=np.int32(4))


def test_settings_as_fractions(tiny_model, pictures):
    half, more = Fraction(1, 2), Fraction(3, 2)
    ask = {"model": tiny_model, "max_new_tokens": 4, "seed": 1}
    answer = generate(pictures[0], "x", temperature=half, top_p=half, repetition_penalty=more, **ask)
    assert answer == generate(pictures[0], "x", temperature=0.5, top_p=0.5, repetition_penalty=1.5, **ask)


def test_tiny_temperatures_take_the_best(tiny_model, pictures):
    best = generate(pictures[0], "caption en", model=tiny_model, max_new_tokens=8)
    for temperature in (1e-300, 1e-7, 1e-6):
        assert best == generate(pictures[0], "caption en", model=tiny_model, max_new_tokens=8, temperature=temperature)
    assert best == generate(pictures[0], "caption en", model=tiny_model, max_new_tokens=8, temperature=2.0, top_k=1)
    assert best == generate(pictures[0], "caption en", model=tiny_model, max_new_tokens=8, temperature=2.0, top_p=1e-9)


# the loop


def batch_of(model, pictures, prompts):
    return model.processor.prepare(pictures, prompts)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=1.5, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=11),
    ],
)
def test_a_batch_is_what_one_by_one_is(tiny_model, pictures, sampling):
    decode = tiny_model.processor.tokenizer.decode
    together = generate_answers(
        tiny_model, batch_of(tiny_model, pictures, PROMPTS), decode, max_new_tokens=20, sampling=sampling
    )
    for row, (picture, prompt) in enumerate(zip(pictures, PROMPTS)):
        alone = replace(sampling, seed=None if sampling.seed is None else sampling.seed + row)
        batch = batch_of(tiny_model, [picture], [prompt])
        [answer] = generate_answers(tiny_model, batch, decode, max_new_tokens=20, sampling=alone)
        assert (answer.text, answer.tokens) == (together[row].text, together[row].tokens)
        torch.testing.assert_close(answer.logprobs, together[row].logprobs, rtol=0, atol=1e-4)
    assert len({tuple(answer.tokens) for answer in together}) == len(PROMPTS)


def test_greedy_equals_reading_everything_anew(tiny_model, pictures):
    """No cache: the whole sequence through `forward` at each step, the answer as suffix."""
    batch = batch_of(tiny_model, pictures[:1], ["caption en"])
    [answer] = generate_answers(tiny_model, batch, str, max_new_tokens=12)
    ids, types = batch.input_ids, batch.token_type_ids
    for token, logprob in zip(answer.tokens, answer.logprobs):
        with torch.no_grad():
            logits = tiny_model(ids, batch.pixel_values, torch.ones_like(ids), types)[0, -1]
        assert int(logits.argmax()) == token
        assert float(logits.log_softmax(-1)[token]) == pytest.approx(logprob, abs=1e-4)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        types = torch.cat([types, torch.tensor([[1]])], dim=1)


def test_rows_stop_by_themselves(tiny_model, pictures):
    batch = batch_of(tiny_model, pictures, PROMPTS)
    free = generate_answers(tiny_model, batch, str, max_new_tokens=16)
    stop_ids = [free[0].tokens[2], free[1].tokens[9]]
    stopped = generate_answers(tiny_model, batch, str, max_new_tokens=16, stop_ids=stop_ids)
    for before, after in zip(free, stopped):
        end = next((n + 1 for n, token in enumerate(before.tokens) if token in stop_ids), 16)
        assert after.tokens == before.tokens[:end]
        assert after.logprobs == pytest.approx(before.logprobs[:end], abs=1e-4)
    assert len(stopped[0].tokens) == 3


def test_a_row_may_be_ended_from_outside(tiny_model, pictures):
    batch = batch_of(tiny_model, pictures[:3], PROMPTS[:3])
    lengths = dict.fromkeys(range(3), 0)

    def is_over(row, token):
        lengths[row] += 1
        return lengths[row] == (4, 1, 9)[row]

    steps = [[pick.row for pick in picks] for picks in generate_tokens(tiny_model, batch, is_over=is_over)]
    assert steps == [[0, 1, 2]] + [[0, 2]] * 3 + [[2]] * 5


def test_max_new_tokens(tiny_model, pictures):
    batch = batch_of(tiny_model, pictures[:1], ["x"])
    for count in (1, 2, 7):
        [answer] = generate_answers(tiny_model, batch, str, max_new_tokens=count, stop_ids=[])
        assert len(answer.tokens) == count


def test_the_context_bounds_the_answer(tiny_model, pictures):
    """Each row has the room that its own prompt leaves, whatever the padding."""
    context = tiny_model.config.text.max_position_embeddings
    batch = batch_of(tiny_model, pictures[:2], ["x" * 60, "x"])
    lengths = batch.attention_mask.sum(-1).tolist()
    answers = generate_answers(tiny_model, batch, str, max_new_tokens=500, stop_ids=[])
    assert [len(answer.tokens) for answer in answers] == [context - length for length in lengths]


def test_a_prompt_longer_than_the_context():
    mask = torch.ones(2, 10, dtype=torch.long)
    assert answer_limits(mask, 5, 11) == [1, 1]
    with pytest.raises(ValueError, match="prompt 0 has 10 tokens, .* context is 10 tokens.*shorten it by 1 "):
        answer_limits(mask, 5, 10)
    with pytest.raises(ValueError, match="the prompt has 10 tokens.*shorten it by 4 "):
        answer_limits(mask[:1], 5, 7)


def test_scores_that_are_not_finite(tiny_folder, pictures):
    model = load(tiny_folder, device="cpu")
    model.language_model.norm.weight[0] = math.nan
    with pytest.raises(RuntimeError, match="inf or nan in float32"):
        generate(pictures[0], "x", model=model)


def test_stop_ids_from_the_folder(tmp_path):
    path = tmp_path / "generation_config.json"
    assert read_stop_ids(tmp_path, 1) == [1]
    for content, expected in (
        ("{}", [1]),
        ('{"eos_token_id": 5}', [5]),
        ('{"eos_token_id": [5, 6]}', [5, 6]),
        ('{"eos_token_id": null}', [1]),
    ):
        path.write_text(content)
        assert read_stop_ids(tmp_path, 1) == expected
    for content in ("[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": []}', '{"eos_token_id": true}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="generation_config.json"):
            read_stop_ids(tmp_path, 1)
    for content in ('{"eos_token_id": -5}', '{"eos_token_id": [1, -5]}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match="generation_config.json"):
            read_stop_ids(tmp_path, 1)
    path.unlink()
    path.mkdir()
    with pytest.raises(RuntimeError, match="generation_config.json cannot be read"):
        read_stop_ids(tmp_path, 1)


@pytest.mark.parametrize("config", [{"eos_token_id": [5, 6]}, {"text_config": {"eos_token_id": [5, 6]}}])
def test_stop_ids_that_the_configuration_lists(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_stop_ids(tmp_path, 5) == [5, 6]
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_stop_ids(tmp_path, 5) == [5, 6]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')  # it has the say
    assert read_stop_ids(tmp_path, 5) == [7]


# beams; tests/parity/test_beams.py has the comparison with the reference


def every_sentence(model, batch, words, length):
    """The log-probability of every sequence of these words, by reading each as a whole."""
    sentences = list(itertools.product(words, repeat=length))
    ids = torch.cat([batch.input_ids.repeat(len(sentences), 1), torch.tensor(sentences)], dim=1)
    types = torch.cat([batch.token_type_ids.repeat(len(sentences), 1), torch.ones(len(sentences), length)], dim=1)
    pixels = batch.pixel_values.repeat(len(sentences), 1, 1, 1)
    with torch.no_grad():
        scores = model(ids, pixels, torch.ones_like(ids), types)[:, -length - 1 : -1].log_softmax(-1)
    totals = scores.gather(-1, ids[:, -length:, None]).sum((1, 2))
    return dict(zip(sentences, totals.tolist()))


def test_wide_beams_find_the_most_likely_of_all(tiny_model, pictures):
    words = [5, 9, 77, 300, 1000]
    allowed = torch.zeros(tiny_model.config.text.vocab_size, dtype=torch.bool)
    allowed[words] = True
    for picture, prompt in zip(pictures, PROMPTS[:4]):
        batch = batch_of(tiny_model, [picture], [prompt])
        totals = every_sentence(tiny_model, batch, words, 4)
        ask = {"max_new_tokens": 4, "stop_ids": [], "allow": lambda tokens, left: allowed}
        [beam] = search_beams(tiny_model, batch, num_beams=5**3, **ask)
        best = max(totals, key=totals.get)
        assert tuple(beam.tokens) == best
        assert beam.total == pytest.approx(totals[best], abs=1e-4)
        assert sum(beam.logprobs) == pytest.approx(beam.total, abs=1e-5)
        [narrow] = search_beams(tiny_model, batch, num_beams=2, **ask)
        assert narrow.total <= beam.total + 1e-5


def test_allow_sees_the_answer_and_the_room(tiny_model, pictures):
    """Greedy, drawn and with beams: asked with what was said in this very beam, and with the row's own room."""
    batch = batch_of(tiny_model, pictures[:2], ["x" * 60, "x"])
    limits = answer_limits(batch.attention_mask, 50, tiny_model.config.text.max_position_embeddings)
    assert limits[0] < limits[1] == 50
    everything = torch.ones(tiny_model.config.text.vocab_size, dtype=torch.bool)
    for options in ({}, {"sampling": Sampling(temperature=1.0, seed=0)}, {"num_beams": 2}):
        asked = set()

        def allow(tokens, left, asked=asked):
            assert len(tokens) + left in limits
            asked.add((tuple(tokens), left))
            return everything

        answers = generate_answers(tiny_model, batch, str, max_new_tokens=50, stop_ids=[], allow=allow, **options)
        assert [len(answer.tokens) for answer in answers] == limits
        for answer, limit in zip(answers, limits):
            for step in range(limit):
                assert (tuple(answer.tokens[:step]), limit - step) in asked
        free = generate_answers(tiny_model, batch, str, max_new_tokens=50, stop_ids=[], **options)
        assert [answer.tokens for answer in free] == [answer.tokens for answer in answers]


def test_what_is_not_allowed_is_not_said(tiny_model, pictures):
    batch = batch_of(tiny_model, pictures[:3], PROMPTS[:3])
    even = torch.arange(tiny_model.config.text.vocab_size) % 2 == 0
    for options in ({}, {"sampling": Sampling(temperature=2.0, top_k=5, seed=0)}, {"num_beams": 3}):
        for answer in generate_answers(tiny_model, batch, str, allow=lambda tokens, left: even, **options):
            assert answer.tokens and all(token % 2 == 0 for token in answer.tokens)
            assert all(-math.inf < logprob < 0 for logprob in answer.logprobs)


def test_something_must_be_allowed(tiny_model, pictures):
    batch = batch_of(tiny_model, pictures[:1], ["x"])
    nothing = torch.zeros(tiny_model.config.text.vocab_size, dtype=torch.bool)
    for num_beams in (1, 2):
        with pytest.raises(ValueError, match="allow forbids every token behind the 0"):
            generate_answers(tiny_model, batch, str, num_beams=num_beams, allow=lambda tokens, left: nothing)


def test_beams_end_when_nothing_more_is_allowed(tiny_model, pictures):
    """One way through: all other continuations are forbidden, so fewer beams run than were asked for."""
    path = [40, 50, 1]
    masks = torch.nn.functional.one_hot(torch.tensor(path), tiny_model.config.text.vocab_size).bool()
    batch = batch_of(tiny_model, pictures[:2], PROMPTS[:2])
    beams = search_beams(tiny_model, batch, num_beams=4, allow=lambda tokens, left: masks[len(tokens)])
    assert [beam.tokens for beam in beams] == [path, path]


def test_stop_strings_end_beams(tiny_model, pictures):
    """At once, and also where the string lies across two tokens."""
    decode = tiny_model.processor.tokenizer.decode
    ask = {"model": tiny_model, "max_new_tokens": 12, "num_beams": 3, "return_logprobs": True}
    free = generate(pictures, PROMPTS, **ask)[0].tokens
    left, right = decode(free[:4]), decode(free[:5])
    stop = right[len(left) - 1 : len(left) + 1]
    assert right.startswith(left) and len(stop) == 2
    for answer in generate(pictures, PROMPTS, stop=stop, **ask):
        assert stop not in answer.text and stop not in decode(answer.tokens[:-1])


def test_a_stop_token_is_no_text_of_beams(tiny_model, pictures):
    """A stop token that one would see, behind a beginning that is the only one allowed."""
    tokenizer, size = tiny_model.processor.tokenizer, tiny_model.config.text.vocab_size
    path = tokenizer.encode("red star")
    batch = batch_of(tiny_model, pictures[:1], PROMPTS[:1])
    ask = {"stop_ids": [1, path[-1]], "max_new_tokens": len(path) + 2}
    ask["allow"] = lambda tokens, left: torch.arange(size) == path[min(len(tokens), len(path) - 1)]
    [greedy] = generate_answers(tiny_model, batch, tokenizer.decode, **ask)
    [beams] = generate_answers(tiny_model, batch, tokenizer.decode, num_beams=2, **ask)
    assert beams.tokens == greedy.tokens == path
    assert beams.text == greedy.text == tokenizer.decode(path[:-1]) != tokenizer.decode(path)


def test_long_lists_with_beams(tiny_model, pictures):
    prompts = [f"{'x' * (n % 5)} {n}" for n in range(20)]
    ask = {"model": tiny_model, "max_new_tokens": 4, "num_beams": 4}
    together = generate(pictures[0], prompts, **ask)
    for n in (0, 7, 8, 19):
        assert together[n] == generate(pictures[0], prompts[n], **ask)


# text


def pieces_of(text: AnswerText, tokens) -> list[str]:
    """What a stream would print."""
    pieces = []
    for token in tokens:
        over = text.push(token)
        pieces.append(text.take())
        if over:
            break
    text.finish()
    return [*pieces, text.take()]


SAID = [
    "",
    " ",
    "a red star",
    "two  hearts\n",
    "é",
    "naïve 漢字 🙂🙃",
    "مرحبا",
    "👩‍👩‍👧 ok",
    "<loc0001><loc1023> star ; <seg007>",
]


@pytest.mark.parametrize("said", SAID)
def test_text_arrives_whole(tokenizer, said):
    ids = tokenizer.encode(said)
    pieces = pieces_of(AnswerText(tokenizer.decode), ids)
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)


def byte_tokens(tokenizer, raw: bytes) -> list[int]:
    return [tokenizer.token_id(f"<0x{byte:02X}>") for byte in raw]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tokens_stream_to_the_same_text(tokenizer, data):
    """Streamed and whole are one text, whatever the tokens: broken bytes and special tokens too."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    at = data.draw(st.integers(0, len(tokens)))
    tokens[at:at] = byte_tokens(tokenizer, data.draw(st.binary(max_size=6)))
    stop = data.draw(st.lists(st.text("ab <\n", min_size=1, max_size=4), max_size=2))
    whole = AnswerText(tokenizer.decode, stop)
    any(whole.push(token) for token in tokens)
    assert "".join(pieces_of(AnswerText(tokenizer.decode, stop), tokens)) == whole.finish()
    assert not any(text in whole.text for text in stop)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(said=st.text(max_size=30))
def test_a_decoded_text_is_what_decode_says(tokenizer, said):
    ids = [token for token in tokenizer.encode(said) if token > 3]
    text = AnswerText(tokenizer.decode)
    for token in ids:
        text.push(token)
    assert text.finish() == tokenizer.decode(ids)


def test_half_a_character_waits(tokenizer):
    text = AnswerText(tokenizer.decode)
    shown = []
    for token in byte_tokens(tokenizer, "é🙂".encode()):
        text.push(token)
        shown.append(text.take())
    assert shown == ["", "é", "", "", "", "🙂"]


def test_a_character_that_never_ends(tokenizer):
    text = AnswerText(tokenizer.decode)
    for token in [*tokenizer.encode("star"), *byte_tokens(tokenizer, "🙂".encode()[:2])]:
        text.push(token)
    assert text.take() == "star"
    assert set(text.finish()[4:]) == {"\ufffd"}
    assert set(text.take()) == {"\ufffd"}


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("abcdef", ["cd"], "ab"),
        ("abcdef", ["abc"], ""),
        ("abcdef", ["f"], "abcde"),
        ("abcdef", ["fg", "x"], "abcdef"),
        ("aab", ["ab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("abcdef", ["abcde", "c"], "ab"),  # complete first
        ("abcdef", ["c", "abc"], ""),  # complete at the same character: the longer
        ("one\n\ntwo", ["\n\n"], "one"),
        ("a🙂b", ["🙂"], "a"),
        ("a🙂b🙂", ["b🙂"], "a🙂"),
    ],
)
def test_stop_strings(tokenizer, said, stop, expected):
    """The same answer however the text falls into tokens: whole pieces, or byte by byte."""
    for ids in (tokenizer.encode(said), byte_tokens(tokenizer, said.encode())):
        for order in itertools.permutations(stop):
            assert "".join(pieces_of(AnswerText(tokenizer.decode, order), ids)) == expected


def test_nothing_of_a_stop_string_is_shown(tokenizer):
    text = AnswerText(tokenizer.decode, ["star!"])
    shown = []
    for character in "a sta star!":
        text.push(*tokenizer.encode(character))
        shown.append(text.take())
    assert "".join(shown) == text.finish() == "a sta "
    assert shown[2:7] == ["", "", "", "sta ", ""]


class CountedStop(str):
    """A stop string that counts how often it is cut or compared."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)

    def startswith(self, *beginning):
        self.looks += 1
        return super().startswith(*beginning)


def test_a_long_stop_string_is_no_more_work_than_the_text():
    stop = CountedStop("a" * 10_000 + "b")
    text = AnswerText(lambda ids: "".join(map(chr, ids)), [stop])
    for letter in "dddddaaaaa":
        text.push(ord(letter))
        assert text.take() == letter.strip("a")
    assert stop.looks <= 10


def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string():
    rng = random.Random(0)
    longest = 0
    for _ in range(100):
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 7))) for _ in range(rng.randint(1, 3))]
        text, shown = AnswerText(lambda ids: "".join(map(chr, ids)), stops), ""
        for letter in rng.choices("ab", k=12):
            if text.push(ord(letter)):
                break
            shown += text.take()
            beginnings = [stop[:n] for stop in stops for n in range(len(stop)) if text.text.endswith(stop[:n])]
            assert text.text == shown + max(beginnings, key=len)
            longest = max(longest, *map(len, beginnings))
    assert longest > 3


def test_a_leading_space_survives_decoders_that_drop_it():
    """A SentencePiece decoder with a dummy prefix drops the first space: later ones must stay."""
    words = ["", "▁two", "▁red", "▁stars"]

    def decode(ids):
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    assert pieces_of(AnswerText(decode), [1, 2, 3]) == ["two", " red", " stars", ""]


def test_stop_strings_in_a_batch(tiny_model, pictures):
    free = generate(pictures, PROMPTS, model=tiny_model, max_new_tokens=16, return_logprobs=True)
    stop = [free[0].text[9:13], free[2].text[3:5]]
    stopped = generate(pictures, PROMPTS, model=tiny_model, max_new_tokens=16, stop=stop, return_logprobs=True)
    for before, after in zip(free, stopped):
        cut = min((before.text.find(text) for text in stop if text in before.text), default=None)
        assert after.text == before.text[:cut]
        assert after.tokens == before.tokens[: len(after.tokens)]
    assert len(stopped[0].tokens) < 16


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["0", "st"]}])
def test_stream_joins_to_the_answer(tiny_model, pictures, options):
    for picture, prompt in zip(pictures, PROMPTS):
        whole = generate(picture, prompt, model=tiny_model, max_new_tokens=24, **options)
        pieces = list(generate(picture, prompt, model=tiny_model, max_new_tokens=24, stream=True, **options))
        assert "".join(pieces) == whole
        assert all(pieces)


def test_a_stream_can_be_left(tiny_model, pictures):
    batch = batch_of(tiny_model, pictures[:1], ["x"])
    stream = stream_answer(tiny_model, batch, tiny_model.processor.tokenizer.decode)
    assert next(stream)
    stream.close()
    assert torch.is_grad_enabled()  # the loop's no_grad does not leak


# the public face


def test_what_comes_in_and_out(tiny_model, pictures, picture_file):
    ask = {"model": tiny_model, "max_new_tokens": 6}
    one = generate(picture_file, "x", **ask)
    assert isinstance(one, str) and one
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG")
    for same in (str(picture_file), pictures[0], np.asarray(pictures[0]), buffer.getvalue()):
        assert generate(same, "x", **ask) == one
    assert generate([picture_file], ["x"], **ask) == [one]
    assert generate([picture_file], "x", **ask) == [one]
    assert generate((picture_file, pictures[1]), ["x", "y"], **ask) == [one, generate(pictures[1], "y", **ask)]
    assert generate(picture_file, ["x", "y"], **ask) == [one, generate(picture_file, "y", **ask)]
    assert generate(pictures[:2], "x", **ask) == [one, generate(pictures[1], "x", **ask)]
    [two] = generate([[pictures[0], pictures[1]]], "x", **ask)
    assert two not in (one, generate([[pictures[1], pictures[0]]], "x", **ask)[0])
    mixed = generate([[pictures[0], pictures[1]], pictures[0]], ["x", "x"], **ask)
    assert mixed == [two, one]
    answer = generate(pictures[0], "x", return_logprobs=True, **ask)
    assert answer.text == one and len(answer.tokens) == len(answer.logprobs) == 6
    assert generate(pictures[:1], "x", return_logprobs=True, **ask) == [answer]


def test_long_lists(tiny_model, pictures):
    """More rows than go at once: the same answers and the same draws as in small calls."""
    prompts = [f"{'x' * (n % 5)} {n}" for n in range(70)]
    ask = {"model": tiny_model, "max_new_tokens": 4, "temperature": 1.0}
    together = generate(pictures[0], prompts, seed=100, **ask)
    for n in (0, 31, 32, 69):
        assert together[n] == generate(pictures[0], prompts[n], seed=100 + n, **ask)


def test_seeds(tiny_model, pictures):
    ask = {"model": tiny_model, "max_new_tokens": 12, "temperature": 1.0}
    assert generate(pictures[0], "x", seed=1, **ask) == generate(pictures[0], "x", seed=1, **ask)
    assert generate(pictures[0], "x", seed=1, **ask) != generate(pictures[0], "x", seed=2, **ask)
    assert generate(pictures[0], "x", **ask) != generate(pictures[0], "x", **ask)
    same = generate(pictures[0], ["x", "x", "x"], seed=1, **ask)
    assert len(set(same)) == 3


def test_a_seed_without_room_for_all_rows(tiny_model, pictures):
    ask = {"model": tiny_model, "max_new_tokens": 1, "temperature": 1.0}
    most = 2**63 - 40
    with pytest.raises(ValueError, match=f"seed is {most + 1}: .* expected {most} at most for 40 rows"):
        generate(pictures[0], ["x"] * 40, seed=most + 1, **ask)
    assert len(generate(pictures[0], ["x"] * 40, seed=most, **ask)) == 40


def test_paths_are_kept_until_files_change(copy_folder, tiny_folder, pictures, make_tiny):
    folder = copy_folder(tiny_folder)
    ask = {"model": folder, "max_new_tokens": 6}
    first = generate(pictures[0], "x", **ask)
    kept = assemble._model(folder)
    assert kept is assemble._model(str(folder))
    make_tiny(folder, seed=5)
    assert kept is not assemble._model(folder)
    assert generate(pictures[0], "x", **ask) != first
    assert generate(pictures[0], "x", **ask) == generate(pictures[0], "x", model=load(folder), max_new_tokens=6)


def test_threads_that_ask_at_once_wait_for_one_model(copy_folder, tiny_folder, pictures, monkeypatch):
    folder, loaded = copy_folder(tiny_folder), []
    monkeypatch.setattr(assemble, "load", lambda given: loaded.append(given) or load(given))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: generate(pictures[0], "x", model=folder, max_new_tokens=2), range(4)))
    assert len(loaded) == 1 and len(set(answers)) == 1


def test_stop_ids_come_from_generation_config(copy_folder, tiny_folder, pictures):
    folder = copy_folder(tiny_folder)
    answer = generate(pictures[0], "x", model=folder, max_new_tokens=8, return_logprobs=True)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [1, {answer.tokens[3]}]}}')
    shorter = generate(pictures[0], "x", model=folder, max_new_tokens=8, return_logprobs=True)
    assert shorter.tokens == answer.tokens[:4]
    assert answer.text.startswith(shorter.text) and len(shorter.text) < len(answer.text)  # the stop token is no text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"num_beams": 0}, "num_beams is 0: expected a whole number, 1 or more"),
        ({"num_beams": -1}, "num_beams is -1"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"num_beams": True}, "num_beams is True"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"length_penalty": 1e6}, "length_penalty is 1000000.0: expected a number from -50 to 50"),
        ({"length_penalty": "1"}, "length_penalty is '1'"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams is 2 and temperature 0.5"),
        ({"num_beams": 2, "stream": True}, "stream=True.*best of 2 beams"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": ["a", 5]}, "stop is "),
        ({"stop": b"a"}, "stop is "),
        ({"prompt": []}, "prompt is an empty list"),
        ({"image": []}, "image is an empty list"),
        ({"image": [[]]}, "empty list of pictures"),
        ({"image": 5}, "a picture is a path"),
        ({"image": None}, "a picture is a path"),
        ({"image": "scene.png", "prompt": 5}, "a prompt is a string, got int"),
        ({"prompt": ["x", None]}, "a prompt is a string, got NoneType"),
        ({"prompt": "what is <image> here"}, "contains <image>"),
        ({"image": ["a.png", "b.png"], "prompt": ["x"]}, "2 pictures for 1 prompts"),
        ({"image": ["a.png"], "prompt": ["x", "y"]}, "1 pictures for 2 prompts"),
        ({"prompt": "word " * 200}, "context is 96 tokens"),
        ({"prompt": ["x", "word " * 200]}, "prompt 1 has"),
        ({"prompt": ["x", "y"], "stream": True}, "stream=True"),
        ({"stream": True, "return_logprobs": True}, "stream=True"),
        ({"model": 5}, "model is a path"),
        ({"model": "no/such/folder"}, "no such folder"),
    ],
)
def test_wrong_arguments(tiny_model, pictures, arguments, words):
    given = {"image": pictures[0], "prompt": "x", "model": tiny_model} | arguments
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        generate(**given)


def test_a_model_without_processor(tiny_folder, pictures):
    from sigma_book.weights import load_model

    with pytest.raises(ValueError, match="no processor"):
        generate(pictures[0], "x", model=load_model(tiny_folder))


def test_files_of_two_models(copy_folder, tiny_folder):
    folder = copy_folder(tiny_folder)
    config = (folder / "config.json").read_text()
    wrong = config.replace(f'"image_token_index": {load(tiny_folder).config.image_token_id}', '"image_token_index": 77')
    (folder / "config.json").write_text(wrong)
    with pytest.raises(ValueError, match="<image> is token .* and 77 in config.json"):
        load(folder)
