# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What may be asked
#
# *How does a stranger's request become a picture and a prompt, or a sentence that says why not?*
#
# **You build** the language of the service: what may be asked, and how an answer is told.
# **You need** chapters 11 (pictures) and 21c (batching).
# **Exports** the module `sigma_book.protocol`.

# %%
# | export
import base64
import binascii
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from sigma_book.batching import Event
from sigma_book.generation import Sampling
from sigma_book.processor import Tokenizer, load_image


# %%
import asyncio
import math
import queue
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch
from pydantic import ValidationError

from sigma_book import generate, load
from sigma_book.batching import Engine
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()
model = load()
encoded = io.BytesIO()
draw_scene(make_scene(3)).save(encoded, "PNG")
scene = encoded.getvalue()

# %% [markdown]
# ## The picture
#
# Programs that ask models questions have a common form for it, that of OpenAI's *chat completions*. If we take it, every
# program that speaks it can ask PaliGemma. It is JSON, text with names, lists and values, and it is made for much larger
# things than one picture and one prompt.

# %%
figure, axis = plt.subplots(figsize=(8.0, 2.5))
boxes = [("request", 0, 1.5, GREY), ("messages", 2.1, 1.5, GREY), ("user", 4.2, 1.5, GREY)]
boxes += [("text", 6.3, 2.1, PROMPT), ("image_url", 6.3, 0.9, PICTURE), ("prompt", 8.6, 2.1, PROMPT)]
boxes += [("picture", 8.6, 0.9, PICTURE)]
for name, x, y, colour in boxes:
    axis.add_patch(FancyBboxPatch((x, y - 0.22), 1.3, 0.44, boxstyle="round,pad=0.06", facecolor=colour, lw=0))
    axis.text(x + 0.65, y, name, ha="center", va="center", color="black" if colour == PROMPT else "white", fontsize=9)
for name, x in (("n: 2", 0.6), ("tools", 2.0), ("system", 3.6), ("assistant", 5.4), ("a second picture", 7.8)):
    axis.text(x, 0.1, name, ha="center", va="center", fontsize=9, color="0.45")
    half = 0.1 + 0.055 * len(name)
    axis.plot([x - half, x + half], [0.1, 0.1], color="#d55e00", lw=1.2)
for start, end in (
    ((1.4, 1.5), (2.0, 1.5)),
    ((3.5, 1.5), (4.1, 1.5)),
    ((5.6, 1.6), (6.2, 2.1)),
    ((5.6, 1.4), (6.2, 0.9)),
):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.4"})
for y in (2.1, 0.9):
    axis.annotate("", (8.5, y), (7.7, y), arrowprops={"arrowstyle": "-|>", "color": "0.4"})
axis.set(xlim=(-0.2, 10.1), ylim=(-0.2, 2.5))
axis.axis("off")
save(figure, "22c_request")

# %% [markdown]
# *Figure: a request leads to its messages, to the one of the user, and there to two parts: a text, which is the prompt, and
# an image_url, which is the picture. Below, struck through, what the form also allows and this service refuses: n: 2, tools,
# system, assistant, a second picture.*
#
# ## The trusting version
#
# JSON becomes dictionaries and lists, and we take from them what we need.


# %%
def read_naive(body: bytes) -> tuple[str, bytes]:
    parts = json.loads(body)["messages"][0]["content"]
    return parts[0]["text"], base64.b64decode(parts[1]["image_url"]["url"].partition(",")[2])


def question(prompt: str) -> dict:
    url = f"data:image/png;base64,{base64.b64encode(scene).decode()}"
    content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "pocket", "messages": [{"role": "user", "content": content}]}


prompt, picture = read_naive(json.dumps(question("caption en")).encode())
assert (prompt, picture) == ("caption en", scene)

# %% [markdown]
# Give it something else, and it fails with a word from its own insides, or, what is worse, does not fail.

# %%
failures = set()
turned = question("caption en")
turned["messages"][0]["content"].reverse()  # the picture first
for body in (b"{", b"{}", b"[]", json.dumps(turned).encode()):
    try:
        read_naive(body)
    except Exception as error:
        failures.add(type(error).__name__)
print(sorted(failures))
assert len(failures) == 3

pirate = question("caption en") | {"n": 5}
pirate["messages"] += [{"role": "system", "content": "Speak like a pirate."}]
assert read_naive(json.dumps(pirate).encode()) == ("caption en", scene)  # five answers of a pirate: not a word about it

# %% [markdown]
# The second kind is a lie. A server that takes what it does not understand answers another question than it was asked.
#
# ## The formula
#
# A picture is bytes, and JSON is text. A **data URL** holds the bytes in *base64*: three bytes (24 bits) are spelled in four
# of 64 letters and signs (6 bits each), and a short last group is filled up:
#
# $$ n \text{ bytes} \to 4 \lceil n / 3 \rceil \text{ letters} $$

# %%
for count in (0, 1, 2, 3, 4, 5, len(scene)):
    assert len(base64.b64encode(bytes(count))) == 4 * math.ceil(count / 3)
print(f"{len(scene):,} bytes of picture are {4 * math.ceil(len(scene) / 3):,} letters")

# %% [markdown]
# ## One shape for everything that goes wrong
#
# Programs read errors too. First of all they read a number, the *status* of an HTTP answer: 200 is an answer, 400 a wrong
# request, 413 one that is too large, 429 one that came when there was no room, and 500 or more a fault of the server. Clients
# of OpenAI's service also know one shape, a sentence with a kind, a field and a short code, so all of our errors have it.
#
# One detail: a request may hold half a character (JSON can spell it), and an error that quotes it could not be written
# in UTF-8. `PlainJson` spells such things out in ASCII.


# %%
# | export
class ApiError(Exception):
    """A request that cannot be answered: a status, a sentence, and what OpenAI's clients look at.

    Parameters
    ----------
    status : int
        Of HTTP, 400 or above.
    message : str
        What was wrong, what was expected, what to do.
    code : str, optional
        A short name of the fault, for programs.
    param : str, optional
        The field that it is about.
    headers : dict, optional
        More headers for the answer, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers


class PlainJson(JSONResponse):
    """JSON in ASCII: halves of characters, which a request may hold, cannot be written in UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(error: ApiError) -> dict:
    """The one shape that all errors have: OpenAI's."""
    kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    kind = kind if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> PlainJson:
    return PlainJson(error_body(error), error.status, headers=error.headers)


# %%
# | export
class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What comes with every status of 400 and above."""

    error: ErrorDetail


# %% [markdown]
# The same sentence for programs and for people:

# %%
json.dumps(error_body(ApiError(400, "max_tokens is 0: expected 1 to 2048", param="max_tokens")))


# %% [markdown]
# ## The form of a question
#
# **pydantic** checks JSON against Python classes, here strictly: the text "5" is not the number 5. A field that changes
# nothing in an answer may hold anything. A field that would change it may only ask for what is done anyway. An unknown field
# is a mistake. One is enough to refuse a request, so pydantic lets them pass, and the functions below name the first. It
# would make an error of each itself, and a body has room for a million. A list ends at its first fault, for the same reason.
# %%
# | export
class _Strict(BaseModel):
    """No guessing: "5" is not 5. Unknown fields are kept, for `check_unknown` to name the first."""

    model_config = ConfigDict(strict=True, extra="allow")


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: Any = None  # harmless


class TextPart(_Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None


_Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[_Part], Field(max_length=64, fail_fast=True)]
    name: Any = None  # harmless


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """One picture and one prompt, in the form of OpenAI's chat completions.

    `temperature` is 0 unless given: the answer is then the same each time. `top_k` and `repetition_penalty` are
    additions.
    """

    model: str
    messages: list[Message] = Field(min_length=1, max_length=256, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, le=2**31)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


# %%
# | export
# Fields of OpenAI's API that change nothing in an answer here, whatever they say.
HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
# Fields that would change it, and the values that ask for nothing.
NEUTRAL = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def check_extras(extras: dict[str, Any]) -> None:
    """Let pass what changes nothing; refuse what would silently be left undone.

    Raises
    ------
    ApiError
        400, with the name of the field.
    """
    for name, value in extras.items():
        neutral = not isinstance(value, bool) and value in NEUTRAL.get(name, ())  # True == 1, and is no number
        if value is None or name in HARMLESS or neutral:
            continue
        shown = f"{value!r:.60}"
        if name not in NEUTRAL:
            raise ApiError(400, f"unknown field {name!r:.80}: /docs lists those there are", param=name[:80])
        allowed = " or ".join(json.dumps(choice) for choice in NEUTRAL[name])
        wanted = f"it may only be {allowed}, or be left out" if allowed else "leave it out"
        raise ApiError(400, f"{name} is {shown}, and PaliGemma has nothing of the kind: {wanted}", param=name)


def check_unknown(part: BaseModel, place: str) -> None:
    """Refuse a part of a request that has a field which is not known.

    Raises
    ------
    ApiError
        400, with the name of the first.
    """
    for name in part.model_extra or {}:
        raise ApiError(400, f"unknown field {name!r:.80} of {place}: leave it out", param=place)


_CONTENT = "messages.0.content"  # where prompt and picture stand: there is one message


def read_messages(messages: list[Message]) -> tuple[str, str]:
    """The picture's URL and the prompt of a conversation, which must be one turn.

    Raises
    ------
    ApiError
        400, if there is a system message or a second turn, no picture or several, several texts, or an unknown field.
    """
    for place, message in enumerate(messages):
        param = f"messages.{place}"
        if message.role != "user":
            problem = f"a message of the role {message.role!r}"
            raise ApiError(400, f"{problem}: PaliGemma has no chat, send one user message", param=f"{param}.role")
        check_unknown(message, param)
    if len(messages) > 1:
        raise ApiError(
            400, f"{len(messages)} messages: PaliGemma has no chat, each question is asked alone", param="messages"
        )
    content = messages[0].content
    parts = [] if isinstance(content, str) else content
    for place, part in enumerate(parts):
        check_unknown(part, f"{_CONTENT}.{place}")
        if isinstance(part, ImagePart):
            check_unknown(part.image_url, f"{_CONTENT}.{place}.image_url")
    pictures = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    texts = [content] if isinstance(content, str) else [part.text for part in parts if isinstance(part, TextPart)]
    if len(pictures) != 1:
        wanted = 'expected one part {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
        raise ApiError(400, f"{len(pictures) or 'no'} pictures: {wanted}", param=_CONTENT)
    if len(texts) != 1:
        raise ApiError(400, f"{len(texts) or 'no'} text parts: expected one, the prompt", param=_CONTENT)
    return pictures[0], texts[0]


# %% [markdown]
# `n` is how many answers one wants. One is what everybody gets, so `n=1` passes and `n=2` does not.

# %%
check_extras({"n": 1, "user": "somebody", "tools": []})
for asked in ({"n": 2}, {"response_format": {"type": "json_object"}}, {"colour": "red"}):
    try:
        check_extras(asked)
    except ApiError as error:
        print(error)


# %% [markdown]
# ## Where a picture may come from
#
# From the request itself. A server that fetches what a URL names can be sent to its own neighbours, to pages that only it may
# see. A server that opens what a path names can be sent to its own secrets. There is one exception: an operator may open one
# folder. Then a path must *end* in that folder, after all `..` and links have been followed.
#
# And a picture can be a bomb: a small file that says "I am 60,000 by 60,000". So its size is read, which costs
# nothing, before it is unpacked. A JPEG can be one in another way. It is drawn in *scans*, each over the whole picture and
# finer than the last. Ten are usual, but nothing in the format forbids thousands, and one that changes nothing takes 75 bytes.
# %%
# | export
def read_picture(url: str, root: Path | None, max_bytes: int) -> bytes:
    """The bytes that a picture's URL stands for: a data URL, or, under `root`, a file.

    Nothing is fetched from the net: a server that fetches what it is told to can be told to ask its neighbours.

    Raises
    ------
    ApiError
        400 for another kind of URL, a path that is not under `root`, or bad base64; 413 for a file that is too large.
    """
    scheme = url.partition(":")[0].lower() if ":" in url[:20] else ""
    if scheme == "data":
        head, comma, data = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(400, "a data URL reads data:image/png;base64,... and this one does not", param=_CONTENT)
        letters = data.encode("ascii", "replace").translate(None, b" \t\n\f\r")  # `base64 cat.png` breaks its lines
        try:
            return base64.b64decode(letters, validate=True)
        except binascii.Error as error:
            raise ApiError(400, f"the data URL is not base64: {error}", param=_CONTENT) from error
    if scheme not in ("", "file") or root is None:
        raise ApiError(
            400,
            f"the picture's URL begins {url[:12]!r}: this server fetches nothing, send the picture as a data URL",
            code="url_not_allowed",
            param=_CONTENT,
        )
    return _read_under(root, unquote(urlsplit(url).path) if scheme else url, max_bytes)


def _read_under(root: Path, name: str, max_bytes: int) -> bytes:
    """A file in a folder or below it. Whatever is wrong, the sentence is one and tells nothing about other files."""
    try:
        path = (root / name).resolve(strict=True)  # follows links: what counts is where they end
        if not path.is_relative_to(root.resolve()) or not path.is_file():
            raise FileNotFoundError
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise ApiError(
            400, f"no picture {name!r:.120} in the folder that this server reads", code="no_such_file", param=_CONTENT
        ) from error
    if len(content) > max_bytes:
        raise ApiError(413, f"{name!r:.120} is larger than {max_bytes:,} bytes", code="too_large", param=_CONTENT)
    return content


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow reads more, some of them programs
MOST_SCANS = 100  # of a JPEG: what libtiff allows for those in a TIFF


def open_picture(content: bytes, max_pixels: int) -> Image.Image:
    """A picture as RGB; its size is looked at before it is unpacked.

    Raises
    ------
    ValueError
        If it is empty, not a picture, damaged, larger than `max_pixels`, or a JPEG of more than `MOST_SCANS` scans.
    """
    if not content:
        raise ValueError("the picture is empty: send a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF")
    # a scan begins FF DA, and a length below 256; without its 00, a film behind a photograph may have as many by chance
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda\x00") > MOST_SCANS:
        raise ValueError(f"the JPEG is drawn in more than {MOST_SCANS} scans: save it anew, with fewer")
    try:  # opened once: with other readers, the same bytes might be another picture
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the picture would unpack to more than {max_pixels:,} pixels: reduce it first") from error
    except Exception as error:  # Pillow raises nearly every kind there is
        raise ValueError("the picture cannot be read: send a whole JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF") from error
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"the picture is {size}: at most {max_pixels:,} pixels are taken, reduce it first")
    return load_image(image)


# %% [markdown]
# Here is such a bomb. The smallest PNG has three parts: its sizes, packed pixels, an end.

# %%
sizes = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
parts = [(b"IHDR", sizes), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
framed = [
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
]
bomb = b"\x89PNG\r\n\x1a\n" + b"".join(framed)
assert len(bomb) < 100  # and unpacked:
assert 60_000 * 60_000 * 3 > 10e9
try:
    open_picture(bomb, max_pixels=50_000_000)
except ValueError as error:
    print(error)

# %% [markdown]
# ## What was asked, in the words of the engine
#
# What is left is small: a prompt, a length, a way to choose, stops. A temperature that was not given is 0 here, where
# OpenAI takes 1: a question about a picture has a best answer.


# %%
# | export
@dataclass(frozen=True)
class Ask:
    """What the engine is to do with a picture."""

    prompt: str
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top: int = 0


def read_sampling(
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
) -> Sampling:
    """How to choose, where what was not said is greedy and changes nothing."""
    return Sampling(temperature or 0.0, 1.0 if top_p is None else top_p, top_k, repetition_penalty or 1.0, seed)


MOST_OF_A_STOP = 256


def read_stops(stop: tuple[str, ...]) -> tuple[str, ...]:
    if not all(stop):
        raise ApiError(400, "a stop string is empty: leave it out", param="stop")
    if any(len(text) > MOST_OF_A_STOP for text in stop):  # each is looked for at each token
        raise ApiError(400, f"a stop string has more than {MOST_OF_A_STOP} characters: shorten it", param="stop")
    return stop


# %% [markdown]
# ## How an answer is told
#
# Whoever asks for `logprobs` gets each token by its text, its bytes and its log-probability. Some tokens are single
# bytes, a quarter of a character perhaps: that is what the list of bytes is for. Some have no text at all, like the one
# that ends the answer.


# %%
# | export
class TokenNames:
    """The text of single tokens, and their bytes where they stand for any."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._before = tokenizer.encode("a")[-1:]  # a space at the beginning of a text would be lost
        self._skip = len(self._decode(self._before))
        self._known: dict[int, tuple[str, list[int] | None]] = {}  # twenty are asked for at each token of an answer
        self._byte = {}
        for value in range(256):
            try:
                self._byte[tokenizer.token_id(f"<0x{value:02X}>")] = value
            except ValueError:  # this tokenizer has no pieces of bytes
                break

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        if token not in self._known:
            self._known[token] = self._name(token)
        return self._known[token]

    def _name(self, token: int) -> tuple[str, list[int] | None]:
        if token in self._byte:
            value = self._byte[token]
            return bytes([value]).decode("utf-8", "replace"), [value]
        text = self._decode([*self._before, token], skip_special_tokens=False)[self._skip :]
        silent = text and not self._decode([token])
        return text, None if silent else list(text.encode())


def told_logprobs(events: list[Event], names: TokenNames, top: int) -> dict:
    """Log-probabilities in OpenAI's form, one entry for each token; its `bytes` are null where it has no text."""

    def entry(token: int, logprob: float) -> dict:
        text, raw = names(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}

    content = []
    for event in events:
        if event.token is not None:
            others = [entry(token, logprob) for token, logprob in event.top[:top]]
            content.append(entry(event.token, event.logprob) | {"top_logprobs": others})
    return {"content": content, "refusal": None}


# %% [markdown]
# An answer is told whole, or as a stream of *server-sent events*: lines that begin with `data:`, one for each piece, an
# empty line behind each, and `[DONE]` at the end.
#
# The stream is written with `async` and `await`. Such a function may stop at each `await` and let others go on, in the same
# thread, until what it waits for is there. What goes from one to the next is an *event loop*; chapter 23 needs it for many
# connections.


# %%
# | export
class ChatAnswer:
    """An answer in the two forms of OpenAI's chat completions: whole, and as a stream of chunks.

    Parameters
    ----------
    request_id : str
    body : ChatRequest
        What was asked.
    names : TokenNames
    """

    def __init__(self, request_id: str, body: ChatRequest, names: TokenNames):
        self.body, self.names = body, names
        self.head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": body.model}

    def _logprobs(self, events: list[Event]) -> dict | None:
        return told_logprobs(events, self.names, self.body.top_logprobs or 0) if self.body.logprobs else None

    def whole(self, events: list[Event], usage: dict[str, int]) -> dict:
        """One object, of all events of an answer."""
        message = {"role": "assistant", "content": "".join(event.text for event in events), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(events)}
        choice["finish_reason"] = events[-1].finish
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": usage}

    async def stream(
        self, event: Event, following: Callable[[], Awaitable[Event]], usage: Callable[[], dict[str, int]]
    ) -> AsyncIterator[str]:
        """Server-sent events: the role, a chunk for each piece of text, why it ended, the usage if asked for."""
        counted = self.body.stream_options is not None and self.body.stream_options.include_usage
        yield self._chunk({"role": "assistant", "content": ""}, None, None, counted)
        try:
            while True:
                if event.text or (self.body.logprobs and event.token is not None):
                    yield self._chunk({"content": event.text}, self._logprobs([event]), None, counted)
                if event.finish is not None:
                    break
                event = await following()
            yield self._chunk({}, None, event.finish, counted)
            if counted:
                yield _sse(self.head | {"object": _CHUNK, "choices": [], "usage": usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent; the error comes as an event
            yield _sse(error_body(error))

    def _chunk(self, delta: dict, logprobs: dict | None, finish: str | None, counted: bool) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _sse(self.head | {"object": _CHUNK, "choices": [choice]} | ({"usage": None} if counted else {}))


_CHUNK = "chat.completion.chunk"


def _sse(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


# %% [markdown]
# ## Proof
#
# The trusting version's failures, and the pirate, in sentences. (`tests/test_server.py` asks over real connections, with
# the `openai` package, which nobody here wrote.)

# %%
checked = ChatRequest.model_validate(question("caption en") | {"user": "somebody"})
check_extras(checked.model_extra)
url, prompt = read_messages(checked.messages)
assert (prompt, read_picture(url, None, max_bytes=10**6)) == ("caption en", scene)
url, prompt = read_messages(ChatRequest.model_validate(turned).messages)  # the order of the parts is free
assert (prompt, read_picture(url, None, max_bytes=10**6)) == ("caption en", scene)
try:
    read_messages(ChatRequest.model_validate(pirate).messages)
    raise AssertionError("a pirate came in")
except ApiError as error:
    print(error)
for body in (b"{", b"{}", b"[]"):
    try:
        ChatRequest.model_validate_json(body)
        raise AssertionError(body)
    except ValidationError as error:
        print(error.errors()[0]["msg"])
for wrong in ({"max_tokens": 0}, {"max_tokens": "5"}, {"temperature": -1.0}, {"seed": True}, {"messages": []}):
    try:
        ChatRequest.model_validate(question("caption en") | wrong)
        raise AssertionError(wrong)
    except ValidationError as error:
        print(error.errors()[0]["loc"], error.errors()[0]["msg"])

# %% [markdown]
# And an answer, told in both forms, is the text of a plain call.

# %%
engine = Engine(model)
told: queue.Queue = queue.Queue()
engine.submit(scene, "caption en", told.put, max_new_tokens=30, top=3)
events = []
while not events or events[-1].finish is None:
    events.append(told.get(timeout=60))
engine.close()

form = ChatAnswer("1", checked, TokenNames(model.processor.tokenizer))
usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
whole = form.whole(events, usage)
assert whole["choices"][0]["message"]["content"] == generate(scene, "caption en", model=model)


async def streamed() -> list[str]:
    waiting = iter(events[1:])

    async def following() -> Event:
        return next(waiting)

    return [line async for line in form.stream(events[0], following, lambda: usage)]


with ThreadPoolExecutor() as pool:  # the notebook has a loop of its own: ours runs in a thread
    lines = pool.submit(asyncio.run, streamed()).result()
chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
assert lines[-1] == "data: [DONE]\n\n" and "".join(pieces) == whole["choices"][0]["message"]["content"]
pieces

# %% [markdown]
# ## A look inside: what else it might have said
#
# The three likeliest tokens at each place of that answer, as `top_logprobs` would tell them. A model that is sure has
# one long bar and two that cannot be seen.

# %%
content = told_logprobs(events, form.names, top=3)["content"]
joined = bytes(byte for entry in content for byte in entry["bytes"] or [])
assert joined.decode() == whole["choices"][0]["message"]["content"]
chances = np.exp([[other["logprob"] for other in entry["top_logprobs"]] for entry in content])  # (T, 3)
assert (chances.sum(-1) <= 1 + 1e-5).all() and (np.diff(chances, axis=-1) <= 0).all()

figure, axis = plt.subplots(figsize=(7.6, 2.8))
for rank, colour in enumerate((ANSWER, PROMPT, GREY)):
    axis.bar(np.arange(len(content)) + 0.28 * (rank - 1), chances[:, rank], width=0.26, color=colour)
for place, entry in enumerate(content):
    second = entry["top_logprobs"][1]["token"].strip()
    axis.text(place, 1.06, second, ha="center", va="bottom", fontsize=8, color="#9a6700")
axis.set_xticks(range(len(content)), [entry["token"].strip() for entry in content])
axis.set(ylabel="probability", ylim=(0, 1.02))
save(figure, "22c_logprobs")

# %% [markdown]
# *Figure: three bars for each token of an answer: green for the likeliest token there, orange for the second, grey for the
# third. The first reaches nearly one at most places. Below stands the token that was taken; above, in dark orange, the second
# likeliest.*
#
# ## The bill
#
# What a stream costs: each piece of text travels in a JSON object with the same id, date and name around it.

# %%
sent = sum(len(line) for line in lines)
text = len(whole["choices"][0]["message"]["content"])
print(f"{text} letters of answer, {sent:,} bytes of stream: {sent / text:.0f} bytes a letter")
print(
    f"the question: {len(json.dumps(question('caption en'))):,} bytes, {len(scene):,} of them the picture before spelling"
)
print(f"a token every 5 milliseconds: {sent / len(lines) / 0.005 / 1000:.0f} kB a second")
assert sent > 20 * text and sent / len(lines) / 0.005 < 100e3

# %% [markdown]
# It is the price of a form that everybody speaks. Even at 200 tokens a second a stream takes less than 100 kB a second.
#
# ## Your turn
#
# **1.** ★ Write `letters(count)`: how many letters of base64 a picture of `count` bytes becomes, without the module.


# %%
def letters(count: int) -> int: ...


check(letters, ((0,), 0), ((3,), 4), ((4,), 8), ((15_000_000,), 20_000_000))

# %% [markdown]
# **2.** ★★ Write `joined_text(stream)`: the text of a stream of server-sent events of the form that stands above.


# %%
def joined_text(stream: str) -> str: ...


example = 'data: {"choices": [{"delta": {"content": "a "}}]}\n\ndata: {"choices": [{"delta": {}}]}\n\n'
example += 'data: {"choices": [{"delta": {"content": "star"}}]}\n\ndata: [DONE]\n\n'
check(joined_text, ((example,), "a star"), (("data: [DONE]\n\n",), ""))

# %% [markdown]
# **3.** ★★★ Write `stays_inside(name)`: whether a relative path stays in its folder all the way, with `..` and without
# looking at the disk. Why is that not enough for a server? (`_read_under` above knows.)


# %%
def stays_inside(name: str) -> bool: ...


check(
    stays_inside,
    (("a/b.png",), True),
    (("a/../b.png",), True),
    (("../a.png",), False),
    (("a/../../a/b",), False),
    (("./../a.png",), False),
    (("a//../../b.png",), False),
)

# %% [markdown]
# Next: the service itself, and the door in front of it.
