"""These losses are made of PyTorch over one op, whose kernels have their own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from liger_kernel.backends import use_implementation


@pytest.fixture(autouse=True)
def reference_ops() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # tiny tensors: threads that wait for a busy core made this 20 times slower
    with use_implementation("reference"):
        yield
    torch.set_num_threads(threads)
