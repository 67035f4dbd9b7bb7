"""The teaching of the pocket model: its tokenizer, what patches should know, packs, and a rehearsal of the whole."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

import sigma_book
from sigma_book.locate import compare_boxes, parse
from sigma_book.paligemma import PaliGemma
from sigma_book.pocket import (
    EYE_STEPS,
    PACK_STEPS,
    POCKET,
    EyeTeacher,
    Muon,
    Packer,
    answer_text,
    evaluate_pocket,
    first_scenes,
    named_pairs,
    new_pocket,
    packed_loss,
    patch_truth,
    questions_about,
    train_pocket,
    write_tokenizer,
)
from sigma_book.processor import Processor
from sigma_book.projector import prefix_mask
from sigma_book.weights import load_model
from sigma_book.world import COLOURS, SHAPES, SIZE, TASKS, ask, draw_scene, make_scene

FOLDER = Path(sigma_book.__file__).parent / "pocket_model"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(FOLDER)


@pytest.fixture(scope="module")
def fresh() -> PaliGemma:
    return new_pocket(seed=3).eval()


class Dtypes(TorchDispatchMode):
    """Notes the kinds of numbers that products are taken of."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen |= {given.dtype for given in args}
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"weight_decay": 0.3, "momentum": 0.5}])
def test_muon_is_pytorchs_without_bfloat16(settings):
    """Five steps of tall, wide and square matrices. bfloat16 has 8 binary digits, and the products of a step are a chain of 15:
    some percent of each update, and PyTorch's own update in float64 (its source, its coefficients) to the rounding of float32.
    """
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((40, 24), (24, 56), (32, 32))]
    gradients = [[torch.randn_like(matrix) for matrix in start] for _ in range(5)]
    ended = {}
    for kind in (Muon, torch.optim.Muon, Exact):
        matrices = [
            nn.Parameter(matrix.clone().to(torch.float64 if kind is Exact else torch.float32)) for matrix in start
        ]
        optimizer = kind(matrices, lr=0.1, **settings)
        with Dtypes() as dtypes:
            for step in gradients:
                for matrix, gradient in zip(matrices, step, strict=True):
                    matrix.grad = gradient.to(matrix.dtype)
                optimizer.step()
        ended[kind] = [matrix.detach().double() for matrix in matrices]
        expected = {Muon: torch.float32, torch.optim.Muon: torch.bfloat16, Exact: torch.float64}[kind]
        assert dtypes.seen == {expected}
    for ours, theirs, exact, first in zip(ended[Muon], ended[torch.optim.Muon], ended[Exact], start):
        moved = (exact - first).norm()
        assert (ours - exact).norm() < 1e-4 * moved
        assert 1e-3 * moved < (theirs - exact).norm() < 0.1 * moved


class Exact(torch.optim.Muon):
    """PyTorch's, in the numbers of its parameters."""

    def step(self, closure=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
            return super().step(closure)


def test_the_tokenizer_is_made_again_byte_for_byte(tmp_path):
    write_tokenizer(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_every_word_of_the_world_is_one_piece(processor):
    for word in [*SHAPES, *SHAPES.values(), *COLOURS, "how", "many", "left", "yes", "no", "0", "5"]:
        for form in (word, f" {word}"):
            assert len(processor.tokenizer.encode(form)) == 1, form


@pytest.mark.parametrize(
    "text", ["", " ", "caption en\n", "  é 🙂 漢字\n\n", "<loc0007> zebra ; <seg127>", "مرحبا", "a" * 300]
)
def test_three_readers_agree(text, processor):
    ours = processor.tokenizer.encode(text)
    assert ours == AutoTokenizer.from_pretrained(FOLDER).encode(text, add_special_tokens=False)
    assert ours == sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model")).encode(text)


@pytest.mark.parametrize("seed", range(8))
def test_patches_know_what_covers_them(seed):
    """Against counting pixels one by one."""
    scene = make_scene(seed)
    owner = torch.full((SIZE, SIZE), -1)
    for index, thing in enumerate(scene.things):
        top, left, bottom, right = thing.box
        owner[top:bottom, left:right] = index
    truth = patch_truth(scene)
    assert truth.shape == (64, 13)
    for patch in range(64):
        row, column = divmod(patch, 8)
        window = owner[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        counts = [(window == index).sum().item() / 196 for index in range(len(scene.things))]
        if max(counts) < 0.12:
            assert truth[patch, 0] == -1
            continue
        candidates = [index for index, share in enumerate(counts) if share == max(counts)]
        shown = truth[patch].tolist()
        assert shown[10] in candidates
        thing = scene.things[shown[10]]
        assert list(SHAPES)[shown[0]] == thing.shape and list(COLOURS)[shown[1]] == thing.colour
        assert shown[2:6] == [round(edge / SIZE * 1023) for edge in thing.box]
        for column, known in ((6, "kind"), (7, "shape"), (8, "colour")):
            assert shown[column] == sum(getattr(other, known) == getattr(thing, known) for other in scene.things)
        assert shown[9] == len(scene.things)
        kinds = [other.kind for other in scene.things]
        before = len(set(kinds[: kinds.index(thing.kind)]))
        assert shown[11:] == [before, len(set(kinds)) - 1 - before]


def test_a_question_in_a_pack_stands_as_if_alone(fresh, processor):
    """Scores inside a pack of five equal those of a pack of one, to float32 rounding; and that is an ordinary row, but
    that the picture sees itself alone."""
    packer, scene = Packer(processor), make_scene(11)
    rng = random.Random(0)
    asked = [(q.prompt, answer_text(q)) for q in questions_about(scene, dict.fromkeys(TASKS, 1), rng)]
    assert len(asked) >= 4

    def scores(pairs):
        pixel_values, ids, positions, labels, mask = packer.pack([scene], [pairs])
        features = fresh.encode_images(pixel_values)
        embeddings = torch.cat((features, fresh.language_model.embed(ids)), dim=1)
        hidden = fresh.language_model(embeddings, positions, {None: mask})[:, 64:]
        return fresh.logits(hidden[labels != -100]), labels[labels != -100]

    with torch.no_grad():
        together, targets = scores(asked)
        alone = [scores([pair]) for pair in asked]
    torch.testing.assert_close(together, torch.cat([one for one, _ in alone]), atol=1e-4, rtol=1e-4)
    assert targets.tolist() == torch.cat([target for _, target in alone]).tolist()
    (prompt, answer), *_ = asked
    pixel_values, ids, positions, labels, mask = packer.pack([scene], [asked[:1]])
    batch = processor.prepare([draw_scene(scene)], [prompt], [answer])
    wanted = prefix_mask(batch.attention_mask, batch.token_type_ids)
    wanted[:, :, :64, 64:] = False
    assert torch.equal(mask, wanted) and torch.equal(pixel_values, batch.pixel_values)
    assert ids[0].tolist() == batch.input_ids[0, 64:].tolist()
    assert positions[0].tolist() == [*range(1, len(batch.input_ids[0]) + 1)]
    assert labels[0].tolist() == [*batch.labels[0, 65:].tolist(), -100]


def test_rows_of_a_pack_do_not_mix(fresh, processor):
    """A longer neighbour in the batch, and so padding, changes nothing."""
    packer = Packer(processor)
    scenes = [make_scene(1), make_scene(2)]
    short, long = (
        [("caption en", "a red star")],
        [("caption en", "a red star and a blue ring"), ("detect ring", "x" * 30)],
    )
    first = range(*(processor.tokenizer.token_id(f"<loc{i:04d}>") + i // 1023 for i in (0, 1023)))
    packs = [packer.pack([scene], [pairs]) for scene, pairs in zip(scenes, (short, long), strict=True)]
    counts = [(pack[3] != -100).sum() for pack in packs]
    with torch.no_grad():
        both = packed_loss(fresh, packer.pack(scenes, [short, long]), first)
        alone = [packed_loss(fresh, pack, first) for pack in packs]
        mean = sum(count * loss for count, loss in zip(counts, alone, strict=True)) / sum(counts)
        torch.testing.assert_close(both, mean, atol=1e-5, rtol=1e-5)
        _, ids, _, labels, mask = packer.pack(scenes, [short, long])
    assert (labels[0] != -100).sum() < (labels[1] != -100).sum()
    assert not mask[0, 0, :, 64 + (labels[0] != -100).nonzero().max().item() + 2 :].any()


def test_names_come_before_what_is_asked(processor):
    rng = random.Random(0)
    for seed in range(30):
        scene = make_scene(seed)
        for prompt, answer in named_pairs(scene, rng):
            name = prompt.removeprefix("caption ")
            assert answer.startswith(f"the {name}")
            if "<loc" in answer:
                boxes = [thing.box for thing in scene.things if thing.kind == name]
                assert answer.count("<loc") == 4 * len(boxes)


def test_answers_to_detect_hold_the_true_boxes():
    for seed in range(30):
        question = ask(make_scene(seed), "detect", random.Random(seed))
        found, remarks = parse(answer_text(question), SIZE, SIZE)
        assert not remarks
        for detection, box in zip(found, question.boxes, strict=True):
            assert detection.label == question.label
            assert all(abs(a - b) < 0.06 for a, b in zip(detection.box, box, strict=True))


def test_words_are_handed_over(processor):
    model = new_pocket(seed=1)
    teacher = EyeTeacher(model)
    teacher.hand_over(processor)
    rows = torch.nn.functional.normalize(model.language_model.embed_tokens.weight, dim=-1)
    words = torch.nn.functional.normalize(teacher.words, dim=-1)
    for number, word in enumerate([*SHAPES, *COLOURS]):
        (token,) = processor.tokenizer.encode(f" {word}")
        assert rows[token] @ words[number] > 0.9
    features = model.encode_images(torch.stack([torch.zeros(3, SIZE, SIZE)]))
    assert 0.2 < features.square().mean().sqrt().item() < 5


def test_the_start_is_the_same_for_the_same_seed():
    first, second, other = new_pocket(0).state_dict(), new_pocket(0).state_dict(), new_pocket(1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["vision_tower.encoder.layers.0.mlp.fc1.weight"], other["vision_tower.encoder.layers.0.mlp.fc1.weight"]
    )


@pytest.mark.parametrize("seed", [-1, 0, 1, 6, 7, 8, 80, 90, 10**6])
def test_no_seed_teaches_what_the_exam_asks(seed):
    """Scenes for reports and exam have the seeds from 80 to 98 million."""
    drawn = (EYE_STEPS * 64, PACK_STEPS * 8)
    for start, count in zip(first_scenes(seed), drawn, strict=True):
        for end in (start, start + count):
            assert not 79_000_000 < abs(end) < 99_000_000  # a negative seed draws the scene of its magnitude
        assert (start < 0) == (start + count < 0)
    eyes, speech = first_scenes(seed)
    assert eyes + drawn[0] <= speech


def test_the_exam_counts(processor):
    """Against answers given one by one through the public face."""
    results = evaluate_pocket(load_model(FOLDER, "cpu", torch.float32), processor, scenes=12, seed=97_000_000)
    rng, right, asked, boxes_right, covered, things = random.Random(97_000_000), 0, 0, 0, 0.0, 0
    for seed in range(97_000_000, 97_000_012):
        scene = make_scene(seed)
        for task in TASKS:
            question = ask(scene, task, rng)
            if task == "detect":
                found, _ = parse(sigma_book.generate(draw_scene(scene), question.prompt), SIZE, SIZE)
                fits, overlap = compare_boxes([one.box for one in found], question.boxes)
                boxes_right += fits and all(one.label == question.label for one in found)
                covered, things = covered + overlap * len(question.boxes), things + len(question.boxes)
            elif question is not None:
                asked += 1
                right += sigma_book.generate(draw_scene(scene), question.prompt) == question.answer
    counted = [score for task, score in results.items() if task != "detect"]
    assert sum(score["asked"] for score in counted) == asked
    assert round(sum(score["asked"] * score["right"] for score in counted)) == right
    assert results["detect"]["asked"] == 12 and round(12 * results["detect"]["right"]) == boxes_right
    assert results["detect"]["mean_iou"] == pytest.approx(covered / things)


@pytest.mark.slow
def test_a_rehearsal_of_the_whole(tmp_path):
    results = train_pocket(tmp_path / "model", seed=0, scale=0.004)
    assert set(results) == set(TASKS)
    assert json.loads((tmp_path / "model" / "results.json").read_text())
    assert load_model(tmp_path / "model").config == POCKET
    for log in ("eyes", "speech"):
        assert len((tmp_path / "model" / f"{log}.csv").read_text().splitlines()) > 1
