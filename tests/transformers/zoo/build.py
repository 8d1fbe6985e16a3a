"""A tiny random model of every type that transformers' auto classes can make, by rules over names of config attributes.

`ENTRIES` lists the types, `build(entry)` makes the model. The settings are hard on purpose: soft
caps and logit scales far from 1, router losses on, no norm weight and no bias left at its initial
constant.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB, LAYERS = 160, 2
FIRST_TEXT_ID, FIRST_SPECIAL_ID = 32, 112  # ids below and above are special to some model


@dataclass(frozen=True)
class Entry:
    """One row of an auto mapping: a model type and the class made for it."""

    model_type: str
    class_name: str
    task: str  # "causal" or "image-text"

    def __str__(self) -> str:
        both = self.task == "image-text" and self.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return f"{self.model_type}+image" if both else self.model_type


ENTRIES: tuple[Entry, ...] = tuple(
    Entry(model_type, class_name, task)
    for task, mapping in (
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image-text", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )
    for model_type, class_name in mapping.items()
    if task == "causal" or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != class_name
)

# -- numbers: the first pattern that matches the whole name gives the value --------------------------------------------

_INTEGERS: tuple[tuple[str, int], ...] = (
    (
        r"(.*_)?(num_)?(hidden_)?layers(_per_stack)?|n_layers?|depth|num_blocks|num_(en|de)coder_layers",
        LAYERS,
    ),
    (r"num_global_layers|resampler_depth|aligner_num_add_layers", 1),
    (r"mamba_(n|num)_heads", 8),
    (r".*(key_value_heads|kv_heads)|kv_n_heads|num_query_groups|linear_num_key_heads", 2),
    (r".*(num|n|attention|resampler|index)_heads?|num_attention_heads.*", 4),
    (
        r"(index_|swa_|linear_|linear_key_|linear_value_|v_|global_)?head_dim|qk_nope_head_dim|mamba_.*head.*",
        32,
    ),
    (r"qk_rope_head_dim|rotary_dim", 16),
    (r"qk_head_dim", 48),
    (r"d_kv|d_head|dim_head|attention_head_size|kv_channels|.*_head_dim|.*_dim_head", 32),
    (
        r".*intermediate_size.*|.*ffn_dim|d_ff|.*ffn_hidden_size|feed_forward_size|dim_ff|dff|d_inner|mlp_dim",
        96,
    ),
    (r".*share(d)?_expert.*dim|n_inner", 96),
    (r"hidden_size_per_layer_input|merged_hidden_size|decoder_hidden_size", 128),
    (
        r"(.*_)?hidden_size(_global)?|d_model|n_embd|.*embed_dim|emb(edding)?_dim|.*embedding_size|lru_width",
        128,
    ),
    (
        r"out(put)?_dim|out_hidden_size|.*(projection|proj)_dim|output_channels|.*_(in|out)put_dim",
        128,
    ),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_?groups", 1),
    (r".*_lora_rank|.*_rank|hc_lowrank", 16),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_(start|end)_index", 1),
    (r"(.*_)?vocab_size|vocab_size_per_layer_input", VOCAB),
    (r".*_group_vocab", 500),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length",
        128,
    ),
    (
        r"sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size|.*chunk_length",
        8,
    ),
    (r"(mamba_)?chunk_size|block_size|index_topk|index_block_size", 8),
    (r"(mamba_)?d_state|(ssm_)?state_size|mamba_d_state", 16),
    (r"mamba_d_ssm", 256),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"num_(mel_bins|query_tokens)|resampler_n(um)?_latents|latent_query_num", 16),
    (r"base_channels|latent_channels", 32),
    (r".*dropout.*|attn_pdrop", 0),
)

_FLOATS: tuple[tuple[str, float], ...] = (
    (r".*(dropout|pdrop|layerdrop|drop_path|jitter).*", 0.0),
    (r".*soft_?cap(ping)?", 0.5),
    (
        r"logit_scale|logits_scaling|lm_head_multiplier|output_multiplier|logits_mup_width_multiplier",
        1.7,
    ),
    (r"router_aux_loss_coef|aux_loss_coef", 0.5),
)

#: what None stands for where a model cannot do with None
_UNSET: tuple[tuple[str, Any], ...] = (
    (r"head_dim|indexer_head_dim", 32),
    (r"num_key_value_heads|num_experts_per_tok|indexer_n_heads", 2),
    (r"n_routed_experts", 4),
    (r"n_shared_experts|indexer_kv_heads", 1),
    (r"indexer_budget", 8),
    (r"indexer_compress_ratio", 2),
)


def _by_name(table: tuple[tuple[str, Any], ...], name: str, default: Any) -> Any:
    return next((value for pattern, value in table if re.fullmatch(pattern, name)), default)


_IS_TOKEN_ID = re.compile(
    r".*(token_ids?|token_index|_start_id|_end_id|newline_id|eod_id|mask_index)"
)


def shrink(config: PretrainedConfig, ids: dict[int, int]) -> None:
    """Make `config` and what it contains tiny, in place. `ids` maps large token ids to small ones, for all alike."""
    attributes = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depths = {
        v for k, v in attributes.items() if type(v) is int and _by_name(_INTEGERS[:1], k, None)
    }
    kept = _kept_layers(attributes, depths)
    for name, value in attributes.items():
        new = value
        if isinstance(value, PretrainedConfig):
            shrink(value, ids)
        elif _IS_TOKEN_ID.fullmatch(name):
            new = _remapped(value, ids)
        elif isinstance(value, (list, tuple)):
            new = _shrunk_list(name, value, depths, kept)
        elif isinstance(value, dict):
            new = _shrunk_rope(value, attributes) if "rope" in name else value
        elif isinstance(value, bool):
            new = True if name == "output_router_logits" else value
        elif isinstance(value, float) or (value is None and "logit_soft" in name):
            new = _by_name(_FLOATS, name, value)
        elif value is None:
            new = _by_name(_UNSET, name, None)
        elif isinstance(value, int) and value > 0:
            new = _by_name(_INTEGERS, name, value)
            new = len(kept) if name in _DEPTHS and kept else new
        if new is not value:
            setattr(config, name, new)
    if not hasattr(config, "pad_token_id"):  # transformers 5.0 reads it where it is not
        config.pad_token_id = None
    if (
        "qk_nope_head_dim" in attributes
    ):  # multi-head latent attention: as many keys as queries, heads partly rotated
        config.num_key_value_heads, config.head_dim = (
            config.num_attention_heads,
            config.qk_rope_head_dim,
        )


_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


_LISTS_LAYERS = re.compile(
    r".*(indexes|indices|idxs|layer_ids|attention_layers|target_layers|moe_layers)"
)


def _kept_layers(attributes: dict[str, Any], depths: set[int]) -> list[int]:
    """Indices of layers so that every value of every per-layer list is there once, and at least `LAYERS`."""
    lists = [v for name, v in attributes.items() if _is_per_layer(name, v, depths)]
    firsts = {values.index(kind) for values in lists for kind in values}
    later = (i for i in range(len(lists[0])) if i not in firsts) if lists else iter(())
    while firsts and len(firsts) < LAYERS:
        firsts.add(next(later))
    return sorted(firsts)


def _lists_layers(name: str, value: Any) -> bool:
    """Whether a list holds the indices of some layers."""
    return bool(_LISTS_LAYERS.fullmatch(name)) and all(type(v) is int for v in value)


def _is_per_layer(name: str, value: Any, depths: set[int]) -> bool:
    long = isinstance(value, (list, tuple)) and len(value) in depths and len(value) > LAYERS
    return long and not _lists_layers(name, value)


def _shrunk_list(name: str, values: Any, depths: set[int], kept: list[int]) -> Any:
    if _is_per_layer(name, values, depths):
        short = [values[i] for i in kept]
        if all(type(v) is int and v > 1 for v in short):
            of_one = name.removesuffix("_per_layer")
            short = [_by_name(_INTEGERS, name, _by_name(_INTEGERS, of_one, v)) for v in short]
        return type(values)(short)
    if _lists_layers(name, values) and values:
        return type(values)(
            j for j, i in enumerate(kept or range(LAYERS)) if i in values or not kept
        )
    return values


def _remapped(value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_remapped(v, ids) for v in value)
    if not isinstance(value, int) or value < FIRST_TEXT_ID:
        return value
    return ids.setdefault(value, VOCAB - 1 - len(ids))


def _shrunk_rope(rope: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
    """Sections and factor lists cut to the new rotary size."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {
            k: _shrunk_rope(v, attributes) if isinstance(v, dict) else v for k, v in rope.items()
        }
    rope = dict(rope)
    half = 16 * (rope.get("partial_rotary_factor") or 1.0)
    for name, value in rope.items():
        if name == "mrope_section":
            total = sum(value)
            short = [max(1, round(v * half / total)) for v in value[:-1]]
            rope[name] = [*short, int(half) - sum(short)]
        elif name in ("short_factor", "long_factor"):
            rope[name] = value[: int(half)]
        elif name == "original_max_position_embeddings":
            rope[name] = 64
    return rope


# -- what no rule of names can know ------------------------------------------------------------------------------------


def _musicgen(decoder: str) -> dict[str, Any]:
    parts = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": f"{decoder}_decoder"}
    return {name: {"model_type": model_type} for name, model_type in parts.items()}


_NO_ROUTER_LOSS = {
    "output_router_logits": False
}  # set in the config, it makes HF's own forward raise
_MROPE = {"text_config.rope_parameters.mrope_section": [4, 6, 6]}
_ALIKE = {"per_layer_config": {}}  # heads and experts of every layer as of the first
_ALIKE_DOTS = {**_ALIKE, "use_dsa": True, "use_sliding_window": False}
_DOTS_ROPE = "rope_parameters.indexed_attention.partial_rotary_factor"
_MAMBA_THEN_ATTENTION = ["linear_attention", "full_attention"]
_COMPASS = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
}
_SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_GEMMA3N = {
    **_SHARED_KV,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}

#: model type -> what its config cannot be made without
ARGUMENTS: dict[str, dict[str, Any]] = {
    "dots3_note": {"text_config": _ALIKE_DOTS, "vision_config": _ALIKE},
    "dots3_note_text": _ALIKE_DOTS,
    "granite4_vision": {"text_config": {"model_type": "granite4_vision_text"}},
    # of 72 layers, each of which names another source of its keys
    "mistral_large4": {"text_config": {"num_hidden_layers": 2}},
    "musicgen": _musicgen("musicgen"),
    "musicgen_melody": _musicgen("musicgen_melody"),
    "phi4_multimodal": {"audio_config": {}, "vision_config": {}},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}},
}
#: with a cache its convolutions are HF's
_LFM2 = {"layer_types": ["conv", "full_attention"], "use_cache": False}
#: the larger ones have experts beside the MLP of every layer
_GEMMA4_MOE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
#: model type -> dotted path -> value, set after shrinking
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 150},
    "blt": {  # the global model sees cross_attn_k = 2 byte states side by side
        "use_cache": False,
        "global_config.hidden_size": 256,
        "global_config.head_dim": 64,
        "encoder_config.hidden_size_global": 256,
        "decoder_config.hidden_size_global": 256,
    },
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "cohere_compass": {f"text_config.{path}": value for path, value in _COMPASS.items()},
    "cohere_compass_text": _COMPASS,
    "dbrx": {
        **_NO_ROUTER_LOSS,
        "attn_config.rope_theta": 10000.0,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.ffn_hidden_size": 128,
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "doge": _NO_ROUTER_LOSS,
    "dory": {"use_cache": False},  # its loops attend to a cache that the mask does not know
    "dots3_note": {f"text_config.{_DOTS_ROPE}": 1.0},
    "dots3_note_text": {_DOTS_ROPE: 1.0},
    "emu3": {"vocabulary_map": {"<image>": 150, "<|extra_200|>": 151}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [6, 6, 4]},
    "evolla": {"num_key_value_heads": 4},
    "flint": {"mlp_only_layers": [0]},
    "florence2": {
        "vision_config.depths": (1, 1),
        "vision_config.embed_dim": (32, 64),
        "vision_config.num_heads": (2, 4),
        "vision_config.num_groups": (2, 4),
        "vision_config.patch_size": (7, 3),
        "vision_config.patch_stride": (4, 2),
        "vision_config.patch_padding": (3, 1),
        "vision_config.patch_prenorm": (False, True),
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4_MOE,
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "granitemoe": _NO_ROUTER_LOSS,
    "granitemoe_swa": _NO_ROUTER_LOSS,
    "granitemoehybrid": {**_NO_ROUTER_LOSS, "layer_types": _MAMBA_THEN_ATTENTION},
    "granitemoeshared": _NO_ROUTER_LOSS,
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "hrm_text": {"num_hidden_layers": 16},  # 2 layers, called 2 * (3 + 1) times
    "hunyuan_vl": {"text_config.rope_parameters.mrope_section": [4, 4, 4, 4]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": _LFM2,
    "lfm2_moe": {**_LFM2, "num_dense_layers": 1},
    "lfm2_vl": {f"text_config.{path}": value for path, value in _LFM2.items()},
    "lfm3": {"use_cache": False},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"dim_model_base": 75},  # logits are divided by hidden_size / dim_model_base
    "mistral4": {"head_dim": 48, "rope_parameters.partial_rotary_factor": 1 / 3},
    "mllama": {
        "text_config.cross_attention_layers": [1],
        "text_config.rope_parameters.rope_type": "default",
    },
    "paddleocr_vl": _MROPE,
    "pp_formulanet": {"vision_config.post_conv_in_channels": 128},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151, **_MROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151, **_MROPE},
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_vl": _MROPE,
    "qwen3_vl_moe": _MROPE,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (32, 96), "axial_pos_shape": (4, 4), "hash_seed": 0},
    "step3p7": {"text_config.sliding_window": 8},
    "udop": {"decoder_start_token_id": 0},
    "unlimited_ocr": {"text_config.num_key_value_heads": 4},
    "vipllava": {"vision_feature_layers": (-1, -2)},
    "vision-encoder-decoder": {
        "decoder.add_cross_attention": True,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
    },
    "xlstm": {"chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
        "use_mamba_kernels": False,
    },
    "zamba2": {"attention_hidden_size": 256, "attention_head_dim": 64, "num_query_groups": 4},
}
_ASSISTANT = "drafts from the keys and values of another model, computes no loss"
_NO_TIMM = "its vision tower needs the package timm"
_NO_SCIPY = "needs the package scipy"
#: model types that cannot be built or trained here, and why
UNBUILT: dict[str, str] = {
    "diffusion_gemma": "its forward computes no loss",
    "fast_vlm": _NO_TIMM,
    "gemma3n": _NO_TIMM,
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "inkling_mm_model": _NO_SCIPY,
    "perception_lm": _NO_TIMM,
    "pi0": "a policy that predicts actions: its loss is not over a vocabulary",
}


def needs_a_package() -> set[str]:
    """The types of `UNBUILT` that only wait for a package, which is there now."""
    there = {p for p in ("timm", "scipy") if importlib.util.find_spec(p)}
    return {name for name, reason in UNBUILT.items() if reason.rsplit(" ", 1)[-1] in there}


def _set(owner: Any, path: str, value: Any) -> None:
    name, _, rest = path.partition(".")
    if name == "rope_parameters" and not hasattr(owner, name):  # before transformers 5
        name = "rope_scaling"
        owner.rope_scaling = {"rope_type": "default"}
    if rest:
        _set(owner[name] if isinstance(owner, dict) else getattr(owner, name), rest, value)
    elif isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _let_drop(config: PretrainedConfig, rate: float) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _let_drop(value, rate)
        elif rate and re.fullmatch(r".*(dropout|pdrop|jitter).*", name) and type(value) is float:
            setattr(config, name, rate)


def config_for(entry: Entry, dropout: float = 0.0) -> PretrainedConfig:
    config = AutoConfig.for_model(
        entry.model_type, **copy.deepcopy(ARGUMENTS.get(entry.model_type, {}))
    )
    shrink(config, {})
    _let_drop(config, dropout)
    if hasattr(config, "is_decoder") and entry.task == "causal":
        config.is_decoder = True
    for path, value in OVERRIDES.get(entry.model_type, {}).items():
        _set(config, path, value)
    return config


def build(entry: Entry, dropout: float = 0.0) -> nn.Module:
    """The same random model at every call, with or without dropout."""
    torch.manual_seed(0)
    cls = getattr(transformers, entry.class_name)
    whole = config_for(entry, dropout)
    config = next(
        (c for c in (whole, *_sub_configs(whole)) if isinstance(c, cls.config_class)), whole
    )
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the grouped matmul knows no float64
    return randomize(cls._from_config(config, attn_implementation="eager").float())


def _sub_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    return [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]


def randomize(model: nn.Module) -> nn.Module:
    """Noise on everything that starts as a constant: norm weights, biases, gates."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, p in module.named_parameters(recurse=False):
                if not p.is_floating_point() or p.numel() == 0:
                    continue
                noise = torch.randn(p.shape, generator=generator)
                if (
                    name == "weight"
                    and p.ndim == 1
                    and "norm" in (type(module).__name__ + path).lower()
                ):
                    p.copy_(1 + 0.3 * noise)
                elif p.ndim <= 1 and bool((p == p.flatten()[0]).all()):
                    p.add_(0.1 * noise)
    return model
