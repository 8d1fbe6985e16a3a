"""A model of one's own, made of the ops: RMSNorm, rotary embedding, gated MLP, and the loss without logits.

python -m examples.plain_pytorch
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common import VOCABULARY, options, train
from liger_kernel.functional import fused_linear_cross_entropy, gated_mlp, rms_norm, rope

WIDTH, HEADS = 128, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(2)])
        self.qkv, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (
            self.qkv(rms_norm(x, self.norms[0])).view(batch, length, 3 * HEADS, -1).transpose(1, 2)
        )
        turned, v = heads.split((2 * HEADS, HEADS), 1)
        q, k = rope(turned, None, cos, sin)[0].chunk(2, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        weights = self.gate.weight, self.up.weight, self.down.weight
        return x + gated_mlp(rms_norm(x, self.norms[1]), *weights, activation="silu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Linear(WIDTH, VOCABULARY, bias=False),
        )
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        speeds = 10_000 ** (-torch.arange(half, device=ids.device) / half)
        angles = (torch.arange(ids.shape[1], device=ids.device)[:, None] * speeds).repeat(1, 2)[
            None
        ]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        x = rms_norm(x, self.norm)[:, :-1].reshape(-1, WIDTH)
        return fused_linear_cross_entropy(x, self.head.weight, labels[:, 1:].reshape(-1))[0]


def main() -> None:
    args = options(__doc__)
    model = Model().to(args.device)
    train(model, args, lambda batch: model(batch["input_ids"], batch["labels"]))


if __name__ == "__main__":
    main()
