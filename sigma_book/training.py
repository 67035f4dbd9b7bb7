"""The loop that teaches.

How does a model change, step by step, until its answers are right, and what if the power fails on the way?

Tangled from chapters/16_training.py: edit there, then run python -m sigma_book.tangle.
"""

import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sigma_book.batches import collate
from sigma_book.data import Example
from sigma_book.generation import Sampling, generate_answers, is_finite
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Batch, Processor, file_beside, folder_beside, load_image, make_folder

__all__ = [
    "ALONE",
    "AUTOCAST",
    "CGROUP",
    "LOG_COLUMNS",
    "METHODS",
    "PARTS",
    "Alone",
    "Bill",
    "Checkpoints",
    "Progress",
    "TrainingConfig",
    "adamw_by_part",
    "add_gradients",
    "answer_loss",
    "answer_tokens",
    "blocks_of",
    "claim_folder",
    "draw_losses",
    "examine",
    "file_checksum",
    "free_bytes",
    "freeze_parts",
    "learning_rate_factor",
    "recompute_activations",
    "remark",
    "saved_bytes",
    "train",
    "training_bill",
]


def learning_rate_factor(step: int, steps: int, warmup: int, hold: float = 0.0, schedule: str = "linear") -> float:
    """The share of the peak learning rate at a step: up in a line, then held, then down to zero.

    Parameters
    ----------
    step : int
        From 0.
    steps : int
        All steps of the run.
    warmup : int
        Steps until the peak.
    hold : float
        Share of the run, 0 to 1, after which the descent begins (never before the end of the warmup).
    schedule : str
        How it comes down: `linear`, or `cosine` (half a wave, from its crest to its trough).
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    left = min(1.0, max(0.0, (steps - step) / max(1.0, steps - start)))
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def answer_loss(model: PaliGemma, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answers of a batch: what the ordinary batches of chapter 15b are for."""
    return model.loss(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids, batch.labels)


def answer_tokens(batch: Batch) -> int:
    """How many tokens the mean of `answer_loss` is taken over."""
    return int((batch.labels[:, 1:] != -100).sum())  # no place stands before the first, to be asked for it


class Alone:
    """What the loop asks of other processes where there are none; `Ranks` of chapter 22 is the one for many.

    Attributes
    ----------
    rank, size : int
        Which process this is, and of how many. Rank 0 writes and speaks for all.
    """

    rank, size = 0, 1

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number, added up over all processes."""
        return numbers

    def first(self, number: float) -> float:
        """What rank 0 says, for all."""
        return number

    def adding(self, last: bool) -> AbstractContextManager:
        """Around each small batch of a step: gradients of all processes are added up, at the latest around the last."""
        return nullcontext()

    def clip(self, parameters: list[nn.Parameter], most: float) -> float:
        """Shorten the gradient to at most this length, and give the length that it had."""
        return nn.utils.clip_grad_norm_(parameters, most).item()

    def leave(self) -> None:
        """Say goodbye to the others."""


ALONE = Alone()


def add_gradients(
    loss: Callable[..., torch.Tensor],
    group: Sequence,
    counts: Sequence[int],
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ranks: Alone = ALONE,
) -> float:
    """Add to each `.grad` what one large batch would, from the small ones it was cut into.

    Parameters
    ----------
    loss : callable
        Takes a small batch, gives the mean loss over its tokens.
    group : sequence
        The small batches.
    counts : sequence of int
        How many tokens each mean is over. All must be known before the first gradient: a token weighs one over
        the tokens of the whole group.
    scale : callable
        What is done to a loss before its gradient is taken.
    ranks : Alone
        Who else has a part of the group.

    Returns
    -------
    float
        The mean over all tokens of the group; of several processes each has a part of it, and the sum is the mean.

    Raises
    ------
    FloatingPointError
        At the first small batch whose loss is not a finite number; it names none of them.
    """
    (total,), mean = ranks.sum(sum(counts)), 0.0
    for place, (small, count) in enumerate(zip(group, counts, strict=True), start=1):
        share = count / total if count else 0.0
        with ranks.adding(last=place == len(group)):
            value = loss(small)
            mean += value.item() * share
            if not math.isfinite(mean):
                raise FloatingPointError(str(value.item()))
            # many processes take the mean of their gradients, where the sum is wanted: hence the size
            scale(value * (share * ranks.size)).backward()  # frees the activations before the next small batch comes
    return mean


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside weights and optimizers.

    Parameters
    ----------
    rows : list
        A row a step, as in the log: step, loss, gradient norm, share of the peak rate, tokens read, seconds.
    data : dict, optional
        The place in the data, as chapter 15b gives it.
    notes : list of dict
        What was found at intervals.
    scale : dict, optional
        The state of the scaler, in float16.
    """

    rows: list[list[float]] = field(default_factory=list)
    data: dict | None = None
    notes: list[dict] = field(default_factory=list)
    scale: dict | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.rows)

    @property
    def losses(self) -> list[float]:
        return [row[1] for row in self.rows]


LOG_COLUMNS = ("step", "loss", "gradient_norm", "rate", "tokens", "seconds")


def remark(text: str) -> None:
    """Say something on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def _log(path: Path | None, rows: list[list[float]]) -> Iterator[Callable[[list], None]]:
    """A function that adds a line to a CSV file, which first becomes a head and `rows`; or to nowhere."""
    if path is None:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_beside(path) as fresh, fresh.open("w", newline="") as file:
        csv.writer(file).writerows([LOG_COLUMNS, *map(_as_text, rows)])
    # lines behind the checkpoint are gone, and none is there twice
    with path.open("ab", buffering=0) as file:

        def write(row: list[float]) -> None:
            try:
                file.write((",".join(_as_text(row)) + "\r\n").encode())
            except OSError as error:
                raise RuntimeError(
                    f"{path} cannot be written ({error.strerror}): make room, then give the same command again"
                ) from error

        yield write


def _as_text(row: list[float]) -> list[str]:
    step, loss, norm, rate, tokens, seconds = row
    return [f"{step:.0f}", repr(loss), repr(norm), f"{rate:.6g}", f"{tokens:.0f}", f"{seconds:.2f}"]


def _speed(rows: list[list[float]]) -> str:
    """The mean loss of some rows, and how many tokens a second they read."""
    text = f"loss {sum(row[1] for row in rows) / len(rows):.3f}"
    seconds, tokens = rows[-1][5] - rows[0][5], sum(row[4] for row in rows[1:])
    return f"{text}, {tokens / seconds:,.0f} tokens/s" if tokens and seconds else text


def _tokens_read(batch) -> int:
    if not getattr(batch, "where", True):
        return 0  # it only keeps a rank without rows in step with the others
    ordinary = getattr(batch, "batch", batch)
    return int(ordinary.attention_mask.sum()) if isinstance(ordinary, Batch) else 0


def _not_finite(what: str, step: int, small: list, autocast: torch.dtype | None) -> str:
    places = [str(place) for batch in small for place in getattr(batch, "where", ())]
    text = f"{what} at step {step}: nothing was changed by this step"
    if places:
        text += f"; its examples: {', '.join(places[:16])}" + (f" and {len(places) - 16} more" if places[16:] else "")
    cure = "take bfloat16 or float32" if autocast == torch.float16 else "look at these examples, or lower the rate"
    return f"{text}; {cure}"


@contextmanager
def _asked_to_stop(listen: bool) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    asked = threading.Event()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    usual, here = signal.getsignal(signal.SIGINT), os.getpid()

    def hear(number, frame) -> None:
        if os.getpid() == here:  # processes that read ahead hear it too, and go on
            asked.set()
            signal.signal(signal.SIGINT, usual)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, hear)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


def train(
    modules: nn.Module,
    loss: Callable[..., torch.Tensor],
    batches: Iterable,
    optimizers: list[torch.optim.Optimizer],
    *,
    steps: int,
    warmup: int = 100,
    hold: float = 0.0,
    schedule: str = "linear",
    clip: float = 1.0,
    accumulate: int = 1,
    count: Callable[..., int] = lambda batch: 1,
    autocast: torch.dtype | None = None,
    log: Path | None = None,
    label: str = "train",
    report_every: int = 500,
    report: Callable[[int], str] | None = None,
    each: Callable[[list[float]], None] | None = None,
    progress: Progress | None = None,
    checkpoints: "Checkpoints | None" = None,
    ranks: Alone = ALONE,
) -> list[float]:
    """Take steps: loss, gradients, clipping, update.

    Parameters
    ----------
    modules : torch.nn.Module
        All that may learn; parameters with `requires_grad` off stay as they are.
    loss : callable
        Takes a batch, gives a scalar tensor, a mean over some tokens.
    batches : iterable
        At least `steps` times `accumulate` batches; the last group may be short. A `TrainingBatch` of chapter 15b
        also says where its examples come from and how to go on behind it.
    optimizers : list
        Their learning rates are the peaks; the schedule scales them all alike.
    steps, warmup, hold, schedule
        The length of the run and the shape of the schedule, as in `learning_rate_factor`.
    clip : float
        The gradient, all parameters taken as one vector, is scaled down to at most this length.
    accumulate : int
        Batches whose gradients make one step.
    count : callable
        How many tokens the loss of a batch is a mean over; without it all batches of a group weigh the same.
    autocast : torch.dtype, optional
        bfloat16 or float16: products are computed in it, from weights that stay what they are. float16 brings
        a scaled loss.
    log : Path, optional
        A CSV file that grows by a line a step.
    report : callable, optional
        Called every `report_every` steps with the step; its text is shown beside the progress bar.
    each : callable, optional
        Called after each step with the new row of the log.
    progress : Progress, optional
        Where to go on; it grows with the run.
    checkpoints : Checkpoints, optional
        Where the run is saved. With it, Ctrl-C ends the step that runs, saves, and stops.
    ranks : Alone
        The processes that take each step together, each with its part of the batches. `log` and `each` are for one of
        them alone; all call `report` and `checkpoints`.

    Returns
    -------
    list of float
        The loss at each step, from the first of the run.

    Raises
    ------
    ValueError
        If the batches end too soon.
    RuntimeError
        If a loss or gradient is not a finite number, or a file cannot be written.
    KeyboardInterrupt
        After Ctrl-C; its text says how to go on.
    """
    progress = Progress() if progress is None else progress
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    device = parameters[0].device.type
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    scaler = torch.amp.GradScaler(device, enabled=autocast == torch.float16)
    if progress.scale:
        scaler.load_state_dict(progress.scale)
    stream: Iterator = iter(batches)
    started = time.perf_counter() - (progress.rows[-1][-1] if progress.rows else 0.0)

    def cast_loss(batch) -> torch.Tensor:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return loss(batch)

    with (
        _log(log, progress.rows) as write,
        tqdm(total=steps, initial=progress.step, desc=label, mininterval=2.0, disable=ranks.rank > 0) as bar,
        _asked_to_stop(checkpoints is not None) as asked,
    ):
        while progress.step < steps:
            step = progress.step
            factor = learning_rate_factor(step, steps, warmup, hold, schedule)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                optimizer.zero_grad()
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            small, counts = _next_group(stream, accumulate, count, ranks)
            if not small:
                raise ValueError(f"the batches ended after {step} of {steps} steps: give more examples or fewer steps")
            try:
                mean = add_gradients(cast_loss, small, counts, scaler.scale, ranks)
            except FloatingPointError as error:
                raise RuntimeError(_not_finite(f"the loss is {error}", step, small, autocast)) from error
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = ranks.clip(parameters, clip)
            if not math.isfinite(norm) and not scaler.is_enabled():  # a scaler skips such a step, and scales less
                raise RuntimeError(_not_finite(f"the gradient is {norm}", step, small, autocast))
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            seconds = time.perf_counter() - started
            mean, read, stop = ranks.sum(mean, sum(map(_tokens_read, small)), asked.is_set())
            progress.rows.append([step, mean, norm, factor, read, seconds])
            progress.data = getattr(small[-1], "state", None)
            progress.scale = scaler.state_dict() if scaler.is_enabled() else None
            write(progress.rows[-1])
            if each is not None:
                each(progress.rows[-1])
            bar.update()
            bar.set_postfix_str(_speed(progress.rows[-50:]), refresh=False)
            if report is not None and (step + 1) % report_every == 0:
                found = report(step + 1)
                if ranks.rank == 0:
                    remark(f"{label} {step + 1}: {found}")
            if checkpoints is not None and (stop or checkpoints.is_due(step + 1, steps)):
                checkpoints.save(progress)
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after step {step + 1} of {steps}, which is saved: give the same command again to go on"
                )
    return progress.losses


def _next_group(stream: Iterator, accumulate: int, count: Callable[..., int], ranks: Alone) -> tuple[list, list[int]]:
    """The batches of the next step, and their counts. One in which no process has a token is left out by all of them."""
    group, counts = [], []
    for batch in stream:
        counted = count(batch)
        if ranks.size == 1 or ranks.sum(counted)[0]:
            group.append(batch)
            counts.append(counted)
        if len(group) == accumulate:
            break
    return group, counts


PARTS = {  # how the names of their parameters begin
    "vision": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "decoder": ("language_model.", "lm_head."),
}
METHODS = ("full", "lora", "qlora")  # the last two are built in chapters 18 and 19


@dataclass(frozen=True)
class TrainingConfig:
    """What decides the numbers of a run: the same values on the same data give the same model.

    Parameters
    ----------
    method : str
        full, lora or qlora.
    max_steps, epochs : int, optional
        The run ends at whichever comes first; one epoch if neither is given.
    batch_size, accumulate : int
        Examples in a batch, and batches in a step.
    learning_rate : float, optional
        The peak, for all parts that have none of their own. By default 1e-5, PaliGemma's for VQAv2 at 224 pixels;
        with lora and qlora 2e-4 (Dettmers et al. 2023, "QLoRA", appendix B).
    vision_rate, projector_rate, decoder_rate : float, optional
        The peak for one part.
    freeze : tuple of str
        Parts that do not learn: vision, projector, decoder.
    schedule : str
        linear or cosine, down to zero.
    warmup : float
        Below 1 a share of all steps, else a number of steps.
    weight_decay, clip : float
    optimizer : str
        adamw, or adamw8bit, which keeps its two means in 8 bits and needs bitsandbytes.
    dtype : str
        What products are computed in: float32, bfloat16 or float16; the weights that learn are float32 in any case.
        auto is bfloat16 on cuda, else float32.
    recompute : bool
        Keep no activations inside blocks, compute them again in the backward pass; qlora always does.
    rank, alpha, dropout
        Of the adapters that lora and qlora teach, as in `LoraConfig` of chapter 18.
    seed : int
        Of the order of the data, and of dropout.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    method: str = "full"
    max_steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    vision_rate: float | None = None
    projector_rate: float | None = None
    decoder_rate: float | None = None
    freeze: tuple[str, ...] = ()
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    dtype: str = "auto"
    recompute: bool = False
    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self):
        choices = {"method": METHODS, "schedule": ("linear", "cosine"), "optimizer": ("adamw", "adamw8bit")}
        choices["dtype"] = ("auto", "float32", "bfloat16", "float16")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected {', '.join(allowed)}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-5 if self.method == "full" else 2e-4)
        for name in ("max_steps", "epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}: expected a whole number, 1 or more")
        for name in (
            "learning_rate",
            "vision_rate",
            "projector_rate",
            "decoder_rate",
            "warmup",
            "weight_decay",
            "clip",
        ):
            value = getattr(self, name)
            least = 0 if name in ("warmup", "weight_decay") else math.ulp(0)  # the smallest number above 0
            if value is None:
                continue
            if not is_finite(value) or value < least:
                raise ValueError(
                    f"{name} is {value!r}: expected a number {'of 0 or more' if least == 0 else 'above 0'}"
                )
            object.__setattr__(self, name, float(value))  # JSON knows no numbers of numpy
        if isinstance(self.freeze, str):
            raise ValueError(f"freeze is {self.freeze!r}: expected a tuple of parts, such as ('vision',)")
        if unknown := sorted(set(self.freeze) - set(PARTS)):
            raise ValueError(f"freeze names {unknown[0]!r}: expected parts among {', '.join(PARTS)}")
        if self.freeze and self.method != "full":
            raise ValueError(f"freeze goes with method full: {self.method} teaches adapters of the decoder alone")
        if set(self.freeze) == set(PARTS):
            raise ValueError("freeze names all three parts: nothing would learn, leave one out")
        for part in PARTS:
            learns = part not in self.freeze and (self.method == "full" or part == "decoder")
            if not learns and getattr(self, f"{part}_rate") is not None:
                raise ValueError(f"{part}_rate is given, but the part {part} does not learn: leave the rate out")
        for name in ("rank", "alpha", "dropout"):
            if self.method == "full" and getattr(self, name) != getattr(TrainingConfig, name):
                raise ValueError(f"{name} goes with the methods lora and qlora: leave it out, or choose one of them")

    def warmup_steps(self, steps: int) -> int:
        return round(self.warmup * steps if self.warmup < 1 else self.warmup)

    def rate(self, part: str) -> float:
        own = getattr(self, f"{part}_rate")
        return self.learning_rate if own is None else own


def adamw_by_part(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """One AdamW over all that may learn, a group for each part with its own peak rate.

    Raises
    ------
    RuntimeError
        If adamw8bit is asked for and bitsandbytes is not installed.
    """
    groups = []
    for part, beginnings in PARTS.items():
        learning = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(beginnings)]
        if learning:
            groups.append({"params": learning, "lr": config.rate(part)})
    settings = {"lr": config.learning_rate, "betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        one_kernel = groups[0]["params"][0].device.type in ("cpu", "cuda")  # where torch has the fused form
        return torch.optim.AdamW(groups, fused=one_kernel, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise RuntimeError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or take adamw") from error
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def freeze_parts(model: nn.Module, frozen: Sequence[str]) -> None:
    """Let all parameters learn but those of some parts."""
    beginnings = tuple(beginning for part in frozen for beginning in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(beginnings))


@torch.no_grad()
def examine(
    model: PaliGemma,
    processor: Processor,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
    shown: int = 4,
) -> dict:
    """Ask a model what it does not learn from: the loss, greedy answers, and how many of them are exact.

    Parameters
    ----------
    examples : sequence of Example
        Where an example has several `answers`, any of them is right.
    autocast : torch.dtype, optional
        As in `train`.
    shown : int
        So many answers are given back.

    Returns
    -------
    dict
        `asked`, `loss` (nats, mean over answer tokens), `exact` (share, spaces around answers aside), and
        `answers`: the first few as {"prefix", "suffix", "answer"}.
    """
    was_training = model.training
    model.eval()
    device, decode = model.device, processor.tokenizer.decode
    total = tokens = right = 0
    answers = []
    for start in range(0, len(examples), batch_size):
        part = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
        taught = collate(processor, part).to(device)
        asked = processor.prepare([load_image(one.image) for one in part], [one.prefix for one in part]).to(device)
        longest = int((taught.labels != -100).sum(1).max())
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            count = answer_tokens(taught)
            total, tokens = total + answer_loss(model, taught).item() * count, tokens + count
            said = generate_answers(
                model, asked, decode, max_new_tokens=longest + 8, sampling=Sampling(seed=0),
                stop_ids=getattr(model, "stop_ids", None),
            )  # fmt: skip
        for one, answer in zip(part, said, strict=True):
            right += answer.text.strip() in {truth.strip() for truth in (one.answers or (one.suffix,))}
            if len(answers) < shown:
                answers.append({"prefix": one.prefix, "suffix": one.suffix, "answer": answer.text})
    model.train(was_training)
    return {"asked": len(examples), "loss": total / tokens, "exact": right / len(examples), "answers": answers}


class Checkpoints:
    """The last few states of a run, each a folder that appears whole or not at all.

    `step-000123/` holds `weights.safetensors` (of the parameters that are trained), `optimizer.safetensors`,
    `state.json`, and `manifest.json` with size and checksum of the others.

    Parameters
    ----------
    folder : Path
        Made if need be.
    modules : torch.nn.Module
    optimizers : list
    every : int
        Save after so many steps, and after the last one.
    keep : int
        So many stay.
    """

    def __init__(self, folder: Path, modules: nn.Module, optimizers: list, *, every: int, keep: int = 3):
        self.folder, self.every, self.keep = folder, every, keep
        self.learning = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        self.optimizers = optimizers

    def is_due(self, step: int, steps: int) -> bool:
        return step % self.every == 0 or step == steps

    def save(self, progress: Progress) -> None:
        """Write a checkpoint and remove the oldest.

        Raises
        ------
        RuntimeError
            If it cannot be written; the ones before it stand.
        """
        tensors, state = _pack_optimizers(self.optimizers)
        tensors |= {"random.torch": torch.get_rng_state(), "rows": torch.tensor(progress.rows, dtype=torch.float64)}
        for index in range(torch.cuda.device_count()):
            tensors[f"random.cuda.{index}"] = torch.cuda.get_rng_state(index)
        if torch.backends.mps.is_available():
            tensors["random.mps"] = torch.mps.get_rng_state()
        kept = {"data": progress.data, "notes": progress.notes, "scale": progress.scale}
        state |= kept | {"step": progress.step, "random": random.getstate()}
        weights = {name: parameter.detach().contiguous() for name, parameter in self.learning.items()}
        try:
            with folder_beside(self.folder / f"step-{progress.step:06d}") as fresh:
                save_file(weights, fresh / "weights.safetensors")
                save_file(tensors, fresh / "optimizer.safetensors")
                (fresh / "state.json").write_text(json.dumps(state))
                manifest = {path.name: [path.stat().st_size, file_checksum(path)] for path in sorted(fresh.iterdir())}
                (fresh / "manifest.json").write_text(json.dumps(manifest))
        except (RuntimeError, SafetensorError, OSError) as error:
            raise self._unwritten(progress, error) from error
        for old in self._found()[self.keep :]:
            shutil.rmtree(old)

    def restore(self) -> Progress:
        """Load the newest checkpoint that is whole into weights, optimizers and random numbers.

        Returns
        -------
        Progress
            An empty one if there is no checkpoint.

        Raises
        ------
        ValueError
            If all checkpoints are damaged, or the newest is of other weights.
        RuntimeError
            If one cannot be read now, which says nothing about its bytes: it stays where it is.
        """
        for rest in self.folder.glob(".step-*"):  # of a save that was killed
            shutil.rmtree(rest)
        found = self._found()
        for path in found:
            try:
                state, weights, tensors = _read_checkpoint(path)
            except OSError as error:
                raise self._unreadable(path, error) from error
            except ValueError as error:
                aside = self._set_aside(path)
                remark(f"{path} is damaged ({error}): set aside as {aside.name}, the one before it is used")
                continue
            self._load(path, weights, tensors, state)
            return Progress(tensors["rows"].tolist(), state["data"], state["notes"], state["scale"])
        return self._nothing_whole(found)

    def _found(self) -> list[Path]:
        """Newest first; a copy that somebody put beside them is none of ours."""
        ours = (path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
        return sorted(ours, key=lambda path: int(path.name[5:]), reverse=True)

    def _unwritten(self, progress: Progress, what: object) -> RuntimeError:
        return RuntimeError(
            f"the checkpoint of step {progress.step} cannot be written ({what}); those before it stand: "
            "make room, then give the same command again"
        )

    def _unreadable(self, path: Path, what: object) -> RuntimeError:
        return RuntimeError(f"{path} cannot be read now ({what}): nothing was changed, check disk and permissions")

    def _set_aside(self, path: Path) -> Path:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        return aside

    def _nothing_whole(self, found: list[Path]) -> Progress:
        """A run that begins; but not where there were checkpoints, and all are damaged."""
        if found or any(self.folder.glob("damaged-*")):
            raise ValueError(
                f"no checkpoint in {self.folder} is whole: rename damaged-step-N back to step-N if the disk was at fault, "
                "or remove the folder to begin anew"
            )
        return Progress()

    def _expect_same(self, path: Path, shapes: dict[str, Sequence[int]], stored: dict[str, Sequence[int]]) -> None:
        if shapes != stored:
            name = min(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
            there, here = stored.get(name, "absent"), shapes.get(name, "not trained")
            raise ValueError(f"{path} is of another configuration: {name} is {there} there and {here} here")

    def _load(self, path: Path, weights: dict, tensors: dict, state: dict) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in self.learning.items()}
        self._expect_same(path, shapes, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        with torch.no_grad():
            for name, parameter in self.learning.items():
                parameter.copy_(weights[name])
        _unpack_optimizers(self.optimizers, tensors, state)
        version, numbers, spare = state["random"]
        random.setstate((version, tuple(numbers), spare))
        torch.set_rng_state(tensors["random.torch"])
        for index in range(torch.cuda.device_count()):
            if f"random.cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)
        if torch.backends.mps.is_available() and "random.mps" in tensors:
            torch.mps.set_rng_state(tensors["random.mps"])


def _pack_optimizers(optimizers: list) -> tuple[dict, dict]:
    """What optimizers remember, as tensors by name and a table of plain numbers."""
    tensors, numbers, seen = {}, [], set()
    for place, optimizer in enumerate(optimizers):
        numbers.append({})
        for index, memory in optimizer.state_dict()["state"].items():
            wrapped = [value for value in memory.values() if isinstance(value, dict)]  # bitsandbytes does so
            for key, value in itertools.chain(memory.items(), *(inner.items() for inner in wrapped)):
                if isinstance(value, torch.Tensor):  # two that share memory cannot be written as they are
                    value = value.detach().contiguous()
                    tensors[f"{place}.{index}.{key}"] = value.clone() if value.data_ptr() in seen else value
                    seen.add(value.data_ptr())
                elif not isinstance(value, dict):
                    numbers[-1].setdefault(str(index), {})[key] = value
    return tensors, {"optimizers": numbers}


def _unpack_optimizers(optimizers: list, tensors: dict, state: dict) -> None:
    for place, (optimizer, numbers) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
        memory = {int(index): dict(values) for index, values in numbers.items()}
        for name, tensor in tensors.items():
            if name.startswith(f"{place}."):
                _, index, key = name.split(".", 2)
                memory.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": memory, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_checkpoint(path: Path) -> tuple[dict, dict, dict]:
    """State, weights and the other tensors of a checkpoint; a ValueError says what is wrong with its bytes."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
            size, checksum = manifest[name]
            if (path / name).stat().st_size != size or file_checksum(path / name) != checksum:
                raise ValueError(f"{name} is not as it was written")
        state = json.loads((path / "state.json").read_text())
        return state, load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{Path(error.filename or path).name} is missing") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def file_checksum(path: Path, most: int | None = None) -> int:
    """CRC-32 of a file, or of its first `most` bytes."""
    value, left = 0, path.stat().st_size if most is None else most
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 22))):
            value, left = zlib.crc32(piece, value), left - len(piece)
    return value


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Let each block keep only its input, and run again when its gradient is asked for.

    References
    ----------
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks_of(model: PaliGemma) -> list[nn.Module]:
    """The blocks of tower and decoder, from first to last."""
    return [*model.vision_tower.encoder.layers, *model.language_model.layers]


def saved_bytes(run: Callable[[], torch.Tensor], besides: Iterable[torch.Tensor] = ()) -> tuple[torch.Tensor, int]:
    """Run something and count what autograd keeps for the backward pass.

    Parameters
    ----------
    run : callable
    besides : iterable of torch.Tensor
        Not counted: weights are there anyway.

    Returns
    -------
    torch.Tensor, int
        What `run` gave, and bytes; memory that several tensors share counts once.
    """
    known = {tensor.untyped_storage()._cdata for tensor in besides}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


CGROUP = Path("/sys/fs/cgroup")  # where Linux tells the limits of a container


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left, or None where nobody says; of a container with a limit, at most up to that."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    line = next(line for line in table.read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(line.split()[1]) * 1024
    limit = CGROUP / "memory.max"
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return free
    table = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    # pages of files that nobody has used of late are held only as long as nobody else wants the room
    held = int((CGROUP / "memory.current").read_text()) - int(table["inactive_file"])
    return min(free, max(0, int(most) - held))


@dataclass(frozen=True)
class Bill:
    """What a step costs: numbers that learn and that do not, bytes by part, and operations."""

    learning: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    operations: int

    @property
    def bytes(self) -> int:
        """At the worst moment: all gradients are there and a small batch is on its way."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def lines(self) -> list[str]:
        """The bill as a table, a part a line."""
        parts = ("weights", "gradients", "optimizer", "activations", "bytes")
        sizes = [f"{'together' if part == 'bytes' else part:12} {getattr(self, part) / 1e6:,.1f} MB" for part in parts]
        learning = f"{'learning':12} {self.learning:,} of {self.learning + self.frozen:,} parameters"
        return [learning, *sizes, f"{'operations':12} {self.operations / 1e9:,.1f} billion a step"]


def training_bill(
    sizes: PaliGemmaConfig,
    config: TrainingConfig,
    batch: Batch,
    prepare: Callable[[PaliGemma], None],
    device: torch.device | str = "cpu",
) -> Bill:
    """The bill of a step, without taking it: shapes run through the model, numbers do not.

    Parameters
    ----------
    sizes : PaliGemmaConfig
        Of the model.
    config : TrainingConfig
        With a real dtype, not auto.
    batch : Batch
        A typical small batch; only its shapes and the number of its answer tokens matter.
    prepare : callable
        Makes the model ready to learn: freezes parts, or swaps modules.
    """
    answers = answer_tokens(batch)
    with FakeTensorMode(), torch.device(device):
        model = PaliGemma(sizes)
        prepare(model)
        tensors = [*model.parameters(), *model.buffers()]
        shaped = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in vars(batch).items()}
        forward = partial(_loss_of_shapes, model, Batch(**shaped), answers, AUTOCAST[config.dtype])
        largest = _largest_block(model, forward, tensors) if config.recompute else 0
        if config.recompute:
            recompute_activations(blocks_of(model))
        with FlopCounterMode(display=False) as counter:
            loss, activations = saved_bytes(forward, tensors)
            loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    return Bill(
        learning=sum(p.numel() for p in learning),
        frozen=sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in learning),
        weights=sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        gradients=sum(p.nbytes for p in learning),
        optimizer=sum(_adamw_bytes(p, config.optimizer) for p in learning),
        activations=activations + largest,
        operations=counter.get_total_flops() * config.accumulate,
    )


def _loss_of_shapes(model: PaliGemma, batch: Batch, answers: int, autocast: torch.dtype | None) -> torch.Tensor:
    """As `PaliGemma.loss`, but the places that are asked are the first ones: labels have no values to choose by."""
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        features = model.encode_images(batch.pixel_values)
        hidden_states = model.hidden_states(batch.input_ids, features, batch.attention_mask, batch.token_type_ids)
        asked = hidden_states[:, :-1].flatten(0, 1)[:answers]  # (M, D)
        targets = torch.zeros(len(asked), dtype=torch.long, device=asked.device)
        return F.cross_entropy(model.logits(asked).float(), targets)


def _largest_block(model: PaliGemma, forward: Callable[[], torch.Tensor], besides: list[torch.Tensor]) -> int:
    """Bytes that the costliest block keeps: with recomputing, one block at a time is whole again."""
    kept = []

    def measure(whole: Callable, *arguments) -> torch.Tensor:
        result, size = saved_bytes(partial(whole, *arguments), besides)
        kept.append(size)
        return result

    for block in blocks_of(model):
        block.forward = partial(measure, block.forward)
    forward()
    for block in blocks_of(model):
        del block.forward  # the class has its own again
    return max(kept)


def _adamw_bytes(parameter: torch.Tensor, optimizer: str) -> int:
    """Two means for each number: 4 bytes each, or 1 and a scale for each 256, which small tensors are spared."""
    if optimizer == "adamw" or parameter.numel() < 4096:
        return 8 * parameter.numel()
    return 2 * parameter.numel() + 2 * 4 * math.ceil(parameter.numel() / 256)


AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # None: no autocast is needed


def claim_folder(
    out: Path,
    identity: dict,
    saved: Sequence[str] = ("checkpoints/*", "best", "final"),
    alone: bool = True,
    later: Collection[str] = (),
) -> None:
    """Make a folder the home of a run, or make sure that it is the home of this one already.

    Parameters
    ----------
    out : Path
        Gets `run.json`.
    identity : dict
        All that decides the numbers of the run, of plain values.
    saved : sequence of str
        Patterns of what a run leaves there. As long as there is nothing like it, a run with other values may take over.
    alone : bool
        Whether a folder without `run.json` must be empty (a `.lock` aside), or may hold all but what is `saved`.
    later : collection of str
        Keys that came with a later version: in a run that has none of them they count as the same.

    Raises
    ------
    ValueError
        If it is a file, or the folder holds another run, or something else; the sentence names what differs.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder that is empty or new")
    path, begun = out / "run.json", any(any(out.glob(pattern)) for pattern in saved)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is broken ({error}): give another folder, or remove this one") from error
        wanted = json.loads(json.dumps(identity))
        asked = [key for key in wanted if key in known or key not in later]
        differing = [key for key in asked if key not in known or known[key] != wanted[key]]
        if not differing:
            return
        if begun:
            key = differing[0]
            raise ValueError(
                f"{out} holds a run with {key} = {known.get(key)!r}, this one has {wanted[key]!r}: "
                "give the same to go on with it, or another folder for a new run"
            )
    elif begun or (alone and out.exists() and {entry.name for entry in out.iterdir()} - {".lock", ".run.json.part"}):
        raise ValueError(f"{out} holds something else and no run.json: give a folder that is empty or new")
    make_folder(out)
    with file_beside(path) as fresh:
        fresh.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def draw_losses(progress: Progress, path: Path) -> None:
    """Write a picture of the losses of a run: each step, and what was found at intervals.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # no window, no global state

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    losses = torch.tensor(progress.losses)
    axis.plot(range(1, len(losses) + 1), losses, color="0.75", lw=0.8)
    run = max(1, len(losses) // 50)
    means = losses[: len(losses) // run * run].view(-1, run).mean(1)
    axis.plot(torch.arange(1, len(means) + 1) * run, means, color="#0072b2")
    axis.annotate(f"training, mean of {run}", (len(losses), means[-1]), xytext=(4, 0), textcoords="offset points")
    if progress.notes:
        steps, held = [note["step"] for note in progress.notes], [note["loss"] for note in progress.notes]
        axis.plot(steps, held, color="#d55e00", marker="o", ms=4, ls=":", lw=1)
        axis.annotate("held out", (steps[-1], held[-1]), xytext=(4, -10), textcoords="offset points", color="#d55e00")
    axis.set(xlabel="step", ylabel="loss, in nats", ylim=(0, None))
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
