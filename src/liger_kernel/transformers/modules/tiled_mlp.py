"""SwiGLU and GEGLU feed-forward blocks that are computed tile by tile, for long sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.ops.tiled_mlp import apply_tiled_mlp, tiled_mlp
from liger_kernel.transformers.modules.geglu import LigerGEGLUMLP
from liger_kernel.transformers.modules.swiglu import GatedMLP, LigerSwiGLUMLP
from liger_kernel.transformers.patching.linears import matmul_weight


class _Tiled(GatedMLP):
    """`num_shards`: the number of tiles; None for the default of `tiled_mlp`."""

    hidden_acts: tuple[str, ...]
    needs: str
    activation: str
    block: type[GatedMLP]

    def __init__(self, config: Any, num_shards: int | None = None):
        name = getattr(config, "hidden_act", self.hidden_acts[0])
        if name not in self.hidden_acts:
            raise ValueError(
                f"{type(self).__name__} requires {self.needs} activation, got {name!r}."
            )
        super().__init__(config)
        self.num_shards = num_shards

    def forward(self, x: Tensor) -> Tensor:
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = map(matmul_weight, linears)
        if gate is not None and up is not None and down is not None and gate.dtype == x.dtype:
            return tiled_mlp(x, gate, up, down, self.activation, self.num_shards)
        return apply_tiled_mlp(self.block.forward, self, x, self.num_shards)


class LigerTiledSwiGLUMLP(_Tiled):
    """`LigerSwiGLUMLP` in tiles of tokens: backward keeps x, and gate and up of one tile at a time.

    ValueError unless `config.hidden_act` is silu.
    """

    hidden_acts = ("silu", "swish")
    needs = "SiLU/Swish"
    activation = "silu"
    block = LigerSwiGLUMLP


class LigerTiledGEGLUMLP(_Tiled):
    """`LigerGEGLUMLP`, likewise; ValueError unless `config.hidden_act` is gelu, whose tanh form it computes."""

    hidden_acts = ("gelu", "gelu_new", "gelu_pytorch_tanh")
    needs = "GELU"
    activation = "gelu_tanh"
    block = LigerGEGLUMLP
