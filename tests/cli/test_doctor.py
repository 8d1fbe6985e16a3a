"""Faults planted on purpose, each found; and nothing found where nothing is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import liger_kernel
from liger_kernel import backends
from liger_kernel.backends import disabled
from liger_kernel.cli import checks
from liger_kernel.cli.doctor import Diagnosis, doctor
from tests.cli.conftest import Run
from tests.transformers.here import TRAINER_PATCHES_AT_TRAIN, stock_compiles
from tests.transformers.tiny import batch, build


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without faults, whatever this one is."""
    for name in ("TRITON_INTERPRET", "LIGER_KERNEL_IMPL", "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(checks, "others", lambda: iter(()))
    monkeypatch.setattr(checks, "GPU_FILES", ())


def fault(diagnosis: Diagnosis) -> str:
    """The one fault that is there, as one text."""
    (found,) = diagnosis.faults
    assert found.way_out
    return f"{found.what}: {found.text} -> {found.way_out}"


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = checks.version_of
    monkeypatch.setattr(checks, "version_of", lambda name: versions.get(name, real(name)))


def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_on_gpu", lambda: True)
    monkeypatch.setenv("CC", sys.executable)


def test_nothing_is_wrong(run: Run, both: str) -> None:
    assert doctor().findings == ()
    done = run("doctor")
    assert (done.status, done.out.split()) == (0, ["0", "faults,", "0", "notes"])
    assert run("doctor", "--json").data == {"findings": []}


def test_an_answer_of_faults(run: Run, both: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_KERNEL_IMPL", "reference")
    done = run("doctor")
    assert done.status == 1
    assert "FAULT" in done.out
    assert "-> unset LIGER_KERNEL_IMPL" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert run("doctor", "--json").data["findings"][0]["fault"]


# -- the machine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "version"),
    [("triton", "2.3.1"), ("torch", "2.5.1+cu121"), ("transformers", "4.45.2")],
)
def test_a_package_that_is_too_old(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, **{package: version})
    text = fault(doctor())
    assert version in text
    assert f"pip install '{package}>=" in text


def test_transformers_that_nobody_has_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, transformers="6.1.0")
    assert "newest that was tested" in fault(doctor())
    with_versions(monkeypatch, transformers="5.99.0.dev0")
    assert doctor().faults == ()
    assert "newest that was tested" in str(doctor())


def test_the_oldest_versions_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package, oldest in checks.OLDEST.items():
        assert f'"{package}>={oldest}' in text


def test_the_newest_transformers_is_that_of_the_matrix() -> None:
    lines = (Path(__file__).parents[1] / "matrix.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    releases = [row[4] for row in rows if row[4][0].isdigit()]
    newest = max(releases, key=lambda release: [int(part) for part in release.split(".")])
    assert newest.startswith(checks.NEWEST["transformers"] + ".")


def test_no_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    real = checks.version_of
    monkeypatch.setattr(checks, "version_of", lambda n: None if n == "triton" else real(n))
    assert "not installed" in fault(doctor())


def test_another_package_shadows_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    other = tmp_path / "liger_kernel"
    other.mkdir()
    (other / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    texts = [f.text for f in doctor().faults if f.what == "another package"]
    assert any(str(other) in text and "shadows" in text for text in texts)


def test_the_interpreter_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor().faults == ()
    with_gpu(monkeypatch)
    assert "unset TRITON_INTERPRET" in fault(doctor())


def test_numpy_that_breaks_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, numpy="2.4.0", triton="3.6.0")
    assert doctor().faults == ()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "numpy<2.4" in fault(doctor())


def test_the_reference_left_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_KERNEL_IMPL", "Reference ")
    assert "unset LIGER_KERNEL_IMPL" in fault(doctor())


def test_a_request_that_nobody_serves_here() -> None:
    with backends.use_implementation("npu"):
        assert "cannot serve" in fault(doctor())


def test_a_variable_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_KERNEL_IMLP", "reference")
    (found,) = doctor().findings
    assert not found.fault
    assert "LIGER_KERNEL_IMLP" in found.text
    assert "LIGER_KERNEL_IMPL" in found.way_out


def test_blocking_launches_left_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert "unset CUDA_LAUNCH_BLOCKING" in fault(doctor())


def test_an_op_that_selftest_disabled(disabled_file: Path) -> None:
    entry = disabled.Entry.here("rope", "triton", "CPU", "off by 7")
    disabled.write([entry])
    text = fault(doctor())
    assert "off by 7" in text
    assert str(disabled_file) in text
    disabled_file.write_text(json.dumps([{**vars(entry), "torch": "2.0"}]))
    assert doctor().faults == ()
    disabled_file.write_text("{")
    assert "--reset" in fault(doctor())
    disabled_file.unlink()
    disabled_file.mkdir()  # which it does not remove
    assert f"-> {disabled.VARIABLE}" in fault(doctor())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "TRITON_CACHE_DIR" in fault(doctor())


def test_a_gpu_that_torch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "GPU_FILES", (str(tmp_path),))
    if not torch.cuda.is_available():
        assert torch.__version__ in fault(doctor())


def test_no_compiler_and_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    assert doctor().faults == ()
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in fault(doctor())
    monkeypatch.undo()
    sound.__wrapped__(monkeypatch, tmp_path)  # type: ignore[attr-defined]
    with_gpu(monkeypatch)
    monkeypatch.setenv("CC", "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install gcc" in fault(doctor())


# -- a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    model = build("llama", attn_implementation="sdpa").train()
    liger_kernel.patch(model)
    return model


def step(model: Any, **more: Any) -> Callable[[], Any]:
    return lambda: model(**batch(), **more).loss.backward()


def test_a_patched_model_is_well(model: Any) -> None:
    assert doctor(model, step(model)).findings == ()
    assert liger_kernel.doctor is doctor


def test_watching_leaves_nothing_behind(model: Any) -> None:
    from liger_kernel.transformers.patching.forward import FusedForward

    before = FusedForward.begin
    doctor(model, step(model))
    assert FusedForward.begin is before
    assert not model.model._forward_pre_hooks
    with pytest.raises(ZeroDivisionError):
        doctor(model, lambda: 1 / 0)
    assert FusedForward.begin is before
    assert not model.model._forward_pre_hooks


def test_a_model_that_is_not_patched() -> None:
    assert "not patched" in fault(doctor(build("llama", attn_implementation="sdpa")))
    assert "not patched" in fault(doctor(nn.Linear(2, 2)))


def test_a_framework_that_replaced_our_forward(model: Any) -> None:
    theirs = type(model).forward.__get__(model)
    model.forward = lambda *args, **kwargs: theirs(*args, **kwargs)
    found = doctor(model)
    assert any(
        "replaced after patching" in f.text and "after whatever" in f.way_out for f in found.faults
    )


def test_a_framework_that_replaced_the_forward_of_a_layer(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.forward = type(norm).forward.__get__(norm)
    assert "model.layers.1.input_layernorm" in fault(doctor(model))


def test_a_hook_on_the_head(model: Any) -> None:
    handle = model.lm_head.register_forward_hook(lambda module, args, output: None)
    text = fault(doctor(model, step(model)))
    assert "lm_head" in text
    assert "remove the hook" in text
    handle.remove()
    assert doctor(model, step(model)).faults == ()


def test_a_head_that_is_bypassed(model: Any) -> None:
    given = batch()
    labels = given.pop("labels")

    def bypassing() -> None:
        hidden = model.model(**given).last_hidden_state
        logits = nn.functional.linear(hidden, model.lm_head.weight)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    assert "bypassed" in fault(doctor(model, bypassing))


def test_logits_read_in_every_step(model: Any) -> None:
    def reading() -> None:
        output = model(**batch())
        assert output.logits.argmax(-1).numel()
        output.loss.backward()

    text = fault(doctor(model, reading))
    assert "reads output.logits 1 times" in text
    assert "return_token_accuracy" in text


def test_labels_that_do_not_arrive(model: Any) -> None:
    given = batch()
    labels = given.pop("labels")

    def smoothing() -> None:
        logits = model(**given).logits
        nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1
        ).backward()

    assert "without labels" in fault(doctor(model, smoothing))


def test_evaluation_mode(model: Any) -> None:
    model.eval()
    assert "model.train()" in fault(doctor(model, step(model)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trainer(
    model: Any, smoothing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF's Trainer patches in `train()`, or when it is made; with label smoothing it keeps the labels to itself."""
    from transformers import Trainer, TrainingArguments
    from transformers.models.llama import modeling_llama

    rope = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", rope
    )  # put back what the Trainer leaves there
    liger_kernel.unpatch(model)
    given = batch()
    rows = [{name: value[i] for name, value in given.items()} for i in range(len(given["labels"]))]
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, use_liger_kernel=True, max_steps=1, label_smoothing_factor=smoothing,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    made = doctor(model)
    assert "HF's Trainer" in fault(made) if TRAINER_PATCHES_AT_TRAIN else made.findings == ()
    trainer.train()
    found = doctor(trainer.model_wrapped, lambda: trainer.training_step(model, dict(given)))
    if smoothing:
        assert "label smoothing" in fault(found)
    else:
        assert found.findings == ()


@pytest.mark.parametrize("wrap", ["compile", "compile in place", "ddp", "peft"])
def test_a_wrapped_model_is_well(model: Any, wrap: str) -> None:
    if "compile" in wrap:
        stock_compiles()
    if wrap == "compile":
        model = torch.compile(model, backend="eager")
    elif wrap == "compile in place":
        model.compile(backend="eager")
    elif wrap == "ddp":
        model = nn.parallel.DataParallel(
            model
        )  # a wrapper that, on a CPU, only calls what it wraps
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        liger_kernel.patch(model)
    assert doctor(model, step(model)).findings == ()
    torch._dynamo.reset()


def test_a_kernel_whose_offsets_overflow(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    launched: list[Any] = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **kwargs: launched.append(args))

    def narrow(x, width):  # type: ignore[no-untyped-def]
        return x + 3 * width

    def wide(x, width):  # type: ignore[no-untyped-def]
        return x + 3 * width.to("int64")

    small, large = (torch.empty(2, n, dtype=torch.int8, device="meta") for n in (4, 2**30 + 8))

    def launching(kernel: Any, x: torch.Tensor) -> Callable[[], Any]:
        launch = jit.JITFunction(kernel)
        return lambda: (step(model)(), launch[(1,)](x, 4))

    text = fault(doctor(model, launching(narrow, large)))
    assert "narrow is given a tensor of 2,147,483,664 elements" in text
    for kernel, x in ((narrow, small), (wide, large), (narrow, large[:, :4])):
        assert doctor(model, launching(kernel, x)).findings == ()
    assert len(launched) == 4


def test_a_step_of_another_model(model: Any) -> None:
    other = build("llama").train()
    assert "never runs this model" in fault(doctor(model, step(other)))


def test_a_loss_of_ones_own_on_logits(model: Any) -> None:
    model.loss_function = lambda logits, labels, **_: logits[..., ::2].logsumexp(-1).mean()
    text = fault(doctor(model, step(model)))
    assert "real logits" in text


def test_a_model_that_stayed_on_the_cpu(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.cli import doctor as module

    monkeypatch.setattr(sys.modules[doctor.__module__].utils, "infer_device", lambda: "xpu")  # type: ignore[attr-defined]
    monkeypatch.setattr(checks, "_on_gpu", lambda: False)
    assert "on the CPU" in fault(module.doctor(model))


def test_an_adapter_on_the_head(model: Any) -> None:
    peft = pytest.importorskip("peft")
    liger_kernel.unpatch(model)
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], lora_bias=True)
    wrapped = peft.get_peft_model(model, config)
    liger_kernel.patch(wrapped)
    assert "target modules" in fault(doctor(wrapped, step(wrapped)))


def test_slow_attention_is_a_note() -> None:
    model = build("llama", attn_implementation="eager").train()
    liger_kernel.patch(model)
    found = doctor(model)
    assert found.faults == ()
    assert "sdpa" in str(found)


def test_a_model_on_paper(run: Run, both: str) -> None:
    done = run("doctor", "llama")
    assert done.status == 0
    assert run("doctor", "gpt_oss").out.count("note") >= 2


def test_what_doctor_refuses(run: Run) -> None:
    with pytest.raises(TypeError, match="str"):
        doctor("llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the model"):
        doctor(step=lambda: None)
    done = run("doctor", "nobody/knows")
    assert (done.status, done.err.count("\n")) == (2, 1)
