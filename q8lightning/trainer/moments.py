"""Count the moments of a fit between which training may change what was saved."""


class Moments:
    """Names the moments of a fit, between which other code may change the state; asked by the CheckpointIO."""

    def __init__(self) -> None:
        self._count = 0
        self._fitting = False

    def __call__(self) -> int | None:
        """Return the number of the moment; None outside of a fit, where no hook tells the end of a moment."""
        return self._count if self._fitting else None

    def begin(self) -> None:
        """Begin a fit, whose hooks call :meth:`end_one`."""
        self._fitting = True

    def end_one(self) -> None:
        """End a moment."""
        self._count += 1

    def end(self) -> None:
        """End the fit: from now on the state may change without a hook."""
        self._fitting = False
