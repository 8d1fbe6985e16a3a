"""The commands and their arguments. Each imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

from liger_kernel import __version__
from liger_kernel.cli.answer import Answer, UserError
from liger_kernel.cli.parse import ARGUMENT, PROG, Command, parse
from liger_kernel.cli.present import present


def _room(name: str) -> Any:
    """A file beside this one. What it imports may be refused: a name in LIGER_KERNEL_IMPL that nobody knows."""
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except RuntimeError as error:
        raise UserError(str(error)) from error


def env() -> Answer:
    """Versions, devices, variables, and what computes each op here: what a bug report should contain."""
    return _room("environment").answer()


def selftest(
    op: Annotated[list[str] | None, "Test this op only; may be repeated."] = None,
    dtype: Annotated[list[str] | None, "float32, bfloat16 or float16; default: all."] = None,
    interpret: Annotated[
        bool, "Run the kernels on the CPU, by Triton's interpreter, on small cases."
    ] = False,
    reset: Annotated[bool, "Remove the list of disabled ops and test nothing."] = False,
    jobs: Annotated[int, "Processes that test; 0: up to 8 on a GPU, half as many as cores."] = 0,
) -> Answer:
    """Every op by every implementation that serves this machine, against its reference in float64.

    An op that is wrong is written to a file that the library reads, and is computed by its reference from then on.
    The exit status is 1 if one is wrong.
    """
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the backends are imported
    return _room("selftest").answer(op, dtype, interpret, reset, jobs)


_MODEL = "A folder, a config.json, a model type such as llama, or a model of the hub."
_Model = Annotated[str, _MODEL]
_Download = Annotated[bool, "Look on the hub, too: the configuration is downloaded, never weights."]


def inspect(model: _Model, download: _Download = False) -> Answer:
    """What would be replaced in a model, what not and why, and where HuggingFace's own code is slow.

    The whole model is built without its weights, in no memory.
    """
    return _room("inspection").answer(model, download)


def estimate(
    model: _Model,
    batch: Annotated[int, "Sequences in a step."] = 1,
    seq: Annotated[int, "Tokens in a sequence."] = 2048,
    dtype: Annotated[str, "Of the weights: bfloat16, float16 or float32."] = "bfloat16",
    lora: Annotated[int, "Rank of LoRA on all linears; 0: all weights are trained."] = 0,
    optimizer: Annotated[str, "adamw, adamw_8bit, sgd or sgd_momentum."] = "adamw",
    checkpointing: Annotated[bool, "Layers are computed again in the backward."] = False,
    long_context: Annotated[bool, "Patched for long sequences, with --checkpointing."] = False,
    quantised: Annotated[str, "Linears beneath the adapters: nf4 or int8."] = "",
    memory: Annotated[int, "GB of the GPU, for the longest sequence; 0: this machine's."] = 0,
    download: _Download = False,
) -> Answer:
    """Memory of a training step on one GPU, part by part, without and with the library; the longest sequence.

    The whole model is built without its weights, in no memory.
    """
    return _room("estimate").answer(
        model,
        batch,
        seq,
        dtype,
        lora,
        optimizer,
        checkpointing,
        long_context,
        quantised,
        memory,
        download,
    )


def doctor(
    model: Annotated[str | None, _MODEL, ARGUMENT] = None, download: _Download = False
) -> Answer:
    """What is wrong with this machine and installation, and with a model on it, and the way out.

    A model that lives is examined by liger_kernel.doctor(model), in Python. The exit status is 1 if there is a fault.
    """
    return _room("doctor").answer(model, download)


def bench(
    op: Annotated[str, "Name of the op, such as rms_norm."],
    case: Annotated[list[str] | None, "This case of the op only; may be repeated."] = None,
    dtype: Annotated[str, "bfloat16, float16 or float32."] = "bfloat16",
    no_compile: Annotated[bool, "Leave torch.compile out, which takes a while to compile."] = False,
) -> Answer:
    """Time of an op beside PyTorch eager and torch.compile on this machine, forward and backward."""
    return _room("bench").answer(op, case, dtype, no_compile)


COMMANDS: dict[str, Command] = {
    "env": env,
    "doctor": doctor,
    "inspect": inspect,
    "estimate": estimate,
    "selftest": selftest,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, print its answer, and return the exit status: 2, with one line on stderr, for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--version"]:
        print(PROG, __version__)
        return 0
    try:
        parsed = parse(COMMANDS, argv)
        if parsed is None:
            return 0
        name, given, as_json = parsed
        with warnings.catch_warnings(record=as_json):  # nothing but JSON then, not even on stderr
            # what other packages will change, and the user can do nothing about
            warnings.simplefilter("ignore", FutureWarning)
            answer = COMMANDS[name](**given)
        return answer.status if _printed(answer, as_json) else 1
    except UserError as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _printed(answer: Answer, as_json: bool) -> bool:
    try:
        present(answer, as_json)
        if sys.stdout is not None:  # None: closed by whoever started the process
            sys.stdout.flush()
    except OSError as error:  # a full disk; or, without a word, `| head` that has seen enough
        if not isinstance(error, BrokenPipeError):
            print(f"{PROG}: the answer cannot be printed: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return False
    return True
