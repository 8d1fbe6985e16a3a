"""Checks that run in several processes at once, one for each rank of a process group on the CPU or on GPUs."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock

WORLD = 2
Check = Callable[[int], None]


def device() -> str:
    """Where the ranks compute: on GPUs where there is one for each."""
    return "cuda" if torch.cuda.device_count() >= WORLD else "cpu"


#: torch 2.6 has `fully_shard` for GPUs alone
LACKS_FSDP2 = device() == "cpu" and not hasattr(torch.cpu.Stream, "record_event")


def moved(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch where the ranks compute."""
    return {name: value.to(device()) for name, value in inputs.items()}


def of_all(results: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of every rank, stacked: all ranks judge the same numbers, and go on in step."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {name: value.cpu() for name, value in results.items()})
    return {name: torch.stack([run[name] for run in found]) for name in results}


def outcomes(
    checks: Callable[[], Mapping[str, Check]],
    factory: pytest.TempPathFactory,
    name: str,
    on: str = "",
    world: int = WORLD,
) -> list[dict[str, str]]:
    """For each rank, the traceback of every check, or "" where it passed; `checks` is called in the processes.

    The workers of one test run share them, under this name: who comes second waits for the first.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / f"ranks of {name}"
    with FileLock(base / f"{name}.lock"):
        if not (folder / "0.json").exists():
            folder.mkdir(exist_ok=True)
            _run(checks, folder, on or device(), world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _run(checks: Callable[[], Mapping[str, Check]], folder: Path, on: str, world: int) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port, str(folder), checks, on, world), nprocs=world)


def _worker(
    rank: int,
    port: int,
    folder: str,
    checks: Callable[[], Mapping[str, Check]],
    on: str,
    world: int,
) -> None:
    """All checks in one set of processes, also those after a failure, unless it left the ranks out of step."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    backend = "gloo"
    if on == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    store: Any = dist.distributed_c10d._get_default_store()
    found = {}
    for name, check in checks().items():
        if store.check(["out of step"]):
            break
        try:
            check(rank)
            found[name] = ""
            store.set(f"{name} ended, {rank}", "")
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
            store.set(f"{name} ended, {rank}", "")
            try:
                store.wait([f"{name} ended, {r}" for r in range(world)], timedelta(seconds=10))
            except dist.DistStoreError:
                store.set("out of step", "")
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def assert_passed(name: str, found: list[dict[str, str]]) -> None:
    for rank, results in enumerate(found):
        said = results.get(name, "not run: an earlier check failed")
        assert said == "", f"rank {rank}: {said}"
