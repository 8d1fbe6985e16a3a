"""Triton runs interpreted where there is no GPU; uninitialised memory is NaN in every test."""

from __future__ import annotations

import gc
import os
import warnings

import torch

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from collections.abc import Iterator

import pytest

from tests import interpreter

if "TRITON_INTERPRET" in os.environ:
    interpreter.quicken()


def pytest_collection_finish() -> None:
    """What thousands of collected tests hold lives to the end: no collection of garbage walks through it again, which
    took a fifth of the time of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """`torch.empty*` returns NaN (the largest value for integers), so that an element nobody writes is seen."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_the_kernels_device() -> Iterator[None]:
    """Tensors are made where the Triton kernels run on this machine."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture
def quiet_on_one_thread() -> Iterator[None]:
    """For models from the zoo: as many processes as cores run these tests, and HF warns about tiny configs."""
    import transformers

    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)
