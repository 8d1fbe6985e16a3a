"""GRPO with a reward that a program can check: a line of code is continued so that its brackets are closed.

python -m examples.alignment.grpo
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.alignment.compare import Example, compare, hidden, token_logps
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

CLOSING = {"(": ")", "[": "]", "{": "}"}
GROUP = 8  # completions of a prompt


class Samples(NamedTuple):
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, C), the completions to the end of their line
    rewards: Tensor  # (B,)
    advantages: Tensor  # (B,)


def is_closed(line: str) -> bool:
    """Whether each bracket of the line is closed by its own kind, and none is left open."""
    awaited: list[str] = []
    for letter in line:
        if letter in CLOSING:
            awaited.append(CLOSING[letter])
        elif letter in CLOSING.values() and (not awaited or awaited.pop() != letter):
            return False
    return not awaited


class GRPO(Example):
    loss_of = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="dapo")
    same_batches = False  # once a rounding picks another token, the runs see other samples

    def __init__(self, args: argparse.Namespace, tokens: Tensor) -> None:
        super().__init__(args, tokens)
        self.tokenizer = Tokenizer.from_file(str(args.tokenizer_file))
        words = [self.tokenizer.decode([i]) for i in range(args.vocabulary)]
        self.prompt = args.seq - args.answer
        opens = torch.tensor([word.endswith("(") for word in words])[tokens.long()]
        self.opened = opens.nonzero()[:, 0]
        self.opened = self.opened[self.opened >= self.prompt]
        lines = torch.tensor(["\n" in word for word in words])
        self.ends_line = torch.zeros(self.model.config.vocab_size, dtype=torch.bool)
        self.ends_line[: len(lines)] = lines

    def batch(self, step: int) -> Samples:
        """Prompts that end with an opening bracket, each continued GROUP times, and judged."""
        args, count = self.args, max(1, self.args.batch // GROUP)
        ends = self.opened[
            torch.randint(len(self.opened), (count, 1), generator=self.generator(step))
        ]
        prompts = self.tokens[ends - self.prompt + 1 + torch.arange(self.prompt)].long()
        with torch.no_grad():
            ids = self.model.generate(
                prompts.repeat_interleave(GROUP, 0).to(args.device),
                max_new_tokens=args.answer,
                do_sample=True,
                top_k=0,  # HuggingFace's default is 50: another policy than the one that is trained
            )
        answers = ids[:, self.prompt :].cpu()
        ended = self.ends_line[answers].int()
        mask = ended.cumsum(-1) - ended == 0
        rewards = torch.tensor([self.reward(row) for row in ids.tolist()])
        groups = rewards.view(-1, GROUP)
        advantages = (groups - groups.mean(-1, True)) / (groups.std(-1, keepdim=True) + 1e-4)
        judged = (mask.float(), rewards, advantages.flatten())
        return Samples(ids, *(values.to(args.device) for values in judged))

    def reward(self, ids: list[int]) -> float:
        asked = self.tokenizer.decode(ids[: self.prompt]).rpartition("\n")[2]
        answered = self.tokenizer.decode(ids[self.prompt :]).partition("\n")[0]
        return float(is_closed(asked + answered))

    def patched(self, samples: Samples) -> tuple[Tensor, Tensor]:
        length = samples.mask.shape[1]
        states, answers = hidden(self.model, samples.ids)[:, -length:], samples.ids[:, -length:]
        loss, _ = self.loss_of(
            states, self.model.lm_head.weight, answers, samples.mask, samples.advantages
        )
        return loss, samples.rewards.mean()

    def stock(self, samples: Samples) -> tuple[Tensor, Tensor]:
        length = samples.mask.shape[1]
        logps = token_logps(self.model, samples.ids, samples.ids[:, 1:])[:, -length:]
        ratio = (logps - logps.detach()).exp()  # of the policy that sampled, which this is
        gained = (ratio * samples.advantages[:, None] * samples.mask).sum()
        return -gained / samples.mask.sum(), samples.rewards.mean()


if __name__ == "__main__":
    compare("grpo", __doc__, GRPO)
