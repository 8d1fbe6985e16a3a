"""Dropout and random states on a GPU: a proof leaves its generator alone, and a patched model drops what HF's does."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import liger_kernel
from liger_kernel.transformers.patching.sites import experts, mlps, norms, relu_squared, rope
from tests.transformers.zoo import build, check, inputs


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "seed_oss"])
def test_no_generator_is_touched(model_type: str) -> None:
    (entry,) = (e for e in build.ENTRIES if str(e) == model_type)
    for site in (experts, mlps, norms, relu_squared):
        site.find_plan.cache_clear()
    rope.prove.cache_clear()
    model = check.built(entry, 0.2).to("cuda")
    torch.manual_seed(7)
    torch.cuda.manual_seed_all(8)
    before = torch.cuda.get_rng_state_all()
    for _ in range(2):
        assert liger_kernel.patch(model).replaced
        liger_kernel.unpatch(model)
    after = torch.cuda.get_rng_state_all()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "modernbert-decoder", "seed_oss"])
def test_the_same_is_dropped(model_type: str) -> None:
    (entry,) = (e for e in build.ENTRIES if str(e) == model_type)
    result = check.run(entry, inputs.inputs, "text", "cuda", torch.bfloat16)
    assert result.status == "ok", result.line()
    assert result.drops
