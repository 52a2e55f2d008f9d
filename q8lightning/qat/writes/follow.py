"""When writes to quantized weights are followed: in the first steps, and from the first write on in every step.

Following costs a few microseconds for every call of torch. In steps that are not followed a write is found when the
weights are released, and stops the training (:class:`~q8lightning.qat.lost_write.LostWriteError`).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from q8lightning.qat.compiled import compiled_modules
from q8lightning.qat.fake_quantizer import FakeQuantizer
from q8lightning.qat.writes.data_access import DataAccess
from q8lightning.qat.writes.fast_paths import fast_paths
from q8lightning.qat.writes.max_norm import renormalize_masters
from q8lightning.qat.writes.shadow_mode import ShadowMode

COMPARED = 3
"""Quantized steps of a stage after which the first values are compared with what they were before."""

EVERY = 50
"""And every so many steps after them."""


class WriteFollower:
    """Watches the steps of a run.

    Args:
        quantizer: Whose weights. Its configuration says how many steps are followed before the first write. If a part
            of the model is compiled, no step is followed: writes are only found.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self._quantizer = quantizer
        self._mode: ShadowMode | None = None
        self._steps: Counter[str] = Counter()
        self._access = DataAccess()
        self._attach()

    def _attach(self) -> None:
        """Take over what the quantizer has selected."""
        self._places = self._quantizer.places
        self._handles = renormalize_masters(self._quantizer)
        if compiled_modules(self._quantizer.module):
            self._mode = None
        elif self._mode is None:
            self._mode = ShadowMode(self._quantizer)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def close(self) -> None:
        """Take all hooks off the model."""
        self._detach()
        self._access.close()

    def begin(self, stage: str) -> None:
        """Follow the quantizer, and decide whether the weights are compared when they are released.

        Raises:
            LostWriteError: If a parameter that is selected now was made, inside a step, of quantized values.
        """
        if self._places is not self._quantizer.places:
            before = self._places
            self._detach()
            self._attach()
            if self._mode is not None:
                new = (each for each in self._quantizer.weights if id(each.parameter) not in before)
                self._mode.refuse_made((each.names[0], each.parameter) for each in new)
        count = self._steps[stage]
        self._quantizer.fingerprints.of_all = count < COMPARED or count % EVERY == 0

    @contextmanager
    def step(self, stage: str) -> Iterator[None]:
        """Surround a step of the user's, in which weights are engaged.

        Raises:
            LostWriteError: If somebody writes to a weight, and the write cannot reach the master.
        """
        mode, count = self._mode, self._steps[stage]
        self._steps[stage] += self._quantizer.engaged
        unwatched = count >= self._quantizer.config.follow_steps
        if mode is None or not self._quantizer.engaged or (unwatched and not mode.writes):
            yield
            return
        mode.begin()
        self._quantizer.followed = True
        try:
            with mode, fast_paths(mode, self._quantizer.module):
                yield
            mode.end()
            mode.refuse_made(self._quantizer.replaced())
        finally:
            self._quantizer.followed = False
            if mode.compiled:
                self._mode = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Surround what belongs to no step, such as backward: nothing is followed."""
        mode = self._mode
        if mode is None:
            yield
            return
        outer, mode.paused = mode.paused, True
        try:
            yield
        finally:
            mode.paused = outer
