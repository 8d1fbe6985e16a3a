"""A proof holds for the state that it was made in: whatever changes what a module computes is honoured afterwards."""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.models.llama import modeling_llama

import liger_kernel
from liger_kernel.testing import Make
from tests.transformers.steps import assert_all_no_worse
from tests.transformers.test_structure import Calls, drawn, run
from tests.transformers.tiny import Experts

SIZE = 32
X = Make(torch.float32).randn(3, 5, SIZE)


def patched(module: nn.Module) -> Any:
    """A copy, patched."""
    model = nn.Sequential(copy.deepcopy(module))
    report = liger_kernel.patch(model)
    assert report.replaced, str(report)
    return model[0]


def rows(*made: nn.Module) -> list[str | None]:
    """What replaces each of some modules of one model."""
    model = nn.Sequential(*made)
    found = {row.path: row.by for row in liger_kernel.patch(model).rows}
    return [found.get(str(i)) for i in range(len(made))]


def seeded(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output and gradients with the same random numbers at every call, and how many were drawn."""
    torch.manual_seed(0)
    results = run(module, *inputs)
    return {**results, "drawn": torch.get_rng_state().float()}


def assert_same(ours: nn.Module, theirs: nn.Module, *inputs: Tensor) -> None:
    inputs = inputs or (X,)
    high = copy.deepcopy(theirs).double()
    truth = seeded(high, *(t.double() for t in inputs))
    assert_all_no_worse(seeded(ours, *inputs), truth, seeded(theirs, *inputs))


# -- changes after patching --------------------------------------------------------------------------------------------


class Swish(nn.Module):
    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Kind(enum.Enum):
    SILU = "silu"
    GELU = "gelu"


def gelu_of_file(x: Tensor) -> Tensor:
    return F.gelu(x)


def helper(x: Tensor) -> Tensor:
    return gelu_of_file(x)


BETA = 1.0


class Settings:
    b = 1.0


SETTINGS = Settings()


def of_a_number(x: Tensor) -> Tensor:
    return x * torch.sigmoid(BETA * x)


def of_an_object(x: Tensor) -> Tensor:
    return x * torch.sigmoid(SETTINGS.b * x)


class MLP(nn.Module):
    """An activation from anywhere."""

    scale = 1.0

    def __init__(self, act: Any = None, **attributes: Any):
        super().__init__()
        self.gate, self.up = nn.Linear(SIZE, 48), nn.Linear(SIZE, 48)
        self.down = nn.Linear(48, SIZE)
        self.act = nn.SiLU() if act is None else act
        for name, value in attributes.items():
            setattr(self, name, value)

    def activated(self, x: Tensor) -> Tensor:
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activated(self.gate(x)) * self.up(x) * self.scale)


class ByConfig(MLP):
    def activated(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.config.silu else F.gelu(x)


class ByEnum(MLP):
    def activated(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.kind is Kind.SILU else F.gelu(x)


class ByTable(MLP):
    def activated(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.table["silu"][0] else F.gelu(x)


class ByFile(MLP):
    def activated(self, x: Tensor) -> Tensor:
        return helper(x)


class ByName(MLP):
    """Reads an attribute by a name that is made when it runs."""

    def activated(self, x: Tensor) -> Tensor:
        return F.silu(x) if getattr(self, "is_" + "silu") else F.gelu(x)


class ByTableOfClass(ByTable):
    table = {"silu": [True]}  # noqa: RUF012


TABLE = {"silu": True}


class ByTableOfFile(MLP):
    def activated(self, x: Tensor) -> Tensor:
        return F.silu(x) if TABLE["silu"] else F.gelu(x)


class ByInnerConfig(MLP):
    def activated(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.config.text.silu else F.gelu(x)


class WithProperty:
    def __init__(self, hidden: bool):
        self.hidden = hidden

    @property
    def silu(self) -> bool:
        return self.hidden


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def times_two(self: Any, x: Tensor) -> Tensor:
    return 2 * x


def _set(name: str, value: Any) -> Callable[..., None]:
    def change(module: Any, monkeypatch: Any) -> None:
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, module), last, value)

    return change


def _set_class(cls: Any, name: str, value: Any) -> Callable[..., None]:
    return lambda module, monkeypatch: monkeypatch.setattr(cls, name, value)


def _of_table(module: Any, monkeypatch: Any) -> None:
    module.table["silu"][0] = False


def _of_table_of_class(module: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(ByTableOfClass.table, "silu", [False])


def _of_table_of_file(module: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(TABLE, "silu", False)


def _of_file(module: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "gelu_of_file", F.silu)


def _own_forward(module: Any, monkeypatch: Any) -> None:
    module.act.forward = gelu


def _deleted(module: Any, monkeypatch: Any) -> None:
    module.act = nn.Identity()


def _hooked(module: Any, monkeypatch: Any) -> None:
    module.act.register_forward_hook(lambda m, args, output: 2 * output)


def _hooked_before(module: Any, monkeypatch: Any) -> None:
    module.act.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def _hooked_backward(module: Any, monkeypatch: Any) -> None:
    module.act.register_full_backward_hook(lambda m, grads, _: (2 * grads[0],))


def _hooked_everywhere(module: Any, monkeypatch: Any) -> None:
    def hook(m: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output if isinstance(m, nn.SiLU) else output

    hooks = torch_module._global_forward_hooks
    monkeypatch.setitem(hooks, -1, hook)


def _of_this_file(name: str, value: Any) -> Callable[..., None]:
    return lambda module, monkeypatch: monkeypatch.setitem(globals(), name, value)


class Inheriting(MLP):
    """Its code is that of its base."""

    def activated(self, x: Tensor) -> Tensor:
        return super().activated(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


MLP_CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[..., None]]] = {
    "another activation": (MLP, _set("act", nn.GELU())),
    "no activation": (MLP, _deleted),
    "another function": (lambda: MLP(F.silu), _set("act", F.gelu)),
    "a partial": (
        lambda: MLP(functools.partial(F.gelu, approximate="tanh")),
        _set("act", functools.partial(F.gelu, approximate="none")),
    ),
    "keyword of a partial": (
        lambda: MLP(functools.partial(F.gelu, approximate="tanh")),
        lambda module, _: module.act.keywords.update(approximate="none"),
    ),
    "number behind a function": (lambda: MLP(of_a_number), _of_this_file("BETA", 4.0)),
    "number behind a partial": (
        lambda: MLP(functools.partial(of_a_number)),
        _of_this_file("BETA", 4.0),
    ),
    "number of an object of the file": (lambda: MLP(of_an_object), _set_class(Settings, "b", 4.0)),
    "beta": (lambda: MLP(Swish()), _set("act.beta", 4.0)),
    "class forward of the activation": (MLP, _set_class(nn.SiLU, "forward", times_two)),
    "own forward of the activation": (MLP, _own_forward),
    "hook": (MLP, _hooked),
    "hook before": (MLP, _hooked_before),
    "hook backward": (MLP, _hooked_backward),
    "hook on all modules": (MLP, _hooked_everywhere),
    "class forward": (
        MLP,
        _set_class(MLP, "forward", lambda self, x: self.down(self.gate(x) * self.up(x))),
    ),
    "inherited method": (Inheriting, _set_class(MLP, "activated", times_two)),
    "inherited forward": (
        Inheriting,
        _set_class(MLP, "forward", lambda self, x: self.down(self.gate(x) * self.up(x))),
    ),
    "inherited constant": (Inheriting, _set_class(MLP, "scale", 3.0)),
    "method of the class": (MLP, _set_class(MLP, "activated", times_two)),
    "constant of the class": (MLP, _set_class(MLP, "scale", 3.0)),
    "hidden constant of the class": (MLP, _set("scale", 3.0)),
    "function of the file": (ByFile, _of_file),
    "config": (lambda: ByConfig(config=SimpleNamespace(silu=True)), _set("config.silu", False)),
    "another config": (
        lambda: ByConfig(config=SimpleNamespace(silu=True)),
        _set("config", SimpleNamespace(silu=False)),
    ),
    "enum": (lambda: ByEnum(kind=Kind.SILU), _set("kind", Kind.GELU)),
    "table": (lambda: ByTable(table={"silu": [True]}), _of_table),
    "table of the class": (ByTableOfClass, _of_table_of_class),
    "table of the file": (ByTableOfFile, _of_table_of_file),
    "config of a config": (
        lambda: ByInnerConfig(config=SimpleNamespace(text=SimpleNamespace(silu=True))),
        _set("config.text.silu", False),
    ),
    "property of a config": (
        lambda: ByConfig(config=WithProperty(True)),
        _set("config.hidden", False),
    ),
    "made name": (lambda: ByName(is_silu=True), _set("is_silu", False)),
}


@pytest.mark.parametrize("change", MLP_CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["", "of a copy"])
def test_changes_of_an_mlp(
    change: str, copied: bool, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    make, apply = MLP_CHANGES[change]
    theirs = drawn(make())
    ours = patched(theirs)
    ours = copy.deepcopy(ours) if copied else ours
    calls.clear()
    assert_same(ours, theirs)
    assert calls["glu"] == 1
    before = run(theirs, X)
    for module in (ours, theirs):
        apply(module, monkeypatch)
    found, expected = run(ours, X), run(theirs, X)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    assert calls["glu"] == 1  # what was proven does not run any more


@pytest.mark.parametrize("change", MLP_CHANGES)
def test_a_verdict_is_of_one_state(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of one class that compute different things get a verdict each, in either order."""
    make, apply = MLP_CHANGES[change]
    first = drawn(make())
    patched(first)
    second = copy.deepcopy(first)
    apply(second, monkeypatch)
    model = nn.Sequential(copy.deepcopy(second))
    liger_kernel.patch(model)
    assert_same(model[0], second)


def test_hooks_of_zero_3_have_no_use_for_activations(calls: Calls) -> None:
    """It hooks every module, and those without parameters for nothing."""
    ours = patched(MLP())

    def hook(module: nn.Module, args: Any) -> None: ...

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for module in ours.modules():
        module.register_forward_pre_hook(hook)
    calls.clear()
    ours(X)
    assert calls["glu"] == 1


class OfClass(nn.Module):
    """Numbers of the class, not of the instance."""

    eps, scale = 1e-5, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Scaled(MLP):
    out = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.out


def test_numbers_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(OfClass(), Scaled()) == ["LigerRMSNorm(llama)", "LigerSwiGLU"]
    for cls, name in ((OfClass, "eps"), (Scaled, "out")):
        theirs = cls()
        ours = patched(theirs)
        assert_same(ours, theirs)
        monkeypatch.setattr(cls, name, 0.25)
        assert torch.equal(ours(X), theirs(X))


NORM_CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[..., None]]] = {
    "eps": (lambda: modeling_llama.LlamaRMSNorm(SIZE), _set("variance_epsilon", 0.5)),
    "class forward": (
        lambda: modeling_llama.LlamaRMSNorm(SIZE),
        _set_class(modeling_llama.LlamaRMSNorm, "forward", times_two),
    ),
    "shape": (lambda: nn.LayerNorm((SIZE,)), _set("normalized_shape", (5, SIZE))),
    "a weight": (
        lambda: nn.LayerNorm(SIZE, elementwise_affine=False),
        _set("weight", nn.Parameter(torch.full((SIZE,), 3.0))),
    ),
    "a bias": (
        lambda: nn.LayerNorm(SIZE, bias=False),
        _set("bias", nn.Parameter(torch.full((SIZE,), 3.0))),
    ),
}


@pytest.mark.parametrize("change", NORM_CHANGES)
def test_changes_of_a_norm(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, apply = NORM_CHANGES[change]
    theirs = make()
    ours = patched(theirs)
    before = theirs(X)
    for module in (ours, theirs):
        apply(module, monkeypatch)
        if change == "shape":
            module.weight = module.bias = None
    assert torch.equal(ours(X), theirs(X))
    assert not torch.equal(ours(X), before)


class Squared(nn.Module):
    power = 2

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) ** self.power


@pytest.mark.parametrize(
    ("make", "apply"),
    [
        (lambda: nn.ModuleDict({"act": Squared()}), _set("act.power", 3)),
        (Experts, _set("act_fn", nn.GELU())),
        (Experts, lambda m, _: m.act_fn.register_forward_hook(lambda _, args, y: 2 * y)),
        (Experts, _set_class(Experts, "_apply_gate", lambda self, x: x[..., :20])),
    ],
    ids=["power", "activation", "hook", "method"],
)
def test_changes_of_activations_and_experts(
    make: Any, apply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make()
    ours = patched(theirs)
    x = X.flatten(0, 1)
    routed = x, torch.arange(len(x))[:, None] % 3, torch.ones(len(x), 1)
    call = (lambda m: m["act"](X)) if isinstance(theirs, nn.ModuleDict) else (lambda m: m(*routed))
    before = call(theirs)
    for module in (ours, theirs):
        apply(module, monkeypatch)
    assert torch.equal(call(ours), call(theirs))
    assert call(theirs).shape != before.shape or not torch.equal(call(theirs), before)


def test_a_closure_without_a_value_so_far() -> None:
    def act(x: Tensor) -> Tensor:
        return inner(x)

    assert rows(MLP(act)) == [None]
    inner = F.silu  # which nothing would notice


def test_a_module_that_has_changed_is_reported() -> None:
    model = nn.Sequential(MLP())
    liger_kernel.patch(model[0])
    model[0].act = nn.GELU()
    (row,) = (row for row in liger_kernel.patch(model).rows if row.kind == "mlp")
    assert row.by is None
    assert "has changed" in row.reason
    liger_kernel.unpatch(model)
    liger_kernel.unpatch(model[0])
    assert rows(*model) == ["LigerGeGLU(erf)"]


class Counting(MLP):
    """Keeps something of every call."""

    def __init__(self, how: str):
        super().__init__(how=how)
        self.seen: list[int] = []
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))

    def activated(self, x: Tensor) -> Tensor:
        if self.how == "buffer":
            self.count += 1
        elif self.how == "list":
            self.seen.append(1)
        else:
            self.calls += 1
        return F.silu(x)


@pytest.mark.parametrize("how", ["buffer", "list", "number"])
def test_what_keeps_something_of_a_call_is_left_alone(how: str) -> None:
    module = Counting(how)
    assert rows(module) == [None]
    assert (module.count, module.seen, module.calls) == (0, [], 0)
    module(X)
    assert module.count + len(module.seen) + module.calls == 1
