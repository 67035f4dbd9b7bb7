"""Every wrong input gets one sentence and exit code 2 on the command line; no traceback, nothing on standard output.

Most run `main` in this process, which starts quickly; a few run the real command.
"""

import json
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sigma_book import generate, load
from sigma_book.cli import main
from sigma_book.weights import save_model


@pytest.fixture
def refuse(capsys, tiny_folder, picture_file):
    """Run `generate` with some arguments wrong, check how it ends, and give the sentence."""

    def run(
        *flags: str, image: Path | str = picture_file, prompt: str = "caption en", model: Path = tiny_folder
    ) -> str:
        before = contents(model)
        arguments = ["generate", str(image), prompt, "--model", str(model), *map(str, flags)]
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert contents(model) == before  # nothing is written
        return one_sentence(err)

    return run


def contents(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in Path(folder).glob("*")}


def one_sentence(err: str) -> str:
    assert err.startswith("sigma-book: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


# pictures


def test_no_such_picture(refuse):
    assert "no such file: nowhere/cat.png" in refuse(image="nowhere/cat.png")


def test_a_folder_as_picture(refuse, tmp_path):
    assert f"{tmp_path} is a folder" in refuse(image=tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"This is no picture.\n" * 50, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"]
)
def test_no_picture_in_the_file(refuse, tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert str(path) in refuse(image=path)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_picture_cut_off(refuse, tmp_path, kind):
    path = tmp_path / f"half.{kind}"
    noise = torch.randint(256, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refuse(image=path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("side", [10_000, 60_000])  # where Pillow warns, and where it refuses
def test_a_decompression_bomb(refuse, tmp_path, side):
    path = tmp_path / "bomb.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    err = refuse(image=path)
    assert str(path) in err and "pixels" in err


# weights


@pytest.fixture
def damaged(copy_folder, tiny_folder):
    return copy_folder(tiny_folder)


def rewrite_header(path: Path, change) -> None:
    """Change the header of a safetensors file, and leave its numbers as they are."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_empty_weights(refuse, damaged):
    (damaged / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in refuse(model=damaged)


@pytest.mark.parametrize("length", [0, 3, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length(refuse, damaged, length):
    path = damaged / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "model.safetensors" in refuse(model=damaged)


@pytest.mark.parametrize(
    "offsets",
    [[0, 10**9], [10**9, 2 * 10**9], [-4, 0], [8, 4], [0, 4], ["0", "4"], [0], None, [0, 0.5], [1e300, 1e301]],
)
def test_a_header_that_lies_about_offsets(refuse, damaged, offsets):
    def change(header):
        first = next(name for name in header if name != "__metadata__")
        header[first]["data_offsets"] = offsets

    rewrite_header(damaged / "model.safetensors", change)
    assert "model.safetensors" in refuse(model=damaged)


def test_weights_cut_off(refuse, damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refuse(model=damaged)


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "part", ["linear.bias", "layers.1.mlp.up_proj.weight", "embed_tokens.weight", "lm_head.weight"]
)
def test_a_missing_tensor(refuse, damaged, part):
    def change(tensors):
        tensors.pop(next(name for name in tensors if name.endswith(part)))

    edit_tensors(damaged, change)
    assert part in refuse(model=damaged)


@pytest.mark.parametrize("part", ["linear.bias", "layers.1.mlp.up_proj.weight", "embed_tokens.weight"])
def test_a_tensor_of_the_wrong_shape(refuse, damaged, part):
    stored = []

    def change(tensors):
        name = next(name for name in tensors if name.endswith(part))
        stored.extend(tensors[name].shape)
        tensors[name] = torch.zeros(*stored[:-1], stored[-1] + 1)

    edit_tensors(damaged, change)
    err = refuse(model=damaged)
    assert part in err and str(stored) in err and str([*stored[:-1], stored[-1] + 1]) in err


def test_an_unknown_tensor(refuse, damaged):
    edit_tensors(damaged, lambda tensors: tensors.update({"language_model.model.layers.9.extra": torch.zeros(2)}))
    assert "layers.9.extra" in refuse(model=damaged)


def test_a_missing_shard(refuse, damaged, tiny_folder):
    save_model(load(tiny_folder, device="cpu"), damaged, max_shard_bytes=100_000)
    shards = sorted(damaged.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert shards[1].name in refuse(model=damaged)


def test_no_weights(refuse, damaged):
    (damaged / "model.safetensors").unlink()
    assert str(damaged) in refuse(model=damaged)


class Bomb:
    """A pickle that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_no_pickle_is_loaded(refuse, damaged, tmp_path, name):
    trap = tmp_path / "sprung"
    (damaged / "model.safetensors").unlink()
    (damaged / name).write_bytes(pickle.dumps(Bomb(trap)))
    assert str(damaged) in refuse(model=damaged)
    assert not trap.exists()
    pickle.loads((damaged / name).read_bytes())
    assert trap.exists()  # the trap works


# the other files of a model


def test_no_such_model(capsys, picture_file):
    assert main(["generate", str(picture_file), "x", "--model", "./no/such/model"]) == 2
    assert "no such folder: ./no/such/model" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "5",
        "{}",
        '{"model_type": "llama"}',
        '{"model_type": "paligemma", "text_config": 5}',
        '{"model_type": "paligemma", "text_config": {"hidden_size": "wide"}}',
        '{"model_type": "paligemma", "text_config": {"model_type": "qwen2"}}',
    ],
)
def test_config_of_another_model(refuse, damaged, content):
    (damaged / "config.json").write_text(content)
    assert "config.json" in refuse(model=damaged)


def test_no_config(refuse, damaged):
    (damaged / "config.json").unlink()
    assert "config.json" in refuse(model=damaged)


def test_no_tokenizer(refuse, damaged):
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    err = refuse(model=damaged)
    assert "tokenizer" in err and str(damaged) in err


@pytest.mark.parametrize("content", [b"", b"{}", b"no tokenizer", b"\x00\xff" * 100])
def test_a_broken_tokenizer(refuse, damaged, content):
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    for name in ("tokenizer.json", "tokenizer.model"):
        (damaged / name).write_bytes(content)
        assert name in refuse(model=damaged)
        (damaged / name).unlink()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"eos_token_id": "end"}'])
def test_a_broken_generation_config(refuse, damaged, content):
    (damaged / "generation_config.json").write_text(content)
    assert "generation_config.json" in refuse(model=damaged)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"]
)
def test_a_file_that_cannot_be_opened(refuse, damaged, name):
    (damaged / name).unlink(missing_ok=True)
    (damaged / name).mkdir()
    assert f"{name} cannot be read" in refuse(model=damaged)


# arguments


def test_a_prompt_longer_than_the_context(refuse):
    err = refuse(prompt="how many " * 100)
    assert "context is 96 tokens" in err and "shorten it" in err


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--max-new-tokens", 0, "max_new_tokens is 0: expected a whole number, 1 or more"),
        ("--max-new-tokens", -3, "max_new_tokens is -3"),
        ("--temperature", -0.5, "temperature is -0.5: expected 0"),
        ("--temperature", "nan", "temperature is nan"),
        ("--top-p", 0, "top_p is 0.0: expected a probability above 0"),
        ("--top-p", 1.5, "top_p is 1.5"),
        ("--top-p", -1, "top_p is -1.0"),
        ("--top-k", 0, "top_k is 0: expected a whole number, 1 or more"),
        ("--top-k", -1, "top_k is -1"),
        ("--repetition-penalty", 0, "repetition_penalty is 0.0"),
        ("--seed", -1, "seed is -1"),
        ("--stop", "", "stop is ['']"),
        ("--dtype", "int3", "dtype is 'int3'"),
        ("--device", "toaster", "device is 'toaster'"),
    ],
)
def test_arguments_out_of_range(refuse, flag, value, words):
    assert words in refuse(flag, value)


def test_image_token_in_the_prompt(refuse):
    assert "<image>" in refuse(prompt="what is left of <image>?")


def test_cuda_where_there_is_none(refuse):
    device = "cuda:99" if torch.cuda.is_available() else "cuda"
    assert device in refuse("--device", device)


def test_lists_of_different_lengths(pictures, tiny_model):
    """No list can be given on the command line."""
    with pytest.raises(ValueError, match="2 pictures for 3 prompts"):
        generate(pictures[:2], ["x", "y", "z"], model=tiny_model)


# the real command


@pytest.mark.parametrize(
    ("image", "flags", "words"),
    [
        ("nowhere.png", [], "no such file: nowhere.png"),
        (None, ["--top-p", "2"], "top_p is 2.0"),
        (None, ["--model", "./nowhere"], "no such folder: ./nowhere"),
    ],
)
def test_the_real_command(picture_file, image, flags, words):
    command = [shutil.which("sigma-book") or "sigma-book", "generate", image or str(picture_file), "x", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in one_sentence(done.stderr)


def test_the_module_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "sigma_book.cli", "generate", "nowhere.png", "x"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "no such file" in one_sentence(done.stderr)
