"""The HTTP service: real sockets, the real `openai` client, and whatever strangers may send."""

import asyncio
import base64
import contextlib
import gzip
import io
import itertools
import json
import logging
import os
import re
import select
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from sigma_book import generate, load
from sigma_book.batching import Engine, Event
from sigma_book.locate import describe, draw
from sigma_book.protocol import ApiError, TokenNames, check_extras, open_picture
from sigma_book.server import Reply, ServerConfig, Service, _busy, create_app
from sigma_book.serving import explainer
from sigma_book.world import draw_scene, make_scene


def encode(picture: Image.Image, kind: str = "PNG") -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, kind)
    return encoded.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def question(prompt: str, url: str) -> list[dict]:
    parts = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


def wait_for(happened, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def assert_error(answer: httpx.Response, status: int, *words: str) -> dict:
    """The status, OpenAI's shape, a sentence with these words, and nothing of the machine's insides."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    return error


@pytest.fixture(scope="module")
def scenes(pictures) -> list[bytes]:
    return [encode(picture) for picture in pictures]


@pytest.fixture
def server(start_server, pocket):
    return start_server(pocket)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def long_model(make_tiny, tmp_path):
    """A model whose answers do not end by themselves for thousands of tokens."""
    from sigma_book import load

    return load(make_tiny(tmp_path / "long", max_position_embeddings=16384), device="cpu")


# Answers


def test_answers_are_those_of_a_single_call(client, scenes, pocket):
    for scene, prompt in itertools.product(scenes[:2], ("caption en", "detect star", "how many things ?")):
        expected = generate(scene, prompt, model=pocket, return_logprobs=True)
        asked = {"model": "pocket", "messages": question(prompt, data_url(scene)), "seed": 1}
        answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
        assert choice.finish_reason == "stop"
        batch = pocket.processor.prepare([Image.open(io.BytesIO(scene))], [prompt])
        assert answer.usage.prompt_tokens == batch.input_ids.shape[1] > 64  # the picture counts
        assert answer.usage.completion_tokens == len(expected.tokens)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        measured = [entry.logprob for entry in choice.logprobs.content]
        torch.testing.assert_close(torch.tensor(measured), torch.tensor(expected.logprobs), atol=1e-4, rtol=1e-4)
        assert bytes(b for entry in choice.logprobs.content for b in entry.bytes or []).decode() == expected.text
        for entry in choice.logprobs.content:
            best = [other.logprob for other in entry.top_logprobs]
            assert len(best) == 3 and best == sorted(best, reverse=True)
            assert entry.top_logprobs[0].token == entry.token  # greedy
        assert choice.logprobs.content[-1].token == "<eos>" and choice.logprobs.content[-1].bytes is None


def test_a_stream_is_the_answer_in_pieces(client, scenes, pocket):
    expected = generate(scenes[0], "caption en", model=pocket, return_logprobs=True)
    asked = {"model": "pocket", "messages": question("caption en", data_url(scenes[0])), "stream": True}
    chunks = list(
        client.chat.completions.create(**asked, stream_options={"include_usage": True}, logprobs=True, top_logprobs=1)
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == expected.text
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(expected.tokens)
    measured = [entry.logprob for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(expected.logprobs), atol=1e-4, rtol=1e-4)
    assert len([choice for choice in choices if choice.delta.content]) > 3
    plain = list(client.chat.completions.create(**asked))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_a_stream_on_the_wire(server, scenes):
    body = {"model": "pocket", "messages": question("caption en", data_url(scenes[0])), "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_limits_stops_and_seeds(client, scenes, pocket):
    whole = generate(scenes[0], "caption en", model=pocket)
    asked = {"model": "pocket", "messages": question("caption en", data_url(scenes[0]))}
    short = client.chat.completions.create(**asked, max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    assert whole.startswith(short.choices[0].message.content) and short.choices[0].message.content != whole
    assert client.chat.completions.create(**asked, max_completion_tokens=2).choices == short.choices
    words = whole.split()
    stopped = client.chat.completions.create(**asked, stop=["no such words", f" {words[2]}", "\n", "?"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == generate(
        scenes[0], "caption en", model=pocket, stop=["no such words", f" {words[2]}", "\n", "?"]
    )
    asked["messages"] = question("zebra crossing", data_url(scenes[0]))  # to which it knows no answer
    drawn = [
        client.chat.completions.create(**asked, temperature=2.0, top_p=0.98, seed=seed).choices[0].message.content
        for seed in (5, 5, 6, 7)
    ]
    assert (
        drawn[0] == drawn[1] == generate(scenes[0], "zebra crossing", model=pocket, temperature=2.0, top_p=0.98, seed=5)
    )
    assert len(set(drawn)) > 1
    steered = client.chat.completions.create(
        **asked, temperature=1.5, seed=3, extra_body={"top_k": 3, "repetition_penalty": 1.2}
    )
    assert steered.choices[0].message.content == generate(
        scenes[0], "zebra crossing", model=pocket, temperature=1.5, seed=3, top_k=3, repetition_penalty=1.2
    )


def test_where_no_length_is_said_it_is_one_that_is_allowed(start_server, tiny_model, scenes):
    server = start_server(tiny_model, max_new_tokens=5)
    for path in ("/generate", "/detect"):
        answer = httpx.post(f"{server.url}{path}", files={"file": scenes[0]}, data={"prompt": "star"})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5, answer.text
    asked = {"model": "pocket", "messages": question("star", data_url(scenes[0]))}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5, answer.text


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("pocket", "model")
    assert client.models.retrieve("pocket") == model
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o'") as refused:
        client.models.retrieve("gpt-4o")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="this server has 'pocket'"):
        client.chat.completions.create(model="gpt-4o", messages=question("caption en", data_url(b"")))


def test_harmless_fields_of_the_client_are_taken(client, scenes, pocket):
    answer = client.chat.completions.create(
        model="pocket",
        messages=question("caption en", data_url(scenes[1])),
        n=1,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="none",
        service_tier="auto",
        parallel_tool_calls=True,
        modalities=["text"],
    )
    assert answer.choices[0].message.content == generate(scenes[1], "caption en", model=pocket)


def test_the_client_s_fields_are_known():
    """Every argument of the `openai` package's `create` is taken, refused with a sentence, or harmless; none unknown."""
    import inspect

    from openai.resources.chat.completions import Completions

    from sigma_book.protocol import HARMLESS, NEUTRAL, ChatRequest

    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    known = set(ChatRequest.model_fields) | set(HARMLESS) | set(NEUTRAL)
    assert set(inspect.signature(Completions.create).parameters) - transport <= known


def test_the_client_s_parts_are_known():
    """So is every field of a message's parts, and every detail that a picture may be wanted in."""
    from typing import get_args, get_type_hints

    from openai.types import chat
    from openai.types.chat.chat_completion_content_part_image_param import ImageURL

    from sigma_book import protocol

    pairs = [(chat.ChatCompletionContentPartTextParam, protocol.TextPart), (ImageURL, protocol.ImageUrl)]
    pairs += [(chat.ChatCompletionContentPartImageParam, protocol.ImagePart)]
    pairs += [(chat.ChatCompletionUserMessageParam, protocol.Message)]
    pairs += [(chat.ChatCompletionStreamOptionsParam, protocol.StreamOptions)]
    for theirs, ours in pairs:
        assert set(get_type_hints(theirs)) <= set(ours.model_fields), theirs
    for detail in get_args(get_type_hints(ImageURL)["detail"]):
        protocol.ImageUrl(url="", detail=detail)


def test_generate_and_detect(server, scenes, pocket):
    sent = {"file": ("scene.png", scenes[2])}
    answer = httpx.post(f"{server.url}/generate", files=sent, data={"prompt": "caption en"}).json()
    assert answer["answer"] == generate(scenes[2], "caption en", model=pocket)
    assert answer["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] > 3
    answer = httpx.post(
        f"{server.url}/generate",
        files=sent,
        data={"prompt": "caption en", "temperature": "1.5", "seed": "9", "max_tokens": "4", "stop": ["x", "y"]},
    ).json()
    assert answer["answer"] == generate(
        scenes[2], "caption en", model=pocket, temperature=1.5, seed=9, max_new_tokens=4, stop=["x", "y"]
    )
    for path in ("/generate", "/detect"):
        data = {"prompt": "detect star ;\r\nheart", "max_tokens": "1"}  # as browsers send a line break
        assert httpx.post(f"{server.url}{path}", files=sent, data=data).json()["prompt"] == "detect star ;\nheart"
    wide = encode(Image.open(io.BytesIO(scenes[2])).resize((300, 200)))
    shape = make_scene(2).things[0].shape
    for prompt in (f"detect {shape}", shape):
        found = httpx.post(f"{server.url}/detect", files={"file": wide}, data={"prompt": prompt}).json()
        spoken = generate(wide, f"detect {shape}", model=pocket)
        assert found["answer"] == spoken and found["prompt"] == f"detect {shape}"
        expected = describe(spoken, 200, 300)
        assert {name: found[name] for name in expected} == expected and expected["things"]
    for ask in (
        {"data": {"prompt": prompt, "drawn": "true"}},
        {"data": {"prompt": prompt}, "headers": {"accept": "image/png"}},
    ):
        drawn = httpx.post(f"{server.url}/detect", files={"file": wide}, **ask)
        assert drawn.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(drawn.content)).tobytes() == draw(Image.open(io.BytesIO(wide)), spoken).tobytes()


def test_a_form_has_known_fields_and_each_once(start_server, tiny_model, scenes):
    server = start_server(tiny_model, explain=lambda image, prompt, answer, given_up: {})

    def post(path: str, *more: tuple[str, str | bytes]) -> httpx.Response:
        fields = [("file", scenes[0]), ("prompt", "caption en"), *more]
        fields += [("answer", "a star")] if path == "/explain" else [("max_tokens", "1")]
        files = [(name, value if isinstance(value, bytes) else (None, value)) for name, value in fields]
        return httpx.post(f"{server.url}{path}", files=files)

    for path in ("/generate", "/detect", "/explain"):
        assert post(path).status_code == 200
        for name in ("max_token", "request", "é" * 90):
            error = assert_error(post(path, (name, "3")), 400, f"unknown field {name!r:.80}: /docs lists")
            assert error["param"] == name[:80]
        for name, value in (("file", scenes[1]), ("prompt", "x")):
            assert_error(post(path, (name, value)), 400, f"{name} is given 2 times: give it once")
    for name in ("temperature", "seed", "stop"):
        assert assert_error(post("/detect", (name, "1")), 400, "unknown field")["param"] == name
    assert post("/generate", ("stop", "x"), ("stop", "y")).status_code == 200
    assert assert_error(post("/detect?drawn=true"), 400, "'drawn' stands in the address")["param"] == "drawn"


def test_letters_of_a_form_are_read_as_utf_8(start_server, tiny_model, scenes):
    """One field in punycode takes the loop minutes, in which nobody is answered."""
    server = start_server(tiny_model)
    head = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    picture = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n--x--\r\n' % scenes[0]
    slow = head % (b"prompt", b"A" * 300_000) + picture
    quick = head % (b"prompt", b"caption en") + head % (b"max_tokens", b"1") + picture
    for kind in ("punycode", "PUNYCODE", "idna", "unknown", "utf-7", '"punycode"'):
        given = {"Content-Type": f"multipart/form-data; boundary=x; charset={kind}"}
        assert_error(httpx.post(f"{server.url}/generate", content=slow, headers=given), 415, "read as UTF-8")
    several = [("Content-Type", f"multipart/form-data; boundary=x{more}") for more in ("; charset=punycode", "")]
    assert_error(httpx.post(f"{server.url}/generate", content=slow, headers=several), 415, "read as UTF-8")
    for kind in ("", "; charset=utf-8", "; charset=UTF-8", "; charset=iso-8859-1"):
        given = {"Content-Type": f"multipart/form-data; boundary=x{kind}"}
        assert httpx.post(f"{server.url}/generate", content=quick, headers=given).status_code == 200


def test_stop_strings_are_short(start_server, tiny_model, scenes):
    server, picture = start_server(tiny_model), {"file": scenes[0]}
    for many in ("x" * 257, ["a", "x" * 300_000]):
        data = {"prompt": "caption en", "max_tokens": "2", "stop": many}
        error = assert_error(httpx.post(f"{server.url}/generate", files=picture, data=data), 400, "than 256 characters")
        assert error["param"] == "stop"
    data["stop"] = "x" * 256
    assert httpx.post(f"{server.url}/generate", files=picture, data=data).status_code == 200


def test_explain_and_the_page(start_server, tiny_model, scenes, tmp_path):
    def explain(image, prompt, answer, given_up):
        if answer == "nothing":
            raise ValueError("the answer has no token: give one")
        return {"size": image.size, "prompt": prompt, "answer": answer}

    (tmp_path / "index.html").write_text("<title>demo</title>")
    (tmp_path / "app.js").write_text("1")
    server = start_server(tiny_model, explain=explain, static=tmp_path)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en", "answer": "a star"}}
    size = list(Image.open(io.BytesIO(scenes[0])).size)
    assert httpx.post(f"{server.url}/explain", **sent).json() == {
        "size": size,
        "prompt": "caption en",
        "answer": "a star",
    }
    sent["data"]["answer"] = "nothing"
    assert_error(httpx.post(f"{server.url}/explain", **sent), 400, "no token")
    sent["data"] = {"prompt": "c\r\nd", "answer": "a\r\nb"}  # as browsers send a line break
    as_typed = {"size": size, "prompt": "c\nd", "answer": "a\nb"}
    assert httpx.post(f"{server.url}/explain", **sent).json() == as_typed
    page, script = (httpx.get(f"{server.url}/{path}") for path in ("", "static/app.js"))
    assert "<title>demo</title>" in page.text and script.text == "1"
    known = httpx.get(script.url, headers={"If-None-Match": script.headers["etag"]})
    assert known.status_code == 304, "not sent again"
    assert {answer.headers["cache-control"] for answer in (page, script, known)} == {"no-cache"}, "but asked about"
    assert_error(httpx.get(f"{server.url}/static/../conftest.py"), 404)
    plain = start_server(tiny_model)
    assert_error(httpx.post(f"{plain.url}/explain", **sent), 404)
    assert httpx.get(plain.url).headers["location"] == "docs"


def test_tokens_by_name(pocket):
    tokenizer = pocket.processor.tokenizer
    names = TokenNames(tokenizer)
    text = "a red star é 🚀 <loc0012>"
    ids = tokenizer.encode(text)
    raw = b"".join(bytes(names(token)[1]) for token in ids)
    assert raw.decode() == text
    assert names(tokenizer.eos_id) == ("<eos>", None)


# What is refused


def test_what_a_request_may_not_say(server, scenes, pocket):
    good = {"model": "pocket", "messages": question("caption en", data_url(scenes[0]))}
    user = good["messages"][0]
    text, picture = user["content"]

    def asks(*parts) -> dict:
        return {"messages": [{"role": "user", "content": list(parts)}]}

    cases = [
        ({"messages": [{"role": "system", "content": "be brief"}, user]}, "no chat"),
        ({"messages": [{"role": "developer", "content": "be brief"}, user]}, "no chat"),
        ({"messages": [user, user]}, "no chat"),
        ({"messages": [user, {"role": "assistant", "content": "a star"}, user]}, "no chat"),
        ({"messages": [{"role": "wizard", "content": []}]}, "role"),
        ({"messages": []}, "messages"),
        ({"messages": "caption en"}, "messages"),
        ({"messages": [{"role": "user", "content": "caption en"}]}, "no pictures"),
        (asks(text), "no pictures"),
        (asks(picture), "no text parts"),
        (asks(text, *[picture] * 10), "10 pictures"),
        (asks(text, text, picture), "2 text parts"),
        (asks(text, picture, {"type": "input_audio", "input_audio": {}}), "input_audio"),
        (asks(text, {"type": "image_url", "image_url": data_url(scenes[0])}), "image_url"),
        ({"messages": [user | {"tool_calls": []}]}, "tool_calls"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens is 1000000000: expected 1 to 2048"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "at most 4 items"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"stream": True, "stream_options": {"more": 1}}, "unknown field 'more' of stream_options"),
        (asks(text | {"more": 1}, picture), "unknown field 'more' of messages.0.content.0"),
        (asks(text, picture | {"more": 1}), "unknown field 'more' of messages.0.content.1"),
        (asks(text, {"type": "image_url", "image_url": {"url": "", "more": 1}}), "messages.0.content.1.image_url"),
        (asks(*[text] * 65), "at most 64 items"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 2}, "n is 2"),
        ({"n": True}, "n is True"),
        ({"frequency_penalty": False}, "frequency_penalty is False"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"grammar": "root ::= x"}, "unknown field 'grammar'"),
        ({"model": 3}, "model"),
        ({"messages": question("word " * 3000, data_url(scenes[0]))}, "context"),
        ({"messages": question("a" * 300_000, data_url(scenes[0]))}, "a row of this server"),
        ({"messages": question("<image> caption", data_url(scenes[0]))}, "<image>"),
        ({"messages": question("half \ud800", data_url(scenes[0]))}, "surrogate"),
    ]
    with httpx.Client(base_url=server.url) as http:
        for change, words in cases:
            body = json.dumps(good | change)
            answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            error = assert_error(answer, 400, words)
            assert error["type"] == "invalid_request_error"
            if words in ("context", "a row of this server"):
                assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        missing = {name: value for name, value in good.items() if name != "model"}
        assert_error(http.post("/v1/chat/completions", json=missing), 400, "model")
        assert http.post("/v1/chat/completions", json=good).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 100_000, b"null", b"[]", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"9" * 10_000]
    + [b'{"model": "pocket", "messages": [' + b'{"role": "user", "content": ""},' * 100_000 + b"1]}"],
    ids=lambda body: f"{body[:12]!r}",
)
def test_broken_json(server, body):
    url = f"{server.url}/v1/chat/completions"
    assert_error(httpx.post(url, content=body, headers={"content-type": "application/json"}), 400)
    assert_error(httpx.post(url, content=body), 400)
    assert httpx.get(f"{server.url}/health/live").status_code == 200


def test_the_place_of_a_fault_is_one_that_the_body_has(server):
    parts = [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": 5}}]
    asked = {"model": "pocket", "messages": [{"role": "user", "content": parts}]}
    error = assert_error(httpx.post(f"{server.url}/v1/chat/completions", json=asked), 400, "valid string")
    assert error["param"] == "messages.0.content.1.image_url.url"


def test_json_that_is_not_marked_as_json(server):
    for headers in ({}, {"content-type": "text/plain"}):
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=b'{"model": "pocket"}', headers=headers)
        assert_error(answer, 400, "Content-Type: application/json")


def test_a_body_that_is_compressed(server, scenes):
    asked = {"model": "pocket", "messages": question("caption en", data_url(scenes[0])), "max_tokens": 1}
    form = httpx.Request(
        "POST", server.url, files={"file": scenes[0]}, data={"prompt": "caption en", "max_tokens": "1"}
    )
    bodies = [("/v1/chat/completions", "application/json", json.dumps(asked).encode())]
    bodies += [("/generate", form.headers["content-type"], form.read())]
    for path, kind, body in bodies:
        for coding, content, status in (("gzip", gzip.compress(body), 415), ("identity", body, 200)):
            headers = {"content-type": kind, "content-encoding": coding}
            answer = httpx.post(f"{server.url}{path}", content=content, headers=headers)
            assert answer.status_code == status, answer.text
            if status == 415:
                assert_error(answer, 415, "without Content-Encoding")


def test_base64_may_have_lines(server, scenes):
    def post(letters: str) -> httpx.Response:
        asked = {"model": "pocket", "messages": question("caption en", f"data:image/png;base64,{letters}")}
        return httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"max_tokens": 1})

    lines = base64.encodebytes(scenes[0]).decode()
    assert "\n" in lines[:-1] and post(lines.replace("\n", "\r\n ")).status_code == 200
    for wrong in (f"{lines}é", "@@@@", "abc"):
        assert assert_error(post(wrong), 400, "not base64")["param"] == "messages.0.content"


def test_a_body_of_many_small_things(start_server, tiny_model):
    """It is refused before it becomes a million objects, and unknown fields do not become an error each."""
    server = start_server(tiny_model)

    def post(prompt: str, url: str = "", **more) -> httpx.Response:
        asked = {"model": "pocket", "messages": question(prompt, url), "max_tokens": 3}
        asked["messages"][0]["content"][0] |= more
        return httpx.post(f"{server.url}/v1/chat/completions", json=asked)

    assert assert_error(post("a", **{f"k{n}": 1 for n in range(20_000)}), 400)["code"] == "too_complex"
    assert_error(post("a", **{f"k{n}": 1 for n in range(6000)}), 400, "unknown field 'k0' of messages.0.content.0")
    assert_error(post("a", f"data:image/png;base64,{'A' * 4_000_000}"), 400, "picture cannot be read")
    longest = post('"' * 9600, f"data:image/png;base64,{base64.b64encode(bomb(1, 1)).decode()}")
    assert assert_error(longest, 400)["code"] != "too_complex"


def scans(more: int) -> bytes:
    """A progressive JPEG with its last scan some times more."""
    encoded = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(encoded, "JPEG", progressive=True)
    head, last = encoded.getvalue()[:-2].rsplit(b"\xff\xda", 1)
    return head + (b"\xff\xda" + last) * (1 + more) + b"\xff\xd9"


def test_a_jpeg_of_many_scans():
    assert open_picture(scans(0), 10_000).size == (40, 40)
    assert open_picture(scans(0) + b"\xff\xda\x01" * 500, 10_000).size == (40, 40)  # a film behind it
    with pytest.raises(ValueError, match="more than 100 scans"):
        open_picture(scans(100), 10_000)


def test_no_reader_but_those_named_sees_the_bytes(monkeypatch):
    """Bytes may be a small TIFF to one reader and a large film to another, which Pillow asks first."""
    Image.init()  # all readers enter the list now, and not while another stands in its place
    asked = []
    monkeypatch.setitem(Image.OPEN, "ANY", (lambda file, name: asked.append(name), lambda prefix: True))
    monkeypatch.setattr(Image, "ID", ["ANY", *Image.ID])
    assert open_picture(scans(0), 10_000).size == (40, 40) and asked == []


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    framed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_pictures_that_are_none(server, scenes):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    cases = [(b"", "empty"), (b"\x89", "cannot be read"), (scenes[0][: len(scenes[0]) // 2], "damaged")]
    cases += [(b"hello", "cannot be read"), (eps, "cannot be read"), (svg, "cannot be read")]
    cases += [(bomb(60_000, 60_000), "pixels"), (bomb(10_000, 9_000), "pixels"), (bomb(100, 100), "damaged")]
    cases += [(bomb(8000, 8000), "at most 50,000,000 pixels")]
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for content, words in cases:
            body = {"model": "pocket", "messages": question("caption en", data_url(content))}
            assert_error(http.post("/v1/chat/completions", json=body), 400, words)
            for path in ("/generate", "/detect"):
                sent = {"files": {"file": ("a.png", content)}, "data": {"prompt": "caption en"}}
                assert_error(http.post(path, **sent), 400, words)
        for picture in ({"file": "text"}, {"picture": scenes[0]}):
            assert_error(http.post("/generate", files=picture, data={"prompt": "x"}), 400)
        assert_error(http.post("/generate", files={"file": scenes[0]}), 400, "prompt")
        assert_error(http.post("/generate", data={"prompt": "caption en"}), 400, "file")
        sent = {"files": {"file": scenes[0]}, "data": {"prompt": "x", "max_tokens": "many"}}
        assert_error(http.post("/generate", **sent), 400, "max_tokens")


def test_no_url_is_fetched_and_no_path_is_read(server, scenes, tmp_path):
    (tmp_path / "scene.png").write_bytes(scenes[0])
    refused = ["http://127.0.0.1:1/a.png", "https://example.org/a.png", "ftp://a/b", "//example.org/a.png", "gopher:x"]
    refused += [f"file://{tmp_path}/scene.png", f"{tmp_path}/scene.png", "scene.png", "", "javascript:1"]
    for url in refused:
        body = {"model": "pocket", "messages": question("caption en", url)}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert_error(answer, 400, "fetches nothing")
    for url in ("data:", "data:image/png,abc", "data:image/png;base64,@@@@", "data:image/png;base64,abc"):
        body = {"model": "pocket", "messages": question("caption en", url)}
        assert_error(httpx.post(f"{server.url}/v1/chat/completions", json=body), 400, "base64")


def test_paths_under_the_operator_s_root(start_server, pocket, scenes, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret.png"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "scene 1.png").write_bytes(scenes[0])
    outside.write_bytes(scenes[1])
    (root / "link.png").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "deep" / "scene 1.png")
    (root / "large.png").write_bytes(b"0" * 1_000_001)
    os.mkfifo(root / "pipe")
    server = start_server(pocket, image_root=root, max_body=1_000_000)

    def ask(url):
        body = {"model": "pocket", "messages": question("caption en", url)}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=20)

    expected = generate(scenes[0], "caption en", model=pocket)
    inside = root / "deep" / "scene 1.png"
    for url in (
        "deep/scene 1.png",
        f"{inside}",
        f"file://{str(inside).replace(' ', '%20')}",
        "inner.png",
        "./deep/../inner.png",
    ):
        assert ask(url).json()["choices"][0]["message"]["content"] == expected
    hostile = ["../secret.png", "deep/../../secret.png", str(outside), f"file://{outside}", "link.png", "up/secret.png"]
    hostile += [
        "file:///etc/passwd",
        "/etc/passwd",
        "%2e%2e/secret.png",
        f"file://{root}/%2e%2e/secret.png",
        "deep",
        ".",
    ]
    hostile += ["pipe", "a\0b", "x" * 5000, "no.png", "file://", "~/x.png", "/dev/zero", "/proc/self/environ"]
    for url in hostile:
        error = assert_error(ask(url), 400, "no picture")
        assert error["code"] == "no_such_file"
    assert_error(ask("large.png"), 413, "larger")
    assert_error(ask("http://127.0.0.1:1/a.png"), 400, "fetches nothing")


def test_what_the_framework_refuses_has_the_same_shape(server):
    assert_error(httpx.get(f"{server.url}/nothing"), 404, "/nothing")
    assert_error(httpx.get(f"{server.url}/v1/chat/completions"), 405, "GET")
    assert_error(httpx.delete(f"{server.url}/generate"), 405, "DELETE")
    assert_error(httpx.post(f"{server.url}/nothing", json={}), 404)
    assert_error(httpx.get(f"{server.url}/docs/nothing.js"), 404)
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert_error(httpx.post(f"{server.url}/generate", content=b"--x\r\nbroken", headers=broken), 400)
    assert_error(
        httpx.post(f"{server.url}/generate", content=b"a", headers={"content-type": "multipart/form-data"}), 400
    )


# Bodies, heads and connections


def raw(server, *pieces: bytes, seconds: float = 20.0) -> bytes:
    """Send bytes as they are, and read what comes until the server closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if b"\r\n\r\n" in answer and b'"error"' in answer:
                break
    return answer


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1]) * 1000


def test_a_large_body_is_refused_and_not_held(server):
    url, before = f"{server.url}/generate", resident()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    assert b"413" in raw(server, head).split(b"\r\n")[0]  # before a byte of it was sent
    piece = bytes(1_000_000)

    def pieces():
        for _ in range(100):
            yield piece

    said = {"Content-Length": "100000000"}
    assert_error(httpx.post(url, content=pieces(), headers=said, timeout=60), 413, "larger than 20,000,000 bytes")
    assert_error(httpx.post(url, content=pieces(), timeout=60), 413, "larger")  # in chunks: its length is not said
    assert resident() - before < 60e6
    assert server.service.held_bytes == 0
    assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_bodies_are_held_within_a_budget(start_server, tiny_model, scenes):
    server = start_server(tiny_model, max_held=1_000_000, max_body=1_000_000)
    with socket.create_connection(("127.0.0.1", server.port)) as hog:
        hog.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 950000\r\n\r\n" + bytes(900_000))
        wait_for(lambda: server.service.held_bytes == 900_000)
        answer = httpx.post(f"{server.url}/generate", content=bytes(200_000))
        assert_error(answer, 429, "holds as many bytes")
        assert int(answer.headers["retry-after"]) >= 1
    wait_for(lambda: server.service.held_bytes == 0)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en", "max_tokens": "3"}}
    assert httpx.post(f"{server.url}/generate", **sent).status_code == 200


def test_slow_heads_and_slow_bodies_do_not_stay(start_server, tiny_model, monkeypatch):
    monkeypatch.setattr("sigma_book.serving.HEAD_SECONDS", 0.6)
    server = start_server(tiny_model, body_seconds=0.6)
    start = time.monotonic()
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(50)]
    slow[1].sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")  # what was answered before does not matter
    while not slow[1].recv(65536).endswith(b"}"):
        pass
    for connection in slow[:25]:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\n")  # a head that does not end
    for connection in slow[25:]:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    enough = threading.Event()

    def drip():
        """A byte now and then, far beyond the limit: what counts is the whole, not the last byte."""
        while not enough.wait(0.1):
            for connection in (slow[0], slow[25]):
                with contextlib.suppress(OSError):
                    if not select.select([connection], [], [], 0)[0]:  # no answer yet
                        connection.send(b"X")

    dripping = threading.Thread(target=drip)
    dripping.start()
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    try:
        for connection in slow[25:]:
            assert b" 408 " in connection.recv(65536)
        for connection in slow[:25]:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(65536) == b""  # closed without a word: there was no request
    finally:
        enough.set()
        dripping.join()
    assert time.monotonic() - start > 0.5
    for connection in slow:
        connection.close()


def test_an_engine_that_is_stuck_and_one_that_had_nothing_to_do(start_server, tiny_folder, scenes, monkeypatch):
    """Idle for longer than the limit is no fault; a request that gets no token for so long is one, beyond its deadline."""
    monkeypatch.setattr("sigma_book.server.STUCK_SECONDS", 1.0)
    model, gate = load(tiny_folder, device="cpu"), threading.Event()
    prefill = model.prefill
    model.prefill = lambda *args, **options: gate.wait(30) and prefill(*args, **options)
    server = start_server(model)
    live = lambda: httpx.get(f"{server.url}/health/live").status_code  # noqa: E731
    long, short = server.service.config, replace(server.service.config, deadline=0.1)
    server.service.config = short
    assert live() == 200
    time.sleep(1.2)
    server.service.config = long
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en", "max_tokens": "3"}}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{server.url}/generate", timeout=60, **sent)
        wait_for(lambda: server.engine.stats().queued + server.engine.stats().running == 1)
        server.service.config = short
        assert live() == 200
        wait_for(lambda: live() == 503)
        server.service.config = long
        assert live() == 200  # a long prompt may take all the time that an answer has
        server.service.config = short
        answer = httpx.get(f"{server.url}/health/ready")
        assert answer.status_code == 503 and "start the server anew" in answer.json()["error"]["message"]
        gate.set()
        assert asked.result().status_code == 200
    assert live() == 200


def test_a_reader_that_does_not_read_is_let_go(start_server, long_model, scenes, monkeypatch):
    monkeypatch.setattr("sigma_book.serving.STALLED_SECONDS", 0.5)
    server = start_server(long_model, max_new_tokens=16000)
    asked = {"model": "pocket", "messages": question("caption en", data_url(scenes[0])), "stream": True}
    body = json.dumps(asked | {"max_tokens": 16000, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: server.engine.stats().finished["cancelled"] == 1, 60)
    wait_for(lambda: server.service.in_flight == 0)


@pytest.mark.parametrize("stopped", [False, True])
def test_who_reads_slowly_gets_all(start_server, tiny_model, scenes, monkeypatch, stopped):
    """A large answer takes longer than any of the limits, which are for those who take nothing, as `idle`."""
    for limit in ("HEAD_SECONDS", "STALLED_SECONDS"):
        monkeypatch.setattr(f"sigma_book.serving.{limit}", 0.4)
    size = 16_000_000  # more than the system itself buffers
    server = start_server(tiny_model, explain=lambda *given: "x" * size)
    server.config.timeout_graceful_shutdown = 0.1
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "a", "answer": "b"}}
    request = httpx.Request("POST", f"{server.url}/explain", **sent)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.socket() as connection, socket.socket() as idle:
        for one in (idle, connection):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            one.connect(("127.0.0.1", server.port))
            one.sendall(f"POST /explain HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        got = len(connection.recv(1000))
        if stopped:
            server.stop()
        while got < size and (piece := connection.recv(65536)):
            got += len(piece)
            time.sleep(len(piece) / 12e6)
        assert got > size
        wait_for(lambda: not server.server_state.connections)


def test_what_is_not_http(server):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
    ):
        answer = raw(server, garbage)
        assert answer.startswith(b"HTTP/1.1 400"), garbage
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    huge = b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 1_000_000 + b"\r\n\r\n"
    answer = raw(server, huge)
    assert answer.startswith(b"HTTP/1.1 431 ") and b"shorter headers" in answer
    length = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n"
    assert raw(server, length).startswith(b"HTTP/1.1 400")


def test_request_ids_cannot_be_forged_into_headers_or_logs(server, caplog):
    caplog.set_level(logging.INFO, "sigma_book.server")
    fine = httpx.get(f"{server.url}/health/live", headers={"x-request-id": "trace-1.a_B"})
    assert fine.headers["x-request-id"] == "trace-1.a_B"
    for hostile in (
        'a", "status": 200',
        "a b",
        "a" * 65,
        "é".encode("latin-1").decode("latin-1"),
        "a%0d%0aSet-Cookie: x",
    ):
        answer = httpx.get(f"{server.url}/health/live", headers={"x-request-id": hostile.encode("latin-1")})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    injected = b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\rSet-Cookie: b\r\nConnection: close\r\n\r\n"
    assert b"Set-Cookie" not in raw(server, injected)
    noted = [record.fields["id"] for record in caplog.records if record.name == "sigma_book.server"]
    assert len(noted) == 6 and all(re.fullmatch("[A-Za-z0-9._-]{1,64}", name) for name in noted)


def test_a_thousand_connections(server, scenes):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
    try:
        sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en", "max_tokens": "3"}}
        assert httpx.post(f"{server.url}/generate", **sent, timeout=30).status_code == 200
        for connection in idle:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        for connection in idle:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    finally:
        for connection in idle:
            connection.close()


# Keys, other sites, pages


def test_api_keys(start_server, tiny_model):
    server = start_server(tiny_model, api_keys=("first-key", "second-key"))
    closed = ("/v1/models", "/metrics", "/nothing")
    for path in closed:
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first-key"},
            {"authorization": "first-key"},
        ):
            answer = httpx.get(f"{server.url}{path}", headers=header)
            assert_error(answer, 401, "API key")
            assert answer.headers["www-authenticate"] == "Bearer"
    post = httpx.post(f"{server.url}/v1/chat/completions", content=bytes(1000))
    assert_error(post, 401, "API key")
    for key in ("first-key", "second-key"):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        assert client.models.list().data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="first-ke", max_retries=0).models.list()
    for path in ("/health/live", "/health/ready", "/docs", "/openapi.json", "/docs/swagger-ui.css"):
        assert httpx.get(f"{server.url}{path}").status_code == 200


def test_other_sites_may_ask_only_if_told_so(start_server, tiny_model, caplog):
    caplog.set_level(logging.INFO, "sigma_book.server")
    site = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = start_server(tiny_model)
    assert "access-control-allow-origin" not in httpx.get(f"{closed.url}/v1/models", headers=site).headers
    assert_error(httpx.options(f"{closed.url}/generate", headers=site), 405)
    server = start_server(tiny_model, cors_origins=("https://a.example",), api_keys=("k",))
    answer = httpx.options(f"{server.url}/generate", headers=site)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
    stranger = httpx.options(f"{server.url}/generate", headers=site | {"origin": "https://b.example"})
    assert_error(stranger, 400, "Disallowed CORS origin")
    told = {preflight.headers["x-request-id"] for preflight in (answer, stranger)}
    wait_for(lambda: told <= {record.fields["id"] for record in caplog.records})
    counts = server.service.meters.text().decode()
    assert 'sigma_book_requests_total{path="other",status="400"} 1.0' in counts
    assert 'path="/generate"' not in counts  # it was not asked for an answer
    refused = httpx.get(f"{server.url}/v1/models", headers=site)
    assert_error(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "https://a.example"  # or the page could not read why
    other = httpx.get(f"{server.url}/health/live", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    told = httpx.get(f"{server.url}/health/live", headers={"origin": "https://a.example"})
    assert told.headers["access-control-expose-headers"] == "Retry-After, X-Request-ID"


def test_the_head_alone(server):
    """What a monitor asks for."""
    for path in ("/", "/health/live", "/health/ready"):
        answer, whole = httpx.head(f"{server.url}{path}"), httpx.get(f"{server.url}{path}")
        assert (answer.status_code, answer.content) == (whole.status_code, b"")
        assert answer.headers.get("content-length") == whole.headers.get("content-length")
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert not any("head" in methods for methods in paths.values())


def test_the_docs_need_nobody_else(server):
    page = httpx.get(f"{server.url}/docs").text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    for path in re.findall(r'(?:src|href)="([^"]+)"', page):
        asset = httpx.get(f"{server.url}/{path}")
        assert asset.status_code == 200 and len(asset.content) > 500
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/models", "/generate", "/detect", "/health/live", "/metrics"} <= set(
        schema["paths"]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_body": 0}, "max_body"),
        ({"max_body": 2000, "max_held": 1000}, "max_body is 2,000, max_held 1,000"),
        ({"model_name": ""}, "model_name is empty"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"cors_origins": ("a.example",)}, "origin"),
        ({"cors_origins": ("https://a.example/page",)}, "origin"),
    ],
)
def test_an_operator_s_mistakes(settings, words):
    with pytest.raises(ValueError, match=words):
        ServerConfig(**({"model_name": "pocket"} | settings))


# Queue, deadline, those who go away


@pytest.fixture
def held(monkeypatch):
    """An engine's `encode_images` that waits until it is let go: a picture that takes as long as the test wants."""
    free = threading.Event()

    def options(model, **more):
        def encode(pixel_values):
            assert free.wait(60)
            return model.encode_images(pixel_values)

        return {"encode_images": encode} | more

    options.free = free
    yield options
    free.set()


def in_threads(count: int, call) -> tuple[list, list[threading.Thread]]:
    answers: list = []
    threads = [threading.Thread(target=lambda: answers.append(call())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return answers, threads


def test_the_seconds_to_wait_are_rounded_up():
    assert [_busy("full", seconds).headers["Retry-After"] for seconds in (0.0, 2.0, 2.4)] == ["1", "2", "3"]
    with pytest.raises(ApiError, match="^1 request is under way: ask again in 1 s$"):
        Service.check_room(SimpleNamespace(asked=1, most_asked=1, _full=_busy))


def test_a_full_server_says_how_long_it_takes(start_server, tiny_model, scenes):
    server = start_server(tiny_model)  # with the numbers of the command: 8 rows, 64 that wait, a deadline of 60 s
    server.service.asked = server.service.most_asked
    for held, seconds in ((2.0, "16"), (1e3, "60")):  # that a request keeps its row
        server.engine._held = held
        refused = httpx.post(f"{server.url}/generate", files={"file": scenes[0]}, data={"prompt": "caption en"})
        assert_error(refused, 429, f"72 requests are under way: ask again in {seconds} s")
        assert refused.headers["retry-after"] == seconds


def test_a_full_queue_says_when_to_come_back(start_server, pocket, scenes, held):
    server = start_server(pocket, engine=held(pocket, max_rows=1, queue_size=2), max_waiting=100)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en"}}

    def post():
        return httpx.post(f"{server.url}/generate", **sent, timeout=60)

    taken, threads = in_threads(1, post)
    wait_for(lambda: server.engine.stats().running == 1)
    more, others = in_threads(2, post)
    wait_for(lambda: server.engine.stats().queued == 2)
    refused = post()
    error = assert_error(refused, 429, "queue is full")
    assert error["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) >= 1
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    held.free.set()
    for thread in threads + others:
        thread.join(60)
    assert [answer.json()["answer"] for answer in taken + more] == [generate(scenes[0], "caption en", model=pocket)] * 3


def test_the_server_bounds_what_waits_before_the_queue(start_server, pocket, scenes, held):
    server = start_server(pocket, engine=held(pocket), max_waiting=3)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en"}}
    answers, threads = in_threads(3, lambda: httpx.post(f"{server.url}/generate", **sent, timeout=60))
    wait_for(lambda: server.service.asked == 3)
    assert_error(httpx.post(f"{server.url}/generate", **sent), 429, "3 requests")
    held.free.set()
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200] * 3
    wait_for(lambda: server.service.asked == server.service.in_flight == 0)


def test_a_deadline(start_server, pocket, scenes, long_model, held):
    waiting = start_server(pocket, engine=held(pocket, max_rows=1), deadline=0.3)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en"}}
    answers, threads = in_threads(2, lambda: httpx.post(f"{waiting.url}/generate", **sent, timeout=60))
    wait_for(lambda: waiting.service.asked == 2)
    time.sleep(0.4)
    held.free.set()
    for thread in threads:
        thread.join(60)
    for answer in answers:
        assert assert_error(answer, 504, "deadline")["code"] == "deadline"
    slow = start_server(long_model, deadline=0.5)
    asked = {"model": "pocket", "messages": question("caption en", data_url(scenes[0])), "max_tokens": 16000}
    with httpx.stream("POST", f"{slow.url}/v1/chat/completions", json=asked | {"stream": True}) as answer:
        assert answer.status_code == 200  # it had begun
        events = answer.read().decode().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline"
    wait_for(lambda: slow.service.in_flight == 0)
    assert metrics_of(slow)["sigma_book_errors_total{'code': 'deadline'}"] == 1  # though it began with a 200


def test_a_deadline_holds_before_a_picture_is_unpacked(start_server, tiny_model, scenes, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr("sigma_book.server.open_picture", lambda *given: free.wait(60) and open_picture(*given))
    server = start_server(tiny_model, deadline=0.3)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en", "max_tokens": "3"}}
    answers, threads = in_threads(3, lambda: httpx.post(f"{server.url}/generate", **sent, timeout=60))
    try:
        wait_for(lambda: len(answers) == 1)  # two readers are at work; the third request waits for one
        time.sleep(1)  # by now the deadline of the two is over too, whenever they came
    finally:
        free.set()
    for thread in threads:
        thread.join(60)
    for answer in answers:
        assert assert_error(answer, 504)["code"] == "deadline"


def test_explanations_are_given_up(start_server, tiny_model, scenes, caplog):
    caplog.set_level(logging.INFO, "sigma_book.server")
    begun = []

    def explain(image, prompt, answer, given_up):
        begun.append(prompt)
        assert given_up.wait(60)

    server = start_server(tiny_model, explain=explain)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "a", "answer": "b"}}
    request = httpx.Request("POST", f"{server.url}/explain", **sent)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    wire = f"POST /explain HTTP/1.1\r\n{head}\r\n".encode() + request.read()
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    first, *others = clients
    first.sendall(wire)
    wait_for(lambda: begun)
    for client in others:
        client.sendall(wire)
    wait_for(lambda: server.service._explainers.statistics().tasks_waiting == 2)
    for client in others:
        client.close()
    wait_for(lambda: server.service.in_flight == 1)
    first.close()
    wait_for(lambda: server.service.in_flight == 0)
    assert len(begun) == 1  # nothing is begun for those who have gone
    noted = [record.fields for record in caplog.records if record.fields["path"] == "/explain"]
    assert [(fields["status"], fields["code"]) for fields in noted] == [(499, "client_gone")] * 3
    slow = start_server(tiny_model, explain=explain, deadline=0.2)
    assert assert_error(httpx.post(f"{slow.url}/explain", **sent), 504)["code"] == "deadline"


def test_explanations_wait_in_bounds(tiny_model, scenes):
    free = threading.Event()
    sent = {"files": {"file": scenes[0] + bytes(1_100_000)}, "data": {"prompt": "a", "answer": "b"}}  # read from a disk

    async def ask_at_once(client: httpx.AsyncClient, service: Service) -> None:
        tasks = [asyncio.create_task(client.post("/explain", **sent)) for _ in range(12)]
        try:
            async with asyncio.timeout(10):
                while sum(task.done() for task in tasks) < 3:
                    await asyncio.sleep(0.01)
        finally:
            free.set()
        answers = await asyncio.gather(*tasks)
        assert Counter(answer.status_code for answer in answers) == {200: 9, 429: 3} and service.explaining == 0

    within_a_loop(tiny_model, ask_at_once, explain=lambda *given: free.wait(60))


def test_a_task_that_is_cancelled_leaves_no_work(long_model, scenes, monkeypatch):
    """Ray Serve cancels the task of a client who leaves; its thread runs on, and must not ask in that client's name."""
    opened, free = [], threading.Event()
    monkeypatch.setattr(
        "sigma_book.server.open_picture", lambda *given: opened.append(1) or free.wait(60) and open_picture(*given)
    )
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en", "max_tokens": "16000"}}

    async def leave(client: httpx.AsyncClient, service: Service) -> None:
        for number in range(4):
            task = asyncio.create_task(client.post("/generate", **sent))
            await asyncio.sleep(0.1)
            async with asyncio.timeout(10):
                while len(opened) < min(number + 1, 2):
                    await asyncio.sleep(0.01)
            task.cancel()
            assert assert_error(await task, 499)["code"] == "client_gone"
        free.set()
        wait_for(lambda: service.engine.stats().finished["cancelled"] == 2, 5)
        assert len(opened) == 2  # at a time; the others found that nobody waits any more

    try:
        within_a_loop(long_model, leave)
    finally:
        free.set()


def test_who_goes_away_while_the_server_stops_is_noted_as_that():
    reply = SimpleNamespace(record=SimpleNamespace(fields={}), service=SimpleNamespace(draining=True))
    assert Reply._fault(reply, Event("", finish="cancelled")).code == "client_gone"


def within_a_loop(model, asking, explain=None) -> None:
    """Run `asking(client, service)`, whose requests are tasks of the loop that answers them."""
    engine = Engine(model)
    app = create_app(engine, ServerConfig("pocket"), explain=explain)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            await asking(client, app.state.service)

    try:
        asyncio.run(run())
    finally:
        engine.close(finish=False)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place(start_server, long_model, scenes, stream, caplog):
    caplog.set_level(logging.INFO, "sigma_book.server")
    server = start_server(long_model, engine={"max_rows": 1})
    asked = {"model": "pocket", "messages": question("caption en", data_url(scenes[0])), "max_tokens": 16000}
    body = json.dumps(asked | {"stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: server.engine.stats().tokens > 5)
    said = server.engine.stats().tokens
    wait_for(lambda: server.engine.stats().running == 0)
    stats = server.engine.stats()
    assert stats.finished["cancelled"] == 1 and stats.tokens < said + 500
    wait_for(lambda: caplog.records)
    noted = caplog.records[0].fields
    assert (noted["finish"], noted["code"]) == ("cancelled", "client_gone") and noted["completion_tokens"] > 5
    assert metrics_of(server)["sigma_book_errors_total{'code': 'client_gone'}"] == 1
    short = httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"max_tokens": 3})
    assert short.status_code == 200
    wait_for(lambda: server.service.asked == server.service.in_flight == 0)


# What the operator sees


def metrics_of(server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {f"{s.name}{s.labels or ''}": s.value for s in samples}


def test_metrics(server, scenes):
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en"}}
    answer = httpx.post(f"{server.url}/generate", **sent).json()
    httpx.get(f"{server.url}/v1/models/none")
    httpx.get(f"{server.url}/made/up/{time.time()}")
    wait_for(lambda: server.service.in_flight == 0)
    seen = metrics_of(server)
    said = answer["usage"]["completion_tokens"]
    assert seen["sigma_book_tokens_total{'kind': 'completion'}"] == said
    assert seen["sigma_book_tokens_total{'kind': 'prompt'}"] == answer["usage"]["prompt_tokens"]
    assert seen["sigma_book_first_token_seconds_count"] == 1
    assert seen["sigma_book_token_seconds_count"] == said - 1
    assert seen["sigma_book_batch_rows_count"] == said - 1  # the first token came of the prompt
    assert seen["sigma_book_batch_rows_bucket{'le': '1'}"] == said - 1
    assert seen["sigma_book_requests_total{'path': '/generate', 'status': '200'}"] == 1
    assert seen["sigma_book_requests_total{'path': 'other', 'status': '404'}"] == 1
    assert seen["sigma_book_errors_total{'code': 'model_not_found'}"] == 1
    assert seen["sigma_book_queue_length"] == seen["sigma_book_running_rows"] == 0
    assert seen["sigma_book_cache_bytes"] > 1e6
    assert seen["process_resident_memory_bytes"] > 1e8
    metrics = httpx.get(f"{server.url}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")


def test_what_is_refused_at_the_door_has_its_path(start_server, tiny_model):
    server = start_server(tiny_model, api_keys=("k",))
    key = {"authorization": "Bearer k"}
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
    raw(server, head + b"Content-Length: 99000000\r\n\r\n")
    httpx.get(f"{server.url}/v1/models")
    httpx.get(f"{server.url}/made/up")
    broken = key | {"content-type": "application/json"}
    httpx.post(f"{server.url}/v1/chat/completions", content=b"{", headers=broken)
    wait_for(lambda: server.service.in_flight == 0)
    seen = server.service.meters.text().decode()
    for path, status in (("/generate", 413), ("/v1/models", 401), ("other", 401), ("/v1/chat/completions", 400)):
        assert f'sigma_book_requests_total{{path="{path}",status="{status}"}} 1.0' in seen
    assert 'sigma_book_errors_total{code="invalid_json"} 1.0' in seen


def test_the_log_has_counts_and_no_prompts(start_server, tiny_model, scenes, caplog):
    from sigma_book.server import JsonLines

    caplog.set_level(logging.INFO, "sigma_book.server")
    sent = {"files": {"file": ("secret-name.png", scenes[0])}, "data": {"prompt": "secret words", "max_tokens": "3"}}
    server = start_server(tiny_model)
    answer = httpx.post(f"{server.url}/generate", **sent).json()
    httpx.post(f"{server.url}/generate", files=sent["files"], data={"prompt": "secret <image>"})
    httpx.post(f"{server.url}/generate?secret=1", **sent)
    wait_for(lambda: len(caplog.records) == 3)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert "secret" not in json.dumps(lines)
    first = lines[0]
    assert {"time", "id", "seconds", "first_token_seconds"} <= set(first)
    assert (first["method"], first["path"], first["status"], first["finish"]) == ("POST", "/generate", 200, "length")
    assert first["completion_tokens"] == 3 and first["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert lines[1]["status"] == lines[2]["status"] == 400
    caplog.clear()
    told = start_server(tiny_model, log_prompts=True)
    httpx.post(f"{told.url}/generate", **sent)
    wait_for(lambda: len(caplog.records) == 1)
    assert caplog.records[0].fields["prompt"] == "secret words"


def test_a_failing_model_is_a_500_and_the_next_request_is_answered(start_server, make_tiny, tmp_path, scenes, caplog):
    from sigma_book import load

    model = load(make_tiny(tmp_path / "m"), device="cpu")
    server = start_server(model)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "caption en", "max_tokens": "3"}}
    weight = model.multi_modal_projector.linear.weight
    kept = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    assert_error(httpx.post(f"{server.url}/generate", **sent), 500, "inf or nan")
    with torch.no_grad():
        weight.copy_(kept)
    assert httpx.post(f"{server.url}/generate", **sent).status_code == 200


def test_a_bug_is_a_500_with_an_id_and_no_details(start_server, tiny_model, scenes, caplog):
    def explain(image, prompt, answer, given_up):
        raise KeyError("inner secret")

    server = start_server(tiny_model, explain=explain)
    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "a", "answer": "b"}}
    answer = httpx.post(f"{server.url}/explain", **sent)
    assert_error(answer, 500, answer.headers["x-request-id"])
    assert "inner secret" not in answer.text


def test_a_failure_while_a_picture_is_prepared_is_not_a_stop(start_server, tiny_model, scenes, caplog, monkeypatch):
    server = start_server(tiny_model)

    def fail(*given, **options):
        raise RuntimeError("inner secret")

    sent = {"files": {"file": scenes[0]}, "data": {"prompt": "a"}}
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "submit", fail)
        answer = httpx.post(f"{server.url}/generate", **sent)
    assert_error(answer, 500, answer.headers["x-request-id"])
    assert "inner secret" not in answer.text and any(
        "inner secret" in str(record.exc_info) for record in caplog.records
    )
    server.engine.close()
    assert assert_error(httpx.post(f"{server.url}/generate", **sent), 503)["code"] == "stopping"


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_photograph_that_was_held_otherwise_is_turned_once(server, pocket, orientation):
    """With the note that cameras write; the picture is opened at the door, and taken by the engine after that."""
    scene = draw_scene(make_scene(155))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    note, encoded = Image.Exif(), io.BytesIO()
    note[0x0112] = orientation
    scene.transpose(back).save(encoded, "PNG", exif=note)
    sent = {"files": {"file": encoded.getvalue()}, "data": {"prompt": "caption en"}}
    answer = httpx.post(f"{server.url}/generate", timeout=60, **sent).json()
    assert answer["answer"] == generate(scene, "caption en", model=pocket)
    assert generate(encoded.getvalue(), "caption en", model=pocket) == answer["answer"]
    sent["data"]["prompt"] = "detect red star"
    [found] = httpx.post(f"{server.url}/detect", timeout=60, **sent).json()["things"]
    upright = describe(generate(scene, "detect red star", model=pocket), scene.height, scene.width)
    assert found == upright["things"][0]


def test_check_extras_names_the_field():
    check_extras({"n": None, "user": "x", "tools": []})
    with pytest.raises(Exception, match=r"n is 2.*it may only be 1") as refused:
        check_extras({"n": 2})
    assert refused.value.status == 400 and refused.value.param == "n"


# Whatever fits the schema, and what does not


_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
_WISHES = {
    "/v1/chat/completions": (*_SAMPLING, "stream", "logprobs"),
    "/generate": _SAMPLING,
    "/detect": ("drawn",),
    "/explain": ("answer",),
}


def answerable(path: str, body: dict, scene: bytes) -> dict:
    """A body that this path takes, with a model, a picture and a prompt that there are; its other wishes stay as they came."""
    kept = {key: body[key] for key in _WISHES[path] if key in body}
    kept |= {} if path == "/explain" else {"max_tokens": 4}
    prompt = str(body.get("prompt") or body.get("messages"))[:20].strip() or "x"
    if path == "/v1/chat/completions":
        return kept | {"model": "pocket", "messages": question(prompt, data_url(scene))}
    return kept | {"file": scene, "prompt": prompt}


@pytest.mark.parametrize("most", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_server_error(start_server, tiny_model, scenes, most):
    """A few of each kind with a tiny model; many, with the pocket model that explains itself."""
    model = tiny_model if most < 10 else load(device="cpu")
    server = start_server(model, explain=explainer(model))
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked, answered = Counter(), Counter()

    def look(operation, mode) -> None:
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=most, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def no_server_error(case):
            if mode.is_positive and isinstance(case.body, dict):
                asked[operation.path] += 1
                if asked[operation.path] % 2:  # else nearly all ask a model that there is not, about what is no picture
                    case.body = answerable(operation.path, case.body, scenes[0])
            answer = case.call(timeout=30)
            assert answer.status_code < 500, answer.text
            answered[operation.path] += mode.is_positive and answer.status_code == 200

        no_server_error()

    for result in schema.get_all_operations():
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:
            try:
                look(result.ok(), mode)
            except Unsatisfiable:  # where nothing can be asked wrongly
                assert mode.is_negative
    assert all(answered[path] for path in ("/v1/chat/completions", "/generate", "/detect", "/explain")), answered
