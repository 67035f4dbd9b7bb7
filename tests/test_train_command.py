"""`sigma-book train` as a user meets it: real processes, killed and started again; full disks; wrong inputs."""

import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sigma_book import load
from sigma_book.cli import main
from sigma_book.world import draw_scene, make_scene

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_questions) -> Path:
    """A folder with `train.jsonl`, 31 questions about drawn scenes, and `test.jsonl`, 9 of them."""
    return write_questions(tmp_path_factory.mktemp("data"), train=31, test=9)


@pytest.fixture
def arguments(data, tiny_folder):
    """The arguments of a run of some steps; `more` come behind and win."""

    def build(out: Path, *more, steps: int = 24) -> list[str]:
        given = ["train", "--data", data / "train.jsonl", "--out", out, "--model", tiny_folder, "--max-steps", steps]
        given += ["--batch-size", 3, "--accumulate", 2, "--learning-rate", 3e-3, "--save-every", 1, "--device", "cpu"]
        return [str(part) for part in (*given, *more)]

    return build


def start(arguments: list[str], **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "sigma_book.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=ONE_THREAD, start_new_session=True, **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def log(out: Path) -> list[list[str]]:
    """The log without the seconds, which no two runs share."""
    with (out / "log.csv").open() as file:
        return [row[:-1] for row in csv.reader(file)]


def steps_logged(out: Path) -> int:
    path = out / "log.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def wait_for(process: subprocess.Popen, reached) -> None:
    """Until something is reached, or the process has ended."""
    limit = time.monotonic() + 100
    while process.poll() is None and not reached():
        assert time.monotonic() < limit, "the run makes no progress"
        time.sleep(0.002)


def final_weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


@pytest.fixture
def one_thread():
    """Sums are cut into parts by the number of threads: a run in this process must have as many as its twin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_often(arguments: list[str], out: Path, kills: int, rng: random.Random) -> list[int]:
    """Run a command and kill -9 it at random moments; gives after how many logged steps each kill came."""
    came = []
    for number in range(kills):
        process = start(arguments)
        goal = len(came) and came[-1]  # at least as far as the one before, then a random wait
        wait_for(process, lambda goal=goal: steps_logged(out) > goal)
        time.sleep(rng.uniform(0, 0.15))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {number} came after the end"
        came.append(steps_logged(out))
    return came


def test_killed_it_ends_with_the_same_bits(arguments, data, tmp_path, one_thread, capsys):
    more = ("--evaluate", data / "test.jsonl", "--evaluate-every", 10)
    assert main(arguments(tmp_path / "whole", *more, steps=40)) == 0
    seed = random.randrange(10**6)
    came = kill_often(arguments(tmp_path / "cut", *more, steps=40), tmp_path / "cut", 1, random.Random(seed))
    assert main(arguments(tmp_path / "cut", *more, steps=40)) == 0
    assert "going on after step" in capsys.readouterr().err
    assert final_weights(tmp_path / "cut") == final_weights(tmp_path / "whole"), f"seed {seed}, kills after {came}"
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert len(log(tmp_path / "cut")) == 1 + 40
    ours, theirs = ((tmp_path / name / "evaluations.json").read_text() for name in ("cut", "whole"))
    assert ours == theirs and [note["step"] for note in json.loads(ours)] == [0, 10, 20, 30, 40]
    best, expected = (tmp_path / name / "best" / "model.safetensors" for name in ("cut", "whole"))
    assert best.read_bytes() == expected.read_bytes()
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--workers", 2), ("--save-every", 3), ("--recompute", "--schedule", "linear")])
def test_killed_many_times_it_ends_with_the_same_bits(arguments, tmp_path, one_thread, more):
    """Four runs, seven kills each, at random moments; with a save at each step many of them fall into a save."""
    assert main(arguments(tmp_path / "whole", *more, steps=120)) == 0
    seed = random.randrange(10**6)
    came = kill_often(arguments(tmp_path / "cut", *more, steps=120), tmp_path / "cut", 7, random.Random(seed))
    assert finish(start(arguments(tmp_path / "cut", *more, steps=120)))[0] == 0
    assert final_weights(tmp_path / "cut") == final_weights(tmp_path / "whole"), f"seed {seed}, kills after {came}"
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


@pytest.mark.slow
def test_killed_in_the_middle_of_saves(arguments, tmp_path, one_thread):
    """Eight kills, each when a folder of a save that is not done stands there."""
    assert main(arguments(tmp_path / "whole", steps=60)) == 0
    out, saves = tmp_path / "cut", tmp_path / "cut" / "checkpoints"
    caught = 0
    while caught < 8:
        process = start(arguments(out, steps=60))
        goal = steps_logged(out) + 1
        wait_for(process, lambda goal=goal: steps_logged(out) > goal and any(saves.glob(".step-*")))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed eight times"
        caught += any(saves.glob(".step-*"))
    assert finish(start(arguments(out, steps=60)))[0] == 0
    assert final_weights(out) == final_weights(tmp_path / "whole")
    assert log(out) == log(tmp_path / "whole")
    assert not list(saves.glob(".*"))


def test_control_c_saves_and_says_how_to_go_on(arguments, tmp_path, one_thread, capsys):
    """The signal goes to the whole group, as a terminal sends it, so the processes that read ahead hear it too."""
    out, more = tmp_path / "cut", ("--save-every", 1000, "--workers", 2)
    assert main(arguments(tmp_path / "whole", *more)) == 0
    process = start(arguments(out, *more))
    wait_for(process, lambda: steps_logged(out) >= 3)
    os.killpg(process.pid, signal.SIGINT)
    code, printed, err = finish(process)
    assert (code, printed) == (130, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("sigma-book: stopped after step ") and "give the same command again" in last
    assert "Traceback" not in err
    assert len(list((out / "checkpoints").iterdir())) == 1
    capsys.readouterr()
    assert main(arguments(out, *more)) == 0
    printed, err = capsys.readouterr()
    assert "going on after step" in err and printed == f"{out / 'final'}\n"
    assert final_weights(out) == final_weights(tmp_path / "whole")


def test_the_finished_model_is_read_by_us_and_by_transformers(arguments, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(out, "--evaluate", data / "test.jsonl", steps=6)) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out / 'final'}\n", "the answer alone"
    assert "before: loss" in captured.err and "truth" in captured.err
    before, after = json.loads((out / "evaluations.json").read_text())
    assert (before["step"], after["step"], before["asked"]) == (0, 6, 9)
    assert after["loss"] < before["loss"]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    ours, theirs = load(out / "final"), AutoModelForImageTextToText.from_pretrained(out / "final").eval()
    batch = ours.processor.prepare([draw_scene(make_scene(3))], ["caption en"])
    inputs = AutoProcessor.from_pretrained(out / "final")(
        images=draw_scene(make_scene(3)), text="<image>caption en", return_tensors="pt"
    )
    inputs.pop("labels", None)
    with torch.no_grad():
        scores = ours(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)
        torch.testing.assert_close(scores, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
    best = load(out / "best")
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), ours.parameters())), "the last was the best"


@pytest.mark.parametrize(
    "more",
    [
        ("--dtype", "bfloat16"),
        pytest.param(("--dtype", "float16"), marks=pytest.mark.slow),
        ("--optimizer", "adamw8bit"),
        ("--recompute", "--schedule", "linear", "--warmup", 2, "--weight-decay", 0.1),
        ("--freeze", "vision", "--projector-rate", 1e-2, "--decoder-rate", 1e-4),
        pytest.param(("--epochs", 2, "--workers", 1, "--seed", 7), marks=pytest.mark.slow),
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_each_way_of_learning_goes_on_bit_by_bit(arguments, data, tmp_path, capsys, more):
    """The last checkpoint of three and what was made of it are taken away, and the command is given again."""
    if "adamw8bit" in more:
        pytest.importorskip("bitsandbytes")
    whole, out = tmp_path / "whole", tmp_path / "cut"
    given = (*more, "--evaluate", data / "test.jsonl", "--evaluate-every", 2)
    assert main(arguments(whole, *given, steps=3)) == 0
    shutil.copytree(whole, out)
    for gone in (out / "final", out / "best", out / "checkpoints" / "step-000003"):
        shutil.rmtree(gone)
    assert main(arguments(out, *given, steps=3)) == 0
    assert "going on after step 2 of 3" in capsys.readouterr().err
    assert final_weights(out) == final_weights(whole) and log(out) == log(whole)
    assert (out / "evaluations.json").read_text() == (whole / "evaluations.json").read_text()


def test_a_finished_run_says_so_and_changes_nothing(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(out, steps=2)) == 0
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(arguments(out, steps=2)) == 0
    captured = capsys.readouterr()
    assert "is finished" in captured.err and captured.out == f"{out / 'final'}\n"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    known = json.loads((out / "run.json").read_text())
    del known["form"], known["root"]  # as a version before wrote it
    known |= {"rank": 8, "alpha": 64.0, "dropout": 0.0}  # which decide nothing where all learns
    (out / "run.json").write_text(json.dumps(known))
    assert main(arguments(out, steps=2)) == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--seed", 5), "seed = 0, this one has 5"),
        (("--learning-rate", 1e-4), "learning_rate = 0.003, this one has 0.0001"),
        (("--freeze", "vision"), "freeze = []"),
        (("--max-steps", 9), "max_steps = 4, this one has 9"),
        (("--schedule", "linear"), "schedule = 'cosine'"),
        (("--data", "test"), "data = 'train.jsonl"),
        (("--model", "pocket"), "model = 'model, "),
        (("--form", "text"), "form = 'prefix', this one has 'text'"),
        (("--root", "/"), "root = None, this one has '/'"),
    ],
)
def test_another_run_does_not_enter_the_folder(arguments, data, tmp_path, capsys, more, named):
    out = tmp_path / "run"
    assert main(arguments(out, steps=4)) == 0
    capsys.readouterr()
    if more[1] == "test":
        more = ("--data", data / "test.jsonl")
    given = arguments(out, *more, steps=4)
    if more[1] == "pocket":
        given = arguments(out, steps=4)
        del given[given.index("--model") : given.index("--model") + 2]
    assert main(given) == 2
    assert named in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told_and_the_run_ends_with_the_same_bits(arguments, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert main(arguments(whole, steps=6)) == 0
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    spoilt = out / "checkpoints" / "step-000006" / "optimizer.safetensors"
    os.truncate(spoilt, spoilt.stat().st_size // 2)
    capsys.readouterr()
    assert main(arguments(out, steps=6)) == 0
    err = capsys.readouterr().err
    assert "step-000006 is damaged" in err and "going on after step 5 of 6" in err
    assert final_weights(out) == final_weights(whole)


@pytest.mark.parametrize("rate", [1e30])
def test_a_loss_that_is_no_number_names_step_and_examples(arguments, tmp_path, capsys, rate):
    out = tmp_path / "run"
    assert main(arguments(out, "--learning-rate", rate, "--warmup", 0)) == 2
    err = capsys.readouterr().err
    assert "sigma-book: the " in err and " at step 1: nothing was changed by this step" in err
    assert err.count("train.jsonl, line ") == 6, "two batches of three"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]


def test_a_full_disk_loses_nothing(arguments, tmp_path, one_thread):
    """Files may grow to 40 kB only, less than a checkpoint needs: a sentence, the older checkpoints stand, and with room
    the run ends with the same bits."""
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert main(arguments(whole, steps=8)) == 0
    shutil.copytree(whole, out)
    for gone in (out / "final", out / "checkpoints" / "step-000007", out / "checkpoints" / "step-000008"):
        shutil.rmtree(gone)
    before = {path: path.read_bytes() for path in (out / "checkpoints").glob("step-*/*")}
    assert before
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    code, _, err = finish(start(arguments(out, steps=8), preexec_fn=limit))
    assert code == 2
    assert "cannot be written" in err and "those before it stand" in err and "Traceback" not in err
    assert {path: path.read_bytes() for path in (out / "checkpoints").glob("step-*/*")} == before
    assert main(arguments(out, steps=8)) == 0
    assert final_weights(out) == final_weights(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system is mounted by root alone")
def test_a_full_file_system_loses_nothing(arguments, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        assert main(arguments(disk / "run", "--keep", 100)) == 2
        err = capsys.readouterr().err
        assert "No space left" in err and "those before it stand" in err
        saved = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert saved and saved == [f"step-{number:06d}" for number in range(1, len(saved) + 1)]
        assert main(arguments(disk / "run", "--keep", 1)) in (0, 2)
        assert f"going on after step {len(saved)}" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", disk], check=True)


def wandb_records(content: bytes) -> list[bytes]:
    """The records of a file of Weights & Biases, which is a LevelDB log behind seven bytes of its own.

    Blocks of 32 KiB; in them pieces with a head of seven bytes: checksum, length, and whether the piece is a whole
    record (1), its beginning (2), middle (3) or end (4).
    """
    assert content.startswith(b":W&B")
    records, at, parts = [], 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a head: the rest of the block is empty
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records


def test_weights_and_biases_offline(arguments, data, tmp_path, monkeypatch, capsys):
    """What it wrote is read back: the project, and the losses of the log at their steps."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    assert main(arguments(out, "--wandb", "book", "--evaluate", data / "test.jsonl", steps=4)) == 0
    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    rows, projects = [], set()
    for raw in wandb_records(path.read_bytes()):
        record = Record.FromString(raw)
        if record.run.project:
            projects.add(record.run.project)
        if record.history.item:
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    losses = {row["_step"]: row["loss"] for row in rows if "loss" in row}
    assert projects == {"book"}
    assert [losses[step] for step in (1, 2, 3, 4)] == [float(row[1]) for row in log(out)[1:]]
    assert any("held_out/exact" in row for row in rows)


def test_without_matplotlib_a_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(arguments(tmp_path / "run", steps=1)) == 0
    assert "no picture of the losses: install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "run" / "losses.png").exists()


def test_a_dry_run_writes_nothing(arguments, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", "--dry-run", "--freeze", "vision")) == 0
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    for word in ("learning", "weights", "gradients", "optimizer", "activations", "together", "a step", " s"):
        assert word in printed


def test_rows_that_cannot_be_read(arguments, data, tiny_folder, tmp_path, capsys):
    rows = (data / "train.jsonl").read_text().splitlines()
    rows[4] = "{not json"
    rows[7] = json.dumps({"image": "gone.png", "prefix": "x", "suffix": "y"})
    spoilt = data / "spoilt.jsonl"
    spoilt.write_text("\n".join(rows) + "\n")
    given = arguments(tmp_path / "run", "--data", spoilt, "--epochs", 1)
    assert main(given) == 2
    assert "spoilt.jsonl, line " in capsys.readouterr().err
    assert main([*given, "--on-error", "skip", "--dry-run"]) == 0
    assert "rows that cannot be read, so far: 2" in capsys.readouterr().err
    (data / "none.jsonl").write_text(rows[7] + "\n")
    assert main([*arguments(tmp_path / "none", "--data", data / "none.jsonl"), "--on-error", "skip", "--dry-run"]) == 2
    assert re.search(r"no row can be read; none.jsonl, line 1: .*gone.png", capsys.readouterr().err)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "skipped.jsonl").write_text('{"where": "spoilt.jsonl, line 1", "reason": "mended since"}\n')
    assert main([*given, "--on-error", "skip"]) == 0, "the same run goes on, told to leave them out"
    assert "2 rows were left out and listed in" in capsys.readouterr().err
    listed = [json.loads(line)["where"] for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(listed) == ["spoilt.jsonl, line 5", "spoilt.jsonl, line 8"]


def test_an_epoch_is_all_examples_once(arguments, tmp_path):
    """31 examples in batches of 3, two a step: 11 batches, the last of one; 6 steps, the last of one batch."""
    assert main(arguments(tmp_path / "run", "--epochs", 1, steps=1000)) == 0
    assert len(log(tmp_path / "run")) == 1 + 6


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--method", "magic"), "method is 'magic': expected full, lora, qlora"),
        (("--freeze", "vision", "projector", "decoder"), "nothing would learn"),
        (("--freeze", "eyes"), "freeze names 'eyes'"),
        (("--batch-size", 0), "batch_size is 0"),
        (("--max-steps", 0), "max_steps is 0"),
        (("--save-every", 0), "save_every is 0"),
        (("--evaluate-every", 0), "evaluate_every is 0"),
        (("--learning-rate", "nan"), "learning_rate is nan"),
        (("--schedule", "square"), "schedule is 'square'"),
        (("--dtype", "int4"), "dtype is 'int4'"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--evaluate", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "nowhere"), "no such folder: nowhere"),
        (("--on-error", "ignore"), "on_error is 'ignore'"),
        (("--seed", -1), "seed is -1"),
        (("--warmup", "-1"), "warmup is -1"),
        (("--device", "tpu"), "device is 'tpu'"),
        (("--form", "csv"), "form is 'csv'"),
        (("--root", "nowhere"), "no such folder: nowhere"),
    ],
)
def test_wrong_inputs_get_a_sentence_and_leave_no_run(arguments, tmp_path, capsys, more, sentence):
    out = tmp_path / "run"
    assert main(arguments(out, *more)) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.out == ""
    assert "Traceback" not in captured.err
    assert not (out / "checkpoints").exists()
    if more[0] != "--dtype":
        assert main(arguments(out, steps=1)) == 0, "the right command is not refused afterwards"


def test_a_run_needs_a_folder(arguments, tmp_path, capsys):
    given = arguments(tmp_path / "run")
    del given[given.index("--out") : given.index("--out") + 2]
    assert main(given) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(arguments, tmp_path, capsys):
    """A process holds the folder; ours is told so, and may enter when the other is gone, even by a kill."""
    out = tmp_path / "run"
    assert main(arguments(out, steps=2)) == 0
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints")  # as if the other had just begun
    settings = (out / "run.json").read_text()
    program = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('in', flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", program, out / ".lock"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    for more in ((), ("--seed", 3)):
        assert main(arguments(out, *more, steps=2)) == 2
        assert "another process is at work in" in capsys.readouterr().err
    assert (out / "run.json").read_text() == settings
    other.kill()
    other.communicate()
    assert main(arguments(out, steps=2)) == 0


def test_the_folder_of_something_else_is_left_alone(arguments, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(arguments(tmp_path)) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
