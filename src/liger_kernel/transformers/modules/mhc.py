"""Hyper-connections around a layer (mHC, Xie et al. 2025, https://arxiv.org/abs/2512.24880)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liger_kernel.transformers import functional


class LigerMHC(nn.Module):
    """`h_res x + h_post layer(h_pre x)` for `hc` residual streams, see `functional.liger_mhc_forward`.

    Args:
        layer: of one stream (..., c), whose first parameter says in which dtype it computes.
        hc: streams, any number of them. c: their width.
        tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult: as in `liger_kernel.ops.mhc_sinkhorn`.
        phi_dtype: of the projection `phi` (hc c, hc^2 + 2 hc). `b` and the alphas are fp32.
        allow_fp32: kept for callers that name it; fp32 streams are always computed.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        hc: int,
        c: int,
        tmax: int = 20,
        rms_eps: float = 1e-6,
        pre_eps: float = 0.0,
        sinkhorn_eps: float = 1e-6,
        post_mult: float = 2.0,
        phi_dtype: torch.dtype = torch.float16,
        allow_fp32: bool = False,
    ):
        super().__init__()
        self.layer, self.hc, self.c, self.tmax = layer, hc, c, tmax
        self.rms_eps, self.pre_eps, self.sinkhorn_eps = rms_eps, pre_eps, sinkhorn_eps
        self.post_mult, self.allow_fp32 = post_mult, allow_fp32
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        size = hc * hc + 2 * hc
        phi = 0.02 * torch.randn(hc * c, size, device=device)
        self.phi = nn.Parameter(phi.to(phi_dtype))
        self.b = nn.Parameter(torch.zeros(size, device=device))
        self.alpha_pre = nn.Parameter(torch.ones((), device=device))
        self.alpha_post = nn.Parameter(torch.ones((), device=device))
        self.alpha_res = nn.Parameter(torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Streams (..., hc, c), and the next ones."""
        if x.shape[-2:] != (self.hc, self.c):
            raise ValueError(
                f"Expected x.shape[-2:]=[{self.hc}, {self.c}], got {list(x.shape[-2:])}; pass (..., hc, c)."
            )
        found: Tensor = functional.liger_mhc_forward(
            x,
            self.layer,
            self.phi,
            self.b,
            self.alpha_pre,
            self.alpha_post,
            self.alpha_res,
            tmax=self.tmax,
            rms_eps=self.rms_eps,
            pre_eps=self.pre_eps,
            sinkhorn_eps=self.sinkhorn_eps,
            post_mult=self.post_mult,
        )
        return found

    def extra_repr(self) -> str:
        return f"hc={self.hc}, c={self.c}, tmax={self.tmax}"
