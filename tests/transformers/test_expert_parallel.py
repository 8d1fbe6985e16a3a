"""Experts that transformers spreads over ranks (`enable_expert_parallel`): losses and gradients of one process.

Two processes on the CPU; on two GPUs where there are two.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import liger_kernel
from liger_kernel.ops import fused_moe as op
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers.patching.sites.experts import register_experts
from tests.transformers import ranks
from tests.transformers.steps import assert_all_no_worse
from tests.transformers.tiny import batch, mixture

pytest.importorskip("transformers.distributed.tensor_parallel")

CASES = (("mixtral", "registered"), ("mixtral", "patched before"), ("gpt_oss", "patched after"))


def load(folder: Path, how: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from liger_kernel.transformers import AutoLigerKernelForCausalLM

    first = how == "patched before"
    auto: Any = AutoLigerKernelForCausalLM if first else AutoModelForCausalLM
    parallel = DistributedConfig(tp_size=ranks.WORLD, tp_plan="auto", enable_expert_parallel=True)
    options = {"distributed_config": parallel, "attn_implementation": "eager"}
    model = auto.from_pretrained(folder, **options)
    if how == "registered":
        register_experts()
        model.set_experts_implementation("liger_kernel")
    return model


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    where = next(model.parameters()).device
    loss = model(**{name: t.to(where) for name, t in batch().items()}).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return loss.detach().cpu(), {n: g.cpu() for n, g in whole.items()}


@cache
def of_one_process(name: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    return gradients(mixture(name, dtype, "eager"))


def experts_rows(model: Any) -> list[Any]:
    return [row for row in liger_kernel.patch(model).rows if row.kind == "experts"]


def trained(rank: int, name: str, how: str, folder: Path) -> None:
    model = load(folder / name, how)
    if how != "registered":
        assert [row.by is not None for row in experts_rows(model)] == [True, True]
    sizes: list[int] = []
    original = op.fused_moe

    def counting(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(weight.shape[0])
        return original(x, weight, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "fused_moe", counting)
        loss, grads = gradients(model)
    assert sizes[-2:] == [2, 2]  # of four experts, in both layers
    high, high_grads = of_one_process(name, torch.float64)
    low, low_grads = of_one_process(name, torch.float32)
    assert_no_worse("loss", loss, high, low)
    assert_all_no_worse(grads, high_grads, low_grads)
    if how == "patched after":
        theirs = vars(model.model.layers[0].mlp.experts)["forward"]
        liger_kernel.unpatch(model)
        assert vars(model.model.layers[0].mlp.experts)["forward"] is theirs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "fused_moe", counting)
            n_calls = len(sizes)
            assert_no_worse("loss", gradients(model)[0], high, low)
        assert len(sizes) == n_calls


def checks(folder: Path) -> dict[str, ranks.Check]:
    return {
        " ".join(case): partial(trained, name=case[0], how=case[1], folder=folder) for case in CASES
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    for name, _ in CASES[1:]:
        mixture(name).save_pretrained(folder / name)
    results = tmp_path_factory.mktemp("ranks")
    return ranks.outcomes(partial(checks, folder), results, ranks.device())


@pytest.mark.parametrize("name", map(" ".join, CASES))
def test_experts_of_transformers(name: str, found: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, found)
