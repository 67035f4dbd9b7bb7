"""`finetune` with lora and qlora: what learns, what is written, who reads it, and that a killed run ends at the same bits."""

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from sigma_book import TrainingConfig, evaluate, finetune, generate, load, runs
from sigma_book.answers import write_world_files
from sigma_book.assemble import POCKET
from sigma_book.data import read_examples
from sigma_book.lora import LoraConfig, LoraLinear, add_lora, merge_lora, save_adapter
from sigma_book.qlora import NF4Linear, nf4_bytes
from sigma_book.runs import estimate, model_mark
from sigma_book.training import ALONE, Progress
from sigma_book.world import ask, draw_scene, make_scene

FEW = TrainingConfig(method="lora", max_steps=4, batch_size=3, learning_rate=3e-3, rank=4, alpha=8)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for seed in range(12):
        draw_scene(make_scene(seed)).save(folder / f"{seed}.png")
        question = ask(make_scene(seed), "count", random.Random(seed))
        rows.append({"image": f"{seed}.png", "prefix": question.prompt, "suffix": question.answer})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def with_method(method: str) -> TrainingConfig:
    adapters = {} if method != "full" else {"rank": TrainingConfig.rank, "alpha": TrainingConfig.alpha}
    return TrainingConfig(**(vars(FEW) | {"method": method} | adapters))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_taught_written_and_read(method, data, tmp_path):
    """The loss falls, the final folder is an adapter that `generate` takes as a model, and its base is not in it."""
    config = TrainingConfig(**(vars(FEW) | {"method": method, "max_steps": 12}))
    final = finetune(data, tmp_path / "run", config, device="cpu")
    assert sorted(path.name for path in final.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[1]) for row in rows]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    model = load(final, device="cpu", quantize="nf4" if method == "qlora" else None)
    updates = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(updates) == 4 * 7 and any(update.lora_B.abs().max() > 0 for update in updates)
    assert all(isinstance(update.base, NF4Linear) == (method == "qlora") for update in updates)
    picture, prompt = draw_scene(make_scene(3)), "caption en"
    assert generate(picture, prompt, model=final) == generate(picture, prompt, model=load(final))


def test_only_the_adapter_learns_and_only_it_is_in_a_checkpoint(data, tmp_path):
    finetune(data, tmp_path / "run", with_method("qlora"), save_every=2, device="cpu")
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-000002")
    names = load_file(saved / "weights.safetensors").keys()
    assert names and all(".lora_" in name for name in names)
    assert len(names) == 2 * 4 * 7


def test_peft_reads_what_a_run_wrote(data, tiny_folder, tmp_path):
    """Equal scores to 1e-5 of the largest: float32 sums in another order."""
    config = TrainingConfig(**(vars(FEW) | {"dropout": 0.1}))
    final = finetune(data, tmp_path / "run", config, model=tiny_folder, device="cpu")
    ours = load(tiny_folder, device="cpu", adapter=final)
    reference = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(reference, final).eval()
    batch = ours.processor.prepare([draw_scene(make_scene(5))], ["caption en"])
    inputs = {name: value for name, value in vars(batch).items() if value is not None}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        scores = ours(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)
        merge_lora(ours)
        merged = ours(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)
    largest = expected.abs().max()
    assert (scores - expected).abs().max() < 1e-5 * largest
    assert (merged - expected).abs().max() < 1e-5 * largest
    values = json.loads((final / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tiny_folder)
    assert [values[key] for key in ("r", "lora_alpha", "lora_dropout")] == [4, 8, 0.1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_killed_run_ends_with_the_same_adapter(method, data, tiny_folder, tmp_path):
    """One kill -9 with dropout on, so that the random numbers must go on as well."""

    def command(out: Path) -> list[str]:
        given = ["train", "--data", data, "--out", out, "--model", tiny_folder, "--method", method, "--max-steps", 30]
        given += ["--batch-size", 3, "--rank", 4, "--dropout", 0.2, "--save-every", 1, "--device", "cpu"]
        return [sys.executable, "-m", "sigma_book.cli", *map(str, given)]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), env=ONE_THREAD, check=True, capture_output=True)
    process = subprocess.Popen(command(cut), env=ONE_THREAD, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(cut.glob("checkpoints/step-000003")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the kill came after the end"
    subprocess.run(command(cut), env=ONE_THREAD, check=True, capture_output=True)
    name = "final/adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_a_wrong_adapter_is_refused_before_anything_is_written(data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        finetune(data, tmp_path / "run", TrainingConfig(**(vars(FEW) | change)), device="cpu")
    assert not (tmp_path / "run").exists()


def test_freezing_parts_is_not_for_adapters():
    with pytest.raises(ValueError, match="method full"):
        TrainingConfig(method="lora", freeze=("vision",))


def test_an_adapter_is_no_model_to_begin_from(data, tmp_path):
    """Nor where a configuration of its base lies beside it, as some training tools write one."""
    final = tmp_path / "adapter"
    model = load(device="cpu")
    add_lora(model, LoraConfig(rank=2))
    save_adapter(model, final)
    for beside in (False, True):
        if beside:
            shutil.copy(POCKET / "config.json", final)
        for method in ("full", "lora"):
            with pytest.raises(ValueError, match="is an adapter"):
                finetune(data, tmp_path / "next", with_method(method), model=final, device="cpu")
            with pytest.raises(ValueError, match="is an adapter"):
                estimate(data, with_method(method), model=final, device="cpu")
    assert not (tmp_path / "next").exists()


def test_another_rank_does_not_go_on(data, tmp_path):
    finetune(data, tmp_path / "run", FEW, device="cpu")
    with pytest.raises(ValueError, match="holds a run with rank = 4, this one has 8"):
        finetune(data, tmp_path / "run", TrainingConfig(**(vars(FEW) | {"rank": 8})), device="cpu")


def test_the_bill_is_that_of_the_longest_batch(data, tiny_folder, monkeypatch):
    *rows, last = data.read_text().splitlines()
    path = data.with_name("long.jsonl")
    path.write_text("\n".join([*rows, json.dumps(json.loads(last) | {"suffix": "x" * 60})]))
    shown = []
    monkeypatch.setattr(runs, "training_bill", lambda *given: shown.extend(given) or stopped())
    with pytest.raises(KeyboardInterrupt):
        estimate(path, FEW, model=tiny_folder, device="cpu")
    assert shown[2].input_ids.shape[1] > 60


def test_the_bill_is_that_of_the_model(data):
    """Weights and learning numbers, held against the bytes of the real modules."""
    bills = {method: estimate(data, with_method(method), device="cpu")[0] for method in ("full", "lora", "qlora")}
    plain, quantized = load(POCKET, dtype="float32"), load(POCKET, dtype="float32", quantize="nf4")
    numbers = sum(p.numel() for p in plain.parameters())
    linears = [m.weight.numel() for n, m in plain.language_model.named_modules() if n.endswith("_proj")]
    update = sum(
        FEW.rank * (m.in_features + m.out_features)
        for n, m in plain.language_model.named_modules()
        if n.endswith("_proj")
    )
    assert bills["full"].learning == numbers and bills["full"].weights == 4 * numbers
    assert bills["lora"].learning == bills["qlora"].learning == update
    assert bills["lora"].weights == 4 * (numbers + update)
    packed = 4 * (numbers - sum(linears)) + sum(map(nf4_bytes, linears)) + 4 * update
    assert bills["qlora"].weights == packed
    held = [*quantized.parameters(), *quantized.buffers()]
    assert sum(tensor.nbytes for tensor in held) == packed - 4 * update
    assert bills["lora"].optimizer < 0.1 * bills["full"].optimizer


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_the_dry_run_tells_how_long_a_step_takes(data, tmp_path, monkeypatch, recompute):
    """Both in the seconds that this process computes, for a busy machine takes its time from both in unlike parts.

    Ten pairs on a busy machine lay between 0.92 and 1.06: the trial opens no pictures. One batch of the four left out would
    give 0.72, and so would recomputing forgotten.
    """
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    config = TrainingConfig(max_steps=10, batch_size=4, accumulate=4, recompute=recompute)
    _, told = estimate(data, config, device="cpu")
    finetune(data, tmp_path / "run", config, device="cpu")
    seconds = [float(row.split(",")[-1]) for row in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert 0.8 < told / ((seconds[-1] - seconds[1]) / 8) < 1.25


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """Ten scenes in the layouts of COCO and VQAv2: the files by what they hold."""
    return write_world_files(tmp_path_factory.mktemp("world"), 10)


def test_held_out_answers_may_lie_in_a_file_of_their_own(world, tmp_path, monkeypatch):
    examine, sizes = runs.examine, []
    monkeypatch.setattr(runs, "examine", lambda *a, **b: sizes.append(b["batch_size"]) or examine(*a, **b))
    questions, answers = world["questions"], world["annotations"]
    finetune(
        questions,
        tmp_path / "run",
        TrainingConfig(max_steps=1, batch_size=2),
        annotations=answers,
        evaluate=questions,
        evaluate_annotations=answers,
        evaluate_limit=5,
        device="cpu",
    )
    before, after = json.loads((tmp_path / "run" / "evaluations.json").read_text())
    assert before["asked"] == after["asked"] == 5 and before["step"] == 0
    assert sizes == [2, 2], "no more are asked at once than are learned from"


def test_evaluation_takes_beams_and_tells_runs_apart(world, tmp_path):
    data = world["captions"]
    evaluate("caption", data, tmp_path / "out", num_beams=2, batch_size=4, device="cpu")
    said = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    examples = read_examples(data, per_image=True)
    pictures = [example.image for example in examples]
    assert [row["answer"] for row in said] == generate(pictures, "caption en", num_beams=2)
    with pytest.raises(ValueError, match="num_beams"):
        evaluate("caption", data, tmp_path / "out", batch_size=4, device="cpu")
    text = data.read_text()
    changed = tmp_path / data.name
    changed.write_text(text.replace("a ", "o ", 1))  # as long as before
    with pytest.raises(ValueError, match="data"):
        evaluate("caption", changed, tmp_path / "out", root=data.parent.parent, num_beams=2, device="cpu")


def test_models_that_share_a_large_tower_are_two(tmp_path):
    """A frozen tower of more than 16 MiB stands first in the file; what was learned comes behind it."""
    marks, tower = set(), torch.zeros(17 << 18)
    for name, learned in (("a", 0.0), ("b", 1.0)):
        folder = tmp_path / name / "final"
        folder.mkdir(parents=True)
        save_file({"tower": tower, "tower_end": torch.full((8,), learned)}, folder / "model.safetensors")
        marks.add(model_mark(folder))
        assert model_mark(folder) in marks
    assert len(marks) == 2


def test_evaluation_takes_the_folder_of_an_adapter(world, data, tmp_path):
    final = finetune(data, tmp_path / "run", FEW, device="cpu")
    options = {"annotations": world["annotations"], "model": final, "num_examples": 4, "device": "cpu"}
    evaluate("count", world["questions"], tmp_path / "out", **options)
    said = [json.loads(line)["answer"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    asked = read_examples(world["questions"], annotations=world["annotations"])
    counted = [one for one in asked if "how many" in one.prefix][: len(said)]
    assert said == generate([one.image for one in counted], [one.prefix for one in counted], model=final)


def test_a_run_that_takes_over_finds_nothing_of_the_one_before(data, tiny_folder, tmp_path):
    """The other was killed before it had written a model."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("wandb-id.txt", "skipped.jsonl", "evaluations.json"):
        (out / name).write_text("of the other run")
    (out / "run.json").write_text("{}")
    config = TrainingConfig(**(vars(FEW) | {"max_steps": 1}))
    finetune(data, out, config, model=tiny_folder, evaluate=data, evaluate_limit=1, device="cpu")
    assert sorted(path.name for path in (out / "best").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [note["step"] for note in json.loads((out / "evaluations.json").read_text())] == [0, 1]
    assert not (out / "wandb-id.txt").exists() and not (out / "skipped.jsonl").exists()


def stopped(*given, **options):
    raise KeyboardInterrupt


def test_the_best_model_of_a_run_without_a_checkpoint_stays(data, tiny_folder, tmp_path, monkeypatch):
    """Until the run has a new one, which takes its place as a whole: the score of the one before is not asked."""
    out, options = tmp_path / "run", {"model": tiny_folder, "evaluate": data, "evaluate_limit": 1, "device": "cpu"}
    config = TrainingConfig(**(vars(FEW) | {"max_steps": 1}))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, "train", stopped)
        finetune(data, out, config, **options)
    (out / "best").mkdir()
    for name in ("model.safetensors", "config.json"):
        (out / "best" / name).write_text("of step 400")
    (out / "evaluations.json").write_text('[{"step": 400, "asked": 1, "loss": 0.0}]')
    with pytest.raises(ValueError, match="holds a run with seed = 0, this one has 1"):
        finetune(data, out, TrainingConfig(**(vars(config) | {"seed": 1})), **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, "train", stopped)
        finetune(data, out, config, **options)
    assert {path.read_text() for path in (out / "best").iterdir()} == {"of step 400"}
    finetune(data, out, config, **options)
    assert sorted(path.name for path in (out / "best").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_steps_are_those_that_were_asked_for(data, tiny_folder, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(runs, "train", lambda *given, **options: asked.update(options) or stopped())
    config = TrainingConfig(max_steps=6, schedule="linear", warmup=2, clip=0.25, accumulate=3, dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        finetune(data, tmp_path / "run", config, model=tiny_folder, device="cpu")
    wanted = {"steps": 6, "schedule": "linear", "warmup": 2, "clip": 0.25, "accumulate": 3, "autocast": torch.bfloat16}
    assert {name: asked.get(name) for name in wanted} == wanted
    assert [TrainingConfig(warmup=warmup).warmup_steps(200) for warmup in (0.05, 1, 7)] == [10, 1, 7]


def test_a_run_that_begins_where_another_begins_notices_it(data, tiny_folder, tmp_path, monkeypatch, at_work):
    out, options = tmp_path / "run", {"model": tiny_folder, "device": "cpu"}
    out.mkdir()
    with at_work(out):  # it holds the folder and has written nothing so far
        with pytest.raises(RuntimeError, match="another process is at work"):
            finetune(data, out, FEW, **options)
        assert [path.name for path in out.iterdir()] == [".lock"]
    usual = runs.others_there

    def another_comes(what: str):
        (out / "run.json").write_text('{"seed": 3}')
        return usual(what)

    monkeypatch.setattr(runs, "others_there", another_comes)
    monkeypatch.setattr(runs, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune(data, out, FEW, **options)
    assert json.loads((out / "run.json").read_text())["seed"] == 0


def test_examples_to_ask_may_be_left_out_once(data, tiny_folder, tmp_path, monkeypatch):
    """A run begins with them, saves without them, and ends with them: nothing was asked before the last step."""
    out, options = tmp_path / "run", {"model": tiny_folder, "save_every": 1, "device": "cpu"}
    asked = {"evaluate": data, "evaluate_limit": 1, "evaluate_every": 100}

    def two_steps(*given, **settings):
        usual(*given, **(settings | {"steps": 2}))
        raise KeyboardInterrupt

    usual = runs.train
    for stop, more in ((stopped, asked), (two_steps, {})):
        monkeypatch.setattr(runs, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(data, out, FEW, **options, **more)
    monkeypatch.setattr(runs, "train", usual)
    finetune(data, out, FEW, **options, **asked)
    assert [note["step"] for note in json.loads((out / "evaluations.json").read_text())] == [4]


def test_the_best_is_the_least_finite_loss_over_the_same_examples(tmp_path, monkeypatch):
    found = [(5, 9.0), (5, math.nan), (5, 2.0), (5, 3.0), (7, 2.5), (7, 2.6), (7, math.inf)]
    notes = iter([{"asked": asked, "loss": loss, "exact": 0.0, "answers": []} for asked, loss in found])
    monkeypatch.setattr(runs, "examine", lambda *given, **options: next(notes))
    kept, progress, model = [], Progress(), SimpleNamespace(processor=None)
    config = TrainingConfig(max_steps=1, dtype="float32")
    for step in range(len(found)):
        runs._look(tmp_path, model, [], config, 1, progress, lambda _, at=step: kept.append(at), None, ALONE, step)
    assert kept == [2, 4]
    written = (tmp_path / "evaluations.json").read_text()
    losses = [note["loss"] for note in json.loads(written, parse_constant=pytest.fail)]
    assert losses == [9.0, None, 2.0, 3.0, 2.5, 2.6, None]


def test_a_kill_never_mixes_two_best_models(tmp_path):
    """A child dies before its n-th renaming or removal, for every n: the old model stands or the new one, and none is lost."""

    def write(text: str, folder: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(text)

    def die_before(limit: int) -> None:
        events, calls = ("os.rename", "os.remove", "os.rmdir"), itertools.count(1)
        sys.addaudithook(lambda event, _: os._exit(7) if event in events and next(calls) == limit else None)

    def held(out: Path) -> set[str]:
        return {path.read_text() for path in (out / "best").glob("*")}

    seen = set()
    for limit in itertools.count(1):
        out = tmp_path / str(limit)
        (out / "checkpoints" / "step-000001").mkdir(parents=True)
        runs._write_first(lambda folder: write("old", folder), ALONE, out / "best")
        child = os.fork()
        if child == 0:
            die_before(limit)
            runs._write_first(lambda folder: write("new", folder), ALONE, out / "best")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert held(out) in ({"old"}, {"new"}, set())
        runs._tidy(out)
        assert held(out) in ({"old"}, {"new"}) and len(list((out / "best").iterdir())) == 2
        assert not list(out.glob(".*"))
        seen |= held(out)
        if status == 0:
            break
    assert seen == {"old", "new"} and limit > 4


def test_the_name_of_a_followed_run_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: given["id"]))

    def half(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", half)
        with pytest.raises(RuntimeError, match="cannot be written"):
            runs._Follower("project", tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    first, second = (runs._Follower("project", tmp_path, {}).run for _ in range(2))
    assert first == second and len(first) == 8


def test_a_picture_that_fails_costs_nothing_and_cut_rows_are_counted_since_the_start(tmp_path, monkeypatch, capsys):
    def fails(progress, path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs, "draw_losses", fails)
    runs._say_and_draw(tmp_path, Progress(), 0, 3, 5)
    said = capsys.readouterr().err
    assert "3 rows were cut since step 5" in said
    assert f"no picture of the losses in {tmp_path / 'losses.png'}" in said and "No space left" in said
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_written_before_the_picture(data, tiny_folder, tmp_path, monkeypatch):
    def picture(progress, path):
        assert (path.parent / "final" / "adapter_config.json").is_file()
        path.touch()

    monkeypatch.setattr(runs, "draw_losses", picture)
    final = finetune(
        data, tmp_path / "run", TrainingConfig(**(vars(FEW) | {"max_steps": 1})), model=tiny_folder, device="cpu"
    )
    assert final.is_dir() and (tmp_path / "run" / "losses.png").exists()
