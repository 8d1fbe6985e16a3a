"""Models in parts: accelerate's hooks of `device_map` and offloading, which wrap the forwards of modules."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

import liger_kernel
from liger_kernel.transformers.patching.deferred import DeferredLogits
from tests.transformers.steps import assert_all_no_worse
from tests.transformers.tiny import batch, build

Split = Callable[[nn.Module, Path], nn.Module]


def all_to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def all_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, folder, execution_device="cpu")


def some_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    where = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    where = {f"model.{name}": device for name, device in where.items()}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    return dispatch_model(model, where, offload_dir=folder)


def hooks_alone(model: nn.Module, folder: Path) -> nn.Module:
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def step(model: nn.Module) -> dict[str, Tensor]:
    """The loss, the gradient of the embeddings, and those of the parameters that are not offloaded."""
    inputs = batch()
    weight = build("llama", torch.float64).get_input_embeddings().weight
    embeddings = weight[inputs.pop("input_ids")].detach().to(model.dtype).requires_grad_()
    loss = model.train()(inputs_embeds=embeddings, use_cache=False, **inputs).loss
    loss.backward()
    found = {"loss": loss.detach(), "embeddings": embeddings.grad}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, **grads}


SPLITS = [(split, False) for split in (all_to_cpu, all_to_disk, some_to_disk, hooks_alone)]
SPLITS += [(split, True) for split in (all_to_cpu, all_to_disk, hooks_alone)]


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(("split", "tied"), SPLITS)
def test_a_model_in_parts(
    split: Split, tied: bool, patch_first: bool, tmp_path: Path, calls: collections.Counter[str]
) -> None:
    overrides = {"tie_word_embeddings": tied}
    stock = split(build("llama", **overrides), tmp_path / "stock")
    high = build("llama", torch.float64, **overrides)
    model = build("llama", **overrides)
    if patch_first:
        report = liger_kernel.patch(model)
    split(model, tmp_path / "ours")
    if not patch_first:
        report = liger_kernel.patch(model)
    reasons = {row.reason for row in report.skipped}  # hooks on norms are to see tensors
    assert reasons <= {"input_layernorm is hooked, or no norm of ours any more"}, str(report)
    low = step(stock)
    calls.clear()
    ours = step(model)
    assert calls["fused_linear_cross_entropy"] + calls["cross_entropy"] >= 1
    assert calls["rms_norm"] == 5
    assert calls["glu"] == calls["rope"] == 2
    exact = step(high)
    assert len(ours) >= (15 if split is some_to_disk else 2)
    assert_all_no_worse(ours, {name: exact[name] for name in ours}, low)

    liger_kernel.unpatch(model)
    calls.clear()
    assert all(torch.equal(value, low[name]) for name, value in step(model).items())
    assert not calls


def test_hooks_come_and_go() -> None:
    """Removed after the patch, or before it: accelerate leaves a `forward` on each module, which is nobody's."""
    expected = step(build("llama"))
    model = hooks_alone(build("llama"), Path())
    remove_hook_from_module(model, recurse=True)
    assert not liger_kernel.patch(model).skipped
    hooks_alone(model, Path())
    remove_hook_from_module(model, recurse=True)
    ours = step(model)
    assert_all_no_worse(ours, step(build("llama", torch.float64)), expected)
    liger_kernel.unpatch(model)
    assert type(model.lm_head) is nn.Linear
    assert all(torch.equal(value, expected[name]) for name, value in step(model).items())


def test_someone_elses_forward_under_a_hook_is_left_alone() -> None:
    model = build("llama")
    model.model.norm.forward = lambda x: x
    hooks_alone(model, Path())
    rows = liger_kernel.patch(model).skipped
    (skipped,) = (row for row in rows if row.kind != "residual")
    assert skipped.path == "model.norm"
    assert "already replaced" in skipped.reason


def test_saved_activations_elsewhere() -> None:
    """What the ops keep for backward goes through autograd's hooks, as TRL's `activation_offloading` needs it."""
    model = build("llama")
    liger_kernel.patch(model)
    expected = step(model)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
        ours = step(model)
    assert packed
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_logits_go_to_another_device_unmade() -> None:
    """As all outputs of a model in parts do, to the device of its inputs."""
    model = build("llama")
    liger_kernel.patch(model)
    logits = dict(model.train()(**batch()).items())["logits"]
    moved = logits.to("meta")
    assert isinstance(moved, DeferredLogits)
    assert moved.device.type == "meta"
    assert logits.device.type == "cpu"
    assert moved.materialize().device.type == "meta"


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(("layer", "head"), [("cpu", "cpu"), (1, 0), (1, 1)])
def test_a_model_on_gpus(layer: str | int, head: str | int, patch_first: bool) -> None:
    """Inputs and labels come in on the CPU; a layer and the head run on another GPU, or are fetched from the CPU."""
    if torch.cuda.device_count() < (2 if layer == 1 else 1):
        pytest.skip("not enough GPUs")

    def split(model: nn.Module) -> nn.Module:
        where = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), 0)
        where |= {"model.norm": 0, "model.layers.1": layer, "lm_head": head}
        return dispatch_model(model, where, main_device=0)

    model = build("llama")
    if patch_first:
        liger_kernel.patch(model)
    split(model)
    if not patch_first:
        assert not liger_kernel.patch(model).skipped
    logits = dict(model.train()(**batch(), use_cache=False).items())["logits"]
    assert isinstance(logits, DeferredLogits)
    assert logits.device == logits.materialize().device == torch.device("cpu")
    runs = [step(one) for one in (model, build("llama", torch.float64), split(build("llama")))]
    ours, high, low = ({name: t.cpu() for name, t in run.items()} for run in runs)
    assert_all_no_worse(ours, {name: high[name] for name in ours}, low)
