"""The fused head of TRL's trainers (`trl.trainer.utils.add_fused_lm_head`, TRL 1.16), served by the head of the model.

TRL puts a forward of its own around the model's. Called with `fused_lm_head=True`, that runs the backbone and reads the
weight of the head, past the head's own call, and it waits for the device to learn which tokens are labelled. In a
patched model the model's own forward runs instead: what it does to its logits is recorded as ever, and in the place of
the loss its head computes what TRL wants to know of each token. Calls that cannot be served run TRL's code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.loss_head.linear_logprobs import linear_logprobs
from liger_kernel.transformers.patching.tensor_parallel import closure, sharded_logprobs

#: TRL's keyword for its head, and ours in its place: the settings of that head
THEIRS, OURS = "fused_lm_head", "liger_trl_head"
_IGNORED = -100
#: TRL's name of what it may ask for: the field of `LogProbs`, and the option for it
_FIELDS = {
    "log_probs": ("log_prob", ""),
    "entropy": ("entropy", "entropy"),
    "log_sum_sq_probs": ("sum_p2", "sum_p2"),
    "mean_logits": ("mean_logit", "mean_logit"),
    "is_top1": ("is_top1", "top1"),
}


class TRLHead(NamedTuple):
    """What `add_fused_lm_head` was given, and the function that it put around `beneath`."""

    own: Callable[..., Any]
    beneath: Any
    temperature: float
    wide: bool
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, forward: Any) -> TRLHead | None:
        """The head whose forward this is; None for any other forward, and one of a release that we do not know."""
        function = getattr(forward, "__func__", forward)
        home = getattr(function, "__globals__", {})
        if home.get("__name__") != "trl.trainer.utils" or "FusedCausalLMOutput" not in home:
            return None
        found = closure(function)
        names = ("original_forward", "temperature", "cast_lm_head_to_fp32", "outputs")
        if not found.keys() >= {*names} or not {*found["outputs"]} <= _FIELDS.keys():
            return None
        return cls(function, *(found[name] for name in names))

    def call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """By TRL's own code."""
        return self.own(model, *args, **{THEIRS: True}, **kwargs)


@dataclass(eq=False)
class TokenCall:
    """One call of TRL's head: the labels of the tokens to score, (B, S), and what is found of them."""

    head: TRLHead
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    found: dict[str, Tensor] | None = None
    loss: Tensor | None = None

    @property
    def shifts(self) -> bool:
        return self.kwargs.get("shift_labels") is None

    @property
    def labels(self) -> Tensor:
        given: Tensor = self.kwargs["labels"][:, 1:] if self.shifts else self.kwargs["shift_labels"]
        return given

    def for_model(self) -> dict[str, Any]:
        """The keyword arguments of the model's own forward, whose loss is divided here."""
        kwargs = {n: v for n, v in self.kwargs.items() if n != "num_items_in_batch"}
        if not self.shifts:
            kwargs["shift_labels"] = self.labels.contiguous()  # HF's loss takes a view of them
        return {**kwargs, "use_cache": False, "skip_logits": True}

    def targets(self, rows: int) -> Tensor | None:
        """A label for each of so many rows of hidden states; None if they are not one for each token."""
        labels = self.labels
        if self.shifts and rows == labels.shape[0] * (labels.shape[1] + 1):
            labels = F.pad(labels, (0, 1), value=_IGNORED)
        return labels.reshape(-1) if labels.numel() == rows else None

    def of_head(
        self, hidden: Tensor, weight: Any, bias: Any, targets: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        """From inside of the head's call, whose hooks see plain tensors."""
        wanted = {_FIELDS[name][1]: True for name in self.head.outputs if name != "log_probs"}
        logprobs: Any = sharded_logprobs if is_dtensor(weight) else linear_logprobs
        found = logprobs(
            hidden,
            weight,
            targets.to(hidden.device),
            bias=bias,
            temperature=self.head.temperature,
            ignore_index=_IGNORED,
            **wanted,
            **options,
        )
        return tuple(t for t in found if t is not None)

    def take(self, columns: tuple[Tensor, ...]) -> Tensor:
        """What has come out of the head's call; returns the loss."""
        names = {"log_probs", *self.head.outputs}
        inner = [name for name in _FIELDS if name in names]
        batch, length = self.labels.shape
        self.found = {
            name: column.view(batch, -1)[:, :length]
            for name, column in zip(inner, columns, strict=True)
        }
        mask = self.mask
        if "log_sum_sq_probs" in names:
            found = self.found["log_sum_sq_probs"].detach()
            self.found["log_sum_sq_probs"] = found.log().masked_fill(~mask, 0)
        if "mean_logits" in names:
            self.found["mean_logits"] = self.found["mean_logits"].detach()
        divisor = self.kwargs.get("num_items_in_batch")
        if divisor is None:
            divisor = mask.sum().clamp(min=1)
        return -self.found["log_probs"].sum() / divisor

    @property
    def mask(self) -> Tensor:
        assert self.found is not None
        return (self.labels != _IGNORED).to(self.found["log_probs"].device)

    def output(self, output: Any) -> Any:
        """TRL's output; None where the model's own, `output`, has less to give."""
        if self.found is None:
            return None
        config: Any = self.model.config.get_text_config()
        routers = getattr(config, "output_router_logits", False)
        aux_loss = getattr(output, "aux_loss", None)
        if self.kwargs.get("output_router_logits", routers) and aux_loss is None:
            return None
        loss = output[0] if isinstance(output, tuple) else output.loss
        # a release of TRL that knows no such head has no such output
        home: Any = sys.modules.get("trl.trainer.utils")
        made = getattr(home, "FusedCausalLMOutput", dict)
        return made(loss=loss, label_mask=self.mask, aux_loss=aux_loss, **self.found)
