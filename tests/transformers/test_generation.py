"""Generation by a patched model into a static cache: the same tokens, for the same reasons."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

import liger_kernel
from liger_kernel.testing import assert_no_worse
from tests.transformers.tiny import batch, build


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_static_cache(
    model_type: str, search: dict[str, Any], calls: collections.Counter[str]
) -> None:
    """gemma2 has layers with a sliding window, whose static cache is shorter than what is generated."""
    inputs = batch(rows=2, length=6)
    del inputs["labels"]
    arguments = {
        **inputs, **search, "max_new_tokens": 12, "do_sample": False, "cache_implementation": "static",
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    model = build(model_type).eval()
    expected = model.generate(**arguments)
    exact = build(model_type, torch.float64).eval().generate(**arguments)
    liger_kernel.patch(model)
    calls.clear()
    ours = model.generate(**arguments)
    assert torch.equal(ours.sequences, expected.sequences)
    logits = [torch.stack(run.logits) for run in (ours, exact, expected)]
    assert_no_worse("logits", *logits)
    assert "Static" in type(ours.past_key_values).__name__
    norms = sum(row.kind == "norm" for row in liger_kernel.patch(model).replaced)
    assert calls["rms_norm"] + calls["fused_add_rms_norm"] == 12 * norms
    assert not calls["fused_linear_cross_entropy"]
