"""Old import paths and helper modules that other projects use, and how lazily everything is imported."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import liger_kernel.transformers as package
from liger_kernel import compat, ops, utils
from liger_kernel.ops import utils as ops_utils
from liger_kernel.testing import assert_no_worse
from tests.fresh import in_a_new_process


@pytest.fixture
def aliases() -> None:
    compat.install()


@pytest.mark.usefixtures("aliases")
class TestAliases:
    @pytest.mark.parametrize("alias", compat.ALIASES)
    def test_is_the_target_itself(self, alias: str) -> None:
        target = importlib.import_module(compat.ALIASES[alias])
        assert importlib.import_module(alias) is target
        parent, _, child = alias.rpartition(".")
        assert getattr(importlib.import_module(parent), child) is target
        assert target.__name__ == target.__spec__.name == compat.ALIASES[alias]

    def test_setting_an_attribute_reaches_the_target(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import liger_kernel.ops.swiglu as alias

        from liger_kernel.ops import glu

        monkeypatch.setattr(alias, "glu", lambda *args: "replaced")
        assert glu.LigerSiLUMulFunction.apply(None, None) == "replaced"

    def test_from_import(self) -> None:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction, swiglu_forward

        assert (LigerGELUMulFunction, LigerSiLUMulFunction) == (
            ops.LigerGELUMulFunction,
            ops.LigerSiLUMulFunction,
        )
        assert swiglu_forward is ops.swiglu_forward

    def test_from_the_parent(self) -> None:
        """As ms-swift imports `loss_utils`, before anybody else has."""
        pairs = [alias.rpartition(".")[::2] for alias in compat.ALIASES]
        lines = [f"from {parent} import {child}" for parent, child in reversed(pairs)]
        in_a_new_process("\n".join(lines))

    def test_installed_once_and_last(self) -> None:
        compat.install()
        compat.install()
        assert [type(f).__module__ for f in sys.meta_path].count(compat.__name__) == 1

    def test_find_spec(self) -> None:
        program = (
            "import importlib.util, sys; from liger_kernel import compat; compat.install()\n"
            "assert importlib.util.find_spec('liger_kernel.ops.swiglu').origin == 'alias of liger_kernel.ops.glu'\n"
            "assert 'liger_kernel.ops.glu' not in sys.modules, 'looking is not importing'\n"
            "assert importlib.util.find_spec('liger_kernel.ops.rms_norm').submodule_search_locations\n"
            "assert importlib.util.find_spec('liger_kernel.ops.nothing') is None\n"
            "import liger_kernel.ops.swiglu\n"
            "assert sys.modules['liger_kernel.ops.swiglu'] is sys.modules['liger_kernel.ops.glu']"
        )
        in_a_new_process(program)

    def test_reload_and_pickle(self) -> None:
        program = (
            "import importlib, pickle; from liger_kernel import compat; compat.install()\n"
            "import liger_kernel.ops.swiglu as alias, liger_kernel.ops.glu as real\n"
            "alias.mark, old = 1, alias.glu\n"
            "assert importlib.reload(alias) is real and real.glu is not old and real.mark == 1\n"
            "assert importlib.import_module('liger_kernel.ops.swiglu') is real\n"
            "assert pickle.loads(pickle.dumps(alias.LigerSiLUMulFunction)) is real.LigerSiLUMulFunction"
        )
        in_a_new_process(program)

    def test_unpickles_what_the_old_path_wrote(self) -> None:
        old = b"cliger_kernel.ops.swiglu\nLigerSiLUMulFunction\n."
        assert pickle.loads(old) is ops.LigerSiLUMulFunction


class TestLazyPackage:
    @pytest.mark.parametrize("name", package._EXPORTS)
    def test_every_name_resolves(self, name: str) -> None:
        home = f"{package.__name__}.{package._EXPORTS[name]}"
        assert getattr(package, name) is getattr(importlib.import_module(home), name)
        assert name in dir(package)

    def test_imports_nothing_heavy(self) -> None:
        program = (
            "import sys, time, torch; began = time.process_time()\n"  # others may keep the machine busy
            "import liger_kernel.transformers, liger_kernel.ops.utils\n"
            "assert not {'triton', 'transformers', 'peft'} & sys.modules.keys()\n"
            "print(time.process_time() - began)"
        )
        assert float(in_a_new_process(program)) < 0.5

    def test_unknown_name(self) -> None:
        with pytest.raises(
            AttributeError, match=r"liger_kernel\.transformers.*no attribute 'nothing'"
        ):
            _ = package.nothing
        assert not hasattr(package, "apply_liger")

    def test_submodules_are_attributes(self) -> None:
        program = "import liger_kernel.transformers as t; print(t.swiglu.LigerSwiGLUMLP.__name__)"
        assert in_a_new_process(program) == "LigerSwiGLUMLP"

    @pytest.mark.parametrize("name", ["apply_liger_kernel_to_llama", *package._PATCHING])
    def test_patching_names_the_missing_package(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(package, "is_transformers_available", lambda: False)
        with pytest.raises(
            ImportError, match=rf"{name} needs .*pip install liger-kernel\[transformers\]"
        ):
            getattr(package, name)

    def test_patching_names_resolve_by_prefix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = SimpleNamespace(apply_liger_kernel_to_new=1, _apply_liger_kernel=2)
        monkeypatch.setattr(package, "is_transformers_available", lambda: True)
        monkeypatch.setitem(sys.modules, f"{package.__name__}.monkey_patch", fake)
        assert (package.apply_liger_kernel_to_new, package._apply_liger_kernel) == (1, 2)


class TestOpsUtils:
    @pytest.mark.parametrize(
        ("n", "block", "warps"),
        [
            (1, 1, 4),
            (1024, 1024, 4),
            (1025, 2048, 8),
            (8192, 8192, 16),
            (20000, 32768, 32),
            (65536, 65536, 32),
        ],
    )
    def test_calculate_settings(
        self, n: int, block: int, warps: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        assert ops_utils.calculate_settings(n) == (block, warps)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert ops_utils.calculate_settings(n) == (block, min(warps, 16))

    def test_calculate_settings_refuses(self) -> None:
        with pytest.raises(RuntimeError, match=r"65537 .*65536"):
            ops_utils.calculate_settings(65537)

    def test_ensure_contiguous(self) -> None:
        @ops_utils.ensure_contiguous
        def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            """doc"""
            return ctx, args, kwargs

        t = torch.zeros(3, 2).t()
        ctx, (a, b), kwargs = forward("ctx", t, 5, x=t, y=None)
        assert (ctx, b, kwargs["y"]) == ("ctx", 5, None)
        assert a.is_contiguous()
        assert kwargs["x"].is_contiguous()
        assert (forward.__name__, forward.__doc__) == ("forward", "doc")

    def test_compare_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "some_package", SimpleNamespace(__version__="2.10.0"))
        assert ops_utils.compare_version("some_package", operator.ge, "2.9")
        assert not ops_utils.compare_version("some_package", operator.lt, "2.9")
        assert not ops_utils.compare_version("no_such_package", operator.ge, "0")

    def test_dtypes_of_triton(self) -> None:
        tl = pytest.importorskip("triton.language")
        assert ops_utils.torch_to_triton_dtype[torch.bfloat16] is tl.bfloat16

    def test_amp(self) -> None:
        for name, decorator in (
            ("amp_custom_fwd", torch.amp.custom_fwd),
            ("amp_custom_bwd", torch.amp.custom_bwd),
        ):
            made = getattr(ops_utils, name)
            assert made.func is decorator
            assert made.keywords == {"device_type": utils.infer_device()}

    def test_device_context(self) -> None:
        with ops_utils.device_context(torch.device("cpu")):
            pass
        assert ops_utils.is_hip() is (torch.version.hip is not None)


class TestUtils:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Any:
        utils.infer_device_arch.cache_clear()
        yield
        utils.infer_device_arch.cache_clear()

    @pytest.mark.parametrize(
        ("capability", "arch"),
        [
            ((7, 5), "volta_turing"),
            ((9, 0), "hopper"),
            ((10, 3), "blackwell_ultra"),
            ((11, 0), "sm_110"),
        ],
    )
    def test_nvidia(
        self, capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(utils, "infer_device", lambda: "cuda")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device_id: capability)
        assert utils.infer_device_arch() == arch

    @pytest.mark.parametrize(
        ("name", "arch"), [("gfx942:sramecc+", "cdna3"), ("gfx9999", "gfx9999"), ("", "cuda")]
    )
    def test_amd(self, name: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(utils, "infer_device", lambda: "cuda")
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device_id: SimpleNamespace(gcnArchName=name)
        )
        assert utils.infer_device_arch() == arch

    @pytest.mark.parametrize(
        ("device", "name", "arch"),
        [
            ("xpu", "Intel(R) Data Center GPU Max 1550", "pvc"),
            ("xpu", "Intel(R) Arc(TM) A770", "arc"),
            ("xpu", "Something", "xpu"),
            ("npu", "Ascend910B", "ascend910"),
            ("npu", "Ascend", "npu"),
        ],
    )
    def test_by_name(
        self, device: str, name: str, arch: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(utils, "infer_device", lambda: device)
        fake = SimpleNamespace(get_device_name=lambda device_id: name)
        monkeypatch.setattr(torch, device, fake, raising=False)
        assert utils.infer_device_arch() == arch

    def test_a_driver_that_fails_is_no_crash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(device_id: int) -> None:
            raise RuntimeError("driver")

        monkeypatch.setattr(utils, "infer_device", lambda: "cuda")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
        assert utils.infer_device_arch() == "cuda"

    def test_infer_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        there: set[str] = {"cuda", "npu", "xpu"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in there)
        monkeypatch.setattr(utils, "is_npu_available", lambda: "npu" in there)
        for device in ("cuda", "npu", "xpu"):
            assert utils.infer_device() == device
            there.remove(device)
        assert utils.infer_device() == "cpu"

    def test_comm_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        there = ["nccl", "npu", "xccl", "mpi", "gloo"]
        for name in ("nccl", "xccl", "mpi", "gloo"):
            check = f"is_{name}_available"
            monkeypatch.setattr(
                torch.distributed, check, lambda name=name: name in there, raising=False
            )
        monkeypatch.setattr(utils, "is_npu_available", lambda: "npu" in there)
        for name in ("nccl", "hccl", "xccl", "mpi", "gloo"):
            assert utils.infer_comm_backend() == name
            there.pop(0)
        with pytest.raises(RuntimeError, match="no distributed backend"):
            utils.infer_comm_backend()

    def test_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(utils, "infer_device", lambda: "cuda")
        properties = SimpleNamespace(total_memory=80 * 1024**3 - 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_id: properties)
        assert utils.get_total_gpu_memory() == 79
        monkeypatch.setattr(utils, "infer_device", lambda: "cpu")
        with pytest.raises(RuntimeError, match="Unsupported device: cpu"):
            utils.get_total_gpu_memory()

    def test_transformers_version_dispatch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "4.57.0")
        before, after = (lambda *a, **k: ("before", a, k)), (lambda *a, **k: ("after", a, k))
        arguments = ((1,), (2,), {"x": 3}, {"y": 4})
        assert utils.transformers_version_dispatch("5.0", before, after, *arguments) == (
            "before",
            (1,),
            {"x": 3},
        )
        assert utils.transformers_version_dispatch("4.57.0", before, after, *arguments) == (
            "after",
            (2,),
            {"y": 4},
        )

    def test_peft(self) -> None:
        assert (
            utils.PEFT_AVAILABLE
            is utils.is_peft_available()
            is (importlib.util.find_spec("peft") is not None)
        )


class TestLossUtils:
    def test_what_frameworks_pass(self) -> None:
        from liger_kernel.transformers.model import loss_utils

        torch.manual_seed(0)
        hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
        labels = torch.randint(11, (2, 5))
        flat = hidden.view(-1, 8), weight, labels.view(-1)
        plain = loss_utils.fixed_fused_linear_cross_entropy(*flat)
        logits = (flat[0] @ weight.T, flat[0].double() @ weight.double().T)
        low, high = (torch.nn.functional.cross_entropy(x, flat[2]) for x in logits)
        assert_no_worse("loss", plain, high, low)
        more = loss_utils.fixed_fused_linear_cross_entropy(
            *flat, 7, -100, None, torch.float32, True, True
        )
        assert_no_worse("loss", more.loss, high * 10 / 7, low * 10 / 7)
        assert torch.equal(more.predicted_tokens, logits[0].argmax(-1))
        found = loss_utils.LigerForCausalLMLoss(
            hidden, weight, labels, 8, None, -100, labels, None, True, chunk_mem_const=2, bogus=1
        )
        assert torch.equal(found.loss, plain)
        assert torch.equal(found.token_accuracy, more.token_accuracy)
        assert found.predicted_tokens is None

    def test_what_stands_in_for_the_loss_sees_no_more_than_was_asked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from liger_kernel.transformers.model import loss_utils

        def stand_in(hidden: Any, weight: Any, target: Any, n: Any, ignored: Any, cap: Any) -> Any:
            return target

        monkeypatch.setattr(loss_utils, "fixed_fused_linear_cross_entropy", stand_in)
        labels = torch.arange(6).view(2, 3)
        found = loss_utils.LigerForCausalLMLoss(
            torch.zeros(2, 3, 4), None, labels, 4, return_token_accuracy=False
        )
        assert found.tolist() == [1, 2, -100, 4, 5, -100]


def test_outputs_of_models_import_the_file_that_defines_them() -> None:
    pytest.importorskip("transformers")
    program = (
        "import pickle, sys; from transformers import models\n"
        "from liger_kernel.transformers.model import output_classes\n"
        "made = output_classes.LigerPaliGemmaCausalLMOutputWithPast(loss=1, token_accuracy=3)\n"
        "from transformers.models.paligemma import modeling_paligemma as file\n"
        "assert isinstance(made, file.PaliGemmaCausalLMOutputWithPast)\n"
        "assert output_classes.LigerQwen3_5MoeCausalLMOutputWithPast if hasattr(models, 'qwen3_5_moe') else True\n"
        "assert not any('.internvl' in name for name in sys.modules)\n"
        "assert pickle.loads(pickle.dumps(made)) == made\n"
        "assert not hasattr(output_classes, 'LigerNobodysCausalLMOutputWithPast')\n"
        "assert not hasattr(output_classes, 'LigerQwen2OutputWithPast')"
    )
    in_a_new_process(program)
