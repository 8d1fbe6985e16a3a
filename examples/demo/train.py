"""One training run in a process of its own: progress as JSON lines on stdout, the last one holds the result."""

from __future__ import annotations

import gc
import json
import platform
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.demo.shapes import SHAPES

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

    def to_json(self) -> str:
        return json.dumps(asdict(self))


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


def emit(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def build_model(run: Run) -> Any:
    """The shape's model with random weights; the same ones in every process."""
    shape = SHAPES[run.shape]
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    config = AutoConfig.for_model(shape.model_type, **shape.config, use_cache=False)
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


def build_clock(run: Run, losses: list[Tensor]) -> Any:
    """A callback that times the steps after the warm-up and reports progress."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        started = seconds = 0.0

        def now(self) -> float:
            if run.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = self.now()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step == run.warmup:
                self.started = self.now()
            if step == run.steps:
                self.seconds = self.now() - self.started
            # the loss of the step before: to read the latest one would make the GPU wait for Python
            emit(step=step, loss=float(losses[-2]) if step > 1 else None)

    return Clock()


def train(run: Run) -> dict[str, Any]:
    """Run it; losses of all steps, seconds of the steps after the warm-up, memory in bytes."""
    emit(stage="building the model")
    model = build_model(run)
    report = None
    if run.mode == "patched" and not run.via_trainer:
        import liger_kernel

        report = str(liger_kernel.patch(model))
        print(report, file=sys.stderr)
    losses: list[Tensor] = []
    trainer = build_trainer(run, model, losses)
    clock = build_clock(run, losses)
    trainer.add_callback(clock)
    emit(stage="first step")
    with PeakMemory(run.device) as memory:
        trainer.train()
    measured = run.steps - run.warmup
    return {
        "losses": [float(loss) for loss in losses],
        "tokens_per_second": measured * run.batch * run.seq / clock.seconds,
        "seconds_per_step": clock.seconds / measured,
        "memory_at_rest": memory.at_rest,
        "memory_peak": memory.peak,
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(run.device),
        "patch_report": report,
    }


def machine(device: str) -> str:
    import transformers

    name = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    return (
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    emit(result=train(Run(**json.loads(sys.argv[1]))))
