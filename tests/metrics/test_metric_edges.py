"""Ratios with a zero above or below, and arguments that the metrics refuse."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.metric_cases import assert_agrees, update_direction_error
from support.oracle import float64
from torch import Tensor
from torchmetrics import Metric

from q8lightning.metrics import (
    CodebookUsage,
    CompressionRatio,
    MaxReconstructionError,
    ReconstructionSQNR,
    RelativeReconstructionError,
    UpdateDirectionError,
)

ZERO, ONE, NOTHING, NAN = torch.zeros(3), torch.ones(3), torch.zeros(0), torch.tensor([1.0, torch.nan, 1.0])

LIMITS: list[tuple[Callable[..., Metric], tuple[Any, ...], Any]] = [
    (ReconstructionSQNR, (ONE, ONE), math.inf),
    (ReconstructionSQNR, (ZERO, ZERO), math.inf),
    (ReconstructionSQNR, (NOTHING, NOTHING), math.inf),
    (ReconstructionSQNR, (ONE, ZERO), -math.inf),
    (ReconstructionSQNR, (ZERO, ONE), 0.0),
    (ReconstructionSQNR, (NAN, ONE), math.nan),
    (ReconstructionSQNR, (ONE, NAN), math.nan),
    (RelativeReconstructionError, (ONE, ONE), 0.0),
    (RelativeReconstructionError, (ZERO, ZERO), 0.0),
    (RelativeReconstructionError, (NOTHING, NOTHING), 0.0),
    (RelativeReconstructionError, (ONE, ZERO), math.inf),
    (RelativeReconstructionError, (ZERO, ONE), 1.0),
    (RelativeReconstructionError, (NAN, ONE), math.nan),
    (MaxReconstructionError, (ONE, ONE), 0.0),
    (MaxReconstructionError, (NOTHING, NOTHING), 0.0),
    (MaxReconstructionError, (-ONE, ONE), 2.0),
    (MaxReconstructionError, (NAN, ONE), math.nan),
    (UpdateDirectionError, (ONE, ONE, ONE, ONE), 0.0),
    (UpdateDirectionError, (ZERO, ONE, ZERO, ONE), 0.0),
    (UpdateDirectionError, (ZERO, ZERO, ZERO, ZERO), 0.0),
    (UpdateDirectionError, (NOTHING, NOTHING, NOTHING, NOTHING), 0.0),
    (UpdateDirectionError, (ZERO, ONE, ONE, ONE), math.inf),
    (UpdateDirectionError, (ONE, ONE, ZERO, ONE), 1.0),
    (UpdateDirectionError, (ONE, -ONE, ONE, ONE), math.nan),
    (lambda: UpdateDirectionError(eps=0.0), (ZERO, ZERO, ZERO, ZERO), math.nan),  # as Adam's step would be
    (CompressionRatio, (0, 0), 1.0),
    (CompressionRatio, (8, 0), math.inf),
    (CompressionRatio, (0, 8), 0.0),
    (CompressionRatio, (NOTHING.int(), NOTHING.int()), 1.0),
    (CodebookUsage, (NOTHING.byte(),), {"share_in_use": 0.0, "entropy_bits": 0.0}),
    (CodebookUsage, (ZERO.byte(),), {"share_in_use": 1 / 256, "entropy_bits": 0.0}),
    (CodebookUsage, (torch.arange(256, dtype=torch.uint8),), {"share_in_use": 1.0, "entropy_bits": 8.0}),
]


@pytest.mark.parametrize(("make", "arguments", "expected"), LIMITS)
def test_limits(make: Callable[..., Metric], arguments: tuple[Any, ...], expected: Any) -> None:
    metric = make()
    metric.update(*arguments)
    assert_agrees(metric.compute(), expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ReconstructionSQNR, math.inf),
        (RelativeReconstructionError, 0.0),
        (MaxReconstructionError, 0.0),
        (UpdateDirectionError, 0.0),
        (CompressionRatio, 1.0),
        (CodebookUsage, {"share_in_use": 0.0, "entropy_bits": 0.0}),
    ],
)
def test_before_any_update_nothing_is_lost(make: Callable[..., Metric], expected: Any) -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        value = make().compute()
    assert_agrees(value, expected)


def test_max_keeps_a_value_that_is_no_number() -> None:
    metric = MaxReconstructionError()
    metric.update(NAN, ONE)
    metric.update(ZERO, ONE)
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 0.5])
def test_eps_is_the_optimizers(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    m, v = torch.randn(100, generator=generator), torch.rand(100, generator=generator) ** 8
    metric = UpdateDirectionError(eps=eps)
    metric.update(m, v, m, v.sqrt().half() ** 2)  # small second moments become zero
    expected = update_direction_error(*map(float64, (m, v, m, v.sqrt().half() ** 2)), eps)
    assert_agrees(metric.compute(), expected)


def test_bytes_of_any_kind_of_int_are_added_exactly() -> None:
    metric = CompressionRatio()
    metric.update(2**52 + 1, np.int64(3))
    metric.update(torch.tensor([5, 6], dtype=torch.int32), torch.tensor(7, dtype=torch.uint8))
    assert metric.byte_counts.tolist() == [2**52 + 12, 10]


STATISTICS = torch.zeros(5, dtype=torch.float64)
REFUSED: list[tuple[Callable[..., Metric], str, tuple[Any, ...], str]] = [
    *(
        (metric, method, arguments, said)
        for metric in (ReconstructionSQNR, RelativeReconstructionError, MaxReconstructionError)
        for method, arguments, said in [
            ("update", (ONE, torch.ones(1, 3)), r"one shape, got \[3\], \[1, 3\]; pass an original with"),
            ("update", (ONE.int(), ONE), "real floats, got torch.int32, torch.float32; convert them"),
            ("update", (ONE, ONE + 0j), "real floats, got torch.float32, torch.complex64; convert them"),
            ("update_from_statistics", (STATISTICS[:4],), r"shape \[\.\.\., 5\], got torch.float64 of shape \[4\];"),
            ("update_from_statistics", (STATISTICS[0],), r"shape \[\.\.\., 5\], got torch.float64 of shape \[\];"),
            ("update_from_statistics", (STATISTICS.float(),), r"must be float64 .* got torch.float32 of shape \[5\];"),
        ]
    ),
    (UpdateDirectionError, "update", (ONE, ONE, ONE, ONE[:2]), r"one shape, got \[3\], \[3\], \[3\], \[2\];"),
    (UpdateDirectionError, "update", (ONE, ONE, ONE, ONE.byte()), "real floats, got .*torch.uint8; convert them"),
    (UpdateDirectionError, "update_from_sums", (STATISTICS[:3],), r"shape \[\.\.\., 2\], got .* of shape \[3\];"),
    (UpdateDirectionError, "update_from_sums", (STATISTICS[:2].float(),), "must be float64 .* got torch.float32"),
    (CompressionRatio, "update", (8, -1), "stored_bytes must not be negative, got -1; pass a size"),
    (
        CompressionRatio,
        "update",
        (torch.tensor([8, -2]), 1),
        "original_bytes must not be negative, got -2; pass a size",
    ),
    (CompressionRatio, "update", (8.5, 1), "original_bytes must count whole bytes, got 8.5; pass an int"),
    (
        CompressionRatio,
        "update",
        (8, torch.tensor(1.0)),
        "stored_bytes must count whole bytes, got torch.float32; pass",
    ),
    (CodebookUsage, "update", (ONE.int(),), "codes must be uint8, got torch.int32; pass what a codec"),
    (
        lambda: CodebookUsage(num_levels=15),
        "update",
        (torch.tensor([1, 15], dtype=torch.uint8),),
        "below num_levels=15, got 15; pass the length",
    ),
]


@pytest.mark.parametrize(("make", "method", "arguments", "said"), REFUSED)
def test_refused_before_anything_changes(
    make: Callable[..., Metric], method: str, arguments: tuple[Any, ...], said: str
) -> None:
    metric = make()
    before = {name: state.clone() for name, state in metric.metric_state.items()}
    with pytest.raises(ValueError, match=said):
        getattr(metric, method)(*arguments)
    for name, state in metric.metric_state.items():
        assert isinstance(state, Tensor)
        assert torch.equal(state, before[name])


@pytest.mark.parametrize("eps", [-1e-8, math.inf, math.nan])
def test_eps_that_no_optimizer_takes_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps must be finite and at least 0, got {eps}; pass"):
        UpdateDirectionError(eps=eps)


@pytest.mark.parametrize("num_levels", [1, 257, 16.0])
def test_num_levels_that_no_codebook_has_is_refused(num_levels: Any) -> None:
    with pytest.raises(ValueError, match=f"a whole number from 2 to 256, got {num_levels}; an 8-bit"):
        CodebookUsage(num_levels=num_levels)
