"""The names that Muse Glimmer is patched with."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers import LigerSwiGLUMLPForMuseGlimmer, monkey_patch


def test_muse_glimmer_by_decree() -> None:
    hf = pytest.importorskip("transformers.models.muse_glimmer.modeling_muse_glimmer")
    x = 3 * torch.randn(5, 48)
    free, centered = (
        hf.MuseGlimmerRMSNorm(48, with_scale=False),
        hf.MuseGlimmerTextCenteredRMSNorm(48),
    )
    with torch.no_grad():
        centered.weight.normal_()
    for norm, patch in (
        (free, monkey_patch._patch_muse_glimmer_scale_free_rms_norm_module),
        (centered, monkey_patch._patch_muse_glimmer_text_centered_rms_norm_module),
    ):
        expected, high = norm(x), copy.deepcopy(norm).double()(x.double())
        patch(norm)
        assert "Liger" in repr(norm)
        assert_no_worse("norm", norm(x), high, expected)
    with pytest.raises(ValueError, match=r"MuseGlimmerTextCenteredRMSNorm has a weight"):
        monkey_patch._patch_muse_glimmer_scale_free_rms_norm_module(centered)
    config = SimpleNamespace(hidden_size=8, intermediate_size=12, hidden_activation="silu")
    mlp = LigerSwiGLUMLPForMuseGlimmer(config)
    assert mlp(torch.randn(3, 8)).shape == (3, 8)
    config.hidden_activation = "relu"
    with pytest.raises(ValueError, match=r"'relu' not supported"):
        LigerSwiGLUMLPForMuseGlimmer(config)
    monkey_patch._bind_method_to_module(mlp, "doubled", lambda self, x: 2 * self(x))
    assert torch.equal(mlp.doubled(x[:, :8]), 2 * mlp(x[:, :8]))
