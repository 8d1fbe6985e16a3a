"""Linears whose frozen weights are kept in 4 or 8 bits: bitsandbytes' (NF4, FP4, LLM.int8) and torchao's.

They are known by what they hold, so that neither library is imported. A form is used once a layer of it has computed
what a product with the dequantised weight does, forward and backward: on its device, on a few rows, for the first layer
of that form. What a layer holds is looked up in every call.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from liger_kernel._core.autograd import Recompute
from liger_kernel._core.tolerance import excess
from liger_kernel.backends import kernels_of
from liger_kernel.ops.dequantize_4bit import dequantize_4bit
from liger_kernel.ops.lora_linear import Quantised
from liger_kernel.transformers.patching.facts import Reading
from liger_kernel.transformers.patching.linears import is_hooked

Form = tuple[Any, ...]
#: the form of a layer -> the code of its class when it was proven, and why it is not used, or None
_verdicts: dict[Form, tuple[Reading, str | None]] = {}


def name(layer: nn.Module) -> str | None:
    """What the weight of `layer` is called; None if it is not quantised, in a way that is known here."""
    found = _read(layer)
    return None if found is None else found[0][0]


def reason(layer: nn.Module) -> str | None:
    """Why LoRA of ours does not go on top of this layer, whose weight has a `name`; None if it does."""
    form, quantised = _read(layer) or ((), None)
    if quantised is None:
        return f"its {name(layer)} weight is not as it is trained with"
    if form not in _verdicts or not _verdicts[form][0].holds(type(layer)):
        _verdicts[form] = Reading(None, type(layer), "forward"), _tried(layer, quantised)
    return _verdicts[form][1]


def weight_and_bias(layer: nn.Module) -> tuple[Quantised, Tensor | None] | None:
    """As `linears.weight_and_bias`, of a layer whose weight is quantised, in a form that was proven."""
    attributes = layer.__dict__
    form, quantised = _read(layer) or ((), None)
    if quantised is None or "forward" in attributes or is_hooked(attributes):
        return None
    code, refused = _verdicts.get(form, (None, ""))
    if code is None or refused is not None or not code.holds(type(layer)):
        return None
    return quantised, attributes["_parameters"].get("bias")


# -- what a layer holds ------------------------------------------------------------------------------------------------


def _read(layer: nn.Module) -> tuple[Form, Quantised | None] | None:
    """The form of its weight, and how to compute with it; None for the latter where its layer does that in another way.

    None for a layer that is not known.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        return None
    for known in (_of_4_bits, _of_8_bits, _of_torchao):
        found = known(layer, weight)
        if found is not None:
            form, quantised = found
            return (*form, type(layer), type(weight), weight.device.type), quantised
    return None


def _of_4_bits(layer: Any, weight: Any) -> tuple[Form, Quantised | None] | None:
    """bitsandbytes' Linear4bit: `weight.quant_state` has the numbers beside the packed ones."""
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "quant_type", None) not in ("nf4", "fp4"):
        return None
    inner = state.state2 if state.nested else None
    block = 256 if inner is None else inner.blocksize
    form = (state.quant_type.upper(), state.nested, state.blocksize, block, state.dtype)
    # the first call may set it; a layer that has been run on the CPU without training packs its weight anew
    dtype = layer.compute_dtype
    ready = dtype is not None and getattr(layer, "compute_type_is_set", True)
    shape = (layer.out_features, layer.in_features)
    if not ready or getattr(state, "packing_format_for_cpu", False) or tuple(state.shape) != shape:
        return form, None

    def dense(dtype: torch.dtype) -> Tensor:
        theirs = sys.modules.get("bitsandbytes")
        if theirs is not None and isinstance(kernels_of("dequantize_4bit", weight), Recompute):
            found: Tensor = theirs.functional.dequantize_4bit(weight.data, state).to(dtype)
            return found
        scales = (None, None, None) if inner is None else (inner.code, inner.absmax, state.offset)
        return dequantize_4bit(
            weight.data,
            state.code,
            state.absmax,
            *scales,
            shape=shape,
            dtype=dtype,
            blocksize=state.blocksize,
            absmax_blocksize=block,
        )

    return (*form, dtype), Quantised(dense, dtype)


def _of_8_bits(layer: Any, weight: Any) -> tuple[Form, Quantised | None] | None:
    """bitsandbytes' Linear8bitLt (LLM.int8): its forward quantises x, too, and is run; its backward does not."""
    state: Any = getattr(layer, "state", None)
    if not {"CB", "SCB", "has_fp16_weights", "threshold"} <= vars(state or type).keys():
        return None
    numbers, scales = state.CB, state.SCB
    if numbers is None or scales is None:  # until the first call
        numbers, scales = getattr(weight, "CB", None), getattr(weight, "SCB", None)
    form = ("LLM.int8",)
    if state.has_fp16_weights or numbers is None or scales is None:
        return form, None

    def dense(dtype: torch.dtype) -> Tensor:
        out = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
        return torch.mul(numbers, scales.view(-1, 1) * (1 / 127), out=out)

    return form, Quantised(dense, None, _own_forward(layer))


def _own_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        found: Tensor = type(layer).forward(layer, x)
        return found

    return forward


def _of_torchao(layer: nn.Module, weight: Any) -> tuple[Form, Quantised | None] | None:
    """An `nn.Linear` whose weight is a subclass of Tensor."""
    if type(layer) is not nn.Linear or not type(weight).__module__.startswith("torchao."):
        return None
    form = (f"torchao's {type(weight).__name__}", weight.dtype)
    if weight.requires_grad or not hasattr(weight, "dequantize"):
        return form, None
    return form, Quantised(lambda dtype: weight.dequantize().to(dtype))


# -- the proof ---------------------------------------------------------------------------------------------------------


def _tried(layer: Any, quantised: Quantised) -> str | None:
    """Runs the layer on a few rows beside the product with its dequantised weight."""
    kind, weight, bias = type(layer).__name__, layer.weight, layer.bias
    if weight.is_meta:
        return f"{kind} has no numbers yet; patch the model when it is loaded"
    dtype = quantised.dtype or (weight.dtype if weight.is_floating_point() else torch.float16)
    dtype = dtype if bias is None or quantised.dtype is not None else bias.dtype
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.in_features, generator=draw).to(weight.device, dtype)
    dy = torch.randn(4, layer.out_features, generator=draw).to(x)
    twin = copy.copy(layer)  # it may note the dtype of its first input
    try:
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(weight.device.type, enabled=False),
        ):
            leaf = x.clone().requires_grad_()
            y = type(layer).forward(twin, leaf)
            theirs = (y, *torch.autograd.grad(y, leaf, dy))
    except Exception as error:  # foreign code may raise anything
        first, *_ = str(error).splitlines() or [""]
        return f"{kind} cannot be run alone: {type(error).__name__}: {first[:120]}"
    with torch.no_grad():
        ours, exact = (
            (F.linear(x.to(w), w, None if bias is None else bias.to(w)), dy.to(w) @ w)
            for w in (quantised.dense(dtype), quantised.dense(torch.float32).double())
        )
    pairs = list(zip(ours, exact, theirs, strict=True))
    if quantised.forward is not None:
        pairs = pairs[1:]
    for one, true, other in pairs:
        if max(excess(one, true, other), excess(other, true, one)) > 1:
            return f"{kind} computes something else than a product with its dequantised weight"
    return None
