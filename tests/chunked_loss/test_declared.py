"""What follows from the declaration of a loss: signatures, attributes, functions, names; and that it takes one file."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from liger_kernel import chunked_loss
from liger_kernel._core.declared import LossFunction, LossModule, takes
from liger_kernel.chunked_loss import functional, policy
from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOLoss
from liger_kernel.chunked_loss.dpo_loss import LOSSES, LigerFusedLinearDPOLoss
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from tests.chunked_loss.full_logits import draw_sequences

FOLDER = Path(chunked_loss.__file__).parent
HEAD = "weight, target, bias=None"
REF = "ref_input=None, ref_weight=None, ref_bias=None"
DISTILLED = "student_input, student_weight, teacher_input, teacher_weight, true_labels"
DISTILLATION = (
    f"self, {DISTILLED}, student_bias=None, teacher_bias=None",
    f"{DISTILLED}, student_bias=None, teacher_bias=None, weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, "
    "ignore_index=-100, temperature=1.0, compiled=True, chunk_size=1024, return_soft_hard_loss=False",
)
#: of `forward` and of `apply`, in the order of the incumbent, where it has the loss
SIGNATURES = {
    "cosine_similarity": DISTILLATION,
    "cpo": (
        "self, lin_weight, _input, target, bias=None",
        f"_input, {HEAD}, ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, "
        "compiled=True, average_log_prob=False, chunk_size=1",
    ),
    "dpo": (
        f"self, lin_weight, _input, target, bias=None, {REF}",
        f"_input, {HEAD}, {REF}, ignore_index=-100, beta=0.1, compute_nll_loss=False, compiled=True, "
        "use_ref_model=True, average_log_prob=False, chunk_size=1, loss_type='sigmoid', label_smoothing=0.0, "
        "discopop_tau=0.05, alpha=1.0",
    ),
    "grpo": (
        "self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, "
        f"ref_per_token_logps=None, old_per_token_logps=None, {REF}, vllm_is_ratio=None, num_items_in_batch=None",
        "_input, weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None, "
        f"old_per_token_logps=None, {REF}, beta=0.04, epsilon_low=0.2, epsilon_high=0.2, loss_type='dapo', "
        "max_completion_length=None, importance_sampling_level='token', sapo_temperature_pos=1.0, "
        "sapo_temperature_neg=1.05, temperature=1.0, compiled=True, use_ref_model=True, chunk_size=1, "
        "vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0, vespo_lambda_pos=3.0, "
        "vespo_k_neg=3.0, vespo_lambda_neg=2.0, num_items_in_batch=None",
    ),
    "jsd": DISTILLATION,
    "kto": (
        f"self, _input, lin_weight, target, bias=None, preference_labels=None, {REF}, kl=None",
        f"_input, weight, target, preference_labels, bias=None, {REF}, kl=None, ignore_index=-100, beta=0.1, "
        "compiled=True, use_ref_model=True, average_log_prob=False, chunk_size=1",
    ),
    "orpo": (
        "self, lin_weight, _input, target, bias=None, nll_target=None",
        f"_input, {HEAD}, ignore_index=-100, beta=0.1, compute_nll_loss=True, nll_target=None, compiled=True, "
        "chunk_size=1",
    ),
    "simpo": (
        "self, lin_weight, _input, target, bias=None",
        f"_input, {HEAD}, ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0, compute_nll_loss=False, "
        "compiled=True, gamma=0.5, chunk_size=1",
    ),
    "tvd": (
        DISTILLATION[0],
        f"{DISTILLED}, student_bias=None, teacher_bias=None, weight_hard_loss=0.5, weight_soft_loss=0.5, "
        "ignore_index=-100, temperature=1.0, compiled=True, chunk_size=1024, return_soft_hard_loss=False",
    ),
}
NAMES = sorted(file.name.removesuffix("_loss.py") for file in FOLDER.glob("*_loss.py"))
names = pytest.mark.parametrize("name", NAMES)
#: where a loss type is chosen, which ones there are
LOSS_TYPES = {"dpo": sorted(LOSSES), "grpo": policy.LOSS_TYPES}
#: without which a loss type is refused, or its other options have nothing to do
NEEDED: dict[str, Mapping[str, Any]] = {
    "cispo": {"epsilon_high": 1.05},
    "dr_grpo": {"max_completion_length": 9},
    **dict.fromkeys(("exo_pair", "robust"), MappingProxyType({"label_smoothing": 0.1})),
}
STATES = [
    pytest.param(name, kind, id=f"{name}-{kind}" if kind else name)
    for name in NAMES
    for kind in LOSS_TYPES.get(name, [""])
]


def module_of(name: str) -> Any:
    return chunked_loss._class(name, "Loss")


def apply_of(name: str) -> Any:
    return chunked_loss._class(name, "Function").apply


def defaults_of(name: str) -> dict[str, Any]:
    return {
        option: parameter.default
        for option, parameter in inspect.signature(module_of(name)).parameters.items()
    }


def changed(option: str, value: Any) -> Any:
    """Another value of an option that has this one."""
    special = {"ignore_index": 0, "delta": 1.01, "max_completion_length": 4, "chunk_size": 3}
    if option in special:
        return special[option]
    if isinstance(value, str):
        return {"token": "sequence"}.get(value, value)
    return not value if isinstance(value, bool) else 1.25 * value + 0.05


def is_inert(option: str, name: str, kind: str) -> bool:
    """Whether it changes no result, for a reason that its documentation gives."""
    return (
        option in ("compiled", "chunk_size")
        or (option == "temperature" and name == "cosine_similarity")
        or (option == "max_completion_length" and kind != "dr_grpo")
    )


def as_function(given: dict[str, Any]) -> dict[str, Any]:
    """`apply` calls the weight of the head by another name than `forward`."""
    return {"weight" if key == "lin_weight" else key: value for key, value in given.items()}


def arguments(name: str, seed: int = 0) -> dict[str, Any]:
    """The tensors of `forward` by name."""
    drawn = draw_sequences(torch.float32)(seed)
    rename = {"hidden": "_input", "weight": "lin_weight", "ref_hidden": "ref_input"}
    given = {rename.get(key, key): value for key, value in drawn.items()}
    for role, prefix in (("student", ""), ("teacher", "ref_")):
        for tensor, its in (("input", "hidden"), ("weight", "weight"), ("bias", "bias")):
            given[f"{role}_{tensor}"] = drawn[prefix + its]
    given["preference_labels"] = torch.tensor([True, False, False, True])
    given["target"] = given["selected_token_ids"] = given["target"].clamp(min=0)
    given["true_labels"] = given["target"]
    positions = torch.arange(given["target"].shape[1])
    given["attention_mask"] = (positions < torch.tensor([[7], [5], [3], [6]])).float()
    given["advantages"] = torch.tensor([0.5, -1.0, 1.5, -0.3])
    logps = (drawn["hidden"] @ drawn["weight"].t() + drawn["bias"]).log_softmax(-1)
    sampled = logps.gather(-1, given["selected_token_ids"][..., None])[..., 0]
    given["old_per_token_logps"] = sampled + 0.3 * (positions % 5 - 2.5)
    given["num_items_in_batch"] = torch.tensor(50.0)
    taken = inspect.signature(module_of(name).forward).parameters
    return {key: value for key, value in given.items() if key in taken}


def flat(found: Any) -> list[Tensor]:
    return tree_leaves(found)


def constructed(name: str, options: dict[str, Any], **tensors: Any) -> Any:
    return module_of(name)(**options)(**tensors)


def outcome(call: Any, **given: Any) -> list[Tensor] | str:
    """What it returns, or why it refuses to."""
    try:
        return flat(call(**given))
    except ValueError as refusal:
        return str(refusal)


def same(one: list[Tensor] | str, other: list[Tensor] | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return len(one) == len(other) and all(map(torch.equal, one, other))


def bare(function: Any) -> str:
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=empty))


def test_every_loss_has_its_signatures_written_down() -> None:
    assert sorted(SIGNATURES) == NAMES


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    forward, apply = SIGNATURES[name]
    assert bare(module_of(name).forward) == f"({forward})"
    assert bare(apply_of(name)) == f"({apply})"


@pytest.mark.parametrize(("name", "kind"), STATES)
def test_no_option_is_accepted_without_effect(name: str, kind: str) -> None:
    """Another value changes the loss or is refused; so do the constructor, an attribute that is set later, and the
    function, which agree."""
    given, own = arguments(name), defaults_of(name)
    state = own | {n: True for n in ("use_ref_model", "compute_nll_loss") if n in own}
    state |= NEEDED.get(kind, {}) | ({"loss_type": kind} if kind else {})
    before = flat(module_of(name)(**state)(**given))
    for option in own.keys() - {"loss_type"}:
        other = {**state, option: changed(option, state[option])}
        module = module_of(name)(**state)
        setattr(module, option, other[option])
        assert getattr(module, option) == other[option] != state[option]
        by_constructor, by_attribute, by_function = (
            outcome(call, **tensors, **options)
            for call, tensors, options in (
                (partial(constructed, name, other), given, {}),
                (module, given, {}),
                (apply_of(name), as_function(given), other),
            )
        )
        assert same(by_constructor, by_attribute)
        assert same(by_constructor, by_function)
        if isinstance(by_constructor, str):
            assert option in by_constructor
            continue
        expected = by_constructor
        if option == "return_soft_hard_loss":
            assert len(before) == 1
            assert len(expected) == 3
        elif is_inert(option, name, kind):
            said = rf"{option}[^.]*without effect|{option}: rows of logits held at a time"
            assert re.search(said, module.__init__.__doc__)
            torch.testing.assert_close(before, expected)
        else:
            assert not torch.equal(before[0], expected[0]), f"{option} has no effect"


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_loss_types_differ(name: str) -> None:
    given = arguments(name)
    losses = [
        module_of(name)(loss_type=kind, **NEEDED.get(kind, {}))(**given)[0].item()
        for kind in LOSS_TYPES[name]
    ]
    assert len(set(losses)) == len(losses)


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
    option = "temperature" if name == "tvd" else "beta"
    module = module_of(name)(**{option: 0.7})
    given = arguments(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is module_of(name)
        assert getattr(other, option) == 0.7
        assert same(flat(other(**given)), flat(module(**given)))
    for public in (module_of(name), apply_of(name)):
        assert pickle.loads(pickle.dumps(public)) is public
    assert f"{option}=0.7" in repr(module)


@names
def test_help(name: str) -> None:
    module = module_of(name)
    assert name.split("_")[0] in module.__doc__.lower()
    text = module.__init__.__doc__
    for option in (
        "beta",
        "compiled",
        "chunk_size",
        "ValueError",
    ):
        assert option in text or (name, option) == ("tvd", "beta")
    assert re.search("T, H[)]|Hs[)]", module.forward.__doc__)
    assert apply_of(name).__doc__ == module.forward.__doc__


@names
def test_compiled_without_a_graph_break(name: str) -> None:
    given, module = arguments(name), module_of(name)()
    renamed, apply = as_function(given), apply_of(name)

    def both() -> list[Tensor]:
        return flat(module(**given)) + flat(apply(**renamed))

    torch._dynamo.reset()
    found = torch.compile(both, fullgraph=True, backend="eager")()
    assert same(found, both())


@names
def test_chunk_size_is_checked_even_where_it_has_no_effect(name: str) -> None:
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
        module(**arguments("dpo"))
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

    given = arguments("dpo")
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
class ToyOptions(PairOptions):
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


class LigerFusedLinearTOYLoss(PairLoss):
    formula = staticmethod(pair_loss)

    @takes(ToyOptions)
    def __init__(self): ...


class LigerFusedLinearTOYFunction(LossFunction, loss=LigerFusedLinearTOYLoss, beta=0.2): ...
'''


def test_a_preference_loss_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_loss.py").write_text(TOY)
    (tmp_path / "aaa_loss.py").write_text(
        "raise RuntimeError('imported, though nobody asked for it')"
    )
    monkeypatch.setattr(chunked_loss, "__path__", [*chunked_loss.__path__, str(tmp_path)])
    try:
        module = chunked_loss.LigerFusedLinearTOYLoss(beta=0.5)
        given = arguments("cpo")
        loss, metrics = module(**given)
        margins = metrics[0] - metrics[1]
        torch.testing.assert_close(loss, ((margins - 1.0) ** 2).mean())
        torch.testing.assert_close(metrics[7], margins.mean())
        assert pickle.loads(pickle.dumps(module)).beta == 0.5
        apply = functional.liger_fused_linear_toy
        assert same(flat(apply(**as_function(given), beta=0.5)), [loss, *metrics])
        assert "beta=0.2" in bare(apply)
        (tmp_path / "aaa_loss.py").unlink()
        assert "LigerFusedLinearTOYLoss" in dir(chunked_loss)
        assert "liger_fused_linear_toy" in dir(functional)
    finally:
        sys.modules.pop("liger_kernel.chunked_loss.toy_loss", None)
        vars(chunked_loss).pop("toy_loss", None)


def test_no_other_names() -> None:
    for owner, name in (
        (chunked_loss, "LigerFusedLinearPPOLoss"),
        (chunked_loss, "LigerFusedLinearDpoLoss"),
        (functional, "liger_fused_linear_ppo"),
    ):
        with pytest.raises(AttributeError, match=name):
            getattr(owner, name)
    functions = {f"liger_fused_linear_{name}".replace("_similarity", "") for name in NAMES}
    assert {name for name in dir(functional) if name.startswith("liger")} == functions
    assert chunked_loss.__all__ == sorted(module_of(name).__name__ for name in NAMES)
    assert SIGNATURES.keys() <= set(NAMES)
