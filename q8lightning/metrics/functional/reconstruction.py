"""How far a decoded tensor is from the original: from the two tensors, or from statistics that a codec returned.

``statistics`` is ``[..., 5]`` float64, one row a tensor, in this order (that of the quantization's ``ErrorStatistics``,
which this package must not import):

0. the sum of squared differences,
1. the sum of squares of the original,
2. the largest absolute difference,
3. how many original elements are zero,
4. how many nonzero elements became zero.

All sums are float64, whatever the dtype of the tensors. NaN in either tensor makes every metric NaN.
"""

import torch
from torch import Tensor

from q8lightning.metrics.functional.checks import check_floats, check_sums
from q8lightning.system.ambient import neutral

STATISTICS = 5
"""How many numbers describe one tensor's loss."""


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
    """Return what :func:`squared_error_update` returns, added up over all rows of ``statistics``."""
    check_sums(statistics, STATISTICS, "statistics")
    return statistics[..., :2].reshape(-1, 2).sum(dim=0)


@neutral()
def max_error_update(preds: Tensor, target: Tensor) -> Tensor:
    """Return the largest absolute difference, ``[]`` float64 in the units of the tensors; 0 for empty ones."""
    check_floats(preds=preds, target=target)
    error = (preds.double() - target.double()).abs()
    return error.max() if error.numel() else error.new_zeros(())


def max_error_from_statistics(statistics: Tensor) -> Tensor:
    """Return the largest difference of all rows of ``statistics``, ``[]`` float64; 0 for no rows."""
    check_sums(statistics, STATISTICS, "statistics")
    errors = statistics[..., 2]
    return errors.max() if errors.numel() else errors.new_zeros(())


def sqnr_compute(sums: Tensor) -> Tensor:
    """Return the signal-to-quantization-noise ratio in dB, ``[]`` float64, from :func:`squared_error_update`.

    Infinity where nothing was lost, also of a signal that is zero; -infinity where a zero signal became something else.
    """
    squared_error, squares = sums
    return torch.where(squared_error == 0, torch.inf, 10 * torch.log10(squares / squared_error))


def relative_error_compute(sums: Tensor) -> Tensor:
    """Return the root of error power over signal power, ``[]`` float64, from :func:`squared_error_update`.

    0 where nothing was lost, also of a signal that is zero; infinity where a zero signal became something else.
    """
    squared_error, squares = sums
    return torch.where(squared_error == 0, 0.0, torch.sqrt(squared_error / squares))


def reconstruction_sqnr(preds: Tensor, target: Tensor) -> Tensor:
    """Return the signal-to-quantization-noise ratio, ``10 log10(sum target² / sum (preds - target)²)``.

    Args:
        preds: ``[*shape]`` floats, what was decoded.
        target: ``[*shape]`` floats, the original.

    Returns:
        ``[]`` float64 in dB; infinity where nothing was lost, -infinity where only the original is zero.

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
        preds: ``[*shape]`` floats, what was decoded.
        target: ``[*shape]`` floats, the original.

    Returns:
        ``[]`` float64, a ratio; 0 where nothing was lost, infinity where only the original is zero.

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
        preds: ``[*shape]`` floats, what was decoded.
        target: ``[*shape]`` floats, the original.

    Returns:
        ``[]`` float64 in the units of the tensors; 0 for empty ones.

    Raises:
        ValueError: If the tensors are not real floats of one shape.

    Example:
        >>> max_reconstruction_error(torch.tensor([1.0, -2.0, 2.25]), torch.tensor([1.0, -2.0, 2.0]))
        tensor(0.2500, dtype=torch.float64)
    """
    return max_error_update(preds, target)
