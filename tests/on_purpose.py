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
    r"liger_kernel\.transformers\.model\.\w+\.Liger\w+OutputWithPast": "The fields are those of the installed "
    "transformers, which calls `past_key_values` `cache` since 5.24.",
}

#: pattern for "module.name" -> why it is not there
ABSENT = {
    r"liger_kernel\.ops\.backends\._triton\.\w+\.\w+_loss_and_grad_triton": "A step of its loops over chunks. "
    "Here that is a row loss of the loss head, which `CONTRIBUTING.md` explains.",
    r"liger_kernel\.ops\.(vocab_parallel_)?cross_entropy\.liger_\w+_kernel": "A raw kernel, whose parameters are those "
    "of its own launcher. The autograd Function beside it takes tensors.",
    r"liger_kernel\.ops\.experimental\.\w+\.(\w+_kernel|get_autotune_config)": "Raw kernels and the configurations of "
    "one. `LigerEmbeddingFunction` and `matmul` take tensors.",
    r"liger_kernel\.ops\.mlp\.(gemm_swiglu|swiglu_backward_\w+)": "Steps of `LigerMLPFunction` over a buffer of its "
    "own. `liger_kernel.functional.gated_mlp` keeps less.",
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
        "`set_impl(name)`",
        "any name; an error at the first call that it cannot compute, also of ops that it has nothing for",
        "an unknown name is an error at once; ops that it has nothing for are computed as before",
        "A misspelt name looks like one that works, and one kernel is no reason to replace all.",
        "test_implementations.py::test_unknown_names",
    ),
    Behaviour(
        "`register_impl(op, impl_name=...)`",
        "reached by all functions and modules",
        "chosen by `set_impl`, reached by all functions and modules for norms, softmax, SwiGLU and GeGLU; "
        "for the other ops by `liger_kernel.functional.dispatch`",
        "Ops have options that the arguments of such a function have no place for.",
        "test_implementations.py::test_an_implementation_of_the_user_is_called",
    ),
    Behaviour(
        "`liger_kernel.ops.backends.registry.register_impl(info)`",
        "a module that replaces all ops",
        "NotImplementedError, which names the other ways",
        "An implementation here is a file per op, checked against the contract of the op when it is loaded.",
        "test_implementations.py::test_one_implementation_of_all_ops",
    ),
    Behaviour(
        "`LIGER_KERNEL_IMPL_<OP>`, `LIGER_KERNEL_BACKEND`, `LIGER_KERNEL_STRICT`",
        "read at each call",
        "not read: `LIGER_KERNEL_IMPL` is, once, and `set_impl` comes after it",
        "One way to ask, which is always strict.",
        "test_implementations.py::test_a_choice_by_name_is_a_request",
    ),
    Behaviour(
        "`from liger_kernel.backends import dispatch`",
        "the function",
        "the module, which has the function: `liger_kernel.backends.dispatch.dispatch`",
        "`liger_kernel.functional.dispatch` is the function, in both.",
        "test_implementations.py::test_calls_of_ours",
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
    Behaviour(
        "`fused_neighborhood_attention_forward()`",
        "returns the output, the weights (B, H, S, S), and the state of its softmax",
        "returns the output, None and None",
        "The memory of neighbourhood attention is that of the window; nothing of all pairs of tokens exists.",
        "ops/test_fused_neighborhood_attention.py::test_the_helper_gives_no_weights_of_all_pairs",
    ),
    Behaviour(
        "`LigerTiledMLPFunction`, `LigerTiledSwiGLUMLP`, `LigerTiledGEGLUMLP`",
        "add to `.grad` of the parameters within backward, once per tile",
        "hand gradients to autograd, once and whole; only a subclass of the Function still adds to `.grad`",
        "DDP, FSDP and hooks see a gradient when it is complete, and `torch.autograd.grad` gets it.",
        "ops/test_tiled_mlp.py::test_every_tensor_gets_its_gradient_once",
    ),
    Behaviour(
        "tiled MLPs with `num_shards=None`",
        "tiles of as many tokens as the block is wide",
        "tiles whose intermediates take 256 MiB",
        "What the user wants to bound is memory.",
        "ops/test_tiled_mlp.py::test_the_default_number_of_tiles",
    ),
    Behaviour(
        "`LigerMultiTokenAttention(sparse=True)`",
        "RuntimeError, but for float32",
        "any floating dtype",
        "Our sparsemax computes in fp32 and rounds once.",
        "ops/test_ops.py::test_as_exact_as_pytorch",
    ),
)
