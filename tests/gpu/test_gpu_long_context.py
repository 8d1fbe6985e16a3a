"""Checkpoints in pinned host memory, with the streams of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import liger_kernel
from liger_kernel.cli import models
from liger_kernel.transformers.patching.sites import checkpoints
from tests.transformers.tiny import build


def model(reentrant: bool, attention: str = "eager", **options: bool) -> Any:
    made: Any = build(
        "llama",
        torch.bfloat16,
        hidden_size=1024,
        num_hidden_layers=6,
        attn_implementation=attention,
    ).cuda()
    liger_kernel.patch(made, **options)
    made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return made.train()


def tokens(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(3, 131, (8, 1024), generator=generator, device="cuda")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("ahead", [0, 2**30])
def test_checkpoints_on_the_host(
    reentrant: bool, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, bit for bit, over steps that accumulate, with memory that is used again at once."""
    monkeypatch.setattr(checkpoints, "_AHEAD", ahead)
    stock, ours = model(reentrant), model(reentrant, offload_checkpoints=True)
    for _ in range(2):
        for one in (stock, ours):
            one.zero_grad()
            a, b = (one(input_ids=t, labels=t).loss for t in map(tokens, (0, 1)))
            b.backward(retain_graph=True)
            (a + b).backward()
        for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name


def test_the_memory_of_checkpoints_is_free() -> None:
    def peak(**options: bool) -> int:
        one = model(False, **options)
        ids = tokens(0)
        with torch.no_grad():
            one(input_ids=ids, labels=ids)
        torch.cuda.reset_peak_memory_stats()
        loss = one(input_ids=ids, labels=ids).loss
        kept = torch.cuda.memory_allocated()
        loss.backward()
        return kept - sum(p.nbytes for p in one.parameters())

    each = 8 * 1024 * 1024 * 2
    assert peak() - peak(offload_checkpoints=True) >= 4 * each  # of six, the last one stays


def test_the_host_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step queues its work behind that of others; HF's search for packed sequences, and its mask of numbers, which
    wait, left out."""
    masking = pytest.importorskip("transformers.masking_utils")
    monkeypatch.setattr(masking, "find_packed_sequence_indices", lambda position_ids: None)
    ours, ids = model(False, "sdpa", offload_checkpoints=True), tokens(0)
    for _ in range(2):
        ours(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    with models.runnable():  # without HF's look at the numbers of positions
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(input_ids=ids).logits.float().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
