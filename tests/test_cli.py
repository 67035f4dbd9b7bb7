"""The `sigma-book` command as a user meets it; wrong inputs are in tests/test_bad_input.py."""

import argparse
import io
import json
import subprocess
import sys

import pytest

import sigma_book
from sigma_book import generate
from sigma_book.cli import main

HEAVY = ("torch", "matplotlib", "jupytext", "transformers", "huggingface_hub")


def run(*arguments, **options) -> subprocess.CompletedProcess:
    """The real command, in a process of its own."""
    command = [sys.executable, "-m", "sigma_book.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, **options)


def loaded_by(statement: str) -> set[str]:
    """Which heavy packages a statement imports, in a fresh process."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def stub(monkeypatch, run) -> None:
    """A command whose work is `run`."""
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    monkeypatch.setattr("sigma_book.cli.build_parser", lambda: parser)


def test_letters_that_the_output_does_not_know(monkeypatch):
    stub(monkeypatch, lambda options: print("é \ufffd"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert main([]) == 0 and written.getvalue() == b"\xe9 \\ufffd\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"sigma-book {sigma_book.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["pocket", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert "usage: sigma-book" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["data", "train", "evaluate"])
def test_help_names_every_form(capsys, monkeypatch, command):
    from sigma_book.data import FORMS

    monkeypatch.setenv("COLUMNS", "1000")  # so that no line is broken
    with pytest.raises(SystemExit):
        main([command, "--help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("--form F")]
    words = line.replace(",", "").split()
    wanted = {*FORMS} - ({"coco-segment"} if command == "evaluate" else set())  # no task scores masks
    assert wanted <= {*words} and "auto" in words and ("coco-segment" in words) is ("coco-segment" in wanted)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["generate"], ["generate", "a.png", "x", "--top-k", "many"]])
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage: sigma-book" in err


def test_the_answer_alone_goes_to_standard_output(tiny_folder, picture_file):
    done = run("generate", picture_file, "caption en", "--model", tiny_folder, "--max-new-tokens", 8)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == generate(picture_file, "caption en", model=tiny_folder, max_new_tokens=8) + "\n"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--repetition-penalty", "1.4"], {"repetition_penalty": 1.4}),
        (["--stop", "0", "--stop", "st"], {"stop": ["0", "st"]}),
        (
            ["--temperature", "1.2", "--top-p", "0.9", "--top-k", "40", "--seed", "3"],
            {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "seed": 3},
        ),
        (
            ["--num-beams", "3", "--length-penalty", "20", "--stop", "0"],
            {"num_beams": 3, "length_penalty": 20.0, "stop": ["0"]},
        ),
        (["--device", "cpu", "--dtype", "float32"], {}),
    ],
)
def test_options_reach_generate(capsys, tiny_folder, picture_file, flags, options, streamed):
    if streamed and "num_beams" in options:
        pytest.skip("beams are known at the end; that --stream refuses them is in test_generation.py")
    flags = [*flags, *(["--stream"] if streamed else [])]
    given = ["generate", str(picture_file), "x", "--model", str(tiny_folder), "--max-new-tokens", "12", *flags]
    assert main(given) == 0
    expected = generate(picture_file, "x", model=tiny_folder, max_new_tokens=12, **options)
    assert capsys.readouterr().out == expected + "\n"
    if "length_penalty" in options:  # beams end at different lengths, so it decides
        plain = generate(picture_file, "x", model=tiny_folder, max_new_tokens=12, **(options | {"length_penalty": 1.0}))
        assert expected != plain


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(capsys, tiny_folder, picture_file, dtype):
    given = ["generate", str(picture_file), "x", "--model", str(tiny_folder), "--max-new-tokens", "4", "--dtype", dtype]
    assert main(given) == 0
    assert len(capsys.readouterr().out) > 1


def test_a_reader_that_goes_away(tiny_folder, picture_file):
    command = (
        f"'{sys.executable}' -m sigma_book.cli generate '{picture_file}' x --model '{tiny_folder}' --stream | true"
    )
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_pocket_takes_its_arguments(monkeypatch, tmp_path):
    """The command only hands its arguments over; teaching itself takes an hour or more."""
    import sigma_book.pocket

    called = []
    monkeypatch.setattr(sigma_book.pocket, "train_pocket", lambda out, seed: called.append((out, seed)))
    assert main(["pocket", "--out", str(tmp_path / "new"), "--seed", "7"]) == 0
    assert called == [(tmp_path / "new", 7)]


def test_what_is_imported_when():
    assert loaded_by("import sigma_book") == set()
    assert loaded_by("from sigma_book.cli import main, build_parser; build_parser()") == set()
    assert loaded_by("from sigma_book import generate, load") == {"torch"}


def test_the_public_names():
    named = {"load", "generate", "finetune", "evaluate", "TrainingConfig", "PaliGemma", "PaliGemmaConfig", "Processor"}
    assert named | {"__version__"} == set(sigma_book.__all__)
    for name in sigma_book.__all__:
        assert getattr(sigma_book, name)
        assert name in dir(sigma_book)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sigma_book.nothing
