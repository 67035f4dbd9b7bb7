"""The embedded pocket model, read by transformers: same ids, same pixels, same tokens in float32.

Greedy decoding takes the best of all scores, so equal tokens ask for more than close scores; the two differ by
rounding only (test_model.py measures it), and the model is sure of its answers.
"""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import sigma_book
from sigma_book import generate, load
from sigma_book.world import TASKS, ask, draw_scene, make_scene

FOLDER = Path(sigma_book.__file__).parent / "pocket_model"


@pytest.fixture(scope="module")
def reference():
    processor = AutoProcessor.from_pretrained(FOLDER)
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval(), processor


@pytest.mark.parametrize("task", TASKS)
def test_transformers_says_the_same(reference, task):
    model, processor = reference
    rng = random.Random(task)
    scenes = [make_scene(seed) for seed in range(95_000_000, 95_000_012)]
    asked = [(scene, question) for scene in scenes if (question := ask(scene, task, rng)) is not None]
    assert len(asked) >= 4
    for scene, question in asked:
        picture = draw_scene(scene)
        inputs = processor(images=picture, text=f"<image>{question.prompt}", return_tensors="pt")
        inputs.pop("labels", None)
        assert "token_type_ids" in inputs
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        _, tokens, _ = generate(picture, question.prompt, max_new_tokens=60, return_logprobs=True)
        assert tokens == ids.tolist()


def test_the_model_is_small_and_whole():
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    assert size < 8_000_000
    model = load()
    assert model.config.vision.patch_size == 14
    tokenizer = model.processor.tokenizer
    assert [tokenizer.decode(tokenizer.encode(text)) for text in ("é 漢字 🙂", "<loc1023>", "<seg127>")] == [
        "é 漢字 🙂",
        "<loc1023>",
        "<seg127>",
    ]


def test_the_model_knows_its_world():
    """A floor far below the results in the model card, on scenes that nobody trained on: a broken model fails."""
    scenes = [make_scene(seed) for seed in range(96_000_000, 96_000_040)]
    rng = random.Random(0)
    right = []
    for task in ("caption", "colour", "count", "yes_no", "left_of"):
        for scene in scenes:
            question = ask(scene, task, rng)
            if question is not None:
                right.append(generate(draw_scene(scene), question.prompt) == question.answer)
    assert sum(right) / len(right) > 0.85
