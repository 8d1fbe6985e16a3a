"""The tiled feed-forward block as an autograd Function."""

from __future__ import annotations

from liger_kernel.compat.function import autograd_function
from liger_kernel.ops.tiled_mlp import apply_tiled_mlp as apply_tiled_mlp


def _tiled_mlp(fn, mlp_module, x, shards, compute_params=None):
    """Through `forward` and `backward` of a subclass, parameters of the module get their gradients in `.grad`."""
    return apply_tiled_mlp(fn, mlp_module, x, shards, compute_params)


LigerTiledMLPFunction = autograd_function("LigerTiledMLPFunction", _tiled_mlp)
