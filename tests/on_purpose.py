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
        "`lce_forward` and the other forwards of `liger_kernel.transformers.model`",
        "copies of HuggingFace's forwards",
        "HuggingFace's own forward, with its loss fused, and its output class; `token_accuracy` and "
        "`predicted_tokens` are in it where they were asked for",
        "A copy is out of date with the next release of transformers.",
        "transformers/test_model_forwards.py::test_it_is_the_forward_of_a_patched_model",
    ),
    Behaviour(
        "`lce_forward(label_smoothing=..., ...)`: options of the loss that HuggingFace's has not",
        "without effect where there are logits, as in evaluation",
        "with the same effect everywhere",
        "Losses of training and evaluation are compared.",
        "transformers/test_model_forwards.py::test_options_of_the_loss",
    ),
    Behaviour(
        "`lce_forward(skip_logits=True)` without labels",
        "ValueError, or TypeError",
        "logits",
        "HuggingFace's Trainer sends it with labels taken away, for label smoothing or a loss of the user's.",
        "transformers/test_model_forwards.py::test_it_is_the_forward_of_a_patched_model",
    ),
    Behaviour(
        "`LigerLayerNorm(bias=True)`",
        "a bias of random numbers",
        "a bias of zeros",
        "A fresh norm only normalises, as `torch.nn.LayerNorm` does.",
        "transformers/test_norm_modules.py::test_layer_norm_constructor_forms",
    ),
    Behaviour(
        '`LigerFusedLinearDPOLoss(loss_type="sigmoid", label_smoothing=...)`',
        "accepted, without effect",
        "cDPO: a share of the pairs is taken to be labelled the wrong way round",
        "TRL reads the option so.",
        "chunked_loss/test_preference.py::test_dpo",
    ),
    Behaviour(
        "options of a loss in `chunked_loss` that its `loss_type` does not read, and `alpha` without the NLL",
        "accepted, without effect",
        "ValueError, unless they have their defaults",
        "Whoever sets an option wants it read. `compiled`, `chunk_size` and `max_completion_length` are passed by all.",
        "chunked_loss/test_declared.py::test_no_option_is_accepted_without_effect",
    ),
    Behaviour(
        "`LigerFusedLinearGRPOLoss`: log-probabilities that drifted apart",
        "infinity, or NaN in the gradient, from a difference of 89 on",
        "computed in float64; beyond the numbers of float32 the largest of them",
        "One token would undo the whole run.",
        "chunked_loss/test_grpo.py::test_a_divergence_that_float32_can_hold",
    ),
    Behaviour(
        "students with more classes than their teachers",
        "an error",
        "a class that only one of the two has is a logit of 0 of the other",
        "So it is for teachers with more classes, in both packages.",
        "chunked_loss/test_distillation.py::test_distillation",
    ),
    Behaviour(
        "sequences without labels in `chunked_loss`",
        "NaN, where log-probabilities are averaged",
        "loss and gradient 0",
        "Trainers split batches, and a part may have none.",
        "chunked_loss/test_preference.py::test_sequences_without_labels",
    ),
)
