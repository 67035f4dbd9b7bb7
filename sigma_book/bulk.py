"""Millions of pictures, and other engines.

How does a model answer a million pictures, when some are broken, machines stop in the middle, and the engine may be another's?

Tangled from chapters/22b_bulk.py: edit there, then run python -m sigma_book.tangle.
"""

import base64
import http.client
import io
import json
import math
import os
import re
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sigma_book.answers import AnswerFile
from sigma_book.data import Example, find_picture, index_lines
from sigma_book.generation import whole_number
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import file_beside, load_image, to_disk
from sigma_book.training import CGROUP

__all__ = [
    "ANSWER_FORMS",
    "FAILED_IN_ORDER",
    "MOST_BLOCKS",
    "PREFIX_MASKS",
    "RAY_SETTINGS",
    "AnswerParts",
    "BulkActor",
    "BulkConfig",
    "EngineReport",
    "LineRows",
    "ParquetRows",
    "answer_here",
    "answer_logprobs",
    "answer_range",
    "answer_with_ray",
    "answers_or_reasons",
    "ask_engine",
    "claims",
    "compare_engine",
    "engine_model",
    "open_rows",
    "prefix_types",
    "processors",
    "ray_running",
]

_ROW_KEYS = ("prompt", "prefix")


def _request(row: Mapping, folder: Path) -> Example:
    """What a row asks; raises what is wrong with it."""
    key = next((key for key in _ROW_KEYS if key in row), None)
    if key is None or "image" not in row:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise ValueError(f"the keys of this row are {keys}: expected 'image' and 'prompt'")
    prompt, image = row[key], row["image"]
    if not isinstance(prompt, str):
        raise ValueError(f"{key} is {prompt!r:.60}: expected a text")
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what is asked")
    if isinstance(image, Mapping):  # as the datasets library stores pictures
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    facts = {"image": image} if isinstance(image, str) else {}
    source = image if isinstance(image, bytes) else find_picture(image, (folder,))
    return Example(source, prompt, "", facts=facts)


class LineRows:
    """The rows of a file of JSON lines, `{"image": path, "prompt": text}`; only their places are held in memory.

    Parameters
    ----------
    path : path
    folder : path
        Where relative paths of pictures begin.
    """

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder, self._table = path, folder, index_lines(path)

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        return f"{self.path.name}, line {self._table.columns['line'][index]}"

    def read(self, start: int, stop: int) -> list[Example | Exception]:
        """Rows from `start` up to `stop`, each an example, or what is wrong with it.

        Raises
        ------
        RuntimeError
            If the file was changed since it was opened.
        """
        return [self._one(index) for index in range(start, stop)]

    def _one(self, index: int) -> Example | Exception:
        try:
            return _request(self._table.rows([index])[0], self.folder)
        except (ValueError, OSError) as error:
            return error


class ParquetRows:
    """The rows of a Parquet file with the columns `image` (paths, bytes, or both in a struct) and `prompt`.

    A reader is kept where the last rows were read, so that rows in order are read once.

    Raises
    ------
    ValueError
        If the file is damaged, or a column is missing.
    RuntimeError
        If pyarrow is not installed, or a copy of this object, as an actor has one, finds another file in its place.
    """

    def __init__(self, path: Path, folder: Path, state: tuple[int, int] | None = None):
        self.path, self.folder = path, folder
        self._state = _file_state(path) if state is None else state
        self._expect_same()
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise RuntimeError(f"{path} is Parquet, read by pyarrow: {_EXTRA}") from error
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no Parquet file that can be read ({_one_sentence(error)})") from error
        names = self._file.schema_arrow.names
        key = next((key for key in _ROW_KEYS if key in names), None)
        if key is None or "image" not in names:
            raise ValueError(f"{path} has the columns {', '.join(names)}: expected 'image' and 'prompt'")
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._columns, self._starts = ["image", key], np.cumsum([0, *sizes])
        self._group, self._next, self._waiting = -1, 0, iter(())
        # of each damaged group, the first row that cannot be read, and why: it and the ones behind it are lost
        self._lost: dict[int, tuple[int, ValueError]] = {}

    def __reduce__(self):
        return ParquetRows, (self.path, self.folder, self._state)

    def _expect_same(self) -> None:
        if _file_state(self.path) != self._state:
            raise RuntimeError(f"{self.path} was changed while it was in use: start again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, index: int) -> str:
        return f"{self.path.name}, row {index + 1}"

    def read(self, start: int, stop: int) -> list[Example | Exception]:
        """Rows from `start` up to `stop`, each an example, or what is wrong with it.

        Raises
        ------
        RuntimeError
            If the file was changed since it was opened.
        """
        found: list[Example | Exception] = []
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[group + 1]))
            found += self._read_in(group, start, end)
            start = end
        return found

    def _read_in(self, group: int, start: int, stop: int) -> list[Example | Exception]:
        self._expect_same()
        first_lost, why = self._lost.get(group, (stop, None))
        if start >= first_lost:
            return [why] * (stop - start)
        if group != self._group or self._next > start:
            self._group, self._next, self._waiting = group, int(self._starts[group]), self._rows_of(group)
        found: list[Example | Exception] = []
        try:
            for row in islice(self._waiting, start - self._next, stop - self._next):
                found.append(row if isinstance(row, Exception) else self._one(row))
            self._next = stop
        except (OSError, ValueError) as error:  # the rows that follow in this group are lost, those of others are not
            self._expect_same()
            why = ValueError(f"this part of the file cannot be read ({_one_sentence(error)})")
            self._group, self._lost[group] = -1, (start + len(found), why)
            found += [why] * (stop - start - len(found))
        return found

    def _rows_of(self, group: int) -> Iterator[dict | Exception]:
        for batch in self._file.iter_batches(64, row_groups=[group], columns=self._columns):
            try:
                yield from batch.to_pylist()
            except ValueError:  # one of them is no text in UTF-8
                for index in range(len(batch)):
                    yield _row_alone(batch.slice(index, 1))

    def _one(self, row: dict) -> Example | Exception:
        try:
            return _request(row, self.folder)
        except (ValueError, OSError) as error:
            return error


def _file_state(path: Path) -> tuple[int, int]:
    """What changes with a file: its bytes, and the nanosecond of its last change."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _row_alone(batch) -> dict | Exception:
    """The one row of a record batch, or what is wrong with it."""
    try:
        return batch.to_pylist()[0]
    except ValueError as error:
        return ValueError(f"this row cannot be read ({_one_sentence(error)})")


_EXTRA = "pip install 'sigma-book[scale]'"


def _one_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def open_rows(path: str | Path, root: str | Path | None = None) -> LineRows | ParquetRows:
    """Open a file of pictures and prompts, JSON lines or Parquet; the rows are read when they are asked for.

    Parameters
    ----------
    path : path
    root : path, optional
        Where relative paths of pictures begin; the file's folder by default.

    Raises
    ------
    FileNotFoundError
        If the file or the root is missing.
    ValueError
        If the file is empty or of another form, or none of its first hundred rows can be used.
    RuntimeError
        If Parquet is to be read, and pyarrow is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path} (rows of pictures and prompts)")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(f"no such folder: {root} (root, where the paths of pictures begin)")
    with path.open("rb") as file:
        magic = file.read(4)
    kind = ParquetRows if magic == b"PAR1" or path.suffix == ".parquet" else LineRows
    rows = kind(path.resolve(), (path.parent if root is None else Path(root)).resolve())
    if len(rows) == 0:
        raise ValueError(f"{path} holds no row")
    first = rows.read(0, min(100, len(rows)))
    if all(isinstance(row, Exception) for row in first):
        raise ValueError(f"{path}: none of the first {len(first)} rows can be used; {rows.where(0)}: {first[0]}")
    return rows


def answers_or_reasons(
    examples: Sequence[Example], answer: Callable[[list[Example]], list[str]]
) -> list[tuple[str | None, str | None]]:
    """Ask all examples; for each its answer, or the sentence that says why there is none.

    Parameters
    ----------
    examples : sequence of Example
    answer : callable
        Takes a list of examples, gives a text for each. An error of a batch is looked for by halving.

    Returns
    -------
    list of (answer, reason)
        One of the two is None.

    Raises
    ------
    torch.AcceleratorError
        If the GPU itself has failed: no row is to blame, and no other would be answered.
    """
    if not examples:
        return []
    try:
        return [(text, None) for text in answer(list(examples))]
    except torch.AcceleratorError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if len(examples) == 1:
            return [(None, _one_sentence(error))]
    half = len(examples) // 2
    return answers_or_reasons(examples[:half], answer) + answers_or_reasons(examples[half:], answer)


def answer_range(
    rows: LineRows | ParquetRows, start: int, stop: int, answer: Callable[[list[Example]], list[str]]
) -> list[dict]:
    """Records of the rows from `start` up to `stop`, asked together.

    Returns
    -------
    list of dict
        `index` (from 0), `where`, `image` (the path, None for bytes), `prompt`, `answer`, `error`: of the last two, one is
        None.
    """
    records, asked = [], []
    for index, found in zip(range(start, stop), rows.read(start, stop), strict=True):
        record = {"index": index, "where": rows.where(index), "image": None, "prompt": None}
        if isinstance(found, Exception):
            records.append(record | {"answer": None, "error": _one_sentence(found)})
            continue
        record |= {"image": found.facts.get("image"), "prompt": found.prefix, "answer": None, "error": None}
        records.append(record)
        asked.append((record, found))
    outcomes = answers_or_reasons([example for _, example in asked], answer)
    for (record, _), (text, reason) in zip(asked, outcomes, strict=True):
        record |= {"answer": text, "error": reason}
    return records


ANSWER_FORMS = ("jsonl", "parquet")
FAILED_IN_ORDER = 1000  # so many rows without an answer between them are more than bad luck


@dataclass(frozen=True)
class AnswerParts:
    """The answers of a run as files `part-00000`, `part-00001`, ..., each of so many rows, in order.

    Parameters
    ----------
    folder : Path
        It is there, and no other process is at work in it.
    total : int
        Rows of the whole run.
    rows_per_part : int
    form : str
        `jsonl`, or `parquet`: then a part is JSON lines while it grows, and becomes Parquet when it is full.
    """

    folder: Path
    total: int
    rows_per_part: int = 10_000
    form: str = "jsonl"

    def __post_init__(self):
        whole_number("rows_per_part", self.rows_per_part, least=1)
        if self.form not in ANSWER_FORMS:
            raise ValueError(f"form is {self.form!r}: expected one of {', '.join(ANSWER_FORMS)}")

    def path(self, part: int, form: str = "jsonl") -> Path:
        return self.folder / f"part-{part:05d}.{form}"

    def end(self, part: int) -> int:
        """The number of the first row behind a part."""
        return min(self.total, (part + 1) * self.rows_per_part)

    def next_index(self) -> int:
        """The number of the first row that has no whole record yet.

        Raises
        ------
        ValueError
            If a part before the last one is missing or short, or a file was edited.
        """
        found = {int(match[1]) for path in self.folder.iterdir() if (match := _PART.fullmatch(path.name))}
        if not found:
            return 0
        last = max(found)
        if missing := sorted(set(range(last)) - found):
            raise ValueError(f"{self.folder} lacks {self.path(missing[0], self.form).name}: give a new folder")
        for part in range(last):
            if not self.path(part, "parquet").exists():
                self._expect_full(part, AnswerFile(self.path(part)).next_index())
        if self.path(last, "parquet").exists():
            self.path(last).unlink(missing_ok=True)  # a kill came between writing the one and removing the other
            return self.end(last)
        following = max(last * self.rows_per_part, AnswerFile(self.path(last)).next_index())
        if following > self.end(last):
            raise ValueError(
                f"{self.path(last)} holds row {following - 1}, which is not of this part: give a new folder"
            )
        if following == self.end(last) and self.form == "parquet":
            self._seal(last)
        return following

    def write(self, records: Iterator[dict], label: str = "answers") -> Counter:
        """Append records, which begin with that of `next_index()`, and show how far it is.

        Returns
        -------
        collections.Counter
            How many have been `answered` now, and how many have an `error`.

        Raises
        ------
        RuntimeError
            If a record is not the next one, the disk is full, or rows that were answered are followed by very many that
            all fail: what was written stands.
        """
        start, seen, records = self.next_index(), Counter(), _believable(records)
        with tqdm(total=self.total, initial=start, desc=label, unit="", disable=None) as bar:
            while start < self.total:
                part = start // self.rows_per_part
                with AnswerFile(self.path(part)).growing() as append:
                    for record in islice(records, self.end(part) - start):
                        if record["index"] != start:
                            raise RuntimeError(f"row {record['index']} came where row {start} was due")
                        append(record)
                        seen["answered" if record["error"] is None else "error"] += 1
                        start += 1
                        bar.update()
                if start < self.end(part):
                    raise RuntimeError(f"the answers end before row {start}: give the same command again")
                for path in (self.path(part), self.folder):
                    to_disk(path)  # before the next part begins
                if self.form == "parquet":
                    self._seal(part)
        return seen

    def _expect_full(self, part: int, following: int) -> None:
        """Of a part that others follow: a disk without power may have lost its last rows."""
        if following < self.end(part):
            raise ValueError(
                f"{self.path(part)} ends before row {max(following, part * self.rows_per_part)}, though other parts follow: "
                "remove it and all parts behind it, then give the same command again"
            )

    def _seal(self, part: int) -> None:
        """Turn a full part into Parquet: written beside its place, moved there, then the lines go."""
        import pyarrow
        import pyarrow.parquet

        names = ("where", "image", "prompt", "answer", "error")
        kinds = {"index": pyarrow.int64()} | dict.fromkeys(names, pyarrow.string())
        rows = [{name: _whole_letters(record[name]) for name in kinds} for record in AnswerFile(self.path(part))]
        table = pyarrow.Table.from_pylist(rows, pyarrow.schema(list(kinds.items())))
        with file_beside(self.path(part, "parquet")) as fresh:
            pyarrow.parquet.write_table(table, fresh)
        self.path(part).unlink()

    def __iter__(self) -> Iterator[dict]:
        """All records so far, in order.

        Raises
        ------
        ValueError
            If a part is short and others follow.
        """
        for part in range(math.ceil(self.total / self.rows_per_part)):
            if self.path(part, "parquet").exists():
                import pyarrow.parquet

                for batch in pyarrow.parquet.ParquetFile(self.path(part, "parquet")).iter_batches():
                    yield from batch.to_pylist()
            else:
                following = 0
                for record in AnswerFile(self.path(part)):
                    yield record
                    following = record["index"] + 1
                if any(self.path(part + 1, form).exists() for form in ANSWER_FORMS):
                    self._expect_full(part, following)


def _believable(records: Iterator[dict]) -> Iterator[dict]:
    """Records as they come, but errors behind an answer wait for the next: very many may mean that a disk is away."""
    answered, failed = False, []
    for record in records:
        if record["error"] is not None and answered:
            failed.append(record)
            if len(failed) == FAILED_IN_ORDER:
                raise RuntimeError(
                    f"the last {len(failed):,} rows have all failed ({record['error']}): is the disk of the pictures there? "
                    f"If it is again, or never was away, give the same command: it goes on at row {failed[0]['index']:,}"
                )
            continue
        answered = answered or record["error"] is None
        yield from failed
        failed = []
        yield record
    yield from failed


def _whole_letters(value: str | int | None) -> str | int | None:
    """A text with halves of letters written out, for they are no UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


_PART = re.compile(r"part-(\d{5,})\.(?:jsonl|parquet)")


def answer_here(
    rows: LineRows | ParquetRows, start: int, answer: Callable[[list[Example]], list[str]], batch_size: int = 16
) -> Iterator[dict]:
    """Records of all rows from `start` on, in this process."""
    for first in range(start, len(rows), batch_size):
        yield from answer_range(rows, first, min(len(rows), first + batch_size), answer)


MOST_BLOCKS = 10_000  # more batches share them: a dead actor costs one batch, or a ten thousandth of the run, at most


@dataclass(frozen=True)
class BulkConfig:
    """How the work is shared.

    Parameters
    ----------
    actors : int
        Processes that have the model.
    batch_size : int
        Rows that an actor answers together.
    cpus, gpus : float
        What an actor claims of the machines, for Ray to know where it fits; fractions are allowed. It is a claim on paper:
        best leave something free for Ray itself.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    actors: int = 1
    batch_size: int = 16
    cpus: float = 0.5
    gpus: float = 0.0

    def __post_init__(self):
        whole_number("actors", self.actors, least=1)
        whole_number("batch_size", self.batch_size, least=1)
        for name in ("cpus", "gpus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a number, 0 or more")


class BulkActor:
    """What each actor holds: the rows, and a function that asks the model. Called with a batch, it gives JSON lines.

    A model that cannot be loaded is told in the place of answers: raised here, the sentence would be lost among others.
    """

    def __init__(self, rows: LineRows | ParquetRows, make_answer: Callable[[], Callable[[list[Example]], list[str]]]):
        self._rows, self._failure = rows, None
        try:
            self._answer = make_answer()
        except (ValueError, OSError, RuntimeError) as error:
            self._failure = _one_sentence(error)

    def __call__(self, batch: dict) -> dict:
        if self._failure is not None:
            return {"line": [json.dumps({"failure": self._failure})]}
        ranges = zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True)
        records = [record for one in ranges for record in answer_range(self._rows, *one, self._answer)]
        # plain text, so that no kind of value is guessed on the way
        return {"line": [json.dumps(record) for record in records]}


def answer_with_ray(
    rows: LineRows | ParquetRows,
    start: int,
    make_answer: Callable[[], Callable[[list[Example]], list[str]]],
    config: BulkConfig,
) -> Iterator[dict]:
    """Records of all rows from `start` on, in order, from a pool of actors.

    If this process is not yet part of a Ray cluster, it joins the one that `RAY_ADDRESS` names, or starts one on this
    machine, without dashboard and usage statistics, that ends with the answers.

    Parameters
    ----------
    rows : LineRows or ParquetRows
        Each machine must find file and pictures under the same paths.
    start : int
    make_answer : callable
        Called once in each actor; gives the function that takes examples and gives texts.
    config : BulkConfig

    Raises
    ------
    ValueError
        If the actors claim more than the machines have.
    RuntimeError
        If Ray is not installed, the model cannot be loaded, an actor fails in a way that no row explains, or no answer comes
        for half an hour (with more than `MOST_BLOCKS` batches, for each of those that are handed out together): a row may
        end the process of its actor each time that it is asked.
    """
    with ray_running() as ray:
        _check_room(ray, config)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False  # ours counts rows, not blocks
        size, total = config.batch_size, len(rows)
        batches = [{"start": first, "stop": min(total, first + size)} for first in range(start, total, size)]
        block = max(1, math.ceil(len(batches) / MOST_BLOCKS))  # batches whose answers come all at once
        context.execution_no_progress_timeout_s = 1800 * block
        blocks = ray.data.from_items(batches, override_num_blocks=min(len(batches), MOST_BLOCKS))
        answers = blocks.map_batches(
            BulkActor,
            batch_size=1,
            fn_constructor_args=(rows, make_answer),
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            num_cpus=config.cpus,
            num_gpus=config.gpus,
        )
        try:
            for row in answers.iter_rows():
                record = json.loads(row["line"])
                if "failure" in record:
                    raise RuntimeError(record["failure"])
                yield record
        except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
            raise RuntimeError(
                f"an actor failed ({_last_cause(error)}); the answers so far stand, and the same command goes on behind them"
            ) from error


RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",
}


@contextmanager
def ray_running():
    """The package, with Ray running: part of a cluster already, or of the one that `RAY_ADDRESS` names, or started here.

    What was started here, without dashboard and statistics, ends with the block.

    Raises
    ------
    RuntimeError
        If Ray is not installed, or does not start.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data.exceptions
    except ImportError as error:
        raise RuntimeError(f"many actors and replicas need Ray: {_EXTRA}") from error
    ours = not ray.is_initialized()
    if ours:
        _start(ray)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _start(ray, chances: int = 3) -> None:
    """Join the cluster that `RAY_ADDRESS` names, or start one here; on a busy machine that may take longer than Ray waits."""
    address = os.environ.get("RAY_ADDRESS")
    if address and re.fullmatch(r"[^/]+:\d+", address):  # Ray itself would try for many minutes
        try:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), port), timeout=20).close()
        except OSError as error:
            raise RuntimeError(f"nothing answers at RAY_ADDRESS, {address} ({_one_sentence(error)})") from error
    here = {} if address else {"address": "local", "include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **here)
    except Exception as error:  # a plain Exception, if its processes are not up within half a minute
        ray.shutdown()
        if chances == 1 or "timed out" not in str(error):
            raise RuntimeError(f"Ray did not start: {_one_sentence(error)}") from error
        _start(ray, chances - 1)


def processors() -> int:
    """How many this process may use: a container may have the time of fewer than it sees."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = CGROUP / "cpu.max"
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")  # microseconds
    return seen if quota == "max" else max(1, min(seen, int(quota) // int(period)))


def claims(parts: int, device: str) -> tuple[float, float]:
    """CPUs and GPUs that one process claims of Ray: of this machine one in so many parts, on a cluster a whole one.

    Raises
    ------
    ValueError
        If the device is one GPU of several, or is to be found out and this machine cannot tell what the cluster has.
    """
    if device.startswith("cuda:"):
        raise ValueError(f"device is {device!r}: Ray gives each process a GPU of its own, so give cuda")
    if device == "auto" and os.environ.get("RAY_ADDRESS") and not torch.cuda.is_available():
        raise ValueError("device is auto, and this machine has no GPU but its cluster may: give cuda or cpu")
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    here = max(0.001, math.floor(1000 * processors() / parts) / 1000)  # rounded down, or the last would not fit
    cpus = 1.0 if os.environ.get("RAY_ADDRESS") else min(1.0, here)
    return cpus, 1.0 if cuda else 0.0


def _check_room(ray, config: BulkConfig) -> None:
    """Say at once what Ray would wait for without end."""
    have = ray.cluster_resources()
    for name, each in (("CPU", config.cpus), ("GPU", config.gpus)):
        if config.actors * each > have.get(name, 0):
            raise ValueError(
                f"{config.actors} actors with {each:g} {name} each do not fit: there are {have.get(name, 0):g} {name}, "
                "so ask for fewer actors"
            )


def _last_cause(error: BaseException) -> str:
    """The last line that Ray has to tell: it packs an error of an actor, with all its lines, into others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


PREFIX_MASKS = ("whole", "picture", "causal")


def prefix_types(input_ids: torch.Tensor, answer_start: int, image_token_id: int, mask: str) -> torch.Tensor:
    """Token types with which `prefix_mask` becomes the mask of an engine.

    Parameters
    ----------
    input_ids : torch.Tensor
        (B, T), without padding.
    answer_start : int
        Place of the first answer token.
    image_token_id : int
    mask : str
        `whole` opens picture and prompt to each other, as PaliGemma was trained; `picture` opens the places of pictures
        alone; `causal` opens nothing.

    Returns
    -------
    torch.Tensor
        (B, T), 0 where a token sees all others of type 0, else 1.
    """
    if mask == "picture":
        return (input_ids != image_token_id).long()
    types = torch.ones_like(input_ids)
    if mask == "whole":
        types[:, :answer_start] = 0
    return types


@torch.no_grad()
def answer_logprobs(
    model: PaliGemma, image: Image.Image, prompt: str, tokens: Sequence[int], mask: str = "whole"
) -> list[float]:
    """Log-probability (nats) of each token of an answer, if the model read under a mask of `PREFIX_MASKS`.

    Parameters
    ----------
    model : PaliGemma
        With its processor.
    image : PIL.Image.Image
        RGB.
    prompt : str
    tokens : sequence of int
        The answer.
    mask : str
    """
    batch = model.processor.prepare([image], [prompt]).to(model.device)
    start = batch.input_ids.shape[1]
    ids = torch.cat([batch.input_ids, torch.tensor([list(tokens)], device=model.device)], dim=1)  # (1, T)
    types = prefix_types(ids, start, model.config.image_token_id, mask)
    pictures = batch.pixel_values.to(model.multi_modal_projector.linear.weight.dtype)
    hidden_states = model.hidden_states(ids, model.encode_images(pictures), torch.ones_like(ids), types)
    logprobs = model.logits(hidden_states[:, start - 1 : -1]).float().log_softmax(-1)  # (1, answer, V)
    return logprobs[0].gather(-1, ids[0, start:, None])[:, 0].tolist()


@dataclass(frozen=True)
class EngineReport:
    """How far an engine's log-probabilities are from ours.

    Parameters
    ----------
    distances : dict
        For each mask of `PREFIX_MASKS` the mean over all tokens of the absolute difference, in nats.
    tokens : int
        How many were compared.
    tolerance : float
        Nats that rounding may explain.
    asked, left_out : int
        How many answers there were, and of how many no token could be compared.
    """

    distances: dict[str, float]
    tokens: int
    tolerance: float
    asked: int
    left_out: int

    @property
    def mask(self) -> str | None:
        """The mask that the engine uses: within tolerance, and three times as near as any other; else None.

        None also where more than half of the answers were left out.
        """
        nearest, second = sorted(PREFIX_MASKS, key=self.distances.get)[:2]
        fits = self.distances[nearest] <= self.tolerance and not self._too_few
        return nearest if fits and self.distances[second] > 3 * self.distances[nearest] else None

    @property
    def _too_few(self) -> bool:
        return 2 * self.left_out > self.asked

    def lines(self) -> list[str]:
        rows = [f"{mask:<8} {distance:.5f}" for mask, distance in self.distances.items()]
        if self.left_out:
            why = "the text of their first token is none of this model's tokens, or more than one"
            rows.append(f"{self.left_out} of {self.asked} answers were left out: {why}")
        return [
            f"mean difference of {self.tokens} log-probabilities, if the engine's open prefix were:",
            *rows,
            self.verdict(),
        ]

    def verdict(self) -> str:
        """One sentence: what the engine does, or why that cannot be told."""
        if self._too_few:
            return "too few of its answers can be compared: has the engine this model's tokenizer?"
        if self.mask == "whole":
            return "the engine reads picture and prompt in both directions, as PaliGemma was trained"
        if self.mask is not None:
            read = {"picture": "the picture in both directions, but not the prompt", "causal": "all from left to right"}
            return f"the engine reads {read[self.mask]}: its answers are not those of the model"
        if min(self.distances.values()) <= self.tolerance:
            return "the masks are too close to tell: ask more questions, or have the engine compute in more bits"
        return "no mask explains these numbers: other weights, another prompt around the text, or too few bits"


def ask_engine(
    url: str, image: Image.Image, prompt: str, *, name: str, max_tokens: int = 32, key: str | None = None
) -> tuple[list[str], list[float]]:
    """An engine's greedy answer through `/chat/completions` of OpenAI's interface: its tokens and their log-probabilities.

    Parameters
    ----------
    url : str
        Up to and with `/v1`.
    image : PIL.Image.Image
        Sent as PNG in a data URL.
    name : str
        Of the model, as the engine calls it.
    key : str, optional
        Sent as a bearer token.

    Raises
    ------
    RuntimeError
        If the engine cannot be reached, refuses, or its answer has no log-probabilities.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": prompt}]
    question = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    answer = _engine_json(f"{url}/chat/completions", question | {"temperature": 0, "logprobs": True}, key)
    try:
        listed = answer["choices"][0]["logprobs"]["content"]
        tokens, logprobs = [entry["token"] for entry in listed], [float(entry["logprob"]) for entry in listed]
        if not all(isinstance(token, str) for token in tokens):
            raise TypeError("a token is no text")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RuntimeError(f"{url}: the answer has no logprobs.content: does the engine give them?") from error
    return tokens, logprobs


def engine_model(url: str, key: str | None = None) -> str:
    """The name of the first model that an engine lists."""
    try:
        return _engine_json(f"{url}/models", None, key)["data"][0]["id"]
    except (KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"{url}/models lists no model") from error


def _engine_json(address: str, question: dict | None, key: str | None) -> dict:
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    body = None if question is None else json.dumps(question).encode()
    try:
        request = urllib.request.Request(address, body, headers)
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{address} answered {error.code}: {_beginning(error)}") from error
    except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
        raise RuntimeError(
            f"{address} does not answer as it should ({_one_sentence(error):.200}): is the engine running there?"
        ) from error


def _beginning(reply: urllib.error.HTTPError) -> str:
    try:
        return reply.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return "a body that breaks off"


def compare_engine(
    url: str,
    model: PaliGemma,
    questions: Sequence[tuple[Image.Image, str]],
    *,
    name: str | None = None,
    key: str | None = None,
    tolerance: float = 0.1,
) -> EngineReport:
    """Find out which prefix mask an engine uses, by its log-probabilities.

    Parameters
    ----------
    url : str
        Of an OpenAI-compatible interface, such as http://localhost:8000/v1.
    model : PaliGemma
        The same weights, with their processor.
    questions : sequence of (picture, prompt)
    name : str, optional
        The first model that the engine lists.
    key : str, optional
    tolerance : float
        Nats, of the mean difference: 0.1 allows for 16 bits; in float32 both agree to a thousandth.

    Raises
    ------
    ValueError
        If there is no question, or no token of the answers can be compared.
    RuntimeError
        As `ask_engine`.

    Notes
    -----
    Engines name tokens by their text, and a letter may have a piece of its own and one as a byte. An answer that no mask
    explains is read up to the first such letter. If that is its first token, it is left out, and the report says so.
    """
    url = url.rstrip("/")
    name = engine_model(url, key) if name is None else name
    differences: dict[str, list[float]] = {mask: [] for mask in PREFIX_MASKS}
    left_out = 0
    for picture, prompt in questions:
        image = load_image(picture)
        texts, theirs = ask_engine(url, image, prompt, name=name, key=key)
        tokens = _tokens_of(model, texts)
        count = 0  # how many of them are compared
        if tokens:
            found = {mask: _apart(answer_logprobs(model, image, prompt, tokens, mask), theirs) for mask in PREFIX_MASKS}
            explained = min(map(sum, found.values())) <= tolerance * len(tokens)
            unsure = (place for place, text in enumerate(texts[: len(tokens)]) if len(text.encode()) == 1)
            count = len(tokens) if explained else next(unsure, len(tokens))
            for mask, values in found.items():
                differences[mask] += values[:count]
        left_out += count == 0
    compared = len(differences["whole"])
    if compared == 0:
        raise ValueError(f"{url}: no token of its answers can be found among this model's: is it the same model?")
    distances = {mask: sum(values) / compared for mask, values in differences.items()}
    return EngineReport(distances, compared, tolerance, len(questions), left_out)


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(ours, theirs)]


def _tokens_of(model: PaliGemma, texts: Sequence[str]) -> list[int]:
    """Ids of tokens that came as text, up to the first that is no piece, only a part of a letter, or a picture's place."""
    tokens = []
    for text in texts:
        try:
            token = model.processor.tokenizer.token_id(text.replace(" ", "\u2581"))
        except ValueError:
            break
        if token == model.config.image_token_id:
            break
        tokens.append(token)
    return tokens
