"""Many rows: read, answered whatever is wrong with some, killed at any byte, and dealt out by a real Ray to real processes.

The reference for what an answer must be is `generate`, asked one by one; for Parquet it is pyarrow's own whole table.
"""

import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_book import bulk, generate, training
from sigma_book.bulk import (
    AnswerParts,
    BulkConfig,
    ParquetRows,
    answer_here,
    answer_range,
    answers_or_reasons,
    open_rows,
)
from sigma_book.cli import main
from sigma_book.data import Example
from sigma_book.fleet import answer_file
from sigma_book.runs import asker

KEYS = ["index", "where", "image", "prompt", "answer", "error"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, pictures) -> Path:
    """A folder with six pictures and some things that are none."""
    folder = tmp_path_factory.mktemp("shelf")
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "byte.png").write_bytes(b"x")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    return folder


POISON = {  # what stands in a row, and a word of its sentence
    "a missing picture": ({"image": "gone.png", "prompt": "caption en"}, "no such file"),
    "half a picture": ({"image": "torn.png", "prompt": "caption en"}, "damaged or cut off"),
    "one byte": ({"image": "byte.png", "prompt": "caption en"}, "not a picture"),
    "no bytes": ({"image": "empty.png", "prompt": "caption en"}, "not a picture"),
    "a folder": ({"image": "folder.png", "prompt": "caption en"}, "is a folder"),
    "a URL": ({"image": "http://x/y.png", "prompt": "caption en"}, "a URL"),
    "no name": ({"image": "", "prompt": "caption en"}, "image is ''"),
    "null": ({"image": None, "prompt": "caption en"}, "image is None"),
    "a number as picture": ({"image": 7, "prompt": "caption en"}, "image is 7"),
    "an empty prompt": ({"image": "1.png", "prompt": ""}, "prompt is empty"),
    "a blank prompt": ({"image": "1.png", "prompt": " \n"}, "prompt is empty"),
    "a number as prompt": ({"image": "1.png", "prompt": 7}, "prompt is 7"),
    "a long prompt": ({"image": "1.png", "prompt": "star " * 400}, "context is 96 tokens"),
    "a placeholder": ({"image": "1.png", "prompt": "<image> caption"}, "contains <image>"),
    "half a letter": ({"image": "1.png", "prompt": "caption \ud800"}, "surrogate"),
    "no prompt": ({"image": "1.png", "question": "what?"}, "expected 'image' and 'prompt'"),
    "a list": ([1, 2], "expected a JSON object"),
    "half a line": ('{"image": "1.png", "pro', "broken JSON"),
}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good_rows(count: int) -> list[dict]:
    prompts = ("caption en", "how many stars?", "detect ring", "x")
    return [{"image": f"{i % 6}.png", "prompt": prompts[i % 4]} for i in range(count)]


def mixed_rows(count: int) -> list:
    """Good rows with each kind of poison among them."""
    rows = good_rows(count)
    for place, (row, _) in enumerate(POISON.values()):
        rows[2 + place * count // len(POISON)] = row
    return rows


def answers_one_by_one(rows: list, folder: Path, model, most: int = 12) -> list[str | None]:
    poison = [row for row, _ in POISON.values()]
    return [
        None if row in poison else generate(folder / row["image"], row["prompt"], model=model, max_new_tokens=most)
        for row in rows
    ]


def read_parts(folder: Path) -> list[dict]:
    records = []
    for path in sorted(folder.glob("part-*")):
        if path.suffix == ".parquet":
            records += pyarrow.parquet.read_table(path).to_pylist()
        else:
            records += [json.loads(line) for line in path.read_text().splitlines()]
    return records


def stub(examples: list[Example]) -> list[str]:
    if any("bad" in example.prefix for example in examples):
        raise ValueError("a bad prompt")
    return [f"{example.prefix}!" for example in examples]


# rows


@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_row_has_its_sentence_and_the_others_their_answers(kind, shelf, tiny_model, tmp_path):
    row, words = POISON[kind]
    lines = good_rows(5)
    lines.insert(3, row)
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", lines), shelf)
    records = answer_range(rows, 0, 6, asker(tiny_model, 12))
    assert [record["index"] for record in records] == list(range(6))
    assert all(list(record) == KEYS for record in records)
    assert words in records[3]["error"] and records[3]["answer"] is None and "\n" not in records[3]["error"]
    assert records[3]["where"] == "rows.jsonl, line 4"
    expected = answers_one_by_one(lines[:3] + lines[4:], shelf, tiny_model)
    assert [record["answer"] for record in records[:3] + records[4:]] == expected
    assert all(record["error"] is None for record in records[:3] + records[4:])


def test_blank_lines_marks_and_windows_ends_are_no_rows(shelf, tmp_path):
    lines = [json.dumps(row) for row in good_rows(3)]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\r\n  \n{lines[1]}\n\n{lines[2]}".encode())
    rows = open_rows(tmp_path / "rows.jsonl", shelf)
    assert [rows.where(i) for i in range(len(rows))] == [f"rows.jsonl, line {line}" for line in (1, 4, 6)]
    assert [found.prefix for found in rows.read(0, 3)] == ["caption en", "how many stars?", "detect ring"]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    ranges=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 80)), min_size=1, max_size=8),
)
def test_parquet_rows_in_any_order(sizes, ranges, tmp_path_factory):
    """Groups of any sizes, read forwards and backwards, as pyarrow reads the whole."""
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    total = sum(sizes)
    table = pyarrow.table({"image": [f"{i}.png" for i in range(total)], "prompt": [f"p{i}" for i in range(total)]})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes):
            writer.write_table(table.slice(start, size), row_group_size=size)
    rows = ParquetRows(path, path.parent)
    assert len(rows) == total
    for first, length in ranges:
        start = first % total
        stop = min(total, start + length)
        assert [found.prefix for found in rows.read(start, stop)] == table["prompt"].to_pylist()[start:stop]


@pytest.mark.parametrize("layout", ["paths", "bytes", "struct"])
def test_parquet_of_paths_of_bytes_and_of_both(layout, shelf, tiny_model, tmp_path):
    names = ["0.png", "1.png", "torn.png", "2.png"]
    images = {
        "paths": names,
        "bytes": [(shelf / name).read_bytes() for name in names],
        "struct": [{"bytes": (shelf / name).read_bytes(), "path": name} for name in names],
    }[layout]
    prompts = ["caption en", None, "caption en", "x"]
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(4), "image": images, "prompt": prompts}), tmp_path / "r.parquet"
    )
    rows = open_rows(tmp_path / "r.parquet", shelf)
    records = answer_range(rows, 0, 4, asker(tiny_model, 12))
    for place, prompt in ((0, "caption en"), (3, "x")):
        expected = generate(shelf / names[place], prompt, model=tiny_model, max_new_tokens=12)
        assert records[place]["answer"] == expected
    assert "prompt is None" in records[1]["error"] and "damaged" in records[2]["error"]
    assert records[2]["where"] == "r.parquet, row 3"


def test_a_damaged_group_costs_its_rows_only(shelf, tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"image": ["0.png"] * 60, "prompt": [f"prompt number {i}" for i in range(60)]})
    pyarrow.parquet.write_table(table, path, row_group_size=20, use_dictionary=False, compression="zstd")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    raw = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size - 30
    raw[middle : middle + 20] = bytes(20)
    path.write_bytes(raw)
    records = list(answer_here(open_rows(path, shelf), 0, stub, batch_size=10))
    assert [record["index"] for record in records if record["error"]] == list(range(20, 40))
    assert all("cannot be read" in record["error"] for record in records[20:40])
    assert records[40]["answer"] == "prompt number 40!"


@pytest.mark.parametrize("size", [10, 64, 1000])
def test_a_text_that_is_not_utf8_costs_its_row_only(size, shelf, tmp_path):
    prompts = [f"prompt number {i}".encode() for i in range(300)]
    prompts[150] = "caf\xe9".encode("latin-1")
    texts = pyarrow.array(prompts, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"image": ["0.png"] * 300, "prompt": texts})
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet", row_group_size=size)
    records = list(answer_here(open_rows(tmp_path / "r.parquet", shelf), 0, stub, batch_size=16))
    assert [record["index"] for record in records if record["error"]] == [150]
    assert "this row cannot be read" in records[150]["error"] and records[299]["answer"] == "prompt number 299!"


def test_a_group_that_is_damaged_is_read_to_its_damage_once(shelf, tmp_path, monkeypatch):
    table = pyarrow.table({"image": ["0.png"] * 60, "prompt": [f"p{i}" for i in range(60)]})
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet", row_group_size=30)
    rows, begun = open_rows(tmp_path / "r.parquet", shelf), []

    def torn(group):
        begun.append(group)
        yield from ({"image": "0.png", "prompt": f"p{i}"} for i in range(17))
        raise OSError("damaged")

    monkeypatch.setattr(rows, "_rows_of", torn)
    found = [row for start in range(0, 30, 5) for row in rows.read(start, start + 5)]
    assert [isinstance(row, ValueError) for row in found] == [False] * 17 + [True] * 13
    assert begun == [0]
    assert [row.prefix for row in rows.read(3, 5)] == ["p3", "p4"]  # what stands before the damage can be read again


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"", "holds no row"),
        ("rows.jsonl", b"\n \n", "holds no row"),
        ("rows.jsonl", b'[{"image": "a", "prompt": "b"}]\n', "expected a JSON object"),
        ("rows.jsonl", b'{"file": "a", "text": "b"}\n' * 3, "expected 'image' and 'prompt'"),
        ("rows.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "can be used"),
        ("rows.parquet", b"no parquet at all", "no Parquet file"),
        ("rows.bin", b"PAR1, and then nothing", "no Parquet file"),
    ],
)
def test_files_that_cannot_be_used_at_all(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_rows(tmp_path / name)


def test_what_is_not_there(tmp_path, shelf):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        open_rows(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_rows(write_lines(tmp_path / "rows.jsonl", good_rows(2)), tmp_path / "nowhere")
    pyarrow.parquet.write_table(pyarrow.table({"picture": ["a"], "prompt": ["b"]}), tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="the columns picture, prompt: expected 'image'"):
        open_rows(tmp_path / "r.parquet", shelf)


def write_table(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize(("write", "name"), [(write_lines, "rows.jsonl"), (write_table, "rows.parquet")])
def test_a_file_that_changes_under_way_stops_the_run(write, name, shelf, tmp_path):
    """In this process, and in an actor that gets its copy before or after."""
    path = write(tmp_path / name, good_rows(4))
    rows = open_rows(path, shelf)
    sent = pickle.dumps(rows)
    early = pickle.loads(sent)
    assert [found.prefix for found in early.read(0, 2)] == ["caption en", "how many stars?"]
    write(path, good_rows(5))
    for answer in (
        lambda: list(answer_here(rows, 0, stub)),
        lambda: early.read(1, 3),
        lambda: pickle.loads(sent).read(0, 1),
    ):
        with pytest.raises(RuntimeError, match="was changed while it was in use: start again"):
            answer()


# who is to blame


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 39)), st.integers(1, 40))
def test_halving_finds_every_bad_row_and_no_other(bad, count):
    calls = []

    def answer(examples):
        calls.append(len(examples))
        if any(int(example.prefix) in bad for example in examples):
            raise ValueError("bad")
        return [example.prefix for example in examples]

    outcomes = answers_or_reasons([Example(b"", str(i), "") for i in range(count)], answer)
    found = sum(i in bad for i in range(count))
    assert outcomes == [(None, "bad") if i in bad else (str(i), None) for i in range(count)]
    assert len(calls) <= 1 + 2 * found * math.ceil(math.log2(count)) if count > 1 else len(calls) == 1


def test_a_lost_gpu_is_no_fault_of_a_row():
    def answer(examples):
        raise torch.AcceleratorError("the device is gone")

    with pytest.raises(torch.AcceleratorError):
        answers_or_reasons([Example(b"", "a", ""), Example(b"", "b", "")], answer)


def test_a_batch_that_is_too_large_is_answered_in_halves():
    def answer(examples):
        if len(examples) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return [example.prefix for example in examples]

    outcomes = answers_or_reasons([Example(b"", str(i), "") for i in range(10)], answer)
    assert outcomes == [(str(i), None) for i in range(10)]


# parts


@pytest.fixture
def stubbed(tmp_path):
    """Rows that a stub answers, and what a run that nobody disturbs leaves."""
    lines = [{"image": "x.png", "prompt": f"é {i}" if i % 5 else "bad"} for i in range(23)]
    return open_rows(write_lines(tmp_path / "rows.jsonl", lines))


def run_parts(rows, folder: Path, form: str) -> AnswerParts:
    folder.mkdir(exist_ok=True)
    parts = AnswerParts(folder, len(rows), rows_per_part=6, form=form)
    parts.write(answer_here(rows, parts.next_index(), stub, batch_size=4))
    return parts


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_kill_at_any_byte_of_any_part(form, stubbed, tmp_path):
    expected = list(run_parts(stubbed, tmp_path / "whole", form))
    assert [record["index"] for record in expected] == list(range(23))
    assert [record["error"] is not None for record in expected] == [i % 5 == 0 for i in range(23)]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == [f"part-0000{part}.{form}" for part in range(4)]
    lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in expected]
    for part in range(4):
        grown = b"".join(lines[6 * part : 6 * part + 6])
        for length in {*range(0, len(grown), 97), len(grown) - 1, len(grown)}:
            folder = tmp_path / f"{part}-{length}"
            folder.mkdir()
            for name in names[:part]:
                (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
            (folder / f"part-0000{part}.jsonl").write_bytes(grown[:length])
            again = run_parts(stubbed, folder, form)
            assert list(again) == expected
            assert sorted(path.name for path in folder.iterdir()) == names


def test_a_kill_between_parquet_and_the_lines_it_replaces(stubbed, tmp_path):
    parts = run_parts(stubbed, tmp_path / "out", "parquet")
    expected = list(parts)
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in expected[18:])
    parts.path(3).write_bytes(lines)
    (parts.folder / ".part-00003.parquet.part").write_bytes(b"half")
    assert parts.next_index() == 23 and not parts.path(3).exists()
    assert list(parts) == expected


def test_parts_that_were_edited_are_refused(stubbed, tmp_path):
    parts = run_parts(stubbed, tmp_path / "out", "jsonl")
    assert parts.next_index() == 23
    lines = parts.path(3).read_text().splitlines(keepends=True)
    parts.path(3).write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="edited"):
        parts.next_index()
    parts.path(3).write_text("".join(lines))
    parts.path(1).unlink()
    with pytest.raises(ValueError, match=r"lacks part-00001\.jsonl"):
        parts.next_index()


@pytest.mark.parametrize("lost", [30, None])
def test_a_part_that_a_power_failure_has_cut_is_told(stubbed, tmp_path, lost):
    """The sentence says what repairs it; None loses all lines of the part."""
    parts = run_parts(stubbed, tmp_path / "out", "jsonl")
    expected = list(parts)
    lines = parts.path(1).read_bytes()
    parts.path(1).write_bytes(lines[:-lost] if lost else b"")
    for read in (parts.next_index, lambda: list(parts)):
        with pytest.raises(
            ValueError, match=rf"part-00001.jsonl ends before row {11 if lost else 6}, .* remove it and all"
        ):
            read()
    for part in (1, 2, 3):
        parts.path(part).unlink()
    assert list(run_parts(stubbed, tmp_path / "out", "jsonl")) == expected


def test_a_full_part_is_on_the_disk_before_the_next_begins(stubbed, tmp_path, monkeypatch):
    forced = []
    monkeypatch.setattr(bulk, "to_disk", lambda path: forced.append((path.name, len(list(path.parent.glob("part-*"))))))
    run_parts(stubbed, tmp_path / "out", "jsonl")
    assert [one for one in forced if one[0].startswith("part-")] == [(f"part-0000{n}.jsonl", n + 1) for n in range(4)]


def test_a_record_out_of_turn_is_not_written(tmp_path):
    parts = AnswerParts(tmp_path, 3)
    record = {"index": 0, "error": None}
    with pytest.raises(RuntimeError, match="row 2 came where row 1 was due"):
        parts.write(iter([record, record | {"index": 2}]))
    assert parts.next_index() == 1
    with pytest.raises(RuntimeError, match="end before row 2"):
        parts.write(iter([record | {"index": 1}]))


def test_a_disk_of_pictures_that_is_away_stops_the_run(tmp_path, monkeypatch):
    """Rows that fail behind an answer are not written before the next answer, so they are asked again."""
    monkeypatch.setattr(bulk, "FAILED_IN_ORDER", 5)

    def records(start: int, failing: set[int]):
        return ({"index": i, "error": "no such file" if i in failing else None} for i in range(start, 20))

    parts = AnswerParts(tmp_path / "out", 20, rows_per_part=4)
    parts.folder.mkdir()
    seldom = {0, 1, 2, 3, 4, 5, 7, 8, 9, 10}  # from the beginning on, and four between two answers
    words = r"the last 5 rows have all failed \(no such file\): is the disk .* there\? .* goes on at row 12"
    with pytest.raises(RuntimeError, match=words):
        parts.write(records(0, seldom | set(range(12, 20))))
    assert parts.next_index() == 12
    assert [record["index"] for record in parts if record["error"]] == sorted(seldom)
    assert parts.write(records(12, {17, 18, 19})) == {"answered": 5, "error": 3}
    assert [record["index"] for record in parts if record["error"]] == [*sorted(seldom), 17, 18, 19]
    other = AnswerParts(tmp_path, 20)
    assert other.write(records(0, set(range(20)))) == {"error": 20}  # rows that nobody has answered may be like that


def test_a_full_disk_is_told(tmp_path):
    """A limit on the size of files stands for a disk that is full: the kernel refuses the write either way."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from pathlib import Path
from sigma_book.bulk import AnswerParts
records = ({{"index": i, "answer": "a" * 50, "error": None}} for i in range(100))
AnswerParts(Path({str(tmp_path)!r}), 100).write(records)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RuntimeError" in done.stderr and "make room" in done.stderr
    following = AnswerParts(tmp_path, 100).next_index()
    assert 30 < following < 60
    assert [record["index"] for record in AnswerParts(tmp_path, 100)] == list(range(following))


# the command


def answer_command(data: Path, out: Path, folder: Path, *options) -> list[str]:
    command = [sys.executable, "-m", "sigma_book.cli", "answer", "--data", data, "--out", out, "--model", folder]
    return [*map(str, command), "--max-new-tokens", "12", "--device", "cpu", *map(str, options)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": 0}, "actors is 0"),
        ({"actors": 1.5}, "actors is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"rows_per_part": 0}, "rows_per_part is 0"),
        ({"form": "csv"}, "form is 'csv'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"model": "/no/such/model"}, "no such folder"),
    ],
)
def test_arguments_out_of_range_leave_nothing_behind(options, words, shelf, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", good_rows(3))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        answer_file(data, tmp_path / "out", root=shelf, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("claim", [{"cpus": -1}, {"cpus": math.inf}, {"gpus": math.nan}])
def test_claims_out_of_range(claim):
    with pytest.raises(ValueError, match=next(iter(claim))):
        BulkConfig(**claim)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 16), (None, 16)],
)
def test_a_container_has_the_processors_that_it_has_time_for(limit, expected, tmp_path, monkeypatch):
    """`docker run --cpus 2` on a machine of 16: Ray has 2 to give."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(bulk, "CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert bulk.processors() == expected


def test_a_container_has_the_memory_up_to_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert training.free_bytes(cpu) > 5000
    (tmp_path / "memory.max").write_text("max\n")
    assert training.free_bytes(cpu) > 5000
    for name, text in (("max", "9000"), ("current", "6000"), ("stat", "file 1500\ninactive_file 1000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert training.free_bytes(cpu) == 4000


def test_a_device_that_ray_cannot_give(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:1': Ray gives each process a GPU of its own, so give cuda"):
        bulk.claims(2, "cuda:1")
    assert bulk.claims(1, "auto") == (1.0, 0.0)
    for parts in (1, 3, 7, 12, 10**6):  # Ray counts what does not fit
        assert parts * bulk.claims(parts, "cpu")[0] <= max(bulk.processors(), 0.001 * parts)
    monkeypatch.setenv("RAY_ADDRESS", "")  # is no cluster
    assert bulk.claims(1, "auto") == (1.0, 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert bulk.claims(2, "cuda") == (1.0, 1.0) and bulk.claims(2, "cpu") == (1.0, 0.0)
    with pytest.raises(ValueError, match="this machine has no GPU but its cluster may: give cuda or cpu"):
        bulk.claims(2, "auto")


@pytest.mark.parametrize("package", ["ray", "pyarrow"])
def test_without_the_extra_a_sentence_names_it(package, shelf, tiny_folder, tmp_path, monkeypatch, capsys):
    data = write_lines(tmp_path / "rows.jsonl", good_rows(3))
    if package == "pyarrow":
        pyarrow.parquet.write_table(
            pyarrow.table({"image": ["0.png"], "prompt": ["x"]}), data := tmp_path / "r.parquet"
        )
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert main(answer_command(data, tmp_path / "out", tiny_folder, "--root", shelf)[3:]) == 2
    said = capsys.readouterr().err
    assert "pip install 'sigma-book[scale]'" in said and "Traceback" not in said


def test_a_second_process_leaves_the_folder_as_it_is(shelf, tmp_path, at_work):
    """The first is still loading its model: it has no answer yet, and a lock."""
    data, out = write_lines(tmp_path / "rows.jsonl", good_rows(3)), tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    with at_work(out), pytest.raises(RuntimeError, match="another process is at work in"):
        answer_file(data, out, root=shelf, device="cpu")
    assert (out / "run.json").read_text() == "{}"


@pytest.mark.slow  # chapter 22b runs Ray too, with actors that pretend
def test_two_actors_answer_as_one_process_does(shelf, tiny_folder, tiny_model, tmp_path):
    """Real Ray, with every kind of poison among the rows; then the same command again, which asks nobody."""
    lines = mixed_rows(60)
    data = write_lines(tmp_path / "rows.jsonl", lines)
    options = ("--root", shelf, "--actors", 2, "--batch-size", 4, "--rows-per-part", 25)
    command = answer_command(data, tmp_path / "out", tiny_folder, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"60 rows: {60 - len(POISON)} answered, {len(POISON)} with an error\n"
    records = read_parts(tmp_path / "out")
    assert [record["index"] for record in records] == list(range(60))
    assert [record["answer"] for record in records] == answers_one_by_one(lines, shelf, tiny_model)
    sentences = iter(POISON.values())
    assert all(next(sentences)[1] in record["error"] for record in records if record["answer"] is None)
    assert len(list((tmp_path / "out").glob("part-*.jsonl"))) == 3
    settings = {"root": shelf, "model": tiny_folder, "max_new_tokens": 12, "device": "cpu", "rows_per_part": 25}
    assert answer_file(data, tmp_path / "out", **settings).total() == 60  # finished: no actor is started
    assert read_parts(tmp_path / "out") == records
    with pytest.raises(ValueError, match="rows_per_part = 25, this one has 30"):
        answer_file(data, tmp_path / "out", **(settings | {"rows_per_part": 30}))


@pytest.mark.slow
def test_batches_that_share_a_block_of_ray_are_answered_one_after_another(shelf, tmp_path, monkeypatch):
    rows = open_rows(write_lines(tmp_path / "rows.jsonl", good_rows(50)), shelf)

    def pretend():
        return lambda examples: [f"{example.prefix} among {len(examples)}" for example in examples]

    monkeypatch.setattr(bulk, "MOST_BLOCKS", 4)
    found = list(bulk.answer_with_ray(rows, 5, pretend, BulkConfig(actors=2, batch_size=4, cpus=0.25)))
    assert found == list(answer_here(rows, 5, pretend(), batch_size=4))
    # twelve batches, three to a block, whose answers come together: a guard that waits for one alone would end a healthy run
    from ray.data import DataContext  # seconds to import, and only here

    assert DataContext.get_current().execution_no_progress_timeout_s == 3 * 1800


def count_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("part-*.jsonl"))


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"it ended before it could be killed: {process.communicate()[1][-3000:]!r}")
        assert time.monotonic() < end, "it did not begin in time"
        time.sleep(0.05)


def processes_under(root: int) -> dict[int, str]:
    """Process ids below a process, with the names they go by."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    below = {}
    for number in parents:
        above = number
        while above in parents and above != root:
            above = parents[above]
        if above == root and number != root:
            below[number] = names[number]
    return below


def lives(number: int) -> bool:
    """Whether a process runs; one that has ended may stand in the list until somebody asks how."""
    try:
        return (Path("/proc") / str(number) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_driver_is_killed_twice_and_no_row_is_lost_or_there_twice(form, shelf, tiny_folder, tiny_model, tmp_path):
    lines = mixed_rows(600)
    data = write_lines(tmp_path / "rows.jsonl", lines)
    options = ("--root", shelf, "--actors", 2, "--batch-size", 2, "--rows-per-part", 70, "--form", form)
    command = answer_command(data, tmp_path / "out", tiny_folder, *options)
    written = 0
    for more in (30, 130):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
        sealed = lambda: 70 * len(list((tmp_path / "out").glob("part-*.parquet")))  # noqa: E731
        goal = written + more
        wait_for(lambda: sealed() + count_lines(tmp_path / "out") >= goal, process)  # noqa: B023
        below = processes_under(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        written = len(read_parts_torn(tmp_path / "out"))
        assert written < 600
        ours = [number for number, name in below.items() if "BulkActor" in name]
        assert len(ours) == 2
        # two agents of Ray's take a minute to see that they are alone
        for these, seconds in ((ours, 20), (below, 150)):
            end = time.monotonic() + seconds
            while (left := {below[number] for number in these if lives(number)}) and time.monotonic() < end:
                time.sleep(0.2)
            assert not left, "its processes live on"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "going on behind row" in done.stderr
    records = read_parts(tmp_path / "out")
    assert [record["index"] for record in records] == list(range(600))
    assert [record["answer"] for record in records] == answers_one_by_one(lines, shelf, tiny_model)
    assert len(list((tmp_path / "out").glob(f"part-*.{form}"))) == 9


class SlowRay:
    """Fails as Ray does on a busy machine, so many times."""

    def __init__(self, failures: int, words: str):
        self.failures, self.words, self.started = failures, words, 0

    def init(self, **settings) -> None:
        self.started += 1
        if self.started <= self.failures:
            raise Exception(f"The current node {self.words}\nduring startup.")

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize(
    ("failures", "words", "tries", "starts"),
    [(0, "", 1, True), (2, "timed out", 3, True), (3, "timed out", 3, False), (1, "fell", 1, False)],
)
def test_ray_gets_three_chances_to_start(failures, words, tries, starts):
    ray = SlowRay(failures, words)
    if starts:
        bulk._start(ray)
    else:
        with pytest.raises(RuntimeError, match=f"Ray did not start: The current node {words} during startup"):
            bulk._start(ray)
    assert ray.started == tries


def test_an_address_where_no_ray_is(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RuntimeError, match="nothing answers at RAY_ADDRESS, 127.0.0.1:"):
            bulk._start(SlowRay(0, ""))


def read_parts_torn(folder: Path) -> list:
    rows = []
    for path in folder.glob("part-*"):
        whole = path.suffix == ".parquet"
        rows += pyarrow.parquet.read_table(path).to_pylist() if whole else path.read_bytes().split(b"\n")[:-1]
    return rows


@pytest.mark.slow
def test_an_actor_that_dies_is_replaced(shelf, tiny_folder, tiny_model, tmp_path):
    lines = good_rows(600)
    data = write_lines(tmp_path / "rows.jsonl", lines)
    command = answer_command(data, tmp_path / "out", tiny_folder, "--root", shelf, "--actors", 2, "--batch-size", 2)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for(lambda: count_lines(tmp_path / "out") >= 20, process)
    actors = [number for number, name in processes_under(process.pid).items() if "BulkActor" in name]
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == "600 rows: 600 answered, 0 with an error\n"
    records = read_parts(tmp_path / "out")
    assert [record["index"] for record in records] == list(range(600))
    assert [record["answer"] for record in records] == answers_one_by_one(lines, shelf, tiny_model)


@pytest.mark.slow
def test_parquet_with_bytes_in_parquet_out(shelf, tiny_folder, tiny_model, tmp_path):
    names = [f"{i % 6}.png" if i % 7 else "torn.png" for i in range(50)]
    images = [(shelf / name).read_bytes() for name in names]
    table = pyarrow.table({"image": images, "prompt": ["caption en"] * 50})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=13)
    options = ("--actors", 2, "--batch-size", 4, "--rows-per-part", 20, "--form", "parquet")
    command = answer_command(tmp_path / "rows.parquet", tmp_path / "out", tiny_folder, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    records = read_parts(tmp_path / "out")
    assert [record["index"] for record in records] == list(range(50))
    for name, record in zip(names, records):
        if name == "torn.png":
            assert "damaged" in record["error"]
        else:
            expected = generate(shelf / name, "caption en", model=tiny_model, max_new_tokens=12)
            assert record["answer"] == expected and record["image"] is None


@pytest.mark.slow
def test_a_model_that_no_actor_can_load_stops_with_a_sentence(shelf, tiny_folder, copy_folder, tmp_path):
    folder = copy_folder(tiny_folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    data = write_lines(tmp_path / "rows.jsonl", good_rows(8))
    command = answer_command(data, tmp_path / "out", folder, "--root", shelf, "--actors", 2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.safetensors" in done.stderr
