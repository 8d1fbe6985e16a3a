"""A model on paper: the whole model of a configuration on the meta device, which takes no memory and no weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from liger_kernel.cli.answer import UserError, said

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
#: classes of transformers that make a model of a configuration, the likeliest first
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModel",
)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "this needs HuggingFace transformers: pip install liger-kernel[transformers]"
        ) from error
    transformers.logging.set_verbosity_error()
    return transformers


def config_of(model: str, download: bool) -> Any:
    """The configuration of a folder, a config.json, a model type, or a model of the hub.

    Without `download` one of the hub has to be in the cache. No code of a repository is run.
    """
    transformers = _transformers()
    there = _is_there(model)
    if there and Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        there = model not in transformers.CONFIG_MAPPING  # else by chance a folder of that name
        if there:
            raise UserError(
                f"{model}: there is no config.json in this folder; give one that save_pretrained has written"
            )
    if not there and model in transformers.CONFIG_MAPPING:
        try:
            return transformers.AutoConfig.for_model(model)
        except Exception as error:  # a type that is put together from others
            raise UserError(f"{model}: its configuration has no defaults: {said(error)}") from error
    where = {"local_files_only": not download, "trust_remote_code": False}
    try:
        return transformers.AutoConfig.from_pretrained(model, **where)
    except Exception as error:  # of many kinds: no such file, no JSON, no such type, no network
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{model} has code of its own, which no command runs. In Python: liger_kernel.patch(model) of the "
                "loaded model prints the same report, and liger_kernel.doctor(model) examines it."
            ) from error
        if there:
            raised = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
            raise UserError(
                f"{model}: no configuration can be read: {raised}{said(error)}"
            ) from error
        where_not = "no model in the cache of the hub. To look on the hub, add --download."
        if download:  # no network, no such model, or one that asks for a token
            where_not = f"cannot be had from the hub: {said(error)}"
        raise UserError(
            f"{model} is no folder, no config.json, no model type of transformers {transformers.__version__}, and "
            f"{where_not}"
        ) from error


def _is_there(model: str) -> bool:
    """Whether it is a file or a folder. Raises: UserError for what cannot be the name of anything."""
    if not model.strip():
        raise UserError(
            f"MODEL is {model!r}; give a folder, a config.json, a model type or a model of the hub"
        )
    try:
        return Path(model).exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder of somebody else
        reason = getattr(error, "strerror", None) or said(error)
        shown = model if len(model) <= 80 else f"{model[:80]}..."
        raise UserError(f"{shown}: {reason}") from error


def _class_of(config: Any) -> Any:
    transformers = _transformers()
    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if hasattr(found, "_from_config"):
            return found
    first = "AutoModelForCausalLM"
    if getattr(config, "is_encoder_decoder", False):
        first = "AutoModelForSeq2SeqLM"
    elif not getattr(
        config, "is_decoder", False
    ):  # an encoder, which its causal class would make a decoder of
        first = "AutoModelForMaskedLM"
    for name in (first, *_AUTO):
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UserError(f"transformers has no model for a {type(config).__name__}")


def on_paper(model: str, download: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model in training mode, all of its parameters on the meta device."""
    config = config_of(model, download)
    cls = _class_of(config)
    try:
        with torch.device("meta"):
            made = cls._from_config(config, dtype=dtype)
    except Exception as error:  # whatever a configuration is bad for
        raise UserError(f"{model}: {cls.__name__} cannot be built: {said(error)}") from error
    return made.train()


def inputs(model: nn.Module, batch: int, seq: int) -> dict[str, Any]:
    """Text for a forward on paper."""
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    known = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in known:
        given["use_cache"] = False
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids  # HF's own, made of labels, want a token to start with
    return given


#: what HF reads of the numbers -> what it is for rows that are neither packed nor padded; older releases have others
_OF_NUMBERS = {
    "masking_utils.find_packed_sequence_indices": None,
    "masking_utils.fast_all": True,
    "modeling_utils.PreTrainedModel.warn_if_padding_and_no_attention_mask": None,
}


def _autocast(device_type: str, *args: Any, **options: Any) -> Any:
    """`torch.autocast`, which knows no meta device; older releases of transformers turn it off there."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.amp.autocast(device_type, *args, **options)


def _all(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """`torch.all`, of which older releases of transformers learn that nothing is padded."""
    if x.is_meta and not args and not options:
        return torch.tensor(True, device="cpu")
    return torch.Tensor.all(x, *args, **options)


@contextlib.contextmanager
def runnable() -> Iterator[None]:
    """Lets HF's forwards run without numbers, where these could only say that rows are neither packed nor padded."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch, autocast=_autocast, all=_all))
        for name, found in _OF_NUMBERS.items():
            with contextlib.suppress(AttributeError):  # not in this release
                stack.enter_context(mock.patch(f"transformers.{name}", return_value=found))
        yield
