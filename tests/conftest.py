"""What the tests share: a small folder in the Hugging Face layout, with random weights and the pocket's tokenizer."""

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sigma_book.assemble import POCKET, load
from sigma_book.gemma import GemmaConfig
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Processor, Tokenizer
from sigma_book.siglip import SiglipConfig
from sigma_book.weights import save_model
from sigma_book.world import TASKS, ask, draw_scene, make_scene

CONTEXT = 96  # tokens that the tiny model reads: pictures, prompt and answer


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """A folder with the pocket's tokenizer files (and, once it is taught, its weights): to read, not to write."""
    return POCKET


def make_tiny_folder(folder: Path, seed: int = 0, **text_options) -> Path:
    """Write a PaliGemma of 4 picture tokens and two layers whose answers differ from picture to picture."""
    tokenizer = Tokenizer.from_folder(POCKET)
    vision = SiglipConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": CONTEXT}
    sizes |= {"tie_word_embeddings": False}  # with a tied head, random weights say the same word again and again
    text = GemmaConfig(vocab_size=tokenizer.image_id, **(sizes | text_options))  # <image> is never an answer
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = PaliGemma(PaliGemmaConfig(vision, text, tokenizer.image_id, **ids))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            gain = 3.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.copy_(0.2 * drawn if parameter.dim() == 1 else gain * drawn / parameter[0].numel() ** 0.5)
    save_model(model, folder)
    Processor(tokenizer, vision.image_size, vision.num_patches).save(folder)
    return folder


@pytest.fixture(scope="session")
def at_work():
    """Takes a folder: inside the block another process holds its lock."""

    @contextmanager
    def held_by_another(folder: Path):
        program = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        program += "print('in', flush=True); time.sleep(99)"
        other = subprocess.Popen([sys.executable, "-c", program, folder / ".lock"], stdout=subprocess.PIPE, text=True)
        try:
            assert other.stdout.readline() == "in\n"
            yield
        finally:
            other.kill()
            other.communicate()

    return held_by_another


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """To read, not to write: copy it with `copy_folder` first."""
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.fixture
def copy_folder(tmp_path):
    """A copy of a folder that a test may damage."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="session")
def pictures():
    """Six drawn scenes."""
    return [draw_scene(make_scene(seed)) for seed in range(6)]


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory, pictures) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    pictures[0].save(path)
    return path


@pytest.fixture(scope="session")
def write_questions():
    """Questions about ten drawn scenes as files: `train.jsonl` with so many of them, and the next in `test.jsonl`."""

    def write(folder: Path, train: int, test: int) -> Path:
        rows = []
        for seed in range(10):
            draw_scene(make_scene(seed)).save(folder / f"{seed}.png")
            for task in TASKS[:5]:
                question = ask(make_scene(seed), task, random.Random(seed))
                if question is not None:
                    rows.append({"image": f"{seed}.png", "prefix": question.prompt, "suffix": question.answer})
        for name, part in (("train", rows[:train]), ("test", rows[train : train + test])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return folder

    return write


@pytest.fixture(scope="session")
def make_tiny():
    return make_tiny_folder


@pytest.fixture(scope="session")
def pocket():
    return load()


@pytest.fixture
def start_server():
    """A real server on a free port of this machine, for as long as the test runs: `start_server(model, **settings)`."""
    from sigma_book.batching import Engine
    from sigma_book.server import ServerConfig, create_app
    from sigma_book.serving import GracefulServer, remembering

    running = []

    def start(model, *, explain=None, static=None, engine=None, **settings):
        engine = Engine(model, **({"encode_images": remembering(model)} | (engine or {})))
        app = create_app(engine, ServerConfig(**({"model_name": "pocket"} | settings)), explain=explain, static=static)
        server = GracefulServer(app)
        thread = threading.Thread(target=server.run)
        running.append((server, thread, engine))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        server.url, server.engine = f"http://127.0.0.1:{server.port}", engine
        return server

    yield start
    for server, thread, engine in running:
        engine.close(finish=False)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
