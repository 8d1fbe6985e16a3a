"""What the installed release of transformers has; a test of something that it lacks is skipped, by name and version."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NoReturn

import pytest
import transformers

from tests.transformers.zoo import build, releases


def lacks(what: str) -> NoReturn:
    pytest.skip(f"transformers {transformers.__version__} has no {what}")


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
