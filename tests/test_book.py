"""The book is the source: chapters and modules agree, their order is the order of imports, and a broken chapter fails."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import numpy as np
import pytest
from PIL import Image

import sigma_book
from sigma_book import tangle

PACKAGE = Path(sigma_book.__file__).parent
CHECKOUT = PACKAGE.parent
CHAPTERS = sorted((CHECKOUT / "chapters").glob("*.py"))
SETTINGS = "lab/settings/overrides.d/sigma_book.json"  # a file of our own: overrides.json is the user's
NAMES = [
    "00_tour",
    "01_world",
    "02_patches",
    "03_attention",
    "04_siglip",
    "05_rope",
    "06_gqa",
    "07_kv_cache",
    "08_gemma",
    "09_projector",
    "10_paligemma",
    "11_processor",
    "12_weights",
    "12b_npz",
    "13_generation",
    "14_locate",
    "15_data",
    "15b_batches",
    "16_training",
    "17_pocket",
    "18_lora",
    "19_qlora",
    "20_evaluation",
    "20b_answers",
    "21_speed",
    "21b_fast",
    "21c_batching",
    "22_scale",
    "22b_bulk",
    "22c_protocol",
    "23_server",
    "23b_why",
]


def test_modules_are_what_the_chapters_say(capsys):
    assert tangle.main(["--check"]) == 0, capsys.readouterr().err


def test_the_chapters_are_all_there():
    assert [path.stem for path in CHAPTERS] == NAMES


def test_a_module_imports_only_from_earlier_chapters():
    """Read from the tangled modules themselves, apart from tangle's own check."""
    earlier: set[str] = set()
    for name in NAMES[1:]:
        module = name.partition("_")[2]
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sigma_book"):
                assert node.module.partition(".")[2] in earlier, f"{module} imports {node.module}"
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("sigma_book") for alias in node.names)
        earlier.add(module)


def test_each_figure_is_one_that_a_chapter_draws_or_the_readme_shows():
    told = "".join(path.read_text() for path in [*CHAPTERS, CHECKOUT / "README.md"])
    kept = sorted((CHECKOUT / "figures").glob("*.png"))
    assert len(kept) > 90
    assert not [path.name for path in kept if f'"{path.stem}"' not in told and path.name not in told]


def test_no_figure_is_cut_off():
    for path in (CHECKOUT / "figures").glob("[0-9]*.png"):
        grey = np.asarray(Image.open(path).convert("L"))
        rim = [grey[0], grey[-1], grey[:, 0], grey[:, -1]]
        assert min(side.min() for side in rim) > 240, f"{path.name} has ink on its rim"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_opens_as_the_house_says(path):
    chapter = tangle.read_chapter(path)
    text = path.read_text()
    assert "?" in chapter.docstring
    for words in ("**You build**", "**You need**", "**Exports**"):
        assert words in text
    assert "\n# Next: " in text, "one line on what comes next"
    assert "check(" in text, "exercises that answer at once"
    assert "—" not in text
    assert jupytext.writes(jupytext.read(path), "py:percent") == text  # saving it in JupyterLab leaves it as it is


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"NO_COLOR": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # some take seconds to load
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "nbmake.pytest_plugin", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture
def small_book(tmp_path) -> Path:
    (tmp_path / "chapters").mkdir()
    shutil.copy(CHECKOUT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


@pytest.mark.slow
def test_chapters_run_when_asked_each_in_a_folder_of_its_own_and_one_that_raises_fails_the_run(small_book):
    cells = "# %% [markdown]\n# # Broken\n\n# %%\nx = 1\n\n# %%\nx / 0  # on purpose\n"
    (small_book / "chapters" / "05_broken.py").write_text(cells)
    cell = "# %%\nfrom pathlib import Path\nPath('left_behind').write_text('x')\n"
    (small_book / "chapters" / "06_fine.py").write_text(cell)
    done = run_pytest(small_book, "--nbmake", "chapters/05_broken.py", "chapters/06_fine.py")
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout
    assert "05_broken.py, cell 3" in done.stdout
    assert "x / 0  # on purpose" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert not list(small_book.rglob("left_behind"))
    assert run_pytest(small_book, "chapters").returncode == 5  # nothing collected


def test_chapters_run_against_this_checkout_or_say_so(small_book):
    (small_book / "sigma_book").mkdir()
    (small_book / "chapters" / "05_fine.py").write_text("# %%\n1 + 1\n")
    done = run_pytest(small_book, "--nbmake", "chapters")
    assert done.returncode == 1
    assert "pip install -e ." in done.stdout


@pytest.mark.slow
def test_one_who_measures_time_is_alone(small_book):
    """Two workers, three files: the others run beside each other, and never beside the one that is marked."""
    (small_book / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone: measures time\n")
    body = (
        "import time\nfrom pathlib import Path\nimport pytest\n\n\n{mark}\n@pytest.mark.parametrize('turn', range(4))\n"
    )
    body += "def test_time(turn):\n    start = time.time()\n    time.sleep(0.4)\n"
    body += "    with Path({log!r}).open('a') as file:\n        file.write(f'{name} {{start}} {{time.time()}}\\n')\n"
    log = str(small_book / "log")
    for name in ("first", "alone", "second"):
        mark = "@pytest.mark.alone" if name == "alone" else ""
        (small_book / f"test_{name}.py").write_text(body.format(mark=mark, log=log, name=name))
    done = run_pytest(small_book, "-p", "xdist.plugin", "-n", "2", "--dist", "loadfile")
    assert done.returncode == 0, done.stdout
    spans = [
        (name, float(start), float(end)) for name, start, end in map(str.split, Path(log).read_text().splitlines())
    ]
    assert len(spans) == 12

    def meet(*names: str) -> int:
        return sum(
            one[1] < other[2] and other[1] < one[2]
            for one in spans
            for other in spans
            if (one[0], other[0]) in (names, names[::-1]) and one is not other
        )

    assert meet("alone", "first") == meet("alone", "second") == 0


def test_jupyterlab_opens_chapters_as_notebooks():
    settings = json.loads((CHECKOUT / "jupyter" / SETTINGS).read_text())
    assert settings["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]["python"] == "Jupytext Notebook"
    extension = Path(sys.prefix) / "share" / "jupyter" / "labextensions" / "jupyterlab-jupytext"
    assert any("Jupytext Notebook" in path.read_text() for path in extension.rglob("*.js"))
    assert (Path(sys.prefix) / "share" / "jupyter" / SETTINGS).exists()


@pytest.mark.network
def test_the_wheel_carries_book_and_model(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", str(CHECKOUT), "--no-deps", "-q", "-w", str(tmp_path)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "sigma-book = sigma_book.cli:main" in archive.read(entry).decode()
    for name in NAMES:
        assert f"sigma_book/chapters/{name}.py" in names
    for name in ("model.safetensors", "config.json", "tokenizer.model", "tokenizer.json", "README.md", "results.json"):
        assert f"sigma_book/pocket_model/{name}" in names
    assert any(name.endswith(f"share/jupyter/{SETTINGS}") for name in names)
    assert wheel.stat().st_size < 8_000_000
