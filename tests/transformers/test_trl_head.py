"""TRL's fused head (`add_fused_lm_head`) on a patched model: its numbers, from our head, and its own code where not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from tests.transformers.tiny import VOCAB, batch, build

utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("this release of TRL has no head of its own", allow_module_level=True)

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEMPERATURE = 0.7


def stock(model: nn.Module) -> None:
    add_head(model)


def before(model: nn.Module) -> None:
    liger_kernel.patch(model)
    add_head(model)


def after(model: nn.Module) -> None:
    add_head(model)
    liger_kernel.patch(model)


def add_head(model: nn.Module, **options: Any) -> None:
    utils.add_fused_lm_head(model, **{"temperature": TEMPERATURE, "outputs": OUTPUTS, **options})


class Refuses:
    @staticmethod
    def apply(*args: Any) -> None:
        raise AssertionError("TRL's own code ran")


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on TRL's own code is an error."""
    return lambda: monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Refuses)


def truth(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """From all logits, in the dtype of the model."""
    given = {
        name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")
    }
    logits = model(**given).logits / TEMPERATURE
    labels = inputs.get("shift_labels")
    if labels is None:
        logits, labels = logits[:, :-1], inputs["labels"][:, 1:]
    mask = labels != -100
    logp = logits.log_softmax(-1)
    found = {
        "log_probs": logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
    }
    found = {name: value.masked_fill(~mask, 0) for name, value in found.items()}
    items = inputs.get("num_items_in_batch", mask.sum().clamp(min=1))
    return {**found, "loss": -found["log_probs"].sum() / items, "label_mask": mask}


def gradients(model: nn.Module, found: Any) -> dict[str, Tensor]:
    """Of a loss that reads all differentiable outputs, unlike for each token."""
    loss = (found["log_probs"].sin() + found["entropy"] * 0.1).sum() + found["loss"]
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CALLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "labels": lambda b: b,
    "shifted labels": lambda b: {
        "input_ids": b["input_ids"],
        "shift_labels": F.pad(b["labels"], (0, 1), value=-100)[:, 1:],
    },
    "items": lambda b: {**b, "num_items_in_batch": torch.tensor(7)},
}
#: the call, and settings: a soft cap under which no logits are equal, a scale, a bias of the head
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("labels", {}),
    "gemma2": ("items", {"final_logit_softcapping": 8.0}),
    "cohere": ("shifted labels", {}),
    "phi": ("labels", {}),
}


@pytest.mark.parametrize("patched", [before, after])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_gradients(
    name: str, patched: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, settings = MODELS[name]
    model, exact, theirs = (
        build(name, dtype, **settings) for dtype in (torch.float32, torch.float64, torch.float32)
    )
    patched(model)
    stock(theirs)

    def draw(seed: int) -> Any:
        inputs = CALLS[call](batch(seed=seed))
        high, low = truth(exact, inputs), theirs(**inputs, fused_lm_head=True)
        with monkeypatch.context() as ours_alone:
            ours_alone.setattr(utils, "_ChunkedLogProbFunction", Refuses)
            ours = model(**inputs, fused_lm_head=True)
        assert type(ours) is utils.FusedCausalLMOutput
        assert ours.keys() == low.keys()
        runs = ((model, ours), (exact, high), (theirs, low))
        return [{**{n: of[n].detach() for n in low}, **gradients(m, of)} for m, of in runs]

    assert_draws_no_worse(draw)


@pytest.mark.parametrize("patched", [before, after])
def test_auxiliary_loss_and_fewer_outputs(patched: Callable[[nn.Module], None]) -> None:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    more["experts_implementation"] = "eager"  # the grouped product knows no float64
    of_trl, model = build("qwen3_moe", **more), build("qwen3_moe", **more)
    utils.add_fused_lm_head(of_trl)
    expected = of_trl(**batch(), fused_lm_head=True)
    high = build("qwen3_moe", torch.float64, **more)
    utils.add_fused_lm_head(high)
    exact = high(**batch(), fused_lm_head=True)
    patched(model)
    utils.add_fused_lm_head(model)  # by a second trainer; the last one counts
    found = model(**batch(), fused_lm_head=True)
    assert found.keys() == expected.keys() == {"loss", "log_probs", "label_mask", "aux_loss"}
    for key in ("loss", "aux_loss", "log_probs"):
        assert_no_worse(key, found[key], exact[key], expected[key])


@pytest.mark.parametrize("patched", [before, after])
def test_no_labels_in_a_batch(patched: Callable[[nn.Module], None]) -> None:
    """The ranks of a distributed run expect a gradient from each."""
    model = build("llama")
    patched(model)
    inputs = batch()
    inputs["labels"].fill_(-100)
    found = model(**inputs, fused_lm_head=True)
    found.log_probs.sum().backward()
    assert found.loss == 0
    assert not found.is_top1.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class TestWithoutIt:
    """Other calls, and the patch taken back."""

    @pytest.mark.parametrize("patched", [before, after])
    def test_the_usual_loss(self, patched: Callable[[nn.Module], None], calls: Any) -> None:
        model = build("llama")
        expected = model(**batch()).loss
        patched(model)
        found = model(**batch()).loss
        assert calls["cross_entropy"]
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("patched", [before, after])
    def test_taken_back(self, patched: Callable[[nn.Module], None], calls: Any) -> None:
        model = build("llama")
        patched(model)
        liger_kernel.unpatch(model)
        assert not model._forward_pre_hooks
        calls.clear()  # of the proofs, which another test may have made
        found = model(**batch(), fused_lm_head=True)
        assert not calls
        assert type(found) is utils.FusedCausalLMOutput

    @pytest.mark.parametrize("patched", [before, after])
    def test_a_copy_is_served_by_its_own_head(
        self, patched: Callable[[nn.Module], None], calls: Any
    ) -> None:
        """TRL binds its forward to the model; a copy that is given a head of its own has both."""
        model = build("llama")
        liger_kernel.patch(model)
        other = copy.deepcopy(model)
        patched(other)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        found = other(**batch(), fused_lm_head=True)
        assert calls["logprobs"]
        torch.testing.assert_close(
            found.entropy[found.label_mask],
            torch.full((int(found.label_mask.sum()),), float(torch.tensor(VOCAB).log())),
        )


class TestLeftToTRL:
    def row(self, model: nn.Module) -> str:
        (row,) = (row for row in liger_kernel.patch(model).rows if row.kind == "loss")
        return f"{row.by} {row.reason}"

    def test_the_report_tells(self, calls: Any) -> None:
        model = build("llama")
        liger_kernel.patch(model)
        assert "TRL" not in self.row(model)
        add_head(model)
        assert self.row(model).strip() == "fused linear cross entropy, and TRL's head"
        add_head(model, cast_lm_head_to_fp32=True)
        assert "TRL's head runs its own code: it computes in float32" in self.row(model)
        assert model(**batch(), fused_lm_head=True).loss.isfinite()
        assert not calls["logprobs"]

    @pytest.mark.parametrize("patched", [before, after])
    def test_a_copy_of_a_model_with_a_head(
        self, patched: Callable[[nn.Module], None], calls: Any
    ) -> None:
        """What TRL's forward stands around is not copied with it."""
        model = build("llama")
        patched(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        found = other(**batch(), fused_lm_head=True)
        assert not calls["logprobs"]
        assert not found.mean_logits.any()
        assert "it belongs to the model that this one was copied from" in self.row(other)

    def test_a_head_that_cannot_be_taken(self, calls: Any) -> None:
        model = build("llama")
        after(model)
        handle = model.lm_head.register_forward_hook(lambda module, args, output: output)
        assert model(**batch(), fused_lm_head=True).loss.isfinite()
        assert not calls["logprobs"]
        handle.remove()
        assert model(**batch(), fused_lm_head=True).loss.isfinite()
        assert calls["logprobs"]

    @pytest.mark.parametrize("patched", [before, after])
    def test_a_loss_of_another_kind(self, patched: Callable[[nn.Module], None], calls: Any) -> None:
        """It is seen in the first call, which TRL computes; from then on no call tries."""
        model, of_trl = build("llama"), build("llama")
        stock(of_trl)
        model.loss_function = lambda logits, labels, **_: logits.float().sum()
        patched(model)
        expected = of_trl(**batch(), fused_lm_head=True)
        for _ in range(2):
            found = model(**batch(), fused_lm_head=True)
            torch.testing.assert_close(found.log_probs, expected.log_probs)
        assert not calls["logprobs"]
        assert "its forward needs real logits before the loss" in self.row(model)
