"""Steps with the fused head that TRL's trainers add to a model (`add_fused_lm_head`, TRL 1.16): TRL's code, and ours.

    python -m benchmark trl_head                                  # Llama of one layer, TRL importable
    python -m benchmark trl_head --device cpu --shape tiny        # does it run at all?

A step is forward and backward of the model with the loss that the trainer makes of the head's outputs, in the outputs
that it asks for; the optimizer, the same for both, is left out. The losses and the gradients of the head must agree.
The rows are merged into benchmark/results/<gpu>.json. To add a trainer, add an entry to `STEPS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import shapes
from benchmark.measure import host_inclusive, peak_mb, release
from benchmark.options import MeasuringParser
from benchmark.results import Row, default_path, describe_run, keep

MODES = ("trl", "ours")
SHAPES = ("8x1024x4096x151936", "8x1024x4096x151936-half-ignored", "tiny")
#: between the relative differences that two orders of summation in bfloat16 make, and that of another formula
AGREE = 0.02


class Call(NamedTuple):
    model: Any
    reference: Any
    tokens: Tensor
    labels: Tensor

    def __call__(self, model: Any) -> Any:
        return model(input_ids=self.tokens, labels=self.labels, fused_lm_head=True)


def sft(call: Call) -> Tensor:
    found = call(call.model)
    return -found.log_probs.sum() / found.label_mask.sum().clamp(min=1)


def dpo(call: Call) -> Tensor:
    with torch.no_grad():
        reference = call(call.reference).log_probs.sum(1)
    chosen, rejected = (call(call.model).log_probs.sum(1) - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def grpo(call: Call) -> Tensor:
    found = call(call.model)
    log_probs, mask = found.log_probs, found.label_mask
    advantages = torch.linspace(-1, 1, len(log_probs), device=log_probs.device)[:, None]
    ratio = (log_probs - log_probs.detach()).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (loss * mask).sum() / mask.sum().clamp(min=1)


class Step(NamedTuple):
    loss: Callable[[Call], Tensor]
    outputs: tuple[str, ...]  # as the trainer asks for them
    temperature: float = 1.0


STEPS = {
    "sft": Step(sft, ("log_probs", "entropy", "is_top1")),
    "dpo": Step(dpo, ("log_probs", "entropy", "mean_logits", "is_top1")),
    "grpo": Step(grpo, ("log_probs", "entropy"), 0.9),
}


def build(shape: shapes.LossShape, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.classes,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden // 4,
        num_hidden_layers=1,
        num_attention_heads=max(1, shape.hidden // 128),
        num_key_value_heads=max(1, shape.hidden // 512),
        max_position_embeddings=shape.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def prepared(step: Step, mode: str, shape: shapes.LossShape, device: str) -> Call:
    import liger_kernel

    add = importlib.import_module("trl.trainer.utils").add_fused_lm_head
    model = build(shape, device)
    add(model, temperature=step.temperature, outputs=step.outputs)
    reference = None
    if step.loss is dpo:
        reference = build(shape, device).requires_grad_(False).eval()
        add(reference)
    if mode == "ours":
        liger_kernel.patch(model)
        if reference is not None:
            liger_kernel.patch(reference)
    generator = torch.Generator(device).manual_seed(0)
    size = shape.batch, shape.length
    tokens = torch.randint(shape.classes, size, generator=generator, device=device)
    labels = tokens.clone()
    labels[:, : int(shape.length * shape.ignored)] = -100
    return Call(model, reference, tokens, labels)


def stepped(loss: Callable[[Call], Tensor], call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and all gradients, that of the head last."""
    parameters = [*call.model.model.parameters(), call.model.lm_head.weight]
    value = loss(call)
    return value.detach(), torch.autograd.grad(value, parameters)


def measured(step: Step, call: Call, device: str) -> tuple[Row, tuple[float, Tensor]]:
    run = partial(stepped, step.loss, call)
    value, grads = run()
    found = value.item(), grads[-1].cpu()
    del grads
    row: Row = {"ms": host_inclusive(run, device, 300).ms}
    if device == "cuda":
        row["peak_mb"] = peak_mb(run)
    return row, found


def difference(mine: tuple[float, Tensor], other: tuple[float, Tensor]) -> float:
    """Of two losses and of the gradients of two heads, relatively; the larger."""
    of_heads = (mine[1].float() - other[1].float()).norm() / other[1].float().norm()
    return max(abs(mine[0] - other[0]) / max(abs(other[0]), 0.1), of_heads.item())


def main(argv: list[str] | None = None) -> int:
    parser = MeasuringParser("trl_head", __doc__, "json")
    parser.add_argument("--shape", default=SHAPES[0], choices=SHAPES)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    args = parser.read(argv)
    try:
        trl = importlib.import_module("trl")
        importlib.import_module("trl.trainer.utils").add_fused_lm_head  # noqa: B018
    except (ImportError, AttributeError) as error:
        parser.error(f"needs TRL 1.16 or newer, which has a fused head: {error}")
    path = args.json or default_path(args.device)
    run = describe_run(args.device, trl=trl.__version__)
    worst = 0.0
    for name in args.steps:
        kept: list[tuple[float, Tensor]] = []
        for mode in MODES:
            call = prepared(STEPS[name], mode, shapes.LOSSES[args.shape], args.device)
            row, found = measured(STEPS[name], call, args.device)
            del call
            release()
            kept.append(found)
            row = {"loss": f"{name}-step", "case": args.shape, "mode": mode, **row}
            if mode == "ours":
                row["difference"] = difference(found, kept[0])
                worst = max(worst, row["difference"])
            print(f"{row['loss']:10} {row['case']:32} {mode:5} {row['ms']:7.1f} ms, {row.get('peak_mb', 0):6.0f} MB"
                  + (f", difference {row['difference']:.1e}" if mode == "ours" else ""), flush=True)  # fmt: skip
            keep(path, "chunked", run, [row])
    return int(worst > AGREE)
