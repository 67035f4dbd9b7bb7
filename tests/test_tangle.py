"""Tangle: what it takes out, and each mistake in a chapter as one sentence that names chapter and cell."""

import pytest

from sigma_book import tangle as command
from sigma_book.tangle import TangleError, read_book, read_chapter, tangle

HEAD = "# %% [markdown]\n# # A title\n#\n# *A question?*\n\n"


@pytest.fixture
def book(tmp_path):
    def write(**chapters: str):
        for name, body in chapters.items():
            (tmp_path / f"{name.lstrip('c')}.py").write_text(HEAD + body)
        return tmp_path

    return write


def cell(source: str, mark: str = "# | export") -> str:
    return f"# %%\n{mark}\n{source}\n\n"


def test_only_marked_cells_are_taken(book):
    body = (
        cell("import math")
        + "# %%\nprint('a figure')\n\n"
        + cell("def area(r):\n    return math.pi * r * r", "#| export")
    )
    text = tangle(read_chapter(book(c05_circle=body) / "05_circle.py"))
    assert text.startswith('"""A title.\n\nA question?\n\nTangled from chapters/05_circle.py: edit there')
    assert "a figure" not in text and "export" not in text
    assert '__all__ = ["area"]' in text
    space = {}
    exec(compile(text, "circle", "exec"), space)
    assert round(space["area"](1), 3) == 3.142


def test_second_parts_stand_between_two_numbers(book):
    written = book(c10_last=cell("x = 1"), c05b_second=cell("y = 1"), c05_first=cell("z = 1"))
    assert [chapter.module for chapter in read_book(written)] == ["first", "second", "last"]


def test_private_names_stay_out_of_the_public_list(book):
    body = cell("import math") + cell("SIZE: int = 3\nA, B = 1, 2\n\n\ndef _helper():\n    return SIZE")
    space = {}
    exec(tangle(read_chapter(book(c01_x=body) / "01_x.py")), space)
    assert set(space["__all__"]) == {"A", "B", "SIZE"}


@pytest.mark.parametrize(
    ("chapters", "words"),
    [
        ({"c05_rope": cell("def broken(:")}, ("05_rope.py, cell 2", "does not parse")),
        ({"crope": cell("x = 1")}, ("rope.py", "number")),
        ({"c05_Rope": cell("x = 1")}, ("05_Rope.py", "number")),
        ({"c05_rope": cell("x = 1") + cell("%matplotlib inline")}, ("05_rope.py, cell 3", "does not parse")),
        ({"c01_rope": cell("x = 1"), "c02_rope": cell("y = 1")}, ("02_rope.py", "module", "01_rope.py")),
        ({"c05_rope": cell("x = 1"), "c05_gqa": cell("y = 1")}, ("number 5", "05_rope.py", "05_gqa.py")),
        ({"c05b_rope": cell("x = 1"), "c05b_gqa": cell("y = 1")}, ("number 5b", "05b_rope.py", "05b_gqa.py")),
        ({"c05a_rope": cell("x = 1")}, ("05a_rope.py", "number")),
        ({"c01_a": cell("x = 1"), "c02_b": cell("x = 2")}, ("02_b.py, cell 2", "x", "01_a.py, cell 2")),
        ({"c01_a": cell("x = 1") + cell("def x(): ...")}, ("01_a.py, cell 3", "x", "01_a.py, cell 2")),
        ({"c01_a": cell("def x(): ..."), "c02_b": cell("class x: ...")}, ("02_b.py, cell 2", "x", "01_a.py, cell 2")),
        (
            {"c01_a": cell("x = 1"), "c02_b": cell("for x in range(3): ...")},
            ("02_b.py, cell 2", "x", "01_a.py, cell 2"),
        ),
        ({"c01_a": cell("x = 1"), "c02_b": cell("if True:\n    x: int = 2")}, ("02_b.py, cell 2", "01_a.py, cell 2")),
        ({"c01_a": cell("_x = 1"), "c02_b": cell("_x, y = 2, 3")}, ("02_b.py, cell 2", "_x", "01_a.py, cell 2")),
        ({"c01_a": cell("x = 1"), "c02_b": cell("from a import x as y\nx += y")}, ("02_b.py, cell 2", "x")),
        ({"c01_a": cell("from sigma_book.a import x")}, ("01_a.py, cell 2", "sigma_book.a")),
        ({"c01_a": cell("from sigma_book.b import y"), "c02_b": cell("y = 1")}, ("01_a.py, cell 2", "sigma_book.b")),
        ({"c01_a": cell("def f():\n    import sigma_book.assemble")}, ("01_a.py, cell 2", "assemble")),
        ({"c01_a": cell("from sigma_book import load")}, ("01_a.py, cell 2", "load")),
        ({"c01_a": cell("import sigma_book")}, ("01_a.py, cell 2", "sigma_book")),
        ({"c01_a": cell("from sigma_book.cli import main")}, ("01_a.py, cell 2", "sigma_book.cli")),
    ],
)
def test_mistakes_are_told_with_chapter_and_cell(book, chapters, words):
    folder = book(**chapters)
    with pytest.raises(TangleError) as told:
        read_book(folder)
    assert "\n" not in str(told.value)
    for word in words:
        assert word in str(told.value)


def test_an_earlier_chapter_may_be_imported(book):
    folder = book(c01_a=cell("x = 1"), c02_b=cell("from sigma_book.a import x") + cell("y = x + 1"))
    assert [chapter.module for chapter in read_book(folder)] == ["a", "b"]


def test_cells_that_are_not_exported_may_do_anything(book):
    folder = book(c01_a=cell("x = 1") + "# %%\nfrom sigma_book import load\nx = 2\n")
    assert len(read_book(folder)[0].cells) == 1


def test_a_chapter_without_a_question_is_refused(tmp_path):
    (tmp_path / "01_a.py").write_text("# %% [markdown]\n# # Only a title\n\n" + cell("x = 1"))
    with pytest.raises(TangleError, match="question"):
        read_book(tmp_path)


def test_what_is_not_a_new_name_may_stand_in_two_chapters(book):
    first = cell("import math\n\n\ndef f(x):\n    y = [z for z in x]\n    return y")
    second = cell("import math\n\nfrom sigma_book.a import f") + cell("def g(x):\n    y = f(x)\n    math.tau = y")
    chapters = read_book(book(c01_a=first, c02_b=second))
    assert '__all__ = ["f"]' in tangle(chapters[0]) and '__all__ = ["g"]' in tangle(chapters[1])


def test_where_ruff_does_not_run_the_chapter_is_named(book, monkeypatch, tmp_path):
    chapter = read_chapter(book(c01_a=cell("import math")) / "01_a.py")
    (tmp_path / "ruff.py").write_text("raise SystemExit('no ruff here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TangleError, match="01_a.py: ruff.*no ruff here"):
        tangle(chapter)


def test_the_command_checks_writes_and_names_what_differs(book, monkeypatch, capsys, tmp_path):
    """On a small book of its own."""
    package = tmp_path / "package"
    package.mkdir()
    folder = book(c01_a=cell("import math") + cell("x = math.pi"), c02_b=cell("from sigma_book.a import x"))
    chapters = read_book(folder)
    monkeypatch.setattr(command, "PACKAGE", package)
    monkeypatch.setattr(command, "read_book", lambda: chapters)
    assert command.main(["--check"]) == 1
    assert capsys.readouterr().err.count("differs from chapters/0") == 2
    assert not list(package.iterdir()), "a check writes nothing"
    assert command.main(["b"]) == 0
    assert [path.name for path in package.iterdir()] == ["b.py"]
    assert command.main([]) == 0 and command.main(["--check"]) == 0
    (package / "old.py").write_text((package / "a.py").read_text().replace("01_a", "01_old"))
    (package / "cli.py").write_text('"""By hand."""\nNAME = "Tangled from chapters/"\n')
    (package / "b.py").write_text("x = 2\n")
    capsys.readouterr()
    assert command.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "sigma_book/b.py differs from chapters/02_b.py",
        "sigma_book/old.py has no chapter",
    ]
    with pytest.raises(SystemExit) as left:
        command.main(["nosuch"])
    assert left.value.code == 1 and capsys.readouterr().err == "no chapter gives nosuch\n"
