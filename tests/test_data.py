"""Examples and batches: what files say, what is learned of it, in which order, how often, and what happens to what is broken."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from transformers import AutoProcessor

from sigma_book import data, load
from sigma_book.answers import answer_examples, score_answers
from sigma_book.batches import Batches, collate, draw_lengths, epoch_order, survey, token_counts, write_survey
from sigma_book.cli import main
from sigma_book.data import Example, index_document, index_lines, read_examples, read_mask
from sigma_book.locate import MASKS_VARIABLE, MaskVAE, load_mask_vae, parse
from sigma_book.processor import Processor
from sigma_book.world import draw_scene, make_scene


@pytest.fixture(scope="module")
def processor():
    return load().processor


@pytest.fixture(scope="module")
def small(processor):
    """The pocket's tokenizer, but only four picture tokens: quick."""
    return Processor(processor.tokenizer, 28, 4)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A folder with twelve drawn pictures, 0.png to 11.png. To read, not to write."""
    folder = tmp_path_factory.mktemp("gallery")
    for seed in range(12):
        draw_scene(make_scene(seed)).save(folder / f"{seed}.png")
    return folder


def examples(count: int) -> list[Example]:
    picture = draw_scene(make_scene(1))
    return [
        Example(picture, f"caption {index}", "a red star" + " and a ring" * (index % 3), f"row {index}")
        for index in range(count)
    ]


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# one batch


def test_labels_stand_on_the_suffix_and_nowhere_else(processor):
    batch = collate(processor, examples(3))
    assert torch.equal(batch.labels != -100, (batch.token_type_ids == 1) & (batch.attention_mask == 1))
    for row, example in zip(batch.labels, examples(3), strict=True):
        learned = row[row != -100].tolist()
        assert learned[-1] == processor.tokenizer.eos_id
        assert processor.tokenizer.decode(learned) == example.suffix


def test_padding_stands_on_the_right(processor):
    batch = collate(processor, examples(3))
    lengths = batch.attention_mask.sum(1)
    assert lengths.min() < lengths.max()
    for real, length in zip(batch.attention_mask, lengths, strict=True):
        assert real.tolist() == [1] * int(length) + [0] * (len(real) - int(length))


@pytest.fixture(scope="module")
def reference():
    return AutoProcessor.from_pretrained(Path(data.__file__).parent / "pocket_model")


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=12)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=4))
def test_batches_are_those_of_transformers(processor, reference, rows):
    """Ids, types, mask and labels are equal; the reference's labels at padding are not compared, ours are -100."""
    picture = draw_scene(make_scene(2))
    ours = collate(processor, [Example(picture, prefix, suffix) for prefix, suffix in rows])
    theirs = reference(
        images=[picture] * len(rows),
        text=[f"<image>{prefix}" for prefix, _ in rows],
        suffix=[suffix for _, suffix in rows],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    real = ours.attention_mask == 1
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.token_type_ids[real], theirs["token_type_ids"][real])
    assert torch.equal(ours.labels[real], theirs["labels"][real])
    assert (ours.labels[~real] == -100).all()


def test_pictures_may_be_paths_and_come_out_the_same(processor, gallery):
    """Shrinking a picture before the processor does changes no number."""
    from_path = collate(processor, [Example(gallery / "3.png", "x", "y"), Example(str(gallery / "4.png"), "x", "y")])
    opened = [Image.open(gallery / name).convert("RGB") for name in ("3.png", "4.png")]
    expected = processor.prepare(opened, ["x", "x"], ["y", "y"])
    assert torch.equal(from_path.pixel_values, expected.pixel_values)
    large = Image.effect_noise((300, 200), 90).convert("RGB")
    ours = collate(processor, [Example(large, "x", "y")]).pixel_values
    assert torch.equal(ours, processor.prepare([large], ["x"], ["y"]).pixel_values)


def test_no_example_and_no_answer_are_refused(processor):
    with pytest.raises(ValueError, match="at least one"):
        collate(processor, [])
    with pytest.raises(ValueError, match="t.jsonl, line 2: prompt 'a <image> b' contains <image>"):
        collate(processor, [Example(draw_scene(make_scene(1)), "a <image> b", "x", "t.jsonl, line 2")])
    with pytest.raises(ValueError, match="t.jsonl, line 2: suffix 'a <image> b' contains <image>"):
        collate(processor, [Example(draw_scene(make_scene(1)), "x", "a <image> b", "t.jsonl, line 2")])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 17: the answer is empty"):
        collate(processor, [Example(draw_scene(make_scene(1)), "x", "", "train.jsonl, line 17")])


# the rule for length


def test_what_does_not_fit_is_an_error_with_counts(small):
    example = Example(draw_scene(make_scene(1)), "caption en", "a red star and a blue ring", "t.jsonl, line 3")
    picture, prompt, answer = token_counts(small, example)
    total = picture + prompt + answer
    assert collate(small, [example], max_length=total).input_ids.shape == (1, total)
    with pytest.raises(ValueError) as error:
        collate(small, [example], max_length=total - 1)
    said = str(error.value)
    assert said.startswith("t.jsonl, line 3: ") and f"{picture} tokens of picture, {prompt} of prompt" in said
    assert f"{answer} of answer" in said and f"fit into {total - 1}" in said


@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, answer=TEXTS.filter(bool), words=st.integers(1, 30), room=st.integers(2, 30))
def test_a_cut_row_fits_and_keeps_the_beginnings(small, prompt, answer, words, room):
    prompt, answer = prompt * (words % 7), answer * words
    example = Example(draw_scene(make_scene(1)), prompt, answer)
    limit = small.num_image_tokens + 2 + room  # picture, bos, newline, then text
    whole, cut = collate(small, [example]), collate(small, [example], max_length=limit, truncate=True)
    if whole.input_ids.shape[1] <= limit:
        assert torch.equal(whole.input_ids, cut.input_ids)
        return
    assert cut.input_ids.shape[1] <= limit
    full, kept = (batch.labels[batch.labels != -100].tolist() for batch in (whole, cut))
    assert kept == full[: len(kept)]
    assert len(kept) >= min(len(full), room // 2) >= 1  # an answer never has less than half of the room
    newline = small.tokenizer.encode("\n")
    before = cut.input_ids[0][cut.labels[0] == -100].tolist()
    assert before[-len(newline) :] == newline or not prompt
    assert (cut.token_type_ids[0] == 0).sum() == len(before)


@pytest.mark.parametrize(
    ("prompt", "answer", "room", "kept"),
    [
        (30, 30, 20, (10, 10)),  # half for each
        (30, 5, 20, (14, 6)),  # what the answer does not need is the prompt's
        (4, 30, 20, (4, 16)),  # and the other way round
        (30, 30, 21, (11, 10)),
        (19, 1, 20, (18, 2)),  # the end token of an answer counts
    ],
)
def test_prompt_and_answer_share_the_room(small, prompt, answer, room, kept):
    """In words of one token each; the answer's end token is one more."""
    encode = small.tokenizer.encode
    texts = [" ".join(["red"] * words) for words in (prompt, answer)]
    assert [len(encode(text)) for text in texts] == [prompt, answer] and len(encode(texts[0] + "\n")) == prompt + 1
    limit = small.num_image_tokens + 2 + room
    batch = collate(small, [Example(draw_scene(make_scene(1)), *texts)], max_length=limit, truncate=True)
    learned = (batch.labels != -100).sum().item()
    given = batch.attention_mask.sum().item() - learned - small.num_image_tokens - 2
    assert (given, learned) == kept


@pytest.mark.parametrize("prompt", ["🦊" * 9, "name 🦊 and 🦔"])
def test_a_cut_prompt_holds_whole_letters(small, prompt):
    """A letter that the vocabulary lacks is several tokens, one for each byte."""
    assert len(small.tokenizer.encode("🦊")) > 2
    example = Example(draw_scene(make_scene(1)), prompt, "a red star and a blue ring")
    for room in range(2, 16):
        cut = collate(small, [example], max_length=small.num_image_tokens + 2 + room, truncate=True)
        text = small.tokenizer.decode(cut.input_ids[0][cut.labels[0] == -100].tolist())
        assert "\ufffd" not in text and prompt.startswith(text.removesuffix("\n"))


def test_where_there_is_no_room_for_text_nothing_is_cut(small):
    example = Example(draw_scene(make_scene(1)), "caption en", "a red star")
    with pytest.raises(ValueError, match="leave no room for text"):
        collate(small, [example], max_length=small.num_image_tokens + 2, truncate=True)


def test_truncated_rows_are_named_and_counted_once(small, gallery, tmp_path):
    rows = [{"image": "1.png", "text": "a red star " * (30 if index % 3 == 0 else 1)} for index in range(9)]
    found = read_examples(write_rows(tmp_path / "t.jsonl", rows), root=gallery)
    stopping = Batches(found, small, 2, seed=0, epochs=1, max_length=40)
    with pytest.raises(ValueError, match=r"t\.jsonl, line [147]: .* do not fit into 40"):
        list(stopping)
    cutting = Batches(found, small, 2, seed=0, epochs=3, max_length=40, truncate=True)
    named = [where for made in cutting for where in made.truncated]
    assert sorted(named) == sorted(f"t.jsonl, line {line}" for line in (1, 4, 7) * 3)
    assert cutting.num_truncated == 3


# lines


LINES = st.lists(
    st.one_of(
        st.sampled_from(["", "   ", "\t"]),
        st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=2).map(json.dumps),
        st.dictionaries(st.text(max_size=5), st.integers(), max_size=2).map(
            lambda row: " " + json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode()
        ),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    lines=LINES, end=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), mark=st.booleans(), size=st.integers(1, 40)
)
def test_lines_are_found_as_python_finds_them(tmp_path_factory, lines, end, last, mark, size):
    """Whatever the ends of lines, blank lines, a mark in front, and where the pieces that are read end."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = (end.join(lines) + (end if last else "")).encode()
    path.write_bytes(b"\xef\xbb\xbf" * mark + content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_BYTES_AT_ONCE", size)
        table = index_lines(path)
    expected = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    assert table.columns["line"].tolist() == [number for number, _ in expected]
    assert table.rows(range(len(table))) == [json.loads(line) for _, line in expected]
    assert table.columns["line"].dtype == table.starts.dtype == np.int64


def test_a_file_that_changes_is_noticed(gallery, tmp_path, small):
    path = write_rows(tmp_path / "t.jsonl", [{"image": "1.png", "text": f"{i}"} for i in range(8)])
    found = read_examples(path, root=gallery)
    running = iter(Batches(found, small, 2, seed=0, on_error="skip", skipped=tmp_path / "skipped.jsonl"))
    next(running)
    write_rows(path, [{"image": "1.png", "text": "another"}])
    with pytest.raises(RuntimeError, match="was changed while it was in use"):
        next(running)  # also where broken rows are skipped: this is no broken row


def test_a_file_that_cannot_be_read_now_is_no_broken_row(gallery, tmp_path, small, monkeypatch):
    path = write_rows(tmp_path / "t.jsonl", [{"image": "1.png", "text": f"{i}"} for i in range(8)])
    found = read_examples(path, root=gallery)
    made = Batches(found, small, 2, seed=0, on_error="skip", skipped=tmp_path / "skipped.jsonl")
    usual = Path.open

    def fails(opened, *given, **options):
        if opened == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usual(opened, *given, **options)

    monkeypatch.setattr(Path, "open", fails)
    for read in (lambda: next(iter(made)), lambda: found[0], lambda: survey(found, small)):
        with pytest.raises(RuntimeError, match=r"t\.jsonl cannot be read now \(.+\): check the disk, then go on"):
            read()
    assert made.num_skipped == 0


# rows


def test_the_three_forms_of_rows(gallery, tmp_path):
    cases = {
        "text": ({"text": " a cat \n"}, ("caption en", "a cat", ("a cat",))),
        "prefix": ({"prefix": " say it", "suffix": "now "}, (" say it", "now ", ("now ",))),
        "vqa": ({"question": "how many?\n", "answer": 3}, ("answer en how many?", "3", ("3",))),
    }
    for form, (row, expected) in cases.items():
        row = {"image": "2.png", "id": 7, **row}
        found = read_examples(write_rows(tmp_path / f"{form}.jsonl", [row]), root=gallery)
        example = found[0]
        assert found.form == form
        assert (example.prefix, example.suffix, example.answers) == expected
        assert example.facts["id"] == 7 and example.where == f"{form}.jsonl, line 1"
        assert example.image == gallery / "2.png"
        array = tmp_path / f"{form}.json"
        array.write_text(json.dumps([row, row]))
        listed = read_examples(array, root=gallery)
        assert listed.form == form and len(listed) == 2
        assert (listed[1].prefix, listed[1].suffix, listed[1].answers) == expected
        assert listed[1].where == f"{form}.json, entry 2"


@pytest.mark.parametrize(
    ("answer", "suffix", "answers"),
    [
        (["yes", "no", "no"], "no", ("yes", "no", "no")),
        (["b", "a"], "b", ("b", "a")),
        ([2, 2.5, "x"], "2", ("2", "2.5", "x")),
        ([{"answer": "red", "answer_id": 1}, {"answer": "red"}], "red", ("red", "red")),
        (0, "0", ("0",)),
        ("Zürich 東京 🐈", "Zürich 東京 🐈", ("Zürich 東京 🐈",)),
    ],
)
def test_answers_of_many_kinds(gallery, tmp_path, answer, suffix, answers):
    row = {"image": "1.png", "question": "?", "answer": answer}
    for ascii_only in (True, False):
        path = tmp_path / "t.jsonl"
        path.write_text(json.dumps(row, ensure_ascii=ascii_only), encoding="utf-8")
        example = read_examples(path, root=gallery)[0]
        assert (example.suffix, example.answers) == (suffix, answers)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "1.png", "text": }', "broken JSON"),
        ('{"image": "1.png", "text": "a"', "broken JSON"),
        ('{"image": "1.png", "text": "a"} {}', "broken JSON (Extra data"),
        ("not JSON", "broken JSON"),
        ('["1.png", "a"]', 'found ["1.png", "a"], expected a JSON object'),
        ('"1.png"', 'found "1.png", expected'),
        ('{"image": "1.png"}', "no 'text' in this row, its keys are 'image'"),
        ('{"text": "a"}', "no 'image' in this row"),
        ("{}", "its keys are none"),
        ('{"image": "1.png", "text": null}', "text is null: expected a text"),
        ('{"image": "1.png", "text": true}', "text is true: expected a text"),
        ('{"image": "1.png", "text": {"en": "a"}}', 'text is {"en": "a"}: expected a text'),
        ('{"image": "1.png", "text": NaN}', "text is nan: expected a text"),
        ('{"image": "1.png", "text": "half \\ud83d"}', "text holds half of a letter"),
        ('{"image": "", "text": "a"}', "image is '': expected the path of a picture"),
        ('{"image": null, "text": "a"}', "image is None: expected the path"),
        ('{"image": 7, "text": "a"}', "image is 7: expected the path"),
        ('{"image": ["1.png"], "text": "a"}', "expected the path of a picture"),
        (
            '{"image": "' + "iVBOR" * 2000 + '", "text": "a"}',
            "VBO: expected the path of a picture (File name too",
        ),
        ('{"image": "a\\u0000b", "text": "a"}', "expected the path of a picture"),
        ('{"image": "https://example.com/a.jpg", "text": "a"}', "a URL: download the pictures first"),
        ('{"image": "s3://bucket/a.jpg", "text": "a"}', "a URL: download the pictures first"),
        ('{"image": "data:image/png;base64,iVBO", "text": "a"}', "a URL: download the pictures first"),
        ('{"image": "file:///data/1.png", "text": "a"}', "write the path alone, without file://"),
        ("[" * 100_000, "broken JSON"),
        ('{"image": "1.png", "text": ' + "9" * 5000 + "}", "broken JSON (Exceeds the limit"),
        ('{"image": "1.png", "text": "\xe4"}', "not UTF-8"),
    ],
)
def test_a_broken_row_is_named_with_its_line(gallery, tmp_path, line, words):
    path = tmp_path / "t.jsonl"
    good = b'{"image": "1.png", "text": "a"}\n'
    path.write_bytes(good + b"\n" + line.encode("latin-1") + b"\n" + good)
    found = read_examples(path, root=gallery)
    assert len(found) == 3 and found[0].suffix == found[2].suffix == "a"
    with pytest.raises(ValueError) as error:
        found[1]
    said = str(error.value)
    assert said.startswith("t.jsonl, line 3: ") and words in said and "\n" not in said


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?", "answer": []}, "answer is an empty list"),
        ({"question": "?", "answer": None}, "answer is null"),
        ({"question": "?", "answer": [{"text": "x"}]}, "answer is null"),
        ({"question": ["?"], "answer": "x"}, 'question is ["?"]: expected a text'),
        ({"question": "?", "answer": False}, "answer is false"),
    ],
)
def test_broken_questions(gallery, tmp_path, row, words):
    good = {"image": "1.png", "question": "?", "answer": "x"}
    path = write_rows(tmp_path / "t.jsonl", [good, {"image": "1.png", **row}])
    with pytest.raises(ValueError) as error:
        read_examples(path, root=gallery)[1]
    assert str(error.value).startswith("t.jsonl, line 2: ") and words in str(error.value)


@pytest.mark.parametrize("name", ["deep/er/a b/ö.png", "deep\\er\\a b\\ö.png", "./deep/../deep/er/a b/ö.png"])
def test_paths_in_nested_folders_and_from_windows(tmp_path, gallery, processor, name):
    nested = tmp_path / "deep/er/a b"
    nested.mkdir(parents=True)
    (nested / "ö.png").write_bytes((gallery / "1.png").read_bytes())
    found = read_examples(write_rows(tmp_path / "t.jsonl", [{"image": name, "text": "x"}]))
    assert found[0].image.samefile(nested / "ö.png")
    collate(processor, found[:1])


def test_absolute_paths_and_roots(tmp_path, gallery):
    rows = [{"image": str(gallery / "1.png"), "text": "x"}, {"image": "1.png", "text": "x"}]
    path = write_rows(tmp_path / "t.jsonl", rows)
    found = read_examples(path)
    assert found[0].image == gallery / "1.png"
    assert found[1].image == tmp_path / "1.png"  # missing: said when a batch is made
    assert [example.image for example in read_examples(path, root=gallery)] == [gallery / "1.png"] * 2


@pytest.mark.parametrize(
    ("content", "error"), [(None, FileNotFoundError), (b"", ValueError), (b"no picture", ValueError)]
)
def test_a_missing_or_broken_picture_is_named_with_its_line(tmp_path, processor, content, error):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    found = read_examples(write_rows(tmp_path / "t.jsonl", [{"image": "a.png", "text": "x"}]))
    with pytest.raises(error, match=r"t\.jsonl, line 1: .*a\.png"):
        collate(processor, found[:])


# files that are one JSON object


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"id": st.integers(0, 2**53), "image_id": st.one_of(st.integers(0, 99), st.sampled_from(["a", "ö", "東京"]))},
        optional={"x": JSON_VALUES},
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@case({}, {"": 1.0}, None, True, 28)  # the first look ends behind "1.", those below behind "1e" and "1e-"
@case({}, {"": 1e-9}, None, True, 28)
@case({}, {"": 1e-9}, None, True, 32)
@given(
    arrays=st.dictionaries(st.sampled_from(["images", "annotations", "questions", "other"]), ENTRIES, max_size=4),
    plain=st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    size=st.integers(8, 200),
)
def test_the_index_of_a_document_gives_what_json_gives(tmp_path_factory, arrays, plain, indent, ascii_only, size):
    path = tmp_path_factory.mktemp("document") / "a.json"
    text = json.dumps(plain | arrays, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_BYTES_AT_ONCE", size)
        tables, found = index_document(path)
    known = {name: rows for name, rows in arrays.items() if name != "other"}
    assert {name: table.rows(range(len(table))) for name, table in tables.items()} == known
    for name, rows in known.items():
        for key in data._COLUMNS[name]:
            kept, wanted = tables[name].columns[key], [row.get(key) for row in rows]
            assert kept.tolist() == ([str(value) for value in wanted] if kept.dtype.kind == "U" else wanted)
    assert found == {name: value for name, value in plain.items() if isinstance(value, str | int | float)}


@pytest.mark.parametrize("cut", [1, 5, 40, 90])
def test_a_document_that_is_cut_off(tmp_path, gallery, cut):
    path = coco_files(tmp_path, gallery)["captions"]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * cut // 100 or 2])
    with pytest.raises(ValueError, match=r"captions_val2014\.json"):
        read_examples(path)
    path.write_bytes(content + b"{}")
    with pytest.raises(ValueError, match="something follows the end"):
        read_examples(path)


def coco_files(folder: Path, gallery: Path) -> dict[str, Path]:
    """The drawn world in the official layouts: annotations/*.json and val2014/*.jpg, ids that are not places."""
    rng = np.random.default_rng(0)
    (folder / "val2014").mkdir()
    (folder / "annotations").mkdir()
    images, captions, instances, questions, answers = [], [], [], [], []
    for seed in range(12):
        scene, image_id = make_scene(seed), 1000 - 7 * seed
        name = f"COCO_val2014_{image_id:012d}.jpg"
        Image.open(gallery / f"{seed}.png").save(folder / "val2014" / name)
        images.append({"license": 3, "file_name": name, "height": 112, "width": 112, "id": image_id})
        for number in range(5):
            captions.append({"image_id": image_id, "id": 50 + len(captions), "caption": f"{number} of {seed}. "})
        for thing in scene.things:
            top, left, bottom, right = thing.box
            drawn = np.zeros((112, 112), np.uint8)
            drawn[top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.7
            packed = coco_mask.encode(np.asfortranarray(drawn))
            kinds = (
                [[left, top, right, top, right, bottom, left, bottom], [left, top, right, top, left, bottom]],
                {"size": [112, 112], "counts": packed["counts"].decode()},
                {"size": [112, 112], "counts": counts_of(drawn)},
            )
            entry = {"id": 900 + 3 * len(instances), "image_id": image_id, "iscrowd": int(len(instances) % 11 == 5)}
            entry |= {"category_id": 10 * (1 + len(thing.shape)), "bbox": [left, top, right - left, bottom - top]}
            instances.append(entry | {"segmentation": kinds[len(instances) % 3], "area": int(drawn.sum())})
        question_id = 10 * image_id + 1
        questions.append({"image_id": image_id, "question": f"how many in {seed}?", "question_id": question_id})
        given = ["3", "three", "3"] + [str(seed)] * 7
        answers.append(
            {
                "question_type": "how many",
                "multiple_choice_answer": str(seed),
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                    for number, answer in enumerate(given)
                ],
                "image_id": image_id,
                "answer_type": "number",
                "question_id": question_id,
            }
        )
    rng.shuffle(captions), rng.shuffle(instances), rng.shuffle(answers)
    categories = [
        {"supercategory": "thing", "id": number, "name": f"thing {number}"}
        for number in sorted({entry["category_id"] for entry in instances})
    ]
    about = {"info": {"year": 2014, "description": "drawn – gezeichnet"}, "licenses": [{"id": 3}]}
    contents = {
        "captions": ("annotations/captions_val2014.json", {"images": images, "annotations": captions}),
        "instances": (
            "annotations/instances_val2014.json",
            {"images": images, "annotations": instances, "categories": categories},
        ),
        "questions": (
            "v2_OpenEnded_mscoco_val2014_questions.json",
            {"data_type": "mscoco", "data_subtype": "val2014", "questions": questions},
        ),
        "answers": (
            "v2_mscoco_val2014_annotations.json",
            {"data_type": "mscoco", "data_subtype": "val2014", "annotations": answers},
        ),
    }
    for name, content in contents.values():
        (folder / name).write_text(json.dumps({**about, **content}, ensure_ascii=False), encoding="utf-8")
    return {key: folder / name for key, (name, _) in contents.items()}


def counts_of(mask: np.ndarray) -> list[int]:
    """Runs written plainly: down the columns, outside first."""
    runs, inside = [0], 0
    for value in mask.T.reshape(-1).tolist():
        if value != inside:
            runs.append(0)
            inside = value
        runs[-1] += 1
    return runs


@pytest.fixture(scope="module")
def official(tmp_path_factory, gallery):
    return coco_files(tmp_path_factory.mktemp("official"), gallery)


@pytest.fixture(scope="module")
def official_api(official, tmp_path_factory):
    return COCO(official["captions"]), COCO(official["instances"])


def test_coco_captions_against_the_official_reader(official, official_api, processor):
    theirs, _ = official_api
    found = read_examples(official["captions"])
    assert found.form == "coco-captions" and len(found) == 60
    for index, (example, row) in enumerate(zip(found, theirs.dataset["annotations"], strict=True)):
        assert example.prefix == "caption en" and example.suffix == row["caption"].strip()
        assert example.where == f"captions_val2014.json, annotation {index + 1}"
        assert example.facts["image_id"] == row["image_id"] and example.facts["annotation_id"] == row["id"]
        references = [other["caption"].strip() for other in theirs.imgToAnns[row["image_id"]]]
        assert list(example.answers) == references and len(references) == 5
        assert example.image.name == theirs.imgs[row["image_id"]]["file_name"] and example.image.is_file()
    collate(processor, found[:2])
    whole = read_examples(official["captions"], per_image=True)
    assert len(whole) == 12 == len({example.facts["image_id"] for example in whole})
    assert {example.where for example in whole} == {f"captions_val2014.json, image {number}" for number in theirs.imgs}
    for example in whole:
        assert list(example.answers) == [row["caption"].strip() for row in theirs.imgToAnns[example.facts["image_id"]]]


def wanted_instances(theirs: COCO) -> dict:
    """By picture and category, what the official reader gives without crowds, from left to right."""
    groups: dict = {}
    for row in theirs.dataset["annotations"]:
        if not row["iscrowd"]:
            groups.setdefault((row["image_id"], row["category_id"]), []).append(row)
    return {key: sorted(rows, key=lambda row: (row["bbox"][0], row["bbox"][1])) for key, rows in groups.items()}


def test_coco_instances_against_the_official_reader(official, official_api):
    _, theirs = official_api
    found = read_examples(official["instances"])
    wanted = wanted_instances(theirs)
    assert found.form == "coco-detect" and len(found) == len(wanted)
    crowds = sum(row["iscrowd"] for row in theirs.dataset["annotations"])
    assert crowds and found.remarks == (f"{crowds} crowds (iscrowd) are left aside",)
    assert len({example.where for example in found}) == len(found)
    for example in found:
        rows = wanted.pop((example.facts["image_id"], example.facts["category_id"]))
        label = theirs.cats[rows[0]["category_id"]]["name"]
        assert example.prefix == f"detect {label}" and example.facts["labels"] == [label] * len(rows)
        assert example.facts["annotation_ids"] == [row["id"] for row in rows]
        parts = []
        for row, box in zip(rows, example.facts["boxes"], strict=True):
            x, y, width, height = row["bbox"]
            assert box == [y, x, y + height, x + width]
            bins = [round(place / 112 * 1023) for place in box]
            parts.append("".join(f"<loc{place:04d}>" for place in bins) + f" {label}")
        assert example.suffix == " ; ".join(parts)
        around = [row for row in theirs.imgToAnns[example.facts["image_id"]] if row["iscrowd"]]
        around = [(theirs.cats[row["category_id"]]["name"], *row["bbox"]) for row in around]
        told = [(crowd["label"], crowd["box"]) for crowd in example.facts["crowds"]]
        assert around == [(label, x, y, right - x, bottom - y) for label, (y, x, bottom, right) in told]
        assert example.image.is_file() and json.loads(json.dumps(example.facts)) == example.facts
    assert not wanted


def test_coco_masks_against_the_official_reader(official, official_api):
    """All three ways to write a mask, pixel for pixel, go to the encoder with their boxes, in the answer's order."""
    _, theirs = official_api
    wanted, seen = wanted_instances(theirs), []

    def encode_mask(mask, box):
        seen.append((mask, box))
        return range(len(seen), len(seen) + 16)

    found = read_examples(official["instances"], form="coco-segment", encode_mask=encode_mask)
    ways = set()
    for index in range(len(found)):
        seen.clear()
        example = found[index]
        rows = wanted[example.facts["image_id"], example.facts["category_id"]]
        label = theirs.cats[rows[0]["category_id"]]["name"]
        assert example.prefix == f"segment {label}"
        for number, (row, part, (mask, box)) in enumerate(zip(rows, example.suffix.split(" ; "), seen, strict=True)):
            codes = "".join(f"<seg{code:03d}>" for code in range(number + 1, number + 17))
            assert part[: 4 * len("<loc0000>")].count("<loc") == 4 and part[36:] == f"{codes} {label}"
            assert mask.dtype == torch.bool and np.array_equal(mask, theirs.annToMask(row).astype(bool))
            assert list(box) == example.facts["boxes"][number]
            shape = row["segmentation"]
            ways.add("polygons" if isinstance(shape, list) else type(shape["counts"]).__name__)
    assert ways == {"polygons", "str", "list"}
    with pytest.raises(ValueError, match=r"vae-oid\.npz"):
        read_examples(official["instances"], form="coco-segment")


def test_the_command_writes_segment_examples_through_the_encoder(official, tmp_path, monkeypatch, capsys):
    """With a file of random numbers in big_vision's names: what is written can be read back as boxes and codes."""
    vae = MaskVAE(down=(8, 12, 16, 24), up=(24, 20, 16, 12, 8), code_width=10)
    torch.manual_seed(0)
    for parameter in vae.encoder.parameters():  # without biases, so that it is the mask that decides
        parameter.data = torch.randn_like(parameter) / parameter[0].numel() ** 0.5 * (parameter.dim() > 1)
    vae._vq_vae._embedding.data = 0.2 * torch.randn_like(vae._vq_vae._embedding)
    np.savez(tmp_path / "masks.npz", **{name: value.numpy() for name, value in vae.state_dict().items()})
    monkeypatch.setenv(MASKS_VARIABLE, str(tmp_path / "masks.npz"))
    vae, seen = load_mask_vae(), set()
    found = read_examples(official["instances"], form="coco-segment", encode_mask=vae.codes_of)
    for example in found:
        detections, remarks = parse(example.suffix, 112, 112)
        assert remarks == [] and [one.label for one in detections] == example.facts["labels"]
        for one, box, shape in zip(detections, example.facts["boxes"], example.facts["segmentations"], strict=True):
            assert one.box == pytest.approx(box, abs=112 / 1023)
            mask = torch.from_numpy(read_mask(shape, 112, 112).copy())
            assert one.codes == vae.codes_of(mask, tuple(box))
            seen.add(one.codes)
    assert len(seen) > 3  # masks that differ get codes that differ
    assert pickle.loads(pickle.dumps(found))[0].suffix == found[0].suffix  # workers get the encoder too
    code = main(["data", str(official["instances"]), "--form", "coco-segment", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert code == 0 and f"{len(found)} examples" in out and "broken: 0 rows" in out and "coco-segment, as asked" in err
    taught = ["train", "--data", str(official["instances"]), "--form", "coco-segment", "--out", str(tmp_path / "run")]
    assert main([*taught, "--max-steps", "1", "--batch-size", "1"]) == 0  # and training takes them


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 70), width=st.integers(1, 70), share=st.floats(0, 1))
def test_runs_against_the_official_code(seed, height, width, share):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < share
    if seed % 2:  # long runs as well
        mask = np.kron(rng.random((2, 2)) < share, np.ones((height, width), bool))
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    size = list(mask.shape)
    for counts in (packed, counts_of(mask)):
        assert np.array_equal(read_mask({"size": size, "counts": counts}, *size), mask)


def test_a_polygon_is_filled_where_it_stands():
    expected = np.zeros((5, 9), bool)
    expected[1:3, 1:7] = True
    assert np.array_equal(read_mask([[1, 1, 7, 1, 7, 3, 1, 3]], 5, 9), expected)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        5,
        [],
        {},
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [["a"] * 6],
        [[1e9, 1, 5, 1, 5, 5]],
        [[float("nan"), 1, 5, 1, 5, 5]],
        {"size": [10, 9], "counts": [90]},
        {"size": [10, 10], "counts": [5, 3]},
        {"size": [10, 10], "counts": [101]},
        {"size": [10, 10], "counts": [-1, 101]},
        {"size": [10, 10], "counts": [1.5, 98.5]},
        {"size": [10, 10], "counts": ""},
        {"size": [10, 10], "counts": "garbage!!"},
        {"size": [10, 10], "counts": "oooo"},
        {"size": [10, 10], "counts": "é"},
        {"size": [10, 10]},
    ],
)
def test_damaged_masks_are_refused(segmentation):
    with pytest.raises(ValueError, match="mask|segmentation"):
        read_mask(segmentation, 10, 10)


def test_the_vqav2_pair(official):
    questions, answers = (json.loads(official[name].read_text()) for name in ("questions", "answers"))
    by_id = {row["question_id"]: row for row in answers["annotations"]}
    found = read_examples(official["questions"], annotations=official["answers"])
    assert found.form == "vqav2" and len(found) == 12 and found.remarks == ()
    for number, (example, row) in enumerate(zip(found, questions["questions"], strict=True), start=1):
        entry = by_id[row["question_id"]]
        assert example.prefix == f"answer en {row['question']}"
        assert example.suffix == entry["multiple_choice_answer"] and len(example.answers) == 10
        assert list(example.answers) == [answer["answer"] for answer in entry["answers"]]
        names = ("question_id", "image_id", "question_type", "answer_type", "question")
        assert example.facts == {name: (row | entry)[name] for name in names}
        assert example.image.name == f"COCO_val2014_{row['image_id']:012d}.jpg" and example.image.is_file()
        assert example.where.endswith(f"questions.json, question {number}")


def test_questions_without_answers_can_be_asked_but_not_learned(official, processor):
    found = read_examples(official["questions"])
    assert found.form == "vqav2" and "no answers" in found.remarks[0]
    assert found[0].suffix == "" and found[0].answers == () and found[0].image.is_file()
    with pytest.raises(ValueError, match="the answer is empty"):
        next(iter(Batches(found, processor, 2, 0)))


def test_pictures_are_found_where_the_archives_put_them(official, tmp_path):
    inside = official["captions"].parent.parent / "val2014"
    for root in (None, inside, inside.parent):
        assert read_examples(official["captions"], root=root)[0].image.is_file()
        assert read_examples(official["questions"], root=root)[0].image.is_file()
    assert read_examples(official["captions"], root=tmp_path)[0].image.parent == tmp_path


def change(path: Path, target: Path, edit) -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    target.write_text(json.dumps(content), encoding="utf-8")
    return target


def first_annotation(name: str, value):
    def edit(content):
        row = next(row for row in content["annotations"] if not row.get("iscrowd"))
        row.pop(name) if value is None else row.update({name: value})

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("captions", first_annotation("image_id", 5), "image_id 5 has no entry in 'images'"),
        ("captions", first_annotation("caption", 7.5), None),
        ("captions", lambda c: c["annotations"][1].pop("caption"), "caption is null"),
        ("instances", first_annotation("image_id", 5), "image_id 5 has no entry in 'images'"),
        ("instances", first_annotation("category_id", 5), "category_id 5 has no entry in 'categories'"),
        ("instances", first_annotation("bbox", [1, 2, -3, 4]), "bbox [1, 2, -3, 4]: expected [x, y, width, height]"),
        ("instances", first_annotation("bbox", [1, 2, 3]), "bbox [1, 2, 3]"),
        ("instances", first_annotation("bbox", [1, 2, 10**400, 4]), "expected [x, y, width, height]"),
        ("instances", first_annotation("bbox", [113, 2, 3, 4]), "which lies outside of its picture of 112 x 112"),
        ("instances", lambda c: c["images"][0].pop("height"), "height None and width 112: expected pixels"),
        ("instances", lambda c: c["images"][0].pop("file_name"), "image is None"),
    ],
)
def test_a_damaged_entry_breaks_its_own_examples_only(official, tmp_path, name, edit, words):
    found = read_examples(change(official[name], tmp_path / "x.json", edit))
    said = []
    for index in range(len(found)):
        try:
            found[index]
        except ValueError as error:
            said.append(str(error))
    if words is None:  # a number is text
        assert not said
        return
    assert 1 <= len(said) <= 5 and all(sentence.startswith("x.json, ") and words in sentence for sentence in said)


def test_a_caption_that_is_no_text_breaks_its_own_example_only(official, tmp_path):
    path = change(official["captions"], tmp_path / "x.json", lambda c: c["annotations"][1].update(caption=None))
    rows = json.loads(path.read_text())["annotations"]
    same = [number for number, row in enumerate(rows) if row["image_id"] == rows[1]["image_id"]]
    found = read_examples(path)
    for number in same:
        if number == 1:
            with pytest.raises(ValueError, match=r"x\.json, annotation 2: caption is null"):
                found[number]
        else:
            assert found[number].suffix == rows[number]["caption"].strip()
            assert len(found[number].answers) == len(same) - 1 > 0
    with pytest.raises(ValueError, match="caption is null"):  # to measure with, all of them are needed
        read_examples(path, per_image=True)[0]


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("captions", first_annotation("image_id", None), "image_id is None"),
        ("captions", first_annotation("image_id", [1]), "image_id is [1]"),
        ("captions", lambda c: c["images"].append(c["images"][0]), "stands twice in 'images'"),
        ("captions", lambda c: c.pop("images"), "no array 'images'"),
        ("captions", lambda c: c.update(annotations=[]), "its annotations have the keys none"),
        ("captions", lambda c: [row.pop("caption") for row in c["annotations"]], "expected 'caption' or 'bbox'"),
        ("instances", lambda c: c.pop("categories"), "no array 'categories'"),
        (
            "instances",
            lambda c: c["categories"][0].update(name="a ; b"),
            "named 'a ; b', expected a name in one line without ';'",
        ),
        ("instances", lambda c: c["categories"][0].update(name="\ud800"), "expected a name in one line"),
        ("instances", lambda c: c["categories"].append(c["categories"][0]), "stands twice in 'categories'"),
        ("instances", lambda c: [row.update(iscrowd=1) for row in c["annotations"]], "no example; 39 crowds (iscrowd)"),
        ("instances", first_annotation("iscrowd", "0"), "iscrowd is '0', expected 0 or 1"),
        ("instances", first_annotation("iscrowd", 2), "iscrowd is 2, expected 0 or 1"),
        ("instances", lambda c: [row.update(name="a  b ") for row in c["categories"]], "are both named 'a b'"),
        ("questions", lambda c: c.update(questions=[]), "holds no example"),
    ],
)
def test_a_damaged_file_is_refused(official, tmp_path, name, edit, words):
    with pytest.raises(ValueError) as error:
        read_examples(change(official[name], tmp_path / "x.json", edit))
    assert words in str(error.value) and "x.json" in str(error.value)


def test_crowds_may_be_written_in_several_ways(official, tmp_path):
    def rewrite(content):
        ways = [(0, False, None), (1, True, 1.0)]
        for number, row in enumerate(content["annotations"]):
            row["iscrowd"] = ways[row["iscrowd"]][number % 3]

    found = read_examples(change(official["instances"], tmp_path / "x.json", rewrite))
    plain = read_examples(official["instances"])
    assert [example.facts for example in found] == [example.facts for example in plain]


def test_names_of_categories_have_one_space_between_words(official, tmp_path):
    """As `parse` reads them from an answer; and a category that nothing has may share its name with another."""

    def rename(content):
        for row in content["categories"]:
            row["name"] = f" the  {row['name']} "
        content["categories"].append({"id": 999, "name": content["categories"][0]["name"]})

    found = read_examples(change(official["instances"], tmp_path / "x.json", rename))
    for example, plain in zip(found, read_examples(official["instances"]), strict=True):
        assert example.prefix == plain.prefix.replace("detect ", "detect the ")
        assert [box.label for box in parse(example.suffix, 112, 112)[0]] == example.facts["labels"]


def test_pairs_that_do_not_belong_together(official, tmp_path):
    questions, answers = official["questions"], official["answers"]
    with pytest.raises(ValueError, match="holds the answers of VQAv2: give the file of questions"):
        read_examples(answers)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_examples(questions, annotations=tmp_path / "none.json")
    with pytest.raises(ValueError, match="no array 'annotations'"):
        read_examples(questions, annotations=questions)
    with pytest.raises(ValueError, match="which has no second file"):
        read_examples(official["captions"], annotations=answers)

    def shift(content):
        for row in content["annotations"]:
            row["question_id"] += 10**6

    with pytest.raises(ValueError, match="they are of different parts"):
        read_examples(questions, annotations=change(answers, tmp_path / "other.json", shift))
    one_less = change(answers, tmp_path / "less.json", lambda content: content["annotations"].pop(0))
    lacking = read_examples(questions, annotations=one_less)
    said = []
    for index in range(len(lacking)):
        try:
            lacking[index]
        except ValueError as error:
            said.append(str(error))
    assert len(said) == 1 and "has no entry in less.json" in said[0]
    more = change(answers, tmp_path / "more.json", lambda c: c["annotations"].append({"question_id": 1, "answers": []}))
    assert "1 answers of more.json belong to no question" in read_examples(questions, annotations=more).remarks[0]
    twice = change(answers, tmp_path / "twice.json", lambda c: c["annotations"].append(c["annotations"][0]))
    with pytest.raises(ValueError, match="stands twice"):
        read_examples(questions, annotations=twice)


def test_ids_may_be_floats(official, tmp_path):
    def rewrite(content):
        for row in content.get("questions", []) + content.get("annotations", []):
            row.update(question_id=float(row["question_id"]), image_id=float(row["image_id"]))

    files = [change(official[name], tmp_path / f"{name}.json", rewrite) for name in ("questions", "answers")]
    found = read_examples(files[0], annotations=files[1], root=official["questions"].parent)
    plain = read_examples(official["questions"], annotations=official["answers"])
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours.suffix, ours.facts, ours.image) == (theirs.suffix, theirs.facts, theirs.image)


@pytest.mark.parametrize(
    ("stored", "note", "fits"),
    [
        ((80, 60), 1, True),
        ((60, 80), 6, True),
        ((53, 40), 1, True),
        ((27, 20), 1, True),
        ((800, 599), 1, True),
        ((60, 80), 1, False),
        ((80, 60), 6, False),
        ((60, 60), 1, False),
    ],
)
def test_boxes_of_a_picture_of_another_shape_are_refused(small, tmp_path, stored, note, fits):
    """The file says 80 x 60. A smaller or larger copy will do; one on its side has its boxes elsewhere."""
    exif = Image.Exif()
    exif[0x0112] = note
    Image.new("RGB", stored).save(tmp_path / "a.jpg", exif=exif)
    content = {"images": [{"id": 1, "file_name": "a.jpg", "height": 60, "width": 80}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 20]}]
    content["annotations"][0]["segmentation"] = [[5, 5, 35, 5, 35, 25, 5, 25]]
    (tmp_path / "x.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cat"}]}))
    found = read_examples(tmp_path / "x.json")
    broken = survey(found, small).broken
    if fits:
        assert broken == () and len(collate(small, found[:]).input_ids) == 1
        assert found[0].suffix == "<loc0085><loc0064><loc0426><loc0448> cat"  # 1023 times 5/60, 5/80, 25/60, 35/80
        records = answer_examples("detect", found, lambda rows: [row.suffix for row in rows], tmp_path / "a.jsonl")
        scores, _ = score_answers("detect", records)
        assert scores["AP50"] == 1.0 and scores["mean_iou"] > 0.95
        masks = []
        note = {"encode_mask": lambda mask, box: masks.append(mask) or range(16)}
        read_examples(tmp_path / "x.json", form="coco-segment", **note)[:]
        assert [tuple(mask.shape) for mask in masks] == [(60, 80)] and masks[0][5:25, 5:35].all()
        return
    with pytest.raises(ValueError, match=r"x\.json, image 1, .* the file says 80 x 60, the picture is 60 x [68]0 once"):
        collate(small, found[:])
    assert len(broken) == 1 and "would lie elsewhere" in broken[0][1]


def test_ids_may_be_texts(official, tmp_path):
    def rename(content):
        for row in content["images"]:
            row["id"] = f"picture {row['id']}"
        for row in content["annotations"]:
            row["image_id"] = f"picture {row['image_id']}"

    renamed = read_examples(change(official["captions"], tmp_path / "x.json", rename))
    plain = read_examples(official["captions"])
    for ours, theirs in zip(renamed, plain, strict=True):
        assert (ours.suffix, ours.answers) == (theirs.suffix, theirs.answers)
        assert ours.facts["image_id"] == f"picture {theirs.facts['image_id']}"


# what a file is taken for


def test_a_form_can_be_forced(tmp_path, gallery):
    both = {"image": "1.png", "text": "a", "question": "q", "answer": "b", "prefix": "c", "suffix": "d"}
    path = write_rows(tmp_path / "t.jsonl", [both])
    assert read_examples(path, root=gallery).form == "prefix"
    suffixes = {form: read_examples(path, root=gallery, form=form)[0].suffix for form in ("text", "vqa", "prefix")}
    assert suffixes == {"text": "a", "vqa": "b", "prefix": "d"}
    with pytest.raises(ValueError, match=r"form is 'yolo': expected auto or one of prefix, vqa, text, vqav2"):
        read_examples(path, form="yolo")
    with pytest.raises(ValueError, match="no array 'questions', which the form vqav2 needs"):
        read_examples(path, form="vqav2")
    assert read_examples(path, root=gallery, per_image=True)[:] == read_examples(path, root=gallery)[:]


def test_the_form_is_found_behind_broken_lines(tmp_path, gallery):
    path = tmp_path / "t.jsonl"
    path.write_text('{"image": "1.png", "question": \n{broken\n{"image": "1.png", "question": "?", "answer": "x"}\n')
    found = read_examples(path, root=gallery)
    assert found.form == "vqa" and len(found) == 3 and found[2].suffix == "x"


def test_a_first_line_that_is_no_json_is_a_broken_row(tmp_path, gallery, small):
    path = tmp_path / "t.jsonl"
    path.write_text('# my pictures\n{"image": "1.png", "text": "a"}\n')
    found = read_examples(path, root=gallery)
    assert found.form == "text" and len(found) == 2
    made = Batches(found, small, 2, 0, epochs=1, on_error="skip", skipped=tmp_path / "s.jsonl")
    assert [batch.where for batch in made] == [("t.jsonl, line 2",)] and made.num_skipped == 1


def test_rows_with_a_list_named_like_cocos_are_rows(tmp_path, gallery):
    rows = [{"image": "1.png", "text": "a", "annotations": [{"bbox": [1, 2, 3, 4]}]}] * 2
    found = read_examples(write_rows(tmp_path / "t.jsonl", rows), root=gallery)
    assert found.form == "text" and len(found) == 2
    for count in (1, 2):  # keys in the order of the alphabet
        rows = [{"categories": ["animal"], "image": "1.png", "text": "a"}] * count
        found = read_examples(write_rows(tmp_path / "t.jsonl", rows), root=gallery)
        assert found.form == "text" and len(found) == count


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n  \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"image,text\na.png,a cat\n", "neither JSON lines nor JSON, it begins with 'image,text'"),
        ('{"image": "a", "text": "b"}'.encode("utf-16"), "save it as UTF-8"),
        (b"\x1f\x8b\x08\x00rest", "is compressed: unpack it first"),
        (b"PK\x03\x04rest", "is compressed: unpack it first"),
        (b"\x89PNG\r\n\x1a\n", "neither JSON lines nor JSON"),
        (b"[]", "of no known form"),
        (b"[1, 2, 3]", "found 1, expected a JSON object"),
        (b'[["a question", "an answer", 3]]', 'found ["a question", "an answer", 3], expected a JSON object'),
        (b"{}", "the first has the keys none"),
        (b'{"annotations": [1, 2], "images": []}', "annotation 1: found 1, expected a JSON object"),
        (b'{"annotations": {"1": 2}, "images": []}', "has no 'annotations' and no 'questions'"),
        (b'{"file": "a.png", "label": "cat"}\n', "the first has the keys 'file', 'label'"),
        (b'{"data": [{"image": "a.png", "text": "b"}]}', "the first has the keys 'data'"),
        (b'{"messages": [], "images": ["a.jpg"]}\n' * 2, "the first has the keys 'messages', 'images'"),
        (b'[{"image": "a.png", "text": "b"}', "broken JSON"),
        (b'[{"image": "a.png", "text": "b"},]', "broken JSON"),
    ],
)
def test_files_of_no_known_form(tmp_path, content, words):
    path = tmp_path / "strange.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_examples(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_no_file_a_folder_and_no_root(tmp_path, gallery):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder: give a JSONL or JSON file"):
        read_examples(gallery)
    path = write_rows(tmp_path / "t.jsonl", [{"image": "1.png", "text": "a"}])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_examples(path, root=tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_refused(tmp_path):
    """Nobody writes into it: to open it would be to wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no file: write the rows into one first"):
        read_examples(tmp_path / "pipe")


# the order of batches


@pytest.fixture(scope="module")
def rows37(tmp_path_factory, gallery):
    path = tmp_path_factory.mktemp("rows") / "t.jsonl"
    return read_examples(
        write_rows(path, [{"image": f"{i % 12}.png", "text": "a star " * (1 + i % 3) + str(i)} for i in range(37)]),
        root=gallery,
    )


def same(ours, theirs) -> bool:
    tensors = zip(vars(ours.batch).values(), vars(theirs.batch).values(), strict=True)
    return (ours.where, ours.state) == (theirs.where, theirs.state) and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize(("count", "size"), [(10, 3), (9, 3), (1, 4), (5, 1)])
def test_an_epoch_shows_each_example_once(small, count, size):
    made = list(Batches(examples(count), small, size, seed=0, epochs=1))
    assert sorted(where for batch in made for where in batch.where) == sorted(f"row {i}" for i in range(count))
    assert [len(batch.where) for batch in made] == [size] * (count // size) + [count % size] * bool(count % size)
    for batch in made:  # the names are those of the rows
        for ids, types, real, where in zip(
            batch.batch.input_ids, batch.batch.token_type_ids, batch.batch.attention_mask, batch.where, strict=True
        ):
            prompt = small.tokenizer.decode(ids[(types == 0) & (real == 1)]).strip()
            assert prompt == f"caption {where.removeprefix('row ')}"


def test_the_seed_decides_the_order_and_each_epoch_has_its_own(small):
    def order(seed: int, epochs: int) -> list[str]:
        return [where for made in Batches(examples(8), small, 8, seed, epochs=epochs) for where in made.where]

    assert order(0, 2) == order(0, 2)
    assert order(0, 1) != order(1, 1)
    both = order(0, 2)
    assert both[:8] != both[8:] and sorted(both[:8]) == sorted(both[8:])


def test_the_order_is_a_fair_permutation():
    for count in (1, 2, 1000):
        assert sorted(epoch_order(count, 3, 5)) == list(range(count))
    draws = np.array([epoch_order(6, seed, epoch) for seed in range(60) for epoch in range(50)])
    seen = np.array([(draws == example).sum(0) for example in range(6)])  # how often each stood at each place
    assert abs(seen - 500).max() < 5 * np.sqrt(500)  # five standard deviations


def test_without_a_number_of_epochs_it_goes_on(small):
    stream = iter(Batches(examples(2), small, 2, seed=0))
    assert [next(stream).state["epoch"] for _ in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 36, 40])
@pytest.mark.parametrize("size", [1, 3])
def test_ranks_share_without_overlap_or_loss(small, rows37, world_size, size):
    ranks = [
        list(Batches(rows37, small, size, seed=4, epochs=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    steps = -(-37 // (size * world_size))
    assert [len(made) for made in ranks] == [2 * steps] * world_size  # or one would wait for ever
    everything = sorted(rows37.where(index) for index in range(37))
    for epoch in (0, 1):
        seen = [where for made in ranks for batch in made if batch.state["epoch"] == epoch for where in batch.where]
        assert sorted(seen) == everything
    for made in ranks:
        for batch in made:
            assert len(batch.where) <= size
            assert bool(batch.where) == bool((batch.batch.labels != -100).any())  # an empty batch teaches nothing
            assert len(batch.batch.input_ids) >= 1


def test_workers_change_nothing_and_leave_the_seed_of_torch_alone(small, rows37):
    alone = list(Batches(rows37, small, 4, seed=1, epochs=2))
    torch.manual_seed(5)
    ahead = list(Batches(rows37, small, 4, seed=1, epochs=2, workers=2))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert len(alone) == len(ahead) == 20 and all(map(same, alone, ahead))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signal to one process")
def test_a_worker_leaves_control_c_to_the_run(small, rows37):
    """Here it would hear it as a process of its own does, one that is no copy of the run's and so not deaf by its handler."""
    before = set(multiprocessing.active_children())
    made = iter(Batches(rows37, small, 4, seed=1, epochs=1, workers=1))
    next(made)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(made)) == 9


def test_it_goes_on_behind_any_batch(small, rows37):
    whole = list(Batches(rows37, small, 5, seed=2, epochs=2))
    for number, made in enumerate(whole):
        state = json.loads(json.dumps(made.state))
        rest = list(Batches(rows37, small, 5, seed=2, epochs=2, start=state))
        assert len(rest) == len(whole) - number - 1 and all(map(same, rest, whole[number + 1 :]))
    assert list(Batches(rows37, small, 5, seed=2, epochs=1, start=whole[-1].state)) == []


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from sigma_book.batches import Batches
from sigma_book.data import read_examples
from sigma_book.processor import Processor
from sigma_book.assemble import POCKET
file, root, workers, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
if __name__ == "__main__":
    small = Processor(Processor.from_folder(POCKET).tokenizer, 28, 4)
    made = Batches(read_examples(file, root=root), small, 5, seed=2, epochs=2, workers=workers, start=start)
    for batch in made:
        total = batch.batch.pixel_values.double().sum().item()
        print(json.dumps([batch.where, batch.state, batch.batch.input_ids.tolist(), total]))
"""


def test_another_process_goes_on_with_the_same_batches(small, rows37, gallery, tmp_path):
    """Also with workers, and with another number of them than before."""
    whole = list(Batches(rows37, small, 5, seed=2, epochs=2, workers=1))
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    file = rows37._source.table.path
    command = [sys.executable, str(script), str(file), str(gallery), "2", json.dumps(whole[8].state)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rest = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rest) == len(whole) - 9
    for (where, state, ids, total), made in zip(rest, whole[9:], strict=True):
        assert (tuple(where), state, ids) == (made.where, made.state, made.batch.input_ids.tolist())
        assert total == made.batch.pixel_values.double().sum().item()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 3}, "seed was 2 and is 3"),
        ({"batch_size": 4}, "batch_size was 5 and is 4"),
        ({"world_size": 2}, "world_size was 1 and is 2"),
    ],
)
def test_a_place_of_another_run_is_refused(small, rows37, change, words):
    state = next(iter(Batches(rows37, small, 5, 2))).state
    arguments = {"batch_size": 5, "seed": 2} | change
    with pytest.raises(ValueError, match=words):
        Batches(rows37, small, **arguments, start=state)
    with pytest.raises(ValueError, match="examples was 37 and is 8"):
        Batches(examples(8), small, 5, 2, start=state)
    with pytest.raises(ValueError, match="next is 'x'"):
        Batches(rows37, small, 5, 2, start=state | {"next": "x"})


@pytest.mark.slow
def test_examples_and_batches_can_be_sent_to_processes(small, rows37, official):
    """As workers need it where processes are not copied but started anew (macOS, Windows)."""
    for found in (rows37, *(read_examples(official[name]) for name in ("captions", "instances", "questions"))):
        again = pickle.loads(pickle.dumps(found))
        assert (len(again), again.form, again.remarks) == (len(found), found.form, found.remarks)
        assert again[3] == found[3] and again[-1] == found[len(found) - 1] and again[:2] == found[:2]
    maker = Batches(rows37, small, 4, 0)._maker
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        made = pool.apply(_make, (maker, 3))
    assert made == maker[3].where


def _make(maker, step):
    return maker[step].where


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"rank": 1}, "rank is 1: expected a whole number from 0 to 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"truncate": True}, "truncate=True needs max_length"),
        ({"on_error": "ignore"}, "on_error is 'ignore': expected 'stop' or 'skip'"),
        ({"on_error": "skip"}, "needs the path of a file"),
    ],
)
def test_arguments_out_of_range(small, arguments, words):
    with pytest.raises(ValueError, match=words):
        Batches(examples(3), small, **({"batch_size": 2, "seed": 0} | arguments))
    with pytest.raises(ValueError, match="at least 1"):
        Batches([], small, 1, 0)


# broken rows


@pytest.fixture
def broken_file(tmp_path, gallery):
    """Twenty rows; five of them broken in different ways. Returns the examples and the broken lines."""
    rows = [json.dumps({"image": f"{i % 12}.png", "text": f"scene {i}"}) for i in range(20)]
    (tmp_path / "cut.png").write_bytes((gallery / "1.png").read_bytes()[:300])
    rows[2] = rows[2][:-4]
    rows[5] = json.dumps({"image": "missing.png", "text": "a"})
    rows[9] = json.dumps({"image": str(tmp_path / "cut.png"), "text": "a"})
    rows[13] = json.dumps({"image": "1.png", "text": ""})
    rows[17] = json.dumps({"image": "1.png"})
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(rows))
    return read_examples(path, root=gallery), {3, 6, 10, 14, 18}


def read_list(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_rows_are_skipped_counted_and_listed_once(small, broken_file, tmp_path, workers):
    found, lines = broken_file
    path = tmp_path / "lists/skipped.jsonl"
    arguments = {"epochs": 3, "workers": workers, "on_error": "skip", "skipped": path}
    made = Batches(found, small, 4, 0, **arguments)
    got = list(made)
    good = sorted(f"t.jsonl, line {line}" for line in range(1, 21) if line not in lines)
    for epoch in range(3):
        seen = [where for batch in got if batch.state["epoch"] == epoch for where in batch.where]
        assert sorted(seen) == good
    assert made.num_skipped == 5
    listed = read_list(path)
    assert sorted(row["where"] for row in listed) == sorted(f"t.jsonl, line {line}" for line in lines)
    reasons = {row["where"].split()[-1]: row["reason"] for row in listed}
    assert not any("t.jsonl" in reason for reason in reasons.values())  # the place is said once
    for line, words in {
        "3": "broken JSON",
        "6": "no such file",
        "10": "cut.png",
        "14": "the answer is empty",
        "18": "no 'text' in this row",
    }.items():
        assert words in reasons[line]
    again = Batches(found, small, 4, 0, **arguments, start=got[4].state)
    assert all(map(same, again, got[5:]))
    assert len(read_list(path)) == 5 == again.num_skipped  # a run that goes on lists nothing twice


def test_an_answer_with_a_picture_s_place_is_a_broken_row(small, gallery, tmp_path):
    rows = [{"image": "1.png", "text": text} for text in ("a star", "an <image> in it")]
    found = read_examples(write_rows(tmp_path / "t.jsonl", rows), root=gallery)
    made = Batches(found, small, 2, 0, epochs=1, on_error="skip", skipped=tmp_path / "s.jsonl")
    assert [batch.where for batch in made] == [("t.jsonl, line 1",)] and made.num_skipped == 1
    assert [where for where, _ in survey(found, small).broken] == ["t.jsonl, line 2"]


def test_ranks_skip_into_one_list_and_stay_in_step(small, broken_file, tmp_path):
    found, lines = broken_file
    path = tmp_path / "skipped.jsonl"
    ranks = [
        Batches(found, small, 1, 0, epochs=4, rank=rank, world_size=3, on_error="skip", skipped=path)
        for rank in range(3)
    ]
    streams = [iter(rank) for rank in ranks]
    steps = [tuple(len(made.where) for made in step) for step in zip(*streams, strict=True)]
    assert len(steps) == 4 * 7 and sum(map(sum, steps)) == 4 * 15
    assert len(read_list(path)) == 5 == len({row["where"] for row in read_list(path)})
    assert all(rank.num_skipped == 5 for rank in ranks)


@pytest.mark.parametrize("workers", [0, 2])
def test_by_default_it_stops_at_the_first_broken_row(small, broken_file, workers):
    found, lines = broken_file
    seen = 0
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        for _ in Batches(found, small, 2, 0, epochs=1, workers=workers):
            seen += 1
    first = next(number for number, index in enumerate(epoch_order(20, 0, 0)) if index + 1 in lines)
    assert seen == first // 2  # all batches before it came
    said = str(error.value)
    assert said.startswith(f"t.jsonl, line {epoch_order(20, 0, 0)[first] + 1}: ") and "\n" not in said


@pytest.mark.parametrize("world_size", [1, 2])
def test_where_nothing_can_be_read_it_stops(small, tmp_path, world_size):
    found = read_examples(write_rows(tmp_path / "t.jsonl", [{"image": f"no{i}.png", "text": "a"} for i in range(5)]))
    arguments = {"on_error": "skip", "skipped": tmp_path / "skipped.jsonl", "world_size": world_size}
    with pytest.raises(RuntimeError, match=r"no row could be read in a whole epoch: see .*skipped\.jsonl"):
        list(Batches(found, small, 2, 0, **arguments))
    assert read_list(tmp_path / "skipped.jsonl")


@pytest.fixture
def little_room():
    """Files may grow to so many bytes, as on a disk that is full; undone afterwards."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_the_list_goes_on_where_there_is_room(small, broken_file, tmp_path, little_room):
    found, _ = broken_file
    path = tmp_path / "skipped.jsonl"
    arguments = {"epochs": 1, "on_error": "skip", "skipped": path}
    little_room(200)
    with pytest.raises(RuntimeError, match=r"skipped\.jsonl cannot be written \(.*\): make room and go on"):
        list(Batches(found, small, 4, 0, **arguments))
    little_room(1 << 30)
    made = Batches(found, small, 4, 0, **arguments)
    assert sum(len(batch.where) for batch in made) == 15 and made.num_skipped == 5
    assert sum(b'"where"' in line and line.endswith(b"}") for line in path.read_bytes().split(b"\n")) == 5


def test_a_survey_on_a_full_disk_leaves_no_half_files(small, surveyed, tmp_path, little_room):
    found, seen = surveyed
    little_room(2000)
    with pytest.raises(RuntimeError, match=r"out/.* cannot be written"):
        write_survey(seen, found, tmp_path / "out")
    little_room(1 << 30)
    assert not list((tmp_path / "out").glob(".*"))


def test_examples_without_a_place_are_numbered(small, tmp_path):
    listed = [Example("nowhere.png", "a", "b"), Example(draw_scene(make_scene(1)), "a", "b")]
    made = list(Batches(listed, small, 2, 0, epochs=1, on_error="skip", skipped=tmp_path / "s.jsonl"))
    assert [batch.where for batch in made] == [("example 2",)]
    assert read_list(tmp_path / "s.jsonl")[0]["where"] == "example 1"


# memory


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from sigma_book.batches import Batches
from sigma_book.data import read_examples
from sigma_book.processor import Processor
from sigma_book.assemble import POCKET

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

file, root, mode, marks = sys.argv[1], sys.argv[2], sys.argv[3], [int(mark) for mark in sys.argv[4].split(",")]
small = Processor(Processor.from_folder(POCKET).tokenizer, 28, 4)
before = resident()
examples = read_examples(file, root=root)
print(len(examples), resident() - before)
if mode == "read":
    for index in range(marks[-1]):
        examples[(index * 7919) % len(examples)]
        if index + 1 in marks:
            print(index + 1, resident())
else:
    seen = 0
    for made in Batches(examples, small, 20, seed=0):
        seen += len(made.where)
        if seen in marks:
            print(seen, resident())
        if seen >= marks[-1]:
            break
"""


def measure(folder: Path, gallery: Path, lines: int, mode: str, marks: str) -> tuple[int, int, list[int]]:
    path = folder / "large.jsonl"
    with path.open("w") as file:
        for number in range(lines):
            text = f"a red star and a blue ring, number {number}"
            file.write(f'{{"image": "{number % 12}.png", "text": "{text}", "extra": [{number}]}}\n')
    command = [sys.executable, "-c", MEASURE, str(path), str(gallery), mode, marks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=True)
    (rows, opened), *steps = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    path.unlink()
    return rows, opened, [size for _, size in steps]


@pytest.mark.parametrize("most", [60_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat_while_many_rows_are_read(tmp_path, gallery, most):
    """A file of 500,000 lines. The rows held as Python objects would be more than 1 kB each."""
    rows, opened, (early, late) = measure(tmp_path, gallery, 500_000, "read", f"1000,{most}")
    assert rows == 500_000
    assert opened < 60e6  # 12 MB of places, and pieces of the file while it is looked through
    assert late - early < 4e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat_over_200_000_examples_in_batches(tmp_path, gallery):
    """The allocator takes some 20 MB more in the first thousands of pictures, and then nothing: 281 MB after 1,000,
    299 after 20,000, 305 after 200,000. The rows held as Python objects would be more than 200 MB."""
    rows, _, (early, warm, late) = measure(tmp_path, gallery, 500_000, "batches", "1000,20000,200000")
    assert rows == 500_000
    assert late - warm < 15e6 and late - early < 45e6


def test_a_large_document_is_not_held(tmp_path):
    """15,000 annotations with polygons: the index is under a tenth of the tree that json makes."""
    import tracemalloc

    path = tmp_path / "instances.json"
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(1000)]
    with path.open("w") as file:
        file.write(json.dumps({"images": images, "categories": [{"id": 1, "name": "cat"}]})[:-1] + ', "annotations": [')
        for number in range(15_000):
            polygon = [round((number * 7 + k) % 480 + 0.25, 2) for k in range(20)]
            entry = {"id": number, "image_id": number % 1000, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}
            file.write(json.dumps(entry | {"segmentation": [polygon]}) + (", " if number < 14_999 else "]}"))
    sizes = []
    for read in (lambda: read_examples(path), lambda: json.loads(path.read_text())):
        tracemalloc.start()
        kept = read()
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert kept
        del kept
    assert sizes[0] < 0.1 * sizes[1]


# looking before training


@pytest.fixture
def surveyed(broken_file, small):
    found, lines = broken_file
    return found, survey(found, small, max_length=12)


def test_a_survey_counts_what_is_there(small, gallery, tmp_path):
    rows = [
        {"image": f"{i % 3}.png", "prefix": f"say {'it ' * (i % 4)}", "suffix": f"red{' star' * (i % 5)}"}
        for i in (*range(50), *range(10))  # sixty would all differ
    ]
    found = read_examples(write_rows(tmp_path / "t.jsonl", rows), root=gallery)
    limit = 20
    seen = survey(found, small, limit)
    encode = small.tokenizer.encode
    prompts = [len(encode(row["prefix"] + "\n")) for row in rows]
    answers = [len(encode(row["suffix"])) + 1 for row in rows]
    totals = [small.num_image_tokens + 1 + a + b for a, b in zip(prompts, answers, strict=True)]
    assert (seen.examples, seen.pictures, seen.broken, seen.num_answers) == (60, 3, (), 5)
    assert seen.prompt_tokens.tolist() == prompts and seen.answer_tokens.tolist() == answers
    assert dict(seen.too_long) == {
        f"t.jsonl, line {line}": total - limit for line, total in enumerate(totals, start=1) if total > limit
    }
    for number in range(60):  # what the survey calls too long is what training refuses
        fits = f"t.jsonl, line {number + 1}" not in dict(seen.too_long)
        try:
            collate(small, [found[number]], max_length=limit)
            assert fits
        except ValueError:
            assert not fits
    assert sorted(seen.answers) == sorted((f"red{' star' * i}", 12) for i in range(5))
    first_seen: set = set()
    repeated = []
    for line, row in enumerate(rows, start=1):
        key = tuple(row.values())
        repeated += [f"t.jsonl, line {line}"] if key in first_seen else []
        first_seen.add(key)
    assert len(repeated) == 10 and sorted(seen.duplicates) == sorted(repeated)


def test_a_survey_finds_what_is_broken(surveyed):
    found, seen = surveyed
    assert {int(where.split()[-1]) for where, _ in seen.broken} == {3, 6, 10, 14, 18}
    assert len(seen.prompt_tokens) == 15
    said = "\n".join(seen.lines())
    assert "20 examples" in said and "broken: 5 rows" in said


def test_a_survey_writes_pictures_and_lists(surveyed, tmp_path):
    found, seen = surveyed
    paths = write_survey(seen, found, tmp_path / "out")
    names = ["survey.json", "broken.jsonl", "too_long.jsonl", "repeated.jsonl", "lengths.png", "examples.png"]
    assert [path.name for path in paths] == names and {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    assert len(read_list(tmp_path / "out/broken.jsonl")) == 5
    assert len(read_list(tmp_path / "out/too_long.jsonl")) == len(seen.too_long)
    numbers = json.loads((tmp_path / "out/survey.json").read_text())
    assert sum(numbers["prompt_tokens"].values()) == 15 and numbers["broken"] == 5
    with Image.open(tmp_path / "out/examples.png") as sheet:
        colours = len(sheet.convert("RGB").getcolors(1 << 24))
        assert sheet.size == (1120, 1168) and colours > 50  # three rows of four
    with Image.open(tmp_path / "out/lengths.png") as lengths:
        counted = {colour: number for number, colour in lengths.convert("RGB").getcolors(1 << 24)}
    assert counted[(0xE6, 0x9F, 0)] > 500 and counted[(0, 0x9E, 0x73)] > 500


def test_the_height_of_bars_is_the_number_of_rows(small, gallery, tmp_path):
    """Read back from the picture: a length that thrice as many rows have stands thrice as high."""
    rows = [{"image": "1.png", "prefix": "a", "suffix": "red" + " star" * (i % 4 == 0)} for i in range(40)]
    seen = survey(read_examples(write_rows(tmp_path / "t.jsonl", rows), root=gallery), small)
    picture = np.asarray(draw_lengths(seen))
    green = (picture == (0, 0x9E, 0x73)).all(-1).sum(0)
    high, low = sorted({int(height) for height in green if height}, reverse=True)
    assert len(set(seen.answer_tokens.tolist())) == 2 and abs(high / low - 3) < 0.1


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["data", *map(str, arguments)])
    return (code, *capsys.readouterr())


def test_the_command(official, tmp_path, capsys, tiny_folder):
    out = tmp_path / "out"
    code, said, remarks = run_command(
        capsys, official["questions"], "--annotations", official["answers"], "--model", tiny_folder, "--out", out
    )
    assert code == 0 and "12 examples with 12 pictures" in said and "for 96 tokens" in said
    assert "form vqav2, found by looking" in remarks and (out / "examples.png").exists()
    code, said, remarks = run_command(capsys, official["instances"], "--form", "coco-detect", "--out", out)
    assert code == 0 and "form coco-detect, as asked" in remarks and "crowds (iscrowd) are left aside" in remarks


def test_the_command_without_out_writes_beside_where_it_stands(rows37, gallery, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, remarks = run_command(capsys, rows37._source.table.path, "--root", gallery)
    assert code == 0 and (tmp_path / "t_survey/lengths.png").exists() and "t_survey/lengths.png" in remarks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["{captions}", "--form", "yolo"], "form is 'yolo'"),
        (["{captions}", "--form", "vqa"], "it is one JSON object, expected JSON lines"),
        (["{answers}"], "holds the answers of VQAv2"),
        (["{captions}", "--root", "nowhere"], "no such folder: nowhere"),
        (["{captions}", "--model", "./nowhere"], "no such folder: ./nowhere"),
        (["{instances}", "--form", "coco-segment"], "vae-oid.npz"),
    ],
)
def test_the_command_refuses_in_one_sentence(official, capsys, arguments, words):
    code, said, remarks = run_command(capsys, *[argument.format(**official) for argument in arguments])
    assert (code, said) == (2, "") and words in remarks and "Traceback" not in remarks


def test_the_command_does_not_read_all_before_it_refuses_a_file_to_write_to(rows37, gallery, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    path = rows37._source.table.path
    code, said, remarks = run_command(capsys, path, "--root", gallery, "--out", tmp_path / "out")
    assert (code, said) == (2, "") and f"--out {tmp_path / 'out'} is a file: give a folder" in remarks


def test_the_real_command_on_a_folder_of_pictures(gallery, tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"image": f"{i}.png", "text": "x"} for i in range(3)] + [{"image": "y"}])
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent.parent)}
    command = [sys.executable, "-m", "sigma_book.cli", "data", str(path), "--root", str(gallery)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "broken: 1 rows" in done.stdout and "t.jsonl, line 4: no 'text' in this row" in done.stdout
    assert (tmp_path / "t_survey/examples.png").exists()
