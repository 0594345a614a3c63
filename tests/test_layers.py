"""The floor plan of docs/architecture.md holds: a module imports only from its own floor or one below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "batchproc"

#: First part of a module's name under ``batchproc`` → its floor.
FLOORS = {
    "errors": 0,
    "records": 0,
    "config": 0,
    "imaging": 1,
    "learning": 1,
    "io": 2,
    "flow": 3,
    "recipe": 3,
    "distribute": 4,
    "display": 5,
    "drawing": 5,
    "explore": 5,
    "report": 5,
    "finish": 5,
    "job": 5,
    "packets": 5,
    "label_tables": 5,
    "stamp_sources": 5,
    "submit": 5,
    "completeness": 5,
    "judging": 5,
    "demo": 5,
    "cli": 5,
}
#: Beside the house: may import anything, and nothing imports it but a verb of the command line that is called.
BESIDE = {"training"}
#: The shop window names every floor, and loads none of them before it is asked to.
WINDOW = {"__init__", "__main__"}


def part_of(module: str) -> str:
    """'io' of 'batchproc.io.stamps', '' of 'batchproc' itself."""
    return [*module.split("."), ""][1]


def imported_parts(tree: ast.Module) -> set[str]:
    """The parts of batchproc that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "batchproc"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import; write it in full"
            if (node.module or "").split(".")[0] == "batchproc":
                inner = part_of(node.module)
                found |= {inner} if inner else {alias.name for alias in node.names}
    return found - {"", "__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    """No module imports from a floor above its own, and none the training code, but the command line in a function."""
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here in WINDOW | BESIDE:
        return
    assert here in FLOORS, f"batchproc/{here} has no floor: give it one here and in docs/architecture.md"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    above = {part for part in imported_parts(tree) if part in BESIDE or FLOORS.get(part, 99) > FLOORS[here]}
    if here == "cli":
        tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) or _for_types(node))]
        above -= BESIDE - imported_parts(tree)
    assert not above


def _for_types(node: ast.stmt) -> bool:
    """Whether it is ``if TYPE_CHECKING:``, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
