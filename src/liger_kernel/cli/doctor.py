"""`liger_kernel doctor`, and `liger_kernel.doctor(model)` for a model that lives: what is wrong, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from liger_kernel import utils
from liger_kernel.cli.answer import Answer, Table
from liger_kernel.cli.checks import CHECKS, Finding
from liger_kernel.cli.slow_paths import slow_paths

#: part of the reason why a loss is not fused -> the way out
_WAYS_OUT = {
    "hook": "remove the hook, or read output.logits where it reads the output of the head",
    "replaced": "call liger_kernel.patch(model) after whatever replaces it, or leave it out",
    "adapter": "leave the head out of the target modules of the adapter",
    "real logits": 'a loss of your own on logits needs them; patch(model, logits="real") says so',
    "without calling": "let the model compute the loss: pass labels, and call its own head",
    "taken back": "call liger_kernel.patch(model) again",
}


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`; a table when printed."""

    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.fault)

    def title(self) -> str:
        faults, notes = len(self.faults), len(self.findings) - len(self.faults)
        return f"{faults} fault{'s' * (faults != 1)}, {notes} note{'s' * (notes != 1)}"

    def lines(self) -> Iterator[tuple[str, str]]:
        for f in self.findings:
            yield ("FAULT" if f.fault else "note"), f"{f.what}: {f.text}"
            yield "", f"-> {f.way_out}"

    def __str__(self) -> str:
        return "\n".join([self.title(), *(f"{kind:6} {text}" for kind, text in self.lines())])


def doctor(model: nn.Module | None = None, step: Callable[[], Any] | None = None) -> Diagnosis:
    """Look for what keeps the library from working here, and from working on `model`.

    Args:
        model: a model after `patch`, wrapped or not; None: the machine and the installation alone are looked at.
        step: runs one training step of `model`, which is watched: whether the loss goes through the model's own head,
            and whether its logits are computed all the same. It is called once, and does what it does.

    Returns: a `Diagnosis`; print it.
    Raises: TypeError for a model that is no module, ValueError for a step without a model, and what `step` raises.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"doctor() takes an nn.Module, got {type(model).__name__}.")
    if step is not None and model is None:
        raise ValueError("doctor(step=...) needs the model that the step trains.")
    found = [finding for check in CHECKS for finding in check()]
    if model is not None:
        if step is not None:
            found += _watched(model, step)
        found += _of_model(model)
    return Diagnosis(tuple(sorted(found, key=lambda finding: not finding.fault)))


def _watched(model: nn.Module, step: Callable[[], Any]) -> list[Finding]:
    from liger_kernel.cli.watch import watched

    with watched(model) as seen:
        step()
    found = []

    def add(what: str, text: str, way_out: str) -> None:
        found.append(Finding(what, text, way_out))

    if seen.bodies:
        add(
            "head",
            f"the step runs the body of the model {seen.bodies} times outside of its forward: the head is bypassed, "
            "and the loss is computed elsewhere",
            "call the model itself with labels; or give the hidden states to "
            "liger_kernel.functional.fused_linear_cross_entropy, not to a head",
        )
    if not seen.forwards and not seen.bodies and not _is_compiled(model):
        add("step", "the step never runs this model", "hand over the model that is trained")
    if seen.without_labels:
        add(
            "labels",
            f"the step runs the model {seen.without_labels} times without labels: all logits are computed, for a loss "
            "elsewhere",
            "pass labels to the model; label smoothing and compute_loss_func of HF's Trainer take them away",
        )
    if seen.in_evaluation:
        add(
            "evaluation",
            "the model is in evaluation mode, in which logits are computed beside the loss",
            "call model.train(), since from_pretrained returns a model in evaluation mode",
        )
    if seen.logits_read:
        add(
            "logits",
            f"the step reads output.logits {seen.logits_read} times: they are computed and stored after the loss was "
            "fused, and no memory is saved",
            "read them in evaluation only; return_token_accuracy=True in the call gives the accuracy without them",
        )
    for kernel, elements in seen.overflows.items():
        add(
            "int32",
            f"{kernel} is given a tensor of {elements:,} elements, and its source converts no offset to 64 bits: it "
            "reads and writes elsewhere",
            "fewer tokens in a step, or leave that kernel out; those of this library have 64-bit offsets",
        )
    return found


def _is_compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in m._modules or m._compiled_call_impl for m in model.modules())


def _of_model(model: nn.Module) -> Iterator[Finding]:
    from liger_kernel.transformers.patching.state import KEY

    states = {path: m.__dict__[KEY] for path, m in model.named_modules() if KEY in m.__dict__}
    if not states:
        text = f"this {type(model).__name__} is not patched"
        yield Finding(
            "patch", text, "call liger_kernel.patch(model); HF's Trainer does so in train()"
        )
    for state in states.values():
        yield from _of_report(state.report)
        yield from _replaced_since(state)
    on_cpu = {p.device for p in model.parameters()} == {torch.device("cpu")}
    if on_cpu and utils.infer_device() != "cpu":
        yield Finding("device", "the model is on the CPU, and there is a GPU", "model.to(...)")
    for line in slow_paths(model):
        yield Finding("HuggingFace", line, "see docs/command-line.md", fault=False)


def _of_report(report: Any) -> Iterator[Finding]:
    for kind, path, count, by in report.lines():
        if not by.startswith("(skipped: "):
            continue
        reason = by.removeprefix("(skipped: ").removesuffix(")")
        way = next(
            (way for part, way in _WAYS_OUT.items() if part in reason), "see docs/patching.md"
        )
        yield Finding(kind, f"{path} {count}".strip() + f": {reason}", way, fault=kind == "loss")


def _replaced_since(state: Any) -> Iterator[Finding]:
    """Modules whose forward somebody has set after `patch`."""
    paths = {id(module): path for path, module in state.model.named_modules()}
    gone = [change.owner for change in state.changes if not change.is_in_place()]
    for owner in gone:
        text = f"{paths.get(id(owner), 'a module')}: something was put in the place of ours after patching"
        yield Finding("replaced", text, _WAYS_OUT["replaced"])


def answer(model: str | None, download: bool) -> Answer:
    if model is None:
        found, tried = doctor(), []
    else:
        from liger_kernel.cli import inspection, models
        from liger_kernel.transformers.patching import patch

        made = models.on_paper(model, download)
        report = patch(made)
        inspection.one_step(made)
        found = doctor(made)
        tried = [str(report).partition("\n")[0]]
    listed = Table(found.title(), (), list(found.lines())) if found.findings else found.title()
    data = {"findings": [asdict(f) for f in found.findings]}
    return Answer(data, [listed, *tried], status=int(bool(found.faults)))
