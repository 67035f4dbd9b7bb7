"""Scores against the programs that people report with: pycocoevalcap, pycocotools, and what the official VQA script said."""

import contextlib
import gzip
import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sigma_book.answers import answer_examples, score_answers, write_official, write_world_files
from sigma_book.data import read_examples
from sigma_book.evaluation import (
    PictureBoxes,
    average_precision,
    bleu,
    cider,
    mean_mask_iou,
    ngram_frequencies,
    ptb_tokens,
    rouge_l,
    vqa_accuracy,
)
from sigma_book.locate import Detection, encode_boxes
from sigma_book.runs import evaluate

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str):
    return json.loads(gzip.decompress((GOLDEN / name).read_bytes()))


# --- captions ---------------------------------------------------------------------------------------------------------


def reference_scores(corpus) -> tuple[list[float], list[float], list[float]]:
    truth = {key: [" ".join(words) for words in references] for key, (_, references) in enumerate(corpus)}
    said = {key: [" ".join(words)] for key, (words, _) in enumerate(corpus)}
    return (
        Bleu(4).compute_score(truth, said, verbose=0)[0],
        Rouge().compute_score(truth, said)[1].tolist(),
        Cider().compute_score(truth, said)[1].tolist(),
    )


def our_scores(corpus) -> tuple[list[float], list[float], list[float]]:
    frequencies = ngram_frequencies(references for _, references in corpus)
    return bleu(corpus), [rouge_l(*pair) for pair in corpus], [cider(*pair, frequencies) for pair in corpus]


def random_corpus(rng: random.Random) -> list:
    """One to thirty pictures; answers that are empty, one word, one word again and again, or near a reference."""
    words = [f"w{i}" for i in range(rng.choice((2, 5, 40)))]
    corpus = []
    for _ in range(rng.choice((1, 2, 30))):
        references = [rng.choices(words, k=rng.randint(1, 12)) for _ in range(rng.choice((1, 1, 2, 5)))]
        near = [word for word in references[0] if rng.random() > 0.2]
        said = rng.choice(
            ([], [rng.choice(words)], [rng.choice(words)] * 9, near, references[-1], rng.choices(words, k=6))
        )
        corpus.append((said, references))
    return corpus


@pytest.mark.parametrize("seed", range(60))
def test_caption_scores_are_those_of_pycocoevalcap(seed):
    corpus = random_corpus(random.Random(seed))
    for ours, reference in zip(our_scores(corpus), reference_scores(corpus), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "corpus",
    [
        [([], [["a"]])],
        [(["a"], [["a"]])],
        [(["a"] * 20, [["a"], ["a", "a"]])],
        [(["a", "b"], [["a", "b"]] * 5), ([], [["c"], ["d", "e"]])],
        [(["x"], [["a", "b", "c", "d", "e"]]), (["a", "b", "c", "d"], [["a", "b", "c", "d"]])],
        [([], [[], ["a"]]), (["b"], [[]])],
    ],
    ids=["empty", "one word", "one word again and again", "five alike", "nothing in common", "empty reference"],
)
def test_odd_corpora_too(corpus):
    for ours, reference in zip(our_scores(corpus), reference_scores(corpus), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-9)


def test_with_one_picture_all_weights_vanish():
    pair = (["a", "b"], [["a", "b"]])
    assert cider(*pair, ngram_frequencies([pair[1]])) == 0.0 == Cider().compute_score({0: ["a b"]}, {0: ["a b"]})[0]


def test_cider_with_frequencies_of_another_corpus():
    corpus, other = random_corpus(random.Random(3)), random_corpus(random.Random(5))
    frequencies = ngram_frequencies(
        [*(references for _, references in other), *(references for _, references in corpus)]
    )
    scorer = CiderScorer()
    for words, references in corpus:
        scorer += (" ".join(words), [" ".join(reference) for reference in references])
    scorer.document_frequency.update({ngram: float(count) for ngram, count in frequencies.counts.items()})
    scorer.crefs += [[]] * (frequencies.pictures - len(corpus))  # only their number is read; zip leaves them out
    ours = [cider(*pair, frequencies) for pair in corpus]
    np.testing.assert_allclose(ours, scorer.compute_cider(), rtol=0, atol=1e-9)


def test_words_are_those_of_the_java_tokenizer():
    rows = golden("ptb.json.gz")
    differ = {name: sum(ptb_tokens(line) != words.split() for line, words in rows[name]) for name in rows}
    assert len(rows["captions"]) == 2000 and differ["captions"] == 0
    assert differ["odd"] <= 0.04 * len(rows["odd"]), differ  # smileys, file names, rare abbreviations
    others = [line for line, words in rows["languages"] if ptb_tokens(line) != words.split()]
    assert len(rows["languages"]) == 46 and others == ["«un chat» noir", "a\u200bb", "m² km²", "j'ai", "l'homme-là"]


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer is a Java program")
def test_from_text_to_scores_as_the_official_code(captured_run):
    """The whole way: official files, our runner, our results file, and the official classes on it."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    files, folder, scores = captured_run("caption")
    truth: dict = {}
    for row in json.loads(files["captions"].read_text())["annotations"]:
        truth.setdefault(row["image_id"], []).append({"caption": row["caption"]})
    said = {row["image_id"]: [row] for row in json.loads((folder / "results.json").read_text())}
    with contextlib.redirect_stdout(io.StringIO()):
        truth, said = PTBTokenizer().tokenize(truth), PTBTokenizer().tokenize(said)
    expected = dict(zip([f"BLEU-{n}" for n in (1, 2, 3, 4)], Bleu(4).compute_score(truth, said, verbose=0)[0]))
    expected |= {"ROUGE-L": Rouge().compute_score(truth, said)[0], "CIDEr": Cider().compute_score(truth, said)[0]}
    for name, value in expected.items():
        assert abs(scores[name] - value) < 1e-6, name


# --- questions --------------------------------------------------------------------------------------------------------


def test_vqa_accuracy_is_that_of_the_official_script():
    content = golden("vqa.json.gz")
    assert len(content["sets"]) == 2000
    sums: dict[str, list[float]] = {}
    for row in content["sets"]:
        ours = vqa_accuracy(row["answer"], row["people"])
        assert abs(100 * ours - row["official"]) < 1e-6, row  # the script rounds to eight places
        sums.setdefault(row["answer_type"], []).append(ours)
    for kind, accuracies in sums.items():
        assert abs(100 * np.mean(accuracies) - content["accuracy"]["perAnswerType"][kind]) < 1e-6
    spread = Counter(round(row["official"]) for row in content["sets"])
    assert set(spread) == {0, 30, 60, 90, 100}, "every case of the rule occurs"


# --- boxes and masks --------------------------------------------------------------------------------------------------


def random_box(rng: random.Random, near=None) -> tuple:
    if near is not None:
        return tuple(edge + rng.gauss(0, 4) * (1 if i < 2 else 0) for i, edge in enumerate(near))
    top, left = rng.uniform(0, 60), rng.uniform(0, 60)
    return top, left, top + rng.uniform(4, 40), left + rng.uniform(4, 40)


def random_pictures(rng: random.Random, crowds: bool, many: bool) -> list[PictureBoxes]:
    labels = ["cat", "dog", "kite"]
    pictures = []
    for _ in range(rng.choice((1, 4, 25))):
        truth = [Detection(rng.choice(labels), random_box(rng)) for _ in range(rng.randint(0, 6))]
        near = [Detection(box.label, random_box(rng, box.box)) for box in truth for _ in range(rng.randint(0, 3))]
        near += [
            Detection(rng.choice([*labels, "cloud"]), random_box(rng))
            for _ in range(130 if many else rng.randint(0, 3))
        ]
        near = [box for box in near if box.box[2] > box.box[0] and box.box[3] > box.box[1]]
        scores = [rng.choice((1.0, 0.5, rng.random())) for _ in near]
        crowd = [crowds and rng.random() < 0.3 for _ in truth]
        pictures.append(PictureBoxes(truth, near, scores, crowd))
    return pictures


def coco_scores(pictures: list[PictureBoxes]) -> tuple[float, float]:
    labels = sorted({box.label for picture in pictures for box in [*picture.truth, *picture.found]})
    annotations, results = [], []

    def place(box: Detection) -> list[float]:
        top, left, bottom, right = box.box
        return [left, top, right - left, bottom - top]

    for image_id, picture in enumerate(pictures, start=1):
        for box, crowd in zip(picture.truth, list(picture.crowd) or [False] * len(picture.truth), strict=True):
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": labels.index(box.label) + 1}
            size = place(box)
            annotations.append(row | {"bbox": size, "area": size[2] * size[3], "iscrowd": int(crowd)})
        for box, score in zip(picture.found, list(picture.scores) or [1.0] * len(picture.found), strict=True):
            row = {"image_id": image_id, "category_id": labels.index(box.label) + 1, "bbox": place(box), "score": score}
            results.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": number} for number in range(1, len(pictures) + 1)],
            "annotations": annotations,
            "categories": [{"id": number} for number in range(1, len(labels) + 1)],
        }
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats[1], run.stats[0]


@pytest.mark.parametrize("seed", range(40))
def test_average_precision_is_that_of_pycocotools(seed):
    rng = random.Random(seed)
    pictures = random_pictures(rng, crowds=seed % 2 == 1, many=seed % 10 == 3)
    if not any(picture.found for picture in pictures):
        pytest.skip("pycocotools cannot read an empty list of results")
    ours = average_precision(pictures)
    fifty, mean = coco_scores(pictures)
    if ours["AP50"] is None:
        assert fifty == mean == -1
    else:
        assert abs(ours["AP50"] - fifty) < 1e-9 and abs(ours["AP50-95"] - mean) < 1e-9


def test_our_results_file_scores_the_same_in_pycocotools(captured_run):
    files, folder, scores = captured_run("detect")
    fifty, mean = score_by_coco(files["instances"], folder / "results.json")
    assert scores["AP50"] > 0.8
    assert abs(scores["AP50"] - fifty) < 1e-9 and abs(scores["AP50-95"] - mean) < 1e-9


def test_boxes_under_labels_that_were_not_asked_for_count_the_same(tmp_path):
    """A model that names other things than it was asked about, some of them unknown to the data."""
    files = write_world_files(tmp_path, 12)
    examples, rng = read_examples(files["instances"]), random.Random(0)
    labels = [example.prefix.removeprefix("detect ") for example in examples]

    def answer(rows) -> list[str]:
        texts = []
        for example in rows:
            boxes = [box for box in example.facts["boxes"] if rng.random() < 0.8]
            boxes += [[edge * 0.7 for edge in box] for box in example.facts["boxes"] if rng.random() < 0.5]
            names = [rng.choice([example.facts["labels"][0], rng.choice(labels), "a cloud"]) for _ in boxes]
            texts.append(encode_boxes(boxes, names, 112, 112))
        return texts

    records = answer_examples("detect", examples, answer, tmp_path / "answers.jsonl", batch_size=5)
    write_official("detect", records, tmp_path / "results.json")
    scores, _ = score_answers("detect", records)
    fifty, mean = score_by_coco(files["instances"], tmp_path / "results.json")
    assert 0.1 < fifty < 0.9
    assert abs(scores["AP50"] - fifty) < 1e-9 and abs(scores["AP50-95"] - mean) < 1e-9


def test_boxes_in_a_crowd_count_the_same(tmp_path):
    """A model that points beside each thing before it points at it: in a crowd that is no mistake."""
    files = write_world_files(tmp_path, 12)
    plain = len(read_examples(files["instances"]))
    add_crowds(files["instances"])
    examples = read_examples(files["instances"])
    assert len(examples) == plain

    def answer(rows) -> list[str]:
        texts = []
        for example in rows:
            boxes = [[edge * share for edge in box] for share in (0.7, 1) for box in example.facts["boxes"]]
            texts.append(encode_boxes(boxes, example.facts["labels"] * 2, 112, 112))
        return texts

    records = answer_examples("detect", examples, answer, tmp_path / "answers.jsonl", batch_size=5)
    write_official("detect", records, tmp_path / "results.json")
    scores, _ = score_answers("detect", records)
    fifty, mean = score_by_coco(files["instances"], tmp_path / "results.json")
    assert abs(scores["AP50"] - fifty) < 1e-9 and abs(scores["AP50-95"] - mean) < 1e-9
    without, _ = score_answers("detect", [record | {"crowds": []} for record in records])
    assert without["AP50"] + 0.1 < fifty < 0.99


def add_crowds(path: Path) -> None:
    """In two of three pictures crowds that cover half of it or all: of each of its categories, and of the next one's."""
    content, kinds = json.loads(path.read_text()), {}
    for row in content["annotations"]:
        kinds.setdefault(row["image_id"], set()).add(row["category_id"])
    for image_id in kinds:
        height = 56 * (image_id % 3)
        for category_id in sorted(kinds[image_id] | kinds.get(image_id + 1, set())) if height else []:
            row = {"id": 10_000 + len(content["annotations"]), "image_id": image_id, "category_id": category_id}
            content["annotations"].append(row | {"iscrowd": 1, "bbox": [0, 0, 112, height], "area": 112 * height})
    path.write_text(json.dumps(content))


def score_by_coco(truth: Path, results: Path) -> tuple[float, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(truth)
        run = COCOeval(known, known.loadRes(str(results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats[1], run.stats[0]


def test_mask_iou_is_that_of_pycocotools():
    rng = np.random.default_rng(0)
    pairs = [(rng.random((9, 13)) < p, rng.random((9, 13)) < 0.4) for p in (0.0, 0.1, 0.5, 1.0)]
    encoded = [[coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in pair] for pair in pairs]
    expected = np.mean([coco_mask.iou([found], [true], [False])[0, 0] for found, true in encoded])
    assert abs(mean_mask_iou(pairs) - expected) < 1e-12


# --- one run of the pocket model for several tests --------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    files = write_world_files(folder, 40)
    add_crowds(files["instances"])
    data = {"caption": files["captions"], "detect": files["instances"]}
    done: dict[str, dict] = {}

    def run(task: str):
        if task not in done:
            done[task] = evaluate(task, data[task], folder / task, official=True)
        return files, folder / task, done[task]

    return run
