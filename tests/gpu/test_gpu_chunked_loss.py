"""The losses on log-probabilities where labels cannot be counted: every chunk holds whole sequences, or pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from liger_kernel.backends.records import ChunkSizes
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
)
from liger_kernel.loss_head import plan
from tests.chunked_loss.full_logits import (
    compare,
    draw_sequences,
    logits_of,
    paired,
    pick,
    sequences,
)
from tests.chunked_loss.test_grpo import draw_policy, full
from tests.chunked_loss.test_preference import REF, dpo, run_paired

SIZES = 48, 16, 1031
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def on_gpu(draw: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {name: t.cuda() for name, t in draw(seed).items()}


@pytest.fixture(params=[64, 4096], ids=["chunks", "one-chunk"], autouse=True)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    most = int(request.param)
    sizes = ChunkSizes(most_rows=most, fewest_rows=most, fewest_rows_narrow_sum=most, multiple=1)
    monkeypatch.setattr(plan, "chunk_sizes", lambda device: sizes)
    return most


@dtypes
def test_dpo(dtype: torch.dtype) -> None:
    module = LigerFusedLinearDPOLoss(
        beta=0.2, alpha=0.7, label_smoothing=0.1, compute_nll_loss=True
    )
    compare(
        run_paired(module, *REF),
        lambda i: paired(dpo("sigmoid", 0.2, 0.1, 0.5), i, False, 0.7, True),
        on_gpu(draw_sequences(dtype, batch=6, sizes=SIZES)),
    )


@dtypes
def test_kto(dtype: torch.dtype) -> None:
    desirable = torch.tensor([True, False, True, False]).cuda()
    module = LigerFusedLinearKTOLoss(beta=0.2, average_log_prob=True)

    def ours(i: Any) -> Any:
        args = i["hidden"], i["weight"], i["target"], i["bias"], desirable
        return (module(*args)[0],)

    def reference(i: Any) -> Any:
        tokens = pick(logits_of(i["hidden"], i["weight"], i["bias"]), i["target"])
        margin = 0.2 * sequences(tokens, i["target"], True)
        return (torch.where(desirable, -margin, margin).sigmoid().mean(),)

    compare(ours, reference, on_gpu(draw_sequences(dtype, batch=4, sizes=SIZES)))


@dtypes
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo(level: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"importance_sampling_level": level, "beta": 0.1}
    module = LigerFusedLinearGRPOLoss(**options)

    def ours(i: Any) -> Any:
        names = ("hidden", "weight", "target", "mask", "advantages", "bias")
        loss, metrics = module(
            *(i[name] for name in names),
            old_per_token_logps=i["old"],
            ref_input=i["ref_hidden"],
            ref_weight=i["ref_weight"],
            ref_bias=i["ref_bias"],
        )
        return loss, *metrics

    compare(ours, lambda i: full(i, options, 1.0), on_gpu(draw_policy(dtype, sizes=SIZES)))
