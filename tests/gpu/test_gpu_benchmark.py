"""What the benchmark does with the memory of the GPU."""

from __future__ import annotations

import torch

from benchmark import measure


def test_graphs_hand_their_memory_back() -> None:
    """Each stream with a matrix product has a cuBLAS workspace, cut out of whatever segment is free just then."""
    a = torch.randn(4096, 4096, device="cuda")
    measure.release()
    before = torch.cuda.memory_reserved()
    for _ in range(4):
        timing = measure.gpu_only(lambda: [lambda: (a @ a).sum()], 1.0, measure.peak_mb(a.square))
        assert timing.ms > 0
    measure.release()
    assert torch.cuda.memory_reserved() <= before
