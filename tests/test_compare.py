"""The one rule for numbers: faults that have to be found, and right answers that have to pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from tests.ratios import largest

INF, NAN = math.inf, math.nan
LARGEST = torch.finfo(torch.float16).max


@pytest.fixture(autouse=True)
def not_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faults planted here are not what is looked for there."""
    monkeypatch.delenv("LIGER_KERNEL_RATIOS", raising=False)


def judge(
    ours: list[float],
    high: list[float],
    low: list[float],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    assert_no_worse(
        "x",
        torch.tensor(ours, dtype=dtype),
        torch.tensor(high, dtype=torch.float64),
        torch.tensor(low, dtype=dtype),
        **options,
    )


either_way = pytest.mark.parametrize("elementwise", [False, True])


@either_way
@pytest.mark.parametrize(
    ("ours", "high", "low"),
    [
        pytest.param([3.0, 1.0], [INF, 1.0], [INF, 1.0], id="finite where the truth is infinite"),
        pytest.param([3.0], [INF], [INF], id="finite where all of the truth is infinite"),
        pytest.param([3.0, 1.0], [NAN, 1.0], [NAN, 1.0], id="finite where the truth is NaN"),
        pytest.param([-INF, 1.0], [INF, 1.0], [INF, 1.0], id="infinity of the other sign"),
        pytest.param([NAN, 1.0], [INF, 1.0], [INF, 1.0], id="NaN for infinity"),
        pytest.param([INF, 1.0], [NAN, 1.0], [NAN, 1.0], id="infinity for NaN"),
        pytest.param([NAN, INF], [INF, NAN], [INF, NAN], id="in each other's place"),
        pytest.param([INF, 1.0], [2.0, 1.0], [INF, 1.0], id="infinite like eager"),
        pytest.param([NAN, 1.0], [2.0, 1.0], [NAN, 1.0], id="NaN like eager"),
        pytest.param([9.0, 1.0], [2.0, 1.0], [INF, 1.0], id="wrong where eager overflows"),
        pytest.param([9.0, 1.0], [2.0, 1.0], [NAN, 1.0], id="wrong where eager is NaN"),
        pytest.param([9.0], [2.0], [INF], id="wrong where all of eager overflows"),
        pytest.param([2.0, 9.0], [2.0, 1.0], [INF, 1.0], id="wrong beside an overflow of eager"),
        pytest.param([9.0, 1.0, INF], [2.0, 1.0, INF], [INF, 1.0, INF], id="both at once"),
        pytest.param([2.00001, 1.0], [2.0, 1.0], [2.0, 1.0], id="off by many spacings"),
        pytest.param([2.21, 1.0], [2.0, 1.0], [2.1, 1.0], id="more than twice the error of eager"),
    ],
)
def test_rejected(ours: Any, high: Any, low: Any, elementwise: bool) -> None:
    with pytest.raises(AssertionError, match=r"^x: error is .* of what is allowed"):
        judge(ours, high, low, elementwise=elementwise)


@either_way
@pytest.mark.parametrize(
    ("ours", "high", "low"),
    [
        pytest.param(
            [INF, -INF, NAN, 1.0], [INF, -INF, NAN, 1.0], [NAN, 1.0, INF, 1.0], id="equal"
        ),
        pytest.param([INF, NAN], [INF, NAN], [1.0, 1.0], id="nothing finite"),
        pytest.param([2.0, 1.0], [2.0, 1.0], [INF, NAN], id="right where eager is not finite"),
        pytest.param([2.0000002, 1.0], [2.0, 1.0], [2.0, 1.0], id="off by one spacing"),
        pytest.param([2.2, 1.0], [2.0, 1.0], [2.1, 1.0], id="twice the error of eager"),
        pytest.param([], [], [], id="empty"),
    ],
)
def test_accepted(ours: Any, high: Any, low: Any, elementwise: bool) -> None:
    judge(ours, high, low, elementwise=elementwise)


@either_way
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_truth_beyond_the_largest_number(sign: float, elementwise: bool) -> None:
    """In 16 bits 1e5 is infinite: infinity and the largest number are right, whatever eager gives."""
    for low in (INF, LARGEST, NAN):
        for ours in (INF, LARGEST):
            judge([sign * ours], [sign * 1e5], [sign * low], torch.float16, elementwise=elementwise)
    for ours in (-sign * INF, -sign * LARGEST, sign * 5e4, NAN):
        with pytest.raises(AssertionError):
            judge([ours], [sign * 1e5], [sign * INF], torch.float16, elementwise=elementwise)
    with pytest.raises(AssertionError):  # 65000 is not beyond it
        judge([sign * INF], [sign * 65000.0], [sign * INF], torch.float16, elementwise=elementwise)


def test_a_huge_element_excuses_no_other() -> None:
    ours, high, low = [1e6, 1.01], [1e6, 1.0], [1e6, 1.0]
    judge(ours, high, low)
    with pytest.raises(AssertionError, match=r"element 1 of 2 is 1\.00999999, truth 1;"):
        judge(ours, high, low, elementwise=True)


def test_many_small_errors_are_no_rounding_of_the_largest() -> None:
    """The root mean square of 1000 errors, each of which the one error of eager would allow."""
    high = [1.0] * 1000
    with pytest.raises(AssertionError):
        judge([1.0005] * 1000, high, [1.001, *high[1:]])


def test_shapes_dtypes_and_integers() -> None:
    one = torch.ones(2)
    for ours, high, low, said in (
        (one, one[:1].double(), one, r"x: shape \(2,\) != \(1,\)"),
        (one.half(), one.double(), one, "x: dtype torch.float16 != torch.float32"),
        (one.long(), 2 * one.long(), one.long(), "x: error is inf"),
        (one.bool(), ~one.bool(), one.bool(), "x: error is inf"),
    ):
        with pytest.raises(AssertionError, match=said):
            assert_no_worse("x", ours, high, low)
    assert_no_worse("x", one.long(), one.long(), one.long())


def test_several_orders_of_summation() -> None:
    """The truth has no float32; one order of eager happens to round to the nearest, another one does not."""
    high, spacing = torch.tensor(1.00000001, dtype=torch.float64), torch.finfo(torch.float32).eps
    lows = [torch.tensor(1.0), torch.tensor(1.0 + 2 * spacing)]
    ours = torch.tensor(1.0 + 4 * spacing)
    with pytest.raises(AssertionError):
        assert_no_worse("loss", ours, high, lows[0])
    for order in (lows, lows[::-1]):
        assert_no_worse("loss", ours, high, order)
    with pytest.raises(AssertionError):
        assert_no_worse("loss", ours + 3 * spacing, high, lows)


def draws(errors: Callable[[Tensor], tuple[Tensor, Tensor]], taken: list[int]) -> Any:
    """One loss a draw, whose errors in ours and in eager are `errors(generator)`."""

    def draw(seed: int) -> Any:
        taken.append(seed)
        noise = torch.randn(2, generator=torch.Generator().manual_seed(seed))
        ours, low = errors(noise)
        if seed == 0:
            low = torch.zeros(())  # eager is lucky
        high = torch.tensor(1.0, dtype=torch.float64)
        return {"loss": 1 + ours}, {"loss": high}, {"loss": 1 + low}

    return draw


def test_luck_of_one_draw_is_no_limit() -> None:
    taken: list[int] = []
    assert_draws_no_worse(draws(lambda noise: (1e-4 * noise[0], 1e-4 * noise[1]), taken))
    assert 4 <= len(taken) < 64
    assert taken == [*range(len(taken))]


def test_an_error_that_is_too_large_is_so_in_many_draws() -> None:
    taken: list[int] = []
    with pytest.raises(AssertionError, match="loss: error is"):
        assert_draws_no_worse(draws(lambda noise: (3e-4 * noise[0], 1e-4 * noise[1]), taken))
    assert len(taken) == 64


def test_an_error_of_many_times_what_is_allowed_is_no_luck() -> None:
    taken: list[int] = []
    with pytest.raises(AssertionError, match="loss: error is"):
        assert_draws_no_worse(draws(lambda noise: (1e-2 + 0 * noise[0], 1e-4 * noise[1]), taken))
    assert len(taken) == 16


def test_one_draw_where_errors_are_small() -> None:
    taken: list[int] = []
    assert_draws_no_worse(draws(lambda noise: (0 * noise[0], noise[1]), taken))
    assert taken == [0]
    assert_draws_no_worse(draws(lambda noise: (0 * noise[0], noise[1]), taken), first=3)
    assert taken == [0, 0, 1, 2]


@pytest.mark.parametrize(("share", "count"), [(0.6, 1), (0.8, 64)])
def test_more_draws_from_seven_tenths_of_what_is_allowed(share: float, count: int) -> None:
    taken: list[int] = []

    def draw(seed: int) -> Any:
        taken.append(seed)
        high = torch.ones((), dtype=torch.float64)
        return [
            {"loss": t}
            for t in ((1 + 2e-3 * share * high).float(), high, (1 + 1e-3 * high).float())
        ]

    assert_draws_no_worse(draw)
    assert len(taken) == count


def test_draws_give_the_same_names() -> None:
    one = torch.ones(1)
    with pytest.raises(AssertionError, match="weight"):
        assert_draws_no_worse(lambda _: ({"loss": one}, {"loss": one.double()}, {"weight": one}))


def test_ratios_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGER_KERNEL_RATIOS", str(tmp_path / "ratios"))
    judge([2.2, 1.0], [2.0, 1.0], [2.2, 1.0])
    judge([2.0], [2.0], [2.0])
    with pytest.raises(AssertionError):
        judge([3.0], [INF], [INF])
    (file,) = tmp_path.iterdir()
    assert len([*map(json.loads, file.read_text().splitlines())]) == 3
    ((ratio, numbers, test, name),) = largest([file])
    assert (ratio, numbers, name) == (INF, 1, "x")
    assert test == "tests/test_compare.py::test_ratios_are_written_down"
