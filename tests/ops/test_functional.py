"""`liger_kernel.functional` is the door to every native op, listed there or not."""

from __future__ import annotations

import importlib

import pytest

from liger_kernel import functional
from liger_kernel.ops import OPS


@pytest.mark.parametrize("op", sorted({*OPS} - {"scale_gradients"}))  # not differentiable
def test_every_op_is_there(op: str) -> None:
    """The function with the name of the folder, and its forms: `glu` and `glu_packed`."""
    module = importlib.import_module(f"liger_kernel.ops.{op}")
    own = {n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    forms = {name for name in own if name == op or name.startswith(f"{op}_")}
    assert op in forms
    assert forms <= {*functional.__all__, op}
    assert all(getattr(functional, name) is getattr(module, name) for name in forms)


def test_a_new_op_needs_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checker of types sees is listed; what was forgotten is found by its place."""
    softmax = functional.softmax
    monkeypatch.delattr(functional, "softmax")
    assert functional.softmax is softmax
    with pytest.raises(AttributeError, match="softmin"):
        functional.softmin  # noqa: B018


def test_every_name_is_documented() -> None:
    for name in functional.__all__:
        assert getattr(functional, name).__doc__
