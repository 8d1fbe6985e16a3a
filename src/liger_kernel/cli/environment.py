"""`liger_kernel env`."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from typing import Any

import torch

from liger_kernel import backends, utils
from liger_kernel.backends import disabled
from liger_kernel.backends.disabled import our_version
from liger_kernel.cli.answer import Answer, Table, size
from liger_kernel.cli.installed import others, ours, version_of
from liger_kernel.ops import COMPUTED_BY, OPS

PACKAGES = ("triton", "transformers", "accelerate", "peft", "trl", "deepspeed", "kernels", "numpy")
#: variables of others that change what our kernels do
_OF_OTHERS = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TORCHDYNAMO_DISABLE", "CUDA_LAUNCH_BLOCKING")


def device_types() -> list[str]:
    return list(dict.fromkeys(["cpu", utils.infer_device()]))


def versions() -> dict[str, str]:
    found = {
        "liger_kernel": f"{our_version()} ({ours()})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "ROCm of torch": torch.version.hip or "none",
    }
    return found | {name: version_of(name) or "not installed" for name in PACKAGES}


def devices() -> list[dict[str, Any]]:
    found = []
    for device in (d for kind in device_types() for d in backends.devices_of(kind)):
        facts = backends.facts_of(device)
        memory = 0
        if device.type != "cpu":
            memory = torch.get_device_module(device).get_device_properties(device).total_memory
        found.append(
            {
                "device": str(device),
                "name": facts.name,
                "backend": backends.backend_of(device.type).name,
                "memory": memory,
                "architecture": facts.architecture,
                "processors": facts.processors,
                "shared_memory": facts.shared_memory,
                "product_multiple": facts.product_multiple,
                "mixed_products": [str(dtype) for dtype in facts.mixed_products],
                "queues": facts.queues,
            }
        )
    return found


def variables() -> dict[str, str]:
    names = {name for name in os.environ if name.startswith("LIGER_KERNEL_")}
    return {
        name: os.environ[name] for name in sorted(names | set(_OF_OTHERS)) if name in os.environ
    }


def implementations() -> dict[str, dict[str, str]]:
    """By op and device type, who computes: by choice of the device, or by LIGER_KERNEL_IMPL."""
    found: dict[str, dict[str, str]] = {}
    for op in sorted(OPS):
        for kind in device_types():
            found.setdefault(op, {})[kind] = _implementation(op, kind)
    return found


def _implementation(op: str, kind: str) -> str:
    try:
        name, why = backends.serving(COMPUTED_BY.get(op, op), kind, backends.requested())
    except RuntimeError as error:
        return f"error: {error}"
    return name if why is None else f"{name} (disabled by selftest: {why})"


def answer() -> Answer:
    data: dict[str, Any] = {
        "versions": versions(),
        "others": [asdict(other) for other in others()],
        "devices": devices(),
        "variables": variables(),
        "implementations": implementations(),
        "disabled_file": str(disabled.path()),
    }
    found = data["devices"]
    columns = ["device", *(d["device"] for d in found)]
    facts = [
        [name, *(_text(name, device[name]) for device in found)]
        for name in found[0]
        if name != "device"
    ]
    served = data["implementations"]
    kinds = device_types()
    parts = [
        Table("Versions", (), [*data["versions"].items()]),
        Table("Devices", columns, facts),
        Table("Variables", (), [*data["variables"].items()] or [["none is set", ""]]),
        Table("Who computes", ["op", *kinds], [[op, *served[op].values()] for op in served]),
    ]
    if data["others"]:
        rows = [[o["what"], o["where"], o["how"]] for o in data["others"]]
        parts.insert(1, Table("Others of our name", ["what", "where", "how"], rows))
    return Answer(data, parts)


def _text(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if name in ("memory", "shared_memory"):
        return size(value) if value else "-"
    return str(value) if value != "" else "-"
