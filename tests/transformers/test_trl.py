"""TRL's trainers with `use_liger_kernel=True`: losses, metrics and trained weights of the unpatched model.

TRL computes its losses itself, from the hidden states, and asks for everything but the fused loss.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.here import TRAINER_PATCHES_AT_TRAIN
from tests.transformers.steps import move
from tests.transformers.tiny import VOCAB, build, randomize

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated")

STEPS, ROWS, PARTS = 4, 16, 4
OWN_HEAD = hasattr(trl.trainer.utils, "add_fused_lm_head")
Make = Callable[..., Any]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(VOCAB - len(special)))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def data(*columns: str) -> Any:
    """Rows of few words, so that a few steps learn some of them."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def text(column: str) -> str | bool:
        length = 5 if column == "prompt" else int(torch.randint(3, 9, (), generator=generator))
        words = torch.randint(0, 2 if column == "rejected" else 4, (length,), generator=generator)
        return bool(words[0] % 2) if column == "label" else "".join(f" w{w}" for w in words)

    return Dataset.from_list([{column: text(column) for column in columns} for _ in range(ROWS)])


def causal_lm(dtype: torch.dtype) -> nn.Module:
    return build("llama", dtype)


def mixture(dtype: torch.dtype) -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return build("qwen3_moe", dtype, **experts)


def reward_model(dtype: torch.dtype) -> nn.Module:
    config = causal_lm(dtype).config
    config.num_labels = 1
    return randomize(AutoModelForSequenceClassification.from_config(config)).to(dtype)


def writer(dtype: torch.dtype) -> nn.Module:
    """A model whose completions are given: float64 would draw others than float32."""
    model = causal_lm(dtype)

    def generate(input_ids: Tensor, **kwargs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        written = torch.randint(4, VOCAB, (len(input_ids), 6), generator=generator)
        return torch.cat((input_ids, written), -1)

    model.generate = generate
    return model


def every_other(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


LORA = peft.LoraConfig(
    r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False
)
PROMPTED = ("prompt", "completion")
SFT = ["loss", "mean_token_accuracy", "entropy"]
PREFERENCE = ["loss", "rewards/chosen", "rewards/rejected"]
GRPO = {"model": writer, "reward_funcs": every_other, "num_generations": 2, "beta": 0.0}
#: trainer, columns of its data, options, what it logs
TRAINERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any], list[str]]] = {
    "completion only": ("SFT", PROMPTED, {"completion_only_loss": True}, SFT),
    "packed": ("SFT", ("text",), {"packing": True, "max_length": 16}, SFT),
    "padding free": ("SFT", PROMPTED, {"padding_free": True, "max_length": None}, SFT),
    "dft": ("SFT", PROMPTED, {"loss_type": "dft"}, SFT),
    "label smoothing": ("SFT", PROMPTED, {"label_smoothing_factor": 0.1}, SFT),
    "LoRA": ("SFT", PROMPTED, {"peft_config": LORA}, SFT),
    "DPO": ("DPO", ("prompt", "chosen", "rejected"), {"ref_model": causal_lm}, PREFERENCE),
    "KTO": ("KTO", (*PROMPTED, "label"), {"ref_model": causal_lm}, ["loss"]),
    "GRPO": ("GRPO", ("prompt",), GRPO, ["grad_norm", "entropy"]),
    "RLOO": ("RLOO", ("prompt",), GRPO, ["grad_norm"]),
    "experts": ("SFT", PROMPTED, {"model": mixture}, SFT),
    "reward": ("Reward", ("chosen", "rejected"), {"model": reward_model}, ["loss", "accuracy"]),
}  # fmt: skip
OF_TRAINER = ("peft_config", "ref_model", "reward_funcs", "model")


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Make]:
    """Makes trainers, as `test_trainer.trainer`: a stock model has to run before a patched one.

    Weights are moved by one rounding error with a `draw`, and are the same in every dtype.
    """
    made: list[Any] = []

    def make(
        name: str, liger: bool, dtype: torch.dtype = torch.float32, draw: int = 0, **more: Any
    ) -> Any:
        kind, columns, options, _ = TRAINERS[name]
        options = {**options, **more}
        own: dict[str, Any] = {n: options.pop(n) for n in OF_TRAINER if n in options}
        own = {"model": causal_lm, **own}
        for role in {"model", "ref_model"} & own.keys():
            model = own[role] = own[role](dtype)
            move([model], [p.detach().float().clone() for p in model.parameters()], draw)
        defaults: dict[str, Any] = {
            "max_steps": STEPS, "learning_rate": 0.5, "optim": "sgd", "logging_steps": 1, "save_strategy": "no",
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": ROWS, "report_to": [],
            "disable_tqdm": True, "bf16": False,
        }  # fmt: skip
        arguments = getattr(trl, f"{kind}Config")(
            tmp_path, use_cpu=True, use_liger_kernel=liger, **{**defaults, **options}
        )
        own.update(train_dataset=data(*columns), eval_dataset=data(*columns))
        cls = getattr(trl, f"{kind}Trainer")
        made.append(cls(args=arguments, processing_class=tokenizer(), **own))
        return made[-1]

    yield make
    for one in made:
        liger_kernel.unpatch(one.model)


def base_model(run: Any) -> nn.Module:
    return run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model


def trained(run: Any, metrics: list[str]) -> dict[str, Tensor]:
    """What is logged in training, the losses of evaluations afterwards, and the weights.

    GRPO's loss on its own samples is zero to rounding; its gradient is not.
    """
    run.train()
    log = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(log) == STEPS
    found = {name: [entry[name] for entry in log] for name in metrics}
    if "loss" in metrics:
        parts = [
            run.eval_dataset.select(range(i, len(run.eval_dataset), PARTS)) for i in range(PARTS)
        ]
        found["evaluation"] = [run.evaluate(part)["eval_loss"] for part in parts]
    dtype = next(run.model.parameters()).dtype  # float32 would round the truth
    logged = {name: torch.tensor(values, dtype=dtype) for name, values in found.items()}
    return {**logged, **{name: p.detach().clone() for name, p in run.model.named_parameters()}}


def assert_trained_alike(
    name: str,
    trainer: Make,
    calls: collections.Counter[str],
    check: Callable[[Any], None],
    **ours: Any,
) -> None:
    """The trainer of options `ours` against stock; `check(run)` once ours is trained."""
    metrics = TRAINERS[name][-1]

    def draw(seed: int) -> Any:
        calls.clear()
        high = trained(trainer(name, False, torch.float64, draw=seed), metrics)
        low = trained(trainer(name, False, draw=seed), metrics)
        assert not calls
        run = trainer(name, draw=seed, **ours)
        found = trained(run, metrics)
        check(run)
        liger_kernel.unpatch(run.model)
        return found, high, low

    assert_draws_no_worse(draw)


@pytest.mark.parametrize("name", [n for n in TRAINERS if n not in ("RLOO", "experts")])
def test_training(name: str, trainer: Make, calls: collections.Counter[str]) -> None:
    def check(run: Any) -> None:
        report = state_of(base_model(run)).report
        # rope: on the modeling file
        early = set() if TRAINER_PATCHES_AT_TRAIN else {"loss"}
        adapters = {"lora"} if "LoRA" in name else set()
        assert {row.kind for row in report.replaced} - early == {
            "norm",
            "mlp",
            "residual",
        } | adapters
        assert min(calls[op] for op in ("rms_norm", "glu", "rope")) >= STEPS
        assert not calls["fused_linear_cross_entropy"]

    assert_trained_alike(name, trainer, calls, check, liger=True)


def test_token_accuracy_is_right(trainer: Make) -> None:
    """Counted by hand, on the logits of the trained model after the patch is taken back."""
    run = trainer("completion only", True)
    run.train()
    logged = run.evaluate()["eval_mean_token_accuracy"]
    liger_kernel.unpatch(run.model)
    (inputs,) = run.get_eval_dataloader()
    labels = inputs.pop("labels")[:, 1:]
    with torch.no_grad():
        hits = run.model.eval()(**inputs).logits[:, :-1].argmax(-1) == labels
    assert logged > 0.1
    assert logged == (hits.sum() / (labels != -100).sum()).item()


@pytest.mark.parametrize("name", ["completion only", "GRPO"])
def test_a_model_patched_by_hand(name: str, trainer: Make, calls: collections.Counter[str]) -> None:
    """`liger_kernel.patch(model)`, fused loss included, and then TRL with a loss of its own."""
    built = TRAINERS[name][2].get("model", causal_lm)

    def patched(dtype: torch.dtype) -> nn.Module:
        model = built(dtype)
        assert "loss" in {row.kind for row in liger_kernel.patch(model).replaced}
        return model

    def check(run: Any) -> None:
        assert calls["rms_norm"] >= STEPS
        assert calls["logprobs"] >= STEPS or not OWN_HEAD

    assert_trained_alike(name, trainer, calls, check, liger=False, model=patched)


@pytest.mark.skipif(not OWN_HEAD, reason="this release of TRL has no head of its own")
@pytest.mark.parametrize("name", ["LoRA", "DPO", "KTO", "RLOO", "experts"])
def test_the_head_of_trl_is_ours(
    name: str, trainer: Make, calls: collections.Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model is patched before its trainer is made, and where it is after; TRL's own code does not run."""

    def patched(dtype: torch.dtype) -> nn.Module:
        model = TRAINERS[name][2].get("model", causal_lm)(dtype)
        liger_kernel.patch(model)
        return model

    class Refuses:
        @staticmethod
        def apply(*args: Any) -> None:
            raise AssertionError("TRL's own code ran")

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Refuses)
    roles = {"model", "ref_model"} & {"model", *TRAINERS[name][2]}
    runs = [trainer(name, False, max_steps=1, **dict.fromkeys(roles, patched))]
    runs.append(trainer(name, False, max_steps=1))
    for model in {runs[1].model, getattr(runs[1], "ref_model", None) or runs[1].model}:
        liger_kernel.patch(model)
    for run in runs:
        calls.clear()
        run.train()
        assert calls["logprobs"]
        (row,) = (row for row in state_of(base_model(run)).report.rows if row.kind == "loss")
        assert row.by == "fused linear cross entropy, and TRL's head"
