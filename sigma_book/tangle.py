"""Tangle: take the library out of the book.

A code cell of `chapters/NN_name.py` that begins `# | export` belongs to `sigma_book/name.py`; 15b stands behind 15.

    python -m sigma_book.tangle            write all modules
    python -m sigma_book.tangle rope gqa   write some
    python -m sigma_book.tangle --check    write nothing; exit 1 and name what differs
"""

import argparse
import ast
import re
import subprocess
import symtable
import sys
from dataclasses import dataclass
from pathlib import Path

import jupytext

PACKAGE = Path(__file__).parent
TANGLED = "Tangled from chapters/"


class TangleError(ValueError):
    """A chapter that cannot be tangled; the sentence names the chapter and the cell."""


@dataclass(frozen=True)
class Chapter:
    """One chapter: its path, its number such as (5, "") or (15, "b"), its module, and its exported cells, numbered."""

    path: Path
    number: tuple[int, str]
    module: str
    docstring: str
    cells: tuple[tuple[int, str], ...]


def read_chapter(path: Path) -> Chapter:
    """Read a py:percent notebook; cells are counted from 1, as they stand in the file."""
    named = re.fullmatch(r"(\d+)([b-z]?)_([a-z][a-z0-9_]*)\.py", path.name)
    if named is None:
        raise TangleError(f"{path.name}: a chapter's name is a number, an underscore and a module, such as 05_rope.py")
    notebook = jupytext.read(path, fmt="py:percent")
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    opening = re.search(r"^# ([^\n]+)$.*?^\*(.+?)\*$", prose, re.MULTILINE | re.DOTALL)
    if opening is None:
        raise TangleError(f"{path.name}, cell 1: a chapter opens with a title and one question in italics")
    title, question = opening[1] + "." * (opening[1][-1] not in "?!"), " ".join(opening[2].split())
    edit = f"{TANGLED}{path.name}: edit there, then run python -m sigma_book.tangle."
    docstring = f'"""{title}\n\n{question}\n\n{edit}\n"""'
    cells = []
    for number, cell in enumerate(notebook.cells, start=1):
        first, _, rest = cell.source.partition("\n")
        if cell.cell_type == "code" and re.fullmatch(r"\s*#\s*\|\s*export\s*", first):
            try:
                ast.parse(rest)
            except SyntaxError as error:
                raise TangleError(f"{path.name}, cell {number}: exported but does not parse ({error})") from error
            cells.append((number, rest.strip("\n")))
    return Chapter(path, (int(named[1]), named[2]), named[3], docstring, tuple(cells))


def read_book(folder: Path = PACKAGE.parent / "chapters") -> list[Chapter]:
    """All chapters in order, checked against each other.

    Raises
    ------
    TangleError
        If two chapters share a name or a number, a name is exported twice, or a cell imports what comes later.
    """
    chapters = sorted((read_chapter(path) for path in folder.glob("*.py")), key=lambda chapter: chapter.number)
    taken: dict[str, str] = {}

    def take(what: str, where: str) -> None:
        if what in taken:
            raise TangleError(f"{where}: {what} is taken by {taken[what]}")
        taken[what] = where

    for chapter in chapters:
        take("the number {}{}".format(*chapter.number), chapter.path.name)
        for number, source in chapter.cells:
            where = f"{chapter.path.name}, cell {number}"
            for name in _defined(source):
                take(f"the name {name}", where)
            for module in _imported(source):
                if f"the module {module}" not in taken:
                    raise TangleError(f"{where}: imports {module}, which no earlier chapter gives")
        take(f"the module sigma_book.{chapter.module}", chapter.path.name)
    return chapters


def _defined(source: str) -> list[str]:
    """Public and private names that a cell binds at its top level, imports left out."""
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return sorted(symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_imported())


def _imported(source: str) -> list[str]:
    """Modules of this package that a cell imports, anywhere in it; `sigma_book` alone is the package itself."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            home = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names += [home + alias.name for alias in node.names]
    return [".".join(name.split(".")[:2]) for name in names if name.split(".")[0] == "sigma_book"]


def tangle(chapter: Chapter) -> str:
    """The text of the module that a chapter gives, formatted."""
    names = [name for _, source in chapter.cells for name in _defined(source) if not name.startswith("_")]
    first, *others = (source for _, source in chapter.cells)  # the first exported cell holds the imports
    text = "\n\n".join([chapter.docstring, first, f"__all__ = {sorted(names)!r}", *others]) + "\n"
    for command in (["check", "--fix-only", "--quiet", "--select", "I,RUF022"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", "line-length = 120", "--stdin-filename"]
        done = subprocess.run([*ruff, f"{chapter.module}.py", "-"], input=text, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise TangleError(f"{chapter.path.name}: ruff, of the extra `dev`, did not run: {done.stderr.strip()}")
        text = done.stdout
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sigma_book.tangle", description="Write the package from the book.")
    parser.add_argument("modules", nargs="*", help="modules to write; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name what differs")
    options = parser.parse_args(arguments)
    try:
        book = {chapter.module: chapter for chapter in read_book() if chapter.cells}
        if unknown := set(options.modules) - set(book):
            raise TangleError(f"no chapter gives {', '.join(sorted(unknown))}")
        texts = {module: tangle(book[module]) for module in options.modules or book}
    except TangleError as error:
        parser.exit(1, f"{error}\n")
    found = {path.stem: path.read_text("utf-8") for path in PACKAGE.glob("*.py")}
    stale = [module for module, text in texts.items() if found.get(module) != text]
    report = [f"sigma_book/{module}.py differs from chapters/{book[module].path.name}" for module in stale]
    if options.check:
        orphans = [name for name, text in found.items() if name not in book and TANGLED in text.split('"""\n')[0]]
        report += [f"sigma_book/{name}.py has no chapter" for name in sorted(orphans)]
    else:
        for module in stale:
            (PACKAGE / f"{module}.py").write_text(texts[module], "utf-8")
    print("\n".join(report) or "nothing to do", file=sys.stderr)
    return 1 if options.check and report else 0


if __name__ == "__main__":
    sys.exit(main())
