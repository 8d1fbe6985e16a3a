"""Which launches to compile where all of them are too many: every pair of choices once, and the extremes."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tests.aot.record import Variant

Choice = tuple[Any, ...]


def choices(variant: Variant) -> list[Choice]:
    """What was decided for this launch: the type of an argument, what is known of it, a constant, an option."""
    found: list[Choice] = [("type", *pair) for pair in variant.signature]
    found += [("constant", path, repr(value)) for path, value in variant.constants]
    known = dict(variant.attributes)
    found += [("known", i, repr(known.get((i,)))) for i in range(len(variant.signature))]
    found += [("option", name, value) for name, value in variant.options]
    return found


def dtypes(variant: Variant) -> Choice:
    return (variant.name, *sorted({kind for _, kind in variant.signature if kind[0] == "*"}))


def weight(variant: Variant) -> tuple[int, int]:
    """Elements of a tile, and the branches of the kernel that are compiled: what fills registers and shared memory."""
    constants = variant.named().values()
    return math.prod(v for v in constants if type(v) is int and v > 0), sum(
        v is True for v in constants
    )


def meetings(variants: list[Variant], size: int) -> list[Variant]:
    """Few launches of one kernel in which any `size` choices meet that meet in one of `variants`."""
    left = {v: set(itertools.combinations(choices(v), size)) for v in variants}
    chosen: list[Variant] = []
    covered: set[Any] = set()
    heap = [(-len(met), i, v) for i, (v, met) in enumerate(left.items())]
    heapq.heapify(heap)
    while heap:
        _, i, variant = heapq.heappop(heap)
        left[variant] -= covered
        new = len(left[variant])
        if heap and new < -heap[0][0]:  # another one may now bring more
            heapq.heappush(heap, (-new, i, variant))
        elif new:
            chosen.append(variant)
            covered |= left[variant]
    return chosen


def cover(variants: Iterable[Variant], size: int) -> list[Variant]:
    """`meetings` of each kernel, and of each kernel and its dtypes the heaviest launch."""
    kernels: dict[str, list[Variant]] = defaultdict(list)
    typed: dict[Choice, list[Variant]] = defaultdict(list)
    for variant in sorted(variants, key=str):
        kernels[variant.name].append(variant)
        typed[dtypes(variant)].append(variant)
    chosen = [max(group, key=weight) for group in typed.values()]
    chosen += [v for group in kernels.values() for v in meetings(group, size)]
    return list(dict.fromkeys(chosen))
