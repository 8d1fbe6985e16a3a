"""Every `apply_liger_kernel_to_*` on a tiny model of its type from the zoo, for one model and for the classes."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import types
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import liger_kernel
from liger_kernel.transformers import monkey_patch
from liger_kernel.transformers.patching import PatchReport
from liger_kernel.transformers.patching.classes import GlobalPatch
from liger_kernel.transformers.patching.families import FAMILIES, Family
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.here import ENTRIES
from tests.transformers.zoo import build, check, inputs, releases

NO_LANGUAGE_MODEL = {"pixtral"}  # a vision tower
TESTED = [f for f in FAMILIES if f.name in ENTRIES]


pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")


def apply(family: Family, **arguments: Any) -> None:
    getattr(monkey_patch, f"apply_liger_kernel_to_{family.name}")(**arguments)


def test_every_family_is_tested() -> None:
    def is_there(family: Family) -> bool:
        return importlib.util.find_spec(f"transformers.models.{family.modeling}") is not None

    here = [family for family in FAMILIES if is_there(family)]
    assert {f.name for f in here} - {f.name for f in TESTED} == NO_LANGUAGE_MODEL
    for family in here:  # and names a file that exists
        importlib.import_module(monkey_patch._modeling_name(family))
    assert len(here) == len(FAMILIES) or transformers.__version__ != releases.DOCUMENTED


@pytest.mark.parametrize("family", TESTED, ids=lambda f: f.name)
def test_one_model(family: Family) -> None:
    """Loss, every gradient, the way back, and a bystander; what is replaced follows the flags."""

    def patch(model: nn.Module) -> PatchReport:
        apply(family, model=model)
        state = state_of(model)
        assert state is not None
        return state.report

    entry = ENTRIES[family.name]
    result = check.Result(str(entry), entry.class_name)
    model = check.built(entry)
    check.check(model, inputs.inputs(entry, model), result, lambda m: told(family, patch(m)))
    wanted = family.options({})
    assert (result.loss == "fused") == (
        wanted["fused_linear_cross_entropy"] or wanted["cross_entropy"]
    )
    assert bool({"mlp", "experts"} & result.replaced.keys()) <= wanted["mlp"]
    assert ("rope" in result.replaced) <= wanted["rope"]


def told(family: Family, report: PatchReport) -> PatchReport:
    """The rope of the modeling file is not in the report of the model, whose attention is untouched."""
    if family.options({})["rope"]:
        report.add("rope", "(the modeling file)", by="liger_rotary_pos_emb")
    return report


@pytest.mark.parametrize("family", TESTED, ids=lambda f: f.name)
def test_classes_reach_what_a_model_reaches(family: Family) -> None:
    entry = ENTRIES[family.name]
    model = build.build(entry)
    apply(family, model=model)
    expected = Counter((row.kind, row.path, row.by) for row in state_of(model).report.replaced)
    liger_kernel.unpatch(model)
    found = []
    apply(family)
    try:
        for one in (model, build.build(entry)):  # it lives already, it comes later
            replaced = state_of(one).report.replaced
            found.append(Counter((row.kind, row.path, row.by) for row in replaced))
    finally:
        getattr(monkey_patch, f"revert_liger_kernel_to_{family.name}")()
    assert found == [expected, expected]
    assert expected
    assert state_of(model) is state_of(build.build(entry)) is None


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("glm4", "rope"), ("glm4v", "rope"), ("glm4v_moe", "rope"), ("qwen3_5", "rope"), ("qwen3_5_moe", "rope"),
        ("gemma4", "rope"), ("gemma4_text", "rope"), ("deepseek_v3", "rope"),
        ("granite", "fused_linear_cross_entropy"),
    ],
)  # fmt: skip
def test_flags_that_the_incumbent_refuses(name: str, flag: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    model = build.build(ENTRIES[name])
    apply(family, model=model, **{"cross_entropy": False, flag: True})
    state = state_of(model)
    found = {row.kind for row in state.report.replaced}
    if any(isinstance(handle, GlobalPatch) for handle in state.handles):
        found.add("rope")
    liger_kernel.unpatch(model)
    assert {"rope": "rope"}.get(flag, "loss") in found


def test_a_model_of_another_family() -> None:
    model = build.build(ENTRIES["qwen2"])
    llama = next(f for f in FAMILIES if f.name == "llama")
    apply(llama, model=model)
    kinds = {row.kind for row in state_of(model).report.replaced}
    liger_kernel.unpatch(model)
    assert {"loss", "norm", "mlp"} <= kinds


def test_a_patched_model_that_is_collected_while_another_is_compiled() -> None:
    """Dynamo has read the globals of the modeling file by then; they change once it is done."""
    theirs, ours = (lambda x: x + 1), (lambda x: 1 + x)
    modeling = types.ModuleType("modeling_of_somebody")
    modeling.rotate = theirs
    patch = [GlobalPatch(modeling, "rotate", ours)]
    seen = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        patch.clear()
        gc.collect()
        seen.append(modeling.rotate)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: modeling.rotate(x), backend=backend, fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert seen == [ours]
    assert modeling.rotate is ours
    GlobalPatch(modeling, "rotate", ours).remove()
    assert modeling.rotate is theirs
    patch.append(GlobalPatch(modeling, "rotate", ours))
    patch.clear()
    assert modeling.rotate is theirs
