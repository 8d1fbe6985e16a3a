"""`LigerORPOTrainer` beside TRL's own: loss, metrics and gradients of a batch, without the logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.compat import trainer as home
from liger_kernel.testing import assert_no_worse
from tests.transformers.tiny import build

pytest.importorskip("trl")
try:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
except ImportError:
    from trl import ORPOConfig, ORPOTrainer

from tests.transformers.test_trl import data, tokenizer


def capped(dtype: torch.dtype) -> nn.Module:
    return build("gemma2", dtype, final_logit_softcapping=8.0)


def mixture(dtype: torch.dtype) -> nn.Module:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return build(
        "qwen3_moe", dtype, **more, experts_implementation="eager"
    )  # the others know no float64


@pytest.fixture
def step(tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """What a trainer of this class says of one batch, and the gradients."""

    def run(cls: Any, make: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        config = ORPOConfig(
            tmp_path, per_device_train_batch_size=4, beta=0.3, report_to=[], use_cpu=True, bf16=False,
            remove_unused_columns=False,
        )  # fmt: skip
        rows = data("prompt", "chosen", "rejected")
        torch.manual_seed(0)
        trainer = cls(
            model=make(dtype), args=config, train_dataset=rows, processing_class=tokenizer()
        )
        batch = next(iter(trainer.get_train_dataloader()))
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        loss.backward()
        # TRL's means of logits are over padding, too
        said = [value for name, value in metrics.items() if not name.startswith("logits")]
        found = {"said": torch.stack([loss.detach(), *torch.tensor(said, dtype=dtype)])}
        found |= {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.get_batch_loss_metrics(trainer.model, batch, "eval")[1]["eval_logits/chosen"]
        if cls is not ORPOTrainer:
            of_loss = trainer.concatenated_forward(trainer.model, batch)
            assert len(of_loss[1]) == 9
            assert torch.equal(of_loss[1][4], torch.tensor(metrics["nll_loss"]))
        liger_kernel.unpatch(trainer.model)
        return found

    return run


@pytest.mark.parametrize("make", [capped, mixture], ids=lambda f: f.__name__)
def test_as_trl(make: Any, step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers.trainer import LigerORPOTrainer

    assert issubclass(LigerORPOTrainer, ORPOTrainer)
    low = step(ORPOTrainer, make)
    high = step(ORPOTrainer, make, torch.float64)

    def compare(found: dict[str, Tensor]) -> None:
        assert found.keys() == low.keys()
        for name, value in found.items():
            assert_no_worse(name, value, high[name], low[name])

    by_logits = home._by_logits
    compare(step(LigerORPOTrainer, make))  # TRL's output, which an older release does not have
    if make is mixture:
        return
    monkeypatch.delattr(sys.modules["trl.trainer.utils"], "FusedCausalLMOutput", raising=False)
    monkeypatch.setattr(home, "_by_logits", None)  # not called
    compare(step(LigerORPOTrainer, make))
    monkeypatch.setattr(home, "_by_logits", by_logits)
    monkeypatch.setattr(home, "patch", lambda model, **options: None)
    compare(step(LigerORPOTrainer, make))  # a head that could not be patched


def test_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_trainer", home._orpo_trainer)
    for name in [n for n in sys.modules if n.partition(".")[0] == "trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="pip install trl"):
        home.LigerORPOTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        home.Other  # noqa: B018
