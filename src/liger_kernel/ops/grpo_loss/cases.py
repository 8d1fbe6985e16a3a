"""Inputs of the GRPO family on given logits for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.grpo_loss import grpo_loss, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def _tokens(
    rows: int,
    classes: int,
    *,
    old: bool = True,
    ref: bool = False,
    weighted: bool = False,
    summed: bool = False,
    draw: Any = Make.randn,
) -> Inputs:
    """Completions of another policy than the logits are of; a fifth of the tokens does not count."""

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        logits = draw(make, rows, classes, scale=2.0)
        ids = make.labels(rows, classes, 0.2, reference.NOT_COUNTED)
        own = logits.float().log_softmax(-1).gather(1, ids.clamp(min=0)[:, None])[:, 0]

        def near() -> Tensor:
            return own + make.randn(rows, scale=0.4).float()

        def positive() -> Tensor:
            return make.randn(rows).float().abs() + 0.1

        advantages = make.randn(rows).float()
        return (
            *(logits, ids, near() if old else None, near() if ref else None, advantages),
            *(positive() if weighted else None, positive() if summed else None),
        )

    return inputs


_SAPO: Any = {
    "loss_type": "sapo",
    "sapo_temperature_pos": 1.5,
    "sapo_temperature_neg": 0.8,
}
CASES = (
    case("grpo", "the usual call", _tokens(9, 301)),
    case("long-row", "several blocks", _tokens(2, 32768 + 57, summed=True)),
    case("everything", "KL", _tokens(9, 70, ref=True, weighted=True), beta=0.1, temperature=0.7),
    case("delta", "both sides", _tokens(17, 30), delta=1.3, epsilon_low=0.3, epsilon_high=0.1),
    case("bias", "corrected", _tokens(9, 70, ref=True), beta=0.2, use_bias_correction_kl=True),
    case("on-policy", "ratio 1, KL 0", _tokens(7, 40, old=False), beta=0.1, temperature=2.0),
    case(
        "cispo",
        "a constant ratio",
        _tokens(9, 40, weighted=True),
        loss_type="cispo",
        epsilon_high=1.2,
    ),
    case("sapo", "a soft gate", _tokens(9, 40, summed=True), **_SAPO),
    case("vespo", "weights of sequences", _tokens(9, 40, weighted=True), loss_type="vespo"),
    case("logps", "of tokens", _tokens(9, 40), loss_type="logps", temperature=0.9),
    case("summed", "differentiated at once", _tokens(9, 70, ref=True, summed=True), beta=0.1),
    case("no-rows", "empty batch", _tokens(0, 40, summed=True), beta=0.1),
    case("strided", "row stride larger than the row", _tokens(5, 90, draw=Make.strided)),
    case("transposed", "last dimension not contiguous", _tokens(5, 90, draw=Make.transposed)),
    case("8192x128256", "8 x 1024 tokens", _tokens(8192, 128256, ref=True), beta=0.04, large=True),
    case(
        "8192x128256-summed",
        "likewise, differentiated in forward",
        _tokens(8192, 128256, ref=True, summed=True),
        beta=0.04,
        large=True,
    ),
    case(
        "8192x128256-in-place",
        "likewise, over the logits",
        _tokens(8192, 128256, ref=True, summed=True),
        beta=0.04,
        in_place=True,
        large=True,
    ),
    case("70000x32000", "> 65535 rows and > 2^31 elements", _tokens(70000, 32000), large=True),
)
SPEC = OpSpec(
    name="grpo_loss",
    function=grpo_loss,
    reference=reference.grpo_loss,
    cases=CASES,
    differentiable=(0,),
    outputs_without_grad=(1, 2),
    defaults={"temperature": 1.0},
    traffic=(2, (0,)),
)
