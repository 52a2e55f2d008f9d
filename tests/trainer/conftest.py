"""What suites share that save without a Trainer."""

import pytest

from q8lightning import QuantizedCheckpointIO


@pytest.fixture
def io() -> QuantizedCheckpointIO:
    """A CheckpointIO that saves in the background."""
    return QuantizedCheckpointIO(async_save=True)
