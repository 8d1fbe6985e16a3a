"""Experts of mixtures: which forms are proven, which are refused, and what then runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers.patching.sites.experts import (
    _registry,
    experts_forward,
    register_experts,
)
from tests.transformers.here import lacks
from tests.transformers.steps import assert_identical, assert_same_steps, snapshot, step
from tests.transformers.test_structure import Calls
from tests.transformers.tiny import MIXTURES, Experts, batch, build, mixture


def experts_rows(model: nn.Module) -> set[tuple[str | None, str]]:
    rows = [row for row in liger_kernel.patch(model).rows if row.kind == "experts"]
    return {(row.by, row.reason) for row in rows}


class Swapped(Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        up, gate = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


class LimitedBelow(Experts):
    limit = 2.0

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(-self.limit, self.limit)) * up.clamp(-self.limit, self.limit)


class LimitedAbove(Experts):
    """By a number that no attribute holds, and no small number reaches."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=300)) * up


class WeighsTokens(Experts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weighted = hidden_states * top_k_weights.mean(-1, keepdim=True)
        return super().forward(weighted, top_k_index, torch.ones_like(top_k_weights))


class Normed(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(32))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights) * self.norm


class TestExperts:
    @pytest.mark.parametrize(
        ("name", "implementation"),
        [
            *((name, "grouped_mm") for name in MIXTURES),
            ("mixtral", "batched_mm"),
            ("mixtral", "eager"),
        ],
    )
    def test_loss_and_every_gradient(self, name: str, implementation: str, calls: Calls) -> None:
        model = mixture(name, implementation=implementation)
        before = snapshot(model)
        assert experts_rows(model) == {(f"LigerExperts({MIXTURES[name][1]})", "")}
        calls.clear()
        step(model, **batch())
        n_dense = getattr(model.config, "first_k_dense_replace", 0)
        assert calls["fused_moe"] == model.config.num_hidden_layers - n_dense
        high = mixture(name, torch.float64, "eager")
        low = mixture(name, implementation=implementation)
        assert_same_steps((model, high, low), [batch()])
        model.zero_grad()
        liger_kernel.unpatch(model)
        assert model.config._experts_implementation == implementation
        assert_identical(before, snapshot(model))

    def test_as_many_experts_as_gpt_oss_has(self) -> None:
        """Of two rows or fewer each: a second look at roundings took their luck for another function."""
        pytest.importorskip("transformers.integrations.moe")
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 32}
        with torch.device("meta"):
            experts = build("gpt_oss", **{**MIXTURES["gpt_oss"][0], **sizes}).model.layers[0].mlp
        experts = experts.experts
        assert experts_rows(nn.Sequential(experts)) == {
            (f"LigerExperts({MIXTURES['gpt_oss'][1]})", "")
        }

    def test_chosen_from_the_registry_without_a_patch(self, calls: Calls) -> None:
        if not _registry():
            lacks("registry of experts")
        register_experts()
        model = mixture("gpt_oss")
        expected, _ = step(model, **batch())
        model.set_experts_implementation("liger_kernel")
        step(model, **batch())  # proves
        calls.clear()
        found, _ = step(model, **batch())
        assert calls["fused_moe"] == model.config.num_hidden_layers
        high, _ = step(mixture("gpt_oss", torch.float64, "eager"), **batch())
        assert_no_worse("loss", found.loss, high.loss, expected.loss)
        with pytest.raises(ValueError, match="Swapped computes something else"):
            experts_forward(Swapped(), *ROUTED)

    def test_keywords_and_other_calls(self, calls: Calls) -> None:
        """Tensors by name are ours; what was not proven goes to the module's own code."""
        theirs = Experts()
        ours = nn.Sequential(copy.deepcopy(theirs))
        liger_kernel.patch(ours)
        names = ("hidden_states", "top_k_index", "top_k_weights")
        calls.clear()
        assert ours[0](**dict(zip(names, ROUTED, strict=True))).shape == ROUTED[0].shape
        assert calls["fused_moe"] == 1
        x, index, weights = ROUTED
        for given in ((x, index, weights[:, :1]), (x.half(), index, weights)):
            errors = []
            for module in (ours[0], theirs):
                with pytest.raises((RuntimeError, IndexError)) as caught:
                    module(*given)
                errors.append(str(caught.value))
            assert errors[0] == errors[1]
        assert calls["fused_moe"] == 1

    @pytest.mark.parametrize("cls", [Swapped, LimitedBelow, LimitedAbove, WeighsTokens, Normed])
    def test_a_form_a_little_different_is_refused(self, cls: type[nn.Module]) -> None:
        assert experts_rows(nn.Sequential(cls())) == {
            (None, f"{cls.__name__} computes something else")
        }

    def test_pairs_of_no_expert(self) -> None:
        """What expert parallelism makes of the experts of other ranks, as transformers' grouped product does it."""
        model = mixture()
        liger_kernel.patch(model)
        experts = model.model.layers[0].mlp.experts
        x = Make(torch.float32).randn(9, 48)
        index = torch.tensor([[0, 4], [4, 4], [3, 1]] * 3)
        weights = torch.rand(9, 2).masked_fill(index == 4, 0.0)
        expected = type(experts).forward(experts, x, index, weights)
        high = type(experts).forward.__wrapped__(
            copy.deepcopy(experts).double(), x.double(), index.clamp(max=3), weights.double()
        )
        assert_no_worse("output", experts(x, index, weights), high, expected)

    def test_copies_are_bound_to_themselves(self, calls: Calls) -> None:
        model = mixture()
        liger_kernel.patch(model)
        expected, _ = step(model, **batch())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for ours, theirs in zip(twin.modules(), model.modules(), strict=True):
                assert ours is not theirs
                bound = getattr(vars(ours).get("forward"), "args", (ours,))
                assert bound[0] is ours
            calls.clear()
            assert torch.equal(step(twin, **batch())[0].loss, expected.loss)
            assert calls["fused_moe"] == model.config.num_hidden_layers
            liger_kernel.unpatch(twin)
            assert "forward" not in vars(twin.model.layers[0].mlp.experts)

    def test_another_implementation_is_left_alone(self, calls: Calls) -> None:
        """Before the patch, and after it."""
        ((by, reason),) = experts_rows(mixture(implementation="sonicmoe"))
        assert by is None
        assert "'sonicmoe'" in reason
        model = mixture()
        liger_kernel.patch(model)
        model.set_experts_implementation("sonicmoe")
        assert not model.model.layers[0].mlp.experts._liger_experts.holds(
            model.model.layers[0].mlp.experts
        )
        ((by, reason),) = experts_rows(build("dbrx", **DBRX))
        assert (by, "DbrxExpertGLU" in reason) == (None, True)

    @pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
    def test_what_the_registry_runs_is_replaced(
        self, first: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The gate of one module, or the function of a name: before the patch, or after it."""
        experts = mixture().model.layers[0].mlp.experts
        liger_kernel.patch(model := nn.Sequential(experts))  # and verdicts are known
        given = torch.randn(6, 48), *ROUTED[1:]
        expected = experts(*given)

        def assert_left_alone() -> None:
            if first:
                liger_kernel.unpatch(model)
                liger_kernel.patch(model)
            calls.clear()
            assert not torch.equal(experts(*given), expected)
            assert calls["fused_moe"] == 0

        with monkeypatch.context() as change:
            own = experts._apply_gate
            change.setitem(vars(experts), "_apply_gate", lambda gate_up: 2 * own(gate_up))
            assert_left_alone()
        names: Any = _registry()
        with monkeypatch.context() as change:
            theirs = names["grouped_mm"]
            change.setitem(names, "grouped_mm", lambda *args: 2 * theirs(*args))
            assert_left_alone()

    def test_options_reach_them(self) -> None:
        model = mixture()
        kinds = {row.kind for row in liger_kernel.patch(model, mlp=False).rows}
        assert "experts" not in kinds

    @pytest.mark.usefixtures("one_graph")
    def test_compiles_to_one_graph(self) -> None:
        model = mixture(dtype=torch.bfloat16)
        liger_kernel.patch(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert compiled(**batch(), use_cache=False).loss.isfinite()


ROUTED = (torch.randn(6, 32), torch.tensor([[0, 2], [1, 0], [2, 1]] * 2), torch.rand(6, 2))


DBRX = {
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}
