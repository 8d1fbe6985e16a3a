"""What can be wrong with a machine and its installation: each check yields findings, none where all is well."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from liger_kernel import backends, utils
from liger_kernel.backends import disabled
from liger_kernel.cli.installed import others, version_of

#: the oldest releases that work; pyproject.toml says the same
OLDEST = {"torch": "2.6", "triton": "3.2", "transformers": "4.57"}
#: the newest ones that the tests ran on
NEWEST = {"transformers": "5.24"}
#: the first numpy that breaks the interpreter of triton, up to this release of triton
_NUMPY, _TRITON = (2, 4), (3, 6)
#: that the library reads; the last one while the tests run
VARIABLES = ("LIGER_KERNEL_IMPL", disabled.VARIABLE, "LIGER_KERNEL_RATIOS")
#: device files of GPUs, where torch may see none
GPU_FILES = ("/dev/nvidia0", "/dev/kfd")


@dataclass(frozen=True)
class Finding:
    """Something wrong, or with `fault=False` something to know. `what` names the check."""

    what: str
    text: str
    way_out: str
    fault: bool = True


def _release(version: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", version + ".0").groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def _on_gpu() -> bool:
    return utils.infer_device() != "cpu"


def versions() -> Iterator[Finding]:
    for package, oldest in OLDEST.items():
        found = version_of(package)
        if found is None:
            if package == "triton" and _on_gpu():
                text = "triton is not installed: plain PyTorch computes every op"
                yield Finding("triton", text, f"pip install 'triton>={oldest}'")
        elif _release(found) < _release(oldest):
            text = f"{package} {found} is too old"
            yield Finding(package, text, f"pip install '{package}>={oldest}'")
        elif package in NEWEST and _release(found) > _release(NEWEST[package]):
            newest = NEWEST[package]
            text = f"{package} {found} is newer than {newest}, the newest that was tested"
            way = f"if losses differ: pip install '{package}<={newest}.99'"
            yield Finding(package, text, way, fault=_release(found)[0] > _release(newest)[0])


def other_packages() -> Iterator[Finding]:
    for other in others():
        text = f"{other.what} in {other.where}: {other.how}"
        way = "pip uninstall liger-kernel until none is left, then install this one again"
        yield Finding("another package", text, way, fault=other.how != "shadowed by ours")


def interpreter() -> Iterator[Finding]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    if _on_gpu():
        text = "TRITON_INTERPRET=1 is set, and there is a GPU: kernels run in Python, a thousand times slower"
        yield Finding("interpreter", text, "unset TRITON_INTERPRET")
    numpy, triton = version_of("numpy"), version_of("triton")
    if numpy and triton and _release(numpy) >= _NUMPY and _release(triton) <= _TRITON:
        text = f"numpy {numpy} breaks the interpreter of triton {triton}, and TRITON_INTERPRET=1 is set"
        yield Finding("numpy", text, f"pip install 'numpy<{_NUMPY[0]}.{_NUMPY[1]}'")


def requests() -> Iterator[Finding]:
    name = os.environ.get("LIGER_KERNEL_IMPL", "").strip().lower()
    if name == backends.REFERENCE:
        text = "LIGER_KERNEL_IMPL=reference is set: plain PyTorch computes every op"
        yield Finding("LIGER_KERNEL_IMPL", text, "unset LIGER_KERNEL_IMPL")
    try:
        backends.implementation_for(utils.infer_device(), backends.requested())
    except RuntimeError as error:
        yield Finding("LIGER_KERNEL_IMPL", str(error), "unset LIGER_KERNEL_IMPL")
    for name in sorted(os.environ):
        if name.startswith("LIGER_KERNEL_") and name not in VARIABLES:
            text = f"{name} is set, and this library reads no variable of that name"
            yield Finding(name, text, f"those it reads: {', '.join(VARIABLES)}", fault=False)
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        text = "CUDA_LAUNCH_BLOCKING=1 is set: the host waits for every kernel"
        yield Finding("CUDA_LAUNCH_BLOCKING", text, "unset CUDA_LAUNCH_BLOCKING")


def disabled_ops() -> Iterator[Finding]:
    try:
        entries = disabled.read()
    except disabled.Unreadable as error:
        yield Finding("disabled ops", error.text, error.way_out)
        return
    for entry in entries:
        if entry.applies():
            text = (
                f"{entry.op} by {entry.implementation} is disabled on {entry.device}: {entry.why}"
            )
            yield Finding(
                "disabled ops", text, f"it is listed in {disabled.path()}. {disabled.RESET}"
            )


def kernel_cache() -> Iterator[Finding]:
    """Where triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    where = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")
    there = next(p for p in (where, *where.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        text = f"{where}, the cache of compiled kernels, cannot be written: {error}"
        yield Finding("kernel cache", text, "set TRITON_CACHE_DIR to a folder of yours")


def unseen_gpu() -> Iterator[Finding]:
    if not _on_gpu() and any(Path(file).exists() for file in GPU_FILES):
        import torch

        text = f"there is a GPU, and torch {torch.__version__} sees none"
        way = "a build of torch for this GPU (https://pytorch.org), and CUDA_VISIBLE_DEVICES that names it"
        yield Finding("torch", text, way)


def compiler() -> Iterator[Finding]:
    """Triton compiles a launcher for every kernel with the host's C compiler."""
    if not _on_gpu():
        return
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        yield Finding("compiler", "no C compiler is found, which triton needs", "install gcc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        way = "install the headers of this Python: apt install python3-dev"
        yield Finding("compiler", f"{header} is missing, which triton needs", way)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    versions,
    other_packages,
    interpreter,
    requests,
    disabled_ops,
    kernel_cache,
    unseen_gpu,
    compiler,
)
