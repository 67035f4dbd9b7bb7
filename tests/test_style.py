"""How exercises are checked, where figures go, and what is drawn."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from sigma_book import style
from sigma_book.style import ANSWER, GREY, HEADS, KINDS, PICTURE, PROMPT, check, draw_matrix, draw_tokens

matplotlib.use("Agg")


# exercises


def double(x):
    return 2 * x


def said(capsys, function, *cases) -> str:
    check(function, *cases)
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("\n")
    return out.removesuffix("\n")


def test_right(capsys):
    assert said(capsys, double, ((1,), 2)) == "double: right, on 1 case."
    assert said(capsys, double, ((1,), 2), ((0.5,), 1.0), (("a",), "aa")) == "double: right, on 3 cases."


@pytest.mark.parametrize("nothing", [None, ...])
def test_not_yet(capsys, nothing):
    def later(x, y):
        return nothing

    assert said(capsys, later, ((1, "a"), 5), ((2, "b"), 6)) == "later: not yet. later(1, 'a') should give 5."


def test_a_stub_as_the_chapters_have_it(capsys):
    def stub(x: int) -> float: ...

    assert "not yet" in said(capsys, stub, ((1,), 2.0))


def test_the_first_wrong_case_is_told(capsys):
    found = said(capsys, double, ((1,), 2), ((2,), 5), ((3,), 7))
    assert found == "double(2) should give 5, yours gives 4. Yours is 0.8 times that."


@pytest.mark.parametrize("error", [ValueError("no"), ZeroDivisionError(), RecursionError("deep"), MemoryError("big")])
def test_a_solution_that_raises(capsys, error):
    def broken(x):
        raise error

    assert said(capsys, broken, ((1,), 2)) == f"broken(1) stopped: {type(error).__name__}: {error}"


def test_a_wrong_number_of_arguments(capsys):
    assert said(capsys, double, ((1, 2), 2)).startswith("double(1, 2) stopped: TypeError")


def test_a_function_without_a_name(capsys):
    class Twice:
        def __call__(self, x):
            return 2 * x

    assert said(capsys, Twice(), ((1,), 2)) == "your function: right, on 1 case."


def answer(capsys, got, expected) -> str:
    def solution():
        return got

    return said(capsys, solution, ((), expected))


RIGHT = [
    (0.1 + 0.2, 0.3),
    (1, 1.0),
    (np.float32(0.6), 0.6),
    (np.float64(1e-12), 0.0),
    (torch.tensor(0.25), 0.25),
    (torch.tensor([3]), 3),
    (1.00005, 1.0),
    (True, True),
    ("ab", "ab"),
    ([1, 2.0], [1, 2.0]),
    ((1, 2), [1, 2]),
    ([[0.1 + 0.2], "a"], [[0.3], "a"]),
    ([torch.tensor([1.0])], [torch.tensor([1.0])]),
    ({"a": 1}, {"a": 1}),
    (torch.tensor([1.0, 2.0]), torch.tensor([1, 2])),
    (torch.tensor([1.0, 2.00001]), torch.tensor([1.0, 2.0])),
    (torch.tensor([True, False]), torch.tensor([True, False])),
    (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0])),
    (torch.ones(2, dtype=torch.bfloat16), torch.ones(2)),
    (-math.inf, -math.inf),
]
WRONG = [
    (1.001, 1.0),
    (2, 1),
    (math.nan, 1.0),
    ("1.0", 1.0),
    (torch.tensor([1.0, 1.0]), 1.0),
    ([1, 2], [1, 2, 3]),
    ([1, 2, 3], [1, 2]),
    ([1, 2], [2, 1]),
    (5, [5]),
    ({1, 2}, [1, 2]),
    (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
    ([1.0, 2.0], torch.tensor([1.0, 2.0])),
    (torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])),
    (torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 2.0])),
    (torch.tensor([math.nan]), torch.tensor([0.0])),
    (False, True),
    (0, True),
    ("", "a"),
    ([], [1]),
]


@pytest.mark.parametrize(("got", "expected"), RIGHT)
def test_what_is_right(capsys, got, expected):
    assert answer(capsys, got, expected) == "solution: right, on 1 case."


@pytest.mark.parametrize(("got", "expected"), WRONG)
def test_what_is_wrong(capsys, got, expected):
    found = answer(capsys, got, expected)
    assert found.startswith("solution() should give ") and ", yours gives " in found


@pytest.mark.parametrize(
    ("got", "expected", "hint"),
    [
        (8, 2, "Yours is 4 times that."),
        (-0.5, 1.0, "Yours is -0.5 times that."),
        (np.float32(3), 2.0, "Yours is 1.5 times that."),
        ([1.0], torch.ones(1), "A tensor is expected."),
        (torch.ones(2, 3), torch.ones(3, 2), "The shapes differ: (2, 3) against (3, 2)."),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), "The largest difference is 0.5."),
    ],
)
def test_hints(capsys, got, expected, hint):
    assert answer(capsys, got, expected).endswith(f". {hint}")


@pytest.mark.parametrize(("got", "expected"), [(0, 5), (5, 0), (False, True), ("a", "b"), ("a", 3), ([2], [1])])
def test_no_hint_where_none_helps(capsys, got, expected):
    assert answer(capsys, got, expected).endswith(f"yours gives {got!r}.")


@pytest.mark.parametrize(
    "got",
    [10**400, np.zeros(3), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64), object()],
    ids=["huge", "array", "meta", "complex", "object"],
)
@pytest.mark.parametrize(
    "expected", [1.0, 3, "a", [1, 2], torch.ones(3)], ids=["float", "int", "str", "list", "tensor"]
)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_no_answer_makes_it_raise(capsys, got, expected):
    found = answer(capsys, got, expected)
    assert "solution" in found and "right, on" not in found


def test_long_values_are_cut(capsys):
    found = answer(capsys, "y" * 1000, "x" * 1000)
    assert len(found) < 320 and "..." in found
    found = answer(capsys, torch.zeros(50, 60), torch.ones(60, 50))
    assert "should give a tensor of shape (60, 50), yours gives a tensor of shape (50, 60)" in found


def test_arguments_are_shown_as_they_were(capsys):
    def eat(values):
        values.clear()
        return 0

    assert said(capsys, eat, (([1, 2],), 5)).startswith("eat([1, 2]) should give 5")


# where figures go

SCRIPT = """
import sys
from matplotlib import pyplot
from sigma_book.style import figures_folder, save, use_style

use_style()
figure, axis = pyplot.subplots()
axis.plot([1, 3, 2])
axis.set_title("a line")
path = save(figure, "00_line")
assert path.parent == figures_folder()
print(path)
"""


def run(folder: Path, environment: dict[str, str]) -> Path:
    """Save a figure in a process of its own, and give the path it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "SIGMA_BOOK_FIGURES"} | environment
    environment |= {"MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.is_file()
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout with nothing but style.py: so that another installation can be pretended beside it."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "sigma_book").mkdir()
    (root / "sigma_book" / "__init__.py").touch()
    shutil.copy(style.__file__, root / "sigma_book")
    (root / "figures").mkdir()
    return root


def installed(checkout: Path, origin: dict | None) -> dict[str, str]:
    """The environment of a process that finds the checkout, and beside it what pip notes of an installation."""
    info = checkout / f"site-{len(list(checkout.iterdir()))}" / "sigma_book-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sigma-book\nVersion: 0.0.0\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    return {"PYTHONPATH": os.pathsep.join([str(checkout), str(info.parent)])}


@pytest.mark.slow
def test_the_folder_that_the_reader_chose(checkout, tmp_path):
    """It is made if need be. The same figure, saved by a second process, is the same to the byte."""
    environment = installed(checkout, {"url": "file:///x", "dir_info": {"editable": True}})
    chosen = run(tmp_path, environment | {"SIGMA_BOOK_FIGURES": str(tmp_path / "not" / "there")})
    assert chosen == tmp_path / "not" / "there" / "00_line.png"
    assert list((checkout / "figures").iterdir()) == []
    content = chosen.read_bytes()
    assert content.startswith(b"\x89PNG") and b"Software" not in content and b"Creation Time" not in content
    usual = run(tmp_path, environment)  # nothing chosen: figures/ of the checkout
    assert usual == checkout / "figures" / "00_line.png"
    assert usual.read_bytes() == content
    usual.unlink()


@pytest.mark.parametrize("origin", [None, pytest.param({"url": "file:///x", "dir_info": {}}, marks=pytest.mark.slow)])
def test_a_package_that_is_a_copy_writes_beside_nobody(checkout, tmp_path, origin):
    """Installed, not editable: even where a folder named figures lies beside it, that is not the reader's to fill."""
    path = run(tmp_path, installed(checkout, origin))
    assert path.parent.name.startswith("sigma_book_figures_")
    assert list((checkout / "figures").iterdir()) == []
    shutil.rmtree(path.parent)


def test_save_in_this_process(monkeypatch, tmp_path):
    monkeypatch.setattr(style, "figures_folder", lambda: tmp_path)
    figure = Figure()
    figure.subplots().plot([1, 2])
    first = style.save(figure, "a").read_bytes()
    assert style.save(figure, "a").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# what is drawn


def test_the_colours_stay_apart_in_grey():
    """Luminance of picture, answer and prompt: each step is seen on a grey print."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    dark, middle, light = (float(np.array(to_rgb(colour)) @ weights) for colour in (PICTURE, ANSWER, PROMPT))
    assert middle - dark > 0.08 and light - middle > 0.08
    assert len(set(HEADS)) == 8  # one for each head of PaliGemma


def test_tokens_are_drawn_in_order():
    axis = Figure().subplots()
    tokens, kinds = ["<image>", "caption", "a", "pad"], ["picture", "prompt", "answer", "pad"]
    draw_tokens(axis, tokens, kinds)
    assert [text.get_text() for text in axis.texts] == tokens
    assert [patch.get_facecolor()[:3] for patch in axis.patches] == [to_rgb(KINDS[kind]) for kind in kinds]
    assert [patch.get_x() for patch in axis.patches] == [0, 1, 2, 3]
    for text, patch in zip(axis.texts, axis.patches, strict=True):
        x, y = text.get_position()
        assert patch.get_x() < x < patch.get_x() + patch.get_width() <= patch.get_x() + 1
        assert patch.get_y() < y < patch.get_y() + patch.get_height()
        assert text.get_color() != to_rgba(patch.get_facecolor())
    assert axis.get_xlim() == (0, 4)


def test_every_token_needs_a_kind():
    with pytest.raises(ValueError, match="zip"):
        draw_tokens(Figure().subplots(), ["a", "b"], ["prompt"])
    with pytest.raises(KeyError, match="word"):
        draw_tokens(Figure().subplots(), ["a"], ["word"])


def test_a_matrix_with_names():
    axis = Figure().subplots()
    matrix = torch.arange(6.0).reshape(2, 3)
    draw_matrix(axis, matrix, rows=["a", "b"], columns=["x", "y", "z"])
    (image,) = axis.images
    assert np.array_equal(np.asarray(image.get_array()), matrix.numpy())
    assert image.get_cmap().name == "Greys"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "z"]
    assert list(axis.get_yticks()) == [0, 1] and list(axis.get_xticks()) == [0, 1, 2]


def test_a_matrix_with_other_colours_and_no_names():
    axis = Figure().subplots()
    draw_matrix(axis, np.eye(3), cmap="Blues", vmin=-1, vmax=2)
    (image,) = axis.images
    assert image.get_cmap().name == "Blues" and image.get_clim() == (-1, 2)
    assert list(axis.get_xticks()) == list(axis.get_yticks()) == []


def test_the_style_of_the_book():
    with matplotlib.rc_context():
        style.use_style()
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert tuple(colours) == HEADS
        assert not matplotlib.rcParams["axes.spines.top"]
    assert KINDS == {"picture": PICTURE, "prompt": PROMPT, "answer": ANSWER, "pad": GREY}
