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
from q8lightning.qat.writes.renormalized import renormalize_masters
from q8lightning.qat.writes.two_worlds import TwoWorlds

COMPARED = 3
"""Quantized steps of a stage after which the first values are compared with what they were before."""

EVERY = 50
"""And every so many steps after them."""


class Writes:
    """Watches the steps of a run.

    Args:
        quantizer: Whose weights. Its configuration says how many steps are followed before the first write. If a part
            of the model is compiled, no step is followed: writes are only found.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self._quantizer = quantizer
        self._worlds: TwoWorlds | None = None
        self._steps: Counter[str] = Counter()
        self._access = DataAccess()
        self._attach()

    def _attach(self) -> None:
        """Take over what the quantizer has selected."""
        self._places = self._quantizer.places
        self._handles = renormalize_masters(self._quantizer)
        if compiled_modules(self._quantizer.module):
            self._worlds = None
        elif self._worlds is None:
            self._worlds = TwoWorlds(self._quantizer)

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
            if self._worlds is not None:
                new = (each for each in self._quantizer.weights if id(each.parameter) not in before)
                self._worlds.refuse_made((each.names[0], each.parameter) for each in new)
        count = self._steps[stage]
        self._quantizer.fingerprints.of_all = count < COMPARED or count % EVERY == 0

    @contextmanager
    def step(self, stage: str) -> Iterator[None]:
        """Surround a step of the user's, in which weights are engaged.

        Raises:
            LostWriteError: If somebody writes to a weight, and the write cannot reach the master.
        """
        worlds, count = self._worlds, self._steps[stage]
        self._steps[stage] += self._quantizer.engaged
        unwatched = count >= self._quantizer.config.follow_steps
        if worlds is None or not self._quantizer.engaged or (unwatched and not worlds.writes):
            yield
            return
        worlds.begin()
        self._quantizer.followed = True
        try:
            with worlds, fast_paths(worlds, self._quantizer.module):
                yield
            worlds.end()
            worlds.refuse_made(self._quantizer.replaced())
        finally:
            self._quantizer.followed = False
            if worlds.compiled:
                self._worlds = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Surround what belongs to no step, such as backward: nothing is followed."""
        worlds = self._worlds
        if worlds is None:
            yield
            return
        outer, worlds.paused = worlds.paused, True
        try:
            yield
        finally:
            worlds.paused = outer
