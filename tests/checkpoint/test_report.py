"""What a checkpoint says about itself: the figures of its report, with the digits of float32."""

import math

import pytest

from q8lightning.checkpoint.report import DirectionLoss, SaveReport, TensorLoss

MAGNITUDES = (0.0, 5e-324, 1e-300, 1e-45, 1.3e-38, 1 / 3, 1 - 2**-25, 1 - 2**-26, 16_777_217.0, 3.3e38, 1e39, 1e300)


def said(squared_error: float, squares: float, max_error: float) -> dict[str, float]:
    loss = TensorLoss("w", "weights", "w", 8, 3, squared_error, squares, max_error, 0.0, 0.0)
    figures: dict[str, float] = SaveReport([loss], [DirectionLoss("w", "w", squared_error, squares)]).summary()[
        "tensors"
    ]["w"]
    return figures


@pytest.mark.parametrize("value", MAGNITUDES)
def test_figures_have_the_digits_of_float32_at_any_magnitude(value: float) -> None:
    found = said(value * value, 1.0, value)
    assert list(found) == ["sqnr_db", "relative_error", "max_error", "update_direction_error"]
    for each in (found["max_error"], found["relative_error"] if 1e-150 < value < 1e150 else found["max_error"]):
        assert abs(each - value) <= abs(value) * 2**-24 + 5e-324
        assert (math.frexp(each)[0] * 2**24).is_integer()
    assert found["update_direction_error"] == found["relative_error"]


@pytest.mark.parametrize(
    ("squared_error", "squares", "expected"),
    [
        (0.0, 0.0, (math.inf, 0.0)),
        (0.0, 5.0, (math.inf, 0.0)),
        (4.0, 0.0, (-math.inf, math.inf)),
        (1.0, 100.0, (20, 0.1)),
    ],
)
def test_figures_at_the_ends_of_the_scale(squared_error: float, squares: float, expected: tuple[float, float]) -> None:
    found = said(squared_error, squares, 1.0)
    assert (found["sqnr_db"], found["relative_error"]) == pytest.approx(expected, rel=1e-7)


def test_what_is_no_number_is_said_so() -> None:
    assert all(math.isnan(each) for each in said(math.nan, 1.0, math.nan).values())
