"""Many at once.

How do requests that come and go share one reading of the weights?

Tangled from chapters/21c_batching.py: edit there, then run python -m sigma_book.tangle.
"""

import atexit
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from sigma_book.generation import (
    Allow,
    AnswerText,
    Sampling,
    answer_limits,
    ask_allow,
    choose,
    finite_scores,
    read_stop_strings,
    row_generators,
    seen_tokens,
    whole_number,
)
from sigma_book.kv_cache import KVCache
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch, Processor, load_image

__all__ = [
    "FINISHES",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Event",
    "PromptTooLong",
    "QueueFull",
    "RunningBatch",
    "SlotCache",
    "Ticket",
]


class SlotCache:
    """Keys and values of one layer for rows that come and go, each with a length of its own.

    The rows in use lie side by side at the front: a row that joins is put behind them, and when one leaves, the last
    takes its place. Token t of a row, counted from 0, lies in column t; with a window, in column t % window.

    Parameters
    ----------
    rows : int
        R, most rows at a time.
    num_kv_heads, head_dim : int
        K and Dh.
    max_length : int
        Tokens that there is room for in each row.
    window : int, optional
        How many tokens a token sees, itself included; None for all.
    dtype, device
        Of the buffers.
    """

    def __init__(
        self,
        rows: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.window = window
        self.max_length = max_length
        columns = max_length if window is None else min(window, max_length)
        self.key = torch.empty(rows, num_kv_heads, columns, head_dim, dtype=dtype, device=device)
        self.value = torch.empty_like(self.key)
        self.lengths: list[int] = []  # of the rows in use
        self.first = 0  # the row that the next step begins with
        self._cleared = 0  # columns that have been wiped once: an empty tensor holds anything, nan too

    @property
    def columns(self) -> int:
        return self.key.shape[2]

    def _reach(self, columns: int) -> None:
        """Wipe columns that are needed for the first time. Until then the system need not find memory for them."""
        if columns > self._cleared:
            end = min(columns + 64, self.columns)
            self.key[:, :, self._cleared : end] = 0
            self.value[:, :, self._cleared : end] = 0
            self._cleared = end

    def join(self, filled: KVCache, row: int, length: int) -> None:
        """Copy the last `length` tokens of one row of a cache that was just filled, behind the rows in use.

        Raises
        ------
        ValueError
            If no row is free, or if the row is too long.
        """
        place = len(self.lengths)
        if place == len(self.key) or length > self.max_length:
            raise ValueError(
                f"{place} of {len(self.key)} rows are in use, and a row of {length} tokens wants to join: there must be "
                f"one free, and it has room for {self.max_length} tokens"
            )
        token = filled.columns() - (filled.length - length)  # (C,): which token each column holds; below 0 is padding
        kept = (token >= max(0, length - self.columns)).nonzero()[:, 0]
        self._reach(min(length, self.columns))
        column = token[kept] % self.columns
        self.key[place, :, column] = filled.key[row, :, kept]
        self.value[place, :, column] = filled.value[row, :, kept]
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Free a row: the last one moves into its place, and what is left over is wiped.

        Wiped, because a mask gives hidden columns weight 0, and 0 times nan is nan.
        """
        last = len(self.lengths) - 1
        # one column more than a row holds, since a step that failed may have written it
        freed, moved = (min(self.lengths[index] + 1, self.columns) for index in (row, last))
        for buffer in (self.key, self.value):
            if row != last:
                buffer[row, :, :moved] = buffer[last, :, :moved]
                buffer[row, :, moved:freed] = 0
            buffer[last, :, :moved] = 0
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Free all rows, and wipe columns when they are needed again: this works whatever has failed before."""
        self.lengths, self._cleared = [], 0

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new token for each row of a step, (B, K, 1, Dh), and return what the step looks at, (B, K, C, Dh).

        The B rows from `first` on take part: as a rule all that are in use. C is the length of the longest; `mask` hides
        what lies behind the end of the others.

        Raises
        ------
        ValueError
            If a row is full or not in use, or if there is more than one new token.
        """
        rows = range(self.first, self.first + len(key))
        lengths = self.lengths[rows.start : rows.stop]
        if key.shape[2] != 1 or len(lengths) != len(key) or max(lengths) >= self.max_length:
            raise ValueError(
                f"a step takes one token a row, for rows in use with less than {self.max_length} tokens: got "
                f"{key.shape[2]} for each of {len(key)} rows, and in use are rows of {lengths} tokens"
            )
        end = min(max(lengths) + 1, self.columns)
        self._reach(end)
        place = torch.tensor([rows, [length % self.columns for length in lengths]], device=key.device)  # (2, B)
        self.key[place[0], :, place[1]] = key[:, :, 0].to(self.key.dtype)
        self.value[place[0], :, place[1]] = value[:, :, 0].to(self.value.dtype)
        for row in rows:
            self.lengths[row] += 1
        return self.key[rows.start : rows.stop, :, :end], self.value[rows.start : rows.stop, :, :end]

    def mask(self, positions: torch.Tensor) -> torch.Tensor:
        """Which columns new tokens at these positions (B, 1), counted from 1, may look at: boolean (B, 1, 1, C)."""
        end = min(int(positions.max()), self.columns)
        return (torch.arange(end, device=positions.device) < positions)[:, None, None]


class RunningBatch:
    """A model with rows that join and leave between steps.

    Parameters
    ----------
    model : PaliGemma
    rows : int
        Most rows at a time.
    max_length : int
        Tokens that a row has room for.
    encode_images : callable, optional
        Pictures (N, 3, S, S) to features (N, P, D), in place of the model's own method.
    """

    def __init__(
        self,
        model: PaliGemma,
        rows: int,
        max_length: int,
        encode_images: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.model = model
        self.encode_images = model.encode_images if encode_images is None else encode_images
        self.caches = [
            SlotCache(
                rows,
                like.key.shape[1],
                max_length,
                like.key.shape[3],
                window=like.window,
                dtype=like.key.dtype,
                device=like.key.device,
            )
            for like in model.language_model.new_caches(1, 1)
        ]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row in use holds."""
        return self.caches[0].lengths

    def read(self, batches: Sequence[Batch], best_only: bool = False) -> tuple[torch.Tensor, list[KVCache]]:
        """Read prompts of one row each: scores (B, V) for their first tokens, and caches to join from.

        With `best_only`, only the best scores must be exact.
        """
        longest = max(batch.input_ids.shape[1] for batch in batches)
        pads = [(longest - batch.input_ids.shape[1], 0) for batch in batches]
        pad_id, device = self.model.config.pad_token_id, self.model.device
        ids = torch.cat([F.pad(batch.input_ids, pad, value=pad_id) for batch, pad in zip(batches, pads)]).to(device)
        mask = torch.cat([F.pad(batch.attention_mask, pad) for batch, pad in zip(batches, pads)]).to(device)
        features = self.encode_images(torch.cat([batch.pixel_values for batch in batches]).to(device))
        caches = self.model.language_model.new_caches(len(batches), longest)
        return self.model.prefill(ids, features, mask, caches, best_only), caches

    def join(self, filled: list[KVCache], row: int, length: int) -> None:
        """A row of what was read takes the place behind the rows in use. If it raises, the rows are as they were."""
        place = len(self.lengths)
        try:
            for cache, read in zip(self.caches, filled):
                cache.join(read, row, length)
        except BaseException:
            for cache in self.caches:
                if len(cache.lengths) > place:
                    cache.leave(place)
            raise

    def leave(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        for cache in self.caches:
            cache.leave(row)

    def step(self, tokens: Sequence[int], first: int = 0, best_only: bool = False) -> torch.Tensor:
        """Feed one token to each of the rows from `first` on, and give the scores (B, V) for the ones after.

        If it raises, the rows are as they were. `best_only` as for `read`.
        """
        before = list(self.lengths)
        device = self.model.device
        ids = torch.tensor(tokens, device=device)[:, None]  # (B, 1)
        positions = torch.tensor(before[first : first + len(tokens)], device=device)[:, None] + 1  # counted from 1
        by_window = {cache.window: cache for cache in self.caches}
        masks = {window: cache.mask(positions) for window, cache in by_window.items()}
        try:
            for cache in self.caches:
                cache.first = first
            hidden_states = self.model.language_model(self.model.embed(ids), positions, masks, self.caches)  # (B, 1, D)
            return self.model.next_token_logits(hidden_states, best_only)
        except BaseException:
            for cache in self.caches:
                cache.lengths = list(before)
            raise


@dataclass(frozen=True)
class Event:
    """What a listener is told: something for each token, and a last word.

    Parameters
    ----------
    text : str
        New text: whole characters, and nothing that may yet turn out to be the beginning of a stop string.
    token, logprob
        The token that was taken, a stop token too, and the natural logarithm of its probability in the model's own
        distribution; None in the last event.
    top : tuple of (int, float)
        The likeliest tokens at this place with their log-probabilities, best first, as many as were asked for.
    finish : str, optional
        None, or in the last event one of `FINISHES`: at a stop token or string, at the limit, given up by its owner, out
        of time, or failed.
    error : str, optional
        A sentence, if `finish` is `error`.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    error: str | None = None


FINISHES = ("stop", "length", "cancelled", "deadline", "error")


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer."""


class QueueFull(RuntimeError):
    """As many requests as there is room for have come already.

    Parameters
    ----------
    requests : int
        How many are answered or wait for it.
    retry_after : float
        Seconds in which a full queue is likely to be worked off.
    """

    def __init__(self, requests: int, retry_after: float):
        super().__init__(f"{requests} requests are under way: try again in {retry_after:.1f} seconds")
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""

    def __init__(self):
        super().__init__("the engine is closed and takes no more requests")


class Ticket:
    """A request that was taken.

    Parameters
    ----------
    prompt_tokens : int
        Tokens of the prompt, pictures included.
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.cancelled = False

    def cancel(self) -> None:
        """Give the request up: no further token is told, and it ends as `cancelled`, unless it is over already."""
        self.cancelled = True


@dataclass(eq=False)
class _Request:
    """A request on its way: what was asked, and what has come of it so far."""

    ticket: Ticket
    batch: Batch
    listener: Callable[[Event], None]
    limit: int
    sampling: Sampling
    generator: torch.Generator
    text: AnswerText
    allow: Allow | None
    logprobs: bool
    top: int
    due: float | None  # on the clock of time.monotonic
    tokens: list[int] = field(default_factory=list)
    seen: torch.Tensor | None = None  # (1, V), only with a repetition penalty
    began: float | None = None
    over: bool = False
    deaf: bool = False

    @property
    def plain(self) -> bool:
        """Whether the best score decides."""
        return self.sampling.takes_best and self.allow is None

    def choose(self, scores: torch.Tensor) -> int:
        """The next token, from scores (1, V)."""
        if self.allow is not None:
            may = ask_allow(self.allow, list(self.tokens), self.limit - len(self.tokens))  # (V,)
            scores = scores.masked_fill(~may.to(scores.device), float("-inf"))
        if self.sampling.repetition_penalty != 1 and self.seen is None:
            seen = seen_tokens(self.batch.input_ids, self.batch.attention_mask, scores.shape[-1])
            self.seen = seen.to(scores.device)
        token = choose(scores, self.sampling, self.seen, [self.generator])  # (1,)
        if self.seen is not None:
            self.seen.scatter_(-1, token[:, None], True)
        return int(token)

    def given_up(self) -> str | None:
        """Why nobody wants more of it, if so."""
        if self.ticket.cancelled:
            return "cancelled"
        return "deadline" if self.due is not None and time.monotonic() >= self.due else None

    def tell(self, event: Event) -> None:
        """A listener that raises is not called again, whatever it raised."""
        if self.deaf:
            return
        try:
            self.listener(event)
        except BaseException:
            self.deaf = True
            logging.getLogger(__name__).exception("a listener failed: its request ends")

    def take(self, event: Event, stop_ids: set[int]) -> str | None:
        """Pass a token on; if the answer ends with it, why."""
        if reason := self.given_up():
            return reason
        self.tokens.append(event.token)
        stopped = event.token in stop_ids or self.text.push(event.token)
        self.tell(replace(event, text=self.text.take()))
        if stopped:
            return "stop"
        return "length" if len(self.tokens) == self.limit else None


def _best_only(requests: Sequence[_Request]) -> bool:
    """Whether nobody asks for more than the best token."""
    return all(request.plain and not (request.logprobs or request.top) for request in requests)


def _pick_tokens(requests: Sequence[_Request], logits: torch.Tensor) -> list[Event | Exception]:
    """The next token of each row of scores (B, V), still without text; or what went wrong with this row."""
    scores, finite = logits.float(), logits.isfinite().all(-1).tolist()
    chosen, wrong = scores.argmax(-1).tolist(), {}
    for row, request in enumerate(requests):
        try:
            if not finite[row]:
                finite_scores(logits[row : row + 1])  # raises, with chapter 13's sentence
            if not request.plain:
                chosen[row] = request.choose(scores[row : row + 1])
        except Exception as error:
            wrong[row] = error
    totals = scores.logsumexp(-1, keepdim=True)  # (B, 1)
    logprobs = (scores.gather(-1, torch.tensor(chosen, device=scores.device)[:, None]) - totals)[:, 0].tolist()
    picked: list[Event | Exception] = []
    for row, request in enumerate(requests):
        top = ()
        if request.top and row not in wrong:
            best = (scores[row] - totals[row]).topk(request.top)
            top = tuple(zip(best.indices.tolist(), best.values.tolist()))
        picked.append(wrong[row] if row in wrong else Event("", chosen[row], logprobs[row], top))
    return picked


@dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done.

    Parameters
    ----------
    queued, running, rows : int
        Requests that wait, requests that have a row, and rows that there are.
    batch_sizes : dict
        How many steps were taken with 1, 2, ... rows.
    prompts, prompt_tokens, tokens : int
        Prompts read, their tokens (pictures included, padding not), and tokens told.
    prefill_seconds, decode_seconds : float
        Time spent in reading prompts and in steps.
    finished : dict
        How many requests ended for each reason in `FINISHES`.
    cache_bytes : int
        What keys and values of all rows take.
    """

    queued: int
    running: int
    rows: int
    batch_sizes: dict[int, int]
    prompts: int
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    finished: dict[str, int]
    cache_bytes: int


class Engine:
    """Answers many requests at a time: they join and leave the running batch between two tokens.

    A thread of the engine's own runs the model and calls the listeners. Requests start in the order in which they came.

    Parameters
    ----------
    model : PaliGemma
        What `load` returned, with its `processor` and `stop_ids`.
    max_rows : int
        Most requests in the running batch.
    max_length : int, optional
        Tokens that a row has room for, pictures, prompt and answer together; the model's context by default.
    queue_size : int
        Most requests that wait for a row; with 0 whoever finds no row free is sent away.
    prefill_tokens : int
        Prompts that wait are read together while they have no more tokens than this, padding included; one is read in any
        case. There is a step between two reads, so this bounds how long running rows wait for a token.
    encode_images : callable, optional
        Pictures (N, 3, S, S) to features (N, P, D), in place of the model's own method: one that remembers.

    Raises
    ------
    ValueError
        If a number is out of its range, or the model has no processor.

    References
    ----------
    Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", section 3.1.
    """

    def __init__(
        self,
        model: PaliGemma,
        *,
        max_rows: int = 8,
        max_length: int | None = None,
        queue_size: int = 64,
        prefill_tokens: int = 512,
        encode_images: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        if not isinstance(getattr(model, "processor", None), Processor):
            raise ValueError("this model has no processor: take one from sigma_book.load, or set model.processor")
        self.processor = model.processor
        self.max_rows = whole_number("max_rows", max_rows, least=1)
        self.context = model.config.text.max_position_embeddings
        length = self.context if max_length is None else max_length
        self.max_length = whole_number("max_length", length, least=1, most=self.context)
        self.queue_size = whole_number("queue_size", queue_size, least=0)
        self.prefill_tokens = whole_number("prefill_tokens", prefill_tokens, least=1)
        self._vocab_size = model.config.text.vocab_size
        self._stop_ids = set(getattr(model, "stop_ids", None) or [model.config.eos_token_id])
        self._batch = RunningBatch(model, self.max_rows, self.max_length, encode_images)
        self._waiting: deque[_Request] = deque()
        self._reading: list[_Request] = []
        self._running: list[_Request] = []  # request i has row i of the batch
        self._steps, self._finished = Counter(), Counter()
        self._prompts = self._prompt_tokens = self._tokens = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._held = 1.0  # seconds that a request keeps its row, as seen of late
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="sigma_book engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, finish=False)  # a thread that runs on while Python ends would crash it

    def submit(
        self,
        image,
        prompt: str,
        listener: Callable[[Event], None],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        allow: Allow | None = None,
        logprobs: bool = False,
        top: int = 0,
        deadline: float | None = None,
    ) -> Ticket:
        """Hand in a request, from any thread; returns when the picture is prepared, long before the answer.

        Parameters
        ----------
        image : path, bytes, array, PIL image, or a list of them
            One picture, or several for this prompt.
        prompt : str
        listener : callable
            Called with an `Event` for each token and with a last one, from the engine's thread: it must return quickly.
        max_new_tokens : int
            At least 1; the room that the prompt leaves bounds it too.
        sampling : Sampling, optional
            Greedy by default. A seed draws what a call of its own with this seed draws.
        stop : sequence of str
            Strings that end the answer and are left out of it.
        allow : callable, optional
            Which tokens may come next, see `Allow`; called from the engine's thread.
        logprobs : bool
            Whether log-probabilities are wanted. If not, a model that was made ready for speed may round them.
        top : int
            How many of the likeliest tokens an event lists.
        deadline : float, optional
            Seconds from now: no token is told later.

        Raises
        ------
        ValueError
            If an argument is out of its range; if the prompt contains `<image>`; if a picture cannot be read.
        PromptTooLong
            If the prompt leaves no room for an answer.
        FileNotFoundError
            If there is no such picture.
        QueueFull
            If too many requests wait already.
        EngineClosed
            If it has been closed.
        """
        due = _read_deadline(deadline)
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling is {sampling!r:.80}: expected a Sampling")
        for name, value in (("listener", listener), ("allow", allow)):
            if not callable(value) and (name == "listener" or value is not None):
                raise ValueError(f"{name} is {value!r:.80}: expected a function")
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        top = whole_number("top", top, least=0, most=self._vocab_size)
        text = AnswerText(self.processor.tokenizer.decode, read_stop_strings(stop))
        self._check_place()  # before the work of preparing a picture
        shown = list(image) if isinstance(image, list | tuple) else [image]
        batch = self.processor.prepare([[load_image(source) for source in shown]], [prompt])
        length = batch.input_ids.shape[1]
        if length >= self.max_length:
            raise PromptTooLong(
                f"the prompt has {length} tokens, pictures included: the context here has room for {self.max_length}, prompt "
                f"and answer together, so shorten it by {length - self.max_length + 1} or more"
            )
        [limit] = answer_limits(batch.attention_mask, max_new_tokens, self.max_length)
        [generator] = row_generators(sampling.seed, 1)
        request = _Request(Ticket(length), batch, listener, limit, sampling, generator, text, allow, logprobs, top, due)
        with self._changed:
            self._check_place()
            self._waiting.append(request)
            self._changed.notify_all()
        return request.ticket

    def _check_place(self) -> None:
        with self._changed:
            if self._closed:
                raise EngineClosed
            requests = len(self._waiting) + len(self._reading) + len(self._running)
            if requests >= self.max_rows + self.queue_size:
                raise QueueFull(requests, self.retry_after())

    def retry_after(self) -> float:
        """Seconds in which a full queue is likely to be worked off, as things go of late."""
        # each of `max_rows` rows takes a new request every `_held` seconds
        return max(0.1, self._held * max(1, self.queue_size) / self.max_rows)

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and wait until the engine's thread has ended. Called from a listener, it does not wait.

        Parameters
        ----------
        finish : bool
            Answer what was taken, waiting requests included; otherwise all of it is cancelled.
        timeout : float, optional
            Seconds after which what is not finished is cancelled.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        inside = threading.current_thread() is self._thread
        if finish and not inside:
            self._thread.join(timeout)
        if not finish or (timeout is not None and not inside):
            with self._changed:
                for request in (*self._waiting, *self._reading, *self._running):
                    request.ticket.cancel()
        if not inside:
            self._thread.join()
            atexit.unregister(self.close)  # called from a listener, the thread runs on, and is waited for at exit

    def stats(self) -> EngineStats:
        """Plain numbers, for metrics."""
        with self._changed:
            return EngineStats(
                queued=len(self._waiting),
                running=len(self._reading) + len(self._running),
                rows=self.max_rows,
                batch_sizes=dict(sorted(self._steps.items())),
                prompts=self._prompts,
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                finished={reason: self._finished[reason] for reason in FINISHES},
                cache_bytes=sum(cache.key.nbytes + cache.value.nbytes for cache in self._batch.caches),
            )

    @torch.no_grad()  # here, since the setting is each thread's own
    def _work(self) -> None:
        """The engine's thread: move after move, until it is closed and nothing is left to do."""
        while self._has_work():
            try:
                self._sweep()
                self._admit()
                if self._running:
                    self._step()
            except Exception as error:  # what nothing below foresaw ends the requests under way, not the engine
                logging.getLogger(__name__).exception("the engine failed: the requests under way end")
                for request in (*self._reading, *self._running):
                    self._end(request, "error", f"the engine failed: {error}")
                with self._changed:
                    self._reading, self._running = [], []
                for cache in self._batch.caches:
                    cache.clear()

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            return bool(self._waiting or self._running)

    def _sweep(self) -> None:
        """End the requests that nobody wants any more, waiting or running."""
        with self._changed:
            gone = [(request, reason) for request in self._waiting if (reason := request.given_up())]
            for request, _ in gone:
                self._waiting.remove(request)
        for request, reason in gone:
            self._end(request, reason)
        for row in reversed(range(len(self._running))):
            if reason := self._running[row].given_up():
                self._leave(row, reason)

    def _admit(self) -> None:
        """Read the prompts whose turn it is."""
        with self._changed:
            longest = 0
            while self._waiting and len(self._reading) + len(self._running) < self.max_rows:
                longest = max(longest, self._waiting[0].ticket.prompt_tokens)
                if self._reading and longest * (len(self._reading) + 1) > self.prefill_tokens:
                    break
                self._reading.append(self._waiting.popleft())
        if self._reading:
            self._read(list(self._reading))

    def _read(self, requests: list[_Request]) -> None:
        """Read prompts together; whoever is not over with the first token gets a row."""
        start = time.perf_counter()
        try:
            logits, filled = self._batch.read([request.batch for request in requests], _best_only(requests))
        except Exception as error:
            if len(requests) > 1:
                for request in requests:  # one of them is at fault: each by itself
                    self._read([request])
            else:
                self._end(requests[0], "error", _sentence(error))
            return
        picked = _pick_tokens(requests, logits)
        with self._changed:
            self._prefill_seconds += time.perf_counter() - start
            self._prompts += len(requests)
            self._prompt_tokens += sum(request.ticket.prompt_tokens for request in requests)
        for row, request in enumerate(requests):
            request.began = start
            over = self._take(request, picked[row])
            if over is not None:
                self._end(request, *over)
                continue
            try:
                self._batch.join(filled, row, request.ticket.prompt_tokens)
            except Exception as error:  # no memory for it, say
                self._end(request, "error", _sentence(error))
                continue
            with self._changed:
                self._reading.remove(request)
                self._running.append(request)

    def _step(self) -> None:
        """One token for each running row."""
        start = time.perf_counter()
        tokens = [request.tokens[-1] for request in self._running]
        try:
            logits = self._batch.step(tokens, best_only=_best_only(self._running))
        except Exception:  # some row is at fault: each by itself
            picked = [self._step_alone(row, token) for row, token in enumerate(tokens)]
        else:
            picked = _pick_tokens(self._running, logits)
        with self._changed:
            self._decode_seconds += time.perf_counter() - start
            self._steps[len(tokens)] += 1
        for row in reversed(range(len(tokens))):  # from the end, since a row that leaves is filled from there
            if (over := self._take(self._running[row], picked[row])) is not None:
                self._leave(row, *over)

    def _step_alone(self, row: int, token: int) -> Event | Exception:
        """A step of one row, after one of all rows has failed."""
        try:
            alone = [self._running[row]]
            return _pick_tokens(alone, self._batch.step([token], row, _best_only(alone)))[0]
        except Exception as error:
            return error

    def _take(self, request: _Request, picked: Event | Exception) -> tuple[str, str | None] | None:
        """Pass a token on. If the request is over with it: why, and a sentence if it failed."""
        try:
            if isinstance(picked, Exception):
                raise picked
            reason = request.take(picked, self._stop_ids)
        except Exception as error:
            return "error", _sentence(error)
        with self._changed:
            self._tokens += reason not in ("cancelled", "deadline")
        if request.deaf:
            return "error", "its listener failed"
        return None if reason is None else (reason, None)

    def _leave(self, row: int, finish: str, error: str | None = None) -> None:
        """End the request of a row. The last row takes its place."""
        request = self._running[row]
        self._batch.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        self._end(request, finish, error)

    def _end(self, request: _Request, finish: str, error: str | None = None) -> None:
        """The last word to a listener."""
        if request.over:
            return
        request.over = True
        request.text.finish()
        with self._changed:
            if request in self._reading:
                self._reading.remove(request)
            self._finished[finish] += 1
            if request.began is not None:
                self._held += 0.1 * (time.perf_counter() - request.began - self._held)
        request.tell(Event(request.text.take(), finish=finish, error=error))


def _read_deadline(seconds: float | None) -> float | None:
    """The time at which so many seconds will be over, on the clock of time.monotonic."""
    if seconds is None:
        return None
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < float("inf"):
        raise ValueError(f"deadline is {seconds!r}: expected a number of seconds above 0")
    return time.monotonic() + seconds


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
