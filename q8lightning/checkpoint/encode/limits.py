"""Find which tensors may lose more than the policy allows."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.optimizer_states import FIRST_MOMENTS, SECOND_MOMENTS
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.encode import EncodedBuffer, is_sampled, measure
from q8lightning.system.ambient import neutral
from q8lightning.system.workers import share_out

MARGIN = 0.01
"""How far an error may move, relative to a limit, when the residual stage rounds the values.

The residual stage loses about a 250th of what the first stage loses.
"""


class Limits(NamedTuple):
    """Which members of a device each limit of the policy applies to.

    Attributes:
        second_moments: ``[any]`` int64, the places of second moments. None of their elements may become zero.
        by_sqnr: ``[any]`` int64, the places of members that ``min_sqnr_db`` applies to.
        alone: ``[any]`` int64, the places of first moments of no pair. The optimizer steps by them, so that
            ``max_update_direction_error`` applies to their own error.
        policy: Its limits count, not its rules.
    """

    second_moments: Tensor
    by_sqnr: Tensor
    alone: Tensor
    policy: CheckpointPolicy

    @classmethod
    def of(cls, kinds: Sequence[str], in_pairs: frozenset[int], policy: CheckpointPolicy) -> "Limits":
        """Sort members by the limit that applies to them.

        Args:
            kinds: The kind of each member.
            in_pairs: The places of members that are moments of a pair. ``max_update_direction_error`` applies to what
                they give together.
            policy: Its limits count, not its rules.
        """
        no_limit = policy.max_update_direction_error is None
        by_direction = frozenset[int]() if no_limit else in_pairs
        second = [i for i, kind in enumerate(kinds) if kind in SECOND_MOMENTS]
        others = [i for i, kind in enumerate(kinds) if kind not in SECOND_MOMENTS and i not in by_direction]
        alone = [] if no_limit else [i for i in others if kinds[i] in FIRST_MOMENTS]
        by_sqnr = [i for i in others if i not in alone]
        one, two, three = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (second, by_sqnr, alone))
        return cls(one, two, three, policy)

    @property
    def of_errors(self) -> tuple[tuple[Tensor, float], ...]:
        """The limits of members' own relative errors: places, and the largest error."""
        sqnr, direction = self.policy.min_sqnr_db, self.policy.max_update_direction_error
        by_sqnr = [] if sqnr is None else [(self.by_sqnr, 10 ** (-sqnr / 20))]
        return (*by_sqnr, *([] if direction is None else [(self.alone, direction)]))

    @neutral()
    def measure_in_whole(self, values: Sequence[Tensor], codecs: Sequence[Codec], packed: EncodedBuffer) -> None:
        """Measure all of a member where a sample cannot show that it keeps the limits.

        Only the CPU measures samples. Most members need nothing more, because their scales bound what they lose.

        Args:
            values: The elements of each member as they lie in memory.
            codecs: The codec of each.
            packed: The encoded members. Their statistics are updated.
        """
        assert packed.statistics is not None
        data = packed.data
        sampled = [is_sampled(each, codec) for each, codec in zip(values, codecs, strict=True)]
        unsure = [i for i in self.second_moments.tolist() if sampled[i] and not codecs[i].keeps_nonzero]
        for places, limit in self.of_errors:
            for i in places.tolist():
                if not sampled[i]:
                    continue
                parts = codecs[i].split(data[i], values[i].numel())
                if not codecs[i].relative_error_bound(values[i], parts) <= limit * (1 - MARGIN):
                    unsure.append(i)
        jobs = [partial(measure, values[i], codecs[i], data[i]) for i in unsure]
        for i, statistics in zip(unsure, share_out(jobs, [values[i].nbytes for i in unsure]), strict=True):
            packed.statistics[i] = statistics

    def beyond(self, statistics: Tensor, directions: Tensor) -> tuple[list[int], list[int]]:
        """Return the places of the members and of the pairs that may lose more than the policy allows.

        Args:
            statistics: ``[members, 5]`` float64 on the CPU, what each member loses.
            directions: ``[pairs, 2]`` float64 on the CPU, the sums of :func:`update_direction_sums`.
        """
        limit = self.policy.max_update_direction_error
        members: list[int] = self.second_moments[statistics[self.second_moments, 4] != 0].tolist()
        for places, largest in self.of_errors:
            members += places[_beyond(statistics[places, :2], largest * (1 - MARGIN))].tolist()
        # Half the limit: if one moment alone exceeds the limit, both together hardly lose less than it.
        pairs: list[int] = [] if limit is None else _beyond(directions, limit / 2).nonzero().view(-1).tolist()
        return members, pairs


def _beyond(sums: Tensor, limit: float) -> Tensor:
    """Tell which relative errors may exceed ``limit``, from sums of squared errors and of squares."""
    return sums[:, 0] > limit**2 * (1 - 1e-9) * sums[:, 1]
