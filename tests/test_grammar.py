"""Constrained answers: whatever the weights, the answer parses and there is nothing to remark."""

import io
import random

import pytest
import sentencepiece
import torch
from transformers import AutoModelForImageTextToText

from sigma_book import generate
from sigma_book.assemble import POCKET, load
from sigma_book.gemma import GemmaConfig
from sigma_book.generation import Sampling, generate_answers
from sigma_book.locate import AnswerGrammar, parse
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Processor, Tokenizer
from sigma_book.siglip import SiglipConfig

TASKS = ("detect", "segment")
SHORTEST = {"detect": 5, "segment": 21}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(POCKET)


@pytest.fixture(scope="module")
def smallest(tokenizer):
    """The smallest PaliGemma that there can be, to be filled with random weights again and again."""
    vision = SiglipConfig(4, 4, 1, 1, image_size=14, patch_size=14)
    text = GemmaConfig(8, 8, 1, 1, 1, 4, tokenizer.vocab_size, tie_word_embeddings=False)
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = PaliGemma(PaliGemmaConfig(vision, text, tokenizer.image_id, **ids)).eval().requires_grad_(False)
    model.processor = Processor(tokenizer, 14, 1)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(text: str, task: str) -> int:
    found, remarks = parse(text, 100, 200)
    assert found and not remarks, (text, remarks)
    for detection in found:
        assert detection.label.strip() and len(detection.codes) == (16 if task == "segment" else 0)
        assert not any(mark in detection.label for mark in ("<", ";", "\ufffd", "\n"))
    return len(found)


def ask_random_models(model, tokenizer, pictures, seeds) -> None:
    """Each seed is a model: two prompts, greedy or drawn or with beams, short or long."""
    grammars = {task: AnswerGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], task) for task in TASKS}
    several = 0
    for seed in seeds:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.copy_(rng.choice((0.3, 1.0, 3.0)) * torch.randn(parameter.shape, generator=generator))
        # some models like separators, the end or half words more than others do
        favoured = [token for token in tokenizer.encode(" ; ") if rng.random() < 0.8]
        for token in [*favoured, *rng.sample([tokenizer.eos_id, *range(1200, 1850)], 10)]:
            model.lm_head.weight[token] *= 8
        task = rng.choice(TASKS)
        room = SHORTEST[task] + rng.choice((0, 1, 2, 3, 9, 25, 40))
        batch = model.processor.prepare(pictures[:2], ["detect cat", ""])
        options = rng.choice(
            (
                {},
                {"sampling": Sampling(temperature=rng.choice((0.5, 1.0, 5.0)), top_k=rng.choice((None, 3)), seed=seed)},
            )
            if seed % 8
            else ({"num_beams": 3},)
        )
        answers = generate_answers(model, batch, tokenizer.decode, max_new_tokens=room, allow=grammars[task], **options)
        for answer in answers:
            assert len(answer.tokens) <= room
            several += check(answer.text, task) > 1
    assert several > len(seeds) / 60  # some answers hold more than one box


def test_random_models(smallest, tokenizer, pictures):
    ask_random_models(smallest, tokenizer, pictures, range(100))


@pytest.mark.slow
def test_a_thousand_random_models(smallest, tokenizer, pictures):
    ask_random_models(smallest, tokenizer, pictures, range(1000, 2000))


@pytest.mark.parametrize("task", TASKS)
def test_any_way_through_parses(tokenizer, task):
    """Without a model: at each step a random one of the allowed tokens, or one of a rare kind."""
    rng = random.Random(task)
    grammar = AnswerGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], task)
    semicolon = grammar._separator[0]
    boxes = 0
    for number in range(400):
        room = SHORTEST[task] + number % 60
        answer: list[int] = []
        while len(answer) < room and tokenizer.eos_id not in answer:
            may = grammar(answer, room - len(answer)).nonzero()[:, 0].tolist()
            rare = [token for token in may if token in (tokenizer.eos_id, semicolon, *grammar._lead)]
            answer.append(rng.choice(rare if rare and rng.random() < 0.4 else may))
        boxes += check(tokenizer.decode(answer), task)
    assert boxes > 410  # some answers hold more than one


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backend", ["tokenizer.json", "tokenizer.model"])
def test_a_right_answer_is_allowed(tokenizer, tmp_path, task, backend):
    """What the model would be taught to say passes token by token, with either kind of tokenizer file."""
    (tmp_path / backend).write_bytes((POCKET / backend).read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    grammar = AnswerGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], task)
    segs = "".join(f"<seg{code:03d}>" for code in range(16)) if task == "segment" else ""
    for labels in (["cat"], ["red star", "blue ring", "a"], ["Übergröße"], ["don't (know)"]):
        text = " ; ".join(f"<loc0000><loc0010><loc0500><loc1023>{segs} {label}" for label in labels)
        if "\ufffd" in "".join(tokenizer.decode([token]) for token in tokenizer.encode(text)):
            continue  # a letter that this small vocabulary knows as bytes only
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        for place, token in enumerate(tokens):
            assert grammar(tokens[:place], len(tokens) - place)[token], (text, place, tokenizer.decode([token]))
        assert not grammar(tokens[:-1], 50)[tokenizer.token_id("<unk>")]
        with_end = grammar(tokens[:-1], 1)
        assert with_end[tokenizer.eos_id] and not with_end[grammar._separator[0]]


def test_what_is_forbidden(tokenizer):
    grammar = AnswerGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], "detect")
    loc = [tokenizer.token_id(f"<loc{index:04d}>") for index in (300, 200, 100, 300)]
    assert not grammar([], 50)[tokenizer.eos_id] and not grammar([], 50)[tokenizer.encode("cat")[0]]
    assert not grammar(loc[:2], 50)[loc[2]] and grammar(loc[:2], 50)[loc[3]]  # a box that ends before it begins
    box = tokenizer.encode("<loc0100><loc0100><loc0300><loc0300>")
    behind = grammar(box, 50)
    for name in ("<eos>", "<pad>", "<bos>", "<seg001>", "<loc0001>", "\n", ";"):
        token = tokenizer.encode(name)[0] if name in "\n;" else tokenizer.token_id(name)
        assert not behind[token], name
    space = tokenizer.encode(" ; ")[0]
    assert behind[space] and not grammar(box, 1)[space]  # one token left: it must be seen
    assert not grammar([*box, space], 50)[tokenizer.eos_id]  # a space is no label
    named = [*box, *tokenizer.encode(" cat")]
    assert grammar(named, 50)[tokenizer.eos_id]
    led = [*named, *grammar._lead]
    needed = len(grammar._separator) + 5
    assert grammar(led, needed)[grammar._separator[0]] and not grammar(led, needed - 1)[grammar._separator[0]]


def test_the_reference_says_the_same(tmp_path, make_tiny, pictures):
    """transformers takes the allowed tokens through `prefix_allowed_tokens_fn`: same tokens, greedy and with beams."""
    folder = make_tiny(tmp_path / "model", seed=3)
    model = load(folder, device="cpu")
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer, longest = model.processor.tokenizer, 14
    grammar = AnswerGrammar(tokenizer, model.config.text.vocab_size, [tokenizer.eos_id], "detect")
    batch = model.processor.prepare(pictures[:3], ["detect cat", "x", ""])
    start = batch.input_ids.shape[1]

    def allowed(row, ids):
        answer = ids[start:].tolist()
        if tokenizer.eos_id in answer:
            return [tokenizer.eos_id]
        return grammar(answer, longest - len(answer)).nonzero()[:, 0].tolist()

    for num_beams in (1, 3):
        expected = reference.generate(
            **{
                name: getattr(batch, name) for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
            },
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=longest,
            prefix_allowed_tokens_fn=allowed,
        )[:, start:].tolist()
        answers = generate_answers(
            model, batch, tokenizer.decode, max_new_tokens=longest, num_beams=num_beams, allow=grammar
        )
        for answer, row in zip(answers, expected):
            assert answer.tokens == row[: len(answer.tokens)]
            check(answer.text, "detect")


def test_through_the_public_face(tiny_model, pictures):
    ask = {"model": tiny_model, "max_new_tokens": 30}
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"num_beams": 2}):
        for task in TASKS:
            together = generate(pictures[:3], "detect cat", grammar=task, **ask, **options)
            assert all(check(text, task) for text in together)
            assert together[0] == generate(pictures[0], "detect cat", grammar=task, **ask, **options)
    assert "".join(generate(pictures[0], "x", grammar="detect", stream=True, **ask)) == generate(
        pictures[0], "x", grammar="detect", **ask
    )


def test_what_cannot_be_asked(tiny_model, pictures):
    ask = {"image": pictures[0], "prompt": "x", "model": tiny_model}
    with pytest.raises(ValueError, match="grammar is 'boxes': expected 'detect' or 'segment'"):
        generate(**ask, grammar="boxes")
    with pytest.raises(ValueError, match="detect takes 5 tokens or more, and there is room for 4"):
        generate(**ask, grammar="detect", max_new_tokens=4)
    with pytest.raises(ValueError, match="segment takes 21 tokens or more, and there is room for 20"):
        generate(**ask, grammar="segment", max_new_tokens=20)
    long_prompt = "x" * 70  # the context of this model leaves little room
    with pytest.raises(ValueError, match="segment takes 21 tokens"):
        generate(pictures[0], long_prompt, model=tiny_model, grammar="segment")


def test_stop_tokens_beyond_the_vocabulary(tokenizer):
    for stops in ([tokenizer.eos_id, 99_999], [99_999, tokenizer.eos_id]):
        grammar = AnswerGrammar(tokenizer, tokenizer.vocab_size, stops, "detect")
        answer = tokenizer.encode("<loc0100><loc0100><loc0300><loc0300> cat")
        assert grammar(answer, 50)[tokenizer.eos_id]
    with pytest.raises(ValueError, match=r"the stop tokens are \[99999\] and the vocabulary has"):
        AnswerGrammar(tokenizer, tokenizer.vocab_size, [99_999], "detect")


def test_the_pocket_model_with_and_without(pictures):
    """A model that knows the format anyway says the same."""
    free = generate(pictures, "detect red star")
    forced = generate(pictures, "detect red star", grammar="detect")
    well_formed = [not parse(text, 112, 112)[1] for text in free]
    assert sum(well_formed) >= 4
    for before, after, fine in zip(free, forced, well_formed):
        assert check(after, "detect")
        assert not fine or before == after


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    """A SentencePiece model like Gemma's, in which the separator is `▁;` and `▁`, and some words are bytes only."""
    sentences = ["a cat ; a dog ; the red star ; two birds ; don't <look> ; it's 3 ; x"] * 50
    marks = [f"<loc{index:04d}>" for index in range(1024)] + [f"<seg{code:03d}>" for code in range(128)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=4 + 256 + len(marks) + 60,
        model_type="bpe",
        user_defined_symbols=marks,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("other")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("task", TASKS)
def test_a_tokenizer_that_joins_the_separator(other_tokenizer, task):
    tokenizer, rng = other_tokenizer, random.Random(task)
    assert len(tokenizer.encode("<loc0000> ; <loc0000>")) == 4  # a space and a semicolon in one piece, then a space
    grammar = AnswerGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], task)
    boxes = 0
    for number in range(150):
        room = SHORTEST[task] + number % 60
        answer: list[int] = []
        while len(answer) < room and tokenizer.eos_id not in answer:
            may = grammar(answer, room - len(answer)).nonzero()[:, 0].tolist()
            rare = [token for token in may if token in (tokenizer.eos_id, grammar._separator[0])]
            answer.append(rng.choice(rare if rare and rng.random() < 0.3 else may))
        boxes += check(tokenizer.decode(answer), task)
    assert boxes > 160
    segs = "<seg001>" * 16 if task == "segment" else ""
    text = " ; ".join(f"<loc0001><loc0002><loc0003><loc0004>{segs} {label}" for label in ("red star", "a cat"))
    tokens = tokenizer.encode(text)
    assert all(grammar(tokens[:place], 99)[token] for place, token in enumerate(tokens))
