# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A world where every answer is known
#
# *What can we show a model so that we always know what it should say?*
#
# **You build** scenes of coloured shapes, with captions, questions and boxes. **You need** nothing yet.
# **Exports** the module `sigma_book.world`.

# %%
# | export
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

# %%
import hashlib
import re
import time
from collections import Counter

import matplotlib.pyplot as plt

from sigma_book.style import PICTURE, check, figures_folder, save, use_style

use_style()

# %% [markdown]
# ## The picture
#
# To understand a model we must know what it looks at, and whether its answer is right. With photographs that takes
# people: somebody has to say what is in them. So for most of this book we draw our pictures ourselves. Then a program knows
# everything about them.
#
# Here is what we are going to make.

# %%
figure, axes = plt.subplots(1, 4, figsize=(7.2, 2.1))
palette = {"red": "#d62728", "green": "#32a03c", "blue": "#285ac8", "purple": "#8c46b4"}
for axis, (number, (name, colour)) in zip(axes, enumerate(palette.items()), strict=True):
    for place in range(number + 1):
        axis.add_patch(plt.Circle((0.5, 0.15 + 0.23 * place), 0.1, color=colour))
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[], yticks=[])
    axis.set_title(f"{number + 1} {name} circle{'s' if number else ''}", fontsize=9)
save(figure, "01_idea")
plt.show()

# %% [markdown]
# *Figure: four panels with one red, two green, three blue and four purple circles, and over each the words that are
# true of it.* A picture, and words that we know to be true: that is all a model needs to learn from.
#
# ## First by hand
#
# One thing, drawn as directly as can be: a square of pixels, all of one colour.

# %%
tiny = [["." for _ in range(12)] for _ in range(6)]
top, left, bottom, right = 1, 2, 4, 6
for y in range(top, bottom):
    for x in range(left, right):
        tiny[y][x] = "#"
print("\n".join("".join(row) for row in tiny))

# %% [markdown]
# Four numbers say where it is: top, left, bottom, right. We write them in this order, y before x, because PaliGemma
# does. The last two are the first row and column that are *not* painted, so that the height is bottom minus top.
#
# Two things must not lie on each other, or nobody could say what is there. Two boxes are apart if one ends before the
# other begins, from top to bottom or from left to right.


# %%
def apart(one, other):
    return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


assert apart((0, 0, 4, 4), (0, 6, 4, 9)) and not apart((0, 0, 4, 4), (2, 2, 6, 6))
assert not apart((0, 0, 4, 4), (0, 4, 4, 8))  # touching counts as together

# %% [markdown]
# ## Eight shapes, eight colours
#
# Every word that the world needs stands here. Sizes and places lie on a grid of 4 pixels, in a picture of 112 x 112.

# %%
# | export
COLOURS = {
    "red": (214, 39, 40),
    "orange": (245, 140, 30),
    "yellow": (235, 205, 40),
    "green": (50, 160, 60),
    "blue": (40, 90, 200),
    "purple": (140, 70, 180),
    "brown": (130, 80, 45),
    "black": (30, 30, 30),
}
SHAPES = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "diamond": "diamonds",
    "cross": "crosses",
    "ring": "rings",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
TASKS = ("caption", "colour", "count", "yes_no", "left_of", "detect")
SIZE, GRID, SIDES, JITTER = 112, 4, (20, 40), 12

# %% [markdown]
# A *thing* has a shape, a colour and a box. A *scene* is a few things on a light ground.


# %%
# | export
@dataclass(frozen=True)
class Thing:
    """One drawn object: its shape, its colour word, the exact RGB painted, and its box in pixels.

    `box` is (y_min, x_min, y_max, x_max), the order in which PaliGemma speaks; the maxima are exclusive.
    """

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    box: tuple[int, int, int, int]

    @property
    def kind(self) -> str:
        return f"{self.colour} {self.shape}"


# %%
# | export
@dataclass(frozen=True)
class Scene:
    """What stands in a picture: things from left to right (then top to bottom), on a light background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    size: int = SIZE


# %% [markdown]
# ## Scenes from a seed
#
# A scene is drawn up from a number, its *seed*. The same seed gives the same scene on any machine. (Should a later Python
# draw otherwise, the fingerprint below says so.) So "scene 5" is a name that anyone can check, and a test can say "scenes
# 90,000,000 to 90,001,999" and mean pictures that no training ever saw.
#
# Where there are two things or more, half of the scenes are made to repeat a kind. If all things were different, "how many
# red stars" would never be more than one.


# %%
# | export
def make_scene(seed: int, max_things: int = 5) -> Scene:
    """Draw up a scene: 1 to `max_things` things that never overlap or touch.

    Half of the scenes with room for it repeat a kind, so that counting means something.

    Parameters
    ----------
    seed : int
        The same seed gives the same scene on any machine.
    max_things : int
        1 to 5.

    Raises
    ------
    ValueError
        If `max_things` is outside 1 to 5.
    """
    if not 1 <= max_things <= 5:
        raise ValueError(f"a scene holds 1 to 5 things, got max_things={max_things}")
    rng = random.Random(seed)
    count = rng.randint(1, max_things)
    kinds = [(rng.choice(list(SHAPES)), rng.choice(list(COLOURS))) for _ in range(count)]
    if count > 1 and rng.random() < 0.5:
        copies = rng.randint(2, count)
        kinds[:copies] = kinds[:1] * copies
    boxes = _place(rng, count)
    things = []
    for (shape, colour), box in zip(kinds, boxes, strict=True):
        rgb = tuple(min(255, max(0, c + rng.randint(-JITTER, JITTER))) for c in COLOURS[colour])
        things.append(Thing(shape, colour, rgb, box))
    things.sort(key=lambda thing: (thing.box[1], thing.box[0]))
    return Scene(tuple(things), tuple(rng.randint(225, 255) for _ in range(3)))


def _place(rng: random.Random, count: int) -> list[tuple[int, int, int, int]]:
    boxes: list[tuple[int, int, int, int]] = []
    tries = 0
    while len(boxes) < count:
        tries += 1
        if tries > 200:  # a corner was painted: begin again
            boxes, tries = [], 0
        side = rng.randrange(SIDES[0], SIDES[1] + 1, GRID)
        top, left = (rng.randrange(0, SIZE - side + 1, GRID) for _ in range(2))
        box = (top, left, top + side, left + side)
        if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in boxes):
            boxes.append(box)
    return boxes


# %%
five = make_scene(5)
for thing in five.things:
    print(f"{thing.kind:16s} {thing.box}")
assert make_scene(5) == five != make_scene(6)

# %% [markdown]
# Things never touch, in any of a thousand scenes.

# %%
for seed in range(1000):
    boxes = [thing.box for thing in make_scene(seed).things]
    assert all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(0 <= top < bottom <= 112 and 0 <= left < right <= 112 for top, left, bottom, right in boxes)

# %% [markdown]
# And they are the same here as where this book was written: a fingerprint over a hundred scenes.

# %%
told = repr([make_scene(seed) for seed in range(100)])
fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
assert fingerprint == "b201857df5cecd7c"

# %% [markdown]
# ## Drawing
#
# Each thing is painted at three times its size and then reduced, so that edges are smooth. A star or a heart is a polygon,
# stretched until it touches its box on all four sides: only then is the box true.


# %%
# | export
def draw_scene(scene: Scene) -> Image.Image:
    """Paint a scene as an RGB picture of `scene.size` pixels: drawn at three times the size, then reduced."""
    zoom = 3
    image = Image.new("RGB", (scene.size * zoom, scene.size * zoom), scene.background)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        top, left, bottom, right = (edge * zoom for edge in thing.box)
        _draw_shape(canvas, thing, left, top, right - 1, bottom - 1, scene.background)
    return image.reduce(zoom)


def _draw_shape(canvas, thing: Thing, left: int, top: int, right: int, bottom: int, background) -> None:
    width, height = right - left, bottom - top

    def polygon(points):
        canvas.polygon([(left + x * width, top + y * height) for x, y in points], fill=thing.rgb)

    if thing.shape == "circle":
        canvas.ellipse((left, top, right, bottom), fill=thing.rgb)
    elif thing.shape == "ring":
        canvas.ellipse((left, top, right, bottom), fill=thing.rgb)
        hole = (left + width * 0.28, top + height * 0.28, right - width * 0.28, bottom - height * 0.28)
        canvas.ellipse(hole, fill=background)
    elif thing.shape == "square":
        canvas.rectangle((left, top, right, bottom), fill=thing.rgb)
    elif thing.shape == "triangle":
        polygon([(0.5, 0), (1, 1), (0, 1)])
    elif thing.shape == "diamond":
        polygon([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)])
    elif thing.shape == "cross":
        a, b = 0.32, 0.68
        polygon([(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)])
    elif thing.shape == "star":
        polygon(_fit([_on_circle(math.pi * i / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]))
    elif thing.shape == "heart":
        turn = [math.pi * i / 30 for i in range(60)]
        curve = [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
            for t in turn
        ]
        polygon(_fit(curve))


def _on_circle(angle: float, radius: float) -> tuple[float, float]:
    return radius * math.sin(angle), -radius * math.cos(angle)


def _fit(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stretch points so that they fill the unit square: a box then touches its shape on all four sides."""
    xs, ys = zip(*points, strict=True)
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


# %%
figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.4))
for axis, seed in zip(axes.flat, (5, 155, 8, 4, 13, 17, 31, 40), strict=True):
    axis.imshow(draw_scene(make_scene(seed)))
    axis.set_title(f"seed {seed}", fontsize=8)
    axis.axis("off")
save(figure, "01_scenes")
plt.show()

draw_scene(make_scene(155)).save(figures_folder() / "scene.png")

# %% [markdown]
# *Figure: eight scenes: circles, squares, triangles, stars, hearts, diamonds, crosses and rings, one to five in each.*
# Scene 155 is also saved by itself, as `figures/scene.png`: the README asks about it.
#
# Pixels may differ by a shade between versions of the drawing library. The scene does not: what is true of it depends on
# the seed alone.

# %%
started = time.perf_counter()
for seed in range(200):
    draw_scene(make_scene(seed))
print(f"{200 / (time.perf_counter() - started):.0f} scenes a second")

# %% [markdown]
# ## Captions
#
# A caption names what is there from left to right. Equal kinds are grouped and counted: "two red stars and a blue
# ring".


# %%
# | export
def caption(scene: Scene) -> str:
    """Say what stands in the scene: kinds from left to right, equal kinds grouped and counted."""
    groups: dict[str, int] = {}
    for thing in scene.things:
        groups[thing.kind] = groups.get(thing.kind, 0) + 1
    phrases = [_phrase(kind, count) for kind, count in groups.items()]
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _phrase(kind: str, count: int) -> str:
    colour, shape = kind.split()
    if count > 1:
        return f"{NUMBERS[count]} {colour} {SHAPES[shape]}"
    return f"{_article(colour)} {colour} {shape}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# %%
for seed in (5, 155, 4):
    print(seed, caption(make_scene(seed)))

# %% [markdown]
# ## Questions
#
# Six tasks. Every question has one true answer, and where a scene has no good question of a kind, none is asked: no
# "what colour is the star" with two stars. For `detect` the answer is a list of boxes; chapter 14 turns them into text.


# %%
# | export
@dataclass(frozen=True)
class Question:
    """A prompt about a scene with its true answer; for `detect`, the true boxes and their label instead of a text."""

    task: str
    prompt: str
    answer: str = ""
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    label: str = ""


# %%
# | export
def ask(scene: Scene, task: str, rng: random.Random) -> Question | None:
    """Ask one question of a task about a scene, or None where the scene has no good one.

    Parameters
    ----------
    scene : Scene
    task : str
        One of `TASKS`.
    rng : random.Random
        Chooses what is asked; the scene alone decides the answer.

    Raises
    ------
    ValueError
        If the task is unknown.
    """
    things = scene.things
    shapes = [thing.shape for thing in things]
    single = [thing for thing in things if shapes.count(thing.shape) == 1]
    if task == "caption":
        return Question(task, "caption en", caption(scene))
    if task == "colour":
        if not single:
            return None
        thing = rng.choice(single)
        return Question(task, f"answer en what colour is the {thing.shape}?", thing.colour)
    if task == "count":
        colour, shape = _pick_kind(scene, rng)
        form = rng.choice(("kind", "kind", "shape", "colour", "all"))
        matching = [
            thing
            for thing in things
            if (form in ("colour", "all") or thing.shape == shape)
            and (form in ("shape", "all") or thing.colour == colour)
        ]
        noun = {
            "kind": f"{colour} {SHAPES[shape]}",
            "shape": SHAPES[shape],
            "colour": f"{colour} shapes",
            "all": "shapes",
        }[form]
        return Question(task, f"answer en how many {noun} are there?", str(len(matching)))
    if task == "yes_no":
        colour, shape = _pick_kind(scene, rng)
        present = any(thing.kind == f"{colour} {shape}" for thing in things)
        return Question(task, f"answer en is there {_article(colour)} {colour} {shape}?", "yes" if present else "no")
    if task == "left_of":
        if len(single) < 2:
            return None
        first, second = rng.sample(single, 2)
        if first.box[1] == second.box[1]:
            return None
        is_left = first.box[1] < second.box[1]
        return Question(task, f"answer en is the {first.shape} left of the {second.shape}?", "yes" if is_left else "no")
    if task == "detect":
        kind = rng.choice(things).kind
        boxes = tuple(thing.box for thing in things if thing.kind == kind)
        return Question(task, f"detect {kind}", boxes=boxes, label=kind)
    raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")


def _pick_kind(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A colour and a shape to ask about: half of the time one that is there, else one that is near to it or any."""
    thing = rng.choice(scene.things)
    draw = rng.random()
    if draw < 0.5:
        return thing.colour, thing.shape
    if draw < 0.7:  # the right shape in another colour
        return rng.choice(list(COLOURS)), thing.shape
    if draw < 0.9:  # the right colour on another shape
        return thing.colour, rng.choice(list(SHAPES))
    return rng.choice(list(COLOURS)), rng.choice(list(SHAPES))


# %%
rng = random.Random(0)
for task in TASKS:
    question = ask(five, task, rng)
    if question is not None:
        print(f"{question.prompt:50s} {question.answer or question.boxes}")

# %% [markdown]
# ## Proof: the answers are true
#
# The answers are checked by looking at the scene in another way, with nothing but its list of things.

# %%
singular = {several: one for one, several in SHAPES.items()}
for seed in range(500):
    scene, rng = make_scene(seed), random.Random(seed)
    kinds = Counter(thing.kind for thing in scene.things)
    for task in TASKS:
        question = ask(scene, task, rng)
        if question is None:
            continue
        words = question.prompt.rstrip("?").split()
        if task == "colour":
            assert kinds[f"{question.answer} {words[-1]}"] == 1
        elif task == "yes_no":
            assert (question.answer == "yes") == (kinds[" ".join(words[-2:])] > 0)
        elif task == "left_of":
            left = {thing.shape: thing.box[1] for thing in scene.things}
            assert (question.answer == "yes") == (left[words[4]] < left[words[-1]])
        elif task == "count":
            asked = {*words[4:-2]} - {"shapes"}  # a colour, a shape in the plural, both, or neither
            told = [{thing.colour, SHAPES[thing.shape]} for thing in scene.things]
            assert int(question.answer) == sum(asked <= thing for thing in told)
        elif task == "detect":
            assert len(question.boxes) == kinds[question.label] > 0
        elif task == "caption":
            told = Counter()
            for group in re.split(", | and ", question.answer):
                number, colour, shape = group.split()
                told[f"{colour} {singular.get(shape, shape)}"] += 1 if number in ("a", "an") else NUMBERS.index(number)
            assert told == kinds

# %% [markdown]
# ## A look inside: how far does guessing go?
#
# A model that never looks can still be right now and then, by giving the commonest answer. Before we praise a model, we
# should know how often.

# %%
rng, answers = random.Random(1), {task: Counter() for task in TASKS}
for seed in range(2000):
    scene = make_scene(seed)
    for task in TASKS:
        question = ask(scene, task, rng)
        if question is not None:
            answers[task][question.answer or question.boxes] += 1
blind = {task: counts.most_common(1)[0][1] / counts.total() for task, counts in answers.items()}

figure, axis = plt.subplots(figsize=(5.6, 2.4))
axis.barh(list(blind), [100 * share for share in blind.values()], color=PICTURE)
for place, share in enumerate(blind.values()):
    axis.text(100 * share + 1, place, f"{share:.1%}", va="center", fontsize=9)
axis.set(xlabel="right by always giving the commonest answer, in per cent", xlim=(0, 100))
axis.invert_yaxis()
save(figure, "01_blind")
plt.show()
assert blind["caption"] < 0.02 and blind["detect"] < 0.02 and 0.4 < blind["yes_no"] < 0.65

# %% [markdown]
# *Figure: a bar for each task. Yes-or-no questions are right a little more than half of the time, colours and counts
# less, captions and boxes hardly ever.*
#
# ## The bill
#
# How many different scenes are there? Counting one thing alone: 8 shapes, 8 colours, and for each of 6 sizes all places
# on the grid.

# %%
places = sum(((112 - side) // 4 + 1) ** 2 for side in range(20, 41, 4))
assert places == 2791
one_thing = 8 * 8 * places
f"{one_thing:,} scenes of one thing, without counting shades and grounds"

# %% [markdown]
# With five things there are more than anyone could draw. A model cannot learn them by heart.
#
# ## Your turn
#
# **1.** ★ How many things of a colour are in a scene?


# %%
def count_colour(scene: Scene, colour: str) -> int: ...


check(count_colour, ((five, "black"), 2), ((five, "green"), 0))

# %% [markdown]
# **2.** ★ Which thing of a scene is right of all others? Give the kind of the one whose left edge is largest.


# %%
def rightmost(scene: Scene) -> str: ...


check(rightmost, ((five,), five.things[-1].kind), ((make_scene(3),), make_scene(3).things[-1].kind))

# %% [markdown]
# **3.** ★★ The area that two boxes share, in pixels.


# %%
def shared_area(one: tuple, other: tuple) -> int: ...


check(
    shared_area,
    (((0, 0, 4, 4), (2, 2, 6, 6)), 4),
    (((0, 0, 4, 4), (0, 6, 4, 9)), 0),
    (((0, 0, 4, 4), (6, 6, 9, 9)), 0),
)

# %% [markdown]
# Next: such a picture becomes a row of vectors.
