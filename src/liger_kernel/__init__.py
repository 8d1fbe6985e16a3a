"""Fused kernels for training large language models, and the one line that puts them into a HuggingFace model."""

from __future__ import annotations

from typing import Any

from liger_kernel import compat
from liger_kernel._core.installed import warn_of_strangers

__version__ = "1.0.0.dev0"

compat.install()
warn_of_strangers(__file__, __version__)

_PATCHING = ("PatchReport", "patch", "patched", "unpatch")
_CHOICES = (
    "available_backends",
    "available_impls",
    "get_backend",
    "get_impl",
    "set_backend",
    "set_impl",
)
__all__ = ["PatchReport", "__version__", "doctor", "patch", "patched", "unpatch", *_CHOICES]


def __getattr__(name: str) -> Any:
    if name in _PATCHING:  # late: importing liger_kernel costs nothing
        from liger_kernel.transformers import patching

        return getattr(patching, name)
    if name in _CHOICES:
        from liger_kernel.compat import dispatch

        return getattr(dispatch, name)
    if name == "doctor":
        from liger_kernel.cli import doctor

        return doctor.doctor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
