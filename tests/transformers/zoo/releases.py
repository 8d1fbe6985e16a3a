"""The releases of transformers that `make test-matrix` runs the zoo on: what each of them cannot build, and why.

Exact: whatever is not named here or in `build.UNBUILT` must be built and be right. On a release that is not here, what
cannot be built is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from tests.transformers.zoo import build


@dataclass(frozen=True)
class Release:
    """`unbuilt`: entry, with " image" if it fails on pixels only -> reason."""

    least_classes: (
        int  # that must be built; the study this test began with built 233 of transformers 5.17
    )
    unbuilt: dict[str, str] = field(default_factory=dict)


_VISION_TOWER = "listed among the language models, but its config is that of a vision tower"
_BROKEN = "HF's own code fails"

#: the release for which docs/models.md is exact
DOCUMENTED = "5.24.0"
RELEASES: dict[str, Release] = {
    "4.57.6": Release(
        165,
        {
            "got_ocr2 image": "makes its image features in another way",
            "ovis2 image": "makes its image features in another way",
            "pixtral": _VISION_TOWER,
            "qdqbert": "needs the package pytorch-quantization",
            "qwen3_vl image": "makes its image features in another way",
            "qwen3_vl_moe image": "makes its image features in another way",
            "speech_to_text_2": _BROKEN,
            "transfo-xl": "sorts its vocabulary into bins of fixed size",
            "zamba": "has other names for its layers",
        },
    ),
    "5.0.0": Release(
        175,
        {
            "flex_olmo": _BROKEN,
            "pix2struct": _BROKEN,
            "pix2struct image": _BROKEN,
            "pixtral": _VISION_TOWER,
            "qwen3_next": _BROKEN,
            "zamba2": _BROKEN,
        },
    ),
    "5.17.0": Release(230),
    "5.23.0": Release(230),
    DOCUMENTED: Release(255, {"llama4+image": _BROKEN}),  # without images, and only then
}


def unbuilt() -> dict[str, str]:
    """What the installed release cannot build, or runs into errors of its own with."""
    here = RELEASES.get(transformers.__version__)
    return build.UNBUILT | (here.unbuilt if here else {})
