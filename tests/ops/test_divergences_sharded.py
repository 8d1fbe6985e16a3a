"""KL divergence, JSD and total variation distance of DTensors on two processes: what one process makes of it all."""

from __future__ import annotations

import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from liger_kernel import backends
from liger_kernel.ops.fused_ce_tvd import fused_ce_tvd
from liger_kernel.ops.jsd import jsd
from liger_kernel.ops.kl_div import kl_div
from liger_kernel.ops.tvd import tvd
from liger_kernel.testing import Make, assert_no_worse

LOSSES: dict[str, Any] = {
    "kl_div": lambda x, y, labels: kl_div(x, y.exp()),
    "kl_div-mean": lambda x, y, labels: kl_div(x, y, "mean", log_target=True),
    "jsd": partial(jsd, beta=0.3),
    "jsd-unlabelled": lambda x, y, labels: jsd(x, y),
    "tvd-sum": partial(tvd, reduction="sum"),
    "tvd-mean": partial(tvd, reduction="mean"),
    "ce-tvd": lambda x, y, labels: sum(t.square().sum() for t in fused_ce_tvd(x, y, labels)),
    "tvd-none": lambda x, y, labels: tvd(x, y, labels, "none").square().sum(),
}


def check(loss: Any, dtype: torch.dtype, placement: Any, split_labels: bool) -> None:
    """Seven rows: the first rank holds one more than the second, and two of the three that are ignored."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    make, mesh = Make(dtype), DeviceMesh("cpu", [0, 1])
    x, y = (make.randn(7, 30).log_softmax(-1) for _ in range(2))
    labels: Any = torch.tensor([1, -100, 2, -100, 3, -100, 1])

    def whole(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        found = loss(leaf, y.to(dtype), labels)
        return found.detach(), torch.autograd.grad(found, leaf)[0]

    low = whole(dtype)
    with backends.use_implementation("reference"):
        high = whole(torch.float64)
    shards: Any = distribute_tensor(x, mesh, [placement]).requires_grad_()
    others = distribute_tensor(y, mesh, [placement])
    found = loss(
        shards, others, distribute_tensor(labels, mesh, [Shard(0)]) if split_labels else labels
    )
    found.backward()
    ours = found.full_tensor().detach(), shards.grad.full_tensor()
    for what, *values in zip(("loss", "gradient"), ours, high, low, strict=True):
        assert_no_worse(what, *values)


def worker(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Replicate, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    failed = []
    for implementation in ("reference", "triton"):
        for name, loss in LOSSES.items():
            for placement in (Shard(0), Shard(1), Replicate()):
                for split_labels, dtype in ((False, torch.float32), (True, torch.float16)):
                    try:
                        with backends.use_implementation(implementation):
                            check(loss, dtype, placement, split_labels)
                    except Exception:
                        where = implementation, name, placement, split_labels, dtype
                        failed.append(f"{where}\n{traceback.format_exc(limit=-3)}")
    Path(folder, f"failed.{rank}").write_text("\n".join(failed))
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs, whose kernels are interpreted")
def test_two_ranks_are_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        failed = (tmp_path / f"failed.{rank}").read_text()
        assert not failed, failed
