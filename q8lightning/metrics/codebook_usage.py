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
    r"""Share of a codebook's levels that occur, and the entropy of the codes.

    .. math:: -\sum_k p_k \log_2 p_k

    with the share of the codes that are k. An entropy far below log2 of the levels says that fewer bits might do.
    ``forward`` and ``update`` take ``codes``, ``[*shape]`` uint8 (those on a GPU are waited for). ``compute`` returns a
    dict: ``share_in_use``, ``[]`` float64 from 0 to 1, and ``entropy_bits``, ``[]`` float64 in bits a code, from 0 to
    log2(num_levels). Both are 0 where there are no codes.

    Args:
        num_levels: How many levels the codebook has, 2 to 256.
        kwargs: Those of :class:`torchmetrics.Metric`.

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
        """Count ``[*shape]`` uint8; ValueError if they are not, or one is not below ``num_levels``."""
        self.level_counts = self.level_counts + codebook_usage_update(codes, self.num_levels)

    def compute(self) -> dict[str, Tensor]:
        """Return ``share_in_use`` and ``entropy_bits``, ``[]`` float64 each."""
        return codebook_usage_compute(self.level_counts)
