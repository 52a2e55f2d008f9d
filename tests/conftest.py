"""What all suites share: the same start for every test, both presets, every way to encode, the steps of saves."""

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from support.audit import listening
from support.devices import KERNELS
from support.disk import Disk
from support.schemes import SCHEMES
from support.steps import Steps, announced

from q8lightning.quantization.backends.choose import launching

collect_ignore = [] if find_spec("rich") else ["cli"]
"""The command line is an extra; where it is not installed, the rest is tested."""

PRESETS = ("resume", "compact")

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


def pytest_configure() -> None:
    """Tests are small: handing their work to a second thread costs up to twenty times what it takes."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> Iterator[None]:
    """Start every test at the same random numbers and without advice that is not meant for tests."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        for advice in ADVICE:
            warnings.filterwarnings("ignore", message=f".*{advice}")
        yield


@pytest.fixture(params=PRESETS, scope="module")
def preset(request: pytest.FixtureRequest) -> str:
    """The name of each preset in turn; every test of a promise of both takes it."""
    name: str = request.param
    return name


@pytest.fixture(params=KERNELS)
def launch_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are that go to the kernels for many tensors in few launches; on the CPU those are interpreted."""
    device: str = request.param
    if device == "cuda":
        yield device
    else:
        with launching(True):
            yield device


@pytest.fixture
def steps() -> Iterator[Steps]:
    """What saves announce during the test."""
    with announced() as steps:
        yield steps


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """What the disk is asked for during the test."""
    disk = Disk(monkeypatch)
    with listening(disk.hear):
        yield disk


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a ``scheme`` over all, for a ``codebook_scheme`` over those that are a codebook and no
    more, and for a ``checkpoint_scheme`` over the idempotent ones."""
    for argument, schemes in (
        ("scheme", SCHEMES),
        ("codebook_scheme", [scheme for scheme in SCHEMES if scheme.family == "codebook"]),
        ("checkpoint_scheme", [scheme for scheme in SCHEMES if scheme.for_checkpoints]),
    ):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, schemes, ids=lambda scheme: scheme.name)
