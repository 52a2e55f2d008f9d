"""Fixtures of the suites of kernels."""

from typing import Any

import pytest
from support.devices import KERNELS


@pytest.fixture(params=KERNELS)
def device(request: pytest.FixtureRequest) -> str:
    """A device on which kernels run."""
    name: str = request.param
    return name


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that are launched during the test, in order.

    Triton's interpreter has no hook that tells of a launch; compiled kernels and interpreted ones share this method.
    """
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed")
    kernels: list[Any] = []
    real = jit.KernelInterface.__getitem__

    def launch(kernel: Any, grid: Any) -> Any:
        kernels.append(kernel)
        return real(kernel, grid)

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", launch)
    return kernels
