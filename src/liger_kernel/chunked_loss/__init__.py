"""Preference, policy and distillation losses on hidden states: the logits of a batch are never held.

Every name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "LigerFusedLinearCPOLoss": "cpo_loss",
    "LigerFusedLinearCosineSimilarityLoss": "cosine_similarity_loss",
    "LigerFusedLinearDPOLoss": "dpo_loss",
    "LigerFusedLinearGRPOLoss": "grpo_loss",
    "LigerFusedLinearJSDLoss": "jsd_loss",
    "LigerFusedLinearKTOLoss": "kto_loss",
    "LigerFusedLinearORPOLoss": "orpo_loss",
    "LigerFusedLinearSimPOLoss": "simpo_loss",
}

__all__ = [  # each is found by __getattr__
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCosineSimilarityLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
