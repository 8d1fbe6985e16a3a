"""Everything in this folder needs a GPU; every test hands its memory back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from liger_kernel.backends import use_implementation


def pytest_configure(config: pytest.Config) -> None:
    # under `pytest -n 8 --dist loadgroup` the tests that fill the GPU's memory go one after the other
    config.addinivalue_line("markers", "xdist_group(name): run the tests of a group in one worker")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Our kernels also for inputs so small that PyTorch would be left to serve them."""
    with use_implementation("triton"):
        yield


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()
