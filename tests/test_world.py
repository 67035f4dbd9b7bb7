"""The drawn world: no overlap, the same scene for the same seed, and answers that are true of what was drawn."""

import collections
import hashlib
import random

import numpy as np
import pytest

from sigma_book.world import COLOURS, GRID, NUMBERS, SHAPES, SIDES, SIZE, TASKS, ask, caption, draw_scene, make_scene


def test_the_same_seed_is_the_same_scene_on_any_machine():
    told = repr([make_scene(seed) for seed in range(300)])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "44945c59be8bcf8e"


@pytest.mark.parametrize("most", [1, 2, 5])
def test_things_lie_apart_inside_and_on_the_grid(most):
    counts = collections.Counter()
    for seed in range(1500):
        scene = make_scene(seed, most)
        counts[len(scene.things)] += 1
        owner = np.zeros((SIZE + 2, SIZE + 2), dtype=int)
        for top, left, bottom, right in (thing.box for thing in scene.things):
            assert 0 <= top < bottom <= SIZE and 0 <= left < right <= SIZE
            assert bottom - top == right - left and SIDES[0] <= bottom - top <= SIDES[1]
            assert all(edge % GRID == 0 for edge in (top, left, bottom, right))
            owner[top : bottom + 2, left : right + 2] += 1  # a pixel of air all around
        assert owner.max() == 1
    assert set(counts) == set(range(1, most + 1))


@pytest.mark.parametrize("most", [0, 6, -1])
def test_other_numbers_of_things_are_refused(most):
    with pytest.raises(ValueError, match="1 to 5"):
        make_scene(0, most)


def test_half_of_the_scenes_repeat_a_kind():
    scenes = [scene for seed in range(2000) if len((scene := make_scene(seed)).things) > 1]
    repeated = sum(len({thing.kind for thing in scene.things}) < len(scene.things) for scene in scenes)
    assert 0.45 < repeated / len(scenes) < 0.6


def test_a_box_is_where_the_paint_is():
    """The pixels that differ from the ground fill each box to its four edges, and nothing is painted outside."""
    for seed in range(60):
        scene = make_scene(seed)
        pixels = np.asarray(draw_scene(scene)).astype(int)
        painted = np.abs(pixels - np.array(scene.background)).sum(-1) > 12
        for thing in scene.things:
            top, left, bottom, right = thing.box
            window = painted[top:bottom, left:right]
            rows, columns = np.nonzero(window)
            assert rows.min() <= 1 and columns.min() <= 1
            assert rows.max() >= bottom - top - 2 and columns.max() >= right - left - 2
            painted[top:bottom, left:right] = False
        assert not painted.any()


def test_colours_are_the_words_that_name_them():
    for seed in range(60):
        scene = make_scene(seed)
        pixels = np.asarray(draw_scene(scene)).astype(int)
        for thing in scene.things:
            top, left, bottom, right = thing.box
            window = pixels[top:bottom, left:right].reshape(-1, 3)
            paint = window[np.abs(window - np.array(thing.rgb)).sum(-1) < 6]
            assert len(paint) > 20
            nearest = min(COLOURS, key=lambda name: np.abs(paint.mean(0) - np.array(COLOURS[name])).sum())
            assert nearest == thing.colour


def test_captions_say_each_kind_once_with_its_number():
    for seed in range(400):
        scene = make_scene(seed)
        text = caption(scene)
        phrases = text.replace(" and ", ", ").split(", ")
        counts = collections.Counter(thing.kind for thing in scene.things)
        assert len(phrases) == len(counts)
        for phrase, (kind, count) in zip(phrases, counts.items(), strict=True):  # both from left to right
            number, colour, shape = phrase.split()
            singular = {plural: name for name, plural in SHAPES.items()}
            assert f"{colour} {shape if count == 1 else singular[shape]}" == kind
            assert number == (NUMBERS[count] if count > 1 else "an" if colour == "orange" else "a")


def test_answers_are_true():
    seen = collections.Counter()
    for seed in range(600):
        scene, rng = make_scene(seed), random.Random(seed)
        kinds = collections.Counter(thing.kind for thing in scene.things)
        for task in TASKS:
            question = ask(scene, task, rng)
            if question is None:
                continue
            seen[task, question.answer] += 1
            words = question.prompt.rstrip("?").split()
            if task == "count":
                noun = " ".join(words[4:-2])
                singular = {plural: name for name, plural in SHAPES.items()}
                wanted = noun.replace("shapes", "").split()
                matching = [
                    thing
                    for thing in scene.things
                    if all(
                        word in COLOURS and thing.colour == word or singular.get(word) == thing.shape for word in wanted
                    )
                ]
                assert question.answer == str(len(matching))
            elif task == "yes_no":
                assert (question.answer == "yes") == (" ".join(words[-2:]) in kinds)
            elif task == "colour":
                assert [thing.colour for thing in scene.things if thing.shape == words[-1]] == [question.answer]
            elif task == "left_of":
                left = {thing.shape: thing.box[1] for thing in scene.things}
                assert (question.answer == "yes") == (left[words[4]] < left[words[-1]])
            elif task == "detect":
                assert list(question.boxes) == [thing.box for thing in scene.things if thing.kind == question.label]
    assert {answer for task, answer in seen if task == "count"} >= {"0", "1", "2", "3", "4", "5"}


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="'sing'"):
        ask(make_scene(0), "sing", random.Random(0))
