"""Inputs of GroupNorm for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.ops.group_norm import group_norm, reference
from liger_kernel.testing import Inputs, Make, OpSpec, case


def of(
    *shape: int, draw: Any = Make.randn, weight: bool = True, bias: bool = True, **how: float
) -> Inputs:
    def inputs(make: Make) -> Any:
        affine = (make.randn(shape[1]) if wanted else None for wanted in (weight, bias))
        return draw(make, *shape, **how), *affine

    return inputs


def _views(make: Make) -> Any:
    return make.randn(3, 6, 5), make.randn(12)[::2], make.randn(1).expand(6)


def _far_channels(make: Make) -> Any:
    """Means far from zero, and another one in each tile of a group."""
    x = make.randn(2, 6, 16384)
    means = 100.0 * make.randn(1, 6, 1).float()
    return (x.float() + means).to(x.dtype), make.randn(6), make.randn(6)


CASES = (
    case("images", "as in vision models, several channels a tile", of(3, 24, 5, 7), num_groups=4),
    case("no-bias", "a weight alone", of(2, 8, 9, bias=False), num_groups=2),
    case("no-weight", "a bias alone", of(2, 8, 9, weight=False), num_groups=2),
    case("plain", "no affine part", of(2, 8, 9, weight=False, bias=False), num_groups=4),
    case("one-group", "LayerNorm of all but the batch", of(3, 6, 11), num_groups=1),
    case("instance", "a group for each channel", of(3, 6, 11), num_groups=6),
    case("one-image", "batch of one", of(1, 10, 33), num_groups=5),
    case("no-images", "empty batch: gradients of zero, not of garbage", of(0, 8, 5), num_groups=2),
    case("no-positions", "(B, C)", of(5, 12), num_groups=3),
    case("many-channels", "several tiles of whole channels", of(2, 140, 130), num_groups=2),
    case("long-channel", "tiles of a part of a channel", of(2, 3, 16384 + 40), num_groups=1),
    case("longer-channel", "in several tiles each", of(1, 4, 40000), num_groups=2),
    case("strided", "channels with gaps", of(2, 6, 5, 8, draw=Make.strided), num_groups=3),
    case("channels-last", "copied", of(2, 6, 5, 8, draw=Make.transposed), num_groups=3),
    case("expanded", "stride 0", of(4, 6, 10, draw=Make.expanded), num_groups=3),
    case("parameter-views", "a weight with gaps, a bias with stride 0", _views, num_groups=3),
    case("far-mean", "one-pass variance would cancel", of(3, 8, 60, shift=100), num_groups=2),
    case("far-channels", "likewise, of one group", _far_channels, num_groups=1),
    case("tiny-values", "eps dominates", of(2, 8, 40, scale=1e-4), num_groups=2, eps=1e-6),
    case("32x512x4096", "the usual benchmark size", of(32, 512, 4096), num_groups=32, large=True),
    case("16x320x64x64", "the widest layer of SD", of(16, 320, 64, 64), num_groups=32, large=True),
    case("64x1280x16x16", "a deep layer of SD", of(64, 1280, 16, 16), num_groups=32, large=True),
)
SPEC = OpSpec(
    name="group_norm",
    function=group_norm,
    reference=reference.group_norm,
    cases=CASES,
    differentiable=(0, 1, 2),
    defaults={"eps": 1e-5},
    traffic=(5, (0,)),
)
