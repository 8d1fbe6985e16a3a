"""The incumbent's names for log-probabilities of a head whose classes are spread over ranks."""

from __future__ import annotations

import torch.distributed as dist

from liger_kernel.compat.function import autograd_function
from liger_kernel.distributed.vocab_parallel_logprobs import vocab_parallel_linear_logprobs


def _scaled_cross_entropy_tp(
    _input, weight, target, tp_group, temperature=1.0, ignore_index=-100, tiles_per_reduce=1,
    return_entropy=False,
):  # fmt: skip
    """`LigerFusedLinearScaledCrossEntropyFunction` of the classes of this rank, as many as each rank of `tp_group` has
    (None: of all ranks).

    The gradient of `_input` is that of all classes. `tiles_per_reduce` is checked and changes nothing.
    """
    if type(tiles_per_reduce) is not int or tiles_per_reduce not in (1, 2, 4):
        raise ValueError(f"tiles_per_reduce must be 1, 2 or 4, got {tiles_per_reduce!r}.")
    if type(return_entropy) is not bool:
        raise TypeError(f"return_entropy must be a bool, got {return_entropy!r}.")
    if type(temperature) not in (int, float):
        raise TypeError(f"temperature must be a real number, got {temperature!r}.")
    if tp_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialized; call init_process_group.")
        tp_group = dist.group.WORLD
    return _apply_tp_fallback(
        _input, weight, target, temperature, ignore_index, return_entropy, tp_group
    )


def _apply_tp_fallback(
    _input, weight, target, temperature, ignore_index, return_entropy, process_group
):
    found = vocab_parallel_linear_logprobs(
        _input, weight, target, process_group,
        temperature=temperature, ignore_index=ignore_index, entropy=return_entropy,
    )  # fmt: skip
    nll = -found.log_prob
    return nll if found.entropy is None else (nll, found.entropy.to(_input.dtype))


LigerFusedLinearScaledCrossEntropyTPFunction = autograd_function(
    "LigerFusedLinearScaledCrossEntropyTPFunction", _scaled_cross_entropy_tp
)
