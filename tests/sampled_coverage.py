"""pytest plugin: coverage of every sixteenth test, where each case of a test counts as one.

Before Python 3.12 Python calls coverage at every line that it runs, those of Triton's interpreter among them, and the
suite needs half as much time again; less than a tenth with every sixteenth test. A sample shows fewer lines than all
tests would: `make coverage` gives the exact number. From 3.12 on a line that was seen costs nothing any more, and every
case counts.

    pytest --cov -p tests.sampled_coverage tests
"""

from __future__ import annotations

import sys
import zlib

import pytest

EVERY = 16


def is_sampled(node_id: str) -> bool:
    """The same cases in every run and on every worker."""
    return sys.version_info >= (3, 12) or zlib.crc32(node_id.encode()) % EVERY == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not is_sampled(item.nodeid):
            item.add_marker("no_cover")
