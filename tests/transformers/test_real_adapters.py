"""The adapters of LLaMA-Factory, ms-swift and axolotl themselves, from their wheels, on a tiny model.

`make test` puts the wheels, without what they depend on, into `.venv/frameworks` (`tests/framework_wheels.txt`).
What their packages import beside the adapter, and is not installed, is a stand-in; all run in a process of their own.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

WHEELS = Path(os.environ.get("FRAMEWORK_WHEELS") or Path(sys.prefix) / "frameworks")
ROOT = Path(__file__).resolve().parents[2]


class StandIns:
    """Imports of packages that are not here, and whatever is asked of them."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, *_: Any) -> Any:
        if name in self.names or name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module).update(__path__=[], __getattr__=self.attribute)
        return module

    def attribute(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def only(package: str) -> None:
    """The files of a package without what its `__init__` imports."""
    module = types.ModuleType(package)
    module.__path__ = [str(WHEELS.joinpath(*package.split(".")))]
    sys.modules[package] = module


# -- each patches Qwen3, before or after it calls `built()` -----------------------------------------------------------

Built = Callable[[], Any]


def llamafactory(built: Built, **more: Any) -> Any:
    only("llamafactory.model")
    from llamafactory.model.model_utils.liger_kernel import apply_liger_kernel

    config = SimpleNamespace(model_type="qwen3")
    arguments = SimpleNamespace(enable_liger_kernel=True)
    apply_liger_kernel(config, arguments, **{"is_trainable": True, "require_logits": False, **more})
    return built()


def llamafactory_v1(built: Built) -> Any:
    from llamafactory.v1.plugins.model_plugins.kernels.liger_kernel_ops import LigerKernel

    with mock.patch.object(LigerKernel, "check_deps", return_value=True):  # it wants a GPU
        return LigerKernel.apply(model=built(), use_kernels=["rmsnorm", "swiglu", "flce"])


def ms_swift(built: Built) -> Any:
    sys.meta_path.append(StandIns("modelscope", "json_repair", "aiohttp", "einops"))  # type: ignore[arg-type]
    from swift.trainers.arguments import TrainArgumentsMixin
    from transformers.integrations.liger import apply_liger_kernel

    TrainArgumentsMixin._patch_liger_kernel()
    model = built()
    apply_liger_kernel(model, None)  # its trainers leave the rest to HF's
    return model


def axolotl(built: Built) -> Any:
    from axolotl.integrations.liger import LigerArgs, LigerPlugin
    from axolotl.utils.dict import DictDefault

    flags = ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")
    given = {f"liger_{flag}": True for flag in flags}
    assert given.keys() <= LigerArgs.model_fields.keys()
    cfg = DictDefault(given, model_config_type="qwen3", torch_compile=True)
    plugin = LigerPlugin()
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    return built()


#: name -> its patch, and by what the loss is replaced; what patches classes is taken back before the next one
ADAPTERS = {
    "llamafactory v1": (llamafactory_v1, "fused linear cross entropy"),
    "ms_swift": (ms_swift, "fused linear cross entropy"),
    "llamafactory": (llamafactory, "fused linear cross entropy"),
    "llamafactory, logits": (
        lambda built: llamafactory(built, require_logits=True),
        "cross entropy",
    ),
    "axolotl": (axolotl, "fused linear cross entropy"),
}


def main() -> None:
    """In a process of its own."""
    import torch

    from liger_kernel.testing import assert_no_worse
    from liger_kernel.transformers.monkey_patch import revert_liger_kernel_to_qwen3
    from tests.transformers.steps import step
    from tests.transformers.test_framework_calls import kinds
    from tests.transformers.tiny import batch, build

    sys.path.append(str(WHEELS))
    high, low = (step(build("qwen3", d), **batch()) for d in (torch.float64, torch.float32))
    for name, (adapter, loss) in ADAPTERS.items():
        model = adapter(lambda: build("qwen3"))
        assert kinds(model) >= {"norm", "mlp", loss}, (name, kinds(model))
        ours = step(model, **batch())
        assert_no_worse(f"{name}: loss", ours[0].loss, high[0].loss, low[0].loss)
        for parameter, grad in ours[1].items():
            assert_no_worse(f"{name}: {parameter}", grad, high[1][parameter], low[1][parameter])
        revert_liger_kernel_to_qwen3()
        print(name)


def test_adapters() -> None:
    if not WHEELS.is_dir():
        pytest.skip(f"no {WHEELS}, into which make test installs the wheels")
    done = subprocess.run(
        [sys.executable, "-m", "tests.transformers.test_real_adapters"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line in ADAPTERS]  # they log, too
    assert said == [*ADAPTERS], done.stdout + done.stderr


if __name__ == "__main__":
    main()
