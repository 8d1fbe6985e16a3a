"""The stand-in is a device of PyTorch's: what the other checks say is worth as much as these.

Run by `tests/backends/test_npu.py`, in a process of its own.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from liger_kernel.testing import assert_no_worse
from tests.npu_stand_in import device


def test_a_tensor_is_a_plain_tensor_on_the_device() -> None:
    x = torch.empty(3, 4, device="npu")
    assert type(x) is torch.Tensor
    assert x.device == torch.device("npu:0")
    assert x.is_npu  # type: ignore[attr-defined]
    assert not (x.is_cpu)
    assert not (x.is_cuda)
    assert not (x.is_meta)
    assert x.isnan().all(), "uninitialised memory is NaN in tests"
    assert torch.accelerator.current_accelerator() == torch.device("npu")


def test_views_share_memory_and_versions() -> None:
    x = torch.arange(12.0, device="npu").view(3, 4)
    view = x[1:, ::2]
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert (view.stride(), view.storage_offset()) == ((4, 2), 4)
    view.mul_(10)
    assert x._version == view._version == 1
    assert x.tolist() == [[0, 1, 2, 3], [40, 5, 60, 7], [80, 9, 100, 11]]
    assert x.t().tolist() == x.cpu().t().tolist()


def test_a_number_that_the_host_reads_is_seen() -> None:
    x = torch.arange(3.0, device="npu")
    for read in (
        lambda: float(x.sum()),
        lambda: x.tolist(),
        lambda: bool(x.any()),
        lambda: x[x > 1],
    ):
        device.ran.clear()
        read()
        assert device.READS & set(device.ran)
    device.ran.clear()
    assert not device.READS & set(device.ran)


def test_no_other_device_mixes_in() -> None:
    x = torch.ones(2, device="npu")
    with pytest.raises(RuntimeError, match="a tensor on cpu"):
        torch.mm(torch.ones(2, 2), torch.ones(2, 2, device="npu"))
    assert x.cpu().device.type == "cpu"
    assert x.to("cpu").to("npu").device.type == "npu"


def test_training_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    on_cpu = nn.Sequential(
        nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 10)
    )
    on_npu = copy.deepcopy(on_cpu).to("npu")
    ids = torch.randint(0, 10, (4, 7))
    for model in (on_cpu, on_npu):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        labels = ids.to(next(model.parameters()).device)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(labels).view(-1, 10), labels.view(-1)).backward()
            optimizer.step()
    exact = copy.deepcopy(on_cpu).double()
    for ours, theirs, high in zip(*(m.parameters() for m in (on_npu, on_cpu, exact)), strict=True):
        assert ours.device.type == "npu"
        assert_no_worse("parameter", ours.cpu(), high, theirs)


def test_autocast() -> None:
    x, w = torch.randn(3, 4, device="npu"), torch.randn(4, 4, device="npu")
    with torch.autocast("npu", torch.bfloat16):
        assert torch.mm(x, w).dtype == torch.bfloat16
        assert torch.softmax(x.bfloat16(), -1).dtype == torch.float32
        with torch.autocast("npu", enabled=False):
            assert torch.mm(x, w).dtype == torch.float32


def test_what_the_documentation_forbids_raises() -> None:
    import torch_npu

    x = torch.ones(2, 4, device="npu")
    for call in (
        lambda: torch_npu.npu_rms_norm(x.double(), x[0].double()),
        lambda: torch_npu.npu_rms_norm(x, x[0].half()),
        lambda: torch_npu.npu_rms_norm(x[0], x[0]),
        lambda: torch_npu.npu_add_rms_norm(x[:0], x[:0], x[0]),
        lambda: torch_npu.npu_swiglu(x.t()),
        lambda: torch_npu.npu_swiglu(x.cpu()),
        lambda: torch_npu.npu_rotary_mul(x.view(1, 1, 2, 4), x, x),
    ):
        with pytest.raises(RuntimeError, match=r"torch_npu \(stand-in\)"):
            call()


def test_other_processes_have_no_such_device() -> None:
    code = "import torch; print(torch._C._get_privateuse1_backend_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "privateuseone"
    assert device.can_register()
