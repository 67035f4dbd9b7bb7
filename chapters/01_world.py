# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
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
