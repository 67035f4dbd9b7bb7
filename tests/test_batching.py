"""The engine: whatever runs beside it, a request gets the answer of a call of its own."""

import math
import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from sigma_book import generate, load
from sigma_book.batching import Engine, Event, QueueFull, SlotCache
from sigma_book.generation import Sampling, generate_answers
from sigma_book.kv_cache import KVCache

WORDS = [
    "",
    "caption en",
    "how many red stars are there?",
    "detect circle ; heart",
    "x",
    "is there a blue ring?",
    "y " * 12,
]
GEMMA_2 = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 10.0,
    "sliding_window": 7,  # below the length of a prompt
    "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    "four_norms": True,
}
ODD = {
    "gemma": {},
    "tied, three groups": {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2},
    "gemma 2": GEMMA_2,
    "gemma 2, tied, window 1": GEMMA_2 | {"sliding_window": 1, "tie_word_embeddings": True},
    "gemma 2, window beyond": GEMMA_2 | {"sliding_window": 500},
}
PATIENCE = 60.0  # seconds after which a test that waits gives up


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.events: list[Event] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.over.is_set(), "an event behind the last"
        self.events.append(event)
        if event.finish is not None:
            self.over.set()

    def wait(self) -> "Heard":
        assert self.over.wait(PATIENCE), "no last event"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]

    @property
    def logprobs(self) -> list[float]:
        return [event.logprob for event in self.events if event.token is not None]

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory, make_tiny):
    folder = tmp_path_factory.mktemp("odd")
    return {name: load(make_tiny(folder / str(n), n, **ODD[name]), device="cpu") for n, name in enumerate(ODD)}


def alone(model, image, prompt, *, stop=(), allow=None, sampling=None, max_new_tokens):
    """What a call of its own answers."""
    shown = image if isinstance(image, list) else [image]
    batch = model.processor.prepare([shown], [prompt])
    [answer] = generate_answers(
        model,
        batch,
        model.processor.tokenizer.decode,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=getattr(model, "stop_ids", None),
        stop=stop,
        allow=allow,
    )
    return answer


def random_request(model, pictures, chance: random.Random) -> tuple:
    """A picture or two, a prompt, and options."""
    image = chance.choice([*pictures, pictures[:2], [pictures[3], pictures[3]]])
    options = {"max_new_tokens": chance.choice([1, 2, 5, 9, 16, 30, 200])}
    kind = chance.randrange(5)
    if kind == 1:
        options["sampling"] = Sampling(temperature=chance.choice([0.7, 1.5]), seed=chance.randrange(10**6))
    if kind == 2:
        options["sampling"] = Sampling(1.2, top_p=0.9, top_k=40, repetition_penalty=1.3, seed=chance.randrange(10**6))
    if kind == 3:
        options["sampling"] = Sampling(repetition_penalty=1.4)
    if kind == 4:
        even = torch.arange(model.config.text.vocab_size) % 2 == 0
        options["allow"] = lambda tokens, left: even
    if chance.random() < 0.3:
        options["stop"] = tuple(chance.sample(["a", "e ", "st", "ou", "1", "re"], 2))
    return image, chance.choice(WORDS), options


def same(heard: Heard, answer) -> None:
    assert (heard.text, heard.tokens) == (answer.text, answer.tokens)
    assert heard.logprobs == pytest.approx(answer.logprobs, abs=1e-4)  # sums of other sizes round differently


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", list(ODD))
def test_in_any_company_as_alone(odd_models, pictures, name, rows):
    model, chance = odd_models[name], random.Random(f"{name} {rows}")
    requests = [random_request(model, pictures, chance) for _ in range(24)]
    engine = Engine(model, max_rows=rows, queue_size=100, prefill_tokens=chance.choice([1, 40, 1000]))
    heard = []
    for image, prompt, options in requests:
        heard.append(Heard())
        engine.submit(image, prompt, heard[-1], **options)
        if chance.random() < 0.3:
            time.sleep(chance.random() * 0.01)
    for one, (image, prompt, options) in zip(heard, requests):
        answer = alone(model, image, prompt, **options)
        same(one.wait(), answer)
        assert one.finish == ("stop" if len(one.tokens) < options["max_new_tokens"] and one.tokens else one.finish)
    stats = engine.stats()
    assert stats.running == stats.queued == 0 and sum(stats.finished.values()) == 24
    assert max(stats.batch_sizes) <= rows
    engine.close()
