"""Whether this release of torch can tell who else holds what a node saves for its backward."""

from __future__ import annotations

import pytest
import torch

#: torch 2.6 cannot: nothing is written over there, no layer is captured, and a checkpoint keeps what its forward saved
TORCH_TELLS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
where_torch_tells = pytest.mark.skipif(
    not TORCH_TELLS, reason="torch 2.6 cannot tell who holds what a node saves"
)
