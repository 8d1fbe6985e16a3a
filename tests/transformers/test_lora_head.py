"""LoRA on the head: what adapters add is part of the fused loss, and the numbers are PEFT's in every state of them."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers.patching import heads
from liger_kernel.transformers.patching.deferred import DeferredLogits
from tests.transformers.steps import unrounded
from tests.transformers.test_lora import adapted, assert_as_peft, fill, step
from tests.transformers.tiny import batch, build

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("quiet_on_one_thread"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

HEAD = ["q_proj", "lm_head"]


def of_head(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return adapted(name, dtype, target_modules=HEAD, **options)


def row(model: nn.Module) -> Any:
    (found,) = (row for row in liger_kernel.patch(model).rows if row.kind == "loss")
    return found


def is_fused(model: nn.Module) -> bool:
    return isinstance(dict.get(model(**batch()), "logits"), DeferredLogits)


def assert_fused_as_peft(make: Any, fused: bool = True, **how: Any) -> Any:
    ours = assert_as_peft(make, nodes=None, **how)
    assert is_fused(ours) == fused
    assert (row(ours).by is not None) == fused
    return ours


class TestStates:
    @pytest.mark.parametrize("name", ["llama", "gemma2"])  # the latter is tied, and soft-capped
    def test_a_step(self, name: str) -> None:
        ours = assert_fused_as_peft(lambda: of_head(name))
        head = ours.get_submodule("base_model.model.lm_head")
        assert row(ours).by == "fused linear cross entropy"
        liger_kernel.unpatch(ours)
        assert type(head).__module__.startswith("peft.")
        assert type(head.base_layer) is nn.Linear

    def test_dropout_and_rank_patterns(self) -> None:
        """Loss and logits are of one draw, so that both come from real logits, unless nobody gets these."""

        def make() -> Any:
            return of_head(lora_dropout=0.3, use_rslora=True, rank_pattern={"lm_head": 7})

        ours = assert_fused_as_peft(make, fused=False)
        assert "drops at random" in row(ours).reason
        stock = make()
        liger_kernel.patch(ours, logits="none")
        runs = []
        for model in (ours, copy.deepcopy(stock).double(), stock):
            torch.manual_seed(0)
            with unrounded(model):
                runs.append(model(**batch()))
        assert runs[0].logits is None
        assert_no_worse("loss", *(found.loss for found in runs))

    @pytest.mark.parametrize("precision", [None, torch.bfloat16])
    def test_adapters_in_fp32_on_a_base_of_16_bits(self, precision: torch.dtype | None) -> None:
        assert_fused_as_peft(lambda: of_head(dtype=torch.bfloat16), precision=precision)

    def test_two_adapters(self) -> None:
        def make() -> Any:
            model = of_head()
            model.add_adapter("other", peft.LoraConfig(r=3, target_modules=HEAD))
            fill(model)
            return model

        assert_fused_as_peft(
            make, change=lambda model: model.base_model.set_adapter(["default", "other"])
        )

    def test_a_base_that_is_trained_too(self) -> None:
        assert_fused_as_peft(of_head, change=lambda model: model.requires_grad_(True))

    def test_adapters_that_are_tied(self) -> None:
        """PEFT's `ensure_weight_tying`: the head has the embedding's, turned."""
        options = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
        try:
            adapted("gemma2", **options)
        except TypeError:
            pytest.skip("this release of PEFT ties no adapters")
        ours = assert_fused_as_peft(lambda: adapted("gemma2", **options))
        assert "lora_A" in ours.get_submodule("base_model.model.lm_head")._modules

    def test_adapters_that_are_off_or_merged(self) -> None:
        model = of_head()
        stock = copy.deepcopy(model)
        liger_kernel.patch(model)
        wide = copy.deepcopy(stock).double()
        for state in ("disable_adapter", "merge_adapter", "unmerge_adapter"):
            runs = []
            for one in (model, wide, stock):
                change = getattr(one, state)
                with unrounded(one), change() or contextlib.nullcontext():
                    runs.append(one(**batch()).loss.detach())
            assert_no_worse(state, *runs)
            assert is_fused(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert not is_fused(model)
            assert is_fused(model)  # PEFT has unmerged it

    def test_its_logits_when_they_are_read(self) -> None:
        model = of_head()
        with torch.no_grad():
            low, high = (m(**batch()).logits for m in (model, copy.deepcopy(model).double()))
            liger_kernel.patch(model)
            found = model(**batch())
            assert isinstance(dict.get(found, "logits"), DeferredLogits)
            assert_no_worse("logits", found.logits, high, low)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.disable_adapter_layers(),
            lambda model: model.get_submodule("model.lm_head").set_scale("default", 3.0),
            lambda model: model.merge_adapter(),
        ],
        ids=["disabled", "scaled", "merged"],
    )
    def test_its_logits_in_another_state(self, change: Any) -> None:
        model = of_head()
        liger_kernel.patch(model)
        found = model(**batch())
        change(model.base_model)
        with pytest.raises(RuntimeError, match="has changed since"):
            print(found.logits)

    def test_patched_before_and_copied(self) -> None:
        model = build("llama").train()
        liger_kernel.patch(model)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=HEAD)
        model = peft.get_peft_model(model, config)
        fill(model)
        assert is_fused(model)
        liger_kernel.patch(model)
        expected = step(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_fused(twin)
            found = step(twin)
            assert all(torch.equal(found[n], expected[n]) for n in expected)


class TestWhatIsLeftToPEFT:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "an adapter has a bias")],
    )
    def test_variants(self, options: dict[str, Any], reason: str) -> None:
        model = adapted(target_modules=["lm_head"], **options)
        ours = assert_fused_as_peft(lambda: copy.deepcopy(model), fused=False)
        assert reason in row(ours).reason

    def test_hooks(self) -> None:
        model = of_head()
        liger_kernel.patch(model)
        seen: list[Any] = []
        lora_b = model.base_model.model.lm_head.lora_B["default"]
        handle = lora_b.register_forward_hook(lambda *args: seen.append(args))
        assert not is_fused(model)
        assert "a hook of tests.transformers.test_lora_head" in row(model).reason
        assert len(seen) == 1
        handle.remove()
        assert is_fused(model)

    def test_adapters_for_each_row(self) -> None:
        """PEFT's `adapter_names` arrive by hooks, which see whole sequences."""
        model = of_head().eval()
        low, high = copy.deepcopy(model), copy.deepcopy(model).double()
        liger_kernel.patch(model)
        names = ["default", "__base__", "default"]
        runs = [m(**batch(), adapter_names=names).loss for m in (model, high, low)]
        assert_no_worse("loss", *runs)

    def test_other_code_of_peft(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = of_head()
        liger_kernel.patch(model)
        layer = peft.tuners.lora.Linear
        original = layer.forward

        def doubled(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return 2 * original(self, x, *args, **kwargs)

        monkeypatch.setattr(layer, "forward", doubled)
        assert not is_fused(model)
        assert row(model).reason == "Linear computes something else"

    def test_compiled(self) -> None:
        """What looks for the reason is traced with the model."""
        head = of_head().base_model.model.lm_head

        @torch.compile(backend="eager", fullgraph=True)
        def is_suitable(x: Tensor) -> Tensor:
            return x + (heads.obstacle(head) is None)

        assert heads.obstacle(head) is None
        assert is_suitable(torch.zeros(1)) == 0
