"""What a training step of each model type eats: text, and small pixels where it cannot do without or is asked to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.transformers.zoo.build import FIRST_SPECIAL_ID, FIRST_TEXT_ID, Entry

ROWS, LENGTH = 2, 16

Inputs = dict[str, Any]
_TYPES = {"mm_token_type_ids", "token_type_ids"}


def text(length: int = LENGTH, seed: int = 0) -> Inputs:
    """Ids that are special to no model, one padded row, labels of which a third is ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TEXT_ID, FIRST_SPECIAL_ID, (ROWS, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    drop = (torch.rand(ROWS, length, generator=generator) < 0.3) | (mask == 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(drop, -100)}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(4))


def _square(model: nn.Module) -> Tensor:
    """One image per row, of the size the vision tower wants."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    return _pixels(getattr(config, "num_channels", 3), height, width)


def _with_image_tokens(count: int, token: int) -> Inputs:
    """Text behind `count` image tokens in every row."""
    words = text()
    ids = torch.full((ROWS, count), token)
    return {
        "input_ids": torch.cat((ids, words["input_ids"]), 1),
        "attention_mask": torch.cat((torch.ones_like(ids), words["attention_mask"]), 1),
        "labels": torch.cat((torch.full_like(ids, -100), words["labels"]), 1),
    }


def _image_token(model: nn.Module) -> int:
    for name in ("image_token_id", "image_token_index"):
        token = getattr(model.config, name, None)
        if token is not None:
            return token
    raise ValueError(f"{type(model.config).__name__} names no image token")


def _merged(**pixels: Any) -> Callable[[nn.Module], Inputs]:
    """Pixels whose features replace image tokens; how many tokens: as many as the model makes features."""

    def make(model: nn.Module) -> Inputs:
        made = {name: value(model) if callable(value) else value for name, value in pixels.items()}
        with torch.no_grad():
            features = (
                model if hasattr(model, "get_image_features") else model.model
            ).get_image_features(**made)
        features = getattr(features, "pooler_output", features)
        parts = features if isinstance(features, (list, tuple)) else [features]
        rows = sum(part.shape[:-1].numel() for part in parts)
        words = _with_image_tokens(rows // ROWS, _image_token(model))
        for name in inspect.signature(model.forward).parameters.keys() & _TYPES:
            words[name] = (words["input_ids"] == _image_token(model)).long()
        return {**words, **made}

    return make


def _patches(model: nn.Module) -> Tensor:
    """The flattened patches of a 4 x 4 grid per row."""
    config = model.config.vision_config
    size = (
        config.patch_size**2
        * getattr(config, "in_channels", 3)
        * getattr(config, "temporal_patch_size", 1)
    )
    return _pixels(16, size).flatten(0, 1)


_GRID = torch.tensor([[1, 4, 4]] * ROWS)


def _musicgen(model: nn.Module) -> Inputs:
    books = model.config.num_codebooks
    ids = torch.randint(FIRST_TEXT_ID, FIRST_SPECIAL_ID, (ROWS * books, LENGTH))
    return {"input_ids": ids, "labels": ids.view(ROWS, books, LENGTH).transpose(1, 2)}


def _also(**more: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Inputs]:
    return lambda model: {**text(), **{name: make(model) for name, make in more.items()}}


def _typed(model: nn.Module) -> Inputs:
    """Types for tokens that are all text, where the release asks for them in training."""
    words = text()
    names = inspect.signature(model.forward).parameters.keys() & _TYPES
    return {**words, **{name: torch.zeros_like(words["input_ids"]) for name in names}}


def _queries(model: nn.Module) -> Inputs:
    """BLIP-2 and its children: a fixed number of query tokens per image."""
    return {
        **_with_image_tokens(model.config.num_query_tokens, _image_token(model)),
        "pixel_values": _square(model),
    }


def _instructed(model: nn.Module) -> Inputs:
    return {**_queries(model), "qformer_input_ids": text(seed=5)["input_ids"]}


def _instructed_by_video(model: nn.Module) -> Inputs:
    frames = 4  # as many as the model is written for
    return {
        **_with_image_tokens(
            frames * model.config.num_query_tokens, model.config.video_token_index
        ),
        "pixel_values": _square(model).unsqueeze(1).expand(-1, frames, -1, -1, -1),
        "qformer_input_ids": text(seed=5)["input_ids"],
    }


def _kosmos2(model: nn.Module) -> Inputs:
    inputs = _with_image_tokens(model.config.latent_query_num, FIRST_TEXT_ID)
    at_image = (inputs["labels"] == -100) & (
        torch.arange(inputs["labels"].shape[1]) < model.config.latent_query_num
    )
    return {**inputs, "pixel_values": _square(model), "image_embeds_position_mask": at_image}


def _idefics(model: nn.Module) -> Inputs:
    pixels = _square(model).unsqueeze(1)
    return {
        **text(),
        "pixel_values": pixels,
        "image_attention_mask": torch.ones(ROWS, LENGTH, 1, dtype=torch.long),
    }


def _pix2struct(model: nn.Module) -> Inputs:
    config = model.config.vision_config
    patches = _pixels(9, 2 + config.patch_embed_hidden_size)
    patches[..., :2] = torch.tensor([[i // 3 + 1, i % 3 + 1] for i in range(9)])
    return {
        "flattened_patches": patches,
        "attention_mask": torch.ones(ROWS, 9),
        "labels": text()["labels"],
    }


def _seq2seq(model: nn.Module) -> Inputs:
    return {"pixel_values": _pixels(3, 32, 32), "labels": text()["labels"]}


def _boxes(model: nn.Module) -> Tensor:
    corner = torch.rand(ROWS, LENGTH, 2, generator=torch.Generator().manual_seed(6)) / 2
    return torch.cat((corner, corner + 0.25), -1)


#: types that cannot be trained on ids, mask and labels alone
NEEDED: dict[str, Callable[[nn.Module], Inputs]] = {
    "blip": _also(pixel_values=_square),
    "blip-2": _queries,
    "gemma3": _typed,
    "git": _also(pixel_values=_square),
    "idefics": _idefics,
    "instructblip": _instructed,
    "instructblipvideo": _instructed_by_video,
    "kosmos-2": _kosmos2,
    "molmo2": _typed,
    "musicgen": _musicgen,
    "musicgen_melody": _musicgen,
    "paligemma": _typed,
    "pix2struct": _pix2struct,
    "pp_formulanet": lambda model: {**_seq2seq(model), "input_ids": text()["input_ids"]},
    "shieldgemma2": _typed,
    "udop": _also(bbox=_boxes),
    "vision-encoder-decoder": _seq2seq,
}

_plain = _merged(pixel_values=_square)
_grid = _merged(pixel_values=_patches, image_grid_thw=_GRID)
_nested = _merged(pixel_values=lambda model: _square(model).unsqueeze(1))

#: types that are also checked with pixels
IMAGE_INPUTS: dict[str, Callable[[nn.Module], Inputs]] = {
    **{
        name: NEEDED[name]
        for name in ("blip", "blip-2", "git", "idefics", "instructblip", "kosmos-2", "pix2struct")
    },
    **dict.fromkeys(
        ("aya_vision", "cohere2_vision", "gemma3", "got_ocr2", "internvl", "llava", "paligemma"),
        _plain,
    ),
    **dict.fromkeys(("vipllava", "janus", "deepseek_vl", "ovis2", "florence2"), _plain),
    **dict.fromkeys(
        ("glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5+image"), _grid
    ),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _nested),
}


def inputs(entry: Entry, model: nn.Module) -> Inputs:
    """What a training step of this type needs at least."""
    needed = NEEDED.get(str(entry))
    return text() if needed is None else needed(model)


def image_inputs(entry: Entry, model: nn.Module) -> Inputs:
    return IMAGE_INPUTS[str(entry)](model)
