"""The GRPO family on logits (B, L + 1, V) of completions, the last of which predicts nothing: see `core`.

Also served as `liger_kernel.transformers.grpo_loss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import liger_kernel.ops.grpo_loss as _op
from liger_kernel._core.autograd import is_transformed
from liger_kernel._core.checks import check_choice
from liger_kernel.backends import can_look
from liger_kernel.chunked_loss.engine import of_sequences_or_tokens
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.policy import get_gamma_weights
from liger_kernel.compat.function import autograd_function
from liger_kernel.ops.grpo_loss.contract import LOSS_TYPES, NOT_COUNTED, TOKEN_LEVEL_ONLY
from liger_kernel.ops.grpo_loss.reference import token_terms

__all__ = ["GrpoLossFunction", "fused_selective_log_softmax", "get_gamma_weights", "triton_grpo_loss"]  # fmt: skip


def _padded(per_token, value=0):
    """(B, L), or (B, 1), as the tokens of all rows of logits (B * (L + 1),)."""
    return None if per_token is None else F.pad(per_token, (0, 1), value=value).reshape(-1)


def _counted(logits, token_ids, mask):
    """The last L ids (B, L), NOT_COUNTED where the mask is 0."""
    if logits.ndim != 3 or token_ids.ndim != 2 or token_ids.shape[0] != logits.shape[0]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and the tokens {tuple(token_ids.shape)}, not (B, L + 1, V) "
            f"and (B, L); a packed batch is one sequence, B = 1."
        )
    length = logits.shape[1] - 1
    for name, t in (("token ids", token_ids), ("mask", mask)):
        if t is not None and (t.ndim != 2 or t.shape[0] != logits.shape[0] or t.shape[1] < length):
            raise ValueError(
                f"The {name} have shape {tuple(t.shape)}, but the logits are those of {length} tokens and one more; "
                f"pass ({logits.shape[0]}, {length})."
            )
    ids = token_ids[:, token_ids.shape[1] - length :]
    counts = torch.ones_like(ids) if mask is None else mask[:, mask.shape[1] - length :]
    wrong = (ids == NOT_COUNTED) & (counts != 0)
    if not is_transformed() and can_look(wrong) and wrong.any():
        raise IndexError(f"token {NOT_COUNTED} is out of bounds for {logits.shape[2]} classes.")
    return ids.masked_fill(counts == 0, NOT_COUNTED).masked_fill(wrong, NOT_COUNTED - 1)


def _of_tokens(logits, ids, *per_token, **options):
    """`grpo_loss` of every row; what it gives for each as (B, L)."""
    rows = logits.reshape(-1, logits.shape[-1])
    found = _op.grpo_loss(rows, _padded(ids, NOT_COUNTED), *map(_padded, per_token), **options)
    return tuple(t if t is None or not t.ndim else t.view(logits.shape[:2])[:, :-1] for t in found)


@torch.no_grad()
def fused_selective_log_softmax(logits, input_ids, temperature=0.9, mask=None):
    """(B, L) log-probabilities, fp32, of the last L `input_ids` (B, >= L) under logits (B, L + 1, V) / temperature; 0
    where `mask` is 0. The logits are read once; nothing of their size is made."""
    ids = _counted(logits, input_ids, mask)
    return _of_tokens(logits, ids, loss_type="logps", temperature=temperature)[0]


def _token_weights(mask, loss_type, max_completion_length, num_items_in_batch=None):
    """(B, L): a loss is the sum of those of its tokens times these."""
    batch, length = max(mask.shape[0], 1), max(mask.shape[1], 1)
    lengths = mask.sum(1, keepdim=True)
    if loss_type in ("grpo", "sapo"):
        return mask / (lengths.clamp(min=1) * batch)
    if loss_type == "bnpo":
        return mask / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return mask / (batch * (max_completion_length or length))
    if loss_type == "luspo":
        return mask * lengths / (batch * length)
    if loss_type in ("dapo", "cispo", "vespo"):
        return mask / LigerFusedLinearPPOBase._compute_dapo_normalizer(mask, num_items_in_batch)
    raise ValueError(
        f"Unsupported loss_type {loss_type!r} for Triton GRPO loss; use one of {', '.join(LOSS_TYPES)}."
    )


def _reduce_grpo_loss(
    per_token_loss, completion_mask, loss_type, max_completion_length, num_items_in_batch=None
):
    mask = torch.ones_like(per_token_loss) if completion_mask is None else completion_mask
    mask = mask.to(per_token_loss.dtype)
    weights = _token_weights(mask, loss_type, max_completion_length, num_items_in_batch)
    return (per_token_loss * weights).sum()


def _masked_mean(values, mask):
    mask = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _function(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, temperature, beta, eps_low, eps_high,
    inplace, loss_type="grpo", max_completion_length=None, reduce=True, importance_sampling_level="token",
    sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vllm_is_ratio=None, delta=None, use_bias_correction_kl=False,
    num_items_in_batch=None, phi_seq=None,
):  # fmt: skip
    """(loss, mean KL divergence or None, clip ratio), or with reduce=False what they are of, each (B, L).

    logits: (B, L + 1, V). advantages: (B,), (B, 1), or of tokens (B, L), as are vllm_is_ratio and phi_seq. inplace:
    backward writes the gradient over the logits, if they are contiguous; autograd raises if somebody still needs them.
    """
    check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"Unknown loss_type {loss_type!r}. Known types are: {', '.join(LOSS_TYPES)}.")  # fmt: skip
    of_sequences = importance_sampling_level == "sequence"
    if of_sequences and loss_type in TOKEN_LEVEL_ONLY:
        raise ValueError(
            f"Sequence-level importance sampling is not supported for loss_type={loss_type!r}. "
            f"Use importance_sampling_level='token' instead."
        )
    if loss_type == "vespo" and phi_seq is None:
        raise ValueError("loss_type='vespo' requires phi_seq, got None; see get_gamma_weights.")
    if beta and ref_logp is None:
        raise ValueError(f"beta={beta} requires ref_logp, got None; pass beta=0.0.")
    ids = _counted(logits, completion_ids, completion_mask)
    for name, t in (("old_logp", old_logp), ("ref_logp", ref_logp)):
        if t is not None and t.shape != ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, but there are tokens {tuple(ids.shape)}."
            )
    weight = phi_seq if loss_type == "vespo" else vllm_is_ratio
    advantages = of_sequences_or_tokens("advantages", advantages, ids).float()
    if weight is not None:
        weight = of_sequences_or_tokens("weight of the loss", weight, ids).float()
    ref_logp = ref_logp if beta else None
    mask = (ids != NOT_COUNTED).float()
    if completion_mask is not None and completion_mask.is_floating_point():
        mask = mask * completion_mask[:, -ids.shape[1] :]
    sums = _token_weights(mask, loss_type, max_completion_length, num_items_in_batch) if reduce else None  # fmt: skip
    options = {
        "loss_type": loss_type,
        "beta": beta,
        "epsilon_low": eps_low,
        "epsilon_high": eps_high,
        "delta": delta,
        "sapo_temperature_pos": sapo_temperature_pos,
        "sapo_temperature_neg": sapo_temperature_neg,
        "use_bias_correction_kl": use_bias_correction_kl,
    }
    how = {"temperature": temperature, "in_place": inplace}
    if not of_sequences:
        per_token = (t if t is None else t.expand(ids.shape) for t in (advantages, weight))
        loss, kl, clipped = _of_tokens(
            logits, ids, old_logp, ref_logp, *per_token, sums, **options, **how
        )
    else:
        logps = _of_tokens(logits, ids, loss_type="logps", **how)[0]
        old = logps.detach() if old_logp is None else old_logp
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = ((logps - old).masked_fill(mask == 0, 0) * mask).sum(1, keepdim=True) / lengths
        ref = None if ref_logp is None else ref_logp.masked_fill(mask == 0, 0)
        loss, kl, clipped = token_terms(logps, log_ratio, advantages, weight, ref, **options)
        loss, clipped = loss.expand(ids.shape), clipped.float().expand(ids.shape)
        loss = loss if sums is None else (loss.masked_fill(mask == 0, 0) * sums).sum()
    if not reduce:
        return tuple(t if t is None else t.masked_fill(mask == 0, 0) * mask for t in (loss, kl, clipped))  # fmt: skip
    return loss, None if kl is None else _masked_mean(kl.detach(), mask), _masked_mean(clipped, mask)  # fmt: skip


GrpoLossFunction = autograd_function("GrpoLossFunction", _function)


def triton_grpo_loss(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9, beta=0.04,
    eps_low=0.2, eps_high=0.4, inplace=True, loss_type="dapo", max_completion_length=None,
    importance_sampling_level="token", reduce=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
    vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, num_items_in_batch=None, vespo_k_pos=2.0,
    vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
):  # fmt: skip
    """`GrpoLossFunction`; with reduce=True (loss, [mean KL divergence if beta is not 0, clip ratio])."""
    phi_seq = None
    if loss_type == "vespo" and importance_sampling_level == "token":
        logps = fused_selective_log_softmax(logits, completion_ids, temperature, completion_mask)
        log_ratio = torch.zeros_like(logps) if old_logp is None else logps - old_logp
        mask = torch.ones_like(logps) if completion_mask is None else completion_mask
        ratio = vllm_is_ratio
        if ratio is not None:
            ratio = of_sequences_or_tokens("vllm_is_ratio", ratio, logps)
        phi_seq = get_gamma_weights(
            *(advantages, log_ratio.masked_fill(mask == 0, 0), mask, ratio),
            *(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
        )
    loss, kl, clipped = GrpoLossFunction.apply(
        *(logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, temperature),
        *(beta, eps_low, eps_high, inplace, loss_type, max_completion_length, reduce),
        *(importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg, vllm_is_ratio),
        *(delta, use_bias_correction_kl, num_items_in_batch, phi_seq),
    )
    if not reduce:
        return loss, kl, clipped
    return loss, [t for t in (kl, clipped) if t is not None]
