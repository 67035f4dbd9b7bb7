"""From scores to sentences.

The model gives a score to every token. How does a sentence come of it, and when does it end?

Tangled from chapters/13_generation.py: edit there, then run python -m sigma_book.tangle.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sigma_book.kv_cache import KVCache
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch, read_json

__all__ = [
    "Allow",
    "Answer",
    "AnswerText",
    "Beam",
    "Pick",
    "RowSearch",
    "Sampling",
    "answer_limits",
    "apply_temperature",
    "ask_allow",
    "check_beams",
    "choose",
    "draw_one",
    "finite_scores",
    "generate_answers",
    "generate_tokens",
    "is_finite",
    "keep_top_k",
    "keep_top_p",
    "penalize_repetition",
    "read_stop_ids",
    "read_stop_strings",
    "row_generators",
    "search_beams",
    "seen_tokens",
    "stream_answer",
    "whole_number",
]


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divide scores (B, V) by a number above 0: below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all scores (B, V) but the k highest of each row to -inf; those equal to the k-th stay."""
    lowest_kept = logits.topk(min(int(k), logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < lowest_kept, -math.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest most probable tokens of each row that reach probability p together; -inf for the rest.

    The most probable token always stays.

    References
    ----------
    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ascending, order = logits.sort(dim=-1)  # (B, V)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p  # the unlikely end, while its sum stays within 1 - p
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that occurred less likely, for a penalty above 1.

    Parameters
    ----------
    logits : torch.Tensor
        (B, V).
    seen : torch.Tensor
        Boolean (B, V), True for tokens of the prompt and of the answer so far.
    penalty : float
        Positive scores are divided by it, negative ones multiplied.

    References
    ----------
    Keskar et al. 2019, "CTRL", section 4.1.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Parameters
    ----------
    temperature : float
        0 takes the best token always (and so does anything below 1e-6); above, up to 1e6, tokens are drawn.
    top_p : float
        In (0, 1]; 1 keeps all tokens.
    top_k : int, optional
        At least 1; None keeps all tokens.
    repetition_penalty : float
        From 1e-6 to 1e6; 1 does nothing.
    seed : int, optional
        Row i of a batch draws from a generator of its own, seeded with `seed + i`. None takes a seed from
        torch's global generator.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not is_finite(value):
                raise ValueError(f"{name} is {value!r}: expected a finite number")
            object.__setattr__(self, name, float(value))  # torch knows no fractions
        if not 0 <= self.temperature <= 1e6:
            raise ValueError(
                f"temperature is {self.temperature}: expected 0 for greedy, or a number above it up to 1e6"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a probability above 0 and at most 1")
        if not 1e-6 <= self.repetition_penalty <= 1e6:  # beyond, scores leave what 32 bits can hold
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: expected a number from 1e-6 to 1e6, 1 for none"
            )
        if self.top_k is not None:
            whole_number("top_k", self.top_k, least=1)
        if self.seed is not None:
            whole_number("seed", self.seed, least=0, most=2**63 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6

    @property
    def takes_best(self) -> bool:
        """Whether the best score decides as it is."""
        return self.greedy and self.repetition_penalty == 1


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold; NumPy's are numbers too, True is none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def whole_number(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """The value, if it is a whole number in its range.

    Raises
    ------
    ValueError
        If not, with the argument's name, the value and the range.
    """
    wanted = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {value!r}: expected {wanted}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value}: expected {wanted}")
    return int(value)


def row_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """One source of chance for each row, on the CPU whatever the device: row i is seeded with seed + i."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return [torch.Generator().manual_seed(int(seed) + row) for row in range(rows)]


def draw_one(logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw one token for each row of scores (B, V), with one number of each row's generator: (B,).

    The probabilities lie end to end on a line from 0 to 1, in the order of the ids; the token in whose stretch the
    random number falls is drawn.
    """
    ends = logits.softmax(-1).cpu().double().cumsum(-1)  # (B, V): where each stretch ends
    ends = ends / ends[:, -1:]
    darts = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])  # (B, 1)
    return torch.searchsorted(ends, darts, right=True)[:, 0].to(logits.device)


def choose(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Take the next token of each row: (B, V) scores to (B,) ids.

    The order is that of `transformers`: repetition penalty, temperature, top-k, top-p.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(-1)
    best = logits.amax(-1, keepdim=True)  # (B, 1): a shift that the softmax does not see keeps tiny temperatures finite
    logits = apply_temperature(logits - best, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return draw_one(logits, generators)


def answer_limits(attention_mask: torch.Tensor, max_new_tokens: int, context: int) -> list[int]:
    """How many tokens each row may answer: `max_new_tokens`, or the room that its prompt leaves, if that is less.

    Parameters
    ----------
    attention_mask : torch.Tensor
        (B, T), 0 at padding, which takes no room.
    max_new_tokens : int
        At least 1.
    context : int
        The model's `max_position_embeddings`: prompt (picture included) and answer together.

    Raises
    ------
    ValueError
        If `max_new_tokens` is below 1, or if a prompt leaves no room for one token.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    lengths = (attention_mask != 0).sum(-1).tolist()
    for row, length in enumerate(lengths):
        if length >= context:
            which = "the prompt" if len(lengths) == 1 else f"prompt {row}"
            raise ValueError(
                f"{which} has {length} tokens, pictures included: the model's context is {context} tokens, "
                f"prompt and answer together, so shorten it by {length - context + 1} or more"
            )
    return [min(max_new_tokens, context - length) for length in lengths]


# Asked before a token is taken, with the answer so far and how many tokens may still come, this one included:
# a boolean (V,), True for each token that is allowed.
Allow = Callable[[list[int], int], torch.Tensor]


class Pick(NamedTuple):
    """A token that a row took.

    `logprob` is the natural logarithm of its probability in the model's own distribution, before penalty,
    temperature, top-k and top-p.
    """

    row: int
    token: int
    logprob: float


@torch.no_grad()
def generate_tokens(
    model: PaliGemma,
    batch: Batch,
    *,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    is_over: Callable[[int, int], bool] | None = None,
    allow: Allow | None = None,
    logprobs: bool = False,
) -> Iterator[list[Pick]]:
    """Answer a batch, one token a row at each step.

    A row ends by itself: at a stop token (which is its last pick), when `is_over` says so, or at its limit. It is
    then fed padding, picks nothing more, and the other rows go on undisturbed.

    Parameters
    ----------
    model : PaliGemma
    batch : Batch
        Prompts padded on the left.
    max_new_tokens : int
        The most a row may pick; `answer_limits` bounds it by the model's context.
    sampling : Sampling, optional
        Greedy by default.
    stop_ids : sequence of int, optional
        Tokens that end a row; the end-of-sequence token of the config by default.
    is_over : callable, optional
        Asked with (row, token) after each pick that is no stop token; True ends the row.
    allow : callable, optional
        Which tokens may come next, see `Allow`.
    logprobs : bool
        Whether log-probabilities are wanted. If not, a model that was made ready for speed may round them.

    Yields
    ------
    list of Pick
        The picks of the rows that were not over, in the order of the rows.

    Raises
    ------
    ValueError
        If a prompt is longer than the context, or `max_new_tokens` is below 1.
    RuntimeError
        If the scores are not finite: 16-bit floats overflowed.
    """
    sampling = Sampling() if sampling is None else sampling
    stop_ids = {model.config.eos_token_id} if stop_ids is None else set(stop_ids)
    rows, prompt_length = batch.input_ids.shape
    limits = answer_limits(batch.attention_mask, max_new_tokens, model.config.text.max_position_embeddings)
    generators = row_generators(sampling.seed, rows)
    best_only = sampling.takes_best and allow is None and not logprobs
    logits, seen, mask, caches = _read_prompts(model, batch, max(limits), best_only)
    answers: list[list[int]] = [[] for _ in range(rows)]
    live = list(range(rows))

    for step in range(max(limits)):
        logits = finite_scores(logits)
        steered = logits
        if allow is not None:
            steered = logits.clone()
            for row in live:
                may = ask_allow(allow, answers[row], limits[row] - step)  # (V,)
                steered[row] = logits[row].masked_fill(~may.to(logits.device), -math.inf)
        tokens = choose(steered, sampling, seen, generators)  # (B,)
        of_chosen = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)  # (B,)
        chosen, measured = tokens.tolist(), of_chosen.tolist()
        picks = [Pick(row, chosen[row], measured[row]) for row in live]
        for row, token, _ in picks:
            answers[row].append(token)
        live = [
            row
            for row, token, _ in picks
            if token not in stop_ids and not (is_over and is_over(row, token)) and step + 1 < limits[row]
        ]
        yield picks
        if not live:
            return
        seen.scatter_(-1, tokens[:, None], True)
        over = torch.ones_like(tokens, dtype=torch.bool)
        over[live] = False
        tokens = tokens.masked_fill(over, model.config.pad_token_id)
        logits = model.decode(tokens[:, None], mask[:, : prompt_length + step + 1], caches, best_only)


def _read_prompts(
    model: PaliGemma, batch: Batch, most_new_tokens: int, best_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[KVCache]]:
    """Read a batch once: scores (B, V), seen tokens (B, V), the mask of all columns to come (B, S), filled caches."""
    batch = batch.to(model.device)
    rows, prompt_length = batch.input_ids.shape
    room = prompt_length + most_new_tokens
    # a step that was compiled for a GPU is made anew for each width: few of them
    width = room if getattr(model, "compiled_step", None) is None else -(-room // 128) * 128
    caches = model.language_model.new_caches(rows, width)
    mask = batch.attention_mask.new_ones(rows, room)  # (B, S): columns of the answer are never padding
    mask[:, :prompt_length] = batch.attention_mask
    features = model.encode_images(batch.pixel_values)  # (N, P, D)
    logits = model.prefill(batch.input_ids, features, batch.attention_mask, caches, best_only)  # (B, V)
    return logits, seen_tokens(batch.input_ids, batch.attention_mask, logits.shape[-1]), mask, caches


def ask_allow(allow: Allow, answer: list[int], left: int) -> torch.Tensor:
    """The tokens (V,) that `allow` lets come next, or a ValueError if there are none."""
    may = allow(answer, left)
    if not may.any():
        raise ValueError(
            f"allow forbids every token behind the {len(answer)} that were said: it must leave one or more"
        )
    return may


def finite_scores(logits: torch.Tensor) -> torch.Tensor:
    """Scores in float32, or a RuntimeError if they are not finite."""
    if not logits.isfinite().all():
        raise RuntimeError(
            f"the model's scores hold inf or nan in {str(logits.dtype).removeprefix('torch.')}: its weights are "
            "damaged, or overflow in float16; load it with dtype='bfloat16' or dtype='float32'"
        )
    return logits.float()


def seen_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which tokens a row has read: boolean (B, V). Padding was not read; ids without a score are left out."""
    seen = torch.zeros(len(input_ids), vocab_size + 1, dtype=torch.bool, device=input_ids.device)
    ids = input_ids.masked_fill(attention_mask == 0, vocab_size).clamp(max=vocab_size)  # the last column is thrown away
    return seen.scatter_(-1, ids, True)[:, :vocab_size]


class Beam(NamedTuple):
    """An answer, or the beginning of one.

    Parameters
    ----------
    tokens : list of int
        So far, the stop token included.
    logprobs : list of float
        Of each token, in the model's own distribution.
    total : float
        What beams compete by: the sum of `logprobs`, each changed by the repetition penalty, if there is one.
    score : float
        `total` divided by a power of the length: what ended beams compete by.
    """

    tokens: list[int]
    logprobs: list[float]
    total: float
    score: float


class RowSearch:
    """The search for one answer: beams that run, and beams that have ended.

    Parameters
    ----------
    width : int
        How many beams run, and how many ended ones are kept.
    length_penalty : float
        The power of the length by which the sum of log-probabilities is divided.
    limit : int
        Most tokens of an answer.
    is_end : callable
        Whether a list of tokens is a whole answer.
    """

    def __init__(self, width: int, length_penalty: float, limit: int, is_end: Callable[[list[int]], bool]):
        self.width, self.length_penalty, self.limit, self.is_end = width, length_penalty, limit, is_end
        self.running = [Beam([], [], 0.0, 0.0)]
        self.ended: list[Beam] = []

    def advance(self, totals: torch.Tensor, logprobs: torch.Tensor, count: int) -> list[int]:
        """Take one step, from the sums (R, V) of all continuations of the running beams.

        Parameters
        ----------
        totals, logprobs : torch.Tensor
            (R, V): the sum that each continuation would have, -inf if it is not allowed, and its last summand.
        count : int
            How many of the best continuations to look at: enough to go on if the best have all ended.

        Returns
        -------
        list of int
            For each beam that runs now, which of those before it goes on with; empty when the search is over.
        """
        best = totals.flatten().topk(min(count, totals.numel()))
        summands = logprobs.flatten()[best.indices].tolist()
        parents, grown = [], []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(place, totals.shape[-1])
            if total == -math.inf or len(grown) == self.width:
                break
            tokens = [*self.running[parent].tokens, token]
            measured = [*self.running[parent].logprobs, summands[rank]]
            beam = Beam(tokens, measured, total, total / len(tokens) ** self.length_penalty)
            if len(tokens) < self.limit and not self.is_end(tokens):
                parents.append(parent)
                grown.append(beam)
            elif rank < self.width:
                self.ended.append(beam)
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: self.width]
        full = len(self.ended) == self.width
        if full and grown and grown[0].score <= self.ended[-1].score:
            parents, grown = [], []
        self.running = grown
        return parents


@torch.no_grad()
def search_beams(
    model: PaliGemma,
    batch: Batch,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    max_new_tokens: int = 100,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    is_over: Callable[[list[int]], bool] | None = None,
    allow: Allow | None = None,
) -> list[Beam]:
    """The best answer to every row of a batch that beam search finds.

    The rules are those of `transformers` with `early_stopping=False`. An answer that is reached at the limit counts
    as ended there.

    Parameters
    ----------
    model, batch, max_new_tokens, stop_ids, allow
        As in `generate_tokens`.
    num_beams : int
        How many beginnings run side by side.
    length_penalty : float
        Answers are compared by the sum of their log-probabilities, divided by their length to this power.
    repetition_penalty : float
        As in `Sampling`; it changes log-probabilities here, as it does in `transformers`.
    is_over : callable, optional
        Asked with the tokens of a beam that has no stop token; True ends it.

    Raises
    ------
    ValueError, RuntimeError
        As `generate_tokens`.
    """
    stop_ids = {model.config.eos_token_id} if stop_ids is None else set(stop_ids)
    prompt_length = batch.input_ids.shape[1]
    limits = answer_limits(batch.attention_mask, max_new_tokens, model.config.text.max_position_embeddings)
    logits, seen, mask, caches = _read_prompts(model, batch, max(limits))

    def is_end(tokens: list[int]) -> bool:
        return tokens[-1] in stop_ids or (is_over is not None and is_over(tokens))

    searches = [RowSearch(num_beams, length_penalty, limit, is_end) for limit in limits]
    live, step, most = searches, 0, num_beams * (1 + max(1, len(stop_ids)))
    while True:
        logprobs = finite_scores(logits).log_softmax(-1)  # (N, V), N beams of all rows
        steered = logprobs if repetition_penalty == 1 else penalize_repetition(logprobs, seen, repetition_penalty)
        beams = [(search, beam) for search in live for beam in search.running]
        if allow is not None:
            may = torch.stack([ask_allow(allow, beam.tokens, search.limit - step) for search, beam in beams])  # (N, V)
            steered = steered.masked_fill(~may.to(steered.device), -math.inf)
        totals = steered + steered.new_tensor([beam.total for _, beam in beams])[:, None]
        lines, start = [], 0
        for search in live:
            end = start + len(search.running)
            lines += [start + parent for parent in search.advance(totals[start:end], logprobs[start:end], most)]
            start = end
        live = [search for search in live if search.running]
        if not live:
            return [search.ended[0] for search in searches]
        if lines != list(range(start)):
            kept = torch.tensor(lines, device=mask.device)
            mask, seen = mask[kept], seen[kept]
            for cache in caches:
                cache.select(kept)
        tokens = mask.new_tensor([[beam.tokens[-1]] for search in live for beam in search.running])  # (N, 1)
        seen = seen.scatter(-1, tokens, True)
        step += 1
        logits = model.decode(tokens, mask[:, : prompt_length + step], caches)


def check_beams(num_beams: int, length_penalty: float, sampling: Sampling) -> None:
    """Raise a ValueError if this cannot be searched: a width below 1, a penalty that is no number, drawn tokens."""
    whole_number("num_beams", num_beams, least=1)
    number = isinstance(length_penalty, numbers.Real) and not isinstance(length_penalty, bool)
    if not number or not -50 <= length_penalty <= 50:  # a power of thousands must stay a number
        raise ValueError(f"length_penalty is {length_penalty!r}: expected a number from -50 to 50")
    if num_beams > 1 and not sampling.greedy:
        raise ValueError(
            f"num_beams is {num_beams} and temperature {sampling.temperature}: beams look for the best answer and "
            "draw nothing, so leave one of the two out"
        )


class AnswerText:
    """The text of one answer while its tokens arrive.

    Text is *settled* when no later token can change it: no half of a character, no beginning of a stop string.

    Parameters
    ----------
    decode : callable
        Token ids to text.
    stop : sequence of str
        The answer ends before the first of these to be complete. Where two are complete at the same character,
        the longer one counts: the rule does not depend on how the text falls into tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self.decode = decode
        self.stop = tuple(stop)
        self.text = ""
        self.stopped = False
        self._tokens: list[int] = []
        self._context, self._open = 0, 0  # tokens from _open on have no text yet; those from _context on stand before
        self._taken = 0  # characters that take() gave away

    def push(self, token: int) -> bool:
        """Take one more token; True if a stop string is complete now."""
        self._tokens.append(token)
        piece = self._new_text()
        if piece and not piece.endswith("\ufffd"):  # the mark of bytes that are no character, or not yet
            self._context, self._open = self._open, len(self._tokens)
            self._add(piece)
        return self.stopped

    def _new_text(self) -> str:
        """What the open tokens say behind those before them, which keep a leading space from being lost."""
        before = self.decode(self._tokens[self._context : self._open])
        return self.decode(self._tokens[self._context :])[len(before) :]

    def _add(self, piece: str) -> None:
        start = max(0, len(self.text) - max(map(len, self.stop), default=0))
        text = self.text + piece
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop, start)) >= 0]
        self.stopped = bool(found)
        self.text = text[: min(found)[1]] if found else text

    def take(self) -> str:
        """The settled text that was not taken yet."""
        piece = self.text[self._taken : len(self.text) - self._held()]
        self._taken += len(piece)
        return piece

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        if self.stopped:
            return 0
        end, settled = len(self.text), len(self.text)
        for stop in self.stop:  # the text is cut, not the stop string, which may be long; what was taken begins none
            starts = range(max(self._taken, end - len(stop) + 1), settled)
            settled = next((at for at in starts if stop.startswith(self.text[at:])), settled)
        return end - settled

    def finish(self) -> str:
        """The whole text, when no more tokens come: bytes that never became a character are marked U+FFFD."""
        if not self.stopped:
            self._add(self._new_text())
        self.stopped = True
        return self.text


class Answer(NamedTuple):
    """An answer.

    Parameters
    ----------
    text : str
        Without stop token and stop string.
    tokens : list of int
        Every token the model took, the stop token or those of a stop string included.
    logprobs : list of float
        Of each token, as `Pick` has it: their sum is the log-probability of the whole answer.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]


def generate_answers(
    model: PaliGemma,
    batch: Batch,
    decode: Callable[[list[int]], str],
    *,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    allow: Allow | None = None,
    logprobs: bool = False,
) -> list[Answer]:
    """Answer every row of a batch, in text.

    Parameters
    ----------
    model, batch, max_new_tokens, sampling, stop_ids, allow, logprobs
        As in `generate_tokens`.
    decode : callable
        Token ids to text.
    num_beams, length_penalty
        As in `search_beams`; with one beam the answer is drawn or greedy, as `sampling` says.
    stop : sequence of str
        Strings that end an answer, left out of it.

    Raises
    ------
    ValueError
        If several beams are to be drawn: `check_beams`.
    """
    sampling = Sampling() if sampling is None else sampling
    check_beams(num_beams, length_penalty, sampling)
    texts = [AnswerText(decode, stop) for _ in batch.input_ids]
    if num_beams > 1:
        beams = search_beams(
            model,
            batch,
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            stop_ids=stop_ids,
            is_over=lambda tokens: any(end in decode(tokens) for end in stop),
            allow=allow,
        )
        ends = {model.config.eos_token_id} if stop_ids is None else set(stop_ids)
        for text, beam in zip(texts, beams):
            for token in beam.tokens:
                if token not in ends:  # only the last can be one
                    text.push(token)
        return [Answer(text.finish(), beam.tokens, beam.logprobs) for text, beam in zip(texts, beams)]
    answers = [Answer("", [], []) for _ in batch.input_ids]
    for picks in generate_tokens(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        is_over=lambda row, token: texts[row].push(token),
        allow=allow,
        logprobs=logprobs,
    ):
        for row, token, logprob in picks:
            answers[row].tokens.append(token)
            answers[row].logprobs.append(logprob)
    return [answer._replace(text=text.finish()) for text, answer in zip(texts, answers)]


def stream_answer(
    model: PaliGemma,
    batch: Batch,
    decode: Callable[[list[int]], str],
    *,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    allow: Allow | None = None,
) -> Iterator[str]:
    """Answer a batch of one row in pieces of settled text; joined, they are what `generate_answers` gives."""
    text = AnswerText(decode, stop)
    for _ in generate_tokens(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        is_over=lambda row, token: text.push(token),
        allow=allow,
    ):
        if piece := text.take():
            yield piece
    text.finish()
    if piece := text.take():
        yield piece


def read_stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """One stop string, several or none, as a list.

    Raises
    ------
    ValueError
        If one is empty, or no string.
    """
    listed = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) and text for text in listed):
        raise ValueError(f"stop is {stop!r}: expected a string, or a list of strings, none of them empty")
    return list(listed)


def read_stop_ids(folder: Path, eos_token_id: int) -> list[int]:
    """The stop tokens that `generation_config.json` lists, or `config.json`; the one given where both are silent.

    Raises
    ------
    ValueError
        If a file is not JSON, or its `eos_token_id` is neither a token id nor a list of them.
    RuntimeError
        If a file is there and cannot be opened.
    """
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        values = read_json(path) if path.exists() else {}
        for part in (values, values.get("text_config")):
            listed = part.get("eos_token_id") if isinstance(part, dict) else None
            if listed is not None:
                ids = listed if isinstance(listed, list) else [listed]
                if not ids or not all(type(token) is int and token >= 0 for token in ids):
                    raise ValueError(
                        f"{path}: eos_token_id is {listed!r}: expected a token id, 0 or more, or a list of them"
                    )
                return ids
    return [eos_token_id]
