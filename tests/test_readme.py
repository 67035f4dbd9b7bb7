"""The README and the model card say what results.json says; the README's map leads to chapters that exist."""

import json
import re
from pathlib import Path

import sigma_book

PACKAGE = Path(sigma_book.__file__).parent
README = PACKAGE.parent / "README.md"


def test_the_tables_hold_the_measured_results():
    results = json.loads((PACKAGE / "pocket_model" / "results.json").read_text())
    for path in (README, PACKAGE / "pocket_model" / "README.md"):
        table = re.search(r"<!-- results -->(.*?)<!-- end -->", path.read_text(), re.DOTALL)[1]
        for score in results.values():
            assert f"| {score['asked']:,} | {score['right']:.1%} |" in table, path
        assert f"{results['detect']['mean_iou']:.3f}" in table


def test_every_chapter_is_on_the_map_and_every_link_leads_somewhere():
    text = README.read_text()
    for chapter in (README.parent / "chapters").glob("*.py"):
        assert f"(chapters/{chapter.name})" in text, chapter.name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target


def test_the_two_commands_are_the_ones_that_ci_runs():
    text = README.read_text()
    assert 'pip install . && sigma-book generate figures/scene.png "caption en"' in text
    assert 'pip install -e ".[dev]" && pytest --nbmake' in text
    ran = (README.parent / ".ci" / "run").read_text().replace(" --quiet", "")
    assert 'pip install -e ".[dev]" && pytest --nbmake' in ran
