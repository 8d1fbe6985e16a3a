"""A patched model under DDP, FSDP2, FSDP1 and ZeRO-3 on two processes: the averaged gradients of the unpatched model.

On the CPU; on two GPUs where there are two.
ZeRO-3 is skipped without deepspeed, which HF's Trainer would import at every run. On Linux, beside the environment:

    python -m pip install --no-deps --target DIR deepspeed==0.19.8 einops hjson msgpack py-cpuinfo
    PYTHONPATH=DIR python -m pytest tests/transformers/test_distributed.py
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse
from liger_kernel.transformers.patching import adapters
from tests.transformers import ranks, tiled
from tests.transformers.steps import fused, move, unrounded
from tests.transformers.tiny import batch, build

HAS_PEFT = importlib.util.find_spec("peft") is not None
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def averaged_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of an unpatched model on both ranks' batches, in one process."""
    with unrounded(model):
        for rank in range(ranks.WORLD):
            (model(**ranks.moved(batch(seed=rank))).loss / ranks.WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_averaged(
    make: Callable[[torch.dtype], nn.Module], train: Callable[[nn.Module], nn.Module]
) -> None:
    """The gradients of the model that `train` returns are the averaged ones of `make`'s.

    Those of one batch are few numbers, which either side may round well by luck: more draws are the same batches with
    weights moved by a rounding error.
    """
    originals = [p.detach() for p in make(torch.float32).parameters()]

    def draw(seed: int) -> list[dict[str, torch.Tensor]]:
        models = [make(dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
        move(models, originals, seed)
        ours, high, low = (model.to(ranks.device()).train() for model in models)
        found = whole_gradients(train(ours)), averaged_gradients(high), averaged_gradients(low)
        return [ranks.of_all(run) for run in found]

    assert_draws_no_worse(draw)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in whole.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2_head_apart(model: nn.Module) -> nn.Module:
    """The head's weight is gathered only inside the head's own call."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    return fully_shard(model)


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model.layers[0]), type(model.lm_head)})
    where = next(model.parameters()).device
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=where
    )


def zero3(model: nn.Module) -> nn.Module:
    """Every parameter is partitioned, and whole only inside the call of the module that has it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo serves
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    assert model.lm_head.weight.numel() == 0
    return engine


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    if hasattr(model, "_fsdp_wrapped_module"):
        with type(model).summon_full_params(model, with_grads=True):
            return {
                n.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                for n, p in model.named_parameters()
            }
    if hasattr(model, "zero_optimization"):
        from deepspeed.utils import safe_get_full_grad

        return {
            n.removeprefix("module."): safe_get_full_grad(p) for n, p in model.named_parameters()
        }
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = grad
    return found


SCENARIOS = {
    f"{wrap.__name__}, patched {'before' if first else 'after'}{', tied' if tied else ''}": (
        wrap,
        first,
        tied,
    )
    for wrap in (ddp, fsdp2, fsdp2_head_apart, fsdp1, zero3)
    for first in (True, False)
    for tied in (False, True)
    # a tied weight belongs to one unit, and FSDP1 flattens the parameters that the proofs look at
    if not (tied and wrap in (fsdp2_head_apart, fsdp1)) and (first or wrap is not fsdp1)
}


def lacking(wrap: Callable[[nn.Module], nn.Module]) -> str:
    """What this machine lacks for it, if anything."""
    if wrap is zero3 and not HAS_DEEPSPEED:
        return "deepspeed is not installed"
    if wrap in (fsdp2, fsdp2_head_apart) and ranks.LACKS_FSDP2:
        return f"torch {torch.__version__} has no fully_shard on the CPU"
    return ""


def check(rank: int, wrap: Callable[[nn.Module], nn.Module], patch_first: bool, tied: bool) -> None:
    def train(model: nn.Module) -> nn.Module:
        if patch_first:
            liger_kernel.patch(model)
        wrapped = wrap(model)
        if not patch_first:
            liger_kernel.patch(model)
        for again in (True, False):  # ZeRO-3 fetches ahead in the second step, as in the first
            outputs = wrapped(**ranks.moved(batch(seed=rank)), use_cache=False)
            assert fused(outputs)
            getattr(wrapped, "backward", Tensor.backward)(outputs.loss)
            if again:
                getattr(wrapped, "step", wrapped.zero_grad)()
        return wrapped

    assert_averaged(lambda dtype: build("llama", dtype, tie_word_embeddings=tied), train)


#: of a model with adapters
ADAPTED = {f"{wrap.__name__} with LoRA": wrap for wrap in (ddp, fsdp2)}


def check_adapted(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    from tests.transformers.test_lora import adapted, counted

    def train(model: nn.Module) -> nn.Module:
        liger_kernel.patch(model)
        wrapped = wrap(model)
        with counted() as calls, pytest.MonkeyPatch.context() as small:
            small.setattr(adapters, "SMALL", 0)  # what a GPU leaves to PEFT
            wrapped(**ranks.moved(batch(seed=rank))).loss.backward()
        assert len(calls) == 14
        return wrapped

    assert_averaged(lambda dtype: adapted().to(dtype), train)


def checks() -> dict[str, ranks.Check]:
    os.environ["DS_ACCELERATOR"] = ranks.device()
    with_adapters = {
        name: partial(check_adapted, wrap=wrap)
        for name, wrap in ADAPTED.items()
        if HAS_PEFT and not lacking(wrap)
    }
    return (
        tiled.checks()
        | with_adapters
        | {
            name: partial(check, wrap=wrap, patch_first=first, tied=tied)
            for name, (wrap, first, tied) in SCENARIOS.items()
            if not lacking(wrap)
        }
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return ranks.outcomes(checks, tmp_path_factory, __name__)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_averaged_gradients(scenario: str, outcomes: list[dict[str, str]]) -> None:
    if lacking(SCENARIOS[scenario][0]):
        pytest.skip(lacking(SCENARIOS[scenario][0]))
    ranks.assert_passed(scenario, outcomes)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("scenario", tiled.checks())
def test_tiled_mlp(scenario: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(scenario, outcomes)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize("scenario", ADAPTED)
def test_lora(scenario: str, outcomes: list[dict[str, str]]) -> None:
    if lacking(ADAPTED[scenario]):
        pytest.skip(lacking(ADAPTED[scenario]))
    ranks.assert_passed(scenario, outcomes)
