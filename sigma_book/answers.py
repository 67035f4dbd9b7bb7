"""A whole data set.

How does one ask two hundred thousand questions on a machine that may stop at any moment?

Tangled from chapters/20b_answers.py: edit there, then run python -m sigma_book.tangle.
"""

import base64
import heapq
import html
import io
import itertools
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sigma_book.data import Example, has_boxes, picture_of
from sigma_book.evaluation import (
    AP_KEYS,
    PictureBoxes,
    Words,
    average_precision,
    bleu,
    cider,
    count_scores,
    ngram_frequencies,
    ptb_tokens,
    read_count,
    rouge_l,
    vqa_accuracy,
)
from sigma_book.locate import Detection, compare_boxes, draw_boxes, parse
from sigma_book.processor import file_beside, load_image, to_disk
from sigma_book.world import COLOURS, SHAPES, Question, Scene, ask, caption, draw_scene, make_scene

__all__ = [
    "EVALUATION_TASKS",
    "AnswerFile",
    "answer_examples",
    "answer_from",
    "answer_speed",
    "official_results",
    "peak_megabytes",
    "read_official",
    "score_answers",
    "score_table",
    "true_count",
    "worst_page",
    "write_official",
    "write_report",
    "write_world_files",
]


class AnswerFile:
    """The answers of a run, a JSON object in each line, in the order of the examples. Iterating reads line by line.

    Parameters
    ----------
    path : path
        It need not exist.
    most : int, optional
        Read only records of examples below this number.
    """

    def __init__(self, path: str | Path, most: int | None = None):
        self.path, self.most = Path(path), most

    def __iter__(self) -> Iterator[dict]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # torn: its process died, or is about to write the rest
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or type(record.get("index")) is not int:
                        raise ValueError("expected an answer with the number of its example as index")
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{self.path}, line {number} is broken ({error}): remove the file and begin again"
                    ) from error
                if self.most is not None and record["index"] >= self.most:
                    return
                yield record

    def next_index(self) -> int:
        """The number of the first example that has no answer yet.

        Raises
        ------
        ValueError
            If a whole line is broken, or the numbers do not rise: then the file was edited.
        """
        following = 0
        for number, record in enumerate(AnswerFile(self.path), start=1):
            if record["index"] < following:
                raise ValueError(
                    f"{self.path}, line {number}: index is {record['index']}, expected {following} or more: "
                    "the file was edited; give a new folder"
                )
            following = record["index"] + 1
        return following

    @contextmanager
    def growing(self) -> Iterator[Callable[[dict], None]]:
        """Hold the file, take off a torn last line, and give a function that appends a record.

        Raises
        ------
        RuntimeError
            If another process holds it; from the function, if the disk is full.
        """
        with self.path.open("ab", buffering=0) as file:
            _hold_alone(file)
            with self.path.open("rb+") as whole:
                whole.truncate(sum(len(line) for line in whole if line.endswith(b"\n")))
            yield lambda record: _append_line(file, json.dumps(record, ensure_ascii=False))


EVALUATION_TASKS = ("caption", "vqa", "count", "detect")
_KEPT_FACTS = ("image_id", "question_id", "question_type", "answer_type", "category_id", "boxes", "labels", "crowds")


def true_count(example: Example) -> int | None:
    """The whole number that an example asks for; None where it asks for something else.

    Of VQAv2 only questions whose type says "how many" ask for a count: other numbers stand on shirts and clocks.
    """
    if "how many" not in str(example.facts.get("question_type", "how many")):
        return None
    return read_count(example.suffix)


def answer_examples(
    task: str,
    examples: Sequence[Example],
    answer: Callable[[list[Example]], list[str]],
    path: str | Path,
    *,
    batch_size: int = 16,
    most: int | None = None,
) -> AnswerFile:
    """Ask all examples that have no answer in a file yet, and write each answer as it comes.

    Parameters
    ----------
    task : str
        One of `EVALUATION_TASKS`; for `count`, examples that ask for no number are left out.
    examples : sequence of Example
        Read one by one, in order.
    answer : callable
        Takes a list of examples, gives a text for each.
    path : path
        A JSONL file; what stands in it is kept, but for a torn last line.
    batch_size : int
        How many are asked at once.
    most : int, optional
        Ask the first so many examples only.

    Returns
    -------
    AnswerFile
        All answers, those of earlier runs too.

    Raises
    ------
    ValueError
        If the task is unknown; if the file was edited; if an example cannot be read or asked, or has nothing to compare
        with: the sentence names it, and the answers before it stand.
    FileNotFoundError
        If a picture is missing.
    RuntimeError
        If the disk is full, or another process is at work on the file.
    """
    if task not in EVALUATION_TASKS:
        raise ValueError(f"task is {task!r}: expected one of {', '.join(EVALUATION_TASKS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    end = len(examples) if most is None else min(most, len(examples))
    answers = AnswerFile(path, end)
    with answers.growing() as append:
        start = min(answers.next_index(), end)
        _expect_all(task, examples, answers, start)
        numbered = ((index, examples[index]) for index in range(start, end))
        asked = (pair for pair in numbered if task != "count" or true_count(pair[1]) is not None)
        with tqdm(total=end, initial=start, desc=task, unit="", disable=None) as bar:
            for rows in iter(lambda: list(itertools.islice(asked, batch_size)), []):
                for record in _ask_rows(task, rows, answer):
                    append(record)
                with _disk_errors(path):
                    to_disk(answers.path)  # once a batch: written lines may still wait in the machine's memory
                bar.update(rows[-1][0] + 1 - bar.n)
            bar.update(end - bar.n)
    return answers


_KEYS = {"where", "prompt", "answer", "answers", "suffix", "seconds", "rows", "megabytes"}


def _expect_all(task: str, examples: Sequence[Example], answers: AnswerFile, start: int) -> None:
    """No example before `start` may lack its answer: the scores would cover fewer than they seem to."""
    following, wanted = 0, _KEYS | ({"boxes", "labels", "size"} if task == "detect" else set())
    for number, record in enumerate(itertools.chain(answers, [None]), start=1):
        if record is not None and (missing := wanted - record.keys()):
            raise ValueError(
                f"{answers.path}, line {number} has no {', '.join(sorted(missing))}: the file was edited; give a new folder"
            )
        if record is not None and not isinstance(record["answer"], str):
            raise ValueError(
                f"{answers.path}, line {number}: answer is {record['answer']!r:.60}, expected a text: the file was edited; "
                "give a new folder"
            )
        index = start if record is None else record["index"]
        for lost in range(following, index):
            if task != "count" or true_count(examples[lost]) is not None:
                raise ValueError(
                    f"{answers.path}: the answer with index {lost} is missing before line {number}: the file was edited; "
                    "give a new folder"
                )
        following = index + 1


def _hold_alone(file: io.FileIO) -> None:
    """Two processes must not write into one file; the hold ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"{file.name} is in use by another process: wait for it, or give a new folder") from error
    except OSError:  # a file system without locks: `held_alone` has said so
        pass


def _append_line(file: io.FileIO, line: str) -> None:
    left = memoryview(line.encode("utf-8", "backslashreplace") + b"\n")
    with _disk_errors(file.name):
        while left:
            left = left[file.write(left) :]


@contextmanager
def _disk_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{path}: {error.strerror}: make room, then give the same command again; it goes on behind the last whole line"
        ) from error


def _ask_rows(task: str, rows: list[tuple[int, Example]], answer: Callable) -> list[dict]:
    for _, example in rows:
        if not any(text.strip() for text in example.answers):
            raise ValueError(f"{example.where}: there is no true answer to compare with")
        if task == "detect" and not has_boxes(example):
            boxes, remarks = parse(example.suffix, 1, 1)
            if remarks and 4 * len(boxes) < example.suffix.count("<loc"):  # other remarks cost no box
                raise ValueError(f"{example.where}: the true answer cannot be read: {remarks[0]}")
    begun = time.perf_counter()
    try:
        asked = [example for _, example in rows]
        if task == "detect":  # where a picture and its boxes do not fit, there is nothing to compare with
            asked = [replace(one, image=picture_of(one)) if has_boxes(one) else one for one in asked]
        texts = answer(asked)
    except (ValueError, OSError) as error:
        raise _blamed([example for _, example in rows], error) from error
    spent = {"seconds": time.perf_counter() - begun, "rows": len(rows), "megabytes": peak_megabytes()}
    return [_record(task, index, example, text) | spent for (index, example), text in zip(rows, texts, strict=True)]


def _blamed(examples: list[Example], error: Exception) -> Exception:
    """The error of a batch, with the place of the example whose picture cannot be read, or of all of them."""
    where = f"{examples[0].where} to {examples[-1].where}" if len(examples) > 1 else examples[0].where
    for example in examples:
        try:
            picture_of(example)
        except (ValueError, OSError) as broken:
            where, error = example.where, broken
            break
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(f"{where}: {error}")


def _record(task: str, index: int, example: Example, text: str) -> dict:
    record = {"index": index, "where": example.where, "prompt": example.prefix, "answer": text}
    record |= {"answers": list(example.answers), "suffix": example.suffix}
    record |= {key: example.facts[key] for key in _KEPT_FACTS if example.facts.get(key) is not None}
    if isinstance(example.image, str | Path):
        record["image"] = str(Path(example.image).absolute())
    if task == "detect":
        if has_boxes(example):
            size = [example.facts["height"], example.facts["width"]]
        else:
            picture = load_image(example.image)
            size = [picture.height, picture.width]
            detections, _ = parse(example.suffix, *size)
            record |= {"boxes": [box.box for box in detections], "labels": [box.label for box in detections]}
            record["crowds"] = []  # of its own, if it has any, nothing is known
        record["size"] = size
    return record


def peak_megabytes() -> float | None:
    """Most memory that this process has held at once: on the GPU if it used one, else of the machine; None if unknown."""
    torch = sys.modules.get("torch")
    cards = range(torch.cuda.device_count()) if torch is not None else ()
    if most := max(map(torch.cuda.max_memory_allocated, cards), default=0):
        return most / 1e6
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None  # some sandboxes leave it out
    return int(found[1]) * 1024 / 1e6 if found else None


class _Worst:
    """Keeps the few records with the largest badness; of equal ones, the first."""

    def __init__(self, size: int):
        self.size, self._heap = size, []

    def push(self, badness: tuple[float, ...], record: dict, note: str) -> None:
        entry = (badness, -record["index"], note, record)
        (heapq.heappush if len(self._heap) < self.size else heapq.heappushpop)(self._heap, entry)

    def rows(self) -> list[tuple[str, dict]]:
        return [(note, record) for *_, note, record in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def score_answers(task: str, records: Iterable[dict], worst: int = 24) -> tuple[dict, list[tuple[str, dict]]]:
    """Scores of a run, and its worst cases.

    Parameters
    ----------
    task : str
        One of `EVALUATION_TASKS`.
    records : iterable of dict
        An `AnswerFile`; anything that can be read twice.
    worst : int
        How many cases to give.

    Returns
    -------
    tuple
        The scores, shares from 0 to 1 (CIDEr to 10), and a list of (what is wrong, record).

    Raises
    ------
    ValueError
        If there is no record.
    """
    if next(iter(records), None) is None:
        raise ValueError(f"there is no answer to score for {task}")
    cases = _Worst(worst)
    score = {"caption": _score_captions, "vqa": _score_vqa, "count": _score_counts, "detect": _score_boxes}[task]
    return score(records, cases), cases.rows()


def _score_captions(records: Iterable[dict], cases: _Worst) -> dict:
    def pairs() -> Iterator[tuple[dict, Words, list[Words]]]:
        for record in records:
            yield record, ptb_tokens(record["answer"]), [ptb_tokens(text) for text in record["answers"]]

    frequencies = ngram_frequencies(references for _, _, references in pairs())
    totals: Counter = Counter()
    for record, words, references in pairs():
        score = cider(words, references, frequencies)
        exact = record["answer"].strip() in [text.strip() for text in record["answers"]]
        totals.update(asked=1, CIDEr=score, rouge=rouge_l(words, references), exact=exact)
        cases.push((-score,), record, f"CIDEr {score:.2f}")
    values = bleu((words, references) for _, words, references in pairs())
    means = {name: totals[key] / totals["asked"] for name, key in (("ROUGE-L", "rouge"), ("CIDEr", "CIDEr"))}
    scores = {"asked": totals["asked"]} | {f"BLEU-{n}": value for n, value in enumerate(values, start=1)} | means
    return scores | {"exact": totals["exact"] / totals["asked"]}


def _score_vqa(records: Iterable[dict], cases: _Worst) -> dict:
    sums: dict[str, list[float]] = {}
    for record in records:
        score = vqa_accuracy(record["answer"], record["answers"], official="question_id" in record)
        for name in ("overall", record.get("answer_type")):
            if name is not None:
                total = sums.setdefault(str(name), [0, 0.0])
                total[0], total[1] = total[0] + 1, total[1] + score
        agreed = max(Counter(record["answers"]).values()) / len(record["answers"])
        if score < 1:
            cases.push((1 - score, agreed), record, f"accuracy {score:.2f}")
    order = ["overall", "yes/no", "number", "other"]
    names = [name for name in order if name in sums] + sorted(set(sums).difference(order))
    by_type = {name: {"asked": sums[name][0], "accuracy": sums[name][1] / sums[name][0]} for name in names}
    return by_type.pop("overall") | {"by_type": by_type}


def _score_counts(records: Iterable[dict], cases: _Worst) -> dict:
    def pairs() -> Iterator[tuple[int | None, int]]:
        for record in records:
            said, true = read_count(record["answer"]), read_count(record["suffix"])
            if said != true:
                apart = math.inf if said is None else abs(said - true)
                cases.push((apart,), record, "no number" if said is None else f"off by {apart}")
            yield said, true

    return count_scores(pairs())


def _score_boxes(records: Iterable[dict], cases: _Worst) -> dict:
    totals: Counter = Counter()

    def pictures() -> Iterator[PictureBoxes]:
        for _, rows in itertools.groupby(records, key=lambda record: record.get("image_id", record["index"])):
            truth, found, crowds = [], [], []  # the labels of one picture stand one after the other
            for record in rows:
                here, seen, remarks = _boxes_of(record)
                truth, found = truth + here, found + seen
                crowds = record.get("crowds", [])  # those of the whole picture, each time
                totals.update(asked=1, things=len(here), unread=bool(remarks))
                good, overlap = (
                    compare_boxes([box.box for box in seen], [box.box for box in here]) if here else (not seen, 0.0)
                )
                good = good and {box.label for box in seen} <= {box.label for box in here}
                totals.update(right=good, overlap=overlap * len(here))
                if not good:
                    cases.push((1 - overlap, abs(len(seen) - len(here))), record, f"mean IoU {overlap:.2f}")
            truth += [Detection(crowd["label"], tuple(crowd["box"])) for crowd in crowds]
            yield PictureBoxes(truth, found, crowd=[False] * (len(truth) - len(crowds)) + [True] * len(crowds))

    scores = average_precision(pictures())
    fit = {"asked": totals["asked"], "all_found": totals["right"] / totals["asked"]}
    fit |= {"mean_iou": totals["overlap"] / max(1, totals["things"]), "not_well_formed": totals["unread"]}
    return fit | scores


def _boxes_of(record: dict) -> tuple[list[Detection], list[Detection], list[str]]:
    """True boxes, boxes in the answer, and what could not be read."""
    truth = [Detection(label, tuple(box)) for label, box in zip(record["labels"], record["boxes"], strict=True)]
    found, remarks = parse(record["answer"], *record["size"])
    return truth, found, remarks


def answer_speed(records: Iterable[dict]) -> dict:
    """Seconds to an answer, from the opening of the picture to the text, answers in a second, and most memory in use.

    An answer takes as long as its batch; the throughput shares a batch among its rows.
    """
    keys = ("seconds", "rows", "megabytes")
    rows = np.fromiter((record[key] or 0 for record in records for key in keys), float).reshape(-1, len(keys))
    seconds, together, megabytes = rows.T
    return {
        "latency_mean": float(seconds.mean()),
        "latency_median": float(np.median(seconds)),
        "latency_p95": float(np.percentile(seconds, 95)),
        "answers_per_second": len(seconds) / max(1e-9, float((seconds / together).sum())),
        "peak_megabytes": float(megabytes.max()),
    }


def score_table(task: str, scores: dict) -> str:
    """Scores as lines of text in columns."""
    if task == "caption":
        rows = [("asked", f"{scores['asked']:,}")]
        rows += [(name, f"{scores[name]:.3f}") for name in scores if name.startswith(("BLEU", "ROUGE", "CIDEr"))]
        rows += [("exact", f"{scores['exact']:.1%}")]
    elif task == "vqa":
        parts = [("all", scores), *scores["by_type"].items()]
        rows = [("", "asked", "accuracy")]
        rows += [(name, f"{part['asked']:,}", f"{part['accuracy']:.2%}") for name, part in parts]
    elif task == "count":
        parts = [("all", scores), *scores["by_truth"].items()]
        rows = [("true number", "asked", "exact", "within one", "mean error", "no number")]
        for name, part in parts:
            error = "" if part["mean_error"] is None else f"{part['mean_error']:.2f}"
            shares = [f"{part[key]:.1%}" for key in ("exact", "within_one")]
            rows.append((str(name), f"{part['asked']:,}", *shares, error, f"{part['no_number']:,}"))
    else:
        rows = [("asked", f"{scores['asked']:,}"), ("all found, none too many", f"{scores['all_found']:.1%}")]
        rows += [("mean IoU", f"{scores['mean_iou']:.3f}"), ("not well formed", f"{scores['not_well_formed']:,}")]
        rows += [(key, "none" if scores[key] is None else f"{scores[key]:.3f}") for key in AP_KEYS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    speed = scores.get("speed", {})
    if "answers_per_second" in speed:
        times = ", ".join(f"{name} {speed[f'latency_{name}']:.3f}" for name in ("mean", "median", "p95"))
        lines += [f"seconds to an answer: {times}; {speed['answers_per_second']:.1f} answers a second"]
    if speed.get("peak_megabytes"):
        lines += [f"peak memory: {speed['peak_megabytes']:,.0f} MB"]
    return "\n".join(line.rstrip() for line in lines)


def worst_page(task: str, cases: Sequence[tuple[str, dict]], title: str) -> str:
    """An HTML page of the worst cases, with their pictures in it; boxes are drawn, the true ones on a second picture.

    Parameters
    ----------
    task : str
    cases : sequence of (str, dict)
        From `score_answers`.
    title : str
    """
    figures = "\n".join(_worst_case(task, note, record) for note, record in cases)
    said = f"{len(cases)} worst answers" if cases else "No answer was wrong."
    return _PAGE.format(title=html.escape(title), said=said, figures=figures)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2rem; color: #222; background: #fff }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.5rem }}
figure {{ margin: 0; border: 1px solid #bbb; padding: .8rem }}
img {{ height: 8.5rem; max-width: 100%; object-fit: contain; margin-right: .4rem }}
dl {{ margin: .5rem 0 0; display: grid; grid-template-columns: max-content 1fr; gap: .2rem .7rem; font-size: .9rem }}
dt {{ color: #555 }} dd {{ margin: 0; overflow-wrap: anywhere }}
</style></head>
<body><h1>{title}</h1><p>{said}</p><main>
{figures}
</main></body></html>
"""


def _worst_case(task: str, note: str, record: dict) -> str:
    common = Counter(record["answers"]).most_common(5)
    truth = "; ".join(f"{text} ({times} times)" if times > 1 else text for text, times in common)
    pictures = []
    try:
        picture = load_image(record["image"])
        if task == "detect":
            here, seen, _ = _boxes_of(record)
            pictures = [("the answer", draw_boxes(_enlarged(picture), _moved(seen, picture)))]
            pictures += [("the truth", draw_boxes(_enlarged(picture), _moved(here, picture)))]
        else:
            pictures = [("the picture", picture)]
    except (KeyError, ValueError, OSError):
        pass  # drawn in memory, or gone since: the words stand
    images = "".join(f'<img alt="{alt}" src="{_as_url(shown)}">' for alt, shown in pictures)
    words = [("asked", record["prompt"]), ("said", record["answer"] or "(nothing)"), ("true", truth)]
    if "labels" in record and task == "detect":
        found = Counter(box.label or "(no label)" for box in _boxes_of(record)[1])
        words[1] = (
            "said",
            ", ".join(f"{times} {label}" for label, times in found.items()) or record["answer"] or "(nothing)",
        )
        words[2] = ("true", ", ".join(f"{times} {label}" for label, times in Counter(record["labels"]).items()))
    words += [("score", note), ("from", record["where"])]
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in words)
    return f"<figure>{images}<dl>{rows}</dl></figure>"


def _enlarged(picture: Image.Image) -> Image.Image:
    """At least 320 pixels on the longer side, so that labels can be read."""
    grow = max(1, round(320 / max(picture.size)))
    return picture.resize((picture.width * grow, picture.height * grow))


def _moved(detections: Sequence[Detection], picture: Image.Image) -> list[Detection]:
    grow = max(1, round(320 / max(picture.size)))
    return [Detection(box.label, tuple(edge * grow for edge in box.box)) for box in detections]


def _as_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((480, 480))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(task: str, records: Iterable[dict], out: Path, title: str, speed: dict) -> dict:
    """Score a run and write `scores.json` and `worst.html` into its folder; `speed` joins the scores, which are returned."""
    scores, cases = score_answers(task, records)
    scores |= {"speed": speed}
    content = f"{json.dumps({'task': task} | scores, indent=2, ensure_ascii=False)}\n"
    for name, text in (("scores.json", content), ("worst.html", worst_page(task, cases, title))):
        with file_beside(out / name) as fresh:
            fresh.write_text(text, encoding="utf-8", errors="backslashreplace")
    return scores


_OFFICIAL = {"caption": ("image_id", "caption"), "vqa": ("question_id", "answer"), "count": ("question_id", "answer")}


def official_results(task: str, records: Iterable[dict]) -> Iterator[dict]:
    """Answers in the form that COCO's and VQA's evaluation servers take; boxes get the score 1.

    Boxes under a label that no category of the data has are left out. `records` is read twice.

    Raises
    ------
    ValueError
        If the data has no ids: it was not made from official files.
    """
    categories = {}
    for record in records:
        for key in ("image_id", "category_id") if task == "detect" else _OFFICIAL[task][:1]:
            if key not in record:
                raise ValueError(f"{record['where']} has no {key}: the official form needs data in an official form")
        if task == "detect":
            categories |= dict.fromkeys(record["labels"], record["category_id"])
    for record in records:
        if task != "detect":
            key, name = _OFFICIAL[task]
            yield {key: record[key], name: record["answer"]}
            continue
        for box in _boxes_of(record)[1]:
            if box.label in categories:
                top, left, bottom, right = box.box
                place = {"image_id": record["image_id"], "category_id": categories[box.label]}
                yield place | {"bbox": [left, top, right - left, bottom - top], "score": 1.0}


def write_official(task: str, records: Iterable[dict], path: Path) -> None:
    """Write `official_results` as one JSON array, line by line."""
    entries = (json.dumps(entry) for entry in official_results(task, records))
    with file_beside(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        file.write("[")
        file.writelines(f",\n{entry}" if number else entry for number, entry in enumerate(entries))
        file.write("]\n")


def read_official(
    task: str, path: str | Path, examples: Sequence[Example], most: int | None = None
) -> dict[object, str]:
    """The answers of a results file, by the id of the picture or question; see `answer_from`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not a JSON array of answers, has an id twice or one that no example has, or lacks one.
    """
    path = Path(path)
    if task not in _OFFICIAL:
        raise ValueError(f"a file of answers can be scored for {', '.join(_OFFICIAL)}, not for {task}")
    key, name = _OFFICIAL[task]
    form = f'expected a list of {{"{key}": ..., "{name}": ...}}'
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path} (answers)")
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {form}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}: {form}")
    said: dict[object, str] = {}
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), int | str) or name not in entry:
            raise ValueError(f"{path}, entry {number} is {str(entry)[:60]}: {form}")
        if not isinstance(entry[name], str):
            raise ValueError(f"{path}, entry {number}: {name} is {str(entry[name])[:60]}, it must be a text, in quotes")
        if entry[key] in said:
            raise ValueError(f"{path}, entry {number}: {key} {entry[key]} stands twice, keep one answer for each")
        said[entry[key]] = entry[name]
    _compare_ids(task, path, said, examples, len(examples) if most is None else most)
    return said


def _compare_ids(task: str, path: Path, said: dict, examples: Sequence[Example], most: int) -> None:
    key, known, missing = _OFFICIAL[task][0], set(), []
    for index in range(len(examples)):
        example = examples[index]
        if key not in example.facts:
            raise ValueError(f"{example.where} has no {key}, by which answers are found: give data in an official form")
        known.add(example.facts[key])
        asked = index < most and (task != "count" or true_count(example) is not None)
        if asked and example.facts[key] not in said:
            missing.append(example.facts[key])
    if missing and str(missing[0]) in map(str, said):
        theirs, ours = ("texts", "numbers") if isinstance(missing[0], int) else ("numbers", "texts")
        raise ValueError(f"{path}: its ids are {theirs}, the data's are {ours}: write them as the data has them")
    if missing:
        raise ValueError(f"{path} has no answer for {len(missing)} of the examples, the first is {key} {missing[0]}")
    if unknown := [name for name in said if name not in known]:
        raise ValueError(
            f"{path} answers {len(unknown)} that the data does not ask for, the first is {key} {unknown[0]}"
        )


def answer_from(task: str, said: dict[object, str]) -> Callable[[list[Example]], list[str]]:
    """A function for `answer_examples` that looks answers up by their id, and opens no picture."""
    key = _OFFICIAL[task][0]
    return lambda examples: [said[example.facts[key]] for example in examples]


def write_world_files(folder: str | Path, scenes: int, seed: int = 94_000_000) -> dict[str, Path]:
    """Drawn scenes in the layouts of COCO captions, COCO instances and VQAv2, with JPEG pictures.

    Parameters
    ----------
    folder : path
        Gets `val2014/` with the pictures and `annotations/` with four JSON files, named as the official ones.
    scenes : int
    seed : int
        Of the first scene.

    Returns
    -------
    dict
        The files: `captions`, `instances`, `questions`, `annotations`.
    """
    folder, rng = Path(folder), random.Random(seed)
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    kinds = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    images, captions, boxes, questions, people = [], [], [], [], []
    for image_id in range(1, scenes + 1):
        scene = make_scene(seed + image_id - 1)
        name = f"COCO_val2014_{image_id:012d}.jpg"
        draw_scene(scene).save(folder / "val2014" / name, quality=95, subsampling=0)
        images.append({"id": image_id, "file_name": name, "height": scene.size, "width": scene.size})
        for text in _five_captions(scene):
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": text})
        for thing in scene.things:
            top, left, bottom, right = thing.box
            row = {"id": len(boxes) + 1, "image_id": image_id, "category_id": kinds.index(thing.kind) + 1, "iscrowd": 0}
            boxes.append(
                row | {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            )
        for task in ("colour", "count", "yes_no", "left_of"):
            question = ask(scene, task, rng)
            if question is not None:
                ids = {"question_id": image_id * 10 + len(questions) % 10, "image_id": image_id}
                questions.append(ids | {"question": question.prompt.removeprefix("answer en ")})
                people.append(ids | _ten_people(question, rng))
    contents = {
        "captions": ("captions_val2014", {"images": images, "annotations": captions}),
        "instances": (
            "instances_val2014",
            {
                "images": images,
                "annotations": boxes,
                "categories": [{"id": number, "name": kind} for number, kind in enumerate(kinds, start=1)],
            },
        ),
        "questions": (
            "v2_OpenEnded_mscoco_val2014_questions",
            {"task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "questions": questions},
        ),
        "annotations": (
            "v2_mscoco_val2014_annotations",
            {"data_type": "mscoco", "data_subtype": "val2014", "annotations": people},
        ),
    }
    files = {}
    for key, (name, content) in contents.items():
        files[key] = folder / "annotations" / f"{name}.json"
        files[key].write_text(json.dumps({"info": {}, "licenses": []} | content))
    return files


def _five_captions(scene: Scene) -> list[str]:
    text = caption(scene)
    phrases = re.split(r", | and ", text)
    turned = " and ".join(reversed(phrases)) if len(phrases) < 3 else ", ".join(reversed(phrases))
    return [text, turned, f"a drawing of {text}", f"I see {text}.", f"{text} on a light ground"]


def _ten_people(question: Question, rng: random.Random) -> dict:
    """Ten answers, of which the last few may be wrong, in the form of VQAv2."""
    types = {"colour": ("what colour is the", "other"), "count": ("how many", "number")}
    question_type, answer_type = types.get(question.task, ("is the", "yes/no"))
    other = {"number": str(rng.randint(0, 5)), "yes/no": rng.choice(("yes", "no"))}.get(
        answer_type, rng.choice(list(COLOURS))
    )
    wrong = rng.choice((0, 0, 0, 1, 2, 3))
    said = [question.answer] * (10 - wrong) + [other] * wrong
    answers = [
        {"answer_id": number, "answer": text, "answer_confidence": "yes"} for number, text in enumerate(said, start=1)
    ]
    types = {"question_type": question_type, "answer_type": answer_type}
    return types | {"multiple_choice_answer": question.answer, "answers": answers}
