"""How good is it: evaluation.

How can a number say whether an answer is good, when there are many good answers?

Tangled from chapters/20_evaluation.py: edit there, then run python -m sigma_book.tangle.
"""

import html
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sigma_book.locate import Box, Detection, iou

__all__ = [
    "AP_KEYS",
    "IOU_THRESHOLDS",
    "Frequencies",
    "PictureBoxes",
    "Words",
    "average_precision",
    "bleu",
    "cider",
    "count_scores",
    "mean_mask_iou",
    "ngram_frequencies",
    "ptb_tokens",
    "read_count",
    "rouge_l",
    "vqa_accuracy",
    "vqa_plain",
]

_ABBREVIATIONS = (  # that keep their period; found by asking the Java program about each
    "adj|adm|adv|asst|bart|bldg|brig|bros|capt|cmdr|col|comdr|con|cpl|dr|drs|ens|gen|gov|hon|hosp|insp|lt|mm"
    "|mr|mrs|ms|mlle|mme|maj|messrs|pres|prof|rep|reps|rev|sen|sens|sfc|sgt|sr|jr|st|ste|supt|mt|mts|dept|univ"
    "|assn|ave|blvd|rd|inc|co|cos|corp|ltd|vs|etc|al|est|cf|ft|esq|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct"
    "|nov|dec|mon|tue|tues|wed|thu|thurs|fri"
)

_MARKS = "".join(letter for letter in map(chr, range(0x300, 0x10000)) if unicodedata.category(letter)[0] == "M")
_IN_WORDS = rf"(?:[^\W_]+|[{_MARKS}])++"

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
  | [^\W_]*-?o'clock\b | ma'am\b | o'[a-z]{{2,}}
  | (?:[a-z]|qu|lorsqu)'(?!(?:re|ve|ll|il)\b)[^\W\d_]{{2,}} | (?:lors)?qu'il\b  # French
  | [a-z]+(?=n't\b)
  | {_IN_WORDS}(?:[-_/.?!]{_IN_WORDS})*                          # an ordinary word, maybe with hyphens
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
    more than three words with slashes, names of files, and rare abbreviations; the tests say how often. In other languages
    than English it differs on « and », spaces of no width, `m²`, and French words such as `j'ai` and `l'homme-là`.
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


def vqa_accuracy(answer: str, people: Sequence[str], official: bool = True) -> float:
    """The official accuracy of one answer, 0 to 1: min(n/3, 1), averaged over the sets that leave one person out.

    Parameters
    ----------
    answer : str
        What the model said.
    people : sequence of str
        The true answers, ten in VQAv2. A single one cannot be left out: then both sides are put into plain form, and
        equal is 1. With two or three the rule cannot give 1: of three that agree two are left, which is 2/3.
    official : bool
        As the official script does, put answer and people into plain form where people differ, and compare letter by
        letter where they all say the same. Else they are put into plain form in any case.

    Raises
    ------
    ValueError
        If there is no true answer.

    References
    ----------
    Goyal et al. 2017, "Making the V in VQA Matter"; vqaEval.py of GT-Vision-Lab/VQA, commit a013f00, and issue 14 there on
    why.
    """
    _need_references(people)
    if len(people) == 1:
        return float(vqa_plain(answer) == vqa_plain(people[0]))
    said, people = _one_line(answer), [_one_line(person) for person in people]
    if not official or len(set(people)) > 1:
        said, people = vqa_plain(said), [vqa_plain(person) for person in people]
    agree = sum(person == said for person in people)
    others, rest = min(1, (agree - 1) / 3), min(1, agree / 3)  # with one who agrees left out, and with one who does not
    return (agree * others + (len(people) - agree) * rest) / len(people)


def read_count(answer: str) -> int | None:
    """The whole number in an answer, in digits or in a word up to ten; None where there is none, or more than one.

    More than 15 digits in a row are a model that does not stop, and no number.
    """
    words = (word for word in vqa_plain(answer).split() if word.isascii() and word.isdigit())
    numbers = [int(word) for word in words if len(word) <= 15]
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
    means = {key: float(np.mean([row[key] for row in by_label.values()])) if by_label else None for key in AP_KEYS}
    return means | {"by_label": {label: {key: float(row[key]) for key in AP_KEYS} for label, row in by_label.items()}}


AP_KEYS = ("AP50", "AP50-95")


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
