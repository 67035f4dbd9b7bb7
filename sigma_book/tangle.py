"""Tangle: take the library out of the book.

A code cell of `chapters/NN_name.py` whose first line is `# | export` belongs to `sigma_book/name.py`.

    python -m sigma_book.tangle            write all modules
    python -m sigma_book.tangle rope gqa   write some
    python -m sigma_book.tangle --check    write nothing; exit 1 and name what differs
"""

import argparse
import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jupytext

PACKAGE = Path(__file__).parent
CHAPTERS = PACKAGE.parent / "chapters"
EXPORT = re.compile(r"#\s*\|\s*export\s*$")
HAND_WRITTEN = ("assemble", "cli", "tangle", "style")


class TangleError(ValueError):
    """A chapter that cannot be tangled; the sentence names the chapter and the cell."""


@dataclass(frozen=True)
class Chapter:
    """One chapter: its path, its number, the module it gives, and its exported cells as (cell number, source)."""

    path: Path
    number: int
    module: str
    docstring: str
    cells: tuple[tuple[int, str], ...]


def read_chapter(path: Path) -> Chapter:
    """Read a py:percent notebook; cells are counted from 1, as they stand in the file."""
    named = re.fullmatch(r"(\d+)_([a-z][a-z0-9_]*)\.py", path.name)
    if named is None:
        raise TangleError(f"{path.name}: a chapter's name is a number, an underscore and a module, such as 05_rope.py")
    notebook = jupytext.read(path, fmt="py:percent")
    cells, prose = [], []
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown":
            prose.append(cell.source)
            continue
        first, _, rest = cell.source.partition("\n")
        if EXPORT.match(first.strip()):
            try:
                ast.parse(rest)
            except SyntaxError as error:
                raise TangleError(f"{path.name}, cell {number}: exported but does not parse ({error})") from error
            cells.append((number, rest.strip("\n")))
    title = re.search(r"^# (.+)$", "\n".join(prose), re.MULTILINE)
    question = re.search(r"^\*(.+?)\*$", "\n".join(prose), re.MULTILINE | re.DOTALL)
    if title is None or question is None:
        raise TangleError(f"{path.name}, cell 1: a chapter opens with a title and one question in italics")
    asked = " ".join(question[1].split())
    docstring = f'"""{title[1]}.\n\n{asked}\n\nTangled from chapters/{path.name}: edit there, then run python -m sigma_book.tangle.\n"""'
    return Chapter(path, int(named[1]), named[2], docstring, tuple(cells))


def read_book(folder: Path = CHAPTERS) -> list[Chapter]:
    """All chapters in order, checked against each other.

    Raises
    ------
    TangleError
        If two chapters share a name, a name is exported twice, or a cell imports what comes later.
    """
    chapters = sorted((read_chapter(path) for path in folder.glob("*.py")), key=lambda chapter: chapter.number)
    modules: dict[str, str] = {}
    names: dict[str, str] = {}
    for chapter in chapters:
        if chapter.module in modules:
            raise TangleError(f"{chapter.path.name}: {modules[chapter.module]} has the module {chapter.module} already")
        for number, source in chapter.cells:
            where = f"{chapter.path.name}, cell {number}"
            for name in _defined(source):
                if name in names:
                    raise TangleError(f"{where}: exports {name}, which {names[name]} exported before")
                names[name] = where
            for module in _imported(source):
                if module not in modules:
                    raise TangleError(
                        f"{where}: imports sigma_book.{module or '__init__'}, which no earlier chapter gives"
                    )
        modules[chapter.module] = chapter.path.name
    return chapters


def _defined(source: str) -> list[str]:
    """Public and private names that a cell binds at its top level, imports left out."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
    return found


def _imported(source: str) -> list[str]:
    """Modules of this package that a cell imports, anywhere in it; '' stands for the package itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sigma_book":
            found += [node.module.partition(".")[2]] if "." in node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "sigma_book"]
    return found


def tangle(chapter: Chapter) -> str:
    """The text of the module that a chapter gives, formatted."""
    names = sorted(name for _, source in chapter.cells for name in _defined(source) if not name.startswith("_"))
    first, *others = (source for _, source in chapter.cells)  # the first exported cell holds the imports
    text = "\n\n".join([chapter.docstring, first, f"__all__ = {names!r}", *others]) + "\n"
    for command in (["check", "--fix-only", "--quiet", "--select", "I,RUF022"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", "line-length = 120", "--stdin-filename"]
        done = subprocess.run(
            [*ruff, f"{chapter.module}.py", "-"], input=text, capture_output=True, text=True, check=True
        )
        text = done.stdout
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sigma_book.tangle", description="Write the package from the book.")
    parser.add_argument("modules", nargs="*", help="modules to write; all by default")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a module differs from its chapter"
    )
    options = parser.parse_args(arguments)
    try:
        book = [chapter for chapter in read_book() if chapter.cells]
    except TangleError as error:
        print(error, file=sys.stderr)
        return 1
    known = {chapter.module for chapter in book}
    if unknown := set(options.modules) - known:
        print(f"no chapter gives {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    stale = []
    for chapter in book:
        path = PACKAGE / f"{chapter.module}.py"
        if options.modules and chapter.module not in options.modules:
            continue
        text = tangle(chapter)
        if not path.exists() or path.read_text() != text:
            stale.append(f"sigma_book/{path.name} differs from chapters/{chapter.path.name}")
            if not options.check:
                path.write_text(text)
    if options.check:
        orphans = {path.stem for path in PACKAGE.glob("*.py") if "Tangled from" in path.read_text()[:2000]} - known
        stale += [f"sigma_book/{name}.py has no chapter" for name in sorted(orphans - set(HAND_WRITTEN))]
        print("\n".join(stale), end="\n" if stale else "", file=sys.stderr)
        return 1 if stale else 0
    print("\n".join(stale) if stale else "nothing to do", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
