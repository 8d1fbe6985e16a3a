"""torch.compile of a patched model, in one graph: the loss is fused in it, and Inductor fuses the rest.

python -m examples.torch_compile
"""

from __future__ import annotations

import torch

import liger_kernel
from examples.common import causal_lm, options, train


def main() -> None:
    # on a CPU Inductor needs a C++ compiler; "aot_eager" traces the same graph without one
    args = options(__doc__, backend=("inductor", "aot_eager"))
    model = causal_lm().to(args.device).train()
    report = liger_kernel.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend=args.backend)
    train(model, args, lambda batch: compiled(**batch, use_cache=False).loss)
    print(report)


if __name__ == "__main__":
    main()
