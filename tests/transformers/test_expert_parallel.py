"""Experts that are spread over ranks, by transformers (`enable_expert_parallel`) and by `LigerExpertParallelFusedMoe`:
losses and gradients of one process.

Two processes on the CPU; on two GPUs where there are two.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import liger_kernel
from liger_kernel.distributed.expert_parallel import expert_parallel_moe
from liger_kernel.ops import fused_moe as op
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers.modules.moe import LigerExpertParallelFusedMoe
from liger_kernel.transformers.patching.sites.experts import register_experts
from tests.transformers import ranks
from tests.transformers.steps import BATCHES, assert_all_no_worse
from tests.transformers.tiny import batch, mixture

CASES = (("mixtral", "registered"), ("mixtral", "patched before"), ("gpt_oss", "patched after"))
#: transformers itself refuses the torch before
OLD_TORCH = Version(torch.__version__) < Version("2.7")
if OLD_TORCH or importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
    CASES = ()


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
    """Of several batches: what sums of four numbers lose to rounding in one is luck."""
    where = next(model.parameters()).device
    losses, found = [], defaultdict(list)
    for seed in range(BATCHES):
        model.zero_grad()
        loss = model(**{name: t.to(where) for name, t in batch(seed=seed).items()}).loss
        loss.backward()
        losses.append(loss.detach().cpu())
        for name, p in model.named_parameters():
            if p.grad is not None:
                whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                found[name].append(whole.cpu())
    return torch.stack(losses), {name: torch.stack(grads) for name, grads in found.items()}


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


TOKENS, EXPERTS, TOP_K, H, FEATURES = 10, 4, 2, 16, 8


def drawn(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, gate, up, down and weights of all tokens, their experts, and the gradient of the output."""
    make = Make(torch.bfloat16, ranks.device())
    x, dy = make.randn(TOKENS, H), make.randn(TOKENS, H)
    gate, up = (make.randn(EXPERTS, FEATURES, H, scale=H**-0.5) for _ in range(2))
    down = make.randn(EXPERTS, H, FEATURES, scale=FEATURES**-0.5)
    weights = make.randn(TOKENS, TOP_K)
    index = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))
    index = index.topk(TOP_K).indices.to(x.device)
    index[3, 1] = EXPERTS  # nobody
    leaves = [t.to(dtype).requires_grad_() for t in (x, gate, up, down, weights)]
    return leaves, index, dy.to(dtype)


def in_one(dtype: torch.dtype) -> list[Tensor]:
    (x, gate, up, down, weights), index, dy = drawn(dtype)
    out = op.fused_moe(x, torch.cat((gate, up), 1), down, index, weights)
    out.backward(dy)
    return [out.detach(), *(t.grad for t in (x, gate, up, down, weights))]  # type: ignore[misc]


def as_one_process(rank: int, dtype: torch.dtype, has_all: bool) -> None:
    (x, *matrices, weights), index, dy = drawn(dtype)
    tokens, own = (
        slice(rank * n // ranks.WORLD, (rank + 1) * n // ranks.WORLD) for n in (TOKENS, EXPERTS)
    )
    given = [t.detach()[tokens].view(1, -1, t.shape[1]).requires_grad_() for t in (x, weights)]
    held = [t if has_all else t.detach()[own].requires_grad_() for t in matrices]
    module = LigerExpertParallelFusedMoe()
    routed = index[tokens].int().view(1, -1, TOP_K), given[1]
    out = module(given[0], *routed, *held, EXPERTS)
    out.backward(dy[tokens].view_as(out))
    grads = [given[0].grad, *(t.grad for t in held), given[1].grad]
    parts = [tokens, tokens, *[own] * 3, tokens]
    for i, (found, part) in enumerate(zip([out.detach(), *grads], parts, strict=True)):
        assert found is not None
        if has_all and part is own:
            assert found.count_nonzero() == found[own].count_nonzero()
            found = found[own]
        high, low = (in_one(t)[i][part] for t in (torch.float64, dtype))
        assert_no_worse(f"{i}", found.reshape(high.shape), high, low)


def refuses(rank: int) -> None:
    (x, *matrices, weights), index, _ = drawn(torch.float32)
    with pytest.raises(ValueError, match="weights of 4 experts, of num_experts=6 on 2 ranks"):
        expert_parallel_moe(x, *matrices, index, weights, 6)
    if ranks.device() == "cpu":
        few = [t[: TOKENS - rank] for t in (x, index, weights)]
        with pytest.raises(ValueError, match=r"\[10, 9\] tokens"):
            expert_parallel_moe(few[0], *matrices, *few[1:], EXPERTS)


MODULE: dict[str, ranks.Check] = {
    "own": partial(as_one_process, dtype=torch.float32, has_all=False),
    "all": partial(as_one_process, dtype=torch.bfloat16, has_all=True),
    "refuses": refuses,
}


def checks(folder: Path) -> dict[str, ranks.Check]:
    of_models = {
        " ".join(case): partial(trained, name=case[0], how=case[1], folder=folder) for case in CASES
    }
    return MODULE | of_models


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    for name, _ in CASES[1:]:
        mixture(name).save_pretrained(folder / name)
    return ranks.outcomes(partial(checks, folder), tmp_path_factory, __name__)


@pytest.mark.parametrize("name", map(" ".join, CASES))
def test_experts_of_transformers(name: str, found: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, found)


@pytest.mark.parametrize("name", MODULE)
def test_experts_of_the_module(name: str, found: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, found)


def test_one_process() -> None:
    (x, *matrices, weights), index, _ = drawn(torch.float32)
    found: Any = LigerExpertParallelFusedMoe()(x, index, weights, *matrices, EXPERTS)
    assert torch.equal(found, in_one(torch.float32)[0])
