"""PolyNorm in plain PyTorch: the specification."""

import torch
from torch import Tensor


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y = w0 n(x^3) + w1 n(x^2) + w2 n(x) + b with n(u) = u / sqrt(mean(u^2) + eps), over the last dimension.

    All of it in fp32 (float64 for float64 input), rounded once to the dtype of x. The powers are those of u = n(x), and
    eps is scaled as they are: in fp32, x^6 is infinite beyond 2.6e6.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    values, (third, second, first) = x.to(compute), weight.to(compute).unbind()
    r = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    u, r_squared = values * r, r.square()
    y = first * u + bias.to(compute).reshape(())
    for factor, power, share in (
        (second, u**2, eps * r_squared * r_squared),
        (third, u**3, eps * r_squared * r_squared * r_squared),
    ):
        y = y + factor * (power * torch.rsqrt(power.square().mean(-1, keepdim=True) + share))
    return y.to(x.dtype).contiguous()
