"""`liger_kernel.triton`: a cache of compiled kernels for file systems that machines share: its files appear whole."""

from __future__ import annotations

import os
import tempfile
from typing import Any

__path__: list[str] = []
_NAME = "LigerTritonFileCacheManager"


def apply_liger_triton_cache_manager() -> None:
    """Let Triton keep what it compiles with `LigerTritonFileCacheManager`, also in processes that this one starts."""
    os.environ["TRITON_CACHE_MANAGER"] = f"liger_kernel.triton.monkey_patch:{_NAME}"


def _made() -> Any:
    from triton.runtime.cache import FileCacheManager

    class Manager(FileCacheManager):
        """Triton's, but a file is written in a folder of its own, and moved to its place when it is complete."""

        def __init__(self, key: Any, override: bool = False, dump: bool = False):
            super().__init__(key, override=override, dump=dump)

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            if not self.cache_dir:
                raise RuntimeError("Could not create or locate cache dir")
            binary = isinstance(data, bytes)
            place = self._make_path(filename)
            with tempfile.TemporaryDirectory(f".{os.getpid()}", "tmp.", self.cache_dir) as folder:
                new = os.path.join(folder, filename)
                with open(new, "wb" if binary else "w") as file:
                    file.write(data if binary else str(data))
                os.replace(new, place)
            return place

    Manager.__name__ = Manager.__qualname__ = _NAME
    return Manager


def __getattr__(name: str) -> Any:
    """Made on first use: it imports Triton."""
    if name == _NAME:
        return globals().setdefault(name, _made())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
