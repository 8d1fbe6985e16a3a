"""A mixture of experts: the experts, the norms and the loss are replaced, and the router's loss stays in it.

python -m examples.moe
"""

from __future__ import annotations

import liger_kernel
from examples.common import causal_lm, options, train


def main() -> None:
    args = options(__doc__)
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 32,
    }
    model = causal_lm("qwen3_moe", output_router_logits=True, **experts).to(args.device).train()
    report = liger_kernel.patch(model)
    train(model, args, lambda batch: model(**batch).loss)
    print(report)


if __name__ == "__main__":
    main()
