"""Losses, ops and parts of models, called as frameworks call them by themselves: see `test_framework_calls.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from liger_kernel.transformers.model import loss_utils
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import liger_kernel.transformers as trf
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers import functional, monkey_patch
from tests.transformers.steps import assert_same_step
from tests.transformers.tiny import VOCAB, build

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")

HEAD: dict[str, Callable[..., Any]] = {
    "xtuner": lambda loss, x, w, y: loss()(w, x, y, None),
    "veomni": lambda loss, x, w, y: loss(reduction="mean")(w, x, y),
    "axolotl": lambda loss, x, w, y: loss(use_token_scaling=False)(w, x, y),
    "lmms_engine": lambda loss, x, w, y: loss(reduction="sum")(w, x, y) / (y != -100).sum(),
    "lmms_engine, each": lambda loss, x, w, y: loss(reduction="none")(w, x, y).sum() / (y != -100).sum(),
    "mini_trainer": lambda loss, x, w, y: functional.liger_fused_linear_cross_entropy(
        x, w, y, reduction="none", ignore_index=-100, softcap=None
    ).sum() / (y != -100).sum(),
    "hf causal": lambda loss, x, w, y: loss_utils.LigerForCausalLMLoss(
        hidden_states=x, lm_head_weight=w, labels=None, hidden_size=8, shift_labels=y, num_items_in_batch=None
    ),
}  # fmt: skip


@pytest.mark.parametrize("framework", HEAD)
def test_losses_of_the_head(framework: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 8, generator=g), torch.randn(VOCAB, 8, generator=g)
    y = torch.tensor([1, -100, 5, 130, 0, -100])

    def run(of: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        loss = of(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    def stock(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.T, y)

    ours = run(
        lambda x, w: HEAD[framework](trf.LigerFusedLinearCrossEntropyLoss, x, w, y), torch.float32
    )
    for values in zip(ours, run(stock, torch.float64), run(stock, torch.float32), strict=True):
        assert_no_worse(framework, *values)


def test_veomni_ops() -> None:
    """It runs forward and backward of an op by itself, between what shards a sequence."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    from liger_kernel.ops.rms_norm import LigerRMSNormFunction, rms_norm_backward, rms_norm_forward
    from liger_kernel.ops.rope import rope_backward, rope_forward

    g = torch.Generator().manual_seed(0)
    x, w, dy = (
        torch.randn(5, 16, generator=g),
        torch.randn(16, generator=g),
        torch.randn(5, 16, generator=g),
    )
    for offset, mode in ((0.0, "llama"), (1.0, "gemma")):
        y, kept, rstd, block, warps, casting = rms_norm_forward(x, w, 1e-6, offset, mode, None)
        got = rms_norm_backward(dy, kept, w, rstd, offset, casting, block, warps, False, None)
        stock = []
        for dtype in (torch.float64, torch.float32):
            a, b = (t.to(dtype).requires_grad_() for t in (x, w))
            out = F.rms_norm(a, (16,), b + offset, 1e-6)
            stock.append([out, *torch.autograd.grad(out, (a, b), dy.to(dtype))])
        applied = LigerRMSNormFunction.apply(x, w, 1e-6, offset, mode, False, None)
        for values in zip([y, *got], *stock, strict=True):
            assert_no_worse(mode, *values)
        assert torch.equal(applied, y)
    assert LigerRMSNormFunction.apply(x, None, 1e-6, 0.0, "llama", False, None).shape == x.shape
    low, high = (F.silu(t) * t.flip(0) for t in (x, x.double()))
    assert_no_worse("silu", LigerSiLUMulFunction.apply(x, x.flip(0)), high, low)
    q, dq = torch.randn(2, 1, 3, 7, 16, generator=g)
    angles = torch.randn(1, 7, 8, generator=g).repeat(1, 1, 2)
    nothing = q.new_full(
        (1, 1, 7, 16), torch.nan
    )  # it has queries only, and passes memory that nobody wrote
    turned, _, cos, sin = rope_forward(q, nothing, angles.cos(), angles.sin())
    back, _ = rope_backward(dq.clone(), nothing, cos, sin)
    for name, found, t, sign in (("rope", turned, q, 1), ("rope, back", back, dq, -1)):
        angle = angles.cos(), sign * angles.sin()
        high, low = (rotated(t.to(d), *(a.to(d) for a in angle)) for d in (torch.float64, t.dtype))
        assert_no_worse(name, found, high, low)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]


def test_lmms_engine_patches_modules() -> None:
    model = build("llama")
    layer = model.model.layers[0]
    norm = nn.LayerNorm(48)
    expected = norm(x := torch.randn(2, 48))
    monkey_patch._patch_rms_norm_module(model.model.norm)
    monkey_patch._patch_rms_norm_module(
        layer.input_layernorm, offset=0.0, casting_mode="llama", in_place=False
    )
    monkey_patch._patch_swiglu_module(layer.mlp, trf.LigerSwiGLUMLP)
    monkey_patch._patch_layer_norm_module(norm)
    assert "LigerRMSNorm" in repr(model.model.norm)
    exact = F.layer_norm(x.double(), (48,), norm.weight.double(), norm.bias.double())
    assert_no_worse("layer norm", norm(x), exact, expected)
    assert_same_step("llama", torch.float32, model)


@pytest.mark.parametrize("saved", [False, True])
def test_agilerl_asks_the_head_for_the_loss(saved: bool) -> None:
    from liger_kernel.transformers.model.llama import lce_maybe_trainable_lm_head

    model = build("llama")
    x, y = torch.randn(2, 5, 48), torch.ones(2, 5).long()
    weight = model.lm_head.weight
    if saved:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
        model = peft.get_peft_model(model, config).get_base_model()
        weight = model.lm_head.modules_to_save["default"].weight
        weight.data *= 2
    ask = {"hidden_states": x, "hidden_size": 48, "labels": y, "shift_labels": None}
    result = lce_maybe_trainable_lm_head(
        model, **ask, num_items_in_batch=7, return_token_accuracy=True, use_cache=0
    )
    loss, _, accuracy, _ = loss_utils.unpack_cross_entropy_result(result)
    shifted = {"target": y[:, 1:].flatten(), "reduction": "sum"}
    logits = ((x.to(d) @ weight.to(d).T)[:, :-1].flatten(0, 1) for d in (torch.float64, x.dtype))
    high, low = (F.cross_entropy(of, **shifted) / 7 for of in logits)
    assert_no_worse("loss", loss, high, low)
    assert accuracy.ndim == 0
    assert torch.autograd.grad(loss, weight)[0].any()


def test_a_head_with_an_adapter_is_refused() -> None:
    from liger_kernel.transformers.model.llama import lce_maybe_trainable_lm_head

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    model = peft.get_peft_model(build("llama"), config).get_base_model()
    with pytest.raises(ValueError, match="adapter"):
        lce_maybe_trainable_lm_head(model, torch.zeros(1, 2, 48), 48, torch.ones(1, 2).long(), None)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_head_that_is_a_unit_of_fsdp() -> None:
    """Axolotl redirects a call into the unit itself; AgileRL leaves it to us."""
    from liger_kernel.transformers.fsdp import _FSDPForwardRedirection
    from liger_kernel.transformers.model.llama import lce_maybe_trainable_lm_head

    model = build("llama")
    x, y = torch.randn(2, 5, 48), torch.ones(2, 5).long()
    ask = {"hidden_states": x, "hidden_size": 48, "labels": y, "shift_labels": None}
    expected = lce_maybe_trainable_lm_head(model, **ask)
    unit = model.lm_head = FullyShardedDataParallel(model.lm_head, device_id=torch.device("cpu"))
    wholes = []

    def loss_of(head: Any, hidden: Tensor, *, scale: int) -> Tensor:
        wholes.append(tuple(head.weight.shape))
        more = {"lm_head_weight": head.weight, "labels": y, "hidden_size": 48}
        return scale * loss_utils.LigerForCausalLMLoss(hidden_states=hidden, **more)

    assert torch.equal(
        _FSDPForwardRedirection()(unit, loss_of, unit.module, x, scale=2), 2 * expected
    )
    assert wholes == [(VOCAB, 48)]
    assert torch.equal(lce_maybe_trainable_lm_head(model, **ask), expected)
    assert "forward" not in vars(unit.module)
