"""Losses that other projects derive from our bases, as AgileRL does: a forward of its own, and the base's backward."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOLoss
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction, LigerFusedLinearDPOLoss
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
from liger_kernel.chunked_loss.fused_linear_unpaired_preference import (
    LigerFusedLinearUnpairedPreferenceBase,
)
from liger_kernel.chunked_loss.grpo_loss import (
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
)
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction, LigerFusedLinearKTOLoss
from liger_kernel.testing import assert_no_worse
from tests.chunked_loss.full_logits import (
    DTYPES,
    IGNORED,
    Inputs,
    compare,
    draw_sequences,
    logits_of,
    paired,
    pick,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class WithAlpha(LigerFusedLinearPreferenceBase):
    preference_loss_fn = staticmethod(LigerFusedLinearDPOFunction.preference_loss_fn)

    @classmethod
    def forward(
        cls, ctx: Any, _input: Any, weight: Any, target: Any, bias: Any, *args: Any, **more: Any
    ) -> Any:
        names = ("ref_input", "ref_weight", "ref_bias", "alpha", "loss_type")
        return LigerFusedLinearPreferenceBase.forward(
            cls=cls,
            ctx=ctx,
            _input=_input,
            weight=weight,
            target=target,
            bias=bias,
            beta=0.3,
            compute_nll_loss=True,
            compiled=True,
            use_ref_model=args[0] is not None,
            average_log_prob=False,
            chunk_size=1,
            **dict(zip(names, args, strict=True)),
        )

    @staticmethod
    def backward(ctx: Any, *grad_output: Any) -> Any:
        return *LigerFusedLinearPreferenceBase.backward(ctx, grad_output)[:4], *(None,) * 5


def with_alpha(i: Inputs) -> tuple[Tensor, ...]:
    refs = (i.get(f"ref_{name}") for name in ("hidden", "weight", "bias"))
    loss, metrics = WithAlpha.apply(
        i["hidden"], i["weight"], i["target"], i.get("bias"), *refs, 0.7, "hinge"
    )
    return loss, *metrics


with_alpha.__name__ = "ours"


@dtypes
@pytest.mark.parametrize("reference", [True, False])
def test_a_preference_loss(dtype: torch.dtype, reference: bool) -> None:
    def pair(c: Any, r: Any, ref_c: Any, ref_r: Any) -> Any:
        a, b = 0.3 * (c - ref_c), 0.3 * (r - ref_r)
        return (1 - a + b).clamp(min=0), a, b

    compare(
        with_alpha,
        lambda i: paired(pair, i, average=False, alpha=0.7, nll=True),
        draw_sequences(dtype, reference=reference),
    )


def test_what_it_shares_with_our_own() -> None:
    """Frozen tensors, 0-d metrics, a batch without pairs; a loss of nobody's."""
    i = draw_sequences(torch.float32)(0)
    given = i["weight"].requires_grad_(), i["hidden"], i["target"], i["bias"]
    refs = i["ref_hidden"], i["ref_weight"], i["ref_bias"]
    own = LigerFusedLinearDPOLoss(beta=0.3, loss_type="hinge", compute_nll_loss=True, alpha=0.7)
    expected, metrics = own(*given, *refs)
    found = with_alpha(i)
    assert torch.equal(found[0], expected)
    assert all(map(torch.equal, found[1:], metrics))
    assert torch.equal(
        *(torch.autograd.grad(loss, i["weight"])[0] for loss in (found[0], expected))
    )

    class Scalar(LigerFusedLinearPreferenceBase):
        @staticmethod
        def preference_loss_fn(c: Any, r: Any, full: Any, beta: float, share: float) -> Any:
            pairs = full.shape[0] // 2
            return (share * (r - c)).sum() / pairs, c.sum() / pairs, c

        @classmethod
        def forward(cls, ctx: Any, *args: Any) -> Any:
            more = {"compute_nll_loss": False, "share": 0.5, "average_log_prob": False}
            return LigerFusedLinearPreferenceBase.forward(cls, ctx, *args, **more)

    loss, (chosen, rejected, *_, mean, each) = Scalar.apply(i["hidden"], i["weight"], i["target"])
    assert not loss.requires_grad or loss.backward() is None
    assert torch.equal(each, chosen)
    assert torch.equal(mean, chosen.mean())
    assert torch.equal(loss, 0.5 * (rejected - chosen).mean())
    assert Scalar.apply(i["hidden"][:0], i["weight"], i["target"][:0])[0] == 0
    with pytest.raises(ValueError, match="odd number"):
        Scalar.apply(i["hidden"][:3], i["weight"], i["target"][:3])
    with pytest.raises(NotImplementedError, match="preference_loss_fn"):
        LigerFusedLinearPreferenceBase.preference_loss_fn(chosen, rejected, i["target"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_trained_tensor_that_the_loss_reads_is_refused(dtype: torch.dtype) -> None:
    """Its gradient would be lost, in one walk over the logits and in two. What only metrics read gets none anyway."""
    i, share = draw_sequences(dtype)(0), torch.ones((), requires_grad=True)
    given = i["hidden"].requires_grad_(), i["weight"], i["target"]

    class Reads(LigerFusedLinearPreferenceBase):
        in_loss = True

        @classmethod
        def preference_loss_fn(cls, c: Any, r: Any, full: Any, beta: float) -> Any:
            return (r - c).sum() * (share if cls.in_loss else 1), (c * share).sum()

        @classmethod
        def forward(cls, ctx: Any, *args: Any) -> Any:
            return LigerFusedLinearPreferenceBase.forward(cls, ctx, *args, compute_nll_loss=False)

    with pytest.raises(ValueError, match="that requires a gradient"):
        Reads.apply(*given)
    Reads.in_loss = False
    Reads.apply(*given)[0].backward()
    assert share.grad is None


def test_a_preference_loss_of_log_probabilities() -> None:
    logps = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    full, of = torch.zeros(4, 1), LigerFusedLinearDPOFunction.preference_loss_fn
    loss, won, _ = of(*logps, full, beta=0.2)
    assert torch.equal(won, 0.2 * logps[0])
    assert torch.equal(loss, of(*logps, full, torch.zeros(2), torch.zeros(2), beta=0.2)[0])
    with pytest.raises(ValueError, match="Unsupported loss_type"):
        of(*logps, full, loss_type="ipo")


class Unpaired(LigerFusedLinearUnpairedPreferenceBase):
    preference_loss_fn = staticmethod(LigerFusedLinearKTOFunction.preference_loss_fn)

    @classmethod
    def forward(cls, ctx: Any, *args: Any) -> Any:
        refs = dict(zip(("ref_input", "ref_weight", "ref_bias"), args[5:], strict=True))
        more = {"use_ref_model": True, "beta": 0.3, "kl": torch.full((1,), 0.2)}
        return super().forward(cls, ctx, *args[:5], **refs, **more)

    @staticmethod
    def backward(ctx: Any, *grad_output: Any) -> Any:
        return *LigerFusedLinearUnpairedPreferenceBase.backward(ctx, grad_output), *(None,) * 3


@dtypes
def test_a_loss_of_single_sequences(dtype: torch.dtype) -> None:
    """KTO through the base: its sums for each side, a sequence without a token, frozen tensors."""
    desirable = torch.tensor([True, False, True, True, False, False])

    def ours(i: Inputs) -> tuple[Tensor, ...]:
        refs = (i[f"ref_{name}"] for name in ("hidden", "weight", "bias"))
        loss, metrics = Unpaired.apply(
            i["hidden"], i["weight"], i["target"], desirable[: len(i["target"])], i["bias"], *refs
        )
        return loss, *metrics

    def own(i: Inputs) -> tuple[Tensor, ...]:
        loss, metrics = LigerFusedLinearKTOLoss(beta=0.3, use_ref_model=True)(
            *(i["hidden"], i["weight"], i["target"], i["bias"], desirable[: len(i["target"])]),
            *(i[f"ref_{name}"] for name in ("hidden", "weight", "bias")),
            kl=torch.full((1,), 0.2),
        )
        return loss, *metrics

    i = draw_sequences(dtype)(0)
    leaves = [i[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    found, expected = ours(i), own(i)
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected) == 7
    grads = (torch.autograd.grad(of[0], leaves) for of in (found, expected))
    assert all(map(torch.equal, *grads))
    i["weight"] = i["weight"].detach()
    assert torch.autograd.grad(ours(i)[0], i["bias"])[0].any()


def test_refusals_of_a_loss_of_single_sequences() -> None:
    i = draw_sequences(torch.float32)(0)
    given = i["hidden"], i["weight"], i["target"]
    refs = i["ref_hidden"], i["ref_weight"], None
    for labels in (None, torch.ones(1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="preference_labels must be provided"):
            Unpaired.apply(*given, labels, None, *refs)
    none = torch.ones(0, dtype=torch.bool)
    hidden, target, ref_hidden = (i[name][:0] for name in ("hidden", "target", "ref_hidden"))
    empty = Unpaired.apply(hidden, i["weight"], target, none, None, ref_hidden, *refs[1:])
    assert empty[0] == 0
    with pytest.raises(NotImplementedError, match="preference_loss_fn"):
        LigerFusedLinearUnpairedPreferenceBase.preference_loss_fn(*given)


def test_the_recipe_of_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "problems" / "preference-and-rl.md"
    block = page.read_text(encoding="utf-8").split("## A loss of your own")[1]
    recipe = block.split("```python")[1].split("```")[0]

    def ours(i: Inputs) -> tuple[Tensor, ...]:
        desirable = torch.arange(len(i["target"])) % 2 == 0
        names = {
            "hidden": i["hidden"],
            "head": SimpleNamespace(weight=i["weight"]),
            "labels": i["target"],
            "desirable": desirable,
        }
        exec(recipe.replace("loss.backward()", ""), names)
        return names["loss"], names["rewards"]  # type: ignore[return-value]

    def reference(i: Inputs) -> tuple[Tensor, ...]:
        logps = pick(logits_of(i["hidden"], i["weight"], None), i["target"])
        counts = (i["target"] != IGNORED).sum(1)
        rewards = 0.1 * logps.sum(1) / counts.clamp(min=1)
        signs = 1.0 - 2.0 * (torch.arange(len(counts)) % 2)
        losses = -torch.nn.functional.logsigmoid(signs * rewards)
        return (losses * (counts > 0)).mean(), rewards.sum()

    compare(ours, reference, draw_sequences(torch.float32, reference=False, bias=False))


class Policy(LigerFusedLinearPPOBase):
    """Makes its gradients itself."""

    @classmethod
    def forward(
        cls, ctx: Any, hidden: Any, weight: Any, ids: Any, mask: Any, advantages: Any, bias: Any
    ) -> Any:
        def loss_of(*given: Any) -> Any:
            logps = pick(logits_of(*given), ids)
            loss = -(logps.exp() * advantages[:, None] * mask).sum() / mask.sum()
            return loss, logps.mean()

        grads, (loss, mean) = torch.func.grad_and_value(
            loss_of, argnums=(0, 1, 2) if bias is not None else (0, 1), has_aux=True
        )(hidden, weight, bias)
        ctx.save_for_backward(*grads, *[None] * (3 - len(grads)))
        return loss, (mean,)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *metrics: Any) -> Any:
        return LigerFusedLinearPPOBase.backward(ctx, grad_output)[:6]


@pytest.mark.parametrize("bias", [True, False])
def test_a_policy_loss(bias: bool) -> None:
    def reference(i: Inputs) -> tuple[Tensor, ...]:
        logps = pick(logits_of(i["hidden"], i["weight"], i.get("bias")), i["target"])
        mask = (i["target"] != IGNORED).to(logps)
        weights = torch.arange(len(mask))[:, None] - 1.0
        return -(logps.exp() * weights * mask).sum() / mask.sum(), logps.mean()

    def ours(i: Inputs) -> tuple[Tensor, ...]:
        mask = (i["target"] != IGNORED).to(i["hidden"])
        advantages = torch.arange(len(mask)) - 1.0
        loss, metrics = Policy.apply(
            i["hidden"], i["weight"], i["target"], mask, advantages, i.get("bias")
        )
        return loss, *metrics

    compare(ours, reference, draw_sequences(torch.float32, reference=False, bias=bias))


class Derived(LigerFusedLinearPPOBase):
    """By its formula alone; each sequence reports how many tokens of it count, and the sum of both."""

    @staticmethod
    def ppo_loss_fn(
        logps: Any,
        mask: Any,
        advantages: Any,
        full_mask: Any,
        *,
        num_items_in_batch: Any,
        **options: Any,
    ) -> Any:
        assert logps.shape[0] <= 2
        loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            *(logps, mask, advantages, full_mask), num_items_in_batch=num_items_in_batch, **options
        )
        return loss, [mask.sum(1), mask.sum()]

    @classmethod
    def forward(cls, ctx: Any, *args: Any) -> Any:
        *args, options = args
        return super().forward(cls, ctx, *args, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *LigerFusedLinearPPOBase.backward(ctx, *grads), *[None] * 6


@pytest.mark.parametrize("options", [
    {"loss_type": "grpo", "chunk_size": 2},
    {"beta": 0.2, "delta": 1.5, "use_ref_model": True, "importance_sampling_level": "sequence"},
    {"loss_type": "vespo", "beta": 0.0, "num_items_in_batch": 7},
], ids=lambda o: o.get("loss_type", "gspo"))  # fmt: skip
def test_a_policy_loss_without_a_loop(options: dict[str, Any]) -> None:
    """The formula of GRPO by the base gives what our own module gives."""
    i = draw_sequences(torch.float32)(0)
    mask = (i["target"] != IGNORED).long()
    n, length = mask.shape
    ids = i["target"].clamp(min=0)
    advantages, old = torch.arange(n) - 1.0, torch.full((n, length), -3.0)
    ref = i["ref_hidden"], i["ref_weight"], i["ref_bias"]
    given = [i[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def by_base(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        loss, metrics = Derived.apply(
            *(hidden, weight, ids, mask, advantages, bias, None, old, *ref),
            {"temperature": 1.3, **options},
        )
        assert torch.equal(metrics[0], mask.sum(1))
        assert metrics[1] == mask.sum()
        return loss

    def own(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        items = options.get("num_items_in_batch")
        kept = {
            k: v for k, v in options.items() if k not in ("num_items_in_batch", "use_ref_model")
        }
        module = LigerFusedLinearGRPOLoss(
            temperature=1.3, **{"beta": 0.04, "use_ref_model": "use_ref_model" in options, **kept}
        )
        tensors = hidden, weight, ids, mask, advantages, bias, None, old
        return module(*tensors, *ref, None, items)[0]

    for find in (by_base, own):
        loss = find(*given)
        found = loss, *torch.autograd.grad(loss, given)
        if find is by_base:
            mine = found
    for name, a, b in zip(("loss", "dX", "dW", "db"), mine, found, strict=True):
        assert_no_worse(name, a, b.double(), b)


def test_what_a_policy_loss_must_be_given() -> None:
    i = draw_sequences(torch.float32, reference=False)(0)
    ids, mask = i["target"].clamp(min=0), torch.ones_like(i["target"])
    given = (
        i["hidden"],
        i["weight"],
        ids,
        mask,
        torch.ones(len(ids)),
        None,
        None,
        None,
        None,
        None,
        None,
    )
    with pytest.raises(ValueError, match="max_completion_length must be provided"):
        Derived.apply(*given, {"loss_type": "dr_grpo"})
    with pytest.raises(ValueError, match="neither ref_per_token_logps nor ref_input"):
        Derived.apply(*given, {"use_ref_model": True})
    with pytest.raises(ValueError, match="chunk_size"):
        Derived.apply(*given, {"chunk_size": 0})
    with pytest.raises(ValueError, match="vllm_is_ratio has shape"):
        Derived.apply(*given, {"vllm_is_ratio": torch.ones(len(ids) + 1)})
    with pytest.raises(NotImplementedError, match="ppo_loss_fn"):
        LigerFusedLinearPPOBase.ppo_loss_fn(*given[:4])


def test_a_loss_of_ours_has_no_steps_to_replace() -> None:
    """A subclass that redefines one would get the old numbers; AgileRL asks a forward for its parameters."""
    for base, step in (
        (LigerFusedLinearGRPOFunction, "ppo_loss_fn"),
        (LigerFusedLinearDPOFunction, "preference_loss_fn"),
        (LigerFusedLinearKTOFunction, "forward"),
    ):
        with pytest.raises(
            TypeError, match=f"defines {step}, which {base.__name__} would not call"
        ):
            type("Derived", (base,), {step: staticmethod(lambda *given: None)})
    parameters = inspect.signature(LigerFusedLinearGRPOFunction.forward).parameters
    assert list(parameters)[:3] == ["ctx", "_input", "weight"]
    assert parameters["vllm_is_ratio"].default is None
    i = draw_sequences(torch.float32)(0)
    loss = LigerFusedLinearKTOFunction.forward(
        None,
        i["hidden"],
        i["weight"],
        i["target"],
        torch.ones(len(i["target"])),
        use_ref_model=False,
    )[0]
    assert loss.isfinite()


def test_transforms_are_refused() -> None:
    i = draw_sequences(torch.float32)(0)
    own = LigerFusedLinearCPOLoss()
    torch.func.grad(lambda w: own(w, i["hidden"], i["target"])[0])(i["weight"])
    with pytest.raises(RuntimeError, match="WithAlpha makes its gradients in forward"):
        torch.func.grad(lambda w: with_alpha({**i, "weight": w})[0])(i["weight"])
