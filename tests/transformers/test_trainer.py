"""HF's Trainer with `use_liger_kernel=True`: the losses, evaluations and trained weights of the unpatched model."""

from __future__ import annotations

import collections
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.here import TRAINER_PATCHES_AT_TRAIN, lacks, stock_compiles
from tests.transformers.steps import focal, move, unrounded
from tests.transformers.tiny import VOCAB, batch, build

ROWS, LENGTH, STEPS = 24, 13, 4
#: since transformers 5.15, where it evaluates with use_liger_kernel
ASKS_FOR_THE_LOSS_ALONE = "skip_logits" in inspect.getsource(inspect.getmodule(Trainer))
#: what `Trainer` takes itself; the rest are `TrainingArguments`
OF_TRAINER = ("compute_loss_func", "compute_metrics", "model_init")
Make = Callable[..., Trainer]


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {k: v[0] for k, v in batch(rows=1, length=LENGTH, seed=index).items()}


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Make]:
    """Makes trainers. SGD, because Adam's first steps turn the rounding of a gradient near zero into a whole step.

    `use_liger_kernel` changes the modeling file too, so a stock model has to run before the patched one. With a `draw`,
    weights are moved by one rounding error, alike in every dtype.
    """
    made: list[Trainer] = []
    environment = (
        os.environ.copy()
    )  # accelerate compiles whatever comes after one that was asked to

    def make(
        liger: bool, dtype: torch.dtype = torch.float32, draw: int = 0, **options: Any
    ) -> Trainer:
        own = {name: options.pop(name) for name in OF_TRAINER if name in options}
        if "model_init" not in own:
            model = own["model"] = build("llama", dtype)
            move([model], [p.detach().float().clone() for p in model.parameters()], draw)
        defaults: dict[str, Any] = {
            "max_steps": STEPS, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "save_strategy": "no",
            "per_device_train_batch_size": 2, "prediction_loss_only": True, "report_to": [], "disable_tqdm": True,
        }  # fmt: skip
        arguments = TrainingArguments(
            tmp_path / str(len(made)),
            use_cpu=True,
            use_liger_kernel=liger,
            **{**defaults, **options},
        )
        made.append(Trainer(args=arguments, train_dataset=Tokens(), eval_dataset=Tokens(), **own))
        return made[-1]

    yield make
    for one in made:
        liger_kernel.unpatch(one.model)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]


def evaluation(run: Trainer) -> Tensor:
    """The losses of several evaluations: one alone may be near the truth by luck."""
    data = Tokens()
    parts = [torch.utils.data.Subset(data, range(i, ROWS, 4)) for i in range(4)]
    with unrounded(run.model):
        losses = [run.evaluate(part)["eval_loss"] for part in parts]
    return torch.tensor(losses, dtype=losses_in(run))


def losses_in(run: Trainer) -> torch.dtype:
    """float64 where the model is in it, or the truth would be rounded."""
    return torch.promote_types(next(run.model.parameters()).dtype, torch.float32)


def trained(run: Trainer) -> Trainer:
    with unrounded(run.model):
        run.train()
    return run


def outcome(run: Trainer) -> dict[str, Tensor]:
    """The losses of the steps, those of evaluations afterwards, and the weights."""
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    losses = torch.tensor(losses, dtype=losses_in(run))
    return {"losses": losses, "evaluation": evaluation(run), **weights}


def fused_losses(calls: collections.Counter[str]) -> int:
    return calls["fused_linear_cross_entropy"] + calls["cross_entropy"]


def penalised(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A `compute_loss_func`: the Trainer hands it the logits and takes the labels away from the model."""
    logits = outputs.logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    return loss + 1e-3 * logits.square().mean()


CHECKPOINTING = {"gradient_checkpointing": True}
UNFUSED = {"fused_linear_cross_entropy": False}
#: options of the Trainer under which the loss is fused too, and under which it is HF's
FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate 2": {"gradient_accumulation_steps": 2},
    "accumulate 4": {"gradient_accumulation_steps": 4},
    "reentrant": {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "cross entropy": {"liger_kernel_config": {**UNFUSED, "cross_entropy": True}},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}
NOT_FUSED: dict[str, dict[str, Any]] = {
    "modules only": {"liger_kernel_config": UNFUSED},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "own loss": {"compute_loss_func": penalised},
}


@pytest.mark.parametrize("setup", [*FUSED, *NOT_FUSED])
def test_training(setup: str, trainer: Make, calls: collections.Counter[str]) -> None:
    options = {**FUSED, **NOT_FUSED}[setup]
    compiled = setup == "compiled"  # modules are left to the compiler there
    if compiled:
        stock_compiles()
    plain = {} if compiled else options
    exact = {name: value for name, value in plain.items() if name != "bf16"}

    def draw(seed: int) -> Any:
        calls.clear()
        high = outcome(trained(trainer(False, torch.float64, seed, **exact)))
        low = outcome(trained(trainer(False, draw=seed, **plain)))
        assert not calls
        ours = trainer(True, draw=seed, **options)
        calls.clear()  # an old Trainer has patched already: the ops of proofs
        trained(ours)
        batches = STEPS * ours.args.gradient_accumulation_steps
        assert fused_losses(calls) >= batches if setup in FUSED else not fused_losses(calls)
        assert not calls["rms_norm"] if compiled else calls["rms_norm"] >= batches
        found = outcome(ours)
        if not seed:
            before = state_of(ours.model)
            ours.train()  # the Trainer patches again at every train()
            assert state_of(ours.model) is before
        liger_kernel.unpatch(ours.model)
        return found, high, low

    assert_draws_no_worse(draw, last=16)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=str)
def test_evaluation(
    options: dict[str, Any], trainer: Make, calls: collections.Counter[str]
) -> None:
    """Logits for metrics and predictions are real; where only the loss is asked for it is fused, and none are made."""
    seen: list[Any] = []

    def metrics(predictions: Any) -> dict[str, float]:
        seen.append(predictions)
        return {}

    smoothed = "label_smoothing_factor" in options
    options = {"prediction_loss_only": False, "compute_metrics": metrics, "max_steps": 1, **options}

    def run_of(liger: bool, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        run = trained(trainer(liger, dtype, seed, **options))
        with unrounded(run.model):
            evaluated, predicted = run.evaluate(), run.predict(Tokens())
            assert seen[-1].predictions.shape == (ROWS, LENGTH, VOCAB)
            assert (seen[-1].label_ids == predicted.label_ids).all()
            values = {"logits": seen[-2].predictions, "predicted": predicted.predictions}
            values["loss beside logits"] = evaluated["eval_loss"]
            run.args.prediction_loss_only, run.compute_metrics = True, None
            calls.clear()
            values["loss alone"] = run.evaluate()["eval_loss"]
        assert bool(fused_losses(calls)) == (liger and not smoothed and ASKS_FOR_THE_LOSS_ALONE)
        liger_kernel.unpatch(run.model)
        return {name: torch.as_tensor(value, dtype=dtype) for name, value in values.items()}

    def draw(seed: int) -> Any:
        high, low = (run_of(False, dtype, seed) for dtype in (torch.float64, torch.float32))
        return run_of(True, torch.float32, seed), high, low

    assert_draws_no_worse(draw)


def test_evaluation_in_bfloat16(trainer: Make) -> None:
    """`bf16_full_eval` casts the patched model."""
    options = {"max_steps": 1, "learning_rate": 0.0}

    def draw(seed: int) -> Any:
        runs = [
            trainer(False, torch.float64, **options),
            trainer(False, bf16_full_eval=True, **options),
            trainer(True, bf16_full_eval=True, **options),
        ]
        for run in runs:
            move([run.model], [p.detach().bfloat16() for p in run.model.parameters()], seed)
        high, low, ours = ({"evaluation": evaluation(trained(run))} for run in runs)
        assert runs[2].model.dtype == torch.bfloat16
        liger_kernel.unpatch(runs[2].model)
        return ours, high, low

    assert_draws_no_worse(draw)


class Focal(Trainer):
    """A loss from the logits, beside that of the model; accuracy without gradients, as people write it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kw: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            self.accuracy = (outputs.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]).sum()
        loss = focal(outputs.logits, inputs["labels"]) + 1e-3 * outputs.loss
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("options", [{}, FUSED["compiled"], FUSED["bf16"]], ids=str)
def test_a_loss_of_ones_own_from_lazy_logits(
    options: dict[str, Any], trainer: Make, calls: collections.Counter[str]
) -> None:
    """`liger_kernel.patch(model)`, and a Trainer that knows nothing of it."""
    exact = options if "bf16" not in options else {}
    if "torch_compile" in options:
        stock_compiles()
    plain = {} if "torch_compile" in options else options

    def run_of(patch: bool, dtype: torch.dtype, seed: int, **options: Any) -> dict[str, Tensor]:
        torch._dynamo.reset()
        run = trainer(False, dtype, seed, **options)
        run.__class__ = Focal
        if patch:
            liger_kernel.patch(run.model)
        found = outcome(trained(run))
        assert run.accuracy >= 0
        liger_kernel.unpatch(run.model)
        return found

    def draw(seed: int) -> Any:
        high = run_of(False, torch.float64, seed, **({} if "torch_compile" in exact else exact))
        low = run_of(False, torch.float32, seed, **plain)
        calls.clear()
        ours = run_of(True, torch.float32, seed, **options)
        assert fused_losses(calls) >= STEPS
        return ours, high, low

    assert_draws_no_worse(draw)


def test_resuming_from_a_checkpoint(trainer: Make) -> None:
    """What a patched model saves is what stock saves, and training goes on from it bit by bit."""
    straight = trained(trainer(True, save_strategy="steps", save_steps=2))
    checkpoint = Path(straight.args.output_dir, "checkpoint-2")
    stock = type(straight.model).from_pretrained(checkpoint)
    assert state_of(stock) is None
    assert stock.state_dict().keys() == build("llama").state_dict().keys()
    resumed = trainer(True)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == STEPS
    for name, p in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], p), name


def test_model_init(trainer: Make) -> None:
    """The Trainer makes the model anew at `train()`: that one is patched."""
    if not TRAINER_PATCHES_AT_TRAIN:
        lacks("Trainer that patches at train()")
    run = trained(trainer(True, model_init=lambda: build("llama"), max_steps=1))
    assert state_of(run.model).report.replaced
