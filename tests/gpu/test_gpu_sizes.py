"""Tensors of more than 2^31 elements, and more than 65,535 along every dimension that could land on a grid axis.

Only the last rows get a gradient, so that even gradients summed over all rows depend on nothing else, and a reference
on those rows alone is the truth for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.backends import use_implementation
from liger_kernel.ops.dequantize_4bit import dequantize_4bit
from liger_kernel.testing import Make, assert_no_worse, specs
from liger_kernel.testing.calls import as_tuple, backward, call, drawing_on, leaves

pytestmark = pytest.mark.xdist_group("memory")

BF16 = torch.bfloat16
TAIL = 3
WIDE = (65_540, 32_776)  # long rows
TALL = (16_777_221, 128)  # many rows


@dataclass(frozen=True)
class Huge:
    """`axes`: along which axis each input has rows (None: it has none, or too few); outputs have them along `axis`."""

    op: str
    id: str
    inputs: Callable[[Make], tuple[Tensor | None, ...]]
    axes: tuple[int | None, ...]
    options: dict[str, Any] = field(default_factory=dict)
    axis: int = 0


def rows_of(op: str, shape: tuple[int, int], vectors: int, **options: Any) -> Huge:
    """A norm, or what works on single elements: one matrix and `vectors` weights or biases."""

    def inputs(make: Make) -> tuple[Tensor, ...]:
        return make.randn(*shape), *(make.randn(shape[1]) for _ in range(vectors))

    return Huge(op, f"{shape[0]}x{shape[1]}", inputs, (0, *(None,) * vectors), options)


def of_parameters(op: str, rows: int, columns: int, *sizes: int, **options: Any) -> Huge:
    """One matrix, and parameters of these sizes."""

    def inputs(make: Make) -> tuple[Tensor, ...]:
        return make.randn(rows, columns), *map(make.randn, sizes)

    return Huge(op, f"{rows}x{columns}", inputs, (0, *(None,) * len(sizes)), options)


def group_norm(num_groups: int, *shape: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor, ...]:
        return make.randn(*shape), make.randn(shape[1]), make.randn(shape[1])

    options = {"num_groups": num_groups, "eps": 1e-5}
    return Huge("group_norm", "x".join(map(str, shape)), inputs, (0, None, None), options)


def pair_of(op: str, shape: tuple[int, int], weight: bool, **options: Any) -> Huge:
    def inputs(make: Make) -> tuple[Tensor, ...]:
        return make.randn(*shape), make.randn(*shape), *((make.randn(shape[1]),) if weight else ())

    return Huge(op, f"{shape[0]}x{shape[1]}", inputs, (0, 0, *((None,) if weight else ())), options)


def rope(id: str, batch: int, heads: int, tokens: int, head_dim: int, axis: int) -> Huge:
    """Queries as models make them: (B, S, heads, D) seen as (B, heads, S, D)."""

    def inputs(make: Make) -> tuple[Tensor, ...]:
        q, k = (
            make.randn(batch, tokens, h, head_dim).transpose(1, 2)
            for h in (heads, max(1, heads // 4))
        )
        angles = make.randn(batch if axis == 0 else 1, tokens, head_dim)
        return q, k, angles.cos(), angles.sin()

    of_angles = {0: 0, 1: None, 2: 1}[axis]
    return Huge("rope", id, inputs, (axis, axis, of_angles, of_angles), ROPE, axis)


def cross_entropy(rows: int, classes: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        return make.randn(rows, classes), make.labels(rows, classes), None

    return Huge("cross_entropy", f"{rows}x{classes}", inputs, (0, 0, None), {"reduction": "none"})


def logprobs(rows: int, classes: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        return make.randn(rows, classes), make.labels(rows, classes), None

    return Huge("logprobs", f"{rows}x{classes}", inputs, (0, 0, None), {"entropy": True})


def linear_cross_entropy(rows: int, hidden: int, classes: int) -> Huge:
    """Summed: all but the last rows are ignored."""

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        labels = make.labels(rows, classes)
        labels[:-TAIL] = -100
        return (
            make.randn(rows, hidden),
            make.randn(classes, hidden, scale=hidden**-0.5),
            labels,
            None,
            None,
        )

    axes = (0, None, 0, None, None) if rows > classes else (None,) * 5
    return Huge(
        "fused_linear_cross_entropy",
        f"{rows}x{hidden}x{classes}",
        inputs,
        axes,
        {"reduction": "sum"},
    )


def divergence(op: str, rows: int, classes: int, *logs: bool, **options: Any) -> Huge:
    """Term by term, or where a sum has labels, with all but the last rows ignored."""

    def inputs(make: Make) -> tuple[Tensor, ...]:
        made = [make.randn(rows, classes) for _ in logs]
        for t, is_log in zip(made, logs, strict=True):
            t.sub_(4) if is_log else t.abs_()
        if options.get("reduction") == "none":
            return tuple(made)
        labels = make.labels(rows, classes)
        labels[:-TAIL] = -100
        return *made, labels

    axes = (0, 0) if options.get("reduction") == "none" else (0, 0, 0)
    return Huge(op, f"{rows}x{classes}", inputs, axes, options)


def gated_mlp(rows: int, hidden: int, features: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor, ...]:
        inner = (make.randn(features, hidden, scale=hidden**-0.5) for _ in range(2))
        return make.randn(rows, hidden), *inner, make.randn(hidden, features, scale=features**-0.5)

    options = {"activation": "silu", "gate_multiplier": 1.0}
    return Huge("gated_mlp", f"{rows}x{hidden}x{features}", inputs, (0, None, None, None), options)


def tiled_mlp(rows: int, hidden: int, features: int) -> Huge:
    whole = gated_mlp(rows, hidden, features)
    return replace(whole, op="tiled_mlp", options={"activation": "silu", "num_tiles": None})


def lora_linear(rows: int, hidden: int, outputs: int, rank: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        factors = make.randn(rank, hidden, scale=hidden**-0.5), make.randn(outputs, rank)
        return make.randn(rows, hidden), make.randn(outputs, hidden), None, *factors

    name = f"{rows}x{hidden}x{outputs}"
    return Huge("lora_linear", name, inputs, (0, *(None,) * 4), {"scaling": 2.0})


def gradients(rows: int, columns: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        return make.randn(rows, columns), None, None, make.randn(1)[0]

    return Huge("scale_gradients", f"{rows}x{columns}", inputs, (0, None, None, None))


def of_first_case(op: str, **options: Any) -> dict[str, Any]:
    """All options of an op, as its reference wants them."""
    return {**specs()[op].cases[0].options, **options}


def parts(
    op: str,
    *shapes: tuple[int, ...] | None,
    axes: tuple[int | None, ...] = (),
    labels: tuple[int, int, bool] | None = None,
    axis: int = 0,
    **options: Any,
) -> Huge:
    """Tensors of these shapes, rows along `axes` (0 of the first alone). `labels`: place, classes, whether all but the
    last rows are ignored."""

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        made = [
            None
            if s is None
            else make.randn(*s, scale=s[-1] ** -0.5 if i else 1.0)
            if s
            else make.randn(1)[0]
            for i, s in enumerate(shapes)
        ]
        if labels is not None:
            at, classes, last_alone = labels
            drawn = make.labels(shapes[0][0], classes)  # type: ignore[index]
            if last_alone:
                drawn[:-TAIL] = -100
            made[at] = drawn
        return tuple(made)

    rest = (0, *(None,) * (len(shapes) - 1))
    first: Any = shapes[0]
    return Huge(op, "x".join(map(str, first)), inputs, axes or rest, options, axis)


def experts(rows: int, hidden: int, features: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        w1, w2 = make.randn(2, 2 * features, hidden), make.randn(2, hidden, features)
        x, index = make.randn(rows, hidden), make.integers(2, rows, 1)
        return x, w1, w2, index, make.randn(rows, 1), *(None,) * 6

    options = of_first_case("fused_moe")
    axes = (0, None, None, 0, 0, *(None,) * 6)
    return Huge("fused_moe", f"{rows}x{hidden}x{features}", inputs, axes, options)


def router(rows: int, experts: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        logits = make.randn(rows, experts)
        for row in range(rows - TAIL, rows):  # no two alike: among equals, whoever chooses is right
            logits[row] = make.permutation(experts) / 16
        return logits, None

    return Huge("moe_router", f"{rows}x{experts}", inputs, (0, None), of_first_case("moe_router"))


def ternary(rows: int, inner: int, columns: int) -> Huge:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        # not by torch.randint, whose numbers take eight bytes
        a, b = (make.randn(*s, scale=30.0) for s in ((rows, 4 * inner), (inner, columns)))
        return a.to(torch.int8), b.abs().to(torch.uint8)

    return Huge("mm_int8int2", f"{rows}x{4 * inner}x{columns}", inputs, (0, None))


def normed_rope(batch: int, heads: int, tokens: int, head_dim: int) -> Huge:
    of_rope = rope("", batch, heads, tokens, head_dim, axis=2)

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        q, k, *angles = of_rope.inputs(make)
        return q, k, make.randn(head_dim), make.randn(head_dim), *angles

    axes = (*of_rope.axes[:2], None, None, *of_rope.axes[2:])
    return Huge("qk_norm_rope", f"{tokens}-tokens", inputs, axes, of_first_case("qk_norm_rope"), 2)


NORM = {"eps": 1e-6, "offset": 0.0, "casting_mode": "llama"}
GLU = {"activation": "silu", "gate_multiplier": 1.0, "down_multiplier": 1.0}
ROPE = {"unsqueeze_dim": 1, "rotary_dim": None, "interleaved": False}
ADAPTED = ((128, 129), (128, 129), (129, 128), *((8, 129), (128, 8)) * 2, (8, 128), (129, 8))
HUGE = (
    rows_of("rms_norm", WIDE, 1, **NORM),
    rows_of("rms_norm", TALL, 1, **NORM),
    rows_of("layer_norm", WIDE, 2, eps=1e-5),
    rows_of("layer_norm", TALL, 2, eps=1e-5),
    pair_of("fused_add_rms_norm", WIDE, True, **NORM),
    pair_of("fused_add_rms_norm", TALL, True, **NORM),
    pair_of("glu", WIDE, False, **GLU),
    pair_of("glu", TALL, False, **GLU),
    Huge("glu", "packed", lambda m: (m.randn(65_540, 2 * 16_388), None), (0, None), GLU),
    rows_of("relu_squared", WIDE, 0),
    rows_of("softmax", WIDE, 0),
    rows_of("softmax", TALL, 0),
    rows_of("sparsemax", WIDE, 0, dim=-1),
    rows_of("sparsemax", TALL, 0, dim=-1),
    of_parameters("dyt", *WIDE, 1, WIDE[1], WIDE[1]),
    of_parameters("dyt", *TALL, 1, TALL[1], TALL[1]),
    of_parameters("modulated_rms_norm", 262_160, 8_194, *(8_194,) * 3, **NORM),
    of_parameters("modulated_rms_norm", *TALL, *(TALL[1],) * 3, **NORM),
    group_norm(2, 65_540, 8, 4_097),
    group_norm(2, 16_777_221, 4, 32),
    group_norm(1, 4, 2, 268_435_459),
    of_parameters("poly_norm", *WIDE, 3, 1, eps=1e-6),
    of_parameters("poly_norm", *TALL, 3, 1, eps=1e-6),
    gated_mlp(16_777_221, 129, 128),
    tiled_mlp(16_777_221, 129, 128),
    lora_linear(16_777_221, 129, 128, 8),
    parts("lora_mlp", (16_777_221, 129), *ADAPTED, scaling=2.0, activation="silu"),
    rope("tokens", 1, 32, 524_291, 128, axis=2),
    rope("batch", 65_541, 4, 64, 128, axis=0),
    rope("heads", 1, 262_148, 64, 128, axis=1),
    cross_entropy(515, 4_194_307),
    cross_entropy(16_650_001, 129),
    logprobs(515, 4_194_307),
    logprobs(16_650_001, 129),
    linear_cross_entropy(524_291, 4_100, 64),
    linear_cross_entropy(64, 8_200, 262_145),
    divergence("kl_div", *WIDE, True, False, reduction="none"),
    divergence("jsd", *WIDE, True, True),
    divergence("jsd", *TALL, True, True),
    divergence("tvd", *TALL, False, False, reduction="none"),
    gradients(*WIDE),
    parts(
        "attn_res", (2, 16_777_221, 66), (66,), (66,), axes=(1, None, None), eps=1e-6, normed=False
    ),
    parts(
        "fused_ce_tvd",
        (515, 4_194_307),
        (515, 4_194_307),
        None,
        axes=(0, 0, 0),
        labels=(2, 4_194_307, False),
    ),
    parts(
        "grpo_loss",
        *((515, 4_194_307), None, (515,), None, (515,), None, None),
        axes=(0, 0, 0, None, 0, None, None),
        labels=(1, 4_194_307, False),
        temperature=1.0,
    ),
    parts(
        "fused_neighborhood_attention",
        *((65_541, 4, 64, 129),) * 3,
        axes=(0, 0, 0),
        **of_first_case("fused_neighborhood_attention"),
    ),
    experts(16_777_221, 136, 16),
    ternary(33_554_435, 17, 32),
    parts("short_conv", (8_739, 4_096, 3 * 20), (20, 3), None, axes=(0, None, None)),
    parts(
        "mhc_mix",
        *((131_075, 4, 4_104), (131_075, 4, 4), (131_075, 4_104), (131_075, 4)),
        axes=(0, 0, 0, 0),
    ),
    parts("mhc_project", (8_388_611, 260), (260, 24), eps=1e-6),
    parts("mhc_sinkhorn", (89_478_503, 24), (24,), (), (1,), (), **of_first_case("mhc_sinkhorn")),
    parts(
        "multi_token_attention",
        (2_100_003, 4, 16, 16),
        (4, 4, 3, 3),
        (4,),
        **of_first_case("multi_token_attention"),
    ),
    router(16_777_221, 129),
    normed_rope(1, 32, 524_291, 128),
    parts(
        "linear_logprobs",
        *((524_291, 4_100), (64, 4_100), None, None, None),
        axes=(0, None, 0, None, None),
        labels=(2, 64, False),
    ),
    parts(
        "fused_linear_jsd",
        *((524_291, 4_100), (64, 4_100), (524_291, 16), (64, 16), None),
        axes=(0, None, 0, None, 0),
        labels=(4, 64, True),
    ),
    parts(
        "fused_linear_kl_div",
        *((524_291, 4_100), (64, 4_100), (524_291, 64), None),
        axes=(0, None, 0, 0),
        labels=(3, 64, True),
        reduction="sum",
    ),
    parts(
        "vocab_parallel_cross_entropy",
        *((515, 4_194_307), None),
        axes=(0, 0),
        labels=(1, 4_194_307, False),
        reduction="none",
    ),
    parts(
        "vocab_parallel_logprobs",
        *((515, 4_194_307), None, None),
        axes=(0, 0, None),
        labels=(1, 4_194_307, False),
        entropy=True,
    ),
    parts("short_conv", (5_592_411, 3, 129), (43, 3), (43,)),
    parts("short_conv", (257, 257, 32_775), (10_925, 3), (10_925,)),
)
MANY = (
    rope("70001-tokens", 1, 2, 70_001, 8, axis=2),
    rope("70001-sequences", 70_001, 2, 3, 8, axis=0),
    rope("70001-heads", 1, 70_001, 3, 8, axis=1),
    cross_entropy(3, 70_001 * 16),
    cross_entropy(70_001, 16),
    divergence("jsd", 3, 70_001 * 2048, True, True),
    divergence("tvd", 70_001, 16, False, False, reduction="none"),
    logprobs(3, 70_001 * 16),
    logprobs(70_001, 16),
    linear_cross_entropy(70_001, 16, 24),
    linear_cross_entropy(8, 16, 70_001),
    rows_of("rms_norm", (3, 65_536 * 16 + 1), 1, **NORM),
    rows_of("layer_norm", (3, 65_536 * 16 + 1), 2, eps=1e-5),
    rows_of("softmax", (3, 65_536 * 16 + 1), 0),
    rows_of("sparsemax", (3, 65_536 * 16 + 1), 0, dim=-1),
    of_parameters("dyt", 3, 65_536 * 1024 + 1, 1, *(65_536 * 1024 + 1,) * 2),
    group_norm(70_001, 4, 140_002, 3),
    group_norm(2, 3, 4, 65_536 * 16 + 1),
    of_parameters("poly_norm", 3, 65_536 * 16 + 1, 3, 1, eps=1e-6),
    pair_of("fused_add_rms_norm", (3, 65_536 * 16 + 1), True, **NORM),
    pair_of("glu", (3, 65_536 * 1024 + 1), False, **GLU),
    gated_mlp(70_001, 16, 24),
    parts("attn_res", (2, 70_001, 24), (24,), (24,), axes=(1, None, None), eps=1e-6, normed=False),
    experts(70_001, 16, 8),
    parts("mhc_mix", *((70_001, 4, 24), (70_001, 4, 4), (70_001, 24), (70_001, 4)), axes=(0,) * 4),
    parts("mhc_mix", *((3, 4, 65_536 * 16 + 1), (3, 4, 4)), None, None, axes=(0, 0, None, None)),
    router(70_001, 16),
    ternary(70_001, 16, 40),
    parts("short_conv", (70_001, 17, 12), (4, 3), (4,)),
    parts("short_conv", (4, 3, 3 * 70_001 * 256), (70_001 * 256, 3), (70_001 * 256,)),
)


def last(t: Tensor, axis: int | None) -> Tensor:
    return t if axis is None or not t.ndim else t.narrow(axis, t.shape[axis] - TAIL, TAIL)


def check(case: Huge) -> None:
    spec = specs()[case.op]
    with drawing_on("cuda", BF16) as make:
        inputs = case.inputs(make)
        wanted = {i for i in spec.differentiable if inputs[i] is not None}
        args = leaves(inputs, wanted)
        outputs = as_tuple(spec.function(*args, **case.options))
        whole = all(axis is None for axis in case.axes)
        out_axis = None if whole else case.axis
        grads, tail_grads = {}, {}
        for i, out in enumerate(outputs):
            if out is not None and i not in spec.outputs_without_grad:
                grads[i] = torch.zeros_like(out)
                tail = last(grads[i], out_axis)
                tail.copy_(make.randn(1, *tail.shape)[0])
                tail_grads[i] = tail.clone()
    found = backward(outputs, args, grads)
    ours = tuple(
        None if out is None else edge(last(out.detach(), out_axis)).clone() for out in outputs
    )
    ends = {i: edge(last(g, case.axes[i])).clone() for i, g in found.items()}
    del outputs, found, grads, args

    small = tuple(
        t if t is None else last(t, axis).clone() for t, axis in zip(inputs, case.axes, strict=True)
    )
    del inputs
    high, high_grads = call(
        spec.reference, case.options, leaves(small, wanted, torch.float64), tail_grads
    )
    high_grads = {i: edge(g) for i, g in high_grads.items()}
    low, low_grads = call(spec.reference, case.options, leaves(small, wanted), tail_grads)
    for i, (a, b, c) in enumerate(zip(ours, high, low, strict=True)):
        if a is not None:
            assert_no_worse(f"output {i}", a, edge(b), edge(c), elementwise=i in spec.elementwise)
    for i in ends:
        assert_no_worse(f"gradient of input {i}", ends[i], high_grads[i], edge(low_grads[i]))


def edge(t: Tensor) -> Tensor:
    """All of it, or of something large the last rows and columns: comparing 2^27 elements takes a minute."""
    return t if t.numel() < 2**26 or t.ndim < 2 else t[-64:, ..., -(2**20) :]


@pytest.mark.parametrize("case", HUGE, ids=lambda case: f"{case.op}-{case.id}")
def test_more_than_2_31_elements(case: Huge) -> None:
    with torch.device("meta"):
        sizes = [t.numel() for t in case.inputs(Meta(BF16, "meta")) if t is not None]
    assert max(sizes) > 2**31
    check(case)


class Meta(Make):
    """Draws shapes only."""

    def randn(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.empty(*shape)

    def labels(
        self, rows: int, classes: int, ignored: float = 0.0, ignore_index: int = -100
    ) -> Tensor:
        return torch.empty(rows, dtype=torch.int64)


@pytest.mark.parametrize("case", MANY, ids=lambda case: f"{case.op}-{case.id}")
def test_more_than_a_grid_axis_holds(case: Huge) -> None:
    check(case)


def test_more_than_2_31_packed_numbers() -> None:
    """Their shape is an option, and blocks are apart: the last ones alone are dequantised to the same."""
    blocks = 2**25 + TAIL
    packed = torch.randint(256, (32 * blocks,), dtype=torch.uint8, device="cuda")
    code, absmax = torch.randn(16, device="cuda"), torch.rand(blocks, device="cuda")
    given = packed[-32 * TAIL :], code, absmax[-TAIL:]
    whole = dequantize_4bit(packed, code, absmax, shape=(blocks, 64), dtype=BF16)
    tail = dequantize_4bit(*given, shape=(TAIL, 64), dtype=BF16)
    assert torch.equal(whole[-TAIL:], tail)
    with use_implementation("reference"):
        assert torch.equal(tail, dequantize_4bit(*given, shape=(TAIL, 64), dtype=BF16))


def test_every_op_is_here() -> None:
    assert specs().keys() == {"dequantize_4bit", *(case.op for case in HUGE)}
