"""A head whose classes are spread over ranks, by torch's `ColwiseParallel` or by the plan of transformers.

Both put a DTensor in the place of the weight, and something around the head's forward that makes DTensors of its input
and whole, plain logits of its output. What that is made of is read, and where it is just this, the loss over the
vocabulary's shards takes the place of all of it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.distributed.vocab_parallel_cross_entropy import (
    vocab_parallel_linear_cross_entropy,
)
from liger_kernel.distributed.vocab_parallel_logprobs import vocab_parallel_linear_logprobs
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.ops.logprobs.contract import LogProbs
from liger_kernel.transformers import functional

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def group_of(head: nn.Module) -> Any:
    """The process group of a Linear that gives whole logits of the classes of all ranks; None for any other."""
    tensors = sys.modules.get("torch.distributed.tensor")
    weight: Any = head._parameters.get("weight")
    if tensors is None or torch.compiler.is_compiling() or not isinstance(weight, tensors.DTensor):
        return None
    mesh, by_class = weight.device_mesh, (tensors.Shard(0),)
    if mesh.ndim != 1 or any(
        p is not None and (not isinstance(p, tensors.DTensor) or p.placements != by_class)
        for p in head._parameters.values()
    ):
        return None
    whole = tensors.Replicate()
    known = _by_hooks(head, whole) or _by_forward(head, whole)
    return mesh.get_group() if known else None


def _by_hooks(head: nn.Module, whole: Any) -> bool:
    """By torch: one hook before and one after, each a lambda around a part of the style."""
    attributes = head.__dict__
    counts = [len(attributes[kind]) for kind in _HOOKS]
    if counts != [1, 1, 0, 0] or "forward" in attributes:
        return False
    from torch.distributed.tensor.parallel import ColwiseParallel

    before, after = (
        closure(next(iter(attributes[kind].values()))).get(name)
        for kind, name in zip(_HOOKS, ("input_fn", "output_fn"), strict=False)
    )
    return (
        isinstance(before, functools.partial)
        and isinstance(after, functools.partial)
        and before.func is ColwiseParallel._prepare_input_fn
        and after.func is ColwiseParallel._prepare_output_fn
        and before.args == ((whole,), (whole,))
        and after.args == ((whole,), True)
        and not before.keywords
        and not after.keywords
    )


def _by_forward(head: nn.Module, whole: Any) -> bool:
    """By transformers: a forward of the instance, around the one it had."""
    attributes = head.__dict__
    forward, plan = attributes.get("forward"), "transformers.distributed.tensor_parallel"
    if getattr(forward, "__module__", None) != plan or any(attributes[kind] for kind in _HOOKS):
        return False
    around = closure(forward)
    style: Any = around.get("self")
    beneath = around.get("original_forward")
    return (
        type(style) is sys.modules[plan].ColwiseParallel
        and inspect.ismethod(beneath)
        and beneath.__self__ is head
        and beneath.__name__ == "forward"
        and style.input_layouts == style.output_layouts == whole
        and style.use_local_output
        and not attributes.get("_hf_quantized_needs_local_tp")
    )


def closure(function: Any) -> dict[str, Any]:
    """The variables of an enclosing function that a function reads."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def sharded_cross_entropy(
    hidden: Tensor,
    weight: Any,
    target: Tensor,
    bias: Any = None,
    ce_weight: None = None,
    accum_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | None = None,
    **options: Any,
) -> Any:
    """As `functional.liger_fused_linear_cross_entropy`, of a weight and a bias that are DTensors of `group_of`."""
    outputs = vocab_parallel_linear_cross_entropy(
        hidden,
        weight.to_local(),
        target,
        weight.device_mesh.get_group(),
        None if bias is None else bias.to_local(),
        n_classes=weight.shape[0],
        chunks=ChunkOptions(accum_dtype, chunk_size, memory_budget, label_count),
        **options,
    )
    return functional._loss_or_output(outputs)


def sharded_logprobs(
    hidden: Tensor,
    weight: Any,
    ids: Tensor,
    *,
    bias: Any = None,
    accum_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | None = None,
    **options: Any,
) -> LogProbs:
    """As `linear_logprobs`, of a weight and a bias that are DTensors of `group_of`."""
    return vocab_parallel_linear_logprobs(
        hidden,
        weight.to_local(),
        ids,
        weight.device_mesh.get_group(),
        bias=None if bias is None else bias.to_local(),
        n_classes=weight.shape[0],
        chunks=ChunkOptions(accum_dtype, chunk_size, memory_budget, label_count),
        **options,
    )
