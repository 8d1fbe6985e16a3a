"""Whole models in bfloat16 with our Triton kernels: every kind of head, norm, MLP and rope among them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")


from tests.transformers.zoo import build, check, inputs

TYPES = [
    "apertus",
    "bamba",
    "bloom",
    "cohere",
    "cohere2",
    "deepseek_v3",
    "ernie4_5",
    "exaone4",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "jamba",
    "lfm2",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
    "stablelm",
    "starcoder2",
]
WITH_PIXELS = [
    "gemma3",
    "glm4v",
    "idefics3",
    "internvl",
    "llava",
    "paligemma",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
]
ENTRIES = {str(entry): entry for entry in build.ENTRIES}


pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")


def fused(name: str, image: bool = False) -> check.Result:
    entry = ENTRIES[name]
    make = inputs.image_inputs if image else inputs.inputs
    return check.run(entry, make, "image" if image else "text", "cuda", torch.bfloat16)


@pytest.mark.parametrize("name", TYPES)
def test_same_loss_and_gradients(name: str) -> None:
    result = fused(name)
    assert (result.status, result.loss) == ("ok", "fused"), result.line()
    assert result.calls.keys() & {"rms_norm", "layer_norm", "glu", "rope"}, result.line()


@pytest.mark.parametrize("name", WITH_PIXELS)
def test_same_loss_and_gradients_with_pixels(name: str) -> None:
    result = fused(name, image=True)
    assert (result.status, result.loss) == ("ok", "fused"), result.line()
