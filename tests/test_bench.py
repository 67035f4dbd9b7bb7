"""`sigma-book bench` as a user meets it: real processes, real transformers; seconds are never asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sigma_book.assemble import POCKET, load
from sigma_book.bench import (
    LAW,
    SIZES,
    Child,
    _ratios,
    _spread,
    bench,
    compare,
    equal_tokens,
    growth,
    random_folder,
    run_bench,
    size_config,
    spread,
    write_random_model,
)
from sigma_book.bench_contenders import Ours, Theirs, Work, make_batch
from sigma_book.bench_report import bench_lines, draw_growth
from sigma_book.cli import main
from sigma_book.fast import static_step
from sigma_book.generation import generate_tokens
from sigma_book.paligemma import PaliGemma, count_parameters
from sigma_book.processor import Processor
from sigma_book.speed import gpu_machine, inference_bill
from sigma_book.weights import load_model, read_config

PARTS = ["vision", "projector", "prefill", "head", "step", "step head", "first token", "next token"]


@pytest.mark.slow
def test_beside_transformers(tmp_path, capsys):
    """The pocket model, end to end, with bill, JSON and picture."""
    table, picture = tmp_path / "found.json", tmp_path / "found.png"
    given = ["bench", "--against", "transformers", "--bill", "--warmup", "1", "--repeat", "2", "--new-tokens", "5"]
    assert main([*given, "--json", str(table), "--save", str(picture)]) == 0
    found = json.loads(table.read_text())
    assert set(found["contenders"]) == {"sigma_book", "transformers"}
    assert found["tokens_equal"] is True
    for one in found["contenders"].values():
        assert 0 < one["first_token"]["min"] <= one["first_token"]["median"] <= one["first_token"]["p95"]
        assert 0 < one["next_token"]["min"] <= one["next_token"]["median"] <= one["next_token"]["p95"]
        memory = one["memory"]
        assert memory["peak_resident"] >= max(memory["anonymous"], memory["file_mapped"]) > 0
    assert len({one["load"]["parameters"] for one in found["contenders"].values()}) == 1
    ours, theirs = (found["contenders"][name] for name in ("sigma_book", "transformers"))
    assert found["ratios"]["first_token"] == ours["first_token"]["median"] / theirs["first_token"]["median"]
    assert [row["part"] for row in found["bill"]] == PARTS
    for row in found["bill"]:
        assert row["predicted"] > 0 and row["ratio"] == row["measured"] / row["predicted"]
    assert found["limits"]["measured"] and found["limits"]["peak"] > 1e9
    assert {"cpu", "cores", "threads", "versions", "date"} <= set(found["machine"])
    assert found["work"]["prompt_length"] == 68  # 64 patches, bos, two words, newline
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 100
    shown = capsys.readouterr().out
    assert f"transformers loaded in {theirs['load']['load_seconds']:.1f} s: at most " in shown
    assert "same tokens: yes" in shown and all(part in shown for part in PARTS)
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "found.png"}


def test_alone_with_a_batch_and_a_longer_prompt(tiny_folder, tmp_path):
    table = tmp_path / "found.json"
    given = ["bench", "--model", str(tiny_folder), "--batch", "3", "--prompt-tokens", "11", "--new-tokens", "1"]
    assert main([*given, "--repeat", "1", "--warmup", "0", "--json", str(table)]) == 0
    found = json.loads(table.read_text())
    assert found["tokens_equal"] is None and "ratios" not in found and "bill" not in found
    one = found["contenders"]["sigma_book"]
    assert one["next_token"] is None and one["tokens_per_second"] is None  # there was no next token
    assert found["work"]["prompt_length"] == 4 + 1 + 11 + 1
    costs = inference_bill(read_config(tiny_folder), 3, 17, 1)
    held = {"weights": costs.weights_held, "cache": costs.cache_held, "activations": costs.activations_held}
    assert found["held"] == held


def test_every_turn_has_pictures_of_its_own(tiny_folder):
    """So that a cache of features cannot make a later turn look fast."""
    processor, work = Processor.from_folder(tiny_folder), Work(str(tiny_folder), batch=2)
    first, again, second = (make_batch(processor, work, turn).pixel_values for turn in (0, 0, 1))
    assert torch.equal(first, again)
    assert not any(torch.equal(one, other) for one in second for other in first)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("settings", [{}, {"compile": True}, {"quantize": "int8"}, {"quantize": "nf4"}])
def test_parameters_are_counted_as_transformers_counts_them(tiny_folder, settings):
    """Prepared or quantized, a model has few parameters, or none, and as many numbers as before."""
    work = Work(str(tiny_folder), **settings)
    assert Ours(work).parameters == Theirs(work).parameters > 10_000


@pytest.mark.slow
def test_other_tokens_are_seen(tiny_folder):
    """The comparison can fail: two contenders that are asked for answers to different turns."""
    work = Work(str(tiny_folder), new_tokens=6)
    with Child("sigma_book", work) as one, Child("transformers", work) as other:
        one.turn(1)
        other.turn(1)
        assert equal_tokens([one, other]) is True
        one.turn(2)
        other.turn(3)
        assert equal_tokens([one, other]) is False


def test_spread_against_a_plain_count():
    assert spread([3.0]) == {"min": 3.0, "median": 3.0, "p95": 3.0}
    assert spread(range(1, 101)) == {"min": 1, "median": 50.5, "p95": 95}
    assert spread([5, 1, 3])["p95"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_load(tmp_path, dtype):
    config = read_config(random_config(tmp_path))
    write_random_model(tmp_path / "random", config, dtype)
    model = load_model(tmp_path / "random", device="cpu", dtype=dtype)
    assert model.config == config
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert all(parameter.std() > 0 for parameter in model.parameters())
    with safe_open(tmp_path / "random" / "model-00001.safetensors", framework="pt") as file:
        assert len(file.keys()) == len(model.state_dict())


def test_random_weights_give_tokens_that_say_something(tmp_path):
    """Equal tokens prove something only where picture, prompt and blocks decide them."""
    config = size_config("pocket").to_dict()
    config["text_config"] |= {"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_random_model(tmp_path / "random", read_config(tmp_path))
    model = load(tmp_path / "random", device="cpu", dtype="float32")

    def tokens(turn, prompt="caption en"):
        batch = make_batch(model.processor, Work("", prompt=prompt), turn)
        return [step[0].token for step in generate_tokens(model, batch, max_new_tokens=12, stop_ids=())]

    answers = [tokens(turn) for turn in range(4)]
    assert len({tuple(answer) for answer in answers}) == 4
    assert tokens(0, "answer en how many red stars are there?") != answers[0]
    assert len({token for answer in answers for token in answer}) > 8
    for block in model.language_model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    assert tokens(0) == tokens(1) != answers[0]


def random_config(folder):
    """A folder with the configuration of a small model."""
    config = size_config("pocket").to_dict()
    config["text_config"] |= {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    config["vision_config"] |= {"num_hidden_layers": 1, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("size", "millions"), [("pocket", 3), ("300m", 303), ("1b", 1010), ("3b", 2923)])
def test_sizes_are_what_they_are_called(size, millions):
    with torch.device("meta"):
        count = count_parameters(PaliGemma(size_config(size)))
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    assert size != "3b" or count == 2_923_466_480
    assert size == "pocket" or size in SIZES


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMA_BOOK_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 10**9})())
    with pytest.raises(RuntimeError, match=r"take 11\.7 GB .* has 1\.0 GB free: make room, or set SIGMA_BOOK_CACHE"):
        random_folder("3b")
    assert not list(tmp_path.iterdir())


def test_random_weights_of_an_earlier_law_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMA_BOOK_CACHE", str(tmp_path))
    kept = random_folder("pocket")
    assert random_folder("pocket") == kept
    monkeypatch.setattr("sigma_book.bench.LAW", LAW + 1)
    assert random_folder("pocket") != kept
    names = ("language_model.embed_tokens.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
    assert (LAW, [_spread(name) for name in names]) == (2, [0.1, 2.0, 2.0, 1.0])  # who changes one changes both


def test_contenders_run_alone_where_memory_holds_only_one_of_them(tiny_folder, monkeypatch):
    """transformers keeps whole numbers, whatever --quantize says. Each plan is made up of what runs beside what."""
    work, plans = Work(str(tiny_folder), quantize="int8"), []
    ours, theirs = (inference_bill(read_config(tiny_folder), 1, 8, 16, kind).held for kind in ("int8", "float32"))
    assert theirs > 1.2 * ours

    class Stop(Exception):
        pass

    class Noted:
        def __init__(self, role, work):
            self.role = role
            plans[-1].append(role)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def turn(self, *_, **__):
            raise Stop

    monkeypatch.setattr("sigma_book.bench.Child", Noted)
    for free in (2e9 + 1.1 * (2.1 * ours), 2e9 + 1.1 * (1.1 * ours + 1.1 * theirs)):
        plans.append([])
        monkeypatch.setattr("sigma_book.bench.free_bytes", lambda device, free=free: free)
        with pytest.raises(Stop):
            bench(work, against=["transformers"])
    assert plans == [["sigma_book"], ["sigma_book", "transformers"]]


def test_a_head_in_eight_bits_is_not_predicted_from_rates_of_wider_maps():
    config = size_config("3b")
    machine = replace(gpu_machine("L4"), rates=((1, 1e9, 1e9), (512, 1e9, 1e9)), begin=1.0)
    for precision, head, fast in (("float32", "int8", True), ("int8", None, False), ("float32", None, False)):
        costs = inference_bill(config, 1, 260, 4, precision, head=head)
        rows = {row["part"]: row["predicted"] for row in compare(costs, machine, {})}
        roofline = replace(machine, rates=()).seconds(costs.head)
        assert (rows["head"] == rows["step head"] == roofline) is fast
        assert rows["next token"] == rows["step"] + rows["step head"]
        assert rows["step"] == machine.seconds(costs.step()[0]) != replace(machine, rates=()).seconds(costs.step()[0])


@pytest.mark.parametrize("asked", ["json_file", "picture"])
def test_what_was_measured_is_told_where_its_file_cannot_be_written(tmp_path, monkeypatch, capsys, asked):
    """Measurement and disk are made up."""
    point = {"value": 224, "predicted": 1.0, "measured": 2.5}
    found = {"size": "pocket", "machine": {"cpu": "a CPU", "date": "today"}}
    monkeypatch.setattr(
        "sigma_book.bench.growth", lambda size: found | dict.fromkeys(("pixels", "pictures", "tokens"), [point])
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RuntimeError, match="cannot be written .No space left on device"):
        run_bench(grow=True, **{asked: tmp_path / {"json_file": "a.json", "picture": "a.png"}[asked]})
    assert "2.50" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_growth_is_drawn_without_a_measured_point():
    points = [{"value": value, "predicted": float(value), "measured": None} for value in (1, 2)]
    figure = draw_growth(dict.fromkeys(("pixels", "pictures", "tokens"), points))
    for axis in figure.axes:
        assert [len(line.get_xdata()) for line in axis.lines] == [2, 0]
        assert axis.get_xticks().tolist() == [1, 2]


@pytest.mark.slow
def test_growth_of_the_pocket(tmp_path):
    """Points that would take long are predicted only; predictions grow with every axis."""
    found = growth("pocket", most_seconds=0.05)
    for kind, values in (
        ("pixels", [224, 448, 896]),
        ("pictures", [1, 2, 4, 8, 16, 32]),
        ("tokens", [16, 64, 256, 1024]),
    ):
        assert [point["value"] for point in found[kind]] == values
        predicted = [point["predicted"] for point in found[kind]]
        assert predicted == sorted(predicted)
        assert all((point["measured"] is not None) == (point["predicted"] < 0.05) for point in found[kind])
    assert found["tokens"][-1]["measured"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "batch is 0"),
        (["--new-tokens", "-3"], "new_tokens is -3"),
        (["--repeat", "0"], "repeat is 0"),
        (["--warmup", "-1"], "warmup is -1"),
        (["--prompt-tokens", "0"], "prompt_tokens is 0"),
        (["--new-tokens", "2000"], "context of 2048"),
        (["--prompt-tokens", "2500"], "context of 2048"),
        (["--against", "llama.cpp"], "--against is 'llama.cpp'"),
        (["--against", "transformers", "--against", "transformers"], "--against names transformers twice"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--quantize", "int3"], "quantize is 'int3': expected 'nf4', 'int8' or 'int4', or nothing"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--size", "7b"], "size is '7b'"),
        (["--size", "3b"], "--random goes with"),
        (["--random"], "--random goes with"),
        (["--size", "pocket", "--random"], "--random goes with"),
        (["--size", "pocket", "--model", "."], "give one of them"),
        (["--model", "no/such/folder/here"], "no/such/folder/here"),
        (["--prompt", "<image> hello"], "<image>"),
        (["--prompt", "", "--prompt-tokens", "3"], "prompt is ''"),
        (["--json", "no/such/folder/a.json"], "a.json"),
        (["--json", "a.txt"], "ends in .json"),
        (["--save", "a.jpg"], "ends in .png"),
        (["--growth", "--bill"], "--growth"),
        (["--growth", "--model", "."], "--growth"),
        (["--growth", "--compile"], "--growth"),
        (["--growth", "--dtype", "bfloat16"], "--growth"),
        (["--growth", "--prompt", "x"], "--growth"),
        (["--growth", "--prompt-tokens", "3"], "--growth"),
        (["--growth", "--batch", "2"], "--growth"),
        (["--growth", "--new-tokens", "3"], "--growth"),
        (["--growth", "--warmup", "0"], "--growth"),
        (["--growth", "--repeat", "1"], "--growth"),
    ],
)
def test_odd_arguments_get_a_sentence(capsys, arguments, words):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err.splitlines()[-1] and err.splitlines()[-1].startswith("sigma-book: ")


@pytest.mark.parametrize(("option", "package"), [("--save", "matplotlib"), ("--against", "transformers")])
def test_a_package_that_is_not_there_is_said_before_the_measurement(tmp_path, monkeypatch, capsys, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    given = {"--save": str(tmp_path / "a.png"), "--against": "transformers"}[option]
    assert main(["bench", option, given]) == 2
    assert f"pip install {package}" in capsys.readouterr().err


def test_a_contender_that_dies_is_said():
    """A real process, really killed."""
    with Child("sigma_book", Work(folder=str(POCKET))) as child:
        child.process.kill()
        child.process.wait()
        with pytest.raises(RuntimeError, match="sigma_book ended early .killed"):
            child.turn(0)


def test_the_command_imports_nothing_before_it_runs():
    code = "import sys, sigma_book.cli as c; c.build_parser(); print(int('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize("card", ["NVIDIA L4", "Voodoo 2"])
def test_a_card_is_looked_up_before_any_work(tiny_folder, tmp_path, monkeypatch, capsys, card):
    """Card and turns are made up. A card that nobody knows costs the predictions, not the measurements."""
    before = []

    class Ran:
        role, facts = "sigma_book", {"threads": 1, "load_seconds": 2.0, "loaded": {"gpu_peak": 6e9, "anonymous": None}}
        turns = [{"marks": [0.0, 1.0, 3.0], "tokens": [], "parts": {}}]

    def take_turns(*given, probe):
        before.append(capsys.readouterr().err)
        memory = dict.fromkeys(("peak_resident", "anonymous", "file_mapped"), 7e9) | {"gpu_peak": 5e9}
        return [Ran()], {"sigma_book": memory}, []

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: {"cuda:1": card}[device])
    monkeypatch.setattr("sigma_book.bench._take_turns", take_turns)
    table = tmp_path / "found.json"
    assert main(["bench", "--model", str(tiny_folder), "--device", "cuda:1", "--json", str(table)]) == 0
    shown, found = capsys.readouterr().out, json.loads(table.read_text())
    assert "GPU MB" in shown and "5,000" in shown.splitlines()[5]
    assert shown.startswith(f"{card}, ") and found["contenders"]["sigma_book"]["next_token"]["median"] == 2
    if card == "Voodoo 2":
        assert "no published peaks of 'Voodoo 2'" in before[0] and "no predictions" in before[0]
        assert "bill" not in found
    else:
        assert before == [""] and [row["part"] for row in found["bill"]] == PARTS and "not measured" in shown
        assert "held, computed, MB: weights " in shown


def test_on_a_card_its_own_memory_is_compared():
    one = {"first_token": {"median": 1.0}, "next_token": None, "memory": {"peak_resident": 6, "gpu_peak": 2}}
    other = one | {"memory": {"peak_resident": 6, "gpu_peak": 8}}
    assert _ratios({"sigma_book": one, "transformers": other}) == {"first_token": 1.0, "gpu_peak": 0.25}


def test_a_compiled_step_is_measured_with_its_head(tiny_folder):
    """As on a card, where the step is compiled; here it is not, but is one call all the same."""
    ours = Ours(Work(str(tiny_folder), compile=True, new_tokens=4))
    ours.model.compiled_step = partial(static_step, ours.model)
    turn = ours.turn(1)
    assert {name: len(seconds) for name, seconds in turn["parts"].items()} == {
        "vision": 1,
        "projector": 1,
        "prefill": 1,
        "head": 1,
        "step and head": 3,
    }
    costs = inference_bill(ours.model.config, 1, turn["prompt_length"], 4)
    rows = compare(costs, gpu_machine("L4"), {name: spread(seconds) for name, seconds in turn["parts"].items()})
    measured = {row["part"]: row["measured"] for row in rows}
    assert measured["next token"] == spread(turn["parts"]["step and head"])["median"] and measured["step"] is None


@pytest.mark.parametrize(
    ("device", "gpu", "expected"), [("cpu", "L4", "a CPU"), ("cuda:1", "L4", "L4"), ("mps", None, "mps")]
)
def test_the_table_names_what_the_model_ran_on(device, gpu, expected):
    facts = {"cpu": "a CPU", "gpu": gpu, "cores": 2, "threads": 2, "versions": {}, "date": "today"}
    work = vars(Work("m", device=device)) | {"repeat": 1, "warmup": 0, "prompt_length": 3}
    assert bench_lines({"machine": facts, "work": work, "contenders": {}})[0].startswith(f"{expected}, 2 cores")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """The same command on a card: measured beside what its published peaks give."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    table = tmp_path / "found.json"
    assert main(["bench", "--device", "cuda", "--bill", "--repeat", "2", "--json", str(table)]) == 0
    found = json.loads(table.read_text())
    assert found["contenders"]["sigma_book"]["memory"]["gpu_peak"] > 0
    if "limits" not in found:
        pytest.skip("no published peaks of this card are known here")
    assert not found["limits"]["measured"]
    assert all(row["measured"] >= row["predicted"] for row in found["bill"] if row["measured"] is not None)


def test_bench_as_a_call(tiny_folder):
    found = bench(Work(str(tiny_folder), new_tokens=3), warmup=0, repeat=2)
    assert found["work"]["repeat"] == 2
    assert set(found["contenders"]["sigma_book"]["parts"]) == {
        "vision",
        "projector",
        "prefill",
        "head",
        "step",
        "step head",
    }
