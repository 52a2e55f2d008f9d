"""Find which tensors may lose more than the policy allows."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.layout.optimizer_states import FIRST_MOMENTS, SECOND_MOMENTS
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.encode import EncodedBuffer, is_sampled, measure
from q8lightning.system.ambient import neutral
from q8lightning.system.workers import share_out

MARGIN = 0.01
"""How far an error may move, relative to a limit, when the finer codec rounds the values.

The finer codec loses a 250th of what ``linear`` loses, and a 17th of what it loses with a residual of 4 bits. It loses
that independently, so the error moves by half the square of that share.
"""


class Limits(NamedTuple):
    """Which members of a device each limit of the policy applies to.

    Attributes:
        second_moments: ``[any]`` int64, the places of second moments. None of their elements may become zero.
        alone: ``[any]`` int64, the places of members that are judged by themselves.
        allowed: ``[any]`` float64, the largest relative error of each of these.
        policy: Its limits count, not its rules.
    """

    second_moments: Tensor
    alone: Tensor
    allowed: Tensor
    policy: CheckpointPolicy

    @classmethod
    def of(cls, kinds: Sequence[str], in_pairs: frozenset[int], policy: CheckpointPolicy) -> "Limits":
        """Sort members by the limit that applies to them.

        Args:
            kinds: The kind of each member.
            in_pairs: The places of members that are moments of a pair. ``max_update_direction_error`` applies to them.
            policy: Its limits count, not its rules.
        """
        second = [i for i, kind in enumerate(kinds) if kind in SECOND_MOMENTS]
        allowed = {
            i: limit
            for i, kind in enumerate(kinds)
            if not (i in in_pairs and policy.max_update_direction_error is not None)
            and (limit := allowed_alone(kind, policy)) is not None
        }
        first, alone = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (second, [*allowed]))
        return cls(first, alone, torch.tensor([*allowed.values()], dtype=torch.float64, device="cpu"), policy)

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
        for i, limit in zip(self.alone.tolist(), self.allowed.tolist(), strict=True):
            if not sampled[i]:
                continue
            parts = codecs[i].layout.views(data[i], values[i].numel())  # scales say enough; codes stay packed
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
        members += self.alone[_beyond(statistics[self.alone, :2], self.allowed * (1 - MARGIN))].tolist()
        # Half the limit: if one moment alone exceeds the limit, both together hardly lose less than it.
        pairs: list[int] = [] if limit is None else _beyond(directions, limit / 2).nonzero().view(-1).tolist()
        return members, pairs


def allowed_alone(kind: str, policy: CheckpointPolicy) -> float | None:
    """Return the largest relative error of a tensor that is judged by itself; None if there is no limit.

    A first moment without a second, such as SGD's momentum, is the direction of the update.

    Args:
        kind: See :class:`~q8lightning.checkpoint.report.TensorLoss`.
        policy: Its limits count, not its rules.
    """
    if kind in SECOND_MOMENTS:
        return None
    if kind in FIRST_MOMENTS and policy.max_update_direction_error is not None:
        return policy.max_update_direction_error
    return None if policy.min_sqnr_db is None else 10 ** (-policy.min_sqnr_db / 20)


def _beyond(sums: Tensor, limit: Tensor | float) -> Tensor:
    """Tell which relative errors may exceed ``limit``, from sums of squared errors and of squares."""
    return sums[:, 0] > limit**2 * (1 - 1e-9) * sums[:, 1]
