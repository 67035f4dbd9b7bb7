"""Evaluation: rules by hand, a runner that is killed and goes on, files that do not fit, and the page of worst cases."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sigma_book import data
from sigma_book.answers import (
    AnswerFile,
    answer_examples,
    answer_speed,
    score_answers,
    score_table,
    true_count,
    worst_page,
    write_world_files,
)
from sigma_book.cli import main
from sigma_book.data import Example, read_examples
from sigma_book.evaluation import (
    PictureBoxes,
    average_precision,
    bleu,
    cider,
    count_scores,
    mean_mask_iou,
    ngram_frequencies,
    ptb_tokens,
    read_count,
    rouge_l,
    vqa_accuracy,
    vqa_plain,
)
from sigma_book.locate import Detection
from sigma_book.runs import evaluate
from sigma_book.training import claim_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """Forty scenes in official files: to read, not to write."""
    return write_world_files(tmp_path_factory.mktemp("world"), 40)


@pytest.fixture
def world_copy(world, tmp_path) -> dict[str, Path]:
    """Files that a test may damage."""
    folder = shutil.copytree(world["captions"].parent.parent, tmp_path / "world")
    return {key: folder / "annotations" / path.name for key, path in world.items()}


def rows(count: int) -> list[Example]:
    picture = Image.new("RGB", (8, 8))
    return [Example(picture, f"caption {i}", f"a {i}", f"row {i}", (f"a {i}",), {"image_id": i}) for i in range(count)]


def echo(examples: list[Example]) -> list[str]:
    return [f"said {example.prefix}" for example in examples]


def said_in(path: Path) -> list[tuple[int, str]]:
    return [(record["index"], record["answer"]) for record in AnswerFile(path)]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_speed_by_hand():
    """Two batches: one of two rows, one of one. An answer takes as long as its batch; a batch is shared among its rows."""
    batches = [(2.0, 2, 300.0), (2.0, 2, None), (1.0, 1, 310.0)]
    speed = answer_speed({"seconds": seconds, "rows": rows, "megabytes": held} for seconds, rows, held in batches)
    assert speed["latency_mean"] == pytest.approx(5 / 3) and speed["latency_median"] == 2.0
    assert speed["latency_p95"] == 2.0 and speed["answers_per_second"] == pytest.approx(1.0)
    assert speed["peak_megabytes"] == 310.0
    slower = answer_speed({"seconds": float(s), "rows": 1, "megabytes": 1.0} for s in range(1, 102))
    assert slower["latency_p95"] == pytest.approx(96.0)  # of 1 to 101 seconds


def test_bleu_by_hand():
    """Six of seven words, four of six pairs, three of five triples, two of four fours; no penalty."""
    said, references = (
        ptb_tokens("a red star and a green ring"),
        ["a red star and a ring", "a blue ring and a red star"],
    )
    product, expected = 1.0, []
    for n, share in enumerate((6 / 7, 4 / 6, 3 / 5, 2 / 4), start=1):
        product *= share
        expected.append(product ** (1 / n))
    assert bleu([(said, [ptb_tokens(text) for text in references])]) == pytest.approx(expected, abs=1e-8)


def test_one_word_answers_do_not_give_four_equal_values():
    values = bleu([(["two"], [["two", "stars"]]), (["ring"], [["ring"]])])
    assert values[0] > 100 * values[1] > 100 * values[3]


def test_no_wrong_word_and_too_short_gives_the_penalty_four_times():
    values = bleu([(["a", "b", "c", "d"], [["a", "b", "c", "d"] * 2])])
    assert values == pytest.approx([2.718281828459045 ** (1 - 8 / 4)] * 4, abs=1e-6)


def test_scores_need_something_to_compare_with():
    frequencies = ngram_frequencies([[["a"]]])
    for call in (
        lambda: bleu([(["a"], [])]),
        lambda: bleu([]),
        lambda: rouge_l(["a"], []),
        lambda: cider(["a"], [], frequencies),
        lambda: vqa_accuracy("a", []),
        lambda: count_scores([]),
        lambda: mean_mask_iou([]),
    ):
        with pytest.raises(ValueError, match="no reference|no caption|no count|no mask"):
            call()


@pytest.mark.parametrize(
    ("answer", "people", "accuracy"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("green", ["red"] * 10, 0.0),
        ("Two.", ["2"] * 10, 0.0),  # where all agree, every letter counts
        ("two", ["two"] * 10, 1.0),
        (" two\n", ["two\t"] * 10, 1.0),
        ("Two.", ["two"] * 9 + ["2"], 1.0),  # where they differ, both sides are put into plain form
        ("dog", ["a dog"] * 8 + ["dog"] * 2, 1.0),
        ("Two.", ["two"], 1.0),  # one person alone: our rule, both are put into plain form
        ("the dont", ["don't"] * 10, 0.0),
        ("the dont", ["don't"] * 9 + ["no"], 1.0),
    ],
)
def test_vqa_accuracy_by_hand(answer, people, accuracy):
    assert vqa_accuracy(answer, people) == pytest.approx(accuracy)


def test_plain_form_of_answers():
    assert [vqa_plain(text) for text in ("A cat!", "1,000", "3.5", "end.", "black/white", "none", "youre")] == (
        ["cat", "1000", "3.5", "end", "black white", "0", "you're"]
    )


def test_answers_of_ones_own_are_made_plain_too(tmp_path):
    """The official rule takes unanimous answers to the letter, and keeps to VQAv2's files."""
    assert vqa_accuracy("nokia", ["Nokia"] * 10) == 0.0
    for said in ("Nokia", "a dog", "Two", "dont walk", "somebody'd", "somebodyd"):
        assert vqa_accuracy(f"{said}.", [said] * 10, official=False) == 1.0
    people = ["the dog"] * 9 + ["A cat"]
    assert vqa_accuracy("Dog.", people, official=False) == 1.0
    assert vqa_accuracy("cat", people, official=False) == pytest.approx(0.3)
    for facts, accuracy in (({}, 1.0), ({"question_id": 7}, 0.0)):
        own = [Example(b"", "answer en who?", "Nokia", "row 1", ("Nokia",) * 10, facts)]
        records = answer_examples("vqa", own, lambda rows: ["nokia"], tmp_path / f"{len(facts)}.jsonl")
        assert score_answers("vqa", records)[0]["accuracy"] == accuracy


def test_a_number_that_does_not_end_is_none():
    for digits in (16, 400, 5000):
        assert read_count("1" * digits) is None
        record = {"index": 0, "answer": "1" * digits, "suffix": "3"}
        assert score_answers("count", [record])[0]["no_number"] == 1
    assert read_count("1" * 15) == 111_111_111_111_111


def test_counting_by_hand():
    scores = count_scores([(3, 3), (4, 5), (None, 5), (1, 5), (0, 0)])
    assert (scores["asked"], scores["no_number"]) == (5, 1)
    assert (scores["exact"], scores["within_one"], scores["mean_error"]) == (2 / 5, 3 / 5, 5 / 4)
    assert list(scores["by_truth"]) == [0, 3, 5]
    assert scores["by_truth"][5] == {"asked": 3, "exact": 0, "within_one": 1 / 3, "mean_error": 2.5, "no_number": 1}
    assert count_scores([(None, 1)])["mean_error"] is None
    answers = ("12", "Three", "there are 4.", "2 or 3", "many", "", "1,000", "-1", "²")
    assert [read_count(text) for text in answers] == [12, 3, 4, None, None, None, 1000, 1, None]


def test_only_questions_of_how_many_are_counted():
    assert true_count(Example(b"", "", "3", facts={"question_type": "how many people are"})) == 3
    assert true_count(Example(b"", "", "3", facts={"question_type": "what number is"})) is None
    assert true_count(Example(b"", "", "red")) is None
    assert true_count(Example(b"", "", "three")) == 3


def test_boxes_without_truth_and_labels_without_truth():
    cat, dog = Detection("cat", (0, 0, 10, 10)), Detection("dog", (0, 0, 10, 10))
    assert average_precision([PictureBoxes([], [dog])])["AP50"] is None
    assert average_precision([PictureBoxes([cat], [cat, dog])])["AP50"] == 1.0  # nobody asked for dogs
    assert average_precision([PictureBoxes([cat, dog], [cat])])["AP50"] == 0.5
    with pytest.raises(ValueError):
        average_precision([PictureBoxes([cat], [cat, dog], scores=[1.0])])


def test_what_else_is_said_of_boxes():
    """All found; one of two; no box at all; the right box under another name: 1 + 1 + 0 + 1 over five things."""
    one, two, said = [0, 0, 100, 100], [200, 200, 300, 300], "<loc0000><loc0000><loc0100><loc0100>"
    pictures = [(f"{said} cat", [one]), (f"{said} cat", [one, two]), ("no", [one]), (f"{said} dog", [one])]
    records = [
        {"index": i, "answer": text, "size": [1023, 1023], "labels": ["cat"] * len(boxes), "boxes": boxes, "crowds": []}
        for i, (text, boxes) in enumerate(pictures)
    ]
    scores, cases = score_answers("detect", records)
    assert scores["all_found"] == 1 / 4 and scores["mean_iou"] == pytest.approx(3 / 5)
    assert scores["not_well_formed"] == 1
    assert [record["index"] for _, record in cases] == [2, 1, 3]
    assert [record["index"] for _, record in score_answers("detect", records, worst=1)[1]] == [2]


@pytest.mark.parametrize(
    ("task", "said", "order"),
    [
        ("caption", [("a star", ["a star"]), ("a red ring", ["a blue ring"]), ("x", ["two hearts"])], [2, 1, 0]),
        ("vqa", [("red", ["red"] * 10), ("red", ["red"] * 2 + ["blue"] * 8), ("x", ["y"] * 6 + ["z"] * 4)], [2, 1]),
        ("vqa", [("red", ["red"] * 10), ("x", ["y"] * 6 + ["z"] * 4), ("x", ["y"] * 10)], [2, 1]),  # where all agree
        ("count", [("1", ["1"]), ("2", ["1"]), ("3", ["1"]), ("many", ["1"])], [3, 2, 1]),
    ],
)
def test_the_worst_are_kept_in_their_order(task, said, order):
    records = [
        {"index": i, "answer": answer, "answers": truth, "suffix": truth[0]} for i, (answer, truth) in enumerate(said)
    ]
    for worst in range(1, len(order) + 1):
        assert [record["index"] for _, record in score_answers(task, records, worst)[1]] == order[:worst]


def test_masks_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="of one size"):
        mean_mask_iou([([[1]], [[1, 0]])])
    assert mean_mask_iou([([[0]], [[0]])]) == 1.0


# --- the file of answers ----------------------------------------------------------------------------------------------


def test_wherever_the_file_is_torn_no_answer_is_lost_or_given_twice(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer_examples("caption", rows(9), echo, path, batch_size=4)
    whole, expected = path.read_bytes(), said_in(path)
    assert [index for index, _ in expected] == list(range(9))
    for cut in random.Random(0).sample(range(len(whole) + 1), 60):
        path.write_bytes(whole[:cut])
        asked: list[str] = []

        def answer(examples, asked=asked):
            asked += [example.prefix for example in examples]
            return echo(examples)

        answer_examples("caption", rows(9), answer, path, batch_size=4)
        assert said_in(path) == expected
        assert len(asked) == 9 - whole[:cut].count(b"\n")


@pytest.mark.skipif(sys.platform == "win32", reason="to_disk does nothing there")
def test_a_batch_is_on_the_disk_before_the_next_is_asked(tmp_path, monkeypatch):
    path, steps = tmp_path / "answers.jsonl", []

    def answer(examples):
        steps.append("asked")
        return echo(examples)

    monkeypatch.setattr(os, "fsync", lambda handle: steps.append(path.read_bytes().count(b"\n")))
    answer_examples("caption", rows(9), answer, path, batch_size=4)
    assert steps == ["asked", 4, "asked", 8, "asked", 9]

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"answers\.jsonl: No space left on device: make room"):
        answer_examples("caption", rows(20), answer, path, batch_size=4)
    assert steps[6:] == ["asked"], "no second batch"


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer_examples("caption", rows(3), echo, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\n" + lines[2])
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2 is broken"):
        answer_examples("caption", rows(3), echo, path)
    path.write_bytes(lines[0] + lines[0])
    with pytest.raises(ValueError, match="line 2: index is 0, expected 1 or more"):
        answer_examples("caption", rows(3), echo, path)


@pytest.mark.parametrize("line", ["5", "[]", '"x"', "null", "{}", '{"index": "0"}', '{"index": true}', "[" * 100_000])
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{line}\n")
    for read in (lambda: AnswerFile(path).next_index(), lambda: answer_examples("caption", rows(3), echo, path)):
        with pytest.raises(ValueError, match=r"answers\.jsonl, line 1 is broken"):
            read()


def test_an_answer_that_lacks_something_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer_examples("caption", rows(2), echo, path)
    path.write_bytes(path.read_bytes() + b'{"index": 2, "answer": "a"}\n')
    with pytest.raises(ValueError, match=r"line 3 has no answers, megabytes, prompt, .*: the file was edited"):
        answer_examples("caption", rows(3), echo, path)


def test_an_answer_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    answer_examples("caption", rows(2), echo, path)
    first, second = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, second | {"answer": 5})))
    with pytest.raises(ValueError, match=r"line 2: answer is 5, expected a text: the file was edited"):
        answer_examples("caption", rows(3), echo, path)


@pytest.mark.parametrize("most", [None, 4])
def test_a_line_that_was_removed_is_noticed(tmp_path, most):
    path = tmp_path / "answers.jsonl"
    answer_examples("caption", rows(9), echo, path)
    lines = path.read_bytes().splitlines(keepends=True)
    for lost in range(4):
        path.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
        with pytest.raises(ValueError, match=rf"answer with index {lost} is missing before line {lost + 1}"):
            answer_examples("caption", rows(9), echo, path, most=most)
    path.write_bytes(lines[0] + lines[1].replace(b'"index": 1', b'"index": 99'))
    with pytest.raises(ValueError, match="answer with index 1 is missing before line 2"):
        answer_examples("caption", rows(9), echo, path, most=most)


def test_where_something_is_counted_no_line_may_be_missing(tmp_path):
    """What asks for no number has no line: that gap is meant."""
    path, suffixes = tmp_path / "answers.jsonl", ["red", "2", "blue", "3", "3", "green"]
    asked = [Example(b"", "how many?", text, f"row {i}", (text,)) for i, text in enumerate(suffixes)]
    for _ in range(2):
        records = answer_examples("count", asked, lambda rows: [row.suffix for row in rows], path)
        assert [record["index"] for record in records] == [1, 3, 4]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(ValueError, match="answer with index 3 is missing before line 2"):
        answer_examples("count", asked, echo, path)


def test_a_picture_of_another_shape_than_its_boxes_need_is_named(world_copy, tiny_folder, tmp_path):
    content = json.loads(world_copy["instances"].read_text())
    content["images"][1].update(height=60)
    for row in content["annotations"]:
        row["bbox"][1] %= 60
    world_copy["instances"].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"image 2, .*: the file says 112 x 60, the picture is 112 x 112"):
        evaluate("detect", world_copy["instances"], tmp_path / "out", model=tiny_folder, max_new_tokens=1)


def test_a_disk_without_locks_and_a_kernel_without_peaks(tmp_path, monkeypatch):
    """As Lustre without `flock`, and gVisor."""
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*given):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def read_text(path, *given, **named):
        return "VmRSS:\t1024 kB\n" if str(path) == "/proc/self/status" else whole(path, *given, **named)

    whole = Path.read_text
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(Path, "read_text", read_text)
    records = answer_examples("caption", rows(2), echo, tmp_path / "answers.jsonl")
    assert [record["megabytes"] for record in records] == [None, None]


def test_a_folder_that_cannot_be_made(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="file/run cannot be written .*check the room and the permissions"):
        evaluate("count", world["questions"], tmp_path / "file" / "run", annotations=world["annotations"])


def test_two_processes_do_not_share_a_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    script = f"""
from pathlib import Path
from sigma_book.answers import answer_examples
from sigma_book.data import Example
example = Example(b"", "caption", "a", "row", ("a",))
answer_examples("caption", [example], lambda rows: ["a"], {str(path)!r})
"""

    def second_process(examples):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "answers.jsonl is in use by another process" in done.stderr
        return echo(examples)

    answer_examples("caption", rows(2), second_process, path)
    assert len(said_in(path)) == 2


def test_answers_before_an_error_stand_and_the_error_names_its_row(tmp_path):
    path = tmp_path / "answers.jsonl"
    broken = [*rows(5), Example(tmp_path / "gone.png", "caption", "a", "data.jsonl, line 6", ("a",)), *rows(7)[6:]]

    def opens(examples):
        for example in examples:
            Image.open(example.image) if isinstance(example.image, Path) else None
        return echo(examples)

    with pytest.raises(FileNotFoundError, match=r"data\.jsonl, line 6: .*gone\.png"):
        answer_examples("caption", broken, opens, path, batch_size=2)
    assert [index for index, _ in said_in(path)] == [0, 1, 2, 3]
    broken[5] = rows(6)[5]
    answer_examples("caption", broken, opens, path, batch_size=2)
    assert [index for index, _ in said_in(path)] == list(range(7))


@pytest.mark.parametrize("answers", [(), ("",), (" ", "")])
def test_without_a_true_answer_it_stops(tmp_path, answers):
    nothing = [Example(Image.new("RGB", (8, 8)), "caption", "", "data.jsonl, line 1", answers)]
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: there is no true answer"):
        answer_examples("caption", nothing, echo, tmp_path / "answers.jsonl")


def test_odd_texts_survive(tmp_path):
    texts = ["", "two\nlines", "\u2028", "ü 😀", "\ud83d", '"', "<b>&amp;", "\x00"]
    path = tmp_path / "answers.jsonl"
    records = answer_examples("caption", rows(len(texts)), lambda examples: texts[: len(examples)], path)
    assert [record["answer"] for record in records] == texts
    scores, cases = score_answers("caption", records)
    assert scores["asked"] == len(texts)
    page = worst_page("caption", cases, "<title>")
    assert "<b>&amp;" not in page and "&lt;b&gt;&amp;amp;" in page and "<h1>&lt;title&gt;" in page


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """What the process holds after 200 answers and after 2,000, with a stub in place of a model."""
    script = """
import re, sys
from pathlib import Path
from sigma_book.data import read_examples
from sigma_book.answers import answer_examples, write_world_files
files = write_world_files(sys.argv[1], 2000)
examples = read_examples(files["captions"], per_image=True)
held, asked = {}, 0
def stub(examples):
    global asked
    from sigma_book.processor import load_image
    pictures = [load_image(example.image) for example in examples]
    asked += len(pictures)
    if asked in (200, 2000):
        held[asked] = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return [f"a red star {place:9,}" * 1000 for place, _ in enumerate(pictures)]  # 20 kB each: 36 MB, if they were kept
answer_examples("caption", examples, stub, sys.argv[1] + "/answers.jsonl", batch_size=20)
print(held[200], held[2000])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    early, late = map(float, done.stdout.split())
    assert late < 1.03 * early, (early, late)


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "sigma_book.cli", "evaluate", *map(str, arguments)]


def run_killed(arguments: list, path: Path, lines: int) -> bool:
    """Start the real command, wait until so many answers are on the disk, and kill it. Whether it was still running."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    return process.wait() == -signal.SIGKILL


def check_kills(world, model: Path, tmp_path: Path, kills: int) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    files = (world["questions"], world["annotations"])
    evaluate("vqa", files[0], whole, annotations=files[1], model=model, batch_size=2, max_new_tokens=3)
    expected = said_in(whole / "answers.jsonl")
    arguments = ["--task", "vqa", "--data", files[0], "--annotations", files[1], "--model", model, "--out", out]
    arguments += ["--batch-size", 2, "--max-new-tokens", 3]
    rng, killed = random.Random(0), 0
    for kill in range(1, kills + 1):
        least = len(expected) * kill // (kills + 2)
        killed += run_killed(arguments, out / "answers.jsonl", max(1, least + rng.randint(-1, 1)))
        with (out / "answers.jsonl").open("ab") as file:  # a line may be torn anywhere
            file.write(b'{"index": 99999, "ans'[: rng.randint(0, 20)])
    assert killed == kills, "every process was killed while it ran"
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said_in(out / "answers.jsonl") == expected
    ours, theirs = (json.loads((folder / "scores.json").read_text()) for folder in (out, whole))
    assert ours.pop("speed").keys() == theirs.pop("speed").keys()
    assert ours == theirs


def test_a_kill_of_the_real_command(world, tiny_folder, tmp_path):
    check_kills(world, tiny_folder, tmp_path, 1)


@pytest.mark.slow
def test_twenty_kills_of_the_real_command(world, tiny_folder, tmp_path):
    check_kills(world, tiny_folder, tmp_path, 20)


def test_the_command_prints_a_table_and_writes_its_files(world, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", "--task", "count", "--data", str(world["questions"]), "--out", str(out), "--official"]
    arguments += ["--annotations", str(world["annotations"]), "--num-examples", "24"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert " ".join(printed.splitlines()[0].split()) == "true number asked exact within one mean error no number"
    assert "answers a second" in printed and "peak memory" in printed
    scores = json.loads((out / "scores.json").read_text())
    assert 0 < scores["asked"] < 24  # only some of the questions are of how many
    assert scores["exact"] > 0.8  # the pocket model counts
    assert {"latency_mean", "latency_median", "latency_p95", "answers_per_second", "peak_megabytes"} == set(
        scores["speed"]
    )
    results = json.loads((out / "results.json").read_text())
    assert {frozenset(row) for row in results} == {frozenset(("question_id", "answer"))} and len(results) == scores[
        "asked"
    ]
    first = said_in(out / "answers.jsonl")
    arguments[-1] = "48"  # more of the same data goes on, and the old answers stay
    assert main(arguments) == 0
    assert said_in(out / "answers.jsonl")[: len(first)] == first
    arguments[-1] = "24"  # and fewer are a part of them
    assert main(arguments) == 0
    assert json.loads((out / "scores.json").read_text())["asked"] == scores["asked"]
    assert score_table("count", scores).splitlines()[0] == printed.splitlines()[0]


def test_captions_and_boxes_of_plain_rows(world, tmp_path):
    """JSONL rows in place of official files; the true boxes stand in the suffix."""
    for task, form, key, least in (("caption", "captions", "CIDEr", 3.0), ("detect", "instances", "AP50", 0.6)):
        options = {"per_image": True} if task == "caption" else {}
        lines = []
        for example in read_examples(world[form], **options)[:8]:
            lines.append(json.dumps({"image": str(example.image), "prefix": example.prefix, "suffix": example.suffix}))
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
        scores = evaluate(task, tmp_path / f"{task}.jsonl", tmp_path / task)
        assert scores["asked"] == 8 and scores[key] > least, scores


def test_a_row_s_own_boxes_are_not_the_truth(world, tiny_folder, tmp_path):
    """Keys of these names may hold anything; what the row says of boxes stands in its suffix, and must be readable."""
    example, out = read_examples(world["instances"])[0], tmp_path / "out"
    row = {"image": str(example.image), "prefix": example.prefix, "suffix": example.suffix, "boxes": [[0.1, 0.2, 1, 1]]}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps(
            row | {"height": "tall", "width": 9, "labels": [], "annotation_ids": [7], "suffix": f"{example.suffix} ;"}
        )
    )
    evaluate("detect", path, out, model=tiny_folder, max_new_tokens=1)
    (record,) = AnswerFile(out / "answers.jsonl")
    assert record["size"] == [112, 112] and record["labels"] == example.facts["labels"]
    for box, true in zip(record["boxes"], example.facts["boxes"], strict=True):
        assert box == pytest.approx(true, abs=0.2)
    path.write_text(json.dumps(row | {"suffix": "<loc0100><loc0100><loc0500> red star"}))
    with pytest.raises(ValueError, match=r"line 1: the true answer cannot be read: .*3 loc tokens"):
        evaluate("detect", path, tmp_path / "second", model=tiny_folder, max_new_tokens=1)
    assert not said_in(tmp_path / "second" / "answers.jsonl")


def test_a_file_of_captions_is_read_through_once(world, tiny_folder, tmp_path, monkeypatch):
    """COCO's are hundreds of megabytes. Once to index it; its checksum is another matter."""
    read, index = [], data.index_document
    monkeypatch.setattr(data, "index_document", lambda path: read.append(path) or index(path))
    evaluate("caption", world["captions"], tmp_path / "out", model=tiny_folder, num_examples=1, max_new_tokens=1)
    assert read == [world["captions"]]
    assert len(list(AnswerFile(tmp_path / "out" / "answers.jsonl"))[0]["answers"]) == 5


def test_the_page_shows_the_worst_cases_with_their_pictures(world, tiny_folder, tmp_path):
    evaluate("detect", world["instances"], tmp_path / "out", model=tiny_folder, num_examples=6, max_new_tokens=8)
    page = (tmp_path / "out" / "worst.html").read_text()
    assert page.count("<figure>") == 6 and page.count("data:image/jpeg;base64,") == 12
    assert "mean IoU 0.00" in page


@pytest.mark.browser
def test_a_browser_shows_the_page(world, tiny_folder, tmp_path):
    from selenium import webdriver

    evaluate("caption", world["captions"], tmp_path / "out", model=tiny_folder, num_examples=6, max_new_tokens=8)
    options = webdriver.ChromeOptions()
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(switch)
    browser = webdriver.Chrome(options=options)
    try:
        browser.get((tmp_path / "out" / "worst.html").as_uri())
        sizes = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
        assert len(sizes) == 6 and min(sizes) > 0
    finally:
        browser.quit()


# --- what does not fit ------------------------------------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("sigma-book: ") == 1 and "Traceback" not in captured.err
    return captured.err


def test_a_folder_with_another_run_is_refused(world, tiny_folder, tmp_path, capsys):
    base = ["--data", world["captions"], "--out", tmp_path / "out", "--max-new-tokens", 2, "--num-examples", 2]
    first = ["--task", "caption", *base, "--model", tiny_folder]
    assert main(["evaluate", *map(str, first)]) == 0
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    capsys.readouterr()
    assert "holds a run with model = " in refused(capsys, "--task", "caption", *base)
    other = [world["instances"] if value is world["captions"] else value for value in first]
    other[1] = "detect"
    assert "holds a run with task = 'caption', this one has 'detect'" in refused(capsys, *other)
    longer = [
        3 if value == 2 and first[place - 1] == "--max-new-tokens" else value for place, value in enumerate(first)
    ]
    assert "max_new_tokens = 2, this one has 3" in refused(capsys, *longer)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before
    (tmp_path / "out" / "run.json").unlink()
    assert "no run.json" in refused(capsys, *first)
    (tmp_path / "out" / "run.json").write_text("{")
    assert "run.json is broken" in refused(capsys, *first)
    with pytest.raises(ValueError, match="is a file"):
        claim_folder(world["captions"], {})


def test_a_second_process_leaves_the_folder_as_it_is(world, tiny_folder, tmp_path, capsys, at_work):
    """The first is still loading its model: it has no answer yet, and a lock."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    arguments = ("--task", "caption", "--data", world["captions"], "--out", out, "--model", tiny_folder)
    with at_work(out):
        assert "another process is at work in" in refused(capsys, *arguments)
    assert (out / "run.json").read_text() == "{}"
    assert sorted(path.name for path in out.iterdir()) == [".lock", "run.json"]


def test_data_that_do_not_fit_the_task(world, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    said = refused(capsys, "--task", "caption", "--data", world["instances"], *out)
    assert "instances_val2014.json is of the form coco-detect, which the task caption cannot use" in said
    assert "give the file with their answers" in refused(capsys, "--task", "vqa", "--data", world["questions"], *out)
    assert "task is 'read'" in refused(capsys, "--task", "read", "--data", world["questions"], *out)
    assert "no such file" in refused(capsys, "--task", "vqa", "--data", tmp_path / "none.json", *out)
    wrong = ("--task", "caption", "--data", world["captions"], *out)
    assert "batch_size" in refused(capsys, *wrong, "--batch-size", 0)
    assert "num_examples" in refused(capsys, *wrong, "--num-examples", 0)
    assert not (tmp_path / "out").exists()


def test_an_image_id_without_an_image(world_copy, tiny_folder, tmp_path, capsys):
    content = json.loads(world_copy["captions"].read_text())
    del content["images"][3]
    world_copy["captions"].write_text(json.dumps(content))
    arguments = ["--task", "caption", "--data", world_copy["captions"], "--out", tmp_path / "out", "--batch-size", 1]
    arguments += ["--model", tiny_folder, "--max-new-tokens", 2]
    said = refused(capsys, *arguments)
    assert "image 4" in said and "has no entry in 'images'" in said
    assert [index for index, _ in said_in(tmp_path / "out" / "answers.jsonl")] == [0, 1, 2]


def test_empty_references(world_copy, tiny_folder, tmp_path, capsys):
    content = json.loads(world_copy["annotations"].read_text())
    content["annotations"][0]["answers"] = []
    world_copy["annotations"].write_text(json.dumps(content))
    files = ("--data", world_copy["questions"], "--annotations", world_copy["annotations"], "--model", tiny_folder)
    assert "empty list" in refused(capsys, "--task", "vqa", *files, "--out", tmp_path / "out")


@pytest.fixture
def results(world, tmp_path):
    """A results file of captions that are right, and the arguments that score it."""
    rows = {}
    for row in json.loads(world["captions"].read_text())["annotations"]:
        rows.setdefault(row["image_id"], row["caption"])
    path = tmp_path / "results.json"
    content = [{"image_id": key, "caption": text} for key, text in rows.items()]
    path.write_text(json.dumps(content))
    arguments = ["--task", "caption", "--data", world["captions"], "--out", tmp_path / "out", "--answers", path]
    return path, content, arguments


def test_answers_of_others_are_scored_without_a_model_or_pictures(results, world_copy, capsys):
    path, content, arguments = results
    shutil.rmtree(world_copy["captions"].parent.parent / "val2014")
    arguments[3] = world_copy["captions"]
    path.write_text(json.dumps(content[::-1]))  # in any order
    assert main(["evaluate", *map(str, arguments)]) == 0
    table = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    assert table["asked"] == "40" and table["exact"] == "100.0%" and table["BLEU-4"] == "1.000"


def test_answers_of_others_that_do_not_fit(results, capsys):
    path, content, arguments = results
    for change, sentence in (
        (
            content + [{"image_id": 99, "caption": "x"}],
            "answers 1 that the data does not ask for, the first is image_id 99",
        ),
        (content + content[:1], f"entry 41: image_id {content[0]['image_id']} stands twice"),
        (content[1:], f"no answer for 1 of the examples, the first is image_id {content[0]['image_id']}"),
        ([{"image_id": 1}], "entry 1 is"),
        ({"a": 1}, "holds a dict"),
        ([], "no answer for 40"),
    ):
        path.write_text(json.dumps(change))
        assert sentence in refused(capsys, *arguments)
    path.write_text("[{")
    assert "is not JSON" in refused(capsys, *arguments)
    path.unlink()
    assert "no such file" in refused(capsys, *arguments)
    arguments[1] = "detect"
    arguments[3] = Path(arguments[3]).with_name("instances_val2014.json")
    assert "not for detect" in refused(capsys, *arguments)
    assert not os.path.exists(arguments[5])


def test_counts_go_out_and_come_back(world, tiny_folder, tmp_path, capsys):
    """Answers to the counting questions alone are enough for the task count; what is wrong in a file is told."""
    base = ["--task", "count", "--data", world["questions"], "--annotations", world["annotations"]]
    first = [*base, "--out", tmp_path / "out", "--model", tiny_folder, "--max-new-tokens", 2, "--official"]
    assert main(["evaluate", *map(str, first)]) == 0
    path = tmp_path / "out" / "results.json"
    again = [*base, "--out", tmp_path / "again", "--answers", path]
    assert main(["evaluate", *map(str, again)]) == 0
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("out", "again")]
    assert scores[0] | {"speed": {}} == scores[1]
    capsys.readouterr()
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"question_id": str(row["question_id"])} for row in rows]))
    assert "its ids are texts, the data's are numbers" in refused(capsys, *again)
    path.write_text(json.dumps([row | {"answer": 2} for row in rows]))
    assert "entry 1: answer is 2, it must be a text" in refused(capsys, *again)


def test_nothing_to_count_and_too_few_to_agree(world, tiny_folder, tmp_path, capsys):
    picture = str(read_examples(world["captions"])[0].image)
    row = {"image": picture, "question": "which colour?", "answer": ["red", "red", "blue"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    base = ["--data", tmp_path / "rows.jsonl", "--model", tiny_folder, "--max-new-tokens", 1]
    base += ["--out", tmp_path / "out"]
    said = refused(capsys, "--task", "count", *base)
    assert "none of the examples" in said and "asks for a number" in said and "'how many'" in said
    assert "none of the first 1 examples" in refused(capsys, "--task", "count", *base, "--num-examples", 1)
    assert main(["evaluate", "--task", "vqa", *map(str, base)]) == 0, "nothing was written, so the folder is free"
    assert "questions with two or three true answers: 1; their accuracy cannot reach 1" in capsys.readouterr().err


def test_official_answers_need_official_data(world, tiny_folder, tmp_path, capsys):
    example = read_examples(world["captions"])[0]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": str(example.image), "text": "a star"}))
    base = ["--task", "caption", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--model", tiny_folder]
    assert "rows.jsonl, line 1 has no image_id" in refused(capsys, *base, "--max-new-tokens", 2, "--official")
    assert len(said_in(tmp_path / "out" / "answers.jsonl")) == 1, "the answer is not lost"


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes are limited by the shell")
def test_a_full_disk_is_told_and_nothing_is_lost(world, tiny_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--task", "caption", "--data", world["captions"], "--out", out, "--model", tiny_folder]
    arguments += ["--max-new-tokens", 2, "--num-examples", 12, "--batch-size", 4]
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "limited", *command(*arguments)]  # files of 4 kB at most
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2 and "answers.jsonl: File too large" in done.stderr and "Traceback" not in done.stderr
    answered = (out / "answers.jsonl").read_bytes().count(b"\n")
    assert 0 < answered < 12
    before = said_in_whole_lines(out / "answers.jsonl")
    scores = evaluate(
        "caption", world["captions"], out, model=tiny_folder, max_new_tokens=2, num_examples=12, batch_size=4
    )
    assert scores["asked"] == 12 and said_in(out / "answers.jsonl")[:answered] == before


def said_in_whole_lines(path: Path) -> list[tuple[int, str]]:
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [(record["index"], record["answer"]) for record in map(json.loads, lines)]
