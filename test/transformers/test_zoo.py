"""Every model type transformers ships, patched against unpatched.

A third of them, and all with ZOO=all in the environment (`make test-zoo`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
import transformers

from test.transformers.zoo import build, check, inputs, table

#: the release for which `build.UNBUILT` and docs/models.md are exact; on others, what cannot be built is skipped
RELEASE = "5.17.0"
#: built and right, but their loss is computed in a way that needs real logits
NOT_FUSED = {
    "chameleon": "writes into its logits before the loss",
    "idefics": "its head is two matrices, not a Linear",
    "musicgen": "one head and one loss per codebook",
    "musicgen_melody": "one head and one loss per codebook",
    "prophetnet": "transposes its logits before the loss",
}

ALL = sorted(build.ENTRIES, key=str)
CHOSEN = ALL if os.environ.get("ZOO") == "all" else ALL[::3]
IMAGES = [entry for entry in ALL if str(entry) in inputs.IMAGE_INPUTS]
CHOSEN_IMAGES = IMAGES if os.environ.get("ZOO") == "all" else IMAGES[::3]


@pytest.fixture(autouse=True)
def quiet_on_one_thread() -> Iterator[None]:
    """As many processes as cores run these tests, and HF warns about tiny configs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


def the_page_says(result: check.Result) -> bool:
    """Whether docs/models.md has this very row."""
    lines = table.PAGE.read_text().replace(" *image*", "").splitlines()
    return table.row(result.as_dict()) in lines


@pytest.mark.parametrize("entry", CHOSEN, ids=str)
def test_same_loss_and_gradients(entry: build.Entry) -> None:
    result = check.run(entry, inputs.inputs)
    exact = transformers.__version__ == RELEASE
    if str(entry) in build.UNBUILT:
        if exact and str(entry) not in build.needs_a_package():
            assert result.status == "unbuilt", "it can be built now: take it out of build.UNBUILT"
        return
    if result.status == "unbuilt" and not exact:
        pytest.skip(result.detail)
    assert result.status == "ok", result.line()
    assert result.loss == ("not fused" if str(entry) in NOT_FUSED else "fused"), result.line()
    if exact:
        assert the_page_says(result), (
            f"python -m test.transformers.zoo.table; now: {table.row(result.as_dict())}"
        )


@pytest.mark.parametrize("entry", CHOSEN_IMAGES, ids=str)
def test_same_loss_and_gradients_with_pixels(entry: build.Entry) -> None:
    result = check.run(entry, inputs.image_inputs, "image")
    assert result.status == "ok", result.line()
    assert result.loss == ("not fused" if str(entry) in NOT_FUSED else "fused"), result.line()


def test_nearly_every_type_can_be_built() -> None:
    """233 of the 248 classes of transformers 5.17 were built by the study this test began with."""
    assert (
        set(build.UNBUILT) <= {str(entry) for entry in ALL} or transformers.__version__ != RELEASE
    )
    assert len({entry.class_name for entry in ALL if str(entry) not in build.UNBUILT}) >= 230
    assert len(IMAGES) >= 10
