"""What the fused loss saves: the bytes of the head and the loss that are alive at once, without it and with it.

N tokens, H hidden size, V vocabulary; c bytes of a logit, w of a weight or a hidden state, a of an element of the sum
of the weight's gradient, r rows of a chunk.

Stock HF, as `ForCausalLMLoss` (it converts the logits to fp32) and `F.cross_entropy` are written:

    forward           logits cNV, their fp32 copy 4NV (none if they are fp32), log-probabilities 4NV
    loss, backward    log-probabilities 4NV, their gradient 4NV, that of the fp32 logits 4NV
    head, backward    gradients: of the logits cNV, of the weight wVH, of the hidden states wNH

A soft cap keeps its tanh, cNV, until the second line is done. Ours (`loss_head/loop.py`), all in
the forward:

    loop              gradient of the hidden states wNH, slab of logits crV, sum of the weight's gradient aVH
    end of the loop   gradient of the hidden states wNH, that sum aVH, and wVH into which it is rounded, if a is not w

Both hold a converted weight cVH under autocast. A frozen head has no gradient of the weight, a frozen body none of the
hidden states. Where no matrix product adds 16-bit factors into an fp32 sum, the loop holds a product cVH as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import autocast_dtype
from liger_kernel.loss_head.plan import ChunkOptions, ChunkPlan
from liger_kernel.transformers.patching.options import LOSS_OPTIONS, PatchOptions


def text_setting(model: nn.Module, name: str) -> Any:
    """From the configuration of the model, or of the text model in it; None where there is none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, name, None)


@dataclass(frozen=True)
class LossSite:
    """The head and the loss in one training step."""

    tokens: int
    weight: Tensor  # (V, H): shape, dtype and device of the head's, without its memory
    logits_dtype: torch.dtype
    needs_dx: bool
    needs_dw: bool
    softcap: bool
    options: PatchOptions

    @classmethod
    def of(
        cls, model: nn.Module, heads: Sequence[nn.Module], options: PatchOptions, tokens: int
    ) -> LossSite:
        """As things are now: what is frozen, which autocast is on."""
        head: Any = heads[0]
        device, dtype = head.weight.device, head.weight.dtype
        body = (m for m in model.modules() if all(m is not h for h in heads))
        return cls(
            tokens,
            torch.empty((), dtype=dtype, device=device).expand(head.out_features, head.in_features),
            autocast_dtype(head.weight) or dtype,
            any(p is not None and p.requires_grad for m in body for p in m._parameters.values()),
            any(p.requires_grad for h in heads for p in h.parameters()),
            text_setting(model, "final_logit_softcapping") is not None,
            options,
        )

    def _fixed(self) -> int:
        """The converted weight."""
        return self._of_weight(self.logits_dtype) if self.logits_dtype != self.weight.dtype else 0

    def _of_weight(self, dtype: torch.dtype) -> int:
        return self.weight.numel() * dtype.itemsize

    def _dx(self) -> int:
        return self.tokens * self.weight.shape[1] * self.weight.dtype.itemsize * self.needs_dx

    def gradients(self) -> int:
        """Those of the weight and of the hidden states, which outlive the loss."""
        return self._of_weight(self.weight.dtype) * self.needs_dw + self._dx()

    def stock(self) -> int:
        """Bytes at the worst moment without the fused loss."""
        elements = self.tokens * self.weight.shape[0]
        logits, wide = elements * self.logits_dtype.itemsize, elements * torch.float32.itemsize
        copy = 0 if self.logits_dtype == torch.float32 else wide
        tanh = logits * self.softcap
        moments = (logits + copy + wide + tanh, 3 * wide + tanh, logits + self.gradients())
        return self._fixed() + max(moments)

    def fused(self) -> int:
        """Bytes at the worst moment with it."""
        chosen = ChunkOptions(**{name: getattr(self.options, name) for name in LOSS_OPTIONS})
        plan = ChunkPlan.of(self.tokens, self.weight, self.logits_dtype, chosen, self.needs_dw)
        return self._fixed() + self._dx() + plan.peak_bytes()
