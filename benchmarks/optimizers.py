"""What a resume costs with every optimizer: the gap of the loss, and what the presets do with each state.

    python benchmarks/optimizers.py                        # all of them; about a minute on an idle CPU
    python benchmarks/optimizers.py --only Muon Lion
    python benchmarks/optimizers.py --markdown             # the table of docs/optimizers.md

A GPT of 110,000 parameters reads Python's own help. After 60 steps its state is saved under each preset and loaded,
and training goes on for 20 steps on the same data. The gap is the root mean square of the differences between these
losses and those of a resume from a plain checkpoint. On a CPU that has no noise: a plain resume goes on as if nothing
had happened, which the script checks. ``states`` is the gap under ``resume`` where weights are stored as they are, so
it is what the optimizer's states cost alone.

LBFGS and Rprop need the same gradient again and again, so they see one batch. SparseAdam trains an embedding of pairs
of characters, which has sparse gradients. Muon takes the matrices of the blocks, and AdamW all the rest.
"""

import argparse
import copy
import math
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from q8lightning import CheckpointPolicy, QuantizedCheckpointIO, Rule, keep_encoded
from q8lightning.checkpoint.layout.optimizer_states import EXACT, state_of
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.checkpoint.tree import PATHS, leaves
from q8lightning.tools.tensors import Value, codec_of, decoded_bytes

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]
from char_lm import GPT, PythonDocs  # noqa: E402
from support.optimizers import OPTIMIZERS  # noqa: E402

STEPS, AFTER, BATCH, CONTEXT = 60, 20, 6, 48
ONE_BATCH = {"LBFGS": 8, "Rprop": 25}
"""Optimizers that see one batch, and their steps before the save: more would leave no loss to compare."""

State = dict[str, Any]


class Pairs(nn.Module):
    """Predicts a character from the two before it, with an embedding of pairs whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2048, 64, sparse=True)
        self.register_buffer("head", torch.randn(128, 64) / 8)

    def forward(self, tokens: Tensor) -> Tensor:
        before = F.pad(tokens, (1, 0))[:, :-1]
        return F.linear(self.embedding((16 * tokens + before % 16) % 2048), self.head)


class Run:
    """A model and its optimizers, from the same random numbers every time."""

    def __init__(self, name: str, data: list[Tensor]) -> None:
        torch.manual_seed(0)
        self.name, self.data = name, data
        self.model = Pairs() if name == "SparseAdam" else GPT(128, CONTEXT, 64, 2, 4)
        parameters = dict(self.model.named_parameters())
        if name == "Muon":
            inner = {key for key, each in parameters.items() if key.startswith("blocks") and each.ndim == 2}
            rest = [each for key, each in parameters.items() if key not in inner]
            self.optimizers = [OPTIMIZERS[name]([parameters[key] for key in inner]), OPTIMIZERS["AdamW"](rest)]
        else:
            self.optimizers = [OPTIMIZERS[name](parameters.values())]

    @property
    def state(self) -> State:
        """A copy of what Lightning would save."""
        states = [each.state_dict() for each in self.optimizers]
        return copy.deepcopy({"state_dict": self.model.state_dict(), "optimizer_states": states})

    def load(self, state: State) -> "Run":
        state = copy.deepcopy(state)  # optimizers keep the tensors that they load, and change them
        self.model.load_state_dict(state["state_dict"])
        for optimizer, each in zip(self.optimizers, state["optimizer_states"], strict=True):
            optimizer.load_state_dict(each)
        return self

    def train(self, first: int, steps: int) -> list[float]:
        """Train on these batches; return the losses before each step."""
        losses = []
        for step in range(first, first + steps):
            batch = self.data[0 if self.name in ONE_BATCH else step]

            def closure(batch: Tensor = batch) -> Tensor:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                return loss

            losses.append(closure().item())
            if self.name == "LBFGS":
                self.optimizers[0].step(closure)
            else:
                for optimizer in self.optimizers:
                    optimizer.step()
        return losses


def saved(state: State, policy: CheckpointPolicy, path: Path) -> tuple[State, State, list[str]]:
    """Save and load; return what loads, the same with what is encoded as it is, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        QuantizedCheckpointIO(checkpoint=policy).save_checkpoint(state, path)
    loaded = torch.load(path, weights_only=True)
    with keep_encoded():
        encoded = torch.load(path, weights_only=True)
    return loaded, encoded, [str(each.message) for each in caught]


def rms(one: list[float], two: list[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) / len(one))


def states_in(encoded: State) -> dict[str, str]:
    """Return how each large floating state is stored, by its key; all ways, if there are several."""
    found: dict[str, dict[str, None]] = {}
    for keys, value in leaves(encoded["optimizer_states"], PATHS):
        if isinstance(value, Value) and value.dtype.is_floating_point and decoded_bytes(value) >= 4 * 4096:
            found.setdefault(str(keys[3]), {})[codec_of(value) or "as it is"] = None
    return {key: ", ".join(ways) for key, ways in found.items()}


def measure(name: str, data: list[Tensor], path: Path) -> dict[str, Any]:
    """Return the gaps of one optimizer, and how its states are stored."""
    steps = ONE_BATCH.get(name, STEPS)
    run = Run(name, data)
    run.train(0, steps)
    state = run.state
    plain = Run(name, data).load(state).train(steps, AFTER)
    assert plain == run.train(steps, AFTER), "a plain resume goes on as if nothing had happened"
    gaps, stored, said = {}, {}, []
    exact = CheckpointPolicy([Rule("state_dict.*"), *PRESETS["resume"].rules])
    for column, policy in {**PRESETS, "states": exact}.items():
        loaded, encoded, messages = saved(state, policy, path)
        said += [f"{column}: {text}" for text in messages]
        gaps[column] = rms(Run(name, data).load(loaded).train(steps, AFTER), plain)
        stored[column] = states_in(encoded)
    return {"gaps": gaps, "stored": stored, "said": said, "loss": (plain[0], plain[-1])}


def rows_of(name: str, found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each state; the first has the gaps."""
    columns = [*PRESETS, "states"]
    gaps = [f"{found['gaps'][column]:.1e}" for column in columns]
    states = found["stored"]["resume"] or {"none": ""}
    for i, (key, way) in enumerate(states.items()):
        state = state_of(key)
        why = state.why if "as it is" in way and (state.holds == EXACT or state.unless) else state.holds
        yield (name if i == 0 else "", key, way, why, *(gaps if i == 0 else [""] * len(gaps)))


def where() -> str:
    """Return the machine, the versions and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(": ")[2] if names else platform.processor()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit.stdout.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    text = PythonDocs(CONTEXT, BATCH).train
    data = [torch.stack([text[i * BATCH + j] for j in range(BATCH)]) for i in range(STEPS + AFTER)]
    console = Console(width=180)
    heads = ("optimizer", "state", "under resume", "what it is, or why not", *PRESETS, "states")
    place = where()  # now: a commit may come while this runs
    table = Table(*heads, title=place)
    if options.markdown:
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            found = measure(name, data, Path(folder) / "a.ckpt")
            for row in rows_of(name, found):
                table.add_row(*row)
                if options.markdown:
                    first, key, *rest = row
                    print(f"| {first} | `{key}` | {' | '.join(rest)} |", flush=True)
            notes += [f"{name}, {text}" for text in found["said"]]
    if not options.markdown:
        console.print(table)
    for note in notes:
        print(note)
    if options.markdown:
        print(place)


if __name__ == "__main__":
    main()
