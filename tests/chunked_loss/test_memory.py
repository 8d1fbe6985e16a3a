"""No loss ever makes a tensor of the size of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_kernel import chunked_loss
from liger_kernel.chunked_loss import functional

B, T, H, V = 8, 256, 8, 300
PAIRED = ("CPO", "DPO", "ORPO", "SimPO")


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


def loss_of(name: str, x: Any, w: Any) -> Any:
    target = torch.zeros(B, T, dtype=torch.long)
    make = getattr(chunked_loss, f"LigerFusedLinear{name}Loss")
    if name in PAIRED:
        ref = {"ref_input": x.detach(), "ref_weight": w.detach()} if name == "DPO" else {}
        return make()(w, x, target, **ref)[0]
    if name == "KTO":
        return make()(x, w, target, preference_labels=torch.ones(B, dtype=torch.bool))[0]
    if name == "GRPO":
        more = {"ref_input": x.detach(), "ref_weight": w.detach()}
        return make()(x, w, target, torch.ones(B, T), torch.ones(B), **more)[0]
    return make(chunk_size=256)(x, w, x.detach(), w.detach(), target)


@pytest.mark.parametrize("name", [*PAIRED, "KTO", "GRPO", "JSD", "CosineSimilarity"])
def test_no_tensor_of_all_logits(name: str) -> None:
    x = torch.randn(B, T, H, requires_grad=True)
    w = torch.randn(V, H, requires_grad=True)
    with Largest() as largest:
        loss_of(name, x, w).backward()
    assert 256 * V <= largest.elements < B * T * V // 2


def test_the_recorder_sees_all_logits() -> None:
    with Largest() as largest:
        torch.randn(B, T, H) @ torch.randn(H, V)
    assert largest.elements == B * T * V


def test_functions_by_their_names() -> None:
    names = ("orpo", "dpo", "jsd", "cosine", "cpo", "simpo", "kto", "grpo")
    assert all(callable(getattr(functional, f"liger_fused_linear_{name}")) for name in names)
