"""How good is it: evaluation.

How can a number say whether an answer is good, when there are many good answers?

Tangled from chapters/20_evaluation.py: edit there, then run python -m sigma_book.tangle.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sigma_book.data import Example
from sigma_book.locate import Box, Detection, compare_boxes, draw_boxes, iou, parse
from sigma_book.processor import file_beside, load_image
from sigma_book.world import COLOURS, SHAPES, Question, Scene, ask, caption, draw_scene, make_scene

__all__ = [
    "EVALUATION_TASKS",
    "IOU_THRESHOLDS",
    "AnswerFile",
    "Frequencies",
    "PictureBoxes",
    "Words",
    "answer_examples",
    "answer_from",
    "answer_speed",
    "average_precision",
    "bleu",
    "cider",
    "count_scores",
    "mean_mask_iou",
    "ngram_frequencies",
    "official_results",
    "peak_megabytes",
    "ptb_tokens",
    "read_count",
    "read_official",
    "rouge_l",
    "score_answers",
    "score_table",
    "true_count",
    "vqa_accuracy",
    "vqa_plain",
    "worst_page",
    "write_official",
    "write_report",
    "write_world_files",
]

_ABBREVIATIONS = (  # that keep their period; found by asking the Java program about each
    "adj|adm|adv|asst|bart|bldg|brig|bros|capt|cmdr|col|comdr|con|cpl|dr|drs|ens|gen|gov|hon|hosp|insp|lt|mm"
    "|mr|mrs|ms|mlle|mme|maj|messrs|pres|prof|rep|reps|rev|sen|sens|sfc|sgt|sr|jr|st|ste|supt|mt|mts|dept|univ"
    "|assn|ave|blvd|rd|inc|co|cos|corp|ltd|vs|etc|al|est|cf|ft|esq|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct"
    "|nov|dec|mon|tue|tues|wed|thu|thurs|fri"
)

_PTB_WORD = re.compile(
    rf"""
    </?[a-z][^<>]*>                                              # a tag
  | (?:https?://|www\.)[^\s"<>|()\[\]]*[^\s"<>|()\[\].,!?;:']    # an address
  | [\w.+-]*\w@[a-z0-9-]+(?:\.[a-z0-9-]+)+ | [@#][a-z_]\w*      # of mail; a name, a hash tag
  | can(?=not\b) | (?:gon|wan)(?=na\b(?!-)) | got(?=ta\b) | (?:lem|gim)(?=me\b)
  | 't(?=is\b|was\b) | d'ye\b | y'(?=all\b)
  | 'n' | '(?:em|cause|til|n)(?!\w) | (?<!\w)'[0-9][0-9]s?(?!\w)  # words that begin with their apostrophe
  | n't\b | '(?:s|m|d|re|ve|ll)\b                                # ends that do
  | (?:[a-z]\.)+[a-z](?:\.(?!\w)|\b) | ph\.d\. | [a-z]\.(?!\w)   # initials
  | (?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*[0-9])
  | [0-9]+:[0-9]+(?=[ap]\.?m\b)                                  # the time, its end is a word of its own
  | [-+]?[0-9]+(?:[.,:/-][0-9]+)*(?:-?[^\W_]+(?:-[^\W_]+)*)? | [.,][0-9]+
  | (?-i:[A-Z]+&[A-Z]+)\b | us\$
  | [^\W_]*-?o'clock\b | ma'am\b | o'[a-z]{{2,}} | [a-z]'[a-z]{{3,}}
  | [a-z]+(?=n't\b)
  | [^\W_]+(?:[-_/.?!][^\W_]+)*                                 # an ordinary word, maybe with hyphens
  | \.\.\. | --{{1,3}}(?!-) | -{{5,}} | [?!]+ | ''|`` | _+ | \*+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_DASH, _LONG_DASH, _SOFT_HYPHEN = "\u2013", "\u2014", "\u00ad"
_PTB_BEFORE = str.maketrans(
    {"’": "'", "‘": "`", "“": '"', "”": '"', _DASH: " -- ", _LONG_DASH: " -- ", "…": "...", _SOFT_HYPHEN: ""}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 "}
)
_PTB_AFTER = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PTB_AFTER |= {"£": "#", "€": "$", "¢": "cents"}
_PTB_DROPPED = {'"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "---", "----", "...", ";"}
_ENTITIES = re.compile("&(?:amp|lt|gt|quot|nbsp);")


def ptb_tokens(text: str) -> list[str]:
    """The words of a caption, nearly as the official COCO code takes them: lower case, punctuation dropped.

    Parameters
    ----------
    text : str
        Line breaks count as spaces.

    Returns
    -------
    list of str

    Notes
    -----
    The official code calls Stanford's PTBTokenizer (Java, CoreNLP 3.4.1). This one differs from it on smileys, chains of
    more than three words with slashes, names of files, and rare abbreviations; the tests say how often.
    """
    text = _ENTITIES.sub(lambda found: html.unescape(found[0]), text).translate(_PTB_BEFORE)
    found = (match[0].lower() for match in _PTB_WORD.finditer(text))
    return [_PTB_AFTER.get(word, word) for word in found if word not in _PTB_DROPPED and ord(word[0]) < 0x10000]


Words = Sequence[str]


def _ngrams(words: Words, most: int = 4) -> Counter:
    """How often each run of 1 to `most` words stands in a sentence."""
    return Counter(tuple(words[i : i + n]) for n in range(1, most + 1) for i in range(len(words) - n + 1))


def bleu(pairs: Iterable[tuple[Words, Sequence[Words]]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus; the length of the nearest reference counts, of two equally near the shorter.

    Parameters
    ----------
    pairs : iterable of (words, references)
        What was said, and one or more true captions, each a list of words. Read once.

    Returns
    -------
    list of float
        Four numbers, 0 to 1.

    Raises
    ------
    ValueError
        If there is no pair, or a pair has no reference.

    References
    ----------
    Papineni et al. 2002, "BLEU". The tiny numbers that keep fractions from 0/0 are those of pycocoevalcap.
    """
    right, total, length, wanted, seen = [0] * 4, [0] * 4, 0, 0, 0
    for words, references in pairs:
        _need_references(references)
        seen += 1
        most: Counter = Counter()
        for reference in references:
            most |= _ngrams(reference)
        for ngram, count in _ngrams(words).items():
            right[len(ngram) - 1] += min(count, most[ngram])
        total = [total[n] + max(0, len(words) - n) for n in range(4)]
        length += len(words)
        wanted += min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    if not seen:
        raise ValueError("there is no caption to score")
    ratio = (length + 1e-15) / (wanted + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    shares = [(right[n] + 1e-15) / (total[n] + 1e-9) for n in range(4)]
    return [penalty * math.prod(shares[:n]) ** (1 / n) for n in (1, 2, 3, 4)]


def _need_references(references: Sequence) -> None:
    if not references:
        raise ValueError("an answer has no reference to compare with: give at least one")


def rouge_l(words: Words, references: Sequence[Words], beta: float = 1.2) -> float:
    """ROUGE-L of one sentence, 0 to 1: the longest common subsequence as precision and recall, the best of each.

    Parameters
    ----------
    words : list of str
    references : list of list of str
        At least one.
    beta : float
        Above 1, recall weighs more.

    Raises
    ------
    ValueError
        If there is no reference.

    References
    ----------
    Lin 2004, "ROUGE", section 3. As in pycocoevalcap, the best precision and the best recall may come from two
    references, and a sentence without words counts as one empty word.
    """
    _need_references(references)
    words = list(words) or [""]
    common = [(_longest_common(words, list(reference) or [""]), len(reference) or 1) for reference in references]
    precision = max(length for length, _ in common) / len(words)
    recall = max(length / size for length, size in common)
    if precision == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    best = [0] * (len(second) + 1)
    for word in first:
        before = best[:]
        for j, other in enumerate(second):
            best[j + 1] = before[j] + 1 if word == other else max(before[j + 1], best[j])
    return best[-1]


@dataclass(frozen=True)
class Frequencies:
    """In the references of how many pictures each n-gram stands (`counts`), and of how many pictures (`pictures`)."""

    counts: Counter
    pictures: int


def ngram_frequencies(references: Iterable[Sequence[Words]]) -> Frequencies:
    """Count n-grams over a corpus: for each picture the list of its references, each a list of words. Read once."""
    counts: Counter = Counter()
    pictures = 0
    for captions in references:
        counts.update({ngram for words in captions for ngram in _ngrams(words)})
        pictures += 1
    return Frequencies(counts, pictures)


def cider(words: Words, references: Sequence[Words], frequencies: Frequencies, sigma: float = 6.0) -> float:
    """CIDEr-D of one sentence, 0 to 10; a corpus has the mean of its sentences.

    Parameters
    ----------
    words : list of str
    references : list of list of str
        At least one.
    frequencies : Frequencies
        Of the references of the whole corpus, or of another one. With a single picture all weights vanish, and the score
        is 0.
    sigma : float
        Of the penalty for another length.

    Raises
    ------
    ValueError
        If there is no reference.

    References
    ----------
    Vedantam et al. 2015, "CIDEr", sections 3 and 7. As in pycocoevalcap, length counts pairs of words, not words.
    """
    _need_references(references)
    vectors, norms = _weighted(words, frequencies)
    score = 0.0
    for reference in references:
        others, other_norms = _weighted(reference, frequencies)
        delta = max(0, len(words) - 1) - max(0, len(reference) - 1)
        for mine, his, norm, other in zip(vectors, others, norms, other_norms):
            product = sum(min(value, his.get(ngram, 0.0)) * his.get(ngram, 0.0) for ngram, value in mine.items())
            lengths = norm * other
            score += (product / lengths if lengths else product) * math.exp(-(delta**2) / (2 * sigma**2))
    return 10 * score / 4 / len(references)


def _weighted(words: Words, frequencies: Frequencies) -> tuple[list[dict], list[float]]:
    """Counts times weights, for n-grams of 1, 2, 3 and 4 words apart, and their lengths as vectors."""
    log_pictures = math.log(frequencies.pictures)
    vectors: list[dict] = [{}, {}, {}, {}]
    for ngram, count in _ngrams(words).items():
        weight = log_pictures - math.log(max(1, frequencies.counts[ngram]))
        vectors[len(ngram) - 1][ngram] = count * weight
    return vectors, [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VQA_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# The table of the official script (vqaEval.py of GT-Vision-Lab/VQA) holds these words with one apostrophe missing in each.
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'll you're you've"""
_CONTRACTED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry that goes the other way


def vqa_plain(answer: str) -> str:
    """An answer in the plain form in which the official VQA script compares: see `vqa_accuracy`."""
    words = (_VQA_NUMBERS.get(word, word) for word in _without_punctuation(_one_line(answer)).lower().split())
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in ("a", "an", "the"))


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(answer: str) -> str:
    plain = answer
    number_with_comma = re.search(r"\d,\d", answer) is not None
    for mark in _VQA_PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        plain = plain.replace(mark, "" if beside_space or number_with_comma else " ")
    return re.sub(r"\.(?!\d)", "", plain, count=32)  # the official script hands a flag where the count belongs: 32


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The official accuracy of one answer, 0 to 1: min(n/3, 1), averaged over the sets that leave one person out.

    Parameters
    ----------
    answer : str
        Put into plain form first.
    people : sequence of str
        The true answers, ten in VQAv2. Where they differ, their punctuation goes. A single one cannot be left out: then
        both sides are put into plain form, and equal is 1.

    Raises
    ------
    ValueError
        If there is no true answer.

    References
    ----------
    Goyal et al. 2017, "Making the V in VQA Matter"; vqaEval.py of GT-Vision-Lab/VQA.
    """
    _need_references(people)
    said = vqa_plain(answer)
    if len(people) == 1:
        return float(said == vqa_plain(people[0]))
    if len(set(people)) > 1:
        people = [_without_punctuation(person) for person in people]
    agree = sum(person == said for person in people)
    others, rest = min(1, (agree - 1) / 3), min(1, agree / 3)  # with one who agrees left out, and with one who does not
    return (agree * others + (len(people) - agree) * rest) / len(people)


def read_count(answer: str) -> int | None:
    """The whole number in an answer, in digits or in a word up to ten; None where there is none, or more than one."""
    numbers = [int(word) for word in vqa_plain(answer).split() if word.isascii() and word.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def count_scores(pairs: Iterable[tuple[int | None, int]]) -> dict:
    """Scores of counting.

    Parameters
    ----------
    pairs : iterable of (said, true)
        `said` is None where the answer held no number: that is wrong, and has no distance. Read once.

    Returns
    -------
    dict
        `asked`, `exact` and `within_one` (shares of all), `mean_error` (over the answers that are numbers, None without
        any), `no_number` (how many), and `by_truth`: the same for each true number.

    Raises
    ------
    ValueError
        If there is no pair.
    """
    distances: dict[int, Counter] = {}  # for each true number, how often an answer was so far away
    for said, true in pairs:
        distances.setdefault(true, Counter())[None if said is None else abs(said - true)] += 1
    if not distances:
        raise ValueError("there is no count to score")
    by_truth = {true: _count_shares(distances[true]) for true in sorted(distances)}
    return _count_shares(sum(distances.values(), Counter())) | {"by_truth": by_truth}


def _count_shares(distances: Counter) -> dict:
    asked, silent = distances.total(), distances[None]
    apart = sum(distance * times for distance, times in distances.items() if distance is not None)
    return {
        "asked": asked,
        "exact": distances[0] / asked,
        "within_one": (distances[0] + distances[1]) / asked,
        "mean_error": apart / (asked - silent) if asked > silent else None,
        "no_number": silent,
    }


@dataclass(frozen=True)
class PictureBoxes:
    """What is in one picture and what was found: named boxes in pixels.

    `scores` has one number for each box found, all 1 when it is empty; `crowd` says for each true box whether it is drawn
    around a crowd, none when it is empty.
    """

    truth: Sequence[Detection]
    found: Sequence[Detection]
    scores: Sequence[float] = ()
    crowd: Sequence[bool] = ()


IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


def average_precision(pictures: Iterable[PictureBoxes]) -> dict:
    """AP of boxes as the COCO evaluation computes it, for boxes of all sizes, at most 100 of a label in a picture.

    Parameters
    ----------
    pictures : iterable of PictureBoxes
        Among boxes of equal score, those of earlier pictures come first. (pycocotools goes through pictures by id.) Read
        once.

    Returns
    -------
    dict
        `AP50`, `AP50-95` (0 to 1), and `by_label` with the two for each label that has a true box. Boxes found under any
        other label do not count. Both are None if there is no true box at all.

    References
    ----------
    Lin et al. 2014, "Microsoft COCO"; `COCOeval` of pycocotools.
    """
    rows: dict[str, list] = {}
    wanted: Counter = Counter()
    for boxes in pictures:
        crowd = list(boxes.crowd) or [False] * len(boxes.truth)
        scores = list(boxes.scores) or [1.0] * len(boxes.found)
        for label in sorted({box.label for box in [*boxes.truth, *boxes.found]}):
            true = [(box.box, group) for box, group in zip(boxes.truth, crowd, strict=True) if box.label == label]
            found = [(score, box.box) for box, score in zip(boxes.found, scores, strict=True) if box.label == label]
            found = sorted(found, key=lambda pair: -pair[0])[:100]
            true.sort(key=lambda pair: pair[1])  # crowds last
            hit, aside = _match_boxes([box for _, box in found], true)
            rows.setdefault(label, []).append((np.array([score for score, _ in found]), hit, aside))
            wanted[label] += sum(not group for _, group in true)
    curves = {label: _precision_at_recall(rows[label], wanted[label]) for label in sorted(rows) if wanted[label]}
    by_label = {label: {"AP50": curve[0].mean(), "AP50-95": curve.mean()} for label, curve in curves.items()}
    means = {key: float(np.mean([row[key] for row in by_label.values()])) if by_label else None for key in _AP_KEYS}
    return means | {"by_label": {label: {key: float(row[key]) for key in _AP_KEYS} for label, row in by_label.items()}}


_AP_KEYS = ("AP50", "AP50-95")


def _match_boxes(found: Sequence[Box], truth: Sequence[tuple[Box, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """For each threshold and each box found, surest first: is it a hit, and is it left aside as part of a crowd?"""
    overlap = [[_share_of(box, true) if crowd else iou(box, true) for true, crowd in truth] for box in found]
    hit, aside = np.zeros((2, len(IOU_THRESHOLDS), len(found)), dtype=bool)
    for level, threshold in enumerate(IOU_THRESHOLDS):
        taken: set[int] = set()
        for row, overlaps in enumerate(overlap):
            best, match = min(threshold, 1 - 1e-10), None
            for column, value in enumerate(overlaps):
                crowd = truth[column][1]
                if match is not None and crowd and not truth[match][1]:
                    break  # a thing goes before a crowd
                if (column not in taken or crowd) and value >= best:
                    best, match = value, column
            if match is not None:
                taken.add(match)
                hit[level, row], aside[level, row] = True, truth[match][1]
    return hit, aside


def _share_of(box: Box, region: Box) -> float:
    """Which share of a box lies in a region."""
    height = max(0.0, min(box[2], region[2]) - max(box[0], region[0]))
    width = max(0.0, min(box[3], region[3]) - max(box[1], region[1]))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return height * width / area if area > 0 else 0.0


def _precision_at_recall(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], wanted: int) -> np.ndarray:
    """Precision for each threshold at 101 levels of recall, (10, 101): the best that is reached there or later."""
    scores, hits, asides = (np.concatenate([row[part] for row in rows], axis=-1) for part in range(3))
    order = np.argsort(-scores, kind="stable")
    hits, asides = hits[:, order], asides[:, order]
    right = np.cumsum(hits & ~asides, axis=1)
    wrong = np.cumsum(~hits & ~asides, axis=1)
    precision = right / np.maximum(right + wrong, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    levels = np.linspace(0, 1, 101)
    curve = np.zeros((len(IOU_THRESHOLDS), len(levels)))
    for level, recall in enumerate(right / wanted):
        places = np.searchsorted(recall, levels, side="left")
        reached = places < len(recall)
        curve[level, reached] = precision[level, places[reached]]
    return curve


def mean_mask_iou(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over examples of the intersection over union of two masks of one shape, 0 to 1.

    Parameters
    ----------
    pairs : iterable of (found, true)
        Boolean arrays (H, W), or numbers of which those above 0 belong to the mask. Two empty masks agree: 1. Read once.

    Raises
    ------
    ValueError
        If there is no pair, or two masks differ in shape.
    """
    overlaps = []
    for found, true in pairs:
        found, true = np.asarray(found) > 0, np.asarray(true) > 0
        if found.shape != true.shape:
            raise ValueError(
                f"masks of shapes {found.shape} and {true.shape} cannot be compared: make them of one size"
            )
        union = np.count_nonzero(found | true)
        overlaps.append(np.count_nonzero(found & true) / union if union else 1.0)
    if not overlaps:
        raise ValueError("there is no mask to score")
    return sum(overlaps) / len(overlaps)


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
                    inside = self.most is None or record["index"] < self.most
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}, line {number} is broken ({error}): remove the file and begin again"
                    ) from error
                if not inside:
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
            if not isinstance(record.get("index"), int) or record["index"] < following:
                raise ValueError(
                    f"{self.path}, line {number}: index is {record.get('index')!r}, expected {following} or more: "
                    "the file was edited; give a new folder"
                )
            following = record["index"] + 1
        return following

    def cut_torn_line(self) -> None:
        """Take off a last line that has no end."""
        with self.path.open("rb+") as file:
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


EVALUATION_TASKS = ("caption", "vqa", "count", "detect")
_KEPT_FACTS = ("image_id", "question_id", "question_type", "answer_type", "category_id", "boxes", "labels")


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
        If the task is unknown; if an example cannot be read or asked, or has nothing to compare with: the sentence names
        it, and the answers before it stand.
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
    with Path(path).open("ab", buffering=0) as file:
        _hold_alone(file)
        answers.cut_torn_line()
        start = min(answers.next_index(), end)
        numbered = ((index, examples[index]) for index in range(start, end))
        asked = (pair for pair in numbered if task != "count" or true_count(pair[1]) is not None)
        with tqdm(total=end, initial=start, desc=task, unit="", disable=None) as bar:
            for rows in iter(lambda: list(itertools.islice(asked, batch_size)), []):
                for record in _ask_rows(task, rows, answer):
                    _append_line(file, json.dumps(record, ensure_ascii=False))
                bar.update(rows[-1][0] + 1 - bar.n)
            bar.update(end - bar.n)
    return answers


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


def _append_line(file: io.FileIO, line: str) -> None:
    left = memoryview(line.encode("utf-8", "backslashreplace") + b"\n")
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise RuntimeError(
            f"{file.name}: {error.strerror}. All answers before this one are on the disk: make room, then give the same "
            "command again"
        ) from error


def _ask_rows(task: str, rows: list[tuple[int, Example]], answer: Callable) -> list[dict]:
    for _, example in rows:
        if not any(text.strip() for text in example.answers):
            raise ValueError(f"{example.where}: there is no true answer to compare with")
    begun = time.perf_counter()
    try:
        texts = answer([example for _, example in rows])
    except (ValueError, OSError) as error:
        raise _blamed([example for _, example in rows], error) from error
    spent = {"seconds": time.perf_counter() - begun, "rows": len(rows), "megabytes": peak_megabytes()}
    return [_record(task, index, example, text) | spent for (index, example), text in zip(rows, texts, strict=True)]


def _blamed(examples: list[Example], error: Exception) -> Exception:
    """The error of a batch, with the place of the example whose picture cannot be read, or of all of them."""
    where = f"{examples[0].where} to {examples[-1].where}" if len(examples) > 1 else examples[0].where
    for example in examples:
        try:
            load_image(example.image)
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
        size = [example.facts.get("height"), example.facts.get("width")]
        if None in size:
            picture = load_image(example.image)
            size = [picture.height, picture.width]
        if "boxes" not in record:
            detections, _ = parse(example.suffix, *size)
            record |= {"boxes": [box.box for box in detections], "labels": [box.label for box in detections]}
        record["size"] = size
    return record


def peak_megabytes() -> float | None:
    """Most memory that this process has held at once: on the GPU if it used one, else of the machine; None if unknown."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e6
    return None


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
        score = vqa_accuracy(record["answer"], record["answers"])
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
            truth, found = [], []  # the labels of one picture stand one after the other
            for record in rows:
                here, seen, remarks = _boxes_of(record)
                truth, found = truth + here, found + seen
                totals.update(asked=1, things=len(here), unread=bool(remarks))
                good, overlap = (
                    compare_boxes([box.box for box in seen], [box.box for box in here]) if here else (not seen, 0.0)
                )
                good = good and {box.label for box in seen} <= {box.label for box in here}
                totals.update(right=good, overlap=overlap * len(here))
                if not good:
                    cases.push((1 - overlap, abs(len(seen) - len(here))), record, f"mean IoU {overlap:.2f}")
            yield PictureBoxes(truth, found)

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
        rows += [(key, "none" if scores[key] is None else f"{scores[key]:.3f}") for key in _AP_KEYS]
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
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get(key), int | str)
            or not isinstance(entry.get(name), str)
        ):
            raise ValueError(f"{path}, entry {number} is {str(entry)[:60]}: {form}")
        if entry[key] in said:
            raise ValueError(f"{path}, entry {number}: {key} {entry[key]} stands twice, keep one answer for each")
        said[entry[key]] = entry[name]
    _compare_ids(path, key, said, examples, len(examples) if most is None else most)
    return said


def _compare_ids(path: Path, key: str, said: dict, examples: Sequence[Example], most: int) -> None:
    known, missing = set(), []
    for index in range(len(examples)):
        example = examples[index]
        if key not in example.facts:
            raise ValueError(f"{example.where} has no {key}, by which answers are found: give data in an official form")
        known.add(example.facts[key])
        if index < most and example.facts[key] not in said:
            missing.append(example.facts[key])
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
