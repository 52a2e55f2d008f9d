"""Decide in which steps writes to quantized weights are followed.

They are followed in the first steps, and from the first write on in every step, since following costs a few
microseconds for each call of torch. In a step that is not followed, a write is found when the weights are released, and
stops the training (:class:`~q8lightning.qat.lost_write.LostWriteError`).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from q8lightning.qat.compiled import compiled_modules
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.qat.writes.data_access import DataAccess
from q8lightning.qat.writes.fast_paths import fast_paths
from q8lightning.qat.writes.max_norm import renormalize_masters
from q8lightning.qat.writes.shadow_mode import ShadowMode

COMPARED_FIRST = 3
"""In so many first steps of a stage the bits of all weights are compared when they are released."""

COMPARED_EVERY = 50
"""After the first steps, the bits are compared once in so many steps."""


class WriteFollower:
    """Follows the writes of a run's steps, or finds them when a step is over.

    Args:
        quantizer: Has the weights, and in its configuration how many steps are followed before the first write. If a
            part of the model is compiled, or a weight is distributed, no step is followed.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self._quantizer = quantizer
        self._mode: ShadowMode | None = None
        self._steps: Counter[str] = Counter()
        self._access = DataAccess()
        self._attach()

    def _attach(self) -> None:
        """Get ready for the quantizer's present selection."""
        self._places = self._quantizer.places
        self._handles = renormalize_masters(self._quantizer)
        if self._quantizer.distributed or compiled_modules(self._quantizer.module):
            self._mode = None
        elif self._mode is None:
            self._mode = ShadowMode(self._quantizer)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._detach()
        self._access.close()

    def begin(self, stage: str) -> None:
        """Prepare for a step: notice a new selection, and decide whether the bits of weights are compared after it.

        Args:
            stage: ``"training"`` or ``"evaluation"``, whose steps are counted apart.

        Raises:
            LostWriteError: If a newly selected parameter was computed from quantized values, inside a step.
        """
        if self._places is not self._quantizer.places:
            before = self._places
            self._detach()
            self._attach()
            if self._mode is not None:
                new = (each for each in self._quantizer.weights if id(each.parameter) not in before)
                self._mode.refuse_computed((each.names[0], each.parameter) for each in new)
        count = self._steps[stage]
        self._quantizer.fingerprints.compare_all = count < COMPARED_FIRST or count % COMPARED_EVERY == 0

    @contextmanager
    def step(self, stage: str) -> Iterator[None]:
        """Surround the user's code of a step, and follow its writes where that is due.

        Args:
            stage: As for :meth:`begin`.

        Raises:
            LostWriteError: If the code writes to a weight, and the write cannot reach the master.
        """
        mode, count = self._mode, self._steps[stage]
        self._steps[stage] += self._quantizer.engaged
        past_first = count >= self._quantizer.config.follow_steps
        if mode is None or not self._quantizer.engaged or (past_first and not mode.writes):
            yield
            return
        mode.begin()
        self._quantizer.followed = True
        try:
            with mode, fast_paths(mode, self._quantizer.module):
                yield
            mode.end()
            mode.refuse_computed(self._quantizer.replaced())
        finally:
            self._quantizer.followed = False
            if mode.compiled:
                self._mode = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Surround what is not the user's code, such as backward: nothing is followed."""
        mode = self._mode
        if mode is None:
            yield
            return
        outer, mode.paused = mode.paused, True
        try:
            yield
        finally:
            mode.paused = outer
