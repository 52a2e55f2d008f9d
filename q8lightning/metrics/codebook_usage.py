"""How well codes use the levels of their codebook."""

from typing import Any

from torch import Tensor

from q8lightning.metrics.base import QuantizationMetric
from q8lightning.metrics.functional.codebook_usage import (
    check_num_levels,
    codebook_usage_compute,
    codebook_usage_update,
)


class CodebookUsage(QuantizationMetric):
    r"""The share of a codebook's levels that occur, and the entropy of the codes.

    .. math:: -\sum_k p_k \log_2 p_k

    where p_k is the share of codes that are k. An entropy far below log2 of the levels says that fewer bits might do.

    ``forward`` and ``update`` take ``codes``, ``[*shape]`` uint8, and wait for those on a GPU. ``compute`` returns a
    dict: ``share_in_use``, ``[]`` float64 from 0 to 1, and ``entropy_bits``, ``[]`` float64 in bits a code, from 0 to
    log2(num_levels). Both are 0 if there are no codes.

    Args:
        num_levels: How many levels the codebook has, 2 to 256.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_levels`` is not a whole number from 2 to 256.

    Example:
        >>> import torch
        >>> metric = CodebookUsage(num_levels=4)
        >>> metric(torch.tensor([0, 0, 1, 2], dtype=torch.uint8))
        {'share_in_use': tensor(0.7500, dtype=torch.float64), 'entropy_bits': tensor(1.5000, dtype=torch.float64)}
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0

    level_counts: Tensor

    def __init__(self, num_levels: int = 256, **kwargs: Any) -> None:
        check_num_levels(num_levels)
        super().__init__(**kwargs)
        self.num_levels = num_levels
        self._add_zeros("level_counts", num_levels)

    def update(self, codes: Tensor) -> None:
        """Count codes, ``[*shape]`` uint8. ValueError for another dtype, and for codes of ``num_levels`` or more."""
        self.level_counts = self.level_counts + codebook_usage_update(codes, self.num_levels)

    def compute(self) -> dict[str, Tensor]:
        """Return ``share_in_use`` and ``entropy_bits``, ``[]`` float64 each."""
        return codebook_usage_compute(self.level_counts)
