"""What the installed release of transformers has; a test of something that it lacks is skipped, by name and version."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from packaging.version import Version

from tests.transformers import tiny
from tests.transformers.zoo import build, releases

ROOT = Path(__file__).resolve().parents[2]
#: before that in its constructor: what `model_init` makes later stays HF's, and what TRL says later comes too late
TRAINER_PATCHES_AT_TRAIN = Version(transformers.__version__) >= Version("5.5")
#: Gemma-3's layers ask their attention whether it slides, which the stand-in of a proof does not know: no residual sums
GEMMA3_LAYERS_ASK = Version(transformers.__version__) < Version("5")
_PINNED = (ROOT / "requirements-dev.txt").read_text().partition("\ntorch==")[2].split()[0]
OLDER_TORCH = Version(torch.__version__) < Version(_PINNED)


def lacks(what: str) -> NoReturn:
    pytest.skip(f"transformers {transformers.__version__} has no {what}")


def stock_can(what: str, run: Callable[[], object]) -> None:
    """Skips where HF's own code cannot do it; with the releases that `make` installs, or a newer torch, it must."""
    try:
        run()
    except Exception as error:
        if transformers.__version__ == releases.DOCUMENTED and not OLDER_TORCH:
            raise
        lacks(f"{what} with torch {torch.__version__}: {str(error).partition(chr(10))[0]}")


def stock_compiles(**options: Any) -> None:
    """Skips where Dynamo cannot trace HF's own Llama."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(tiny.build("llama").train(), backend="eager", **options)
    stock_can(f"torch.compile({options})", lambda: compiled(**tiny.batch(), use_cache=False))
    torch._dynamo.reset()


def modeling(family: str) -> Any:
    """The modeling file of a model type."""
    name = f"transformers.models.{family}"
    if importlib.util.find_spec(name) is None:
        lacks(f"models.{family}")
    return importlib.import_module(f"{name}.modeling_{family}")


def hf_class(where: str) -> Any:
    """`family.Class`."""
    family, name = where.split(".")
    return getattr(modeling(family), name, None) or lacks(where)


class _Entries(dict[str, build.Entry]):
    def __missing__(self, model_type: str) -> NoReturn:
        lacks(f"{model_type} that can be built")


#: of the zoo, by model type: image-text where a type has both and this release runs both
ENTRIES = _Entries({e.model_type: e for e in build.ENTRIES if str(e) not in releases.unbuilt()})
