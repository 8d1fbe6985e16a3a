"""`liger_kernel estimate`: the memory of a training step, part by part, without and with the library.

The model is on paper. Parts:

    weights        bytes of parameters and buffers
    gradients      bytes of parameters that are trained
    optimizer      its state for these
    activations    what autograd keeps of a forward, counted: every storage once, attention and RMSNorm as fused kernels
                   keep them
    logits, loss   the formula of `liger_kernel.transformers.patching.savings`, with the chunks of this machine's GPU

With checkpointing the activations are the inputs of the layers, counted likewise, and a layer that is computed again is
a part of its own: what checkpointing does not keep, over the number of layers. The gradient of its widest tensor comes
while all of that is there.

    peak = weights + optimizer + max(activations + logits and loss, gradients, each with a layer and its gradient)

since gradients come while activations go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from liger_kernel import backends, utils
from liger_kernel.backends import nvidia
from liger_kernel.cli import models
from liger_kernel.cli.answer import Answer, Table, UserError, size
from liger_kernel.transformers.patching import patch
from liger_kernel.transformers.patching.savings import text_setting
from liger_kernel.transformers.patching.sites.loss import loss_sites

#: bytes of state of an optimizer for a parameter of so many bytes
OPTIMIZERS = {
    "adamw": lambda itemsize: 2 * itemsize,
    "adamw_8bit": lambda itemsize: 2 + 2 * 4 / 256,  # a scale for each block of 256
    "sgd": lambda itemsize: 0,
    "sgd_momentum": lambda itemsize: itemsize,
}
HOW = {
    "weights": "bytes of all parameters and buffers; exact. Adapters are in the dtype of the weights: PEFT makes them "
    "float32, and without autocast then keeps a float32 copy of every input",
    "gradients": "bytes of the parameters that are trained; exact",
    "optimizer": "states in the dtype of the weights (8 bits for adamw_8bit); exact for fused AdamW",
    "activations": "every tensor that autograd keeps of a forward on the meta device, attention and RMSNorm as fused "
    "kernels keep them",
    "recomputed": "what one checkpointed layer keeps while it runs again",
    "its_gradient": "that of the widest tensor in it",
    "logits_and_loss": "the formula of report.savings; within 0.4 % where it was measured",
    "peak": "weights + optimizer + max(activations + logits and loss, gradients), each with a layer that runs again "
    "and its gradient. Beside it come the CUDA context (0.5 GiB), the workspace of cuBLAS and gaps of the allocator",
}


@dataclass
class Step:
    """Bytes of a training step."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    recomputed: int = 0
    its_gradient: int = 0
    logits_and_loss: int = 0
    of_head: int = 0  # the gradients that are there when the loss is done

    @property
    def peak(self) -> int:
        again = self.recomputed + self.its_gradient
        at_loss = self.activations + max(self.logits_and_loss, self.of_head + again)
        return self.weights + self.optimizer + max(at_loss, self.gradients + again)

    def count(self, found: tuple[int, int, int]) -> None:
        self.activations, self.recomputed, self.its_gradient = found

    def as_dict(self) -> dict[str, int]:
        parts = {**asdict(self), "peak": self.peak}
        del parts["of_head"]
        return parts


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash and memory-efficient attention keep; computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # their layout
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    return _FusedAttention.apply(query, key, value)


RMS_NORM = nn.functional.rms_norm
FUSED_IN_TORCH = hasattr(torch.ops.aten, "_fused_rms_norm")  # since torch 2.8


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what `F.rms_norm` keeps on a GPU; on the meta device it is a chain of ops, two of them in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Any:
    return _FusedRMSNorm.apply(x, weight) if FUSED_IN_TORCH else RMS_NORM(x, shape, weight, eps)


def kept(model: nn.Module, batch: int, seq: int) -> list[int]:
    """Bytes of every storage that autograd keeps of a forward without labels."""
    given = models.inputs(model, batch, seq)
    tensors = (*model.parameters(), *model.buffers(), *given.values())
    ours = {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()._cdata
        if storage not in ours:
            found.setdefault(storage, t)  # and so its address stays its own
        return t

    with (
        models.runnable(),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(nn.functional, "rms_norm", _rms_norm),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        outputs = model(**given)
    del outputs
    return [t.untyped_storage().nbytes() for t in found.values()]


@contextlib.contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    """By the kind that keeps its inputs where autograd shows them; the memory is that of the other kind."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
    except ValueError as error:
        raise UserError(f"--checkpointing: {error}") from error
    model.enable_input_require_grads()
    yield
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora needs PEFT: pip install peft") from error
    dtype = model.dtype
    with torch.device("meta"):
        made = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return made.to(dtype)


def _activations(model: Any, batch: int, seq: int, checkpointing: bool) -> tuple[int, int, int]:
    """What is kept, what one layer keeps while it is computed again, and the gradient of its widest tensor."""
    try:
        everything = kept(model, batch, seq)
        if not checkpointing:
            return sum(everything), 0, 0
        with _checkpointed(model):
            inputs = sum(kept(model, batch, seq))
    except UserError:
        raise
    except Exception as error:  # a forward that needs numbers, images, or fewer tokens
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the activations of {type(model).__name__} cannot be counted: without weights, and on {batch} x {seq} "
            f"tokens of text alone, its forward raises: {reason}"
        ) from error
    layers = text_setting(model, "num_hidden_layers") or 1
    return inputs, (sum(everything) - inputs) // layers, max(everything, default=0)


def steps(
    model: Any, batch: int, seq: int, optimizer: str, checkpointing: bool
) -> tuple[Step, Step]:
    """Without and with the library."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fixed = {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": int(sum(p.numel() * OPTIMIZERS[optimizer](p.itemsize) for p in trained)),
    }
    stock = Step(**fixed)
    stock.count(_activations(model, batch, seq, checkpointing))
    # a rotary embedding keeps the same with and without ours, but the reference, which would run here, more
    patch(model, rope=False)
    ours = Step(**fixed)
    ours.count(_activations(model, batch, seq, checkpointing))
    for loss in loss_sites(model, batch * seq):
        stock.logits_and_loss = max(stock.logits_and_loss, loss.stock())
        ours.logits_and_loss = max(ours.logits_and_loss, loss.fused())
        stock.of_head = ours.of_head = max(ours.of_head, loss.gradients())
    return stock, ours


def answer(
    model: str,
    batch: int,
    seq: int,
    dtype: str,
    lora: int,
    optimizer: str,
    checkpointing: bool,
    download: bool,
) -> Answer:
    for name, value, least in (("batch", batch, 1), ("seq", seq, 1), ("lora", lora, 0)):
        if value < least:
            raise UserError(f"--{name} {value} is below {least}")
    for name, choice, known in (
        ("dtype", dtype, models.DTYPES),
        ("optimizer", optimizer, OPTIMIZERS),
    ):
        if choice not in known:
            raise UserError(f"--{name} {choice} is unknown; known: {', '.join(known)}")
    made = models.on_paper(model, download, models.DTYPES[dtype])
    model_class = type(made).__name__
    if lora:
        made = _with_lora(made, lora)
    device = utils.infer_device()
    facts = nvidia.ON_PAPER
    if device != "cpu":
        facts = backends.facts_of(backends.devices_of(device)[0])
    with backends.on_paper(facts):
        stock, ours = (step.as_dict() for step in steps(made, batch, seq, optimizer, checkpointing))
    parts = {name: name.replace("_", " ") for name in stock}
    if not checkpointing:
        del parts["recomputed"], parts["its_gradient"]
    rows = [[shown, size(stock[part]), size(ours[part])] for part, shown in parts.items()]
    how = [[shown, HOW[part]] for part, shown in parts.items()]
    quantised = getattr(made.config, "quantization_config", None) is not None
    setup = f"{model_class}, {batch} x {seq} tokens, {dtype}, {optimizer}"
    setup += (
        f", LoRA of rank {lora} on all linears" * bool(lora) + ", checkpointing" * checkpointing
    )
    saved = stock["peak"] - ours["peak"]
    data = {"setup": setup, "device": facts.name, "stock": stock, "patched": ours, "how": HOW}
    return Answer(
        data,
        [
            Table(f"{setup}, on {facts.name}", ["part", "stock", "patched"], rows),
            f"{size(saved)} less at the peak, {100 * saved / stock['peak']:.0f} %.",
            *["The configuration asks for quantised weights; they are counted unquantised."]
            * quantised,
            Table("How", (), how),
        ],
    )
