from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel._core.autograd import Recompute
from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel.ops.glu import reference
from liger_kernel.ops.glu.contract import GLUOptions

_recompute = Recompute(reference.glu)


def forward(gate: Tensor, up: Tensor | None, *, options: GLUOptions, needs: Needs) -> Any:
    return _recompute.forward(gate, up, options=options, needs=needs)


def backward(grads: Grads, saved: Saved, *, options: GLUOptions, needs: Needs) -> Any:
    return _recompute.backward(grads, saved, options=options, needs=needs)


def backward_with_output(
    dy: Tensor, saved: Saved, *, options: GLUOptions, needs: Needs, into: Grads | None = None
) -> Any:
    return _recompute.backward_with_output(dy, saved, options=options, needs=needs, into=into)
