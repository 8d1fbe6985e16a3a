"""`liger_kernel estimate`: the memory of a training step, part by part, without and with the library.

The model is on paper, and so is the step (`paper.py`): forward, loss and backward run on the meta device, and what they
allocate is counted as it comes and goes. Parts:

    weights        bytes of parameters and buffers
    gradients      bytes of parameters that are trained
    optimizer      its state for these
    activations    what a forward keeps, without logits
    logits, loss   the formula of `liger_kernel.transformers.patching.savings`, with the chunks of this machine's GPU
    peak           weights + optimizer + the most that the step has at once, of activations, logits and gradients

The longest sequence that fits is where the line through the peaks of two lengths meets the memory of the GPU: of two
lengths, and then of the second and where that line ended.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from liger_kernel import backends, utils
from liger_kernel.backends import nvidia
from liger_kernel.cli import models, paper
from liger_kernel.cli.answer import Answer, Table, UserError, said, size
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
#: bytes of a weight of a Linear: bitsandbytes' NF4 with quantised scales of blocks of 64, and int8 with one of a row
QUANTISED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
#: tokens of the two steps from which the longest sequence follows
LENGTHS = (32768, 65536)
#: of a step on paper: more fit no GPU, and each chunk of the loss takes time here, too
MOST_TOKENS = 2**24
#: what a process has beside its tensors: the context of CUDA, workspaces of cuBLAS
BESIDE = 2**30
HOW = {
    "weights": "bytes of all parameters and buffers; exact. Adapters are in the dtype of the weights: PEFT makes them "
    "float32, and without autocast then keeps a float32 copy of every input",
    "gradients": "bytes of the parameters that are trained; exact",
    "optimizer": "states in the dtype of the weights (8 bits for adamw_8bit); exact for fused AdamW",
    "activations": "every tensor that a forward on the meta device keeps, logits aside, attention as flash attention "
    "keeps it",
    "logits_and_loss": "the formula of report.savings; within 0.4 % where it was measured",
    "peak": "weights + optimizer + the most bytes at once in forward and backward. Beside it come the CUDA context "
    "(0.5 GiB), the workspace of cuBLAS and gaps of the allocator",
}


@dataclass
class Step:
    """Bytes of a training step."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits_and_loss: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Setup:
    """How it is trained."""

    optimizer: str
    checkpointing: bool
    quantised: str = ""

    def fixed(self, model: nn.Module) -> dict[str, int]:
        """The parts that no token changes."""
        trained = [p for p in model.parameters() if p.requires_grad]
        per_byte = OPTIMIZERS[self.optimizer]
        return {
            "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            - int(sum(w.nbytes - w.numel() * QUANTISED[self.quantised] for w in self._small(model))),
            "gradients": sum(p.nbytes for p in trained),
            "optimizer": int(sum(p.numel() * per_byte(p.itemsize) for p in trained)),
        }  # fmt: skip

    def _small(self, model: Any) -> list[torch.Tensor]:
        """Weights that are quantised: of frozen Linears, but not of the head."""
        head = model.get_output_embeddings() if self.quantised else None
        linears = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        return [m.weight for m in linears if self.quantised and not m.weight.requires_grad]

    def whole(self, model: nn.Module) -> int:
        """The largest of these, as it is while it is multiplied by."""
        return max((w.nbytes for w in self._small(model)), default=0)


def measured(model: Any, batch: int, seq: int, setup: Setup) -> Step:
    """Of the model as it is, patched or not."""
    found = Step(**setup.fixed(model))
    try:
        found.activations, passing = paper.step(model, batch, seq)
    except Exception as error:  # a forward that needs numbers, images, or fewer tokens
        most = text_setting(model, "max_position_embeddings")
        if isinstance(most, int) and seq > most:
            raise UserError(
                f"{type(model).__name__} takes {most} tokens at most; --seq {seq} is above"
            ) from error
        raise UserError(
            f"the activations of {type(model).__name__} cannot be counted: without weights, and on {batch} x {seq} "
            f"tokens of text alone, its forward raises: {said(error)}"
        ) from error
    found.peak = found.weights + found.optimizer + passing + setup.whole(model)
    return found


def _checkpointed(model: Any) -> None:
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--checkpointing: {error}") from error


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora needs PEFT: pip install peft") from error
    dtype = model.dtype
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that PEFT mends by itself
            made = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    except (
        Exception
    ) as error:  # no linears, linears that PEFT leaves alone, a rank beyond all bounds
        name = type(model).__name__
        raise UserError(
            f"--lora {rank}: PEFT puts no adapters into {name}: {said(error)}"
        ) from error
    return made.to(dtype)


def steps(
    model: Any, batch: int, seq: int, setup: Setup, room: int, **options: bool
) -> tuple[Step, Step, list[int]]:
    """Without and with the library, and the longest sequences that fit into `room` bytes so."""
    if setup.checkpointing:
        _checkpointed(model)
    stock, longest = measured(model, batch, seq, setup), [_longest(model, batch, setup, room)]
    patch(model, **options)
    ours = measured(model, batch, seq, setup)
    longest.append(_longest(model, batch, setup, room))
    losses = list(loss_sites(model, batch * seq))
    stock.logits_and_loss = max((loss.stock() for loss in losses), default=0)
    ours.logits_and_loss = max((loss.fused() for loss in losses), default=0)
    return stock, ours, longest


def _longest(model: Any, batch: int, setup: Setup, room: int) -> int:
    """0 where not even the weights fit, where the model takes no sequences of these lengths, or for no `room`."""
    most = MOST_TOKENS // batch
    if not room or most < 2:
        return 0
    lengths = min(LENGTHS[0], most // 2), min(LENGTHS[1], most)
    try:
        (x, low), (at, high) = ((n, measured(model, batch, n, setup).peak) for n in lengths)
        guess = _meets(x, low, at, high, room - BESIDE)
        if at < guess <= most:  # and what was the peak there may be another one here
            again = measured(model, batch, guess, setup).peak
            guess = _meets(at, high, guess, again, room - BESIDE)
    except UserError:
        return 0
    return guess


def _meets(x1: int, y1: int, x2: int, y2: int, y: int) -> int:
    """Where the line through two points meets y."""
    return max(0, int(x1 + (y - y1) * (x2 - x1) / max(y2 - y1, 1)))


def answer(
    model: str,
    batch: int,
    seq: int,
    dtype: str,
    lora: int,
    optimizer: str,
    checkpointing: bool,
    long_context: bool,
    quantised: str,
    memory: int,
    download: bool,
) -> Answer:
    sizes = (("batch", batch, 1), ("seq", seq, 1), ("lora", lora, 0), ("memory", memory, 0))
    for name, value, least in sizes:
        if value < least:
            raise UserError(f"--{name} {value} is below {least}")
    if batch * seq > MOST_TOKENS:
        raise UserError(f"--batch {batch} x --seq {seq} is above {MOST_TOKENS:,} tokens in a step")
    for name, choice, known in (
        ("dtype", dtype, models.DTYPES),
        ("optimizer", optimizer, OPTIMIZERS),
        ("quantised", quantised, ("", *QUANTISED)),
    ):
        if choice not in known:
            raise UserError(
                f"--{name} {choice} is unknown; known: {', '.join(filter(None, known))}"
            )
    if quantised and not lora:
        raise UserError(f"--quantised {quantised} freezes the weights; add --lora 16")
    made = models.on_paper(model, download, models.DTYPES[dtype])
    name = type(made).__name__
    if lora:
        made = _with_lora(made, lora)
    device = utils.infer_device()
    facts, room = nvidia.ON_PAPER, memory * 10**9
    if device != "cpu":
        here = backends.devices_of(device)[0]
        facts = backends.facts_of(here)
        room = memory * 10**9 or torch.accelerator.get_memory_info(here)[1]
    # offloading is of checkpoints
    how_trained = Setup(optimizer, checkpointing or long_context, quantised)
    with backends.on_paper(facts, kernels=True):
        *found, longest = steps(made, batch, seq, how_trained, room, long_context=long_context)
    stock, ours = map(asdict, found)
    rows = [[part.replace("_", " "), size(stock[part]), size(ours[part])] for part in stock]
    if room:
        rows.append([f"longest sequence in {size(room)}", *(f"{n:,}" for n in longest)])
    asks = not quantised and getattr(made.config, "quantization_config", None) is not None
    how = [[part.replace("_", " "), HOW[part]] for part in stock]
    setup = f"{name}, {batch} x {seq} tokens, {dtype}, {optimizer}"
    setup += (
        f", LoRA of rank {lora} on all linears" * bool(lora)
        + f", linears in {quantised}" * bool(quantised)
        + ", checkpointing" * how_trained.checkpointing
        + ", long_context" * long_context
    )
    saved = stock["peak"] - ours["peak"]
    data = {"setup": setup, "device": facts.name, "stock": stock, "patched": ours, "how": HOW}
    data["longest"] = {"stock": longest[0], "patched": longest[1]}
    return Answer(
        data,
        [
            Table(f"{setup}, on {facts.name}", ["part", "stock", "patched"], rows),
            f"{size(saved)} less at the peak, {100 * saved / stock['peak']:.0f} %.",
            *[
                "Both peaks are in the optimizer's step: weights, gradients and its states. With more tokens, or "
                "--lora, the peak is in the backward, which the library makes smaller."
            ]
            * (saved == 0),
            *["The configuration asks for quantised weights; they are counted unquantised."] * asks,
            Table("How", (), how),
        ],
    )
