"""FSDP2 by PyTorch alone: patch, then shard. Two processes, on CPUs or GPUs.

torchrun --nproc_per_node 2 -m examples.fsdp2
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import liger_kernel
from examples.common import Text, causal_lm, options, train


def main() -> None:
    args = options(__doc__)
    if "RANK" not in os.environ:
        raise SystemExit("Start it with: torchrun --nproc_per_node 2 -m examples.fsdp2")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(args.device, (world,))
    model = causal_lm().to(args.device)
    report = liger_kernel.patch(model)
    for part in (*model.model.layers, model.lm_head):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    text = Text(args.seq)
    own: DistributedSampler[Any] = DistributedSampler(text, world, rank)
    batches = DataLoader(text, args.batch, sampler=own)
    train(model, args, lambda batch: model(**batch).loss, batches, quiet=rank > 0)
    if rank == 0:
        print(report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
