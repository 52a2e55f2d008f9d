"""What the checkpoint suite shares: every test of a promise of both presets takes ``preset``."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from steps import Steps, listening

PRESETS = ("resume", "compact")


@pytest.fixture(params=PRESETS, scope="module")
def preset(request: pytest.FixtureRequest) -> str:
    """The name of each preset in turn."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors of this size, above all where others work on the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ADVICE = (
    "does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "Be aware that when using `ckpt_path`",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "Using ModelCheckpoint with manual optimization",
    "this fit will run with no optimizer",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)
"""What Lightning says about runs as short as these, and torch about Lightning."""


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> Iterator[None]:
    """Start every test at the same random numbers and without advice that is not meant for tests."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        for advice in ADVICE:
            warnings.filterwarnings("ignore", message=f".*{advice}")
        yield


@pytest.fixture
def steps() -> Iterator[Steps]:
    """What saves announce during the test."""
    with listening() as listener:
        yield listener
