"""One training run in a process of its own, which takes turns with the other one.

`train` reports {"stage": ...} where something takes long, {"step", "loss"} at the end of each of its turns, and last
{"result": ...}. It goes on when the parent asks for the next report.
"""

from __future__ import annotations

import gc
import platform
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmark.children import Report
from benchmark.shapes import MODELS

MODES = ("stock", "patched")
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """Everything that decides what a run computes; the two modes differ in `mode` alone."""

    mode: str
    shape: str
    device: str
    dtype: str
    batch: int
    seq: int
    steps: int
    warmup: int
    learning_rate: float
    seed: int
    tokens_file: str
    via_trainer: bool = False
    checkpointing: bool = False
    turn: int = 1

    def turns(self) -> list[tuple[int, int]]:
        """Of every turn: the step after which the clock starts, and the last step; if they are one, it is not timed.

        On a GPU the first step of a turn fetches the memory that the other process had, and is not timed either.
        """
        ends = [*range(self.turn, self.steps, self.turn), self.steps]
        starts = [0, *ends[:-1]]
        fetching = 1 if self.device == "cuda" else 0
        return [
            (min(max(self.warmup, start + fetching), end), end)
            for start, end in zip(starts, ends, strict=True)
        ]


class Blocks(Dataset[dict[str, Tensor]]):
    """Consecutive blocks of `seq` tokens; the text starts over where it is too short for `samples` of them."""

    def __init__(self, tokens: Tensor, seq: int, samples: int):
        self.tokens, self.seq, self.samples = tokens, seq, samples
        self.blocks = len(tokens) // seq

    def __len__(self) -> int:
        return max(self.blocks, self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index % self.blocks * self.seq
        ids = self.tokens[start : start + self.seq].long()  # (seq,)
        return {"input_ids": ids, "labels": ids}


class PeakMemory:
    """Peak of the memory in use inside the `with` block, and what was in use when it began, in bytes.

    On a GPU: what the allocator handed out. On the CPU: the resident set of the process, sampled.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.at_rest = self.peak = 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.at_rest = torch.cuda.memory_allocated()
        else:
            import psutil

            self._process = psutil.Process()
            self.at_rest = self.peak = self._process.memory_info().rss
            self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._sampler.join()


def build_model(run: Run) -> Any:
    """The shape's model with random weights; the same ones in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    config = AutoConfig.for_model(**MODELS[run.shape], use_cache=False)
    config.max_position_embeddings = max(run.seq, config.max_position_embeddings)
    set_seed(run.seed)
    with torch.device(run.device):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, run.dtype), attn_implementation="sdpa"
        )


def build_trainer(run: Run, model: Any, losses: list[Tensor]) -> Any:
    """A HuggingFace Trainer that keeps the exact loss of every step in `losses`."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class RecordingTrainer(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            losses.append(loss.detach().clone())
            return result

    arguments = TrainingArguments(
        output_dir=str(Path(run.tokens_file).parent),  # nothing is saved
        per_device_train_batch_size=run.batch,
        max_steps=run.steps,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        seed=run.seed,
        data_seed=run.seed,
        use_cpu=run.device == "cpu",
        use_liger_kernel=run.mode == "patched" and run.via_trainer,
        gradient_checkpointing=run.checkpointing,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it reads every loss at once, and so stops the GPU
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=run.device == "cuda",
    )
    tokens = torch.load(run.tokens_file, weights_only=True)
    blocks = Blocks(tokens, run.seq, run.batch * run.steps)
    trainer = RecordingTrainer(model=model, args=arguments, train_dataset=blocks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_clock(run: Run, losses: list[Tensor], report: Report) -> Any:
    """A callback that times the turns, and waits between them for the other process."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.turns = iter(run.turns())
            self.seconds: list[float] = []  # per step, of each turn that is timed

        def now(self) -> float:
            if run.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def begin_turn(self, step: int) -> None:
            self.untimed, self.end = next(self.turns, (-1, -1))
            if step == self.untimed:
                self.started = self.now()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin_turn(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step == self.end:
                if step > self.untimed:
                    self.seconds.append((self.now() - self.started) / (step - self.untimed))
                if run.device == "cuda":
                    torch.cuda.empty_cache()  # the other process needs it
                report({"step": step, "loss": float(losses[-1])})
                self.begin_turn(step)
            elif step == self.untimed:
                self.started = self.now()

    return Clock()


def train(report: Report, run: Run) -> None:
    """The result: losses of all steps, seconds per step of every turn, memory in bytes."""
    report({"stage": "building the model"})
    model = build_model(run)
    patch_report = None
    if run.mode == "patched" and not run.via_trainer:
        import liger_kernel

        patch_report = str(liger_kernel.patch(model))
    losses: list[Tensor] = []
    trainer = build_trainer(run, model, losses)
    clock = build_clock(run, losses, report)
    trainer.add_callback(clock)
    report({"stage": "first step"})
    with PeakMemory(run.device) as memory:
        trainer.train()
    seconds = statistics.median(clock.seconds)
    result = {
        "losses": [float(loss) for loss in losses],
        "tokens_per_second": run.batch * run.seq / seconds,
        "seconds_per_step": seconds,
        "turns": clock.seconds,
        "memory_at_rest": memory.at_rest,
        "memory_peak": memory.peak,
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(run.device),
        "patch_report": patch_report,
    }
    report({"result": result})


def machine(device: str) -> str:
    import transformers

    name = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    return (
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
