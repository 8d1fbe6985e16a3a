"""What differs from the incumbent on purpose, and why; `tests.compatibility` makes a table of it.

Parameters are compared by machine: a difference that no pattern here explains, or a pattern without a difference, fails
`tests/test_compatibility.py`. What a signature cannot show names the test that pins it.
"""

from __future__ import annotations

from typing import NamedTuple

#: pattern for "module.name" -> why its parameters differ
PARAMETERS = {
    r"liger_kernel\.functional\.\w+": "Our own API: torch's names and defaults, and `LIGER_KERNEL_IMPL` for the "
    "implementation. `liger_kernel.transformers.functional` takes what the incumbent's takes.",
    r"liger_kernel\.transformers\.layer_norm\.LigerLayerNorm": "`LIGER_KERNEL_IMPL` chooses the implementation, for "
    "all modules alike.",
    r".*\.LigerFusedLinearPPOBase": "The policy losses share one loss head instead of a base class; what others call "
    "of the base is there.",
}


class Behaviour(NamedTuple):
    name: str
    incumbent: str
    ours: str
    why: str
    test: str  # "file::function" under tests/


BEHAVIOURS = (
    Behaviour(
        "`apply_liger_kernel_to_*()`",
        "replaces the classes of the modeling file; for some families `torch.nn.LayerNorm` or "
        "`torch.nn.functional.cross_entropy`, too",
        "patches the instances of those classes, living and to come; torch and the classes stay",
        "Other models of the process are none of its business, and `revert_liger_kernel_to_*()` takes all back.",
        "transformers/test_contract.py::test_layer_norm_of_the_process_stays",
    ),
    Behaviour(
        "`apply_liger_kernel_to_*(model=model)`",
        "replaces the classes all the same",
        "patches that model, and `apply_rotary_pos_emb` of its modeling file",
        "The next model that somebody builds is not the caller's.",
        "transformers/test_doors.py::test_instance_level",
    ),
    Behaviour(
        "`apply_liger_kernel_to_*(model=model)`",
        "TypeError or ValueError for another class of model",
        "patches whatever it can prove, by structure",
        "Every replacement is proven for the module that it is made in.",
        "transformers/test_families.py::test_a_model_of_another_family",
    ),
    Behaviour(
        "`rope=True`, `fused_linear_cross_entropy=True`",
        "NotImplementedError, or a warning, for GLM-4, Qwen3.5, Gemma 4, DeepSeek-V3 and Granite",
        "fused, where it is proven",
        "Their rotary functions and scaled logits are forms that our ops compute.",
        "transformers/test_families.py::test_flags_that_the_incumbent_refuses",
    ),
    Behaviour(
        "both losses at once",
        "AssertionError",
        "ValueError, before anything changes",
        "`python -O` drops assertions.",
        "transformers/test_doors.py::test_flags",
    ),
    Behaviour(
        "unknown flags",
        "dropped in silence by `_apply_liger_kernel*` and by entry points with `**kwargs`",
        "dropped with a warning that names them",
        "A misspelt flag looks like one that works.",
        "transformers/test_doors.py::test_flags_that_an_entry_point_passes_on",
    ),
    Behaviour(
        "`AutoLigerKernelForCausalLM`",
        "patches classes, of known model types only",
        "patches the model that it returns, of any type",
        "As above.",
        "transformers/test_doors.py::test_auto_class",
    ),
    Behaviour(
        "`LigerLayerNorm(bias=True)`",
        "a bias of random numbers",
        "a bias of zeros",
        "A fresh norm only normalises, as `torch.nn.LayerNorm` does.",
        "transformers/test_norm_modules.py::test_layer_norm_constructor_forms",
    ),
)
