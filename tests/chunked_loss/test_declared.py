"""What follows from the declaration of a loss: signatures, attributes, functions, names; and that it takes one file."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import chunked_loss
from liger_kernel._core.declared import LossFunction, LossModule, takes
from liger_kernel.chunked_loss import functional
from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOLoss
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from tests.chunked_loss.full_logits import draw_sequences

HEAD = "weight, target, bias=None"
REF = "ref_input=None, ref_weight=None, ref_bias=None"
#: of `forward` and of `apply`, in the order of the incumbent
SIGNATURES = {
    "CPO": (
        "self, lin_weight, _input, target, bias=None",
        f"_input, {HEAD}, ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, "
        "compiled=True, average_log_prob=False, chunk_size=1",
    ),
    "DPO": (
        f"self, lin_weight, _input, target, bias=None, {REF}",
        f"_input, {HEAD}, {REF}, ignore_index=-100, beta=0.1, compute_nll_loss=False, compiled=True, "
        "use_ref_model=True, average_log_prob=False, chunk_size=1, loss_type='sigmoid', label_smoothing=0.0, "
        "discopop_tau=0.05, alpha=1.0",
    ),
    "SimPO": (
        "self, lin_weight, _input, target, bias=None",
        f"_input, {HEAD}, ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0, compute_nll_loss=False, "
        "compiled=True, gamma=0.5, chunk_size=1",
    ),
    "ORPO": (
        "self, lin_weight, _input, target, bias=None, nll_target=None",
        f"_input, {HEAD}, ignore_index=-100, beta=0.1, compute_nll_loss=True, nll_target=None, compiled=True, "
        "chunk_size=1",
    ),
    "KTO": (
        f"self, _input, lin_weight, target, bias=None, preference_labels=None, {REF}, kl=None",
        f"_input, weight, target, preference_labels, bias=None, {REF}, kl=None, ignore_index=-100, beta=0.1, "
        "compiled=True, use_ref_model=True, average_log_prob=False, chunk_size=1",
    ),
    "GRPO": (
        "self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, "
        f"ref_per_token_logps=None, old_per_token_logps=None, {REF}, vllm_is_ratio=None, num_items_in_batch=None",
        "_input, weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None, "
        f"old_per_token_logps=None, {REF}, beta=0.04, epsilon_low=0.2, epsilon_high=0.2, loss_type='dapo', "
        "max_completion_length=None, importance_sampling_level='token', sapo_temperature_pos=1.0, "
        "sapo_temperature_neg=1.05, temperature=1.0, compiled=True, use_ref_model=True, chunk_size=1, "
        "vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0, vespo_lambda_pos=3.0, "
        "vespo_k_neg=3.0, vespo_lambda_neg=2.0, num_items_in_batch=None",
    ),
}
names = pytest.mark.parametrize("name", SIGNATURES)
#: has no effect on any loss
INERT = {"compiled": False, "chunk_size": 3}
#: other values of options, and the options beside which they matter
OTHERS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "CPO": [
        ({"ignore_index": 0, "beta": 0.3, "alpha": 0.5, "label_smoothing": 0.2}, {}),
        ({"compute_nll_loss": False, "average_log_prob": True}, {}),
    ],
    "DPO": [
        ({"ignore_index": 0, "beta": 0.3, "compute_nll_loss": True, "use_ref_model": False}, {}),
        ({"average_log_prob": True, "loss_type": "hinge"}, {}),
        ({"alpha": 0.5}, {"compute_nll_loss": True}),
        ({"label_smoothing": 0.2}, {"loss_type": "robust"}),
        ({"discopop_tau": 0.5}, {"loss_type": "discopop"}),
    ],
    "SimPO": [
        ({"ignore_index": 0, "beta": 0.3, "label_smoothing": 0.2, "gamma": 1.0}, {}),
        ({"compute_nll_loss": False}, {"compute_nll_loss": True}),
        ({"alpha": 0.5}, {"compute_nll_loss": True}),
    ],
    "ORPO": [({"ignore_index": 0, "beta": 0.3, "compute_nll_loss": False}, {})],
    "KTO": [
        ({"ignore_index": 0, "beta": 0.3, "average_log_prob": True}, {"use_ref_model": True}),
        ({"use_ref_model": True}, {"use_ref_model": False}),
    ],
    "GRPO": [
        ({"beta": 0.3, "use_ref_model": False, "epsilon_low": 0.05, "epsilon_high": 0.05}, {}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence", "temperature": 0.7}, {}),
        ({"delta": 1.01, "use_bias_correction_kl": True}, {}),
        ({"max_completion_length": 4}, {"loss_type": "dr_grpo", "max_completion_length": 9}),
        ({"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 2.0}, {"loss_type": "sapo"}),
        (
            {
                "vespo_k_pos": 1.0,
                "vespo_lambda_pos": 1.0,
                "vespo_k_neg": 1.0,
                "vespo_lambda_neg": 1.0,
            },
            {"loss_type": "vespo"},
        ),
    ],
}
CHANGES = [
    pytest.param(name, {option: value}, beside, id=f"{name}-{option}")
    for name, groups in OTHERS.items()
    for others, beside in [*groups, (INERT, {})]
    for option, value in others.items()
]


def module_of(name: str) -> Any:
    return getattr(chunked_loss, f"LigerFusedLinear{name}Loss")


def apply_of(name: str) -> Any:
    return getattr(functional, f"liger_fused_linear_{name.lower()}")


def as_function(given: dict[str, Any]) -> dict[str, Any]:
    """`apply` calls the weight of the head by another name than `forward`."""
    return {"weight" if key == "lin_weight" else key: value for key, value in given.items()}


def arguments(name: str) -> dict[str, Any]:
    """The tensors of `forward` by name."""
    drawn = draw_sequences(torch.float32)(0)
    rename = {"hidden": "_input", "weight": "lin_weight", "ref_hidden": "ref_input"}
    given = {rename.get(key, key): value for key, value in drawn.items()}
    given["preference_labels"] = torch.tensor([True, False, False, True])
    given["target"] = given["selected_token_ids"] = given["target"].clamp(min=0)
    positions = torch.arange(given["target"].shape[1])
    given["attention_mask"] = (positions < torch.tensor([[7], [5], [3], [6]])).float()
    given["advantages"] = torch.tensor([0.5, -1.0, 1.5, -0.3])
    logps = (drawn["hidden"] @ drawn["weight"].t() + drawn["bias"]).log_softmax(-1)
    sampled = logps.gather(-1, given["selected_token_ids"][..., None])[..., 0]
    given["old_per_token_logps"] = sampled + 0.1 - 0.2 * (positions % 2)
    taken = inspect.signature(module_of(name).forward).parameters
    return {key: value for key, value in given.items() if key in taken}


def flat(found: tuple[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
    return [found[0], *found[1]]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def bare(function: Any) -> str:
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=empty))


@names
def test_signatures(name: str) -> None:
    forward, apply = SIGNATURES[name]
    assert bare(module_of(name).forward) == f"({forward})"
    assert bare(apply_of(name)) == f"({apply})"


@names
def test_every_option_is_tried(name: str) -> None:
    tried = {option for others, _ in OTHERS[name] for option in others}
    assert tried | INERT.keys() == set(inspect.signature(module_of(name)).parameters)


@pytest.mark.parametrize(("name", "change", "beside"), CHANGES)
def test_options_arrive(name: str, change: dict[str, Any], beside: dict[str, Any]) -> None:
    """By the constructor, by an attribute that is set later, by the function; and they change the outcome."""
    given = arguments(name)
    module = module_of(name)(**beside)
    before = flat(module(**given))
    expected = flat(module_of(name)(**{**beside, **change})(**given))
    for option, value in change.items():
        setattr(module, option, value)
        assert getattr(module, option) == value
    assert same(flat(module(**given)), expected)
    assert same(before, expected) == (change.keys() <= INERT.keys())
    assert same(flat(apply_of(name)(**as_function(given), **module.chosen())), expected)


@names
def test_functions_by_position(name: str) -> None:
    given = arguments(name)
    module = module_of(name)()
    expected = flat(module(**given))
    given = as_function(given) | module.chosen()
    order = inspect.signature(apply_of(name)).parameters
    assert same(flat(apply_of(name)(*(given.get(argument) for argument in order))), expected)


@names
def test_copies(name: str) -> None:
    module = module_of(name)(beta=0.7)
    given = arguments(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is module_of(name)
        assert other.beta == 0.7
        assert same(flat(other(**given)), flat(module(**given)))
    for public in (module_of(name), apply_of(name)):
        assert pickle.loads(pickle.dumps(public)) is public
    assert "beta=0.7" in repr(module)


@names
def test_help(name: str) -> None:
    module = module_of(name)
    assert name in module.__doc__
    text = module.__init__.__doc__
    for option in (
        "beta",
        "compiled, chunk_size",
        "Raises" if name in ("DPO", "GRPO") else "ValueError",
    ):
        assert option in text
    assert "T, H)" in module.forward.__doc__
    assert apply_of(name).__doc__ == module.forward.__doc__


@names
def test_compiled_without_a_graph_break(name: str) -> None:
    given, module = arguments(name), module_of(name)()
    renamed = as_function(given)

    def both() -> list[Tensor]:
        return flat(module(**given)) + flat(apply_of(name)(**renamed))

    torch._dynamo.reset()
    found = torch.compile(both, fullgraph=True, backend="eager")()
    assert same(found, both())


@names
def test_chunk_size_is_checked_though_it_has_no_effect(name: str) -> None:
    given = arguments(name)
    for wrong in (0, 1.0, True):
        with pytest.raises(ValueError, match=f"chunk_size must be a positive integer, got {wrong}"):
            module_of(name)(chunk_size=wrong)
        with pytest.raises(ValueError, match=f"chunk_size must be a positive integer, got {wrong}"):
            apply_of(name)(**as_function(given), chunk_size=wrong)


def test_changed_attributes_are_checked() -> None:
    module = LigerFusedLinearDPOLoss()
    module.loss_type = "ipo"
    with pytest.raises(ValueError, match="Unsupported loss_type: ipo"):
        module(**arguments("DPO"))
    assert "loss_type='ipo'" in repr(module)


def test_arguments_are_bound_as_python_binds_them() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        LigerFusedLinearCPOLoss(gamma=1.0)
    with pytest.raises(TypeError, match="takes from 1 to 9 positional arguments"):
        LigerFusedLinearCPOLoss(*range(9))
    with pytest.raises(TypeError, match="'preference_labels'"):
        functional.liger_fused_linear_kto(*(torch.ones(1),) * 3)
    with pytest.raises(TypeError, match="ppo_loss_fn does not take chunk_size, temperature"):
        LigerFusedLinearGRPOFunction.ppo_loss_fn(
            *(torch.ones(1, 1),) * 4, temperature=2.0, chunk_size=1
        )


def test_a_name_that_is_no_argument_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"LigerFusedLinearCPOLoss has no argument \['aplha', 'gamma'\]"
    ):

        class Wrong(LossFunction, loss=LigerFusedLinearCPOLoss, last="aplha", gamma=1.0): ...


def test_subclasses_keep_the_options() -> None:
    class Harder(LigerFusedLinearDPOLoss):
        def __init__(self, scale: float) -> None:
            super().__init__(beta=2 * scale, use_ref_model=False)
            self.scale = scale

    given = arguments("DPO")
    expected = LigerFusedLinearDPOLoss(beta=0.6, use_ref_model=False)(**given)
    assert same(flat(Harder(0.3)(**given)), flat(expected))

    @takes(type(LigerFusedLinearDPOLoss().options()))
    def init(self: Any) -> None:
        self.ready = self.beta

    assert type("Ready", (LossModule,), {"__init__": init})(beta=0.4).ready == 0.4


TOY = '''
from dataclasses import dataclass

from liger_kernel._core.declared import LossFunction, takes
from liger_kernel.chunked_loss.preference import PairLoss, PairOptions


@dataclass(frozen=True)
class IPOOptions(PairOptions):
    """beta: what the margin should be the inverse of, twice."""

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = False
    average_log_prob: bool = True
    compiled: bool = True
    chunk_size: int = 1


def pair_loss(options, chosen, rejected, *_):
    margin = chosen - rejected
    loss = (margin - 0.5 / options.beta) ** 2
    return loss, options.beta * chosen, options.beta * rejected, margin


class LigerFusedLinearIPOLoss(PairLoss):
    formula = staticmethod(pair_loss)

    @takes(IPOOptions)
    def __init__(self): ...


class LigerFusedLinearIPOFunction(LossFunction, loss=LigerFusedLinearIPOLoss, beta=0.2): ...
'''


def test_a_preference_loss_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ipo_loss.py").write_text(TOY)
    (tmp_path / "aaa_loss.py").write_text(
        "raise RuntimeError('imported, though nobody asked for it')"
    )
    monkeypatch.setattr(chunked_loss, "__path__", [*chunked_loss.__path__, str(tmp_path)])
    try:
        module = chunked_loss.LigerFusedLinearIPOLoss(beta=0.5)
        given = arguments("CPO")
        loss, metrics = module(**given)
        margins = metrics[0] - metrics[1]
        torch.testing.assert_close(loss, ((margins - 1.0) ** 2).mean())
        torch.testing.assert_close(metrics[7], margins.mean())
        assert pickle.loads(pickle.dumps(module)).beta == 0.5
        apply = functional.liger_fused_linear_ipo
        assert same(flat(apply(**as_function(given), beta=0.5)), [loss, *metrics])
        assert "beta=0.2" in bare(apply)
        (tmp_path / "aaa_loss.py").unlink()
        assert "LigerFusedLinearIPOLoss" in dir(chunked_loss)
        assert "liger_fused_linear_ipo" in dir(functional)
    finally:
        sys.modules.pop("liger_kernel.chunked_loss.ipo_loss", None)
        vars(chunked_loss).pop("ipo_loss", None)


def test_no_other_names() -> None:
    for owner, name in (
        (chunked_loss, "LigerFusedLinearPPOLoss"),
        (chunked_loss, "LigerFusedLinearDpoLoss"),
        (functional, "liger_fused_linear_ppo"),
    ):
        with pytest.raises(AttributeError, match=name):
            getattr(owner, name)
    found = {f"liger_fused_linear_{name.lower()}" for name in SIGNATURES}
    assert {name for name in dir(functional) if name.startswith("liger")} == found | {
        "liger_fused_linear_jsd",
        "liger_fused_linear_cosine",
    }
    assert len(chunked_loss.__all__) == 8
