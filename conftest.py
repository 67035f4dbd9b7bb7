"""`pytest --nbmake` runs the chapters: each becomes a notebook in a temporary folder, and nbmake's own item runs it."""

import os
from contextlib import contextmanager
from pathlib import Path

# before torch is there: two workers with all threads each stand in their own way
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jupytext
import pytest

try:
    import fcntl
except ImportError:  # on Windows tests that measure time have company
    fcntl = None

CHECKOUT = Path(__file__).parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """A test marked `alone` measures time: it waits until the other workers are between two tests, and they wait for it."""
    if not hasattr(item.config, "workerinput") or fcntl is None:
        return (yield)
    of_all_workers = item.config._tmp_path_factory.getbasetemp().parent
    with _in_turn(of_all_workers, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _in_turn(folder: Path, alone: bool):
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # whoever waits for an empty room lets nobody in before
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


def pytest_collection_modifyitems(config, items):
    """Workers get the long files first, late chapters and then large test files, so that none waits for another at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=_length, reverse=True)


def _length(item) -> tuple[str, int]:
    """What stands for the time that its file takes."""
    return (item.chapter.name, 0) if hasattr(item, "chapter") else ("", item.path.stat().st_size)


def pytest_collect_file(file_path: Path, parent):
    in_book = file_path.suffix == ".py" and file_path.parent.name == "chapters" and file_path.stem[:1].isdigit()
    if in_book and parent.config.getoption("nbmake", default=False):
        return ChapterFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent):
    """A chapter named on the command line is not a module of tests besides."""
    if module_path.parent.name == "chapters":
        return NoTests.from_parent(parent, path=module_path)
    return None


class NoTests(pytest.Module):
    def collect(self):
        return []


class ChapterFile(pytest.File):
    """One chapter of the book, as one test."""

    def collect(self):
        from nbmake.pytest_items import NotebookFile  # only where nbmake is installed and asked for

        folder = Path(self.config._tmp_path_factory.mktemp(self.path.stem, numbered=True))
        path = folder / f"{self.path.stem}.ipynb"  # written when it is this chapter's turn
        item = chapter_item().from_parent(
            NotebookFile.from_parent(self, path=path, nodeid=self.nodeid), filename=str(path)
        )
        item.chapter = self.path
        yield item


def make_notebook(chapter: Path):
    notebook = jupytext.read(chapter, fmt="py:percent")
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    # the kernel need not look through everything once more before it ends: that takes two seconds
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    last.metadata["nbmake"] = {"post_cell_execute": ["import gc; gc.freeze()"]}
    return notebook


def chapter_item() -> type:
    from nbmake.pytest_items import NotebookFailedException, NotebookItem

    class ChapterItem(NotebookItem):
        """nbmake's item, with the chapter's name and the failing cell in the message."""

        def runtest(self) -> None:
            import sigma_book

            home, used = self.chapter.parent.parent, Path(sigma_book.__file__).parent.parent
            if (home / "sigma_book").is_dir() and used != home:
                raise pytest.UsageError(
                    f"the kernel would import sigma_book from {used}, not from {home}: run `pip install -e .` there"
                )
            self.notebook = make_notebook(self.chapter)
            jupytext.write(self.notebook, self.filename)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MPLBACKEND", "agg")  # figures are saved; nobody looks at those below cells
                super().runtest()

        def repr_failure(self, excinfo, style=None):
            error = excinfo.value
            if not isinstance(error, NotebookFailedException):
                return super().repr_failure(excinfo)
            failed = error.args[0].error
            number = failed.failing_cell_index
            source = self.notebook.cells[number].source
            return f"chapters/{self.chapter.name}, cell {number + 1}, failed:\n\n{source}\n\n{failed.trace}"

        def reportinfo(self):
            return self.chapter, 0, f"chapter {self.chapter.name}"

    return ChapterItem
