"""Flip bits of a real checkpoint and cut it off, many times: how much of the damage does loading notice?

    python benchmarks/damage.py [--attempts 10000]

Every fourth attempt damages the structure around the tensors, which is a small part of the file, every tenth cuts the
file off. Damage has no effect if it hits padding, or names and dates that nobody reads. Exits with 1 if loading
returned a wrong value.
"""

import argparse
import collections
import random
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import q8lightning

console = Console(width=100)


def checkpoint() -> dict[str, Any]:
    """Return the state of a small model after a few steps of AdamW."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    return {"global_step": 3, "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints agree in every key and every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=10_000)
    attempts = parser.parse_args().attempts
    io, chance = q8lightning.QuantizedCheckpointIO(), random.Random(0)
    outcomes: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ckpt"
        io.save_checkpoint(checkpoint(), path)
        whole, expected = path.read_bytes(), io.load_checkpoint(path)
        with zipfile.ZipFile(path) as archive:
            headers = [record.header_offset for record in archive.infolist()]
            end = archive.start_dir
        structure = [*range(headers[4]), *(start + k for start in headers for k in range(64)), *range(end, len(whole))]
        for attempt in track(range(attempts), console=console):
            content = bytearray(whole)
            if attempt % 10 == 0:
                position = chance.randrange(len(content))
                del content[position:]
            else:
                position = chance.choice(structure) if attempt % 4 == 0 else chance.randrange(len(content))
                content[position] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
            try:
                found = io.load_checkpoint(path)
            except q8lightning.CorruptCheckpointError:
                outcome = "reported as damage"
            except Exception as error:
                outcome = f"another error: {error!r}"
            else:
                outcome = "no effect" if same(found, expected) else "WRONG VALUES"
            outcomes[outcome] += 1
            after = whole[position] ^ content[position] if position < len(content) else "cut off"
            examples.setdefault(outcome, f"such as byte {position:,} of {len(whole):,}, changed by {after}")
    for outcome, count in outcomes.most_common():
        console.print(f"{count:7,}  {outcome}, {examples[outcome]}")
    sys.exit(outcomes["WRONG VALUES"] > 0)


if __name__ == "__main__":
    main()
