"""An implementation that does not satisfy an op's contract is refused when it is loaded, by name."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest

from liger_kernel import backends
from liger_kernel._core.contract import check_contract
from liger_kernel.ops import OPS
from liger_kernel.ops.glu import contract as glu
from liger_kernel.ops.glu import triton
from tests import dummy_backend
from tests.test_layout import OPS_WITHOUT_KERNELS

CONTRACTS = [op for op in OPS if op not in OPS_WITHOUT_KERNELS]


def copy_of(module: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**vars(module))


@pytest.mark.parametrize("op", CONTRACTS)
def test_every_file_satisfies_the_contract_of_its_op(op: str) -> None:
    contract = importlib.import_module(f"liger_kernel.ops.{op}.contract").Kernels
    files = [f"liger_kernel.ops.{op}.triton"]
    if op in dummy_backend.OPS:
        files.append(f"tests.dummy_backend.{op}")
    for file in files:
        module = importlib.import_module(file)
        assert check_contract(module, contract, file) is module


def test_a_missing_member_is_named() -> None:
    found = copy_of(triton)
    del found.backward
    with pytest.raises(
        TypeError, match=r"my\.glu .*glu\.contract\.Kernels.*backward\(grads, saved"
    ):
        check_contract(found, glu.Kernels, "my.glu")


def test_a_misspelt_member_is_named_with_its_spelling() -> None:
    found = copy_of(triton)
    found.backward_with_ouput = found.backward_with_output
    del found.backward_with_output
    with pytest.raises(TypeError, match=r"backward_with_output.*'backward_with_ouput' misspelt"):
        check_contract(found, glu.Kernels, "my.glu")


def test_other_parameters_are_named() -> None:
    found = copy_of(triton)
    found.forward = lambda gate, up, activation, needs: None
    with pytest.raises(
        TypeError, match=r"forward\(gate, up, activation, needs\) must take \(gate, up, options"
    ):
        check_contract(found, glu.Kernels, "my.glu")


def test_an_incomplete_file_is_no_silent_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from liger_kernel.ops.glu import glu as op
    from tests.dummy_backend import glu as file

    backends._kernels.cache_clear()
    monkeypatch.delattr(file, "backward_with_output")
    try:
        with (
            backends.use_implementation("dummy"),
            pytest.raises(TypeError, match=r"tests\.dummy_backend\.glu.*backward_with_output"),
        ):
            op(torch.ones(2, 2), torch.ones(2, 2))
    finally:
        backends._kernels.cache_clear()
