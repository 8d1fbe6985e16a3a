"""Functions of torch_npu with their documented signatures, semantics and limits, on the stand-in's device.

Written after op-plugin's documentation (docs/zh/custom_APIs/torch_npu, op_plugin_functions.yaml, derivatives.yaml) of
August 2026. What the documentation forbids raises here, so that code which passes has kept to it. Everything is
computed in float32 and rounded once, which the documentation says of RMSNorm only.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.npu_stand_in.device import to_device, to_host

#: how often each function was called
calls: Counter[str] = Counter()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"torch_npu (stand-in): {what}")


def _native(function: Callable[..., Any]) -> Callable[..., Any]:
    """Counts, checks the device and the dtypes, and hands the function float32 tensors of the CPU."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        tensors = [a for a in args if isinstance(a, Tensor)]
        for t in tensors:
            _require(t.device.type == "npu", f"a tensor on {t.device}")
            _require(t.dtype in FLOATS, f"{t.dtype}")
        with torch.no_grad():
            return function(*args, **kwargs)

    return checked


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [to_host(t).float() for t in tensors]


def _out(t: Tensor, like: Tensor | torch.dtype) -> Tensor:
    dtype = like if isinstance(like, torch.dtype) else like.dtype
    return to_device(t.to(dtype, copy=True).contiguous())


def _check_gamma(x: Tensor, gamma: Tensor) -> None:
    _require(2 <= x.ndim <= 8, f"self has {x.ndim} dimensions, not 2 to 8")
    _require(gamma.shape == x.shape[x.ndim - gamma.ndim :], f"gamma is {tuple(gamma.shape)}")
    fits = gamma.dtype in (x.dtype, torch.float32)
    _require(fits, f"self is {x.dtype} and gamma {gamma.dtype}")


@_native
def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    _check_gamma(self, gamma)
    x, g = _wide(self, gamma)
    dims = tuple(range(x.ndim - g.ndim, x.ndim))
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)
    return _out(x * rstd * g, self), _out(rstd, torch.float32)


@_native
def npu_rms_norm_backward(
    dy: Tensor, self: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    _check_gamma(self, gamma)
    _require(dy.shape == self.shape and dy.dtype == self.dtype, "dy is not like self")
    _require(rstd.dtype == torch.float32, f"rstd is {rstd.dtype}")
    _require(self.numel() > 0, "an empty tensor")
    grad, x, g, r = _wide(dy, self, gamma, rstd)
    dims = tuple(range(x.ndim - g.ndim, x.ndim))
    normed, scaled = x * r, grad * g
    dx = r * (scaled - normed * (scaled * normed).mean(dims, keepdim=True))
    dgamma = (grad * normed).sum(tuple(range(x.ndim - g.ndim)))
    return _out(dx, self), _out(dgamma, torch.float32)


@_native
def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    _require(x1.numel() > 0, "an empty tensor")
    _require(x1.shape == x2.shape, "x1 and x2 differ in shape")
    _require(x1.dtype == x2.dtype == gamma.dtype, "x1, x2 and gamma differ in dtype")
    x, other, g = _wide(x1, x2, gamma)
    s = (x + other).to(x1.dtype).float()
    dims = tuple(range(x.ndim - g.ndim, x.ndim))
    rstd = torch.rsqrt(s.square().mean(dims, keepdim=True) + epsilon)
    return _out(s * rstd * g, x1), _out(rstd, torch.float32), _out(s, x1)


def _check_packed(x: Tensor, dim: int, *grads: Tensor) -> None:
    _require(x.shape[dim] % 2 == 0, f"{x.shape[dim]} columns cannot be halved")
    half = list(x.shape)
    half[dim] //= 2
    for t in (x, *grads):
        _require(t.is_contiguous(), "a tensor that is not contiguous")
        _require(t.numel() > 0, "an empty tensor")
        _require(t.dtype == x.dtype, "tensors differ in dtype")
    _require(all(list(g.shape) == half for g in grads), "a gradient has another shape")


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x), x, dy)[0]


def _swiglu(x: Tensor, dim: int) -> Tensor:
    gate, up = x.chunk(2, dim)
    return F.silu(gate) * up


@_native
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    _check_packed(input, dim)
    return _out(_swiglu(*_wide(input), dim), input)


@_native
def npu_swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    _check_packed(input, dim, grad_output)
    dy, x = _wide(grad_output, input)
    return _out(_gradient(lambda t: _swiglu(t, dim), x, dy), input)


def _geglu(x: Tensor, dim: int, approximate: int, activate_left: bool) -> tuple[Tensor, Tensor]:
    left, right = x.chunk(2, dim)
    gate, up = (left, right) if activate_left else (right, left)
    gelu = F.gelu(gate, approximate="tanh" if approximate else "none")
    return gelu * up, gelu


@_native
def npu_geglu(
    self: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    _check_packed(self, dim)
    y, gelu = _geglu(*_wide(self), dim, approximate, activate_left)
    return _out(y, self), _out(gelu, self)


@_native
def npu_geglu_grad(
    grad_output: Tensor,
    self: Tensor,
    gelu: Tensor,
    dim: int = -1,
    approximate: int = 1,
    activate_left: bool = False,
) -> Tensor:
    """The gradient of up is taken from `gelu` as it was rounded."""
    _check_packed(self, dim, grad_output, gelu)
    dy, x, kept = _wide(grad_output, self, gelu)
    grad = _gradient(lambda t: _geglu(t, dim, approximate, activate_left)[0], x, dy)
    halves = list(grad.chunk(2, dim))
    halves[1 if activate_left else 0] = dy * kept
    return _out(torch.cat(halves, dim), self)


@_native
def npu_rotary_mul(
    input: Tensor,
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    """r1 and r2 are rounded to the dtype of input first."""
    _check_rotary(input, r1, r2, rotary_mode)
    x, c, s = _wide(input, r1.to(input.dtype), r2.to(input.dtype))
    if rotary_mode == "half":
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return _out(x * c + turned * s, input)


def _check_rotary(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    _require(mode in ("half", "interleave"), f"rotary_mode {mode!r}")
    _require(x.ndim == 4 and x.shape[-1] < 896 and x.shape[-1] % 2 == 0, f"{tuple(x.shape)}")
    _require(r1.shape == r2.shape and r1.ndim == 4 and r1.shape[-1] == x.shape[-1], "r1 and r2")
    heads = next((d for d in (1, 2) if r1.shape[d] == 1 and r1.shape[3 - d] == x.shape[3 - d]), 0)
    _require(heads > 0, f"r1 is {tuple(r1.shape)} for {tuple(x.shape)}")
    batches = (1,) if mode == "interleave" else (1, x.shape[0])
    _require(r1.shape[0] in batches, f"r1 is {tuple(r1.shape)} for {tuple(x.shape)}")
    batch, n_heads = x.shape[0], x.shape[heads]
    few = batch * n_heads < 1000 if mode == "interleave" else max(batch, n_heads) < 1000
    _require(few, f"{batch} batches of {n_heads} heads")
    _require(x.numel() > 0, "an empty tensor")


@_native
def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    group_list: Tensor,
    split_item: int = 0,
    group_type: int = -1,
    group_list_type: int = 0,
) -> list[Tensor]:
    """Of single tensors; what it writes for terms of an empty group is not documented, and NaN here."""
    (a,), (w,) = x, weight
    for t in (a, w, *(bias or ())):
        _require(t.device.type == "npu" and t.dtype in FLOATS, f"{t.dtype} on {t.device}")
        _require(t.numel() > 0, "an empty tensor")
    _require(a.dtype == w.dtype, f"x is {a.dtype}, weight {w.dtype}")
    _require(split_item in (2, 3) and group_list_type == 0, "one tensor, and ends of groups")
    _require(group_list.dtype == torch.int64 and group_list.ndim == 1, "group_list")
    _require(group_list.numel() <= 1024, f"{group_list.numel()} groups")
    ends = to_host(group_list).tolist()
    _require(ends == sorted(ends) and ends[0] >= 0, f"{ends} decrease")
    groups = list(zip([0, *ends], ends, strict=False))
    wide, factor = _wide(a, w)
    turned = a.mT.is_contiguous()
    _require(max(a.shape[0] if turned else a.shape[1], w.shape[-1], w.stride(-1)) < 65536, "size")
    if group_type == 0:
        _require(a.ndim == 2 and a.is_contiguous() and w.ndim == 3, "x or weight")
        _require(w.is_contiguous() or w.mT.is_contiguous(), "weight has gaps")
        _require(len(ends) == len(w) and ends[-1] == len(a), f"groups end at {ends}")
        found = torch.cat([wide[i:j] @ e for (i, j), e in zip(groups, factor, strict=True)])
        if bias is not None:
            kind = torch.float32 if a.dtype == torch.bfloat16 else a.dtype
            fits = bias[0].dtype == kind and bias[0].shape == (len(w), w.shape[2])
            _require(fits, f"bias is {bias[0].dtype}, {tuple(bias[0].shape)}")
            counts = torch.tensor([j - i for i, j in groups])
            found += _wide(bias[0])[0].repeat_interleave(counts, 0)
    else:
        _require(group_type == 2 and turned and w.is_contiguous(), "x is turned, weight is not")
        _require(bias is None and ends[-1] == a.shape[1] == len(w), f"groups end at {ends}")
        of_group = [wide[:, i:j] @ factor[i:j] for i, j in groups]
        nothing = torch.full_like(of_group[0], torch.nan)
        found = torch.stack(
            [g if j > i else nothing for g, (i, j) in zip(of_group, groups, strict=True)]
        )
    return [_out(found, a)]


def npu_fusion_attention(*args: Any, **kwargs: Any) -> Any:
    """Attention, which transformers imports where there is a torch_npu; models are tested with another one."""
    raise NotImplementedError("torch_npu (stand-in): no attention; attn_implementation='sdpa' has")
