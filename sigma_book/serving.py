"""A server on a port: a model, an engine and the application of chapter 23 put together, and stopped with care."""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from sigma_book.batching import Engine
from sigma_book.fast import FastPaliGemma, PictureCache
from sigma_book.paligemma import PaliGemma
from sigma_book.protocol import ApiError, error_body
from sigma_book.server import JsonLines, ServerConfig, create_app
from sigma_book.why import explain, looks_as_json

__all__ = [
    "CarefulProtocol",
    "GracefulServer",
    "app_for",
    "explainer",
    "log_to_stderr",
    "read_api_keys",
    "remembering",
    "serve",
]

KEYS_VARIABLE = "SIGMA_BOOK_API_KEYS"
STATIC = Path(__file__).parent / "static"
HEAD_SECONDS = 10.0  # in which the head of a request must have come
STALLED_SECONDS = 30.0  # a client that takes nothing for so long is let go
OPEN_FILES = 65_536  # each connection is one, and 1,024 is what most systems give

logger = logging.getLogger("sigma_book.serving")


class CarefulProtocol(H11Protocol):
    """uvicorn's protocol, with time limits for heads that do not end and for readers that do not read."""

    _late = _stalled = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()

    def _watch(self) -> None:
        """A connection either has a request that is being answered, or a time by which the next must have begun."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not answering and self._late is None:
            # soon, for uvloop sends at the end of its turn: only then it is known what the client has not taken
            self._late = self.loop.call_soon(self._expire_later, "_late")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expire_later("_stalled")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _expire_later(self, name: str) -> None:
        left = self.transport.get_write_buffer_size()
        seconds = STALLED_SECONDS if left else HEAD_SECONDS  # the time for the next head begins when the answer is out
        setattr(self, name, self.loop.call_later(seconds, self._expire, name, left))

    def _expire(self, name: str, left: int) -> None:
        """Let the client go, unless it has taken some of the `left` bytes that were still to be sent."""
        if self.transport.get_write_buffer_size() < left:
            self._expire_later(name)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets an answer in the shape of all others."""
        error, reason = ApiError(400, msg, code="invalid_http"), "Bad Request"
        hint = getattr(sys.exc_info()[1], "error_status_hint", 400)  # of h11's error, which uvicorn has just caught
        if hint == 431:
            error = ApiError(431, "the head is too large: send fewer and shorter headers", code="head_too_large")
            reason = "Request Header Fields Too Large"
        body = json.dumps(error_body(error)).encode()
        head = f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT first finishes what runs.

    While it does, it still answers: new work gets a 503, `/health/ready` says no. A second signal ends it at once.

    Parameters
    ----------
    app : FastAPI
        What `create_app` gave.
    host : str
    port : int
        0 takes a free one: `port` tells which, once `started` is true.
    grace : float
        Seconds that running requests have after the signal, until the last byte of their answers has been sent.
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 0, grace: float = 30.0):
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=CarefulProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self.service, self.grace = app.state.service, grace
        self._until = float("inf")

    @property
    def port(self) -> int:
        return self.servers[0].sockets[0].getsockname()[1]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            logger.info("listening", extra={"fields": {"url": f"http://{host}:{self.port}", "pid": os.getpid()}})

    def stop(self) -> None:
        """Begin to stop; called again, stop at once."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.draining = True
        self._until = time.monotonic() + self.grace

    def handle_exit(self, sig: int, frame) -> None:
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        # what a client still has to take of its answer is under way too
        sending = any(one.transport.get_write_buffer_size() for one in self.server_state.connections)
        over = not (self.service.in_flight or sending) or time.monotonic() > self._until
        self.should_exit = self.should_exit or (self.service.draining and over)
        return await super().on_tick(counter)


def serve(
    make_model: Callable[[], PaliGemma],
    config: ServerConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_rows: int = 8,
    max_length: int | None = None,
    queue_size: int = 64,
    grace: float = 30.0,
    explaining: bool = True,
) -> None:
    """Answer on a port until a signal comes, and log to standard error.

    Parameters
    ----------
    make_model : callable
        Called once the port is taken, such as `partial(load, folder)`; connections wait until it is done.
    config : ServerConfig
    host, port
        0.0.0.0 lets other machines in. Port 0 is any free one; the line `listening` in the log says which.
    max_rows, max_length, queue_size
        As in `Engine`.
    grace : float
        Seconds that running requests have to finish after SIGTERM.
    explaining : bool
        Whether the page may ask which patches a token rests on; each such question costs about as much as the answer.

    Raises
    ------
    RuntimeError
        If the port is taken.
    """
    with _listen(host, port) as listener:
        sizes = {"max_rows": max_rows, "max_length": max_length, "queue_size": queue_size}
        app = app_for(make_model(), config, sizes, explaining)
        try:
            log_to_stderr()
            _allow_many_connections()
            GracefulServer(app, host, port, grace).run(sockets=[listener])
        finally:
            app.state.service.engine.close(finish=False)
    logger.info("stopped")


def app_for(model: PaliGemma, config: ServerConfig, sizes: dict, explaining: bool = True) -> FastAPI:
    """The whole application over a model: an engine of these sizes, a memory for pictures, and the page."""
    engine = Engine(model, **sizes, encode_images=remembering(model))
    return create_app(engine, config, explain=explainer(model) if explaining else None, static=STATIC)


def remembering(model: PaliGemma) -> Callable[[torch.Tensor], torch.Tensor]:
    """What encodes pictures for a model that is served: it does not change, so the features of the last pictures stay true."""
    if isinstance(model, FastPaliGemma):  # has such a memory already
        return model.encode_images
    return partial(PictureCache().encode, model.encode_images)


def explainer(model: PaliGemma) -> Callable | None:
    """Chapter 23b's maps of evidence, in the form that `create_app` takes and the demo page reads.

    None for a model that was made ready for speed: its maps give no gradient.
    """
    if isinstance(model, FastPaliGemma):
        return None
    return lambda image, prompt, answer, given_up: looks_as_json(
        explain(model, image, prompt, answer, given_up=given_up)
    )


def _listen(host: str, port: int) -> socket.socket:
    """The port, taken before a model is read: if it is not to be had, that is said at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"port {port} of {host} cannot be taken ({error}): give another --port or --host") from error


def log_to_stderr() -> None:
    """One JSON object a line, from this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("sigma_book").setLevel(logging.INFO)


def _allow_many_connections() -> None:
    """As many open files as the system lets this process have; each connection is one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def read_api_keys(path: str | Path | None = None) -> tuple[str, ...]:
    """Keys from a file, one a line, or from `SIGMA_BOOK_API_KEYS`, with commas between them; none if that is not set or empty.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file or the variable holds no key, or a key is not made of visible ASCII letters.
    """
    if path is None:
        source, given = KEYS_VARIABLE, os.environ.get(KEYS_VARIABLE, "")
        if not given:
            return ()
        keys = given.split(",")
    else:
        source = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}: expected API keys, one a line")
        keys = Path(path).read_text(encoding="utf-8").splitlines()
    keys = [key.strip() for key in keys if key.strip()]
    if not keys:  # else a secret that did not arrive would open the door to all
        raise ValueError(f"{source} holds no API key: write at least one, or leave it out")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError(f"{source}: an API key is made of visible ASCII letters, without spaces")
    return tuple(keys)
