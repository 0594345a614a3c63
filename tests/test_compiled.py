"""What is compiled gives the same bits in the process that compiled it and in one that reads it from the cache."""

from __future__ import annotations

import ast
from pathlib import Path

import batchproc

PACKAGE = Path(batchproc.__file__).parent


def test_fast_math_is_inlined_where_compiled_code_calls_it():
    """Every function with fast-math that other compiled functions call has ``forceinline=True``.

    Otherwise LLVM keeps two copies of it, one of its own and one in the caller, each optimised by itself, with sums in
    another order. Which of them is called depends on what the process has compiled or loaded before: a run that
    compiled gave other last bits than one that found everything in Numba's cache.
    """
    fast, called = {}, set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            options = _options(function)
            if options is None:
                continue
            if "fastmath" in options:
                fast[function.name] = "forceinline" in options, path.name
            calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            called |= {call.id for call in calls if isinstance(call, ast.Name)}
    assert len(fast.keys() & called) > 10, "nothing is looked at"
    assert [f"{file}: {name}" for name, (inlined, file) in fast.items() if name in called and not inlined] == []


def _options(node):
    """Keywords of a function's ``@njit(...)``; None where it is not compiled."""
    for decorator in getattr(node, "decorator_list", ()):
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("njit"):
            return {keyword.arg for keyword in decorator.keywords}
    return None
