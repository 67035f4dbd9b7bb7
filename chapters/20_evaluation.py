# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How good is it: evaluation
#
# *How can a number say whether an answer is good, when there are many good answers?*
#
# **You build** the scores of captions, answers, counts, boxes and masks. **You need** chapter 14 (boxes). **Exports** the
# module `sigma_book.evaluation`.

# %%
# | export
import html
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sigma_book.locate import Box, Detection, iou

# %%
import random
import textwrap

import matplotlib.pyplot as plt

from sigma_book.style import ANSWER, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import COLOURS, SHAPES, caption, draw_scene, make_scene

use_style()

# %% [markdown]
# ## The picture
#
# One drawn scene, its true caption, and four captions that someone might give. Which is better, and by how much? A
# person sees it at once. A score has only the words.

# %%
scene = make_scene(12)
truth = caption(scene)
words = truth.split()
given = {
    "the truth": truth,
    "another order": " ".join(words[len(words) // 2 :] + words[: len(words) // 2]),
    "one wrong word": truth.replace(scene.things[0].colour, "grey", 1),
    "half of it": " ".join(words[: len(words) // 2]),
    "one word": "shapes",
}
given

# %% [markdown]
# We build the scores one after the other, and fill this picture in when we have them.
#
# ## Words first
#
# All caption scores count words, so we must agree on what a word is. The official code for COCO captions runs a Java
# program, the tokenizer of the Penn Treebank (PTB), and then drops punctuation. The rules that matter for captions:
# lower case; `isn't` is two words, `is` and `n't`; `dog's` is `dog` and `'s`; a hyphen joins; `(` becomes `-lrb-` and
# stays, since the official list of punctuation has it in capitals only.
#
# A long regular expression does nearly the same. Each line is a kind of word; the first that fits is taken. To Python a
# letter is not all that a word is made of: the vowels of Hindi and Thai, and accents that stand behind their letter, are
# *marks*, and `\w` leaves them out.


# %%
# | export
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


# %%
assert ptb_tokens("A dog's toy (red) isn't well-made, is it?") == (
    ["a", "dog", "'s", "toy", "-lrb-", "red", "-rrb-", "is", "n't", "well-made", "is", "it"]
)
assert ptb_tokens("एक बिल्ली, un chat d'été") == ["एक", "बिल्ली", "un", "chat", "d'été"]
ptb_tokens('Two "grey" cats, 3 black/white dogs... and a T-shirt.')

# %% [markdown]
# How near is it? `tests/golden/` keeps what the Java program said about 2,000 captions, 624 lines that try to be
# difficult, and 46 in other languages, and a test compares. On the captions the two agree; of the difficult lines a few
# differ: smileys, lone letters with a period, entities such as `&#39;`.
#
# ## BLEU, by hand
#
# BLEU asks: of the words that the model said, how many stand in a true caption? Then the same for pairs of neighbours,
# for triples and for fours. A word counts at most as often as one true caption has it.


# %%
def ngrams_of(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def precision_naive(said: list[str], references: list[list[str]], n: int) -> tuple[int, int]:
    right = 0
    for ngram in set(ngrams_of(said, n)):
        most = max(ngrams_of(reference, n).count(ngram) for reference in references)
        right += min(ngrams_of(said, n).count(ngram), most)
    return right, len(ngrams_of(said, n))


said = ptb_tokens("a red star and a green ring")
references = [ptb_tokens("a red star and a ring"), ptb_tokens("a blue ring and a red star")]
fractions = {n: precision_naive(said, references, n) for n in (1, 2, 3, 4)}
fractions

# %% [markdown]
# One word of seven is wrong, and it breaks two pairs of six, two triples of five and two fours of four. BLEU-n is the
# geometric mean of the first n fractions.

# %%
shares = [right / total for right, total in fractions.values()]
assert list(fractions.values()) == [(6, 7), (4, 6), (3, 5), (2, 4)]
by_hand = [math.prod(shares[:n]) ** (1 / n) for n in (1, 2, 3, 4)]
[round(value, 3) for value in by_hand]

# %% [markdown]
# A model that says one safe word would be right in all it says. So short answers pay: where all answers together are
# shorter ($c$ words) than the nearest references ($r$ words), the score is multiplied by $e^{1 - r/c}$.
#
# $$ \mathrm{BLEU}_n = \min\left(1, e^{1 - r/c}\right) \left(\prod_{k=1}^{n} \frac{\text{right}_k}{\text{said}_k}\right)^{1/n} $$
#
# The counts are summed over the whole data set before they are divided: BLEU belongs to a corpus, not to a sentence.


# %%
# | export
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


# %%
assert np.allclose(bleu([(said, references)]), by_hand, atol=1e-6)

# %% [markdown]
# ## Four equal values
#
# The description that this book grew from reported the same BLEU four times. Can that be? The four fractions would have
# to be equal: as large a share of pairs right as of words. But a wrong word breaks the pairs and triples around it. So it
# takes answers that are wholly right, or else have not one right word in them, and captions are not like that.
#
# A program, though, can make it so: one that leaves out a fraction when it has nothing to count. Where every answer is
# one word long, there is no pair, no triple and no four. First, what is right to say of such answers.

# %%
one_word = [(["star"], [["star"], ["a", "star"]]), (["ring"], [["circle"]])]
one, two, three, four = bleu(one_word)
assert one == 0.5 or abs(one - 0.5) < 1e-6
assert two < 0.03 > four, "no pair was said, so none was right"
print([f"{value:.2g}" for value in (one, two, three, four)])

# %% [markdown]
# The honest values fall to nearly nothing. Here is such a program: it takes the mean over the fractions that it has.


# %%
def bleu_with_a_bug(said: list[str], references: list[list[str]]) -> list[float]:
    fractions = [precision_naive(said, references, n) for n in (1, 2, 3, 4)]
    shares = [right / total for right, total in fractions if total]  # the ones with nothing to count are left out
    return [math.prod(shares[:n]) ** (1 / len(shares[:n])) for n in (1, 2, 3, 4)]


wrong_report = bleu_with_a_bug(["two"], [["two", "red", "stars"]])
assert len(set(wrong_report)) == 1, "one word, one fraction, four equal values"
wrong_report

# %% [markdown]
# On 2,000 captions with mistakes in them the four values fall, as they must.

# %%
rng = random.Random(0)


def spoiled(text: str) -> list[str]:
    """Some words of a caption replaced, or left out."""
    return [
        rng.choice([*COLOURS, *SHAPES]) if rng.random() < 0.2 else word
        for word in ptb_tokens(text)
        if rng.random() > 0.1
    ]


true_captions = [caption(make_scene(seed)) for seed in range(2000)]
corpus = [(spoiled(text), [ptb_tokens(text)]) for text in true_captions]
falling = bleu(corpus)
assert falling[0] > falling[1] > falling[2] > falling[3]
print([f"{value:.3f}" for value in falling], "always falling")

# %% [markdown]
# ## ROUGE-L
#
# ROUGE-L looks at order in another way: the longest run of words that both sentences have in the same order, with gaps
# allowed. It is called the longest common subsequence. For each pair of places, the best so far is one more than the
# best before both, if the words are equal, and else the better of leaving out one of the two.


# %%
# | export
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


# %%
assert rouge_l(ptb_tokens("a b c d"), [ptb_tokens("a x c d")]) == 0.75  # three of four words, in order
assert rouge_l(ptb_tokens("d c b a"), [ptb_tokens("a b c d")]) == 0.25  # all words, no order

# %% [markdown]
# ## CIDEr: what a person would say of *this* picture
#
# For BLEU, "a" is worth as much as "star". CIDEr weighs: a word that stands in the captions of nearly every picture
# says little about one; a word that stands in few says much. The weight of an n-gram $g$ is the logarithm of how many
# times more pictures there are than pictures whose references have it.
#
# $$ w(g) = \log N - \log \max(1, d_g) $$
#
# Each sentence becomes a list of numbers: for each n-gram, count times weight. Two sentences are compared by the
# cosine of their lists. First by hand, with single words only, for a corpus of three pictures.

# %%
three_pictures = [["a red star", "one red star"], ["a blue ring"], ["a red ring"]]
holds = Counter(word for captions in three_pictures for word in {word for text in captions for word in text.split()})
weight = {word: math.log(3) - math.log(count) for word, count in holds.items()}
{word: round(value, 2) for word, value in weight.items()}

# %% [markdown]
# "a" stands in all three: weight 0, whoever says it gains nothing. "star" stands in one: weight 1.1.


# %%
def cosine_naive(said: str, reference: str) -> float:
    dot = sum(weight.get(word, math.log(3)) ** 2 for word in set(said.split()) & set(reference.split()))
    lengths = [
        math.sqrt(sum(weight.get(word, math.log(3)) ** 2 for word in text.split())) for text in (said, reference)
    ]
    return dot / (lengths[0] * lengths[1])


[(text, round(cosine_naive(text, "a red star"), 2)) for text in ("a red star", "a star", "a red", "a red ring")]

# %% [markdown]
# To name the rare thing is worth more than to name the common one. The rest is bookkeeping: the same for pairs,
# triples and fours, the mean of the four, the mean over the references, times 10. CIDEr-**D**, the form in use, adds
# two guards against tricks: a count is cut to that of the reference, so that repeating a rare word does not pay, and a
# difference of length $\delta$ costs a factor $e^{-\delta^2 / 2\sigma^2}$ with $\sigma = 6$.


# %%
# | export
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


# %% [markdown]
# Note that the score depends on the other pictures of the corpus: the same caption of the same picture gets another
# number in another collection. And with one picture alone every weight is $\log 1 = 0$: no caption can score.

# %%
tokens = [[text.split() for text in captions] for captions in three_pictures]
frequencies = ngram_frequencies(tokens)
assert cider(ptb_tokens("a red star"), tokens[0], frequencies) > cider(ptb_tokens("a star"), tokens[0], frequencies)
assert cider(ptb_tokens("a red star"), tokens[0], ngram_frequencies(tokens[:1])) == 0.0

# %% [markdown]
# How much do the words matter? Here the same two sentences are cut at spaces, and by our rules.

# %%
stop = ("A red star, next to a ring.", "a red star next to a ring")
at_spaces = bleu([(stop[0].split(), [stop[1].split()])])
by_rules = bleu([(ptb_tokens(stop[0]), [ptb_tokens(stop[1])])])
assert at_spaces[3] < 0.01 and by_rules[3] > 0.99
print(f"BLEU-1 {at_spaces[0]:.2f} and {by_rules[0]:.2f}, BLEU-4 {at_spaces[3]:.2f} and {by_rules[3]:.2f}")

# %% [markdown]
# Two programs that cut differently cannot be compared, however equal their formulas are.
#
# Now the picture from the top, with all six numbers. The corpus is 400 scenes.

# %%
world = ngram_frequencies([ptb_tokens(caption(make_scene(seed)))] for seed in range(400))
table = {}
for name, text in given.items():
    pair = (ptb_tokens(text), [ptb_tokens(truth)])
    table[name] = [*bleu([pair]), rouge_l(*pair), cider(*pair, world) / 10]
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.0), width_ratios=(1, 2.4))
axes[0].imshow(draw_scene(scene))
axes[0].axis("off")
axes[0].set_title("\n".join(textwrap.wrap(truth, 36)), fontsize=7)
axes[1].imshow(list(table.values()), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
for row, values in enumerate(table.values()):
    for column, value in enumerate(values):
        axes[1].text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9)
axes[1].set_xticks(range(6), ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr / 10"], fontsize=8)
axes[1].set_yticks(range(len(table)), list(table), fontsize=9)
axes[1].tick_params(length=0)
for side in axes[1].spines.values():
    side.set_visible(False)
save(figure, "20_scores")
assert table["the truth"][3] > 0.999 and table["another order"][0] > table["another order"][3]

# %% [markdown]
# *Figure: a drawn scene, and a table of five captions by six scores. The truth has full marks everywhere. Another order
# keeps BLEU-1 whole and loses in the longer n-grams and most in ROUGE-L; one wrong word costs all of them something, and
# CIDEr most; half of the caption has no wrong word and pays for its length, the same in all four BLEU; one word gets
# nothing.*
#
# ## Proof
#
# `pycocoevalcap` is the code that everybody reports with. Given the same words, the numbers are the same.
# (The tests do this on many odd corpora; here is a plain one.)

# %%
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

gts = {key: [" ".join(words) for words in true] for key, (_, true) in enumerate(corpus)}
res = {key: [" ".join(words)] for key, (words, _) in enumerate(corpus)}
reference = Bleu(4).compute_score(gts, res, verbose=0)[0]
reference += [Rouge().compute_score(gts, res)[0], Cider().compute_score(gts, res)[0]]
frequencies = ngram_frequencies(true for _, true in corpus)
ours = bleu(corpus)
ours += [np.mean([rouge_l(*pair) for pair in corpus]), np.mean([cider(*pair, frequencies) for pair in corpus])]
assert np.allclose(ours, reference, rtol=0, atol=1e-6)
[round(float(value), 4) for value in ours]

# %% [markdown]
# ## Answers to questions: the rule of VQA
#
# For VQAv2 ten people answered each question. They do not agree, and a model should not be punished for siding with
# some of them. The rule: an answer that at least three of the others gave is right, one that two gave is two thirds
# right. "Of the others": each of the ten is left out once, and the ten results are averaged.


# %%
def vqa_naive(answer: str, people: list[str]) -> float:
    total = 0.0
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        total += min(others.count(answer) / 3, 1)
    return total / len(people)


people = ["red"] * 5 + ["dark red"] * 3 + ["orange", "brown"]
{answer: round(vqa_naive(answer, people), 3) for answer in ("red", "dark red", "orange", "blue")}

# %% [markdown]
# Three people of ten are worth 0.9, not 1: when one of the three is left out, only two remain. One person is worth 0.3.
# So with fewer than four true answers the rule cannot give 1: of three that agree two are left, which is 2/3. A single
# true answer is compared by itself.
#
# $$ \mathrm{accuracy} = \frac{1}{10} \sum_{i=1}^{10} \min\left(1, \frac{\#\{j \neq i : \text{answer}_j = \text{said}\}}{3}\right) $$
#
# Before the comparison, answers are put into a plain form. The order of these steps is part of the rule:
#
# 1. punctuation goes: dropped if it stands beside a space somewhere (or a number has a comma), else it becomes a space;
# 2. periods go, unless a digit follows;
# 3. lower case; `two` becomes `2` (up to ten; `none` is 0); `a`, `an` and `the` go;
# 4. a contraction without its apostrophe gets it: `dont` becomes `don't`.
#
# The official script does so to the model's answer and to the people's, but only where the people disagree. Where all wrote
# the same, it takes every letter as it is: such questions often ask what is written somewhere. Then `Yes.` is wrong for
# `yes`. We do the same for answers that come from VQAv2's files, since a score is worth something only if it is *the* score.
# (An older version of the script, which many copies follow, treated people's answers otherwise.) For answers of your own
# (`official=False`) both sides are always put into plain form.


# %%
# | export
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


# %%
for answer in ("red", "dark red", "orange", "blue"):
    assert math.isclose(vqa_accuracy(answer, people), vqa_naive(answer, people))
assert vqa_plain("The dogs dont, two.") == "dogs don't 2"
assert vqa_accuracy("nokia", ["Nokia"] * 10) == 0 and vqa_accuracy("nokia", ["Nokia"] * 10, official=False) == 1
[vqa_plain(text) for text in ("A T-shirt!", "1,000", "3.5", "Mr. Smith", "black/white", "NONE")]

# %% [markdown]
# `tests/golden/` keeps 2,000 question-answer sets with the scores of the official script, and a test compares.
#
# ## Counting
#
# "How many" deserves scores of its own: a model that says 4 for 5 is nearer than one that says 1, and the mean hides
# *which* numbers fail. So: exact, at most one away, mean distance, and all three for each true number.


# %%
# | export
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


# %%
assert [read_count(text) for text in ("3", "three", "there are 3.", "none", "many", "2 or 3")] == [
    3,
    3,
    3,
    0,
    None,
    None,
]
count_scores([(3, 3), (4, 5), (None, 5), (1, 5)])

# %% [markdown]
# ## Boxes: average precision
#
# Which boxes are right? Take the found boxes of one label, surest first. Each looks for the true box that it overlaps
# most and that nobody has taken. If the IoU (chapter 14) is at least a threshold, it is a hit, else a false alarm. Going
# down the list, more true things are found (recall rises), and false alarms come in (precision falls).

# %%
sure = [(0.9, True), (0.8, True), (0.7, False), (0.6, True), (0.5, False)]  # five boxes found, four things there
hits = np.cumsum([hit for _, hit in sure])
recall, precision = hits / 4, hits / np.arange(1, 6)
ceiling = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision from here on
grid = np.linspace(0, 1, 101)
area = np.mean([max([p for r, p in zip(recall, ceiling) if r >= level], default=0.0) for level in grid])
figure, axis = plt.subplots(figsize=(4.8, 2.7))
stair = [0, *recall[:-1]], [ceiling[0], *ceiling[:-1]]  # the last box finds nothing
axis.step(*stair, where="pre", color=PICTURE)
axis.fill_between(*stair, step="pre", color=PICTURE, alpha=0.15, lw=0)
for r, p, (_, hit) in zip(recall, precision, sure):
    axis.plot(r, p, marker="o" if hit else "x", color=ANSWER if hit else PROMPT)
axis.annotate("hit", (recall[0], precision[0]), xytext=(4, -14), textcoords="offset points", fontsize=8)
axis.annotate("false alarm", (recall[2], precision[2]), xytext=(-62, -6), textcoords="offset points", fontsize=8)
axis.text(0.38, 0.35, f"area {area:.2f}", ha="center", color=PICTURE)
axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.08))
save(figure, "20_precision")

# %% [markdown]
# *Figure: precision over recall for five found boxes and four things. Dots are hits, crosses are false alarms. A
# staircase runs over them from precision 1 down to 0.75 and ends at recall 0.75, since one thing was never found. The
# area under it is the average precision.*
#
# AP50 uses the threshold 0.5; AP50-95 is the mean over ten thresholds from 0.5 to 0.95, so it pays for tight boxes. Both
# are means over labels. COCO also has *crowds*: a box around many things, in which any number of found boxes may lie
# without being right or wrong.
#
# PaliGemma's answers carry no scores. Chapter 20b gives every box the score 1, so that the order of the pictures decides
# who comes first in the list; the staircase then is nearly flat, and AP is close to precision times recall. Numbers of
# detectors with scores are not to be compared with it.
#
# One more thing to know before comparing: files of COCO become one question for each label that is in a picture, and none
# about labels that are not. So a model that sees dogs everywhere is not caught by this number.


# %%
# | export
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


# %%
def square(left: float, side: float = 10.0) -> Detection:
    return Detection("star", (0.0, left, side, left + side))


here = [square(left) for left in (0, 20, 40, 60)]  # four things; what was found, in the order of the figure above:
seen = [square(0), square(20), square(90), square(40), square(80)]
case = PictureBoxes(here, seen, scores=[score for score, _ in sure])
assert math.isclose(average_precision([case])["AP50"], area)
average_precision([case])

# %% [markdown]
# ## Masks
#
# For masks one number is in use: the IoU of the pixels, averaged over the examples (`mIoU`). A mask that is all wrong is
# 0, whatever its size.


# %%
# | export
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


# %%
left_half, top_half = np.zeros((2, 8, 8), dtype=bool)
left_half[:, :4], top_half[:4] = True, True
assert mean_mask_iou([(left_half, top_half)]) == 16 / 48
assert mean_mask_iou([(left_half, left_half), (left_half, ~left_half)]) == 0.5

# %% [markdown]
# ## The bill
#
# BLEU, VQA's accuracy and counting are a few sums, whatever the number of pictures. AP keeps a few numbers for each box that
# was found. CIDEr keeps most: the table of n-grams, which grows with what people say.

# %%
few, all_of_them = (ngram_frequencies(true for _, true in corpus[:most]).counts for most in (200, 2000))
assert len(few) < len(all_of_them) < 10 * len(few)
f"{len(few):,} n-grams in 200 captions, {len(all_of_them):,} in 2,000"

# %% [markdown]
# ## Your turn
#
# **1.** ★ How many of ten people must agree with an answer for an accuracy of exactly 1? Write `vqa_rule(agree)`: the
# accuracy when `agree` of ten people said the same as the model.


# %%
def vqa_rule(agree: int) -> float: ...


check(vqa_rule, ((0,), 0.0), ((1,), 0.3), ((3,), 0.9), ((4,), 1.0))

# %% [markdown]
# **2.** ★★ Write `brevity(said, wanted)`: the factor of BLEU for so many words said and so many wanted.


# %%
def brevity(said: int, wanted: int) -> float: ...


check(brevity, ((10, 10), 1.0), ((12, 10), 1.0), ((5, 10), math.exp(-1)))

# %% [markdown]
# **3.** ★★ A cheat for CIDEr without its D: repeat the rarest word of the picture. Write `clipped(said, true)`: the dot
# product of two dictionaries of weighted counts in which what was said counts at most as much as the truth.


# %%
def clipped(said: dict, true: dict) -> float: ...


check(clipped, (({"star": 9.0}, {"star": 1.0, "red": 2.0}), 1.0), (({"red": 1.0, "ring": 5.0}, {"red": 2.0}), 2.0))

# %% [markdown]
# Next: asking a whole data set, on a machine that may stop at any moment.
