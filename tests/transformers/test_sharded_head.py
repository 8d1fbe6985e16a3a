"""A patched model whose head is a sharded unit of its own, or has a sharded weight: losses and gradients of stock.

Both models are sharded in the same way, and every rank compares its shards. Two processes on the CPU; on two GPUs
where there are two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import assert_no_worse
from tests.transformers import ranks
from tests.transformers.steps import unrounded
from tests.transformers.tiny import batch, build

BATCHES, STEPS = 4, 3
VOCAB = 132  # divisible by the ranks, which transformers' tensor parallelism needs
Build = Callable[[torch.dtype, bool], nn.Module]


def llama(patched: bool, vocab: int = VOCAB) -> nn.Module:
    model = build("llama", vocab_size=vocab)
    if patched:
        liger_kernel.patch(model)
    return model


def fsdp1(dtype: torch.dtype, patched: bool, by_size: bool, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import CustomPolicy, size_based_auto_wrap_policy

    model = llama(patched)
    units = {model.lm_head, *model.model.layers}
    policy: Any = CustomPolicy(lambda module: module in units)
    if by_size:  # what accelerate offers; the head is the largest Linear
        policy = partial(size_based_auto_wrap_policy, min_num_params=6000)
    if dtype == torch.bfloat16:
        options["mixed_precision"] = MixedPrecision(dtype, dtype, dtype)
    if options.pop("offload", False):
        options["cpu_offload"] = CPUOffload(True)
    wrapped = FullyShardedDataParallel(
        model.double() if dtype == torch.float64 else model,
        auto_wrap_policy=policy,
        device_id=torch.device("cpu") if ranks.device() == "cpu" else torch.cuda.current_device(),
        **options,
    )
    assert isinstance(wrapped.get_output_embeddings(), FullyShardedDataParallel)
    return wrapped


def fsdp2_of_saved_head(dtype: torch.dtype, patched: bool) -> nn.Module:
    """PEFT trains a copy of the head, and the unit is what `get_output_embeddings` returns."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build("llama", vocab_size=VOCAB).to(ranks.device())
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    if dtype == torch.float64:
        model = model.double()
    if patched:
        liger_kernel.patch(model)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in model.parameters():  # FSDP2 wants one dtype in a unit
        p.data = p.data.to(wide)
    policy = (
        MixedPrecisionPolicy(dtype, wide) if dtype == torch.bfloat16 else MixedPrecisionPolicy()
    )
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(base.get_output_embeddings(), mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def tensor_parallel_head(
    dtype: torch.dtype, patched: bool, first: bool = True, vocab: int = VOCAB, **layouts: Any
) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = llama(patched and first, vocab).to(ranks.device(), dtype)
    mesh = init_device_mesh(ranks.device(), (ranks.WORLD,))
    style = ColwiseParallel(**{"output_layouts": Replicate(), **layouts})
    parallelize_module(model, mesh, {"lm_head": style})
    if patched and not first:
        liger_kernel.patch(model)
    return model


def tensor_parallel(dtype: torch.dtype, patched: bool, first: bool, folder: str) -> nn.Module:
    """transformers' own plan; the Auto class patches before the weights are sharded."""
    from transformers import AutoModelForCausalLM

    from liger_kernel.transformers import AutoLigerKernelForCausalLM

    auto = AutoLigerKernelForCausalLM if patched and first else AutoModelForCausalLM
    model = auto.from_pretrained(folder, tp_plan="auto", dtype=dtype)
    if patched and not first:
        liger_kernel.patch(model)
    return model


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def trained(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Losses of training and evaluation, the shard's gradients, and logits after steps of a stock optimiser."""
    where = next(model.parameters()).device if ranks.device() == "cpu" else ranks.device()
    inputs = [
        {name: t.to(where) for name, t in batch(seed=seed + 10 * i).items()} for i in range(BATCHES)
    ]
    found: dict[str, list[Tensor]] = defaultdict(list)
    with unrounded(model):
        for given in inputs:
            model.train()
            model.zero_grad()
            loss = model(**given, use_cache=False).loss
            assert loss.ndim == 0
            loss.backward()
            found["loss"].append(loss.detach())
            for name, p in model.named_parameters():
                if p.requires_grad and p.numel():
                    assert p.grad is not None, name
                    found[name.replace("_fsdp_wrapped_module.", "")].append(local(p.grad).clone())
            model.eval()
            with torch.no_grad():
                outputs = model(**given, use_cache=False)
                found["loss of evaluation"].append(outputs.loss)
                found["logits of evaluation"].append(local(outputs.logits))
        model.train()
        # of a small eps it would make whole steps of gradients that are nothing but rounding errors
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, eps=0.1, foreach=False)
        for given in inputs[:STEPS]:
            optimizer.zero_grad()
            model(**given, use_cache=False).loss.backward()
            optimizer.step()
        model.eval()
        for given in inputs:
            with torch.no_grad():
                outputs = model(**given, use_cache=False)
            found["logits after steps"].append(local(outputs.logits))
    return {name: torch.stack(values) for name, values in found.items()}


def check(rank: int, sharded: Build, dtype: torch.dtype, together: bool = False) -> None:
    """`together`: all ranks take one batch, as with tensor parallelism."""
    seed = 0 if together else rank
    model = sharded(dtype, True)
    ours = trained(model, seed)
    (row,) = (row for row in liger_kernel.patch(model).rows if row.kind == "loss")
    shards = f" over the classes of {ranks.WORLD} ranks" if together else ""
    assert row.by == f"fused linear cross entropy{shards}", row.reason
    low = trained(sharded(dtype, False), seed)
    high = trained(sharded(torch.float64, False), seed)
    assert ours.keys() == low.keys() == high.keys()
    for name, value in ours.items():
        assert_no_worse(name, value, high[name], low[name])


def not_known(rank: int) -> None:
    """Other layouts, and a hook of somebody beside those of the style: the report says who needs the logits."""
    from torch.distributed.tensor import Replicate, Shard

    def reason(model: nn.Module) -> str:
        rows = liger_kernel.patch(model).rows
        return next(row.reason for row in rows if row.kind == "loss")

    for layouts in (
        {"output_layouts": Shard(-1)},
        {"input_layouts": Shard(1)},
        {"use_local_output": False},
    ):
        sharded = tensor_parallel_head(torch.float32, True, **layouts)
        assert "torch.distributed.tensor" in reason(sharded), layouts
    model: Any = tensor_parallel_head(torch.float32, True, output_layouts=Replicate())
    handle = model.lm_head.register_forward_hook(lambda module, args, output: None)
    assert "hook" in reason(model)
    handle.remove()
    assert not reason(model)
    # a slice of the classes is one of real logits
    inputs = ranks.moved(batch())

    def loss(model: Any) -> Tensor:
        model.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[:, :120], labels.flatten().clamp(max=119)
        )
        found: Tensor = model.train()(**inputs).loss.detach()
        return found

    low, high = (tensor_parallel_head(d, False) for d in (torch.float32, torch.float64))
    with unrounded(high):
        exact = loss(high)
    assert_no_worse("loss", loss(model), exact, loss(low))


def checks(folder: str) -> dict[str, ranks.Check]:
    found: dict[str, ranks.Check] = {}

    def add(name: str, sharded: Build, together: bool = False, *dtypes: torch.dtype) -> None:
        for dtype in dtypes or (torch.float32, torch.bfloat16):
            short = str(dtype).removeprefix("torch.")
            found[f"{name}, {short}"] = partial(
                check, sharded=sharded, dtype=dtype, together=together
            )

    for orig in (True, False):
        add(
            f"fsdp1 head, use_orig_params={orig}",
            partial(fsdp1, by_size=False, use_orig_params=orig),
        )
    add("fsdp1 by size", partial(fsdp1, by_size=True, use_orig_params=True))
    if ranks.device() == "cuda":  # it pins memory
        offloaded = partial(fsdp1, by_size=True, use_orig_params=True, offload=True)
        add("fsdp1 with CPU offload", offloaded, False, torch.float32)
    if not ranks.LACKS_FSDP2:
        add("fsdp2 of PEFT's head", fsdp2_of_saved_head)
    uneven = partial(tensor_parallel_head, vocab=131)
    add("ColwiseParallel, V not divisible", uneven, True, torch.float32)
    found["other layouts"] = not_known
    for first in (True, False):
        when = "before" if first else "after"
        add(f"ColwiseParallel, patched {when}", partial(tensor_parallel_head, first=first), True)
        if Version(transformers.__version__) >= Version("5.17"):  # older plans shard otherwise
            plan = partial(tensor_parallel, first=first, folder=folder)
            add(f"tp_plan, patched {when}", plan, True)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("model")
    build("llama", vocab_size=VOCAB).save_pretrained(folder)
    return ranks.outcomes(partial(checks, str(folder)), tmp_path_factory, __name__)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", checks(""))
def test_as_stock(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)
