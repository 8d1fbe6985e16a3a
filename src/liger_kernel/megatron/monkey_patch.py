"""Puts our kernels where Megatron-core's own modules look them up."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

_UNSET: Any = object()


def apply_liger_kernel_to_megatron(
    rms_norm: bool = True, cross_entropy: bool = False, swiglu: bool = False
) -> None:
    """Replace Megatron-core's functions and norms by ours, before the model is built; again, it changes nothing.

    rms_norm: in local layer specs, and the last norm of a transformer block. cross_entropy: the fused one and the
    other. swiglu: without bias, fp8 or offloading of its input, which stay Megatron's.
    Raises: ImportError where Megatron-core, or a name that should be there, is missing.
    """
    if rms_norm:
        _patch_local_spec_provider_layer_norm()
        _patch_transformer_block_layernorm_impl()
    if cross_entropy:
        _patch_fused_vocab_parallel_cross_entropy()
        _patch_vocab_parallel_cross_entropy()
    if swiglu:
        _patch_swiglu_function()


def _patch_local_spec_provider_layer_norm() -> None:
    from liger_kernel.megatron.rms_norm import LigerMegatronRMSNorm

    def make(original: Any) -> Any:
        # what a release knows besides goes to its own function
        def patched_layer_norm(self: Any, rms_norm: bool = False, *args: Any, **kwargs: Any) -> Any:
            return LigerMegatronRMSNorm if rms_norm else original(self, rms_norm, *args, **kwargs)

        return patched_layer_norm

    _replace("megatron.core.models.backends", "LocalSpecProvider.layer_norm", make)


def _patch_transformer_block_layernorm_impl() -> None:
    from liger_kernel.megatron.rms_norm import LigerMegatronRMSNorm

    torch_norm = _import("megatron.core.transformer.torch_norm")

    def make(original: Any) -> Any:
        if original is not torch_norm.WrappedTorchNorm:
            logger.info(
                "the last norm of a transformer block stays %s; only WrappedTorchNorm is replaced.",
                getattr(original, "__name__", original),
            )
            return None

        class _LigerOrTorchNorm:
            def __new__(
                cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any
            ) -> Any:
                rms = config.normalization == "RMSNorm"
                build = LigerMegatronRMSNorm if rms else original
                return build(config=config, hidden_size=hidden_size, eps=eps, **kwargs)

        return _LigerOrTorchNorm

    _replace("megatron.core.transformer.transformer_block", "LayerNormImpl", make)


def _patch_fused_vocab_parallel_cross_entropy() -> None:
    from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

    loss: Any = LigerMegatronCrossEntropy()

    def make(original: Any) -> Any:
        def liger_fused_vocab_parallel_cross_entropy(
            vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None
        ) -> Tensor:
            found: Tensor = loss(vocab_parallel_logits, target, tp_group)
            return found

        return liger_fused_vocab_parallel_cross_entropy

    _replace(
        "megatron.core.fusions.fused_cross_entropy",
        "fused_vocab_parallel_cross_entropy",
        make,
        (
            "megatron.core.models.common.language_module.language_module",
            "fused_vocab_parallel_cross_entropy",
        ),
        ("megatron.core.models.backends", "_fused_ce"),
    )


def _patch_vocab_parallel_cross_entropy() -> None:
    from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

    default: Any = LigerMegatronCrossEntropy()

    def make(original: Any) -> Any:
        def liger_vocab_parallel_cross_entropy(
            vocab_parallel_logits: Tensor,
            target: Tensor,
            label_smoothing: float = _UNSET,
            tp_group: Any = None,
        ) -> Tensor:
            loss = default
            if label_smoothing is not _UNSET:
                loss = LigerMegatronCrossEntropy(label_smoothing=label_smoothing)
            group = _tensor_parallel_group() if tp_group is None else tp_group
            found: Tensor = loss(vocab_parallel_logits, target, group)
            return found

        return liger_vocab_parallel_cross_entropy

    _replace(
        "megatron.core.tensor_parallel.cross_entropy",
        "vocab_parallel_cross_entropy",
        make,
        ("megatron.core.tensor_parallel", "vocab_parallel_cross_entropy"),
    )


def _tensor_parallel_group() -> Any:
    """The group that Megatron's own function computes on, which is not given one."""
    state = sys.modules.get("megatron.core.parallel_state")
    return None if state is None else state.get_tensor_model_parallel_group(check_initialized=False)


def _patch_swiglu_function() -> None:
    from liger_kernel.megatron.swiglu import LogOnce, unsupported
    from liger_kernel.ops.glu import LigerFusedGateUpSiLUMulFunction

    tell = LogOnce(logger)

    def make(original: Any) -> Any:
        class _LigerSwiGLUFunction:
            @staticmethod
            def apply(
                input: Tensor, fp8_input_store: bool = False, cpu_offload_input: bool = False
            ) -> Tensor:
                reason = unsupported(None, fp8_input_store, cpu_offload_input)
                if reason is None:
                    return LigerFusedGateUpSiLUMulFunction.apply(input, False)
                tell(reason)
                found: Tensor = original.apply(input, fp8_input_store, cpu_offload_input)
                return found

        return _LigerSwiGLUFunction

    _replace("megatron.core.fusions.fused_bias_swiglu", "SwiGLUFunction", make)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"apply_liger_kernel_to_megatron requires megatron-core, whose {name} could not be imported."
        ) from error


def _replace(module: str, path: str, make: Callable[[Any], Any], *copies: tuple[str, str]) -> None:
    """Put `make(original)` at `path` of `module`, and where modules imported the original from there before."""
    owner = _import(module)
    *outer, name = path.split(".")
    try:
        for part in outer:
            owner = getattr(owner, part)
        original = getattr(owner, name)
    except AttributeError as error:
        raise ImportError(
            f"{module} has no {path}: the symbol path may have changed in this release of megatron-core."
        ) from error
    ours = original
    if not getattr(original, "__liger_patched__", False):
        ours = make(original)
        if ours is None:
            return
        ours.__liger_patched__, ours.__wrapped__ = True, original
        setattr(owner, name, ours)
    for copied_to, as_name in copies:
        user = sys.modules.get(copied_to)
        copy = getattr(user, as_name, ours)
        if copy is ours.__wrapped__:
            setattr(user, as_name, ours)
        elif copy is not ours:
            logger.warning(
                "%s.%s is neither Megatron's function nor ours, and stays.", copied_to, as_name
            )
