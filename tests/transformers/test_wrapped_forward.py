"""The forward that `patch` puts on a model: how others take it apart, copy, wrap, interrupt and replace it."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import liger_kernel
from liger_kernel.transformers.patching.heads import running
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.here import stock_compiles
from tests.transformers.steps import (
    assert_identical,
    assert_same_step,
    assert_same_steps,
    fused,
    snapshot,
    step,
)
from tests.transformers.tiny import batch, build


@pytest.fixture
def model() -> Any:
    model = build("llama")
    liger_kernel.patch(model)
    return model.train()


def stock() -> Any:
    return build("llama").train()


class TestAsAMethod:
    def test_called_directly(self, model: Any) -> None:
        outputs = model.forward(**batch())
        assert fused(outputs)
        assert torch.equal(outputs.loss, model(**batch()).loss)

    def test_what_others_read_of_it(self, model: Any) -> None:
        theirs, ours = stock().forward, model.forward
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert inspect.signature(ours.__func__) == inspect.signature(theirs.__func__)
        assert ours.__self__ is model
        assert ours.__func__.__name__ == "forward"
        assert ours.__doc__ or ours.__func__.__doc__
        assert not hasattr(ours, "__wrapped__")
        assert not hasattr(ours.__func__, "__wrapped__")

    def test_accelerate_wraps_and_unwraps_it(self, model: Any) -> None:
        """As `Accelerator.prepare` with mixed precision does, and `extract_model_from_parallel` takes back."""
        from types import MethodType

        from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

        model._original_forward = model.forward
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        model.forward = MethodType(autocast(model.forward.__func__), model)
        model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
        report = state_of(model).report
        assert not report.skipped
        assert liger_kernel.patch(model) is report
        outputs = model(**batch())
        assert fused(outputs)
        assert outputs.logits.dtype == torch.float32
        assert torch.equal(outputs.logits, outputs.logits.bfloat16().float())
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
        assert "_original_forward" not in vars(model)
        assert not report.skipped
        assert fused(model(**batch()))
        assert_same_step("llama", torch.float32, model)
        liger_kernel.unpatch(model)
        assert "forward" not in vars(model)
        assert not fused(model(**batch()))

    def test_unpatched_while_wrapped(self, model: Any) -> None:
        from types import MethodType

        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        model.forward = wrapper = MethodType(autocast(model.forward.__func__), model)
        liger_kernel.unpatch(model)
        assert model.forward is wrapper
        assert not fused(model(**batch()))
        assert liger_kernel.patch(model).replaced
        assert model.forward is wrapper
        assert fused(model(**batch()))

    def test_prepared_by_accelerate(self) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        model = build("llama").train()
        liger_kernel.patch(model)
        AcceleratorState._reset_state(True)  # of an earlier test
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare(model)
        outputs = prepared(**batch())
        assert fused(outputs)
        assert outputs.logits.dtype == torch.float32
        accelerator.backward(outputs.loss)
        assert fused(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)(**batch()))

    def test_saved_as_the_model_of_hf(self, model: Any, tmp_path: Any) -> None:
        model.save_pretrained(tmp_path)
        again = type(stock()).from_pretrained(tmp_path)
        assert state_of(again) is None
        assert again.config.architectures == ["LlamaForCausalLM"]
        assert_identical(dict.fromkeys(again.state_dict()), dict.fromkeys(stock().state_dict()))


class TestCopies:
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_run_on_their_own_weights(self, model: Any, how: Callable[[Any], Any]) -> None:
        twin = how(model)
        assert twin.forward.__self__ is twin
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        expected = stock()
        with torch.no_grad():
            expected.lm_head.weight.mul_(2)
        for forward in (twin, twin.forward):
            outputs = forward(**batch())
            assert fused(outputs)
            assert torch.equal(outputs.logits, expected(**batch()).logits)
        outputs.loss.backward()
        assert model.lm_head.weight.grad is None
        model.lm_head.register_forward_hook(lambda *args: None)
        assert state_of(model).report.skipped
        assert not state_of(twin).report.skipped
        liger_kernel.unpatch(twin)
        assert "forward" not in vars(twin)
        assert "forward" in vars(model)

    def test_data_parallel_replicas(self, model: Any) -> None:
        """A replica copies the attributes of its module, and runs on weights of its own."""
        from torch.nn.parallel.replicate import replicate

        assert replicate
        replica = model._replicate_for_data_parallel()
        assert "forward" not in vars(replica)
        assert replica.forward.__self__ is replica
        assert "forward" in vars(model)
        assert fused(model(**batch()))

    def test_nothing_keeps_the_model(self) -> None:
        model = build("llama").train()
        liger_kernel.patch(model)
        model(**batch()).loss.backward()
        gone = weakref.ref(model.lm_head)
        liger_kernel.unpatch(model)
        del model
        gc.collect()
        assert gone() is None


class TestReplaced:
    def test_a_forward_set_later_stays(self, model: Any) -> None:
        ours, calls = model.forward, []

        def theirs(**inputs: Any) -> Any:
            calls.append(1)
            return ours(**inputs)

        model.forward = theirs
        assert fused(model(**batch()))
        liger_kernel.unpatch(model)
        assert model.forward is theirs
        expected = stock()(**batch())
        outputs = model(**batch())
        assert calls == [1, 1]
        assert not fused(outputs)
        assert torch.equal(outputs.loss, expected.loss)
        liger_kernel.patch(model)
        assert fused(model(**batch()))
        liger_kernel.unpatch(model)
        assert model.forward is theirs

    def test_a_forward_set_before_runs_and_comes_back(self) -> None:
        model, calls = stock(), []
        class_forward = model.forward

        def theirs(**inputs: Any) -> Any:
            calls.append(1)
            return class_forward(**inputs)

        model.forward = theirs
        liger_kernel.patch(model)
        assert fused(model(**batch()))
        assert calls == [1]
        ours = model.forward
        model.forward = lambda **inputs: ours(**inputs)
        liger_kernel.unpatch(model)
        assert not fused(model(**batch()))
        assert calls == [1, 1]

    def test_the_report_and_patch_see_that_it_is_gone(self, model: Any) -> None:
        report = state_of(model).report
        model.forward = type(model).forward.__get__(model)
        (row,) = report.skipped
        assert row.reason == "the forward of its model was replaced after patching"
        assert not fused(model(**batch()))
        again = liger_kernel.patch(model)
        assert not again.skipped
        assert fused(model(**batch()))

    def test_unpatch_after_a_parametrisation(self) -> None:
        model, expected = stock(), stock()
        before = snapshot(model)
        liger_kernel.patch(model)
        for one in (model, expected):
            torch.manual_seed(0)
            nn.utils.parametrizations.spectral_norm(one.lm_head)
        liger_kernel.unpatch(model)
        assert type(model.lm_head).__name__ == type(expected.lm_head).__name__
        assert torch.equal(
            step(model, **batch())[0].loss.detach(), step(expected, **batch())[0].loss.detach()
        )
        parametrize.remove_parametrizations(model.lm_head, "weight", leave_parametrized=False)
        assert type(model.lm_head) is nn.Linear
        after = snapshot(model)
        assert before.keys() == after.keys()

    def test_unpatch_after_a_norm_was_wrapped(self, model: Any) -> None:
        norm = model.model.norm
        ours = norm.forward
        norm.forward = lambda x: ours(x)
        liger_kernel.unpatch(model)
        assert torch.equal(model(**batch()).loss, stock()(**batch()).loss)


class Interrupting(nn.Module):
    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class TestInterrupted:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), ValueError()], ids=repr)
    @pytest.mark.parametrize("where", ["norm", "loss"])
    def test_nothing_stays_armed(self, model: Any, error: BaseException, where: str) -> None:
        norm, kept = model.model.norm, []
        if where == "norm":
            model.model.norm = Interrupting(error)
        else:

            def loss(logits: Any, **others: Any) -> Tensor:
                kept.append(weakref.ref(logits._origin.hidden))
                raise error

            model.loss_function = loss
        with pytest.raises(type(error)):
            model(**batch())
        assert running.calls == []
        error.__traceback__ = None
        assert not [ref for ref in kept if ref() is not None]
        assert isinstance(model.lm_head(torch.randn(1, 2, 48)), Tensor)
        model.model.norm = norm
        model.__dict__.pop("_loss_function", None)
        assert fused(model(**batch()))

    def test_forwards_inside_of_forwards(self, model: Any) -> None:
        """A teacher that runs while the student does, patched and not, and the student itself once more."""
        teacher = build("llama").eval()
        liger_kernel.patch(teacher)
        bare, losses = stock(), []
        original = model.loss_function

        def loss(logits: Any, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
            model.loss_function = original
            with torch.no_grad():
                losses.append(teacher(**batch()).loss)
                losses.append(teacher(**batch(), skip_logits=True).loss)
                losses.append(bare(**batch()).loss)
                losses.append(model(**batch()).loss)
                assert isinstance(model.lm_head(torch.randn(2, 48)), Tensor) or True
            return original(logits=logits, labels=labels, vocab_size=vocab_size, **others)

        model.loss_function = loss
        outputs = model(**batch())
        assert fused(outputs)
        assert len({round(value.item(), 4) for value in [*losses, outputs.loss]}) == 1

    def test_unpatched_by_its_own_loss(self, model: Any) -> None:
        def loss(logits: Any, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
            liger_kernel.unpatch(model)
            return original(logits=logits, labels=labels, vocab_size=vocab_size, **others)

        original = model.loss_function
        model.loss_function = loss
        assert torch.equal(model(**batch()).loss, stock()(**batch()).loss)

    @pytest.mark.parametrize("options", [None, {"logits": "real"}, {"rope": False}], ids=str)
    def test_patched_anew_while_it_runs(self, model: Any, options: Any) -> None:
        def change(*_: Any) -> None:
            liger_kernel.unpatch(model)
            if options is not None:
                liger_kernel.patch(model, **options)

        hook = model.model.norm.register_forward_hook(change)
        outputs, expected = model(**batch()), stock()(**batch())
        hook.remove()
        torch.testing.assert_close(outputs.loss, expected.loss)
        assert torch.equal(outputs.logits, expected.logits)

    def test_threads(self, model: Any) -> None:
        expected = {seed: model(**batch(seed=seed)).loss.detach() for seed in range(4)}
        found: dict[int, list[Tensor]] = {seed: [] for seed in expected}

        def work(seed: int) -> None:
            for _ in range(5):
                outputs = model(**batch(seed=seed))
                assert fused(outputs)
                found[seed].append(outputs.loss.detach())

        threads = [threading.Thread(target=work, args=(seed,)) for seed in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, losses in found.items():
            assert len(losses) == 5
            assert all(torch.equal(loss, expected[seed]) for loss in losses)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_checkpoint_around_the_model(self, model: Any, reentrant: bool) -> None:
        def loss(one: Any) -> Tensor:
            inputs = batch()
            embeds = one.model.embed_tokens(inputs.pop("input_ids"))
            return checkpoint(
                lambda x: one(inputs_embeds=x, **inputs, use_cache=False).loss,
                embeds,
                use_reentrant=reentrant,
            )

        expected = stock()
        for one in (model, expected):
            loss(one).backward()
        assert running.calls == []
        models = (model, build("llama", torch.float64), expected)
        assert_same_steps(models, [batch()])


@pytest.fixture
def single_process() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Around(nn.Module):
    """Somebody's module around models, which computes nothing but calls them."""

    def __init__(self, **models: nn.Module):
        super().__init__()
        for name, one in models.items():
            setattr(self, name, one)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, **inputs: Any) -> Any:
        outputs = [one(**inputs) for one in self.children()]
        assert all(fused(one) for one in outputs) or state_of(self) is None
        return sum(one.loss for one in outputs) * self.scale


class TestWrappers:
    @pytest.mark.usefixtures("single_process")
    @pytest.mark.parametrize("name", ["compile", "DDP", "FSDP1", "DDP of compile"])
    def test_are_looked_through(self, name: str) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if "compile" in name:
            stock_compiles()
        before = snapshot(stock())
        model = stock()
        wraps: dict[str, Callable[[Any], Any]] = {
            "compile": lambda m: torch.compile(m, backend="aot_eager"),
            "DDP": nn.parallel.DistributedDataParallel,
            "FSDP1": lambda m: FullyShardedDataParallel(
                m, use_orig_params=True, device_id=torch.device("cpu")
            ),
            "DDP of compile": lambda m: nn.parallel.DistributedDataParallel(
                torch.compile(m, backend="aot_eager")
            ),
        }
        wrapped = wraps[name](model)
        report = liger_kernel.patch(wrapped)
        assert [row.path for row in report.replaced if row.kind == "loss"] == ["lm_head"]
        assert report.of is model
        assert state_of(model).report is report
        outputs = wrapped(**batch(), use_cache=False)
        assert fused(outputs)
        outputs.loss.backward()
        liger_kernel.unpatch(wrapped)
        assert state_of(model) is None
        assert {key for key, _ in before} == {key for key, _ in snapshot(model)}
        with liger_kernel.patched(wrapped) as report:
            assert report.replaced
            assert fused(wrapped(**batch(), use_cache=False))
        assert not fused(wrapped(**batch(), use_cache=False))

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_module_around_models(self, count: int) -> None:
        def make(dtype: torch.dtype) -> Any:
            return Around(**{f"m{i}": build("llama", dtype) for i in range(count)})

        model = make(torch.float32)
        before = snapshot(model)
        report = liger_kernel.patch(model, chunk_size=8)
        rows = [row for row in report.replaced if row.kind == "loss"]
        assert [row.path for row in rows] == [f"m{i}.lm_head" for i in range(count)]
        assert not report.skipped
        assert report.savings(4, 16) > 0
        twin = copy.deepcopy(model)

        def gradients(one: Any) -> dict[str, Tensor]:
            one.train()(**batch()).backward()
            return {name: p.grad for name, p in one.named_parameters()}

        from tests.transformers.steps import assert_all_no_worse

        high, low = gradients(make(torch.float64)), gradients(make(torch.float32))
        for one in (model, twin):
            assert_all_no_worse(gradients(one), high, low)
        for p in model.parameters():
            p.grad = None
        liger_kernel.unpatch(model)
        assert_identical(before, snapshot(model))

    def test_a_model_that_was_patched_before_keeps_its_patch(self) -> None:
        model = stock()
        inner = liger_kernel.patch(model, logits="none")
        around = Around(m=model)
        outer = liger_kernel.patch(around)
        assert [row.path for row in outer.replaced if row.kind == "loss"] == ["m.lm_head"]
        assert model(**batch()).logits is None
        liger_kernel.unpatch(around)
        assert not inner.skipped
        assert model(**batch()).logits is None
