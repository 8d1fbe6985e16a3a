"""The adapters of LLaMA-Factory, ms-swift and axolotl themselves, from their wheels, on a tiny model.

`make` installs the wheels without what they depend on into `.venv/frameworks` (`tests/framework_wheels.txt`). What their
packages import beside the adapter, and is not installed here, is a stand-in. Each runs in a process of its own.
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


# -- each patches Qwen3, before or after `built()`, and returns the model and what has to be replaced --------------------

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
    from swift.pipelines.train.tuner import apply_liger
    from swift.trainers.arguments import TrainArgumentsMixin

    TrainArgumentsMixin._patch_liger_kernel()
    apply_liger("qwen3")
    return built()


def axolotl(built: Built) -> Any:
    from axolotl.integrations.liger import LigerArgs, LigerPlugin
    from axolotl.utils.dict import DictDefault

    flags = ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy")
    given = LigerArgs(**{f"liger_{flag}": True for flag in flags}).model_dump()
    cfg = DictDefault(given, model_config_type="qwen3", torch_compile=True)
    plugin = LigerPlugin()
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    return built()


#: name -> its patch, its package, and by what the loss is replaced
ADAPTERS = {
    "llamafactory": (llamafactory, "llamafactory", "fused linear cross entropy"),
    "llamafactory, logits": (
        lambda built: llamafactory(built, require_logits=True),
        "llamafactory",
        "cross entropy",
    ),
    "llamafactory v1": (llamafactory_v1, "llamafactory", "fused linear cross entropy"),
    "ms_swift": (ms_swift, "swift", "fused linear cross entropy"),
    "axolotl": (axolotl, "axolotl", "fused linear cross entropy"),
}


def main(name: str) -> None:
    """In a process of its own."""
    import torch

    from liger_kernel.testing import assert_no_worse
    from tests.transformers.steps import step
    from tests.transformers.test_framework_calls import kinds
    from tests.transformers.tiny import batch, build

    sys.path.append(str(WHEELS))
    high, low = (step(build("qwen3", d), **batch()) for d in (torch.float64, torch.float32))
    adapter, _, loss = ADAPTERS[name]
    model = adapter(lambda: build("qwen3"))
    assert kinds(model) >= {"norm", "mlp", loss}, kinds(model)
    ours = step(model, **batch())
    assert_no_worse("loss", ours[0].loss, high[0].loss, low[0].loss)
    for parameter, grad in ours[1].items():
        assert_no_worse(parameter, grad, high[1][parameter], low[1][parameter])
    print("right")


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str) -> None:
    package = ADAPTERS[name][1]
    if not (WHEELS / package).is_dir():
        pytest.skip(f"no {WHEELS / package}: make installs it")
    done = subprocess.run(
        [sys.executable, "-m", "tests.transformers.test_real_adapters", name],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.endswith("right\n"), done.stderr


if __name__ == "__main__":
    main(sys.argv[1])
