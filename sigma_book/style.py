"""How the book looks: one set of colours, one folder for figures, one way to check an exercise."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from numbers import Real
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "ANSWER",
    "GREY",
    "HEADS",
    "PICTURE",
    "PROMPT",
    "check",
    "draw_matrix",
    "draw_tokens",
    "figures_folder",
    "save",
    "use_style",
]

# Of the Okabe-Ito palette; dark, middle and light, so that a grey print keeps them apart.
PICTURE = "#0072b2"
PROMPT = "#e69f00"
ANSWER = "#009e73"
GREY = "#8c8c8c"
HEADS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#f0e442")
KINDS = {"picture": PICTURE, "prompt": PROMPT, "answer": ANSWER, "pad": GREY}


def use_style() -> None:
    """Set matplotlib's defaults for the book: small figures, no upper and right frame, sharp text."""
    matplotlib.rcParams.update(
        {
            "figure.figsize": (6.4, 3.2),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": matplotlib.cycler(color=HEADS),
            "font.size": 10,
            "image.interpolation": "nearest",
            "savefig.dpi": 110,
        }
    )


@cache
def figures_folder() -> Path:
    """Where figures go: `SIGMA_BOOK_FIGURES` if it is set, the checkout's figures/ if the package is installed from
    one in editable mode, else a temporary folder."""
    if chosen := os.environ.get("SIGMA_BOOK_FIGURES"):
        folder = Path(chosen)
    elif (checkout := Path(__file__).parent.parent / "figures").is_dir() and _is_editable():
        folder = checkout
    else:
        folder = Path(tempfile.mkdtemp(prefix="sigma_book_figures_"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_editable() -> bool:
    try:
        origin = metadata.distribution("sigma-book").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return True  # imported straight from a checkout
    return bool(origin) and json.loads(origin).get("dir_info", {}).get("editable", False)


def save(figure: Figure, name: str) -> Path:
    """Write a figure as `name`.png into the figure folder, without a date, so that equal figures are equal files."""
    path = figures_folder() / f"{name}.png"
    figure.savefig(path, metadata={"Software": None, "Creation Time": None})
    return path


def draw_tokens(axis: Axes, tokens: Sequence[str], kinds: Sequence[str]) -> None:
    """Draw a row of tokens as boxes, coloured by kind: picture, prompt, answer or pad."""
    for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        axis.add_patch(matplotlib.patches.Rectangle((place, 0), 0.92, 1, color=KINDS[kind], alpha=0.85, lw=0))
        ink = "black" if kind == "prompt" else "white"  # white is hard to read on orange
        axis.text(place + 0.46, 0.5, token, ha="center", va="center", fontsize=8, color=ink)
    axis.set(xlim=(0, len(tokens)), ylim=(-0.1, 1.1))
    axis.set_aspect("equal")
    axis.axis("off")


def draw_matrix(
    axis: Axes, matrix, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None, **colours
) -> None:
    """Draw a matrix as a grid of squares, with names for rows and columns; `colours` goes to `imshow`."""
    axis.imshow(matrix, **({"cmap": "Greys"} | colours))
    axis.set_xticks(range(len(columns or [])), columns or [], rotation=90)
    axis.set_yticks(range(len(rows or [])), rows or [])
    axis.tick_params(length=0)


def check(function: Callable, *cases: tuple[tuple, object]) -> None:
    """Try an exercise on cases, each (arguments, expected), and say at once how it went; never raises.

    An unsolved exercise gives None or `...`, and is answered with "not yet".
    """
    name = getattr(function, "__name__", "your function")
    for arguments, expected in cases:
        shown = ", ".join(_short(argument) for argument in arguments)
        try:
            got = function(*arguments)
            if got is None or got is ...:
                print(f"{name}: not yet. {name}({shown}) should give {_short(expected)}.")
                return
            if not _same(got, expected):
                answer = f"should give {_short(expected)}, yours gives {_short(got)}"
                print(f"{name}({shown}) {answer}.{_hint(got, expected)}")
                return
        except Exception as error:  # a reader's code may fail in any way, and so may what it returns
            print(f"{name}({shown}) stopped: {type(error).__name__}: {error}")
            return
    print(f"{name}: right, on {len(cases)} case{'s' if len(cases) > 1 else ''}.")


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > 12:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _same(got: object, expected: object) -> bool:
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(got, torch.Tensor)
            and got.shape == expected.shape
            and torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-6)
        )
    if isinstance(got, torch.Tensor):
        return got.numel() == 1 and isinstance(expected, int | float) and _same(got.item(), expected)
    if isinstance(expected, float):
        return isinstance(got, Real) and math.isclose(got, expected, rel_tol=1e-4, abs_tol=1e-9)
    if isinstance(expected, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(expected)
            and all(_same(one, other) for one, other in zip(got, expected, strict=True))
        )
    return bool(got == expected)


def _hint(got: object, expected: object) -> str:
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            return " A tensor is expected."
        if got.shape != expected.shape:
            return f" The shapes differ: {tuple(got.shape)} against {tuple(expected.shape)}."
        return f" The largest difference is {(got.double() - expected.double()).abs().max().item():.3g}."
    number = isinstance(expected, int | float) and not isinstance(expected, bool)
    if number and isinstance(got, Real) and expected and got:
        return f" Yours is {got / expected:.4g} times that."
    return ""
