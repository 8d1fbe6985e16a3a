"""Linears and MLPs with adapters of PEFT: what is kept for backward, and what a checkpoint repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel import backends, functional
from liger_kernel.ops import lora_linear as op
from liger_kernel.ops import lora_mlp
from liger_kernel.ops.lora_linear import lora_linear
from liger_kernel.testing import assert_no_worse
from tests.transformers.test_lora import LINEARS, Found, adapted, step
from tests.transformers.tiny import batch
from tests.who_keeps import TORCH_TELLS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")


class TestMemory:
    def kept(self, model: nn.Module) -> int:
        """Bytes that autograd keeps of the layers, without their weights."""
        of_model = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in of_model:
                found.setdefault(t.untyped_storage().data_ptr(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**batch(4, 64))
        return sum(t.untyped_storage().nbytes() for t in found.values())

    def test_frozen_weights_keep_no_input(self) -> None:
        """LoRA-FA trains B alone."""
        x, w = torch.randn(50, 64, requires_grad=True) * 1, torch.randn(32, 64)
        b = torch.randn(32, 2, requires_grad=True)
        for frozen in (True, False):
            a = torch.randn(2, 64, requires_grad=not frozen)
            y = lora_linear(x, w, None, a, b)
            kept = [t.shape for t in y.grad_fn.saved_tensors if t is not None]
            assert (x.shape in kept) != frozen

    def test_the_product_of_an_mlp_is_not_kept(self) -> None:
        model = adapted(target_modules=LINEARS[4:])
        mlp = model.base_model.model.model.layers[0].mlp
        liger_kernel.patch(model, lora=False)
        before = self.kept(model)
        liger_kernel.patch(model)
        n_layers, tokens = model.config.num_hidden_layers, 4 * 64
        assert before - self.kept(model) >= n_layers * tokens * mlp.gate_proj.out_features * 4

    @pytest.mark.parametrize("made_by", ["norm", "sum and norm"])
    @pytest.mark.parametrize("read_by", [lora_linear, lora_mlp.lora_mlp])
    def test_what_a_norm_made_is_not_kept(self, read_by: Any, made_by: str) -> None:
        """The gradient of A is made of what the norm keeps; with hooks on saved tensors, x is kept as ever."""
        torch.manual_seed(0)
        h, w = torch.randn(7, 16), 1 + 0.1 * torch.randn(16)
        sizes = ((24, 16), (24, 16), (16, 24))
        dense = [torch.randn(size) for size in sizes]
        thin = [torch.randn(s) for o, i in sizes for s in ((3, i), (o, 3))]

        def run(dtype: torch.dtype) -> tuple[Found, bool]:
            leaves = [t.to(DEVICE, dtype, copy=True).requires_grad_() for t in (h, w, *thin)]
            of_norm, of_thin = leaves[:2], leaves[2:]
            if made_by == "norm":
                x = functional.rms_norm(*of_norm, offset=0.5)
            else:
                x, _ = functional.fused_add_rms_norm(of_norm[0], 2 * of_norm[0], of_norm[1])
            fixed = [t.to(DEVICE, dtype) for t in dense]
            given = [fixed[0], None, *of_thin[:2]] if read_by is lora_linear else [*fixed, *of_thin]
            y = read_by(x, *given)
            node = getattr(y.grad_fn, "node", y.grad_fn)  # that of a block keeps what it needs
            kept = [t.data_ptr() for t in getattr(node, "saved_tensors", ()) if t is not None]
            y.sin().sum().backward()
            grads = {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
            return {"y": y.detach(), **grads}, x.data_ptr() in kept

        with backends.use_implementation("triton"):
            found, kept = run(torch.float32)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                plain, kept_by_hooks = run(torch.float32)
        exact, _ = run(torch.float64)
        assert kept is not TORCH_TELLS
        assert kept_by_hooks
        for name, value in found.items():
            assert_no_worse(name, value, exact[name], plain[name])

    def test_a_checkpoint_does_not_repeat_the_last_product_of_an_mlp(self) -> None:
        """Nothing that it saves comes after it."""
        model = adapted(target_modules=LINEARS[4:])
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        liger_kernel.patch(model)
        with pytest.MonkeyPatch.context() as patch:
            made: list[Any] = []
            forward = op.Base.forward
            patch.setattr(op.Base, "forward", lambda *args: made.append(args) or forward(*args))
            step(model)
        assert len(made) == model.config.num_hidden_layers * (3 + 2)
