"""What the tests of patched models share."""

from __future__ import annotations

import collections
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from liger_kernel import backends


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """How often each op's implementation ran."""
    counts: collections.Counter[str] = collections.Counter()
    original = backends._kernels

    def counting(op: str, *args: Any) -> Any:
        counts[op] += 1
        return original(op, *args)

    monkeypatch.setattr(backends, "_kernels", counting)
    return counts


@pytest.fixture(autouse=True)
def nothing_is_left_patched() -> None:
    """A model that a test left behind holds HF's globals until it is collected: let it not be within the next one."""
    from liger_kernel.transformers.patching.classes import GlobalPatch

    if GlobalPatch._holds:
        gc.collect()
        GlobalPatch.settle()


@pytest.fixture(scope="session")
def one_graph() -> None:
    """For tests of models in one graph: skips them where Dynamo cannot make one of HF's own code."""
    from tests.transformers.here import stock_compiles

    stock_compiles(fullgraph=True)
