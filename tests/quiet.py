"""The fixture of suites that run Trainers: the same random numbers, and no advice that is not meant for tests."""

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_and_quiet() -> Iterator[None]:
    """Start every test at the same random numbers and without advice that is not meant for tests."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
