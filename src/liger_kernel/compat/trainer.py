"""TRL's trainer for ORPO, with its loss from the head of the model. TRL is needed when the class is asked for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from liger_kernel.chunked_loss.orpo_loss import ORPOOptions, pair_loss
from liger_kernel.ops.logprobs import logprobs
from liger_kernel.transformers.patching import patch
from liger_kernel.transformers.patching.forward import KEY
from liger_kernel.transformers.patching.trl_head import OURS, TRLHead

_IGNORED = -100
LOSS_ONLY = {"rms_norm": False, "layer_norm": False, "mlp": False, "rope": False}


def _by_logits(model: Any, *args: Any, labels: Tensor, **kwargs: Any) -> dict[str, Any]:
    """What the head says of the tokens, where it cannot be asked: from all logits."""
    output = model(*args, **{n: v for n, v in kwargs.items() if n != "fused_lm_head"})
    found = logprobs(output.logits[:, :-1], labels[:, 1:], mean_logit=True)
    said = {"log_probs": found.log_prob, "mean_logits": found.mean_logit}
    return {**said, "aux_loss": getattr(output, "aux_loss", None)}


_HEAD = TRLHead(_by_logits, None, 1.0, False, ("log_probs", "mean_logits"))


def _orpo_trainer() -> Any:
    try:
        try:
            from trl.experimental.orpo import ORPOTrainer
        except ImportError:  # before TRL 0.26
            from trl import ORPOTrainer
    except ImportError as error:
        raise ImportError("Please `pip install trl` to use LigerORPOTrainer") from error
    return ORPOTrainer


class _FusedORPO:
    """`ORPOTrainer`, which never holds the logits. The model's loss is patched; what else was patched stays so.

    `logits/chosen` and `logits/rejected` are means over the tokens that are no padding. Encoder-decoder models are
    trained by TRL's own code.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self._has_head() and not self.is_encoder_decoder:
            patch(self._bare(), **LOSS_ONLY)

    def _bare(self: Any) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _has_head(self) -> bool:
        return KEY in vars(self._bare())

    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> Any:
        """The loss, without that of a router, and what `LigerFusedLinearORPOLoss` returns beside it."""
        if self.is_encoder_decoder:
            return _orpo_trainer().concatenated_forward(self, model, batch)
        return self._losses(model, batch)[:2]

    def _losses(
        self: Any, model: Any, batch: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        both = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=getattr(self, "padding_value", 0),
            device=self.accelerator.device,
        )
        ids, attended = (both[f"concatenated_{n}"] for n in ("input_ids", "attention_mask"))
        given = {"input_ids": ids, "attention_mask": attended, "use_cache": False}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        given["labels"] = labels = ids.masked_fill(attended == 0, _IGNORED)
        output = model(**given, **{OURS: _HEAD}) if self._has_head() else _by_logits(model, **given)
        tokens, logits = output["log_probs"], output["mean_logits"]
        pairs = len(batch["chosen_labels"])
        answers = both["concatenated_labels"][:, 1:] != _IGNORED
        logps = (tokens * answers).sum(1) / answers.sum(1).clamp(min=1)
        counts = labels[:, 1:] != _IGNORED
        sides = slice(pairs), slice(pairs, None)
        nll = -tokens[:pairs].sum() / counts[:pairs].sum().clamp(min=1)
        chosen, rejected = (logps[side] for side in sides)
        losses, *metrics = pair_loss(ORPOOptions(beta=self.beta), chosen, rejected)
        means = [logits[side].sum() / counts[side].sum().clamp(min=1) for side in sides]
        rewards, odds = metrics[:2], [metric.mean() for metric in metrics[2:]]
        beside = (chosen, rejected, *means, nll, *rewards, *odds)
        loss: Tensor = nll + losses.mean()
        return loss, tuple(t.detach() for t in beside), output.get("aux_loss")

    def get_batch_loss_metrics(
        self: Any, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, and its metrics by the names that TRL's trainer logs."""
        if self.is_encoder_decoder:
            by_trl: Any = _orpo_trainer().get_batch_loss_metrics
            found: tuple[Tensor, dict[str, float]] = by_trl(self, model, batch, train_eval)
            return found
        loss, beside, aux_loss = self._losses(model, batch)
        chosen, rejected, chosen_logits, rejected_logits, nll, good, bad, ratio, odds = beside
        of_all = {
            "rewards/chosen": good,
            "rewards/rejected": bad,
            "rewards/accuracies": (good > bad).float(),
            "rewards/margins": good - bad,
            "logps/rejected": rejected,
            "logps/chosen": chosen,
            "logits/rejected": rejected_logits,
            "logits/chosen": chosen_logits,
            "nll_loss": nll,
            "log_odds_ratio": ratio,
            "log_odds_chosen": odds,
        }
        means = [self.accelerator.gather_for_metrics(t).mean() for t in of_all.values()]
        prefix = "eval_" if train_eval == "eval" else ""
        metrics = dict(
            zip((f"{prefix}{n}" for n in of_all), torch.stack(means).tolist(), strict=True)
        )
        if self.aux_loss_enabled:
            loss = loss + self.aux_loss_coef * aux_loss
        return loss, metrics


@functools.cache
def _trainer() -> Any:
    named = {"__module__": "liger_kernel.transformers.trainer", "__doc__": _FusedORPO.__doc__}
    return type("LigerORPOTrainer", (_FusedORPO, _orpo_trainer()), named)


def __getattr__(name: str) -> Any:
    if name == "LigerORPOTrainer":
        return _trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
