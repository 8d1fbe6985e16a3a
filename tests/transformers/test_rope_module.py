"""Rotary embeddings against the functions of HuggingFace that they replace, and what only the call forms promise."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.ops import rope as op
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import functional
from liger_kernel.transformers import rope as module

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.use_implementation(request.param):
        yield request.param


def angles(make: Make, *shape: int, repeat: str | None = "halves") -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, one column per pair, or each column twice as halves or as neighbours."""
    angle = torch.randn(*shape, generator=make._generator)
    if repeat == "halves":
        angle = torch.cat((angle, angle), -1)
    elif repeat == "neighbours":
        angle = angle.repeat_interleave(2, -1)
    return angle.cos().to(make.dtype), angle.sin().to(make.dtype)


def theirs(family: str, name: str = "apply_rotary_pos_emb") -> Callable[..., Any]:
    pytest.importorskip("transformers")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def results(
    function: Callable[..., Any], q: Tensor, k: Tensor, grads: list[Tensor]
) -> list[Tensor]:
    q, k = (t.detach().requires_grad_() for t in (q, k))
    outputs = function(q, k)
    return [
        *outputs,
        *torch.autograd.grad(outputs, (q, k), [g.to(outputs[0].dtype) for g in grads]),
    ]


def compare(
    ours: Callable[..., Any], hf: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """As close to HF's function in float64 as HF's function is in the dtype of q."""
    make = Make(q.dtype, seed=1)
    grads = [make.randn(*q.shape), make.randn(*k.shape)]

    def bound(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
        return lambda q, k: function(q, k, cos.to(dtype), sin.to(dtype))

    found = results(bound(ours, cos.dtype), q, k, grads)
    high = results(bound(hf, torch.float64), q.double(), k.double(), grads)
    low = results(bound(hf, cos.dtype), q, k, grads)
    for i, (a, b, c) in enumerate(zip(found, high, low, strict=True)):
        assert_no_worse(f"result {i}", a, b, c)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAsInHF:
    def test_llama(self, dtype: torch.dtype) -> None:
        make = Make(dtype)
        q, k = make.randn(2, 5, 4, 16).transpose(1, 2), make.randn(2, 5, 2, 16).transpose(1, 2)
        for batch in (1, 2):
            cos, sin = angles(make, batch, 5, 8)
            compare(module.liger_rotary_pos_emb, theirs("llama"), q, k, cos, sin)

    def test_unsqueeze_dim_2(self, dtype: torch.dtype) -> None:
        make = Make(dtype)
        q, k = make.randn(2, 5, 4, 16), make.randn(2, 5, 2, 16)

        def heads_third(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: function(*args, unsqueeze_dim=2)

        ours, hf = heads_third(module.liger_rotary_pos_emb), heads_third(theirs("llama"))
        compare(ours, hf, q, k, *angles(make, 2, 5, 8))

    def test_vision(self, dtype: torch.dtype) -> None:
        make = Make(dtype)
        q, k = make.randn(7, 3, 16), make.randn(7, 3, 16)
        hf = theirs("qwen2_vl", "apply_rotary_pos_emb_vision")
        compare(module.liger_rotary_pos_emb_vision, hf, q, k, *angles(make, 7, 8))

    def test_gpt_oss(self, dtype: torch.dtype) -> None:
        make = Make(dtype)
        q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16)
        cos, sin = angles(make, 2, 5, 8, repeat=None)
        compare(module.liger_rotary_pos_emb_gpt_oss, theirs("gpt_oss"), q, k, cos, sin)

    def test_glm_partial_neighbours(self, dtype: torch.dtype) -> None:
        """GLM rotates neighbours of the first columns by the first half of cos."""
        make = Make(dtype)
        q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16)

        def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return op.rope(q, k, cos[..., :4], sin[..., :4], rotary_dim=8, interleaved=True)

        compare(ours, theirs("glm"), q, k, *angles(make, 2, 5, 4))

    def test_cohere_neighbours(self, dtype: torch.dtype) -> None:
        """Cohere rotates neighbours by a full-width cos with every column twice."""
        make = Make(dtype)
        q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16)

        def hf(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            rotate_half = theirs("cohere", "rotate_half")
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            return tuple(t * cos + rotate_half(t) * sin for t in (q, k))

        def ours(*args: Tensor) -> Any:
            return op.rope(*args, interleaved=True)

        compare(ours, hf, q, k, *angles(make, 2, 5, 8, repeat="neighbours"))

    def test_llama4(self, dtype: torch.dtype) -> None:
        """Each sequence by its own angles; the vision tower's have another axis of size 1."""
        make = Make(dtype)
        q, k = make.randn(2, 5, 4, 16), make.randn(2, 5, 2, 16)

        def by_complex(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda q, k, cos, sin: function(q, k, torch.complex(cos.float(), sin.float()))

        pairs = (
            (module.liger_llama4_text_rotary_pos_emb, "apply_rotary_emb", (2, 5, 8)),
            (module.liger_llama4_vision_rotary_pos_emb, "vision_apply_rotary_emb", (5, 1, 8)),
        )
        for ours, name, shape in pairs:
            cos, sin = angles(make, *shape, repeat=None)
            compare(by_complex(ours), by_complex(theirs("llama4", name)), q, k, cos, sin)

    def test_by_three_positions(self, dtype: torch.dtype) -> None:
        """Of Qwen2-VL, and of Qwen3-VL, whose sections take turns."""
        make = Make(dtype)
        q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16)
        in_turns = partial(op.rope, mrope_section=(4, 2, 2), mrope_interleaved=True)
        for ours, tables in (
            (partial(module.liger_multimodal_rotary_pos_emb, mrope_section=[2, 3, 3]), "00111222"),
            (in_turns, "01201200"),
        ):

            def hf(q: Tensor, k: Tensor, *angles: Tensor, tables: str = tables) -> Any:
                selected = (
                    torch.stack([t[int(row), ..., i] for i, row in enumerate(tables * 2)], -1)
                    for t in angles
                )
                return theirs("llama")(q, k, *selected)

            compare(ours, hf, q, k, *angles(make, 3, 2, 5, 8))


def test_layout_is_kept_and_nothing_is_written(implementation: str) -> None:
    make = Make(torch.float32)
    q, k = make.randn(2, 5, 4, 16).transpose(1, 2), make.randn(2, 5, 2, 16).transpose(1, 2)
    before = q.clone(), k.clone()
    cos, sin = angles(make, 1, 5, 8)
    rotated = op.rope(q, k, cos.requires_grad_(), sin.requires_grad_())
    for x, was, out in zip((q, k), before, rotated, strict=True):
        assert torch.equal(x, was)
        assert out.stride() == x.stride() or implementation == "reference"
        assert out.data_ptr() != x.data_ptr()
        assert not out.requires_grad, "cos and sin are constants"


@pytest.mark.usefixtures("implementation")
def test_only_k_asks_for_a_gradient() -> None:
    make = Make(torch.float32)
    q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16).requires_grad_()
    cos, sin = angles(make, 1, 5, 8)
    out_q, out_k = op.rope(q, k, cos, sin)
    (out_q.sum() + out_k.sum()).backward()
    expected = op.rope(torch.ones_like(k), None, cos, -sin)[0]
    assert torch.equal(k.grad, expected)
    assert q.grad is None


def test_legacy_forms() -> None:
    make = Make(torch.float32)
    q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16)
    cos, sin = angles(make, 1, 5, 8)
    expected = op.rope(q, k, cos, sin)
    forms = [
        op.LigerRopeFunction.apply(q, k, cos, sin),
        op.LigerRopeFunction.apply(q, k, cos, sin, torch.arange(5), 1),
        module.liger_rotary_pos_emb(q, k, cos, sin, None, 1),
        module.liger_rotary_pos_emb(q, k, cos=cos, sin=sin, position_ids=None, unsqueeze_dim=1),
    ]
    *rotated, cos_out, sin_out = op.rope_forward(q, k, cos, sin)
    assert (cos_out is cos, sin_out is sin) == (True, True)
    for form in (*forms, rotated):
        assert all(torch.equal(a, b) for a, b in zip(form, expected, strict=True))
    back = op.rope_backward(*rotated, cos, sin)
    for i, (a, b) in enumerate(zip(back, (q, k), strict=True)):  # the inverse rotation
        assert_no_worse(f"input {i}", a, b, op.rope(expected[i], None, cos, -sin)[0])
    assert module.LigerRopeFunction is op.LigerRopeFunction


def test_legacy_forms_of_llama4() -> None:
    """Angles for more positions than there are, or as pairs of real numbers; the way back; a vision tower's cast."""
    make = Make(torch.float32)
    q, k = make.randn(2, 5, 4, 16), make.randn(2, 5, 2, 16)
    freqs = torch.view_as_complex(make.randn(7, 8, 2))
    expected = op.complex_rope(q, k, freqs[:5])
    back = op.complex_rope(q, k, freqs[:5].conj())
    forms = [
        (op.LigerLlama4RopeFunction.apply(q, k, freqs), expected),
        (op.llama4_rope_forward(q, k, torch.view_as_real(freqs)), expected),
        (op.llama4_rope_forward(q, k, freqs, imag_sign=-1.0), back),
        (
            op.complex_rope(q.transpose(1, 2), None, freqs[:5], 1)[0].transpose(1, 2)[None],
            expected[:1],
        ),
    ]
    vision, twice = module.liger_llama4_vision_rotary_pos_emb, torch.ones(5, 8) * 2
    forms += [(vision(q, k, twice.bfloat16()), (q * 2, k * 2))]
    for found, wanted in forms:
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"Unexpected freqs_ci shape \(7, 8\).*\(2, 5, 4, 16\)"):
        vision(q, k, freqs)
    with pytest.raises(TypeError, match="complex"):
        op.complex_rope(q, k, twice)
    modeling = SimpleNamespace()
    module.apply_liger_llama4_rope_full(modeling)
    assert modeling.apply_rotary_emb is module.liger_llama4_text_rotary_pos_emb
    assert modeling.vision_apply_rotary_emb is vision


def test_legacy_forms_of_qwen2_vl() -> None:
    make = Make(torch.float32)
    q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16)
    cos, sin = angles(make, 3, 2, 5, 8)
    *expected, _, _ = op.qwen2vl_mrope_forward(q, k, cos, sin, [2, 3, 3])
    back = op.qwen2vl_mrope_backward(*expected, cos, sin, [2, 3, 3])
    for form in (
        op.LigerQwen2VLMRopeFunction.apply(q, k, cos, sin, [2, 3, 3], 1),
        functional.liger_qwen2vl_mrope(q, k, cos, sin, [2, 3, 3]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(form, expected, strict=True))
    for i, (a, b) in enumerate(zip(back, (q, k), strict=True)):
        again = op.rope(expected[i], None, cos, -sin, mrope_section=(2, 3, 3))[0]
        assert_no_worse(f"input {i}", a, b, again)


def test_calls_the_op_through_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "rope", lambda *args, **kwargs: "replaced")
    x = torch.zeros(1, 1, 1, 2)
    assert module.liger_rotary_pos_emb(x, x, x, x) == "replaced"


def test_compiles_without_a_graph_break() -> None:
    make = Make(torch.float32)
    q, k = make.randn(2, 4, 5, 16), make.randn(2, 2, 5, 16)
    cos, sin = angles(make, 1, 5, 8)
    compiled = torch.compile(op.rope, fullgraph=True, backend="eager")
    for a, b in zip(compiled(q, k, cos, sin), op.rope(q, k, cos, sin), strict=True):
        assert_no_worse("output", a, b.double(), b)


#: arguments that do not fit (1, 2, 4, 8) heads, and what the error must name
WRONG = {
    "odd": ({"rotary_dim": 3}, "rotary_dim=3"),
    "too-wide": ({"rotary_dim": 10}, "rotary_dim=10.*8"),
    "zero": ({"rotary_dim": 0}, "rotary_dim=0"),
    "odd-default": ({"cos": (1, 4, 5), "sin": (1, 4, 5)}, "rotary_dim=5"),
    "narrow": ({"cos": (1, 4, 2), "sin": (1, 4, 2), "rotary_dim": 8}, "cos has 2.*rotary_dim=8"),
    "cos-length": ({"cos": (1, 3, 8), "sin": (1, 3, 8)}, r"\(1, 3, 8\).*\(1, 2, 4, 8\)"),
    "cos-batch": ({"cos": (2, 4, 8), "sin": (2, 4, 8)}, r"\(2, 4, 8\).*\(1, 2, 4, 8\)"),
    "cos-1d": ({"cos": (8,), "sin": (8,)}, r"\(8,\)"),
    "cos-heads": ({"cos": (1, 2, 4, 8), "sin": (1, 2, 4, 8)}, "axis of size 1"),
    "sin": ({"sin": (1, 4, 4)}, r"sin \(1, 4, 4\)"),
    "section": (
        {"cos": (3, 1, 4, 8), "sin": (3, 1, 4, 8), "mrope_section": [1, 1, 1]},
        r"\(1, 1, 1\).*to 4",
    ),
    "sections": (
        {"cos": (3, 1, 4, 8), "sin": (3, 1, 4, 8), "mrope_section": [2, 2]},
        r"\(2, 2\).*three",
    ),
    "tables": ({"mrope_section": [1, 1, 2]}, r"cos \(1, 4, 8\).*\(3, 1, 4, R\)"),
    "unsqueeze": ({"unsqueeze_dim": 3}, "unsqueeze_dim=3"),
    "k-batch": ({"k": (2, 2, 4, 8)}, "dimension 0"),
    "k-length": ({"k": (1, 2, 3, 8)}, "dimension 2"),
    "k-dim": ({"k": (1, 2, 4, 6)}, "dimension 3"),
    "k-rank": ({"k": (2, 4, 8)}, r"\(B, H, S, D\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error(name: str) -> None:
    arguments, message = WRONG[name]
    shapes = {"q": (1, 2, 4, 8), "k": (1, 2, 4, 8), "cos": (1, 4, 8), "sin": (1, 4, 8)} | arguments
    values = {key: torch.zeros(v) if isinstance(v, tuple) else v for key, v in shapes.items()}
    with pytest.raises(ValueError, match=message):
        op.rope(**values)
