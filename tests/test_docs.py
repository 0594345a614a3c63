"""What the documents say is what the code does, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "cluster").glob("*.md")),
]


def load_generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.mark.parametrize("name", generator.PAGES)
def test_generated_pages_are_current(name):
    """A page made from the code is what `make docs` would write now."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == generator.PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Every relative link and picture of a document is a file of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", path.read_text(encoding="utf-8"))
    local = [a or b for a, b in targets if not (a or b).startswith(("http", "#", "mailto:"))]
    assert [target for target in local if not (path.parent / target.split("#")[0]).exists()] == []


def test_decisions_are_numbered_without_gaps():
    """Decision records are NNN-title.md, counted from 001, and each names its need and its status."""
    files = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in files] == [f"{i + 1:03d}-" for i in range(len(files))]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "## Need" in text, path.name
        assert "## Decision" in text, path.name


def test_every_setting_is_explained():
    """Each configuration key has a line under it that says what it means."""
    assert "| |" not in generator.configuration().replace("|  |", "| |")


def test_every_flag_is_explained():
    """Each bit of the flags and masks has its meaning beside it."""
    for flags in (generator.records.Flag, generator.records.MaskBit):
        assert all(f"`{name}`" in generator.bits(flags) for name in flags.__members__)


def test_every_verb_has_help_and_an_example():
    """Each verb of the command line says what it does and shows a command to type."""
    sections = generator.command_line().split("\n## ")[1:]
    assert len(sections) >= 10
    for section in sections:
        head, *rest = section.split("\n\n")
        assert rest[0][0].isupper(), head
        assert "$ batchproc" in section, head


def test_the_sizes_of_the_page_on_scaling_are_reckoned():
    """Its tables are what the command says of the numbers that stand in it."""
    from tests.benchmarks import sizing

    made = sizing.tables(sizing.Measured(), sizing.Site())
    assert sizing.PAGE.read_text() == sizing.page_with(sizing.PAGE.read_text(), made)
