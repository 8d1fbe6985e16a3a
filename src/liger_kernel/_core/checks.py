"""Argument checks: each raises `ValueError`/`TypeError` that names both values and the way out."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")


def check_last_dim(name: str, tensor: Tensor | None, size: int, of: str) -> None:
    """`tensor` must be 1-D with as many elements as the last dimension of `of`."""
    if tensor is not None and (tensor.ndim != 1 or tensor.shape[0] != size):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but the last dimension of {of} is {size}; "
            f"pass a tensor of shape ({size},)."
        )


def check_parameters(x: Tensor, **parameters: Tensor | None) -> None:
    """For an op over the last dimension of x: each parameter is None, or floating, on the device of x, and as long.

    One pass where all is well: a small model calls it a hundred times a step.
    """
    size, device = x.shape[-1], x.device
    for p in parameters.values():
        if p is not None and (
            p.shape != (size,) or p.device != device or not p.is_floating_point()
        ):
            break
    else:
        if x.is_floating_point():
            return
    check_floating(x=x, **parameters)
    for name, parameter in parameters.items():
        check_last_dim(name, parameter, size, "x")
    check_same_device(x=x, **parameters)


def check_same_device(**tensors: Tensor | None) -> None:
    first = None
    for t in tensors.values():
        if t is None or t.device == first:
            continue
        if first is None:
            first = t.device
            continue
        found = ", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"All tensors must be on one device, got {found}; move them with .to().")


def check_floating(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise TypeError(
                f"{name} must have a floating dtype, got {t.dtype}; convert it with .to()."
            )


def check_rows(x: Tensor) -> None:
    """For an op over the last dimension of x, without parameters."""
    check_floating(x=x)
    if x.ndim == 0:
        raise ValueError("x has shape (), but the op works over its last dimension; pass x[None].")


def check_scalar(name: str, tensor: Tensor, x: Tensor) -> None:
    """`tensor` must hold one floating number on the device of x."""
    check_floating(**{name: tensor})
    check_same_device(x=x, **{name: tensor})
    if tensor.numel() != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but it is one number; pass a tensor of shape (1,) or ()."
        )
