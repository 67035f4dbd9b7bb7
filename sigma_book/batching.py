"""Many at once.

How do requests that come and go share one reading of the weights?

Tangled from chapters/21c_batching.py: edit there, then run python -m sigma_book.tangle.
"""

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

__all__ = ["FINISHES", "Engine", "EngineStats", "Event", "QueueFull", "SlotCache", "Ticket"]


class SlotCache:
    """Keys and values of one layer for rows that come and go, each with a length of its own.

    The rows in use lie side by side at the front: a row that joins is put behind them, and when one leaves, the last
    takes its place. Token t of a row lies in column t; with a window, in column t % window.

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
        slots = max_length if window is None else min(window, max_length)
        self.key = torch.zeros(rows, num_kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self.lengths: list[int] = []  # of the rows in use
        self.first = 0  # the row that the next `update` begins with

    @property
    def slots(self) -> int:
        return self.key.shape[2]

    def join(self, filled: KVCache, row: int, length: int) -> None:
        """Copy the last `length` tokens of a row that was just read, behind the rows in use.

        Raises
        ------
        ValueError
            If no row is free, or if the row is too long.
        """
        place = len(self.lengths)
        if place == len(self.key) or length > self.max_length:
            raise ValueError(
                f"the cache has {len(self.key)} rows of {self.max_length} tokens, {place} rows are in use, and a row "
                f"of {length} tokens wants to join"
            )
        token = filled.columns() - (filled.length - length)  # (C,): counted without the padding
        kept = (token >= max(0, length - self.slots)).nonzero()[:, 0]
        slots = token[kept] % self.slots
        self.key[place, :, slots] = filled.key[row, :, kept]
        self.value[place, :, slots] = filled.value[row, :, kept]
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Free a row. The last row moves into its place, and what was left behind is wiped.

        The wiping matters: a mask gives unseen columns weight 0, but 0 times nan is nan.
        """
        last = len(self.lengths) - 1
        freed, moved = (min(self.lengths[index] + 1, self.slots) for index in (row, last))  # + 1: a step that failed
        for buffer in (self.key, self.value):
            if row != last:
                buffer[row, :, :moved] = buffer[last, :, :moved]
                buffer[row, :, moved:freed] = 0
            buffer[last, :, :moved] = 0
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new token for each row of the step, (B, K, 1, Dh), and return what they may look at.

        The step is of B rows from `first` on, all of those in use as a rule. Columns behind a row's own end are
        returned too, up to the longest row of the step: `mask` hides them.

        Raises
        ------
        ValueError
            If a row is full, or if there is more than one new token.
        """
        rows = range(self.first, self.first + len(key))
        lengths = self.lengths[self.first : self.first + len(key)]
        if key.shape[2] != 1 or len(lengths) != len(key) or max(lengths) >= self.max_length:
            raise ValueError(
                f"a step takes one token for each of {len(lengths)} rows of at most {self.max_length} tokens, and got "
                f"{key.shape[2]} for {len(key)} rows of {lengths}"
            )
        place = torch.tensor([rows, [length % self.slots for length in lengths]], device=key.device)  # (2, B)
        self.key[place[0], :, place[1]] = key[:, :, 0].to(self.key.dtype)
        self.value[place[0], :, place[1]] = value[:, :, 0].to(self.value.dtype)
        for row in rows:
            self.lengths[row] += 1
        end = min(max(lengths) + 1, self.slots)
        return self.key[rows.start : rows.stop, :, :end], self.value[rows.start : rows.stop, :, :end]

    def mask(self, positions: torch.Tensor) -> torch.Tensor:
        """Which columns the new tokens at these positions (B, 1), counted from 1, may look at: (B, 1, 1, C)."""
        end = min(int(positions.max()), self.slots)
        return (torch.arange(end, device=positions.device) < positions)[:, None, None]


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
        None, or in the last event: `stop` (a stop token or string), `length`, `cancelled`, `deadline` or `error`.
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


class QueueFull(RuntimeError):
    """Too many requests wait already.

    Parameters
    ----------
    waiting : int
        How many.
    retry_after : float
        Seconds after which they are likely to be under way.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already: try again in {retry_after:.1f} seconds")
        self.retry_after = retry_after


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
        """Give the request up: it ends before its next token, with finish `cancelled`, unless it is over already."""
        self.cancelled = True


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
        Prompts read, their tokens (pictures included, padding not), and tokens said.
    prefill_seconds, decode_seconds : float
        Time spent in reading prompts and in steps.
    finished : dict
        How many requests ended for each reason of `Event.finish`.
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


@dataclass(eq=False)
class _Request:
    """A request on its way: what was asked, and what has come of it so far."""

    ticket: Ticket
    batch: Batch | None  # until it is read
    listener: Callable[[Event], None]
    limit: int
    sampling: Sampling
    generator: torch.Generator
    text: AnswerText
    allow: Allow | None
    top: int
    due: float | None  # on the clock of time.monotonic
    tokens: list[int] = field(default_factory=list)
    seen: torch.Tensor | None = None  # (1, V), only with a repetition penalty
    began: float = 0.0
    deaf: bool = False
    over: bool = False

    @property
    def plain(self) -> bool:
        """Whether the best score decides."""
        return self.sampling.greedy and self.sampling.repetition_penalty == 1 and self.allow is None

    def choose(self, scores: torch.Tensor) -> int:
        """The next token, from scores (1, V)."""
        if self.allow is not None:
            may = ask_allow(self.allow, self.tokens, self.limit - len(self.tokens))  # (V,)
            scores = scores.masked_fill(~may.to(scores.device), float("-inf"))
        token = choose(scores, self.sampling, self.seen, [self.generator])  # (1,)
        if self.seen is not None:
            self.seen.scatter_(-1, token[:, None], True)
        return int(token)

    def given_up(self) -> str | None:
        """Why nobody waits for more, if so."""
        if self.ticket.cancelled:
            return "cancelled"
        return "deadline" if self.due is not None and time.monotonic() >= self.due else None

    def tell(self, event: Event) -> None:
        """A listener that raises is not called again, and its request ends."""
        if self.deaf:
            return
        try:
            self.listener(event)
        except BaseException:  # whatever it is, it is not the engine's, nor that of the other requests
            self.deaf = True
            logging.getLogger(__name__).exception("a listener failed: its request ends")


class Engine:
    """Answers many requests at a time: they join and leave the running batch between two tokens.

    One thread of the engine's own runs the model and calls the listeners. Requests start in the order in which they
    came.

    Parameters
    ----------
    model : PaliGemma
        What `load` returned; the engine reads its `processor` and `stop_ids`.
    max_rows : int
        Most requests in the running batch.
    max_length : int, optional
        Tokens that a row has room for, pictures, prompt and answer together; the model's context by default.
    queue_size : int
        Most requests that wait for a row.
    prefill_tokens : int
        Prompts that wait are read together while they are not more tokens than this, padding included; the first is
        read in any case. This bounds how long the rows that run are kept waiting between two tokens.
    encode_images : callable, optional
        Pictures (N, 3, S, S) to features (N, P, D), in place of the model's own method: one that remembers.

    Raises
    ------
    ValueError
        If a number is out of its range, or the model has no processor.
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
        self.model = model
        self.max_rows = whole_number("max_rows", max_rows, least=1)
        self.context = model.config.text.max_position_embeddings
        self.max_length = self.context
        if max_length is not None:
            self.max_length = whole_number("max_length", max_length, least=1, most=self.context)
        self.queue_size = whole_number("queue_size", queue_size, least=1)
        self.prefill_tokens = whole_number("prefill_tokens", prefill_tokens, least=1)
        self._encode = model.encode_images if encode_images is None else encode_images
        self._stop_ids = set(getattr(model, "stop_ids", None) or [model.config.eos_token_id])
        self._caches = [  # like those of the model, with rows that come and go
            SlotCache(
                max_rows,
                like.key.shape[1],
                self.max_length,
                like.key.shape[3],
                window=like.window,
                dtype=like.key.dtype,
                device=like.key.device,
            )
            for like in model.language_model.new_caches(1, self.max_length)
        ]
        self._waiting: deque[_Request] = deque()
        self._reading: list[_Request] = []
        self._running: list[_Request] = []  # request i has row i of the caches
        self._steps, self._finished = Counter(), Counter()
        self._prompts = self._prompt_tokens = self._tokens = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._holding = 1.0  # seconds that a request has its row, of late
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="sigma_book engine", daemon=True)
        self._thread.start()

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
        top: int = 0,
        deadline: float | None = None,
    ) -> Ticket:
        """Hand in a request, from any thread; returns at once.

        Parameters
        ----------
        image : path, bytes, array, PIL image, or a list of them
            One picture, or several for this prompt.
        prompt : str
        listener : callable
            Called with an `Event` for each token and a last one, from the engine's thread: it must return quickly. If
            it raises, it is not called again and the request ends.
        max_new_tokens : int
            At least 1; bounded by the room that the prompt leaves.
        sampling : Sampling, optional
            Greedy by default. A seed draws what a call of its own with this seed draws.
        stop : sequence of str
            Strings that end the answer and are left out of it.
        allow : callable, optional
            Which tokens may come next, see `Allow`; called from the engine's thread.
        top : int
            How many of the likeliest tokens each event lists.
        deadline : float, optional
            Seconds from now; the request ends before the first token that would come later.

        Raises
        ------
        ValueError
            If an argument is out of its range; if the prompt is too long or contains `<image>`; if a picture cannot be
            read.
        FileNotFoundError
            If there is no such picture.
        QueueFull
            If too many requests wait already.
        RuntimeError
            If the engine is closed.
        """
        self._check_open()
        due = _read_deadline(deadline)
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling is {type(sampling).__name__}: expected a Sampling")
        stop = read_stop_strings(stop)
        top = whole_number("top", top, least=0, most=self.model.config.text.vocab_size)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        batch = self._prepare(image, prompt)
        [limit] = answer_limits(batch.attention_mask, max_new_tokens, self.context)
        length = batch.input_ids.shape[1]
        if length >= self.max_length:
            raise ValueError(
                f"the prompt has {length} tokens, pictures included: a row has room for {self.max_length} tokens, prompt "
                f"and answer together, so shorten it by {length - self.max_length + 1} or more"
            )
        request = _Request(
            ticket=Ticket(length),
            batch=batch,
            listener=listener,
            limit=min(limit, self.max_length - length),
            sampling=sampling,
            generator=row_generators(sampling.seed, 1)[0],
            text=AnswerText(self.model.processor.tokenizer.decode, stop),
            allow=allow,
            top=top,
            due=due,
        )
        with self._changed:
            self._check_open()
            self._waiting.append(request)
            self._changed.notify_all()
        return request.ticket

    def _check_open(self) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed and takes no more requests")
            if (waiting := len(self._waiting)) >= self.queue_size:
                raise QueueFull(waiting, max(0.1, self._holding * waiting / self.max_rows))

    def _prepare(self, image, prompt: str) -> Batch:
        shown = list(image) if isinstance(image, list | tuple) else [image]
        return self.model.processor.prepare([[load_image(source) for source in shown]], [prompt])

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and wait until the engine's thread has ended.

        Parameters
        ----------
        finish : bool
            Answer what was taken, waiting requests included; otherwise cancel all of it.
        timeout : float, optional
            Seconds after which what is not finished is cancelled.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is self._thread:  # a listener closes: the thread cannot wait for itself
            timeout = 0.0 if not finish else timeout
        elif finish:
            self._thread.join(timeout)
        if not finish or (timeout is not None and self._thread.is_alive()):
            with self._changed:
                for request in (*self._waiting, *self._reading, *self._running):
                    request.ticket.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                queued=len(self._waiting),
                running=len(self._running) + len(self._reading),
                rows=self.max_rows,
                batch_sizes=dict(self._steps),
                prompts=self._prompts,
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                finished={reason: self._finished[reason] for reason in FINISHES},
                cache_bytes=sum(2 * cache.key.numel() * cache.key.element_size() for cache in self._caches),
            )

    @torch.no_grad()  # for this thread: the setting is each thread's own
    def _work(self) -> None:
        """The engine's thread: turn after turn, until it is closed and nothing is left."""
        while self._has_work():
            try:
                self._sweep()
                self._join()
                if self._running:
                    self._step()
            except (
                Exception
            ) as error:  # what no rule below foresees ends the requests that were under way, not the engine
                logging.getLogger(__name__).exception("the engine failed: the requests under way end")
                for request in (*self._reading, *self._running):
                    self._end(request, "error", f"the engine failed: {error}")
                self._reading, self._running = [], []
                for cache in self._caches:
                    while cache.lengths:
                        cache.leave(0)

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            return bool(self._waiting or self._running)

    def _sweep(self) -> None:
        """End the requests that nobody waits for any more."""
        with self._changed:
            gone = [request for request in self._waiting if request.given_up()]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            self._end(request, request.given_up())
        for row in reversed(range(len(self._running))):
            if reason := self._running[row].given_up():
                self._leave(row, reason)

    def _join(self) -> None:
        """Read the prompts of those whose turn it is, and let them join."""
        with self._changed:
            longest = 0
            while self._waiting and len(self._reading) + len(self._running) < self.max_rows:
                longest = max(longest, self._waiting[0].ticket.prompt_tokens)
                if self._reading and longest * (len(self._reading) + 1) > self.prefill_tokens:
                    break
                self._reading.append(self._waiting.popleft())
        if self._reading:
            self._read(self._reading)
            with self._changed:
                self._reading = []

    def _read(self, requests: list[_Request]) -> None:
        """Read prompts together; those that are not over with their first token get rows."""
        start = time.perf_counter()
        try:
            logits, caches = self._prefill(requests)
        except Exception as error:
            if len(requests) > 1:  # one of them is at fault: each by itself
                for request in requests:
                    self._read([request])
            else:
                self._end(requests[0], "error", str(error) or type(error).__name__)
            return
        picked = self._pick(requests, logits)
        with self._changed:
            self._prefill_seconds += time.perf_counter() - start
            self._prompts += len(requests)
            self._prompt_tokens += sum(request.ticket.prompt_tokens for request in requests)
        for row, request in enumerate(requests):
            request.batch, request.began = None, start
            if (over := self._tell(request, picked[row])) is not None:
                self._end(request, *over)
                continue
            for cache, filled in zip(self._caches, caches):
                cache.join(filled, row, request.ticket.prompt_tokens)
            self._running.append(request)

    def _prefill(self, requests: list[_Request]) -> tuple[torch.Tensor, list[KVCache]]:
        """Scores (B, V) for the first tokens, and caches with the prompts, padded on the left."""
        longest = max(request.ticket.prompt_tokens for request in requests)
        pads = [(longest - request.ticket.prompt_tokens, 0) for request in requests]
        batches = [request.batch for request in requests]
        padding = self.model.config.pad_token_id
        ids = torch.cat([F.pad(batch.input_ids, pad, value=padding) for batch, pad in zip(batches, pads)])
        mask = torch.cat([F.pad(batch.attention_mask, pad) for batch, pad in zip(batches, pads)])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        pixel_values = torch.cat([batch.pixel_values for batch in batches]).to(self.model.device)
        caches = self.model.language_model.new_caches(len(requests), longest)
        logits = self.model.prefill(ids, self._encode(pixel_values), mask, caches)
        for row, request in enumerate(requests):
            if request.sampling.repetition_penalty != 1:
                request.seen = seen_tokens(ids[row : row + 1], mask[row : row + 1], logits.shape[-1])
        return logits, caches

    def _step(self) -> None:
        """One token for every running row."""
        start, failed = time.perf_counter(), {}
        try:
            logits = self._decode(0, len(self._running))
        except Exception:  # some row is at fault: each by itself
            rows = []
            for row in range(len(self._running)):
                try:
                    rows.append(self._decode(row, 1))
                except Exception as error:
                    failed[row] = error
                    rows.append(torch.zeros(1, self.model.config.text.vocab_size, device=self.model.device))
            logits = torch.cat([row.float() for row in rows])
        picked = self._pick(self._running, logits, failed)
        with self._changed:
            self._decode_seconds += time.perf_counter() - start
            self._steps[len(picked)] += 1
        for row in reversed(range(len(picked))):
            if (over := self._tell(self._running[row], picked[row])) is not None:
                self._leave(row, *over)

    def _decode(self, first: int, count: int) -> torch.Tensor:
        """Feed the last token of `count` rows and give the scores (B, V) behind them; if it fails, nothing has changed."""
        lengths = list(self._caches[0].lengths)
        device = self.model.device
        tokens = torch.tensor([[request.tokens[-1]] for request in self._running[first : first + count]], device=device)
        positions = torch.tensor(lengths[first : first + count], device=device)[:, None] + 1  # (B, 1), counted from 1
        masks = {cache.window: cache for cache in self._caches}
        masks = {window: cache.mask(positions) for window, cache in masks.items()}
        for cache in self._caches:
            cache.first = first
        try:
            hidden = self.model.language_model(self.model.embed(tokens), positions, masks, self._caches)
            return self.model.logits(hidden[:, -1])
        except Exception:
            for cache in self._caches:
                cache.lengths = list(lengths)
            raise

    def _pick(
        self, requests: list[_Request], logits: torch.Tensor, failed: dict[int, Exception] | None = None
    ) -> list["Event | Exception"]:
        """For each row of scores (B, V) the token taken, without its text yet, or what went wrong."""
        scores, finite = logits.float(), logits.isfinite().all(-1).tolist()
        chosen: list = scores.argmax(-1).tolist()
        wrong = dict(failed or {})
        for row, request in enumerate(requests):
            try:
                if row not in wrong and not finite[row]:
                    finite_scores(logits[row : row + 1])
                if row not in wrong and not request.plain:
                    chosen[row] = request.choose(scores[row : row + 1])
            except Exception as error:
                wrong[row] = error
        totals = scores.logsumexp(-1, keepdim=True)  # (B, 1)
        taken = torch.tensor(chosen, device=scores.device)[:, None]
        logprobs = (scores.gather(-1, taken) - totals)[:, 0].tolist()
        events: list[Event | Exception] = []
        for row, request in enumerate(requests):
            top = ()
            if request.top and row not in wrong:
                best = (scores[row] - totals[row]).topk(request.top)
                top = tuple(zip(best.indices.tolist(), best.values.tolist()))
            events.append(wrong.get(row) or Event("", chosen[row], logprobs[row], top))
        return events

    def _tell(self, request: _Request, event: "Event | Exception") -> tuple[str, str | None] | None:
        """Pass a token on. If the answer is over with it: why, and the error if it is one."""
        if isinstance(event, Exception):
            return "error", str(event) or type(event).__name__
        if reason := request.given_up():
            return reason, None
        request.tokens.append(event.token)
        is_stop = event.token in self._stop_ids
        if not is_stop:
            is_stop = request.text.push(event.token)
        request.tell(replace(event, text=request.text.take()))
        with self._changed:
            self._tokens += 1
        if request.deaf:
            return "error", "its listener failed"
        if is_stop:
            return "stop", None
        return ("length", None) if len(request.tokens) == request.limit else None

    def _leave(self, row: int, finish: str, error: str | None = None) -> None:
        """End the request of a row; the last row takes its place."""
        request = self._running[row]
        for cache in self._caches:
            cache.leave(row)
        last = self._running.pop()
        if last is not request:
            self._running[row] = last
        self._end(request, finish, error)

    def _end(self, request: _Request, finish: str, error: str | None = None) -> None:
        if request.over:
            return
        request.over = True
        request.text.finish()
        with self._changed:
            self._finished[finish] += 1
            if request.began:
                self._holding += 0.1 * (time.perf_counter() - request.began - self._holding)
        request.tell(Event(request.text.take(), finish=finish, error=error))


def _read_deadline(seconds: float | None) -> float | None:
    if seconds is None:
        return None
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < float("inf"):
        raise ValueError(f"deadline is {seconds!r}: expected a number of seconds above 0")
    return time.monotonic() + seconds
