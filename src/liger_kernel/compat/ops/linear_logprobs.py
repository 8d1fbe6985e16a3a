"""The incumbent's name for log-probabilities from hidden states, as verl calls it."""

from __future__ import annotations

import torch.nn.functional as F

import liger_kernel.loss_head.linear_logprobs as _op
from liger_kernel.compat.function import autograd_function


def _scaled_cross_entropy(
    _input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False,
    selected_token_ids=None,
):  # fmt: skip
    """The negative log-probability of each token (N,) in fp32; with `return_entropy` the entropy in the dtype of
    `_input`, and with `selected_token_ids` (K,) the log-probabilities of these classes (N, K), 0 where the token is
    ignored. `m_tiles_per_cluster` is checked and changes nothing."""
    if type(m_tiles_per_cluster) is not int:
        raise TypeError(f"m_tiles_per_cluster must be an int, got {m_tiles_per_cluster!r}.")
    if m_tiles_per_cluster < 1:
        raise ValueError(f"m_tiles_per_cluster must be >= 1, got {m_tiles_per_cluster}.")
    if type(return_entropy) is not bool:
        raise TypeError(f"return_entropy must be a bool, got {return_entropy!r}.")
    if type(temperature) not in (int, float):
        raise TypeError(f"temperature must be a real number, got {temperature!r}.")
    found = _op.linear_logprobs(
        _input, weight, target, temperature=temperature, entropy=return_entropy,
        logsumexp=selected_token_ids is not None, ignore_index=ignore_index,
    )  # fmt: skip
    outputs = [-found.log_prob]
    if found.entropy is not None:
        outputs.append(found.entropy.to(_input.dtype))
    if found.logsumexp is not None:
        logits = F.linear(_input, weight[selected_token_ids]).to(found.logsumexp.dtype)
        selected = logits / temperature - found.logsumexp[:, None]
        outputs.append(selected.masked_fill((target == ignore_index)[:, None], 0))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


LigerFusedLinearScaledCrossEntropyFunction = autograd_function(
    "LigerFusedLinearScaledCrossEntropyFunction", _scaled_cross_entropy
)
