"""The row losses by name. torch.compile finds a loss by it; without a row here a loss runs outside the graph."""

from __future__ import annotations

import importlib
from typing import Any

#: name -> where its class is
ROW_LOSSES = {
    "cosine_similarity": "liger_kernel.loss_head.losses.cosine_similarity:CosineSimilarityLoss",
    "cross_entropy": "liger_kernel.loss_head.losses.cross_entropy:CrossEntropyLoss",
    "jsd": "liger_kernel.loss_head.losses.jsd:JSDLoss",
    "logprobs": "liger_kernel.loss_head.losses.logprobs:LogProbsLoss",
    "kl_div": "liger_kernel.loss_head.losses.kl_div:KLDivLoss",
    "tvd": "liger_kernel.loss_head.losses.tvd:TVDLoss",
    "vocab_parallel_cross_entropy": "liger_kernel.distributed.vocab_parallel_cross_entropy:ShardedCrossEntropyLoss",
    "vocab_parallel_logprobs": "liger_kernel.distributed.vocab_parallel_logprobs:ShardedLogProbsLoss",
}


def row_loss_class(name: str) -> Any:
    module, _, found = ROW_LOSSES[name].partition(":")
    return getattr(importlib.import_module(module), found)
