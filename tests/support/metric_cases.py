"""Every metric with its function, batches for it, and what it means, once more in float64 NumPy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from q8lightning import metrics
from q8lightning.metrics import functional
from support.oracle import Array, float64

Batch = tuple[Any, ...]
"""The arguments of one update."""

SHAPES = [(7,), (3, 5), (0,), (), (4, 0, 2), (2, 33, 3)]
"""One batch each: empty ones and a single number among them."""


@dataclass(frozen=True)
class Case:
    """A metric, and all that its tests need to know of it.

    Attributes:
        make: Returns a new metric; takes the keyword arguments of :class:`torchmetrics.Metric`.
        function: The same in one call.
        reference: The same in NumPy, from arrays of float64.
        batch: Makes the arguments of one update, for a shape, a dtype and a generator.
        takes_floats: Whether the dtype makes a difference.
    """

    make: Callable[..., Metric]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    batch: Callable[[tuple[int, ...], torch.dtype, torch.Generator], Batch]
    takes_floats: bool = True

    @property
    def name(self) -> str:
        return type(self.make()).__name__

    def batches(self, dtype: torch.dtype = torch.float32) -> list[Batch]:
        generator = torch.Generator().manual_seed(6)
        return [self.batch(shape, dtype, generator) for shape in SHAPES]

    def expected(self, batches: list[Batch]) -> Any:
        """Return the value of all batches together."""
        columns = zip(*batches, strict=True)
        return self.reference(*(np.concatenate([float64(x).reshape(-1) for x in column]) for column in columns))


def assert_agrees(value: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Compare a metric's value with NumPy's: some hundred roundings in float64 apart, and always float64."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_agrees(value[key], expected[key], tolerance)
        return
    assert isinstance(value, Tensor)
    assert value.dtype == torch.float64
    assert value.shape == ()
    np.testing.assert_allclose(float64(value.detach()), expected, rtol=tolerance)


def pair(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Batch:
    """A decoded tensor and its original; their squares are above the largest float16."""
    target = 300 * torch.randn(shape, generator=generator)
    return (target + torch.randn(shape, generator=generator)).to(dtype), target.to(dtype)


def moments(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Batch:
    exp_avg = torch.randn(shape, generator=generator)
    exp_avg_sq = torch.rand(shape, generator=generator) + 0.05
    decoded = (1.01 * exp_avg + 0.01, exp_avg_sq * (1 + 0.1 * torch.rand(shape, generator=generator)))
    return tuple(x.to(dtype) for x in (exp_avg, exp_avg_sq, *decoded))


def sizes(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Batch:
    original = torch.randint(1, 10**11, shape, generator=generator)  # sums are beyond float32
    return original, original // 3 + 1


def codes(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Batch:
    return (torch.randint(0, 13, shape, generator=generator, dtype=torch.uint8),)


def sqnr(preds: Array, target: Array) -> Any:
    return 20 * np.log10(np.linalg.norm(target) / np.linalg.norm(preds - target))


def relative_error(preds: Array, target: Array) -> Any:
    return np.linalg.norm(preds - target) / np.linalg.norm(target)


def max_error(preds: Array, target: Array) -> Any:
    return np.abs(preds - target).max()


def update_direction_error(m: Array, v: Array, decoded_m: Array, decoded_v: Array, eps: float = 1e-8) -> Any:
    return relative_error(decoded_m / (np.sqrt(decoded_v) + eps), m / (np.sqrt(v) + eps))


def ratio(original: Array, stored: Array) -> Any:
    return original.sum() / stored.sum()


def usage(levels: int) -> Callable[[Array], Any]:
    def reference(codes: Array) -> Any:
        occurring, counts = np.unique(codes, return_counts=True)
        share = counts / counts.sum()
        return {"share_in_use": len(occurring) / levels, "entropy_bits": (share * np.log2(1 / share)).sum()}

    return reference


CASES = [
    Case(metrics.ReconstructionSQNR, functional.reconstruction_sqnr, sqnr, pair),
    Case(metrics.RelativeReconstructionError, functional.relative_reconstruction_error, relative_error, pair),
    Case(metrics.MaxReconstructionError, functional.max_reconstruction_error, max_error, pair),
    Case(metrics.UpdateDirectionError, functional.update_direction_error, update_direction_error, moments),
    Case(metrics.CompressionRatio, functional.compression_ratio, ratio, sizes, takes_floats=False),
    Case(metrics.CodebookUsage, functional.codebook_usage, usage(256), codes, takes_floats=False),
    Case(
        lambda **options: metrics.CodebookUsage(num_levels=15, **options),
        lambda codes: functional.codebook_usage(codes, 15),
        usage(15),
        codes,
        takes_floats=False,
    ),
]
