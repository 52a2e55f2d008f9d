"""A run that is resumed from a quantized checkpoint goes on as from a plain one: the small version of a benchmark.

It trains a GPT of 240 thousand parameters in float32 on Python's documentation, and compares losses with those of a
plain resume on the same batches (``benchmarks/resume.py``; docs/fidelity.md has the large version).
"""

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.promises import tensors

from q8lightning import QuantizedCheckpointIO

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from resume import Job, Run
from resuming.scenarios import SCENARIOS
from resuming.variants import PLAIN, VARIANTS, store

SETTINGS = replace(SCENARIOS["small"][1], context=32, schedule=300, checkpoints=(150,), steps=40)
NAMED = {variant.name: variant for variant in VARIANTS}
EXAMPLE = "linear uint8 second moments"

BOUNDS = {("precise", 1): 0.0, ("resume", 1): 0.0, ("compact", 1): 0.0}


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """A training that has kept its checkpoint, and the losses of a plain resume from it."""
    run = Run(SETTINGS, "small", seed=0, beta2=0.999)
    run.train()
    return run


def resumed(run: Run, name: str, restores: int = 1) -> dict[str, Any]:
    """Return the record of a resume."""
    return run.resume(Job(NAMED.get(name, PLAIN), 150, restores))


def test_a_plain_resume_is_the_same_run_to_the_bit(run: Run) -> None:
    """So every gap is the codecs', and no resume changes the checkpoint that the next one begins with."""
    assert resumed(run, "plain")["largest"] == 0


@pytest.mark.parametrize(("name", "restores"), BOUNDS)
def test_losses_stay_as_close_as_was_measured(run: Run, name: str, restores: int) -> None:
    found = resumed(run, name, restores)
    assert 0 < found["rms"] <= BOUNDS[name, restores]
    assert found["guarded"] == 0


def test_more_bits_are_closer(run: Run) -> None:
    gaps = [resumed(run, name)["rms"] for name in ("precise", "resume", "compact")]
    assert gaps == sorted(gaps)


def test_the_bounds_can_be_broken(run: Run) -> None:
    """By what nobody should do: linear codes for second moments, where small ones become zero."""
    example = resumed(run, EXAMPLE)
    assert example["rms"] > 3 * max(BOUNDS[name, 1] for name in ("precise", "resume", "compact"))
    assert example["bytes_a_parameter"] > 9


@pytest.mark.parametrize("name", ["resume", "compact", "precise"])
def test_what_is_resumed_from_is_what_a_file_brings_back(run: Run, name: str, tmp_path: Path) -> None:
    kept = run.checkpoints[150]
    QuantizedCheckpointIO(checkpoint=name).save_checkpoint(kept, tmp_path / "file.ckpt")
    from_file = torch.load(tmp_path / "file.ckpt", weights_only=True)
    stored = store(kept, NAMED[name])
    buffer = io.BytesIO()
    torch.save(stored.content, buffer)
    buffer.seek(0)
    from_memory = torch.load(buffer, weights_only=True)
    found = [dict(tensors(each)) for each in (stored.load(), from_file, from_memory)]
    original = dict(tensors(kept))
    for path, tensor in found[0].items():
        assert all(torch.equal(each[path], tensor) for each in found[1:]), path
    assert sum(not torch.equal(tensor, original[path]) for path, tensor in found[0].items()) > 20
