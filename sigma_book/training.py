"""The loop that teaches.

How does a model change, step by step, until its answers are right?

Tangled from chapters/16_training.py: edit there, then run python -m sigma_book.tangle.
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch

__all__ = ["answer_loss", "learning_rate_factor", "train"]


def learning_rate_factor(step: int, steps: int, warmup: int, hold: float = 0.0) -> float:
    """The share of the peak learning rate at a step: up in a line, then held, then down in a line to zero.

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
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    return min(1.0, max(0.0, (steps - step) / max(1.0, steps - start)))


def answer_loss(model: PaliGemma, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answers of a batch: what the ordinary batches of chapter 15 are for."""
    return model.loss(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids, batch.labels)


def train(
    modules: nn.Module,
    loss: Callable[..., torch.Tensor],
    batches: Iterable,
    optimizers: list[torch.optim.Optimizer],
    *,
    steps: int,
    warmup: int = 100,
    hold: float = 0.0,
    clip: float = 1.0,
    log: Path | None = None,
    label: str = "train",
    report_every: int = 500,
    report: Callable[[int], str] | None = None,
) -> list[float]:
    """Take steps: loss, gradients, clipping, update.

    Parameters
    ----------
    modules : torch.nn.Module
        All that may learn; parameters with `requires_grad` off stay as they are.
    loss : callable
        Takes a batch, gives a scalar tensor.
    batches : iterable
        At least `steps` batches.
    optimizers : list
        Their learning rates are the peaks; the schedule scales them all alike.
    steps, warmup, hold
        The length of the run and the shape of the schedule, as in `learning_rate_factor`.
    clip : float
        The gradient, all parameters taken as one vector, is scaled down to at most this length.
    log : Path, optional
        A CSV file that grows by a line a step: step, loss, gradient_norm, rate, seconds.
    report : callable, optional
        Called every `report_every` steps with the step; its text is shown beside the progress bar.

    Returns
    -------
    list of float
        The loss at each step.

    Raises
    ------
    ValueError
        If the batches end too soon.
    RuntimeError
        If a loss is not a finite number.
    """
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    stream: Iterator = iter(batches)
    started = time.perf_counter()
    with _log(log) as write, tqdm(total=steps, desc=label, mininterval=2.0) as bar:
        for step in range(steps):
            factor = learning_rate_factor(step, steps, warmup, hold)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            batch = next(stream, None)
            if batch is None:
                raise ValueError(f"the batches ended after {step} of {steps} steps: give more examples or fewer steps")
            value = loss(batch)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss is {losses[-1]} at step {step}: nothing was changed by this step")
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip).item()
            for optimizer in optimizers:
                optimizer.step()
            write([step, f"{losses[-1]:.5f}", f"{norm:.4f}", f"{factor:.5f}", f"{time.perf_counter() - started:.1f}"])
            bar.update()
            if report is not None and (step + 1) % report_every == 0:
                bar.write(f"{label} {step + 1}: {report(step + 1)}")
            bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    return losses


@contextmanager
def _log(path: Path | None) -> Iterator[Callable[[list], None]]:
    """A function that writes one line to a CSV file with a head, or to nowhere."""
    if path is None:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", buffering=1) as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "gradient_norm", "rate", "seconds"])
        yield writer.writerow
