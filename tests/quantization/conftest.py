"""What the suites of kernels share."""

import pytest
from support.devices import KERNELS


@pytest.fixture(params=KERNELS)
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run."""
    name: str = request.param
    return name
