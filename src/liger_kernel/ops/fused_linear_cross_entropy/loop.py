"""The chunk loop, the same for every device: it owns one slab of logits and never holds (N, V) of anything."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_kernel._core.launch import cdiv
from liger_kernel.backends import implementation
from liger_kernel.ops.cross_entropy import rows as plain
from liger_kernel.ops.cross_entropy.rows import Options, Outputs, Rows, Totals
from liger_kernel.ops.fused_linear_cross_entropy.label_count import LabelCount
from liger_kernel.ops.fused_linear_cross_entropy.products import Head, WeightGradient, slab_width
from liger_kernel.ops.fused_linear_cross_entropy.units import Units, chunks, rows_to_walk

MIB = 2**20
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Settings:
    """Everything about a call that is no tensor."""

    options: Options
    return_z_loss: bool
    return_token_accuracy: bool
    return_predicted_tokens: bool
    dtype: torch.dtype  # of the logits and of the matrix products
    accum_dtype: torch.dtype | None
    chunk_size: int | None
    memory_budget: int | None
    label_count: LabelCount | int | None = None

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Of the outputs beside the loss."""
        return self.return_z_loss, self.return_token_accuracy, self.return_predicted_tokens


@dataclass(frozen=True)
class ChunkPolicy:
    """Rows per chunk: few enough to bound the slab, enough to keep the matrix products at full speed.

    Measured on an H100, bf16. 256 rows run at 0.72 of the speed of 2048. Each chunk reads and writes the sum of dW
    once; in fp32 that takes as long as 0.4 of its product at 2048 rows, as 0.8 at 1024: 28.2 against 25.6 ms for
    4096x2304x256000, 95.5 against 86.5 for 32768x2048x128256. Without dW, 1024 rows cost 4 % (17.4 against 16.7 ms),
    and its memory is there for a larger slab. Twice as many rows as these limits give are worth 0 to 3 % (6 % at
    H=1024), and another 500 MiB. They give 2048 rows at V=128k to V=256k, and 4096 at V=32k.
    """

    slab_bytes: int = 640 * MIB
    most_rows: int = 4096
    fewest_rows: int = 2048
    fewest_rows_narrow_sum: int = 1024  # where the sum of dW is no wider than the logits
    fewest_rows_cpu: int = 256
    slab_per_weight_cpu: float = 1.2  # there a small head is not worth a slab many times its size
    multiple: int = 256

    def rows(self, n_rows: int, weight: Tensor, settings: Settings, needs_dw: bool) -> int:
        """Rows per chunk, at least 1 and at most n_rows; `memory_budget` bounds the bytes of the slab.

        Where dW would otherwise need an fp32 sum (see `WeightGradient`), two large chunks are taken if that needs no
        more memory: 2.0 instead of 3.0 GiB for 8192x4096x128256. So memory never shrinks as the budget grows.
        """
        if settings.chunk_size is not None:
            return max(1, min(settings.chunk_size, n_rows))
        sum_dtype = settings.accum_dtype or torch.promote_types(weight.dtype, torch.float32)
        narrow_sum = needs_dw and sum_dtype.itemsize <= settings.dtype.itemsize
        rows = self._within(n_rows, weight, settings, narrow_sum)
        half = cdiv(cdiv(n_rows, 2), self.multiple) * self.multiple
        rounded = needs_dw and settings.accum_dtype is None and weight.dtype.itemsize == 2
        hidden = weight.shape[1]
        # in units of 2 V bytes: the sum costs H more in the loop, and 2 H when it is rounded and the slab is gone
        if rounded and rows < half <= max(hidden + rows, 2 * hidden):
            rows = half
        return max(1, min(rows, n_rows))

    def _within(self, n_rows: int, weight: Tensor, settings: Settings, narrow_sum: bool) -> int:
        row_bytes = slab_width(weight) * settings.dtype.itemsize
        budget = settings.memory_budget
        if budget is not None:
            if budget < row_bytes:
                raise ValueError(
                    f"memory_budget={budget} bytes do not hold one row of logits, {row_bytes} bytes "
                    f"({weight.shape[0]} classes in {settings.dtype}); allow more."
                )
            rows = budget // row_bytes
            return rows - rows % self.multiple if rows > self.multiple else rows
        allowed = self.slab_bytes
        fewest = self.fewest_rows_narrow_sum if narrow_sum else self.fewest_rows
        if weight.device.type == "cpu":
            per_weight = self.slab_per_weight_cpu * weight.numel() * settings.dtype.itemsize
            allowed, fewest = min(allowed, int(per_weight)), self.fewest_rows_cpu
        rows = min(self.most_rows, max(fewest, allowed // max(1, row_bytes)))
        rows = 1 << (rows.bit_length() - 1)
        # as many chunks, but no short one at the end, and two rather than one: they cost no more time
        chunks = max(
            cdiv(n_rows, rows), 2 if n_rows >= 2 * min(fewest, self.fewest_rows_narrow_sum) else 1
        )
        return min(rows, cdiv(cdiv(n_rows, chunks), self.multiple) * self.multiple)


POLICY = ChunkPolicy()


@torch.no_grad()
def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    settings: Settings,
    needs: Sequence[bool],
    row_scale: Tensor | Units | None = None,
) -> tuple[Outputs, Gradients]:
    """Loss terms of `hidden @ weight.T + bias`, and the gradients of sum(loss * row_scale) that `needs` asks for.

    hidden (N, H), weight (V, H), bias (V,), target (N,), class_weight (V,), row_scale (N,), or what makes it of the
    losses. The gradients are those of hidden, weight and bias, in their dtypes. Rows with an ignored label are left out
    where their number is known.
    """
    target = target.to(torch.int64).contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    units = row_scale if isinstance(row_scale, Units) else None
    # `.sum().backward()` hands an expanded scalar to backward
    row_scale = row_scale.contiguous() if isinstance(row_scale, Tensor) else None
    step = getattr(implementation("cross_entropy", hidden), "step", plain.step)
    needs_dx, needs_dw, needs_db = needs
    dtype, options = settings.dtype, settings.options
    totals = Totals.of(target, class_weight, options, settings.return_token_accuracy)
    kept, sizes = rows_to_walk(target, options.ignore_index, settings.label_count, units)
    if kept is not None:
        target = target[kept]
        row_scale = None if row_scale is None else row_scale[kept]
    n_rows, n_classes = target.shape[0], weight.shape[0]
    walk = chunks(n_rows, POLICY.rows(n_rows, weight, settings, needs_dw), sizes)

    out = Rows.empty(target, torch.promote_types(dtype, torch.float32), *settings.wanted)
    new_dx = torch.empty if kept is None else torch.zeros
    dx = new_dx(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_dx else None
    dw = WeightGradient(weight, len(walk), settings.accum_dtype) if needs_dw else None
    db = torch.zeros(n_classes, dtype=out.loss.dtype, device=hidden.device) if needs_db else None

    unit = None
    if units is None and row_scale is None and any(needs) and (dw is None or dw.takes_large(dtype)):
        unit = plain.gradient_unit(dtype, options, totals, hidden.device)
        row_scale = None if unit is None else unit.expand(n_rows).contiguous()

    b = None if bias is None else bias.to(dtype)
    head = Head(weight.to(dtype), b, may_pad=step is not plain.step)
    padded = head.width != n_classes
    most = max((at.stop - at.start for at in walk), default=0)
    slab = torch.empty(most, head.width, dtype=dtype, device=hidden.device)

    def chunk(at: slice, rows: Tensor) -> None:
        where, logits = at if kept is None else kept[at], rows[:, :n_classes]
        x = hidden[where].to(dtype)
        head.project(x, rows)
        scale = None if row_scale is None else row_scale[at]
        if units is not None:
            step(logits, target[at], class_weight, totals, options, out[at], padded=padded)
            scale = units.row_scale(out.loss[at], where)
        dlogits = logits if any(needs) else None  # from here on the slab holds its own gradient
        step(logits, target[at], class_weight, totals, options, out[at], dlogits, scale, padded)
        if dx is not None:
            head.back(rows, dx, where)
        if dw is not None:
            dw.add(head, rows, x)
        if db is not None:
            db.add_(logits.sum(0, dtype=db.dtype))

    with _no_autocast(hidden.device.type):
        for at in walk:
            chunk(at, slab[: at.stop - at.start])
    del slab  # its memory serves the rounding of dw
    grads = (
        dx,
        None if dw is None else dw.result(),
        None if db is None or bias is None else db.to(bias.dtype),
    )
    if unit is not None:
        scale_(grads, 1 / unit)
    if kept is not None:
        out = out.spread(kept, hidden.shape[0])
    return out.reduced(options, totals), grads


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def scale_(buffers: Gradients, factor: Tensor) -> None:
    """Multiply what is there by the 0-d `factor`, in place."""
    impl = implementation("cross_entropy", factor)
    getattr(impl, "scale_", plain.scale_)(buffers, factor)
