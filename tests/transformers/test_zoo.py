"""Every model type transformers ships, patched against unpatched.

An eighth of them without the slowest, and all with ZOO=all in the environment (`make test-zoo`, and `make test-matrix`
for other releases).
"""

from __future__ import annotations

import os

import pytest
import transformers

from tests import matrix
from tests.transformers.zoo import build, check, inputs, releases, table

RELEASE = releases.RELEASES.get(transformers.__version__)
DOCUMENTED = transformers.__version__ == releases.DOCUMENTED
UNBUILT = releases.unbuilt()
#: built and right, but their loss is computed in a way that needs real logits
NOT_FUSED = {
    "chameleon": "writes into its logits before the loss",
    "dory": "its head is no plain Linear: a parameter scales the logits of each token",
    "idefics": "its head is two matrices, not a Linear",
    "musicgen": "one head and one loss per codebook",
    "musicgen_melody": "one head and one loss per codebook",
    "open-llama": "multiplies with its embedding, it has no head",
    "prophetnet": "transposes its logits before the loss",
    "xlm-prophetnet": "transposes its logits before the loss",
}

ALL = sorted(build.ENTRIES, key=str)
#: one gradient is close to what is allowed, and is judged on many draws
SLOW = {"granitemoehybrid"}
#: hyper-connections, short convolutions and most families have tests of their own
SAMPLE = [entry for entry in ALL[::8] if str(entry) not in SLOW]
CHOSEN = ALL if os.environ.get("ZOO") == "all" else SAMPLE
IMAGES = [entry for entry in ALL if str(entry) in inputs.IMAGE_INPUTS]
CHOSEN_IMAGES = IMAGES if os.environ.get("ZOO") == "all" else IMAGES[::8]


pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")


def the_page_says(result: check.Result) -> bool:
    """Whether docs/models.md has this very row."""
    lines = table.PAGE.read_text().replace(" *image*", "").splitlines()
    return table.row(result.as_dict()) in lines


def assert_right(entry: build.Entry, result: check.Result) -> None:
    """It is right, and fused where it can be; or it cannot be built, and that is known."""
    name = str(entry) if result.inputs == "text" else f"{entry} {result.inputs}"
    if name in UNBUILT:
        if RELEASE and name not in build.needs_a_package():
            assert result.status == "unbuilt", f"it can be built now: take {name!r} off the list"
        return
    if result.status == "unbuilt" and RELEASE is None:
        pytest.skip(result.detail)
    assert result.status == "ok", result.line()
    assert result.loss == ("not fused" if str(entry) in NOT_FUSED else "fused"), result.line()


@pytest.mark.parametrize("entry", CHOSEN, ids=str)
def test_same_loss_and_gradients(entry: build.Entry) -> None:
    result = check.run(entry, inputs.inputs)
    assert_right(entry, result)
    if DOCUMENTED and result.status == "ok" and str(entry) not in UNBUILT:
        assert the_page_says(result), (
            f"python -m tests.transformers.zoo.table; now: {table.row(result.as_dict())}"
        )


@pytest.mark.parametrize("entry", CHOSEN_IMAGES, ids=str)
def test_same_loss_and_gradients_with_pixels(entry: build.Entry) -> None:
    assert_right(entry, check.run(entry, inputs.image_inputs, "image"))


def test_nearly_every_type_can_be_built() -> None:
    assert set(build.UNBUILT) <= {str(entry) for entry in ALL} or not DOCUMENTED
    built = {entry.class_name for entry in ALL if str(entry) not in UNBUILT}
    assert len(built) >= (RELEASE.least_classes if RELEASE else 160)
    assert len(IMAGES) >= 10


def test_the_matrix_runs_the_releases_that_are_described() -> None:
    described = [row for row in matrix.ROWS if row.name in releases.RELEASES]
    assert [row.name for row in described] == [*releases.RELEASES]
    assert all((row.transformers, row.tests) == (row.name, "zoo") for row in described)
