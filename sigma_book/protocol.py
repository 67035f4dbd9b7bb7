"""What may be asked.

How does a stranger's request become a picture and a prompt, or a sentence that says why not?

Tangled from chapters/22c_protocol.py: edit there, then run python -m sigma_book.tangle.
"""

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

__all__ = [
    "FORMATS",
    "HARMLESS",
    "MOST_OF_A_STOP",
    "MOST_SCANS",
    "NEUTRAL",
    "ApiError",
    "Ask",
    "ChatAnswer",
    "ChatRequest",
    "ErrorBody",
    "ErrorDetail",
    "ImagePart",
    "ImageUrl",
    "Message",
    "PlainJson",
    "StreamOptions",
    "TextPart",
    "TokenNames",
    "check_extras",
    "check_unknown",
    "error_body",
    "error_response",
    "open_picture",
    "read_messages",
    "read_picture",
    "read_sampling",
    "read_stops",
    "told_logprobs",
]


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


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What comes with every status of 400 and above."""

    error: ErrorDetail


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
