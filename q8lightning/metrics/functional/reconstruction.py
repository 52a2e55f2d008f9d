"""How far decoded tensors are from the originals, computed from both, or from statistics of a codec.

``statistics`` is ``[..., 5]`` float64, a row for each tensor. The order is that of ``ErrorStatistics`` in the
quantization, which the metrics must not import:

0. the sum of squared differences,
1. the sum of squares of the original,
2. the largest absolute difference,
3. the number of original elements that are zero,
4. the number of nonzero elements that became zero.

All sums are float64. NaN in either tensor makes every metric NaN.
"""

import torch
from torch import Tensor

from q8lightning.metrics.functional.checks import check_floats, check_sums
from q8lightning.system.ambient import neutral

STATISTICS = 5
"""The numbers that describe one tensor's loss."""


@neutral()
def squared_error_update(preds: Tensor, target: Tensor) -> Tensor:
    """Reduce a decoded tensor and its original, ``[*shape]`` floats each, to ``[2]`` float64.

    Returns:
        The sum of squared differences, and the sum of squares of ``target``; zeros for empty tensors.
    """
    check_floats(preds=preds, target=target)
    original = target.double()
    return torch.stack([(preds.double() - original).square().sum(), original.square().sum()])


def squared_error_from_statistics(statistics: Tensor) -> Tensor:
    """Return the sums of :func:`squared_error_update` from statistics, added up over all rows."""
    check_sums(statistics, STATISTICS, "statistics")
    return statistics[..., :2].reshape(-1, 2).sum(dim=0)


@neutral()
def max_error_update(preds: Tensor, target: Tensor) -> Tensor:
    """Return the largest absolute difference, ``[]`` float64 in the units of the tensors; 0 for empty ones."""
    check_floats(preds=preds, target=target)
    error = (preds.double() - target.double()).abs()
    return error.max() if error.numel() else error.new_zeros(())


def max_error_from_statistics(statistics: Tensor) -> Tensor:
    """Return the largest difference of all rows of statistics, ``[]`` float64; 0 if there are no rows."""
    check_sums(statistics, STATISTICS, "statistics")
    errors = statistics[..., 2]
    return errors.max() if errors.numel() else errors.new_zeros(())


def sqnr_compute(sums: Tensor) -> Tensor:
    """Return the signal-to-quantization-noise ratio in dB, ``[]`` float64, from :func:`squared_error_update`.

    Infinity if nothing was lost, also if the signal is zero; -infinity if only the signal is zero.
    """
    squared_error, squares = sums
    return torch.where(squared_error == 0, torch.inf, 10 * torch.log10(squares / squared_error))


def relative_error_compute(sums: Tensor) -> Tensor:
    """Return the root of error power over signal power, ``[]`` float64, from :func:`squared_error_update`.

    0 if nothing was lost, also if the signal is zero; infinity if only the signal is zero.
    """
    squared_error, squares = sums
    return torch.where(squared_error == 0, 0.0, torch.sqrt(squared_error / squares))


def reconstruction_sqnr(preds: Tensor, target: Tensor) -> Tensor:
    """Return the signal-to-quantization-noise ratio, ``10 log10(sum target² / sum (preds - target)²)``.

    Args:
        preds: ``[*shape]`` floats, the decoded values.
        target: ``[*shape]`` floats, the originals.

    Returns:
        ``[]`` float64 in dB; infinity if nothing was lost, -infinity if only the original is zero.

    Raises:
        ValueError: If the tensors are not real floats of one shape.

    Example:
        >>> reconstruction_sqnr(torch.tensor([1.0, -2.0, 2.1]), torch.tensor([1.0, -2.0, 2.0]))
        tensor(29.5424, dtype=torch.float64)
    """
    return sqnr_compute(squared_error_update(preds, target))


def relative_reconstruction_error(preds: Tensor, target: Tensor) -> Tensor:
    """Return ``sqrt(sum (preds - target)² / sum target²)``.

    Args:
        preds: ``[*shape]`` floats, the decoded values.
        target: ``[*shape]`` floats, the originals.

    Returns:
        ``[]`` float64, a ratio; 0 if nothing was lost, infinity if only the original is zero.

    Raises:
        ValueError: If the tensors are not real floats of one shape.

    Example:
        >>> relative_reconstruction_error(torch.tensor([1.0, -2.0, 2.1]), torch.tensor([1.0, -2.0, 2.0]))
        tensor(0.0333, dtype=torch.float64)
    """
    return relative_error_compute(squared_error_update(preds, target))


def max_reconstruction_error(preds: Tensor, target: Tensor) -> Tensor:
    """Return the largest absolute difference between ``preds`` and ``target``.

    Args:
        preds: ``[*shape]`` floats, the decoded values.
        target: ``[*shape]`` floats, the originals.

    Returns:
        ``[]`` float64 in the units of the tensors; 0 for empty ones.

    Raises:
        ValueError: If the tensors are not real floats of one shape.

    Example:
        >>> max_reconstruction_error(torch.tensor([1.0, -2.0, 2.25]), torch.tensor([1.0, -2.0, 2.0]))
        tensor(0.2500, dtype=torch.float64)
    """
    return max_error_update(preds, target)
