"""Rules that hold for the text of every kernel."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import liger_kernel

ROOT = Path(liger_kernel.__file__).parent
KERNELS = [p for p in sorted(ROOT.rglob("*.py")) if "triton.jit" in p.read_text(encoding="utf-8")]


def joined_with_a_program_id(text: str) -> list[int]:
    """Lines of `a & b` and `a | b` with a `program_id` in it: triton 3.9 refuses a scalar beside a vector there."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr)
        if any(isinstance(n, ast.Attribute) and n.attr == "program_id" for n in ast.walk(node))
    ]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_masks_are_bounds_where_they_depend_on_the_program(path: Path) -> None:
    assert joined_with_a_program_id(path.read_text(encoding="utf-8")) == []


def test_the_rule_bites() -> None:
    assert joined_with_a_program_id("m = x\nm = (c < n) & (tl.program_id(1) == 0)") == [2]
    assert joined_with_a_program_id("m = c < tl.where(tl.program_id(1) == 0, n, 0)") == []
