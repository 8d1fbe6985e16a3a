"""What runs side by side. To add a provider, add one entry to `PROVIDERS`, and for a peer the table of its calls.

A table maps an op to an adapter: from the options of a case to a function of the case's inputs that returns what the op
returns, or None where the peer has no such thing. Only public names of a peer are called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F

from liger_kernel.testing import OpCase, OpSpec

Function = Callable[..., Any]
Options = Mapping[str, Any]
#: options of ours that decide how the work is done, and not what comes out
HOW = ("chunk_size", "memory_budget", "label_count", "accum_dtype", "in_place")
Table = dict[str, Callable[[Options], "Function | None"]]


@dataclass(frozen=True)
class Provider:
    """`package` names a peer: it runs in its own process, when that package can be imported there."""

    why: str
    bind: Callable[[OpSpec, OpCase], Function | None]
    package: str | None = None
    distribution: str | None = None


def _from(
    table: Table, other: Callable[[str, Options], Function | None] = lambda name, options: None
) -> Callable[[OpSpec, OpCase], Function | None]:
    """`other` binds the ops that are not in the table."""

    def bind(spec: OpSpec, case: OpCase) -> Function | None:
        adapter = table.get(spec.name, partial(other, spec.name))
        return adapter({name: value for name, value in case.options.items() if name not in HOW})

    return bind


def _compiled(spec: OpSpec, case: OpCase) -> Function:
    torch._dynamo.reset()
    # donated buffers save memory, which is what fused losses compare, but forbid the repeated backward timed elsewhere
    torch._functorch.config.donated_buffer = bool(case.flops)
    compiled: Function = torch.compile(partial(spec.reference, **case.options), dynamic=False)
    return compiled


def _plain(options: Options, *supported: str) -> bool:
    """Whether every option outside `supported` is off."""
    return not any(v for k, v in options.items() if k not in supported)


def _only(options: Options, *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _loss_tuple(result: Any) -> tuple[Any, ...]:
    """(loss, z_loss, token_accuracy, predicted_tokens), as our losses return it."""
    if isinstance(result, torch.Tensor):
        return result, None, None, None
    return result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens


# --- PyTorch's own fused forms

LOSS_OPTIONS = ("ignore_index", "reduction", "label_smoothing")


def _torch_rms_norm(o: Options) -> Function | None:
    if o["offset"]:
        return None
    return lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, o["eps"])


def _torch_layer_norm(o: Options) -> Function:
    return lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, o["eps"])


def _torch_group_norm(o: Options) -> Function:
    def norm(x: Any, weight: Any, bias: Any) -> Any:
        ones = (
            torch.ones_like(x[0, :, 0]) if weight is None else weight
        )  # its backward fails without one
        return F.group_norm(x, o["num_groups"], ones.flatten()[: x.shape[1]], bias, o["eps"])

    return norm


def _torch_softmax(o: Options) -> Function:
    return lambda x: F.softmax(x, -1)


def _torch_cross_entropy(o: Options) -> Function | None:
    if not _plain(o, *LOSS_OPTIONS):
        return None
    options = _only(o, *LOSS_OPTIONS)
    return lambda x, target, weight=None: _loss_tuple(F.cross_entropy(x, target, weight, **options))


def _torch_kl_div(o: Options) -> Function:
    options = _only(o, "reduction", "log_target")
    return lambda y_pred, y_true: F.kl_div(y_pred, y_true, **options)


def _torch_linear_cross_entropy(o: Options) -> Function | None:
    if not _plain(o, *LOSS_OPTIONS):
        return None
    options = _only(o, *LOSS_OPTIONS)
    if not hasattr(F, "linear_cross_entropy"):  # before torch 2.13

        def two_calls(
            x: Any, weight: Any, target: Any, bias: Any = None, ce_weight: Any = None
        ) -> tuple[Any, ...]:
            loss = F.cross_entropy(F.linear(x, weight, bias), target, ce_weight, **options)
            return _loss_tuple(loss)

        return two_calls
    chunks = torch.nn.LinearCrossEntropyOptions()

    def function(
        x: Any, weight: Any, target: Any, bias: Any = None, ce_weight: Any = None
    ) -> tuple[Any, ...]:
        loss = F.linear_cross_entropy(
            x, weight, target, linear_bias=bias, weight=ce_weight, options=chunks, **options
        )
        return _loss_tuple(loss)

    return function


TORCH: Table = {
    "rms_norm": _torch_rms_norm,
    "layer_norm": _torch_layer_norm,
    "group_norm": _torch_group_norm,
    "softmax": _torch_softmax,
    "cross_entropy": _torch_cross_entropy,
    "kl_div": _torch_kl_div,
    "fused_linear_cross_entropy": _torch_linear_cross_entropy,
}

# --- liger-kernel from PyPI: `liger_kernel.transformers.functional`


def _liger(name: str) -> Function:
    function: Function = getattr(
        importlib.import_module("liger_kernel.transformers.functional"), name
    )
    return function


def _liger_alike(name: str, o: Options) -> Function | None:
    """Of an op that has our arguments there: the tensors, and the options by name. None where it has none."""
    try:
        function = _liger(f"liger_{name}")
    except AttributeError:
        return None
    return lambda *tensors: function(*tensors, **o)


def _liger_group_norm(o: Options) -> Function:
    function = _liger("liger_group_norm")
    return lambda x, *affine: function(x, *affine, x.shape[1], o["num_groups"], o["eps"])


def _liger_glu(o: Options) -> Function | None:
    names = {"silu": "liger_swiglu", "gelu_tanh": "liger_geglu"}
    if o["activation"] not in names or (o["gate_multiplier"], o["down_multiplier"]) != (1, 1):
        return None
    function = _liger(names[o["activation"]])

    def glu(gate: Any, up: Any) -> Any:
        return function(*gate.chunk(2, -1)) if up is None else function(gate, up)

    return glu


def _liger_rope(o: Options) -> Function | None:
    if o["unsqueeze_dim"] != 1 or not _plain(o, "unsqueeze_dim", "mrope_section"):
        return None
    if not o["mrope_section"]:
        return _liger("liger_rope")
    function, section = _liger("liger_qwen2vl_mrope"), list(o["mrope_section"])
    return lambda *tensors: function(*tensors, section)


def _liger_qk_norm_rope(o: Options) -> Function | None:
    """It has no such op: both norms, then the rotation."""
    if o["unsqueeze_dim"] != 1 or o["interleaved"] or o["rotary_dim"]:
        return None
    norm, rope = _liger("liger_rms_norm"), _liger("liger_rope")

    def normed(x: Any, weight: Any) -> Any:
        heads = x.transpose(1, 2)  # (B, S, H, D)
        rows = heads if weight is None or weight.numel() == x.shape[3] else heads.flatten(2)
        return norm(rows, weight, o["eps"], o["offset"], o["casting_mode"]).view(heads.shape)

    def function(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
        both = normed(q, q_weight), normed(k, k_weight)
        return rope(*(x.transpose(1, 2) for x in both), cos, sin)

    return function


def _plain_experts(o: Options) -> bool:
    """SwiGLU; cases with adapters have another scaling than 1."""
    scales = dict.fromkeys(("alpha", "gate_up_scaling", "down_scaling"), 1.0)
    plain = {"activation": "silu", "gated": True, **scales}
    return not any(value != plain.get(name) and value for name, value in o.items())


def _liger_moe(o: Options) -> Function | None:
    if not _plain_experts(o):
        return None
    apply = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction.apply
    return lambda x, w1, w2, index, weights, *biases: apply(x, w1, w2, index.int(), weights)


def _liger_loss(name: str) -> Callable[[Options], Function]:
    def adapter(o: Options) -> Function:
        function = _liger(name)
        return lambda *tensors: _loss_tuple(function(*tensors, **o))

    return adapter


def _liger_linear_logprobs(o: Options) -> Function | None:
    if not _plain(o, "ignore_index", "temperature", "entropy", *HOW):
        return None
    name = "LigerFusedLinearScaledCrossEntropyFunction"
    apply = getattr(importlib.import_module("liger_kernel.ops"), name).apply
    rest = (o.get("temperature", 1.0), o.get("ignore_index", -100), 1, o.get("entropy", False))

    def function(x: Any, weight: Any, ids: Any, bias: Any, temperatures: Any) -> tuple[Any, ...]:
        found = apply(x, weight, ids, *rest)
        nll, entropy = found if rest[-1] else (found, None)
        return (-nll, entropy, *(None,) * 6)

    return function


def _liger_ce_tvd(o: Options) -> Function:
    function = importlib.import_module("liger_kernel.ops.fused_ce_tvd").LigerFusedCETVDFunction
    return lambda *tensors: function.apply(*tensors, o["ignore_index"])


def _liger_attn_res(o: Options) -> Function | None:
    if o["normed"]:
        return None
    function = _liger("liger_attn_res")
    return lambda *tensors: function(*tensors, o["eps"])


def _liger_mhc_mix(o: Options) -> Function:
    """It has two such ops: to one stream, and to as many as there are, with that of the layer."""
    pre, post_res = _liger("liger_mhc_pre"), _liger("liger_mhc_post_res")

    def function(x: Any, weights: Any, f: Any, f_weights: Any) -> Any:
        if f is None:
            return pre(x, weights.squeeze(-2).float()).unsqueeze(-2)
        return post_res(x, f, f_weights.float(), weights.float())

    return function


#: ops with other arguments there, or another result
LIGER: Table = {
    "attn_res": _liger_attn_res,
    "mhc_mix": _liger_mhc_mix,
    "glu": _liger_glu,
    "rope": _liger_rope,
    "qk_norm_rope": _liger_qk_norm_rope,
    "fused_moe": _liger_moe,
    "group_norm": _liger_group_norm,
    "cross_entropy": _liger_loss("liger_cross_entropy"),
    "fused_ce_tvd": _liger_ce_tvd,
    "fused_linear_cross_entropy": _liger_loss("liger_fused_linear_cross_entropy"),
    "linear_logprobs": _liger_linear_logprobs,
}

# --- other peers


def _cce(o: Options) -> Function | None:
    if not _plain(o, "ignore_index", "reduction", "softcap"):
        return None
    from cut_cross_entropy import linear_cross_entropy

    options = _only(o, "ignore_index", "reduction", "softcap")

    def function(
        x: Any, weight: Any, target: Any, bias: Any = None, ce_weight: Any = None
    ) -> tuple[Any, ...]:
        more = options if bias is None else {**options, "bias": bias}  # newer releases only
        return _loss_tuple(linear_cross_entropy(x, weight, target, **more))

    return function


CCE: Table = {"fused_linear_cross_entropy": _cce}


def _quack_rms_norm(o: Options) -> Function | None:
    if o["offset"]:
        return None
    from quack import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=o["eps"])


def _quack_cross_entropy(o: Options) -> Function | None:
    if not _plain(o, "ignore_index", "reduction"):
        return None
    from quack import cross_entropy

    options = _only(o, "ignore_index", "reduction")
    return lambda x, target, weight=None: _loss_tuple(cross_entropy(x, target, **options))


def _quack_softmax(o: Options) -> Function:
    function: Function = importlib.import_module("quack.softmax").softmax
    return function


QUACK: Table = {
    "rms_norm": _quack_rms_norm,
    "cross_entropy": _quack_cross_entropy,
    "softmax": _quack_softmax,
}


def _hf_experts(o: Options) -> Function | None:
    if not _plain_experts(o):
        return None
    from transformers.integrations.moe import grouped_mm_experts_forward

    def gated(hidden: Any) -> Any:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def function(x: Any, w1: Any, w2: Any, index: Any, weights: Any, *rest: Any) -> Any:
        form = {"has_gate": True, "has_bias": False, "is_transposed": False, "_apply_gate": gated}
        module: Any = SimpleNamespace(
            gate_up_proj=w1, down_proj=w2, num_experts=w1.shape[0], **form
        )
        return grouped_mm_experts_forward(module, x, index, weights)

    return function


HF: Table = {"fused_moe": _hf_experts}


def _base(spec: OpSpec, case: OpCase) -> Function | None:
    """The op of the commit that has our import name by now, on the inputs of this tree's case."""
    testing = importlib.import_module("liger_kernel.testing")
    try:
        if hasattr(testing, "specs"):
            found = testing.specs()[spec.name]
        else:  # a commit before `specs`
            found = importlib.import_module(f"liger_kernel.ops.{spec.name}.cases").SPEC
    except (KeyError, ModuleNotFoundError):
        return None
    return partial(found.function, **case.options)


PROVIDERS: dict[str, Provider] = {
    "ours": Provider("this tree", lambda spec, case: partial(spec.function, **case.options)),
    "eager": Provider(
        "the reference, plain PyTorch", lambda spec, case: partial(spec.reference, **case.options)
    ),
    "torch": Provider("PyTorch's own fused form", _from(TORCH)),
    "compile": Provider("torch.compile(eager, dynamic=False)", _compiled),
    "liger": Provider(
        "liger-kernel from PyPI", _from(LIGER, _liger_alike), "liger_kernel", "liger-kernel"
    ),
    "cce": Provider(
        "Apple's cut cross entropy", _from(CCE), "cut_cross_entropy", "cut-cross-entropy"
    ),
    "quack": Provider("quack-kernels", _from(QUACK), "quack", "quack-kernels"),
    "transformers": Provider("the experts of transformers by grouped_mm", _from(HF)),
    "base": Provider("this op at the commit of --base", _base, "liger_kernel"),
}
