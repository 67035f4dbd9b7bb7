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
# # A service on a port
#
# *What stands between a model that answers and a service that an operator would trust?*
#
# **You build** an HTTP service, and the door in front of it.
# **You need** chapters 21c (batching) and 22c (what may be asked).
# **Exports** the module `sigma_book.server`.


# %%
# | export
import asyncio
import hashlib
import hmac
import inspect
import io
import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import torch
from fastapi import Depends, FastAPI, File, Form, Request, Security, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, exposition
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException

from sigma_book.batching import Engine, EngineClosed, EngineStats, Event, PromptTooLong, QueueFull
from sigma_book.generation import Sampling, whole_number
from sigma_book.locate import describe, draw
from sigma_book.protocol import (
    ApiError,
    Ask,
    ChatAnswer,
    ChatRequest,
    ErrorBody,
    PlainJson,
    TokenNames,
    check_extras,
    check_unknown,
    error_response,
    open_picture,
    read_messages,
    read_picture,
    read_sampling,
    read_stops,
)


# %%
import base64
import socket
import threading
import time
import urllib.error
import urllib.request

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from sigma_book import generate, load
from sigma_book.fast import PictureCache
from sigma_book.kv_cache import KVCache
from sigma_book.serving import GracefulServer
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
# A model answers a call. A *service* answers whoever finds its address: the patient and the hasty, the broken and the
# hostile, one or a thousand of them. On its way a request passes five places, and at each of them it can be turned away with
# a number that says why, its status (chapter 22c). From 500 on the server is at fault; below, the request is, or its moment.

# %%
stations = [
    ("door", "400 401 408 413\n415 429 503", PROMPT),
    ("shape", "400 404", PROMPT),
    ("picture", "400 413\n429 504", PICTURE),
]
stations += [("queue", "429", GREY), ("rows", "504 500", ANSWER)]
figure, axis = plt.subplots(figsize=(8.4, 1.9))
axis.text(-0.9, 0.5, "request", ha="center", va="center")
for place, (name, codes, colour) in enumerate(stations):
    x = 1.6 * place
    axis.add_patch(FancyBboxPatch((x, 0.25), 1, 0.5, boxstyle="round,pad=0.06", facecolor=colour, lw=0))
    ink = "black" if colour == PROMPT else "white"
    axis.text(x + 0.5, 0.5, name, ha="center", va="center", color=ink)
    axis.text(x + 0.5, -0.45, codes, ha="center", va="center", fontsize=9, color="0.3")
    for start, end in (((x - 0.5, 0.5), (x - 0.1, 0.5)), ((x + 0.5, 0.15), (x + 0.5, -0.2))):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.4"})
axis.plot([6.9, 6.9, -0.9], [0.81, 1.15, 1.15], color=ANSWER, lw=1.5)
axis.annotate(
    "", (-0.9, 0.65), (-0.9, 1.16), arrowprops={"arrowstyle": "-|>", "color": ANSWER, "lw": 1.5, "shrinkA": 0}
)
axis.text(3.3, 1.25, "tokens, one by one", ha="center", va="bottom", color=ANSWER, fontsize=9)
axis.set(xlim=(-1.5, 7.8), ylim=(-0.8, 1.6))
axis.axis("off")
save(figure, "23_way")

# %% [markdown]
# *Figure: a request passes five boxes from left to right: the door, where key and size of the body are checked; its shape,
# the form of chapter 22c; the picture, unpacked; the queue; and the rows that the engine answers together. Under each stand
# the numbers with which it may be turned away there. An arrow leads from the last box back to the request: the tokens.*
#
# ## An answer over a wire, by hand
#
# HTTP is text. A client opens a connection and writes a line that says what it wants, some lines of the form
# `name: value`, an empty line, and then bytes, if it has any. The server writes back in the same form.
#
# So a service is a loop: take a connection, read up to the empty line, read as many bytes as `content-length` says,
# answer, close. Here the bytes are a picture, and the prompt stands in the path.


# %%
def answer_naive(listener: socket.socket, count: int) -> None:
    for _ in range(count):
        connection, _ = listener.accept()
        with connection:
            received = b""
            while b"\r\n\r\n" not in received:
                if not (piece := connection.recv(4096)):
                    return  # the client hung up
                received += piece
            head, _, body = received.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            prompt = lines[0].split(" ")[1].strip("/").replace("+", " ")
            (length,) = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")]
            while len(body) < length:
                body += connection.recv(4096)
            text = generate(body, prompt, model=model).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))


# %% [markdown]
# Any HTTP client can talk to it. The one of Python's library will do.

# %%
listener = socket.create_server(("127.0.0.1", 0))  # port 0: any that is free
naive_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
serving = threading.Thread(target=answer_naive, args=(listener, 2), daemon=True)
serving.start()
with urllib.request.urlopen(f"{naive_url}/caption+en", data=scene) as response:
    said = response.read().decode()
assert said == generate(scene, "caption en", model=model)
said

# %% [markdown]
# It works, and it is not a service. Let somebody connect and say nothing: the next client waits for as long as that one
# likes.

# %%
silent = socket.create_connection(listener.getsockname())
try:
    urllib.request.urlopen(f"{naive_url}/caption+en", data=scene, timeout=0.3)
    waited = False
except TimeoutError:
    waited = True
assert waited
silent.close()
listener.close()

# %% [markdown]
# That was the mildest of visitors. Others send a body without an end, or a picture of a kilobyte that unpacks to ten
# gigabytes, or ask for a billion tokens; an honest one closes the page before the answer is there, and the loop above
# computes it for nobody.
#
# Reading HTTP with care is work that others have done: **uvicorn** holds the connections, **FastAPI** finds the function for
# a path. Both run on one *event loop*: a thread that goes from connection to connection and never waits for any of them. What
# we write is what they leave open.
#
# ## How long does one wait?
#
# Before any code, the one formula of this chapter. The engine has $R$ rows, and a request keeps its row for $S$ seconds.
# So it can end $C = R / S$ requests a second, its **capacity**. If more than that come, a queue grows for as long as they
# come, and with it everybody's wait. No queue is long enough for that.
#
# So the queue is bounded. With room for $Q$ requests, whoever is let in waits for at most
#
# $$ W \approx \frac{Q}{C} = \frac{Q}{R}\,S $$
#
# seconds for a row. If $\lambda > C$ requests come in a second, the share $1 - C/\lambda$ of them is told at once to come
# back later: status 429, with $W$ in `Retry-After`; the engine knows $S$ from the requests that ended of late. It never says
# more than the deadline, for by then all who are inside are gone. A short no is kinder than a long maybe.
#
# Rows are a choice of the same kind. More of them answer more requests a second, and each request lasts longer, since it
# shares every step with the others and waits while a newcomer's prompt is read. An operator to whom a short wait matters most
# takes few rows and no queue: `--max-rows 2 --queue 0`.
#
# Let us try the formula. Four rows take a request every 25 ticks, and one comes every 12. Of each row we note when it will be
# free, and of each request that was let in when it will get a row.


# %%
def waiting_naive(rows: int, room: int, service: int, every: int, count: int) -> tuple[int, int]:
    """The longest wait and the number sent away, when a request comes every so many ticks."""
    free_at, starts, longest, refused = [0] * rows, [], 0, 0
    for number in range(count):
        now = number * every
        starts = [start for start in starts if start > now]  # those that still wait
        if len(starts) == room:
            refused += 1
            continue
        row = min(range(rows), key=lambda index: free_at[index])
        start = max(now, free_at[row])
        free_at[row] = start + service
        starts.append(start)
        longest = max(longest, start - now)
    return longest, refused


longest, refused = waiting_naive(rows=4, room=8, service=100, every=12, count=1000)  # twice what 4 rows can take
assert longest <= 8 / 4 * 100  # Q / R * S
assert 0.46 < refused / 1000 < 0.54  # 1 - C / lambda, which is 0.52
longest, refused


# %% [markdown]
# ## What an operator decides
#
# Every limit is a number with a name, checked when the server starts and not when the first request meets it.
# %%
# | export
@dataclass(frozen=True)
class ServerConfig:
    """What an operator decides.

    Parameters
    ----------
    model_name : str
        The name that requests give.
    max_body : int
        Largest body of a request, in bytes.
    max_held : int
        Bytes of all bodies that are held at one time, as they came; what is read out of them takes up to as much again.
    max_pixels : int
        Largest picture, in pixels, looked at before it is unpacked.
    max_new_tokens : int, optional
        Longest answer that may be asked for; what a row of the engine holds by default.
    max_waiting : int, optional
        Requests under way at a time, from the unpacking of the picture to the end of the answer; more are sent away.
        By default as many as the engine has rows and places in its queue.
    body_seconds : float
        Seconds within which a body must arrive.
    deadline : float
        Seconds from the whole body to the last token.
    api_keys : tuple of str
        Any of these opens the door; where there is none, the door is open to all.
    cors_origins : tuple of str
        Other sites whose pages may ask.
    image_root : Path, optional
        Folder whose pictures may be named by path; none may, by default.
    log_prompts : bool
        Write prompts into the log.

    Raises
    ------
    ValueError, FileNotFoundError
        If a number is out of its range, the name is empty, `max_body` is more than `max_held`, one of `cors_origins` is
        not an origin, or the folder is missing.
    """

    model_name: str
    max_body: int = 20_000_000
    max_held: int = 256_000_000
    max_pixels: int = 50_000_000
    max_new_tokens: int | None = None
    max_waiting: int | None = None
    body_seconds: float = 30.0
    deadline: float = 60.0
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    image_root: Path | None = None
    log_prompts: bool = False

    def __post_init__(self):
        for name in ("max_body", "max_held", "max_pixels", "max_new_tokens", "max_waiting"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        if not self.model_name:
            raise ValueError("model_name is empty: give the name that requests are to say")
        if self.max_body > self.max_held:
            raise ValueError(f"max_body is {self.max_body:,}, max_held {self.max_held:,}: lower the first")
        for name in ("body_seconds", "deadline"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected seconds, more than 0")
        if self.image_root is not None and not self.image_root.is_dir():
            raise FileNotFoundError(f"no such folder: {self.image_root}: expected one with pictures")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is no origin: expected one such as https://example.org, without a path")


# %% [markdown]
# ## Numbers for whoever watches
#
# **Prometheus** is a program that reads numbers from services every few seconds and keeps them. It asks `/metrics`, and gets
# lines of text: a name, a value. A *counter* only grows; a *gauge* goes up and down, as the length of the queue does; a
# *histogram* counts how many values were below each of some limits, from which "99 of 100 were faster than ..." can be read
# later, over any time and any number of servers.
# %%
# | export
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Meters:
    """What Prometheus reads, in a registry of its own."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, processor time, open files
        self.registry.register(self)
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self.requests = counter("sigma_book_requests", "Requests that ended.", ["path", "status"])
        self.errors = counter("sigma_book_errors", "Requests that ended with an error.", ["code"])
        self.tokens = counter("sigma_book_tokens", "Tokens read (prompt) and said (completion).", ["kind"])
        self.request_seconds = histogram(
            "sigma_book_request_seconds", "From head to end of a request.", ["path"], buckets=SECONDS
        )
        self.first_token = histogram("sigma_book_first_token_seconds", "From body to first token.", buckets=SECONDS)
        self.next_token = histogram("sigma_book_token_seconds", "From token to token.", buckets=SECONDS)

    def collect(self) -> list[Metric]:
        """What the engine knows, asked at the moment of reading."""
        stats = self.engine.stats()
        gauges = {
            "sigma_book_queue_length": ("Requests that wait for a row.", stats.queued),
            "sigma_book_running_rows": ("Requests that have a row.", stats.running),
            "sigma_book_cache_bytes": ("Memory of keys and values.", stats.cache_bytes),
        }
        if torch.cuda.is_available():
            taken = sum(torch.cuda.memory_allocated(card) for card in range(torch.cuda.device_count()))
            gauges["sigma_book_cuda_bytes"] = ("Memory that tensors take on GPUs.", taken)
        families: list[Metric] = [GaugeMetricFamily(name, text, value=value) for name, (text, value) in gauges.items()]
        return [*families, _batch_rows(stats)]

    def text(self) -> bytes:
        return exposition.generate_latest(self.registry)


def _batch_rows(stats: EngineStats) -> HistogramMetricFamily:
    """How many rows the steps had."""
    sizes = range(1, stats.rows + 1)
    buckets = [(str(size), sum(stats.batch_sizes.get(n, 0) for n in range(1, size + 1))) for size in sizes]
    total = sum(size * stats.batch_sizes.get(size, 0) for size in sizes)
    buckets.append(("+Inf", buckets[-1][1]))
    return HistogramMetricFamily("sigma_book_batch_rows", "Rows of a step.", buckets=buckets, sum_value=total)


# %% [markdown]
# ## The door
#
# Every request passes it, on its way in and out. (Also what a browser asks first, without a key, where a page of another site
# wants something: may it? `--cors` names the sites that may.) FastAPI calls such a thing *middleware*. By the standard ASGI it
# is called with three things: `scope`, the head of the request; `receive`, a function that gives the next piece of the body;
# and `send`, one that takes the next piece of the answer.
#
# The body is the dangerous part. The door takes it in itself, and counts: a body that says it is too large is refused
# before it is read, one that turns out too large as soon as it is, one that does not come is given up. All bodies
# together have a limit too, or a hundred clients with a body each below the limit would fill the memory. And a server that
# is full says so here, while a no is cheap.
#
# Bytes are not all. A picture of 20 MB is one long text, quickly read; 20 MB of `{},{},{}` are seven million dictionaries, and
# while Python makes them the loop stands still for everybody. So the door also counts the signs of which JSON is built, quotes,
# commas and brackets, before anybody reads it. A long prompt may be made of them; what holds more than that is refused.
#
# An API key is compared by its *digest*, 32 bytes that SHA-256 makes of any text. The comparison takes a time that does not
# depend on how much of the key was right, so whoever measures the time of many guesses learns nothing.
#
# The log gets one line for each request: when, how long, how many tokens. The prompt is somebody's question, and the
# picture somebody's picture: neither is written, unless the operator asks for prompts.
# %%
# | export
logger = logging.getLogger("sigma_book.server")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the `fields` that the call gave."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@dataclass
class Record:
    """One request, as long as it lives: its line in the log, and what must be let go at its end."""

    id: str
    fields: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    asked: float = 0.0  # when the whole body was there
    body_bytes: int = 0
    cancel: Callable[[], None] | None = None


CHAT_PATH = "/v1/chat/completions"  # the one whose body is JSON
ASKING_PATHS = (CHAT_PATH, "/generate", "/detect")  # those that need a row of the engine
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready")  # for those without a key


class Neighbours(CORSMiddleware):
    """Says no to other sites in the form of all errors."""

    def preflight_response(self, request_headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        sentence = f"{bytes(answer.body).decode()}: --cors names the sites that may ask"
        return error_response(ApiError(400, sentence, code="cors"))


class Guard:
    """The door: what every request passes on its way in and out.

    It gives each request an id, checks the key, reads the body within limits of bytes and seconds, writes one line
    into the log, and lets go of whatever a request held.
    """

    def __init__(self, app, service: "Service"):
        self.service, self.config = service, service.config
        self.app = self._for_sites(app)
        self.keys = [_fingerprint(key.encode()) for key in self.config.api_keys]

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record = Record(_request_id(headers.get(b"x-request-id", b"")))
        scope.setdefault("state", {})["record"] = record
        status = 0
        path = scope["path"]

        async def answer(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
            await send(message)

        self.service.in_flight += 1
        try:
            if scope["method"] != "OPTIONS":  # with which browsers ask, without a key, what a page may do
                self._check_key(path, headers.get(b"authorization", b""))
            if scope["method"] == "POST":
                self._check_room(path)
                _check_charset(scope["headers"])
                signs = self.service.most_signs if path == CHAT_PATH else None
                receive = await self._read_body(headers, receive, record, signs)
            await self.app(scope, receive, answer)
        except ApiError as error:
            record.fields["code"] = error.code
            await self._for_sites(error_response(error))(scope, receive, answer)
        except asyncio.CancelledError:
            # the server stops, and the time it gave its requests is over; or Ray Serve has seen the client leave
            fault = _stopping() if self.service.draining else _gone()
            record.fields["code"] = fault.code
            if status:
                raise
            await self._for_sites(error_response(fault))(scope, receive, answer)
        except Exception:
            logger.exception("failed", extra={"fields": {"id": record.id}})
            record.fields["code"] = "internal_error"
            if status:
                raise  # the answer has begun: all that can be done is to break it off
            sentence = f"the server failed; its log says more under the id {record.id}"
            failed = error_response(ApiError(500, sentence, code="internal_error"))
            await self._for_sites(failed)(scope, receive, answer)
        finally:
            self.service.in_flight -= 1
            self.service.held_bytes -= record.body_bytes
            if record.cancel is not None:
                record.cancel()
            self._note(scope, record, status)

    def _for_sites(self, app):
        """What answers, an application or an error, for pages of other sites too: without these headers they cannot read it."""
        if not self.config.cors_origins:
            return app
        return Neighbours(
            app,
            allow_origins=self.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )

    def _check_key(self, path: str, authorization: bytes) -> None:
        if not self.keys or path in OPEN_PATHS or path.startswith(("/docs/", "/static/")):
            return
        scheme, _, given = authorization.partition(b" ")
        given = _fingerprint(given.strip()) if scheme.lower() == b"bearer" else b""
        if not sum(hmac.compare_digest(given, key) for key in self.keys):  # a sum looks at each, whichever fits
            sentence = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
            raise ApiError(401, sentence, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_room(self, path: str) -> None:
        """A no costs least before the body is read."""
        if self.service.draining:
            raise _stopping()
        if path in ASKING_PATHS:
            self.service.check_room()

    async def _read_body(self, headers: dict[bytes, bytes], receive, record: Record, signs: int | None) -> Callable:
        """Take the body in, and give a `receive` that hands it on. No more than the limit is ever held.

        `signs` is the most quotes, commas and opening brackets that a body of JSON may have.
        """
        if headers.get(b"content-encoding", b"").lower() not in (b"", b"identity"):
            sentence = "the body is compressed: send it as it is, without Content-Encoding"
            raise ApiError(415, sentence, code="compressed")
        too_large = ApiError(
            413, f"the body is larger than {self.config.max_body:,} bytes: send a smaller picture", code="too_large"
        )
        if int(headers.get(b"content-length", b"0")) > self.config.max_body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _gone()
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    record.body_bytes += len(chunk)
                    self.service.held_bytes += len(chunk)
                    if record.body_bytes > self.config.max_body:
                        raise too_large
                    if self.service.held_bytes > self.config.max_held:
                        raise _busy("the server holds as many bytes of pictures as it may")
                    body += chunk
        except TimeoutError as error:
            sentence = f"the body did not come within {self.config.body_seconds:g} seconds"
            raise ApiError(408, sentence, code="slow_body", headers={"Connection": "close"}) from error
        if signs is not None and sum(body.count(sign) for sign in b'",[{') > signs:
            sentence = "the body has more quotes, commas and brackets than a question can: send one picture, one prompt"
            raise ApiError(400, sentence, code="too_complex")
        record.asked = time.monotonic()
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> dict:
            return waiting.pop() if waiting else await receive()

        return replay

    def _note(self, scope, record: Record, status: int) -> None:
        """One line in the log, and the counters."""
        seconds = time.monotonic() - record.started
        route = scope.get("route")  # its pattern, not what was asked: there are endless paths
        # refused at the door; but who only asks whether a page may ask is "other"
        if route is None and scope["method"] != "OPTIONS":
            route = next((known for known in scope["app"].routes if known.path == scope["path"]), None)
        path = getattr(route, "path", "other")
        self.service.meters.requests.labels(path, str(status)).inc()
        self.service.meters.request_seconds.labels(path).observe(seconds)
        if status >= 400 or record.fields.get("code"):  # a stream had its 200 before it failed
            self.service.meters.errors.labels(record.fields.get("code") or str(status)).inc()
        request = {"id": record.id, "method": scope["method"], "path": scope["path"][:200], "status": status}
        request |= {"seconds": round(seconds, 4), "body_bytes": record.body_bytes} | record.fields
        logger.info("request", extra={"fields": request})


def _fingerprint(secret: bytes) -> bytes:
    """All of one length, so that a comparison does not tell how long the right one is."""
    return hashlib.sha256(secret).digest()


def _check_charset(headers: list[tuple[bytes, bytes]]) -> None:
    """A form's letters are decoded on the loop, and some of Python's codecs (punycode) take the square of their time."""
    for name, value in headers:
        given = parse_options_header(value)[1].get(b"charset") if name == b"content-type" else None
        if given is not None and given.lower() not in (b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1"):
            raise ApiError(415, "forms are read as UTF-8: leave the charset out of Content-Type", code="charset")


def _request_id(given: bytes) -> str:
    """The client's own id if it is a plain word, else a new one: what is written into logs and headers is ours."""
    return given.decode() if re.fullmatch(rb"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping: ask another", code="stopping")


def _too_late() -> ApiError:
    return ApiError(504, "the answer was not complete at its deadline", code="deadline")


def _too_long(sentence: str) -> ApiError:
    return ApiError(400, sentence, code="context_length_exceeded", param="prompt")


def _gone() -> ApiError:
    return ApiError(499, "the client went away", code="client_gone")


def _busy(reason: str, seconds: float = 1.0) -> ApiError:
    wait = {"Retry-After": str(max(1, math.ceil(seconds)))}
    return ApiError(429, f"{reason}: ask again in {wait['Retry-After']} s", code="busy", headers=wait)


# %% [markdown]
# ## From the engine's thread to the loop
#
# The engine of chapter 21c calls a *listener* in its own thread, once a token. The loop must not wait for a thread, and the
# thread not for a client. So each event is handed over with `call_soon_threadsafe`, which puts it into a queue that the
# loop reads when it comes by.
#
# This is also where time is taken: to the first token, and from token to token.
#
# When a client goes away, the loop hears of it from the connection, and gives the request up. The engine then frees its
# row before the next token.
# %%
# | export
class Reply:
    """An answer while it comes: the engine's events, brought from its thread into the loop, timed and counted."""

    def __init__(self, record: Record, service: "Service"):
        self.record, self.service = record, service
        self.ticket = None
        self.size = (0, 0)  # of the upright picture
        self.completion_tokens = 0
        self._last = record.asked
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[float, Event]] = asyncio.Queue()

    def listen(self, event: Event) -> None:
        """Called from the engine's thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._events.put_nowait, (time.monotonic(), event))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read, those of the picture included, and tokens said, the one that ended the answer included."""
        prompt = self.ticket.prompt_tokens
        total = prompt + self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self.completion_tokens, "total_tokens": total}

    async def next(self) -> Event:
        """The next event.

        Raises
        ------
        ApiError
            If the answer ended otherwise than by its end or its limit.
        """
        meters = self.service.meters
        moment, event = await self._events.get()
        if event.token is not None:
            seconds = moment - self._last
            self._last = moment
            self.completion_tokens += 1
            meters.tokens.labels("completion").inc()
            if self.completion_tokens == 1:
                meters.first_token.observe(seconds)
                self.record.fields["first_token_seconds"] = round(seconds, 4)
            else:
                meters.next_token.observe(seconds)
        if event.finish is not None:
            self.record.fields |= self.usage | {"finish": event.finish}
        if event.finish not in (None, "stop", "length"):
            raise self._fault(event)
        return event

    def _fault(self, event: Event) -> ApiError:
        fault = ApiError(500, f"the model failed: {event.error}", code="model_failed")
        if event.finish == "deadline":
            fault = _too_late()
        if event.finish == "cancelled":  # a server that stops cancels tasks, and no answers
            fault = _gone()
        self.record.fields["code"] = fault.code
        return fault

    async def rest(self, *begun: Event) -> list[Event]:
        """All events to the end."""
        events = list(begun)
        while not events or events[-1].finish is None:
            events.append(await self.next())
        return events


@asynccontextmanager
async def cancelled_when_gone(request: Request, cancel: Callable[[], None]) -> AsyncIterator[None]:
    """While this is open, `cancel` is called when the client goes away."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


# %% [markdown]
# ## What is answered where
#
# `begin` is the way of every question: look at its size, unpack the picture in a thread of its own (the loop has other
# clients), shrink it to the square that the model sees (a waiting request then holds that beside its body, and not the
# unpacked photograph), and hand it to the engine, which says no if its queue is full. Threads are few. A request waits for one
# no longer than its client does, and not beyond its deadline. A thread itself cannot be cancelled: where nobody waits any
# more, it asks the engine for nothing.
#
# What differs is only the form of the answer: whole or as *server-sent events*, lines that begin with `data:` and come
# one by one; a chat completion, plain JSON, boxes in pixels, or a picture with the boxes drawn.
# %%
# | export
def _as_typed(text: str) -> str:
    """A field of a form with line breaks as they were: browsers send each as two characters."""
    return text.replace("\r\n", "\n")


def _drawn(content: bytes, answer: str, max_pixels: int) -> bytes:
    """A PNG of a picture with the boxes and masks of an answer."""
    encoded = io.BytesIO()
    try:
        draw(open_picture(content, max_pixels), answer).save(encoded, "PNG")
    except FileNotFoundError as error:
        raise ApiError(400, f"the answer holds masks, and this server cannot draw them: {error}") from error
    return encoded.getvalue()


PictureFile = Annotated[UploadFile, File(description="the picture: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF")]
DEFAULT_TOKENS = 100  # longest answer where nothing is said, if the operator allows as many
MaxTokens = Annotated[
    int | None, Form(ge=1, description=f"longest answer, in tokens; by default {DEFAULT_TOKENS} or less")
]
STUCK_SECONDS = 120.0  # longer than a token takes; only the prompt of a large model may take more


class Service:
    """What is answered at each path."""

    def __init__(self, engine: Engine, config: ServerConfig, explain: Callable | None):
        self.engine, self.config, self._explain = engine, config, explain
        self.meters = Meters(engine)
        self.names = TokenNames(engine.processor.tokenizer)
        self.context = engine.max_length
        self.most_tokens = config.max_new_tokens or self.context
        self.default_tokens = min(DEFAULT_TOKENS, self.most_tokens)
        self.most_signs = 20_000 + 100 * self.context  # those of the longest prompt that `_check_length` lets pass
        self.most_asked = config.max_waiting or engine.max_rows + engine.queue_size
        self.created = int(time.time())
        self.draining = False  # set by whoever stops the server: no new work, the running work is finished
        self.in_flight = 0  # requests that are not over
        self.held_bytes = 0  # of their bodies
        self.asked = 0  # requests that are being answered or wait for it
        self._done, self._done_at = (-1, -1, -1), time.monotonic()  # what the engine had done when it was asked last
        self._readers = anyio.CapacityLimiter(2)  # pictures unpacked at a time
        self._unpacking = threading.Semaphore(2)  # the same of threads: a cancelled task does not wait for its own
        self._explainers = anyio.CapacityLimiter(1)
        self.explaining = 0  # explanations that are made or wait for it

    async def begin(self, request: Request, picture: Callable[[], bytes], ask: Ask) -> Reply:
        """Unpack a picture off the loop and hand it to the engine."""
        record: Record = request.state.record
        if self.config.log_prompts:
            record.fields["prompt"] = ask.prompt[:2000]  # its length is looked at below
        self._check_length(ask)
        reply = Reply(record, self)
        side = self.engine.processor.image_size

        def prepare(given_up: threading.Event) -> None:
            with self._unpacking:
                if given_up.is_set():
                    return
                image = open_picture(picture(), self.config.max_pixels)
                reply.size = (image.height, image.width)
                square = image.resize((side, side), Image.Resampling.BICUBIC)  # as the processor does; little is held
            reply.ticket = self.engine.submit(
                square,
                ask.prompt,
                reply.listen,
                max_new_tokens=ask.max_new_tokens,
                sampling=ask.sampling,
                stop=ask.stop,
                logprobs=ask.logprobs,
                top=ask.top,
                deadline=self._left(record),
            )
            if given_up.is_set():  # perhaps by a task that was cancelled before there was a ticket
                reply.ticket.cancel()

        self.check_room()  # again: others may have come while the body did
        if self.asked == 0:
            self._done_at = time.monotonic()  # what it did not do while nobody asked is no fault
        self.asked += 1
        record.cancel = partial(self._let_go, reply)
        try:
            await self._in_thread(request, self._readers, prepare)
        except QueueFull as full:
            raise self._full("the queue is full") from full
        except PromptTooLong as error:
            raise _too_long(str(error)) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except EngineClosed as error:
            raise _stopping() from error
        self.meters.tokens.labels("prompt").inc(reply.ticket.prompt_tokens)
        return reply

    def _left(self, record: Record) -> float:
        """Seconds to the deadline."""
        return max(0.001, record.asked + self.config.deadline - time.monotonic())

    async def _in_thread(self, request: Request, limiter: anyio.CapacityLimiter, work: Callable) -> Any:
        """What `work(given_up)` gives, in a thread; `given_up` is set when the client goes away or the deadline comes.

        Raises
        ------
        ApiError
            499 or 504, if it was given up, begun or not.
        """
        given_up, faults = threading.Event(), []

        def give_up(fault: ApiError) -> None:
            faults.append(fault)
            given_up.set()
            scope.cancel()  # ends the wait for a thread; one that works is waited for

        late = asyncio.get_running_loop().call_later(self._left(request.state.record), give_up, _too_late())
        try:
            with anyio.CancelScope() as scope:
                async with cancelled_when_gone(request, partial(give_up, _gone())):
                    done = await anyio.to_thread.run_sync(work, given_up, limiter=limiter)
        finally:
            late.cancel()
            given_up.set()  # also where the server stops, which cancels this wait and not the thread
        if faults:
            raise faults[0]
        return done

    def check_room(self) -> None:
        """Raise a 429 if as many requests are under way as may be."""
        if self.asked >= self.most_asked:
            raise self._full(f"{self.asked} {'request is' if self.asked == 1 else 'requests are'} under way")

    def _full(self, reason: str) -> ApiError:
        return _busy(reason, min(self.engine.retry_after(), self.config.deadline))

    def _let_go(self, reply: Reply) -> None:
        self.asked -= 1
        if reply.ticket is None:
            return
        reply.ticket.cancel()  # does nothing to an answer that is complete
        if "finish" not in reply.record.fields:  # a stream whose client left, or what failed on its way to the engine
            code = reply.record.fields.get("code") or "client_gone"
            reply.record.fields |= reply.usage | {"finish": "cancelled", "code": code}

    def _check_length(self, ask: Ask) -> None:
        if ask.max_new_tokens > self.most_tokens:
            sentence = f"max_tokens is {ask.max_new_tokens}: expected 1 to {self.most_tokens}"
            raise ApiError(400, sentence, param="max_tokens")
        if len(ask.prompt) > 100 * self.context:  # not worth cutting into tokens: no piece has 100 characters
            raise _too_long(
                f"the prompt has {len(ask.prompt):,} characters, a row of this server {self.context:,} tokens: shorten it"
            )

    async def chat(self, request: Request, body: ChatRequest):
        """Ask about a picture, as `client.chat.completions.create` of the `openai` package does."""
        check_extras(body.model_extra or {})
        self._check_model(body.model)
        url, prompt = read_messages(body.messages)
        ask = self._read_ask(body, prompt)
        read = partial(read_picture, url, self.config.image_root, self.config.max_body)
        reply = await self.begin(request, read, ask)
        form = ChatAnswer(reply.record.id, body, self.names)
        async with cancelled_when_gone(request, reply.ticket.cancel):
            if not body.stream:
                return PlainJson(form.whole(await reply.rest(), reply.usage))
            first = await reply.next()  # faults up to here have their status
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        told = form.stream(first, reply.next, lambda: reply.usage)
        return StreamingResponse(told, media_type="text/event-stream", headers=headers)

    def _check_model(self, name: str) -> None:
        if name != self.config.model_name:
            sentence = f"there is no model {name!r:.100}: this server has {self.config.model_name!r}"
            raise ApiError(404, sentence, code="model_not_found", param="model")

    def _read_ask(self, body: ChatRequest, prompt: str) -> Ask:
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one", param="max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
        if body.stream_options:
            check_unknown(body.stream_options, "stream_options")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return Ask(
            prompt,
            body.max_completion_tokens or body.max_tokens or self.default_tokens,
            read_sampling(body.temperature, body.top_p, body.top_k, body.repetition_penalty, body.seed),
            read_stops(stop),
            bool(body.logprobs),
            body.top_logprobs or 0,
        )

    async def generate(
        self,
        request: Request,
        file: PictureFile,
        prompt: Annotated[str, Form(description="such as: caption en")],
        max_tokens: MaxTokens = None,
        temperature: Annotated[float | None, Form(ge=0, le=2, allow_inf_nan=False)] = None,
        top_p: Annotated[float | None, Form(gt=0, le=1, allow_inf_nan=False)] = None,
        top_k: Annotated[int | None, Form(ge=1, le=2**31)] = None,
        repetition_penalty: Annotated[float | None, Form(ge=0.01, le=100, allow_inf_nan=False)] = None,
        seed: Annotated[int | None, Form(ge=0, lt=2**63)] = None,
        stop: Annotated[list[str] | None, Form(max_length=4)] = None,
    ):
        """Ask about a picture, as a form: `curl -F file=@cat.png -F prompt="caption en"`. Other fields are refused."""
        prompt = _as_typed(prompt)
        sampling = read_sampling(temperature, top_p, top_k, repetition_penalty, seed)
        ask = Ask(prompt, max_tokens or self.default_tokens, sampling, read_stops(tuple(map(_as_typed, stop or ()))))
        answer, finish, reply = await self._answer(request, await file.read(), ask)
        return PlainJson({"prompt": prompt, "answer": answer, "finish_reason": finish, "usage": reply.usage})

    async def _answer(self, request: Request, content: bytes, ask: Ask) -> tuple[str, str, Reply]:
        reply = await self.begin(request, lambda: content, ask)
        async with cancelled_when_gone(request, reply.ticket.cancel):
            events = await reply.rest()
        return "".join(event.text for event in events), events[-1].finish, reply

    async def detect(
        self,
        request: Request,
        file: PictureFile,
        prompt: Annotated[str, Form(description="such as: detect cat ; dog, or: segment cat; or the names alone")],
        max_tokens: MaxTokens = None,
        drawn: Annotated[bool, Form(description="the picture with boxes on it, in place of JSON")] = False,
    ):
        """Find things: boxes in pixels, or with `drawn` (or `Accept: image/png`) a PNG with the boxes on it.

        Other fields are refused.
        """
        prompt = _as_typed(prompt)
        if not prompt.startswith(("detect ", "segment ")):
            prompt = f"detect {prompt}"
        content = await file.read()
        ask = Ask(prompt, max_tokens or self.default_tokens, Sampling())
        answer, finish, reply = await self._answer(request, content, ask)
        found = await anyio.to_thread.run_sync(describe, answer, *reply.size)
        if drawn or request.headers.get("accept", "").startswith("image/png"):
            picture = await self._in_thread(
                request, self._readers, lambda given_up: _drawn(content, answer, self.config.max_pixels)
            )
            return Response(picture, media_type="image/png")
        spoken = {"prompt": prompt, "answer": answer, "finish_reason": finish, "usage": reply.usage}
        return PlainJson(spoken | found)

    async def explain(
        self,
        request: Request,
        file: PictureFile,
        prompt: Annotated[str, Form()],
        answer: Annotated[str, Form(description="as the model gave it")],
    ):
        """Which patches of the picture each token of an answer looked at. Other fields are refused."""
        prompt, answer = _as_typed(prompt), _as_typed(answer)
        self._check_length(Ask(prompt + answer, 1, Sampling()))
        if self.explaining > 8:
            raise _busy("8 explanations are waiting")
        self.explaining += 1  # before anything is waited for, or others slip in

        def work(given_up: threading.Event) -> Response:  # written out there too: a long answer has many maps
            return PlainJson(self._explain(open_picture(content, self.config.max_pixels), prompt, answer, given_up))

        try:
            content = await file.read()
            return await self._in_thread(request, self._explainers, work)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        finally:
            self.explaining -= 1

    async def models(self):
        """The models that this server has: one."""
        return PlainJson({"object": "list", "data": [self._card()]})

    async def model(self, name: str):
        """One model."""
        self._check_model(name)
        return PlainJson(self._card())

    def _card(self) -> dict:
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "sigma_book",
            "max_model_len": self.context,
        }

    async def live(self):
        """200 while the process answers and its engine gets on: if not, start it anew."""
        stats = self.engine.stats()
        done = (stats.prompts, stats.tokens, sum(stats.finished.values()))
        if done != self._done or not stats.queued + stats.running:
            self._done, self._done_at = done, time.monotonic()
        limit = max(STUCK_SECONDS, self.config.deadline)  # a prompt may take all the time that an answer has
        if time.monotonic() - self._done_at > limit:
            sentence = f"the engine has work and took no token for {limit:g} seconds: start the server anew"
            raise ApiError(503, sentence, code="stuck")
        return PlainJson({"status": "alive"})

    async def ready(self):
        """200 while requests may come: if not, send them elsewhere."""
        if self.draining:
            raise _stopping()
        return await self.live()

    async def metrics(self):
        """For Prometheus."""
        return Response(self.meters.text(), media_type=exposition.CONTENT_TYPE_PLAIN_0_0_4)


async def _docs() -> Response:
    """The page at /docs; the files that it needs come from this server."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="sigma_book",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
    )


# %% [markdown]
# ## The application
#
# `create_app` connects paths with functions. The page at `/docs` is made by FastAPI from the types above; its script comes
# from this server and not from somebody else's, so it works without a network.
#
# FastAPI lets a form have any fields, and reads the last of several with one name. Whoever writes `max_token` would get an
# answer of another length than was wanted, and no word about it: what chapter 22c calls a lie. So forms are checked too.
# %%
# | export
def create_app(
    engine: Engine, config: ServerConfig, *, explain: Callable | None = None, static: Path | None = None
) -> FastAPI:
    """The service as an ASGI application, for uvicorn or whatever else runs one.

    Parameters
    ----------
    engine : Engine
        It is not closed by the application: whoever made it closes it.
    config : ServerConfig
    explain : callable, optional
        Called off the loop with (PIL image, prompt, answer, event); what it gives must be ready for JSON. Once the
        event is set nobody waits for it: it should return soon, whatever it gives.
    static : Path, optional
        A folder served at /static; its `index.html` is served at /.

    Returns
    -------
    FastAPI
        `app.state.service` is its `Service`.
    """
    service = Service(engine, config, explain)
    faults = {code: {"model": ErrorBody, "description": text} for code, text in _FAULTS.items()}
    app = FastAPI(
        title="sigma_book",
        description="PaliGemma from the book: ask about a picture.",
        docs_url=None,
        redoc_url=None,
        responses=faults,
        dependencies=[Security(HTTPBearer(auto_error=False))] if config.api_keys else [],
    )
    app.state.service = service
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], responses=_CHAT_FORMS)
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/models/{name:path}", service.model)
    form = {"methods": ["POST"], "dependencies": [Depends(_check_form)]}
    app.add_api_route("/generate", service.generate, **form)
    app.add_api_route("/detect", service.detect, **form, responses=_DETECT_FORMS)
    if explain is not None:
        app.add_api_route("/explain", service.explain, **form)
    app.add_api_route("/health/live", service.live)
    app.add_api_route("/health/ready", service.ready)
    app.add_api_route("/health/live", service.live, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/health/ready", service.ready, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/metrics", service.metrics, response_class=Response, responses=_METRICS_FORM)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.mount("/docs", StaticFiles(packages=[("fastapi_swagger", "resources")]))
    _add_pages(app, static)
    app.add_exception_handler(ApiError, _known_error)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(RequestValidationError, _shape_error)
    app.add_middleware(Guard, service=service)
    return app


_FAULTS = {"4XX": "what was wrong with the request, in a sentence", "5XX": "what went wrong here, in a sentence"}
_CHAT_FORMS = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
_DETECT_FORMS = {200: {"content": {"application/json": {}, "image/png": {}}}}
_METRICS_FORM = {200: {"content": {"text/plain": {}}}}


async def _check_form(request: Request) -> None:
    """Refuse fields that nobody would read: unknown ones, and all but the last of several with one name."""
    for name in request.query_params:
        raise ApiError(400, f"{name!r:.80} stands in the address: put it into the form", param=name[:80])
    names = [name for name, _ in (await request.form()).multi_items()]  # parsed already
    known = inspect.signature(request.scope["endpoint"]).parameters.keys() - {"request"}
    for name in names:
        if name not in known:
            raise ApiError(400, f"unknown field {name!r:.80}: /docs lists those there are", param=name[:80])
        if name != "stop" and names.count(name) > 1:
            raise ApiError(400, f"{name} is given {names.count(name)} times: give it once", param=name)


def _framework_error(request: Request, error: HTTPException) -> Response:
    """What FastAPI refuses by itself: an unknown path, another method, a body that is not JSON."""
    path = request.url.path[:200]
    sentences = {
        404: f"there is nothing at {path}: /docs lists what there is",
        405: f"{path} does not take {request.method}: /docs says what it takes",
    }
    sentence = sentences.get(error.status_code, f"{error.detail}: /docs says what is expected")
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return _known_error(request, ApiError(error.status_code, sentence, code=code, headers=error.headers))


def _shape_error(request: Request, error: RequestValidationError) -> Response:
    """The fault that lies deepest in the body, in words, as a 400: that is what OpenAI's clients expect."""
    # a text or a list: if the list is too long, that it is no text is not the point
    deepest = max(error.errors(), key=lambda fault: (len(fault["loc"]), fault["type"] == "too_long"))
    given = deepest.get("input")
    if deepest["type"] == "json_invalid":
        sentence, param, code = f"the body is not JSON: {deepest['ctx']['error']}", None, "invalid_json"
    elif isinstance(given, bytes):  # as it came: FastAPI parses nothing else
        sentence, param, code = "the body is not marked as JSON: send Content-Type: application/json", None, "not_json"
    else:
        place = ".".join(str(step) for step in deepest["loc"][1:] if step != "str" and "[" not in str(step))
        param, code = re.sub(r"(\.content\.\d+)\.\w+", r"\1", place) or None, None  # without the kind of the part
        shown = f", got {given!r:.80}" if isinstance(given, str | int | float | bool) else ""
        sentence = f"{param or 'the body'}: {deepest['msg']}{shown}"
    return _known_error(request, ApiError(400, sentence, param=param, code=code))


def _known_error(request: Request, error: ApiError) -> Response:
    request.state.record.fields["code"] = error.code
    return error_response(error)


_ASK_ANEW = {"Cache-Control": "no-cache"}  # or a browser runs the old app.js on the page of a new version


class _PageFiles(StaticFiles):
    def file_response(self, *given, **options) -> Response:
        response = super().file_response(*given, **options)  # a 304 where the browser has the file already
        response.headers.update(_ASK_ANEW)
        return response


def _add_pages(app: FastAPI, static: Path | None) -> None:
    """The folder of the demo page; without one, / leads to /docs."""
    page = None if static is None else static / "index.html"

    async def front() -> Response:
        if page is None or not page.is_file():
            return RedirectResponse("docs")
        return FileResponse(page, headers=_ASK_ANEW)

    app.add_api_route("/", front, methods=["GET", "HEAD"], include_in_schema=False)
    if static is not None and static.is_dir():
        app.mount("/static", _PageFiles(directory=static))


# %% [markdown]
# ## Proof
#
# `sigma_book/serving.py` puts the application on a port. (The command `sigma-book serve` does the same.) It adds what
# belongs to a process: time limits for connections, and a careful end. We start it in a thread of this notebook.

# %%
engine = Engine(model, max_rows=4, queue_size=4)
server = GracefulServer(create_app(engine, ServerConfig("pocket")))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    time.sleep(0.01)
url = f"http://127.0.0.1:{server.port}"


def post(path: str, content: dict) -> tuple[int, bytes]:
    """The status and the body that come back for some JSON."""
    request = urllib.request.Request(f"{url}{path}", json.dumps(content).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()


def question(prompt: str) -> dict:
    data_url = f"data:image/png;base64,{base64.b64encode(scene).decode()}"
    content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": data_url}}]
    return {"model": "pocket", "messages": [{"role": "user", "content": content}]}


# %% [markdown]
# The answer is that of a call, and the usage counts what was read and said. The picture is most of it.

# %%
status, body = post("/v1/chat/completions", question("caption en"))
completion = json.loads(body)
assert status == 200
assert completion["choices"][0]["message"]["content"] == generate(scene, "caption en", model=model)
usage = completion["usage"]
assert usage["prompt_tokens"] > model.config.num_image_tokens
usage

# %% [markdown]
# As a stream it comes in pieces; joined, they are the same.

# %%
status, body = post("/v1/chat/completions", question("caption en") | {"stream": True})
lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line]
assert lines[-1] == "[DONE]"
pieces = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
assert "".join(pieces) == completion["choices"][0]["message"]["content"]
pieces

# %% [markdown]
# And what is wrong is said. (`tests/test_server.py` has many more, with the `openai` package as the client.)

# %%
wrong = [{"max_tokens": 10**9}, {"model": "gpt-4o"}, {"n": 3}, {"messages": []}]
wrong.append({"messages": [{"role": "system", "content": "You are a pirate."}, *question("caption en")["messages"]]})
for change in wrong:
    status, body = post("/v1/chat/completions", question("caption en") | change)
    assert status in (400, 404)
    print(status, json.loads(body)["error"]["message"])

# %% [markdown]
# The one who connects and says nothing now waits alone.

# %%
silent = socket.create_connection(("127.0.0.1", server.port))
assert post("/v1/chat/completions", question("caption en"))[0] == 200
silent.close()

# %% [markdown]
# ## A look inside: more than it can take
#
# First its capacity: eight clients, each of which asks again as soon as it has its answer, and the better of two runs.
# Then requests at a fixed rate, from a fifth of that to twice as much, a second and a half each. The clients live in this
# process and take their share of it, so the numbers are lower than the server's own; the shape is what counts.

# %%
asked = json.dumps(question("caption en")).encode()
head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(asked)}\r\n"
wire = f"{head}Content-Type: application/json\r\n\r\n".encode() + asked


async def ask_once(results: list) -> None:
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(wire)
    answer = await reader.read()
    writer.close()
    results.append((int(answer[9:12]), time.perf_counter() - start))


async def closed_loop(clients: int, seconds: float) -> list:
    results, end = [], time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await ask_once(results)

    await asyncio.gather(*(client() for _ in range(clients)))
    return results


async def steady(rate: float, seconds: float) -> list:
    results, tasks, start = [], [], time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        tasks += [asyncio.create_task(ask_once(results)) for _ in range(int(elapsed * rate) + 1 - len(tasks))]
        await asyncio.sleep(0.2 / rate)
    await asyncio.gather(*tasks)
    return results


def in_a_loop(work) -> list:
    """Run a coroutine in a thread with a loop of its own: the notebook's is taken."""
    results = []
    runner = threading.Thread(target=lambda: results.extend(asyncio.run(work)))
    runner.start()
    runner.join()
    return results


# only answers count, not the requests that were told to come back
capacity = max(sum(status == 200 for status, _ in in_a_loop(closed_loop(8, 1.5))) / 1.5 for _ in range(2))
shares = (0.2, 0.5, 0.8, 1.2, 1.6, 2.0)
measured = [in_a_loop(steady(share * capacity, 1.5)) for share in shares]
assert {status for results in measured for status, _ in results} <= {200, 429}

# %%
admitted = [sorted(seconds for status, seconds in results if status == 200) for results in measured]
median = [1000 * seconds[len(seconds) // 2] for seconds in admitted]
slowest = [1000 * seconds[int(0.95 * (len(seconds) - 1))] for seconds in admitted]
refused_share = [sum(status == 429 for status, _ in results) / len(results) for results in measured]
assert refused_share[-1] > refused_share[0]

figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 4.2), sharex=True, height_ratios=(2, 1))
for values, name, style in ((median, "half are faster", "-"), (slowest, "19 of 20 are faster", "--")):
    upper.plot(shares, values, style, color=ANSWER, marker="o", ms=4)
    upper.annotate(name, (shares[-1], values[-1]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
upper.set(ylabel="milliseconds\nof those let in", ylim=(0, None))
lower.plot(shares, [100 * share for share in refused_share], color=PROMPT, marker="o", ms=4)
lower.plot(shares, [100 * max(0.0, 1 - 1 / share) for share in shares], color="0.6", lw=1, ls=":")
lower.annotate("1 - C/λ", (1.6, 37.5), xytext=(4, -14), textcoords="offset points", fontsize=9, color="0.4")
lower.set(xlabel="requests that come, as a share of what can be answered", ylabel="% sent away", xlim=(0, 2.7))
for axis in (upper, lower):
    axis.axvline(1, color="0.8", lw=1)
save(figure, "23_load")

# %% [markdown]
# *Figure: above, the time to an answer against the rate of requests. Half of the answers are faster than the solid line, 19
# of 20 faster than the dashed one. Both rise around the server's capacity and level off beyond it. Below, the share sent
# away: none well below the capacity, then more and more, above the dotted line of the formula.*
#
# Far left of the grey line the server has time. Near it, requests already share the rows and wait for each other. Right of
# it, the wait levels off: it has reached what four waiting requests take, and the rest is told to come back. More are sent
# away than the formula says. One likely reason: a no costs something too, since its request was read, by a processor that
# also plays the clients here.
#
# ## A careful end
#
# A server is stopped many times in its life, for each new version. `stop` is what the command does on a signal: new requests
# get a 503; `/health/ready` says no, so that whoever spreads the requests sends them elsewhere; those under way are finished.
# Then the process ends.

# %%
running = []
asking = threading.Thread(target=lambda: running.append(post("/v1/chat/completions", question("caption en"))))
asking.start()
while engine.stats().running == 0 and not running:
    time.sleep(0.001)
server.stop()
asking.join()
thread.join()
engine.close()
assert running[0][0] == 200 and not thread.is_alive()

# %% [markdown]
# ## The bill
#
# What does a server hold? For each row, keys and values of as many tokens as a row has room for; for each request a square
# picture in float32; the features of the last pictures (chapter 21b); and bodies, up to twice their common limit. Twice, for a
# chat is held as the bytes that came and as the text in them, and a form's file in memory and in `/tmp`, which is memory
# too if it is a *tmpfs*, as in `docker/compose.yaml`.


# %%
def bytes_per_token(layers: int, kv_heads: int, head_dim: int, size: int) -> int:
    return 2 * layers * kv_heads * head_dim * size  # keys and values


text = model.config.text
cache = KVCache(batch=1, num_kv_heads=text.num_key_value_heads, max_length=10, head_dim=text.head_dim)
per_token = bytes_per_token(text.num_hidden_layers, text.num_key_value_heads, text.head_dim, size=cache.key.itemsize)
assert per_token * 10 == text.num_hidden_layers * (cache.key.nbytes + cache.value.nbytes)
large = bytes_per_token(18, 1, 256, size=2)  # PaliGemma 3B in 16 bits
assert large == 18_432
pixel_values = model.processor.prepare([draw_scene(make_scene(3))], ["caption en"]).pixel_values
assert pixel_values.nbytes == 3 * model.config.vision.image_size**2 * 4
rows, room, waiting, side = 8, 8192, 64, 224
print(
    f"3B: {rows} rows of {room} tokens {large * rows * room / 1e9:.2f} GB, of 512 tokens {large * rows * 512 / 1e6:.0f} MB"
)
print(f"{waiting} waiting pictures {waiting * 3 * side * side * 4 / 1e6:.1f} MB")
print(f"features of the last pictures at most {PictureCache().most_bytes / 1e6:.0f} MB")
print(f"bodies at most {2 * ServerConfig('pocket').max_held / 1e6:.0f} MB")

# %% [markdown]
# That is why `--max-length` exists: answers about pictures are short, and most of a row for 8,192 tokens would stay empty.
#
# ## Your turn
#
# **1.** ★ Write `sent_away(rate, capacity)`: the share of requests that a server with a bounded queue must refuse.


# %%
def sent_away(rate: float, capacity: float) -> float: ...


check(sent_away, ((10.0, 20.0), 0.0), ((40.0, 20.0), 0.5), ((100.0, 20.0), 0.8))

# %% [markdown]
# **2.** ★★ Write `come_back(waiting, rows, seconds)`: the `Retry-After` of a full queue, in whole seconds, rounded up, at least
# one: the time until `waiting` requests have found rows, if each row is free again after `seconds`, by the formula for $W$.


# %%
def come_back(waiting: int, rows: int, seconds: float) -> int: ...


check(come_back, ((64, 8, 0.5), 4), ((4, 8, 0.1), 1), ((9, 2, 1.0), 5), ((9, 2, 2.0), 9))

# %% [markdown]
# **3.** ★★★ Write `parse_head(head)`: method, path and a dictionary of the headers, names in small letters, of the bytes up to
# the empty line. Give `None` for the headers if a line has no colon: such a request must be refused.


# %%
def parse_head(head: bytes) -> tuple[str, str, dict | None]: ...


check(
    parse_head,
    ((b"GET /a HTTP/1.1\r\nHost: x",), ("GET", "/a", {"host": "x"})),
    ((b"POST / HTTP/1.1\r\nA: b:c\r\nB:d",), ("POST", "/", {"a": "b:c", "b": "d"})),
    ((b"GET / HTTP/1.1\r\nbad",), ("GET", "/", None)),
)

# %% [markdown]
# Next: which patches an answer looked at, and a page to see it on.
