"""Write the golden files of checkpoint format 1: checkpoints of both presets and the values that they stand for.

    python tests/golden/make.py [--force] [--again checksums|small|pooled]

Run once for each format version and never again: the files hold what users have on their disks, and later versions of
q8lightning must read them. ``--force`` replaces them, which is right only as long as format 1 has not been released.
``--again`` writes the first files again as they are saved since payloads have checksums (``checksums``), since small
tensors lie together (``small``), and since the pickle has only a number for each of these (``pooled``).

The values in ``expected_v1.pt`` come from the reference, not from loading what was written.
"""

import argparse
import sys
from pathlib import Path
from pprint import pprint
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from support.models import batches, quiet_trainer  # noqa: E402
from support.promises import promised, promised_paths, same_bits, tensors  # noqa: E402

from q8lightning import QuantizationCallback, QuantizedCheckpointIO  # noqa: E402

BUFFERS = frozenset({"table"})
FIRST_VALUES = (
    "state_dict.layer.weight",
    "state_dict.embedding.weight",
    "state_dict.half.weight",
    "optimizer_states.0.state.0.exp_avg",
    "optimizer_states.0.state.0.exp_avg_sq",
)
"""Of these, the first three numbers stand in the test as well."""


class Golden(pl.LightningModule):
    """One trained layer; frozen beside it a tied pair, a layer in bfloat16 and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.embedding = nn.Embedding(64, 64).requires_grad_(False)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.half = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
        self.register_buffer("table", torch.linspace(-1, 1, 200))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.head(self.layer(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.layer.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        return batches(2)


def write(preset: str, known: list[Tensor]) -> dict[str, Tensor]:
    """Write the checkpoint of a preset and return the values that it promises, by path.

    Equal tensors are the same object, also one of those ``known`` from before, so that a file holds them once.
    """
    torch.manual_seed(8)
    trainer = quiet_trainer(HERE, max_steps=2, callbacks=[QuantizationCallback(preset)])
    trainer.fit(Golden())
    live = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    trainer.save_checkpoint(HERE / f"{preset}_v1.ckpt")
    encoded = promised_paths(live, preset, BUFFERS)
    expected = {}
    for path, tensor in tensors(live):
        name = ".".join(map(str, path))
        values = promised(path, tensor, preset, BUFFERS).clone()
        expected[name] = next((each for each in known if same_bits(each, values)), values)
        known.append(expected[name])
        print(f"{preset:8} {'encoded' if name in encoded else 'as it is':8} {name}")
    return expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    again = ["checksums", "small", "pooled"]
    parser.add_argument("--again", choices=again, help="write *_v1_AGAIN.ckpt, from the first files")
    arguments = parser.parse_args()
    force = arguments.force
    if arguments.again:
        for preset in ("resume", "compact"):
            target = HERE / f"{preset}_v1_{arguments.again}.ckpt"
            if target.exists() and not force:
                parser.error(f"{target.name} exists and is a promise")
            io = QuantizedCheckpointIO(checkpoint=preset)
            io.save_checkpoint(torch.load(HERE / f"{preset}_v1.ckpt", weights_only=True), target)
        return
    files = [HERE / name for name in ("resume_v1.ckpt", "compact_v1.ckpt", "expected_v1.pt")]
    existing = [file.name for file in files if file.exists()]
    if existing and not force:
        parser.error(f"{', '.join(existing)} exist and are a promise; pass --force if their format was never released")
    known: list[Tensor] = []
    torch.save({preset: write(preset, known) for preset in ("resume", "compact")}, HERE / "expected_v1.pt")
    for file in files:
        print(f"{file.stat().st_size:8} bytes  {file.name}")
    print("FIRST_VALUES of tests/checkpoint/test_golden.py:")
    for preset in ("resume", "compact"):
        found = {".".join(map(str, path)): each for path, each in tensors(torch.load(HERE / f"{preset}_v1.ckpt"))}
        pprint({preset: {name: found[name].flatten()[:3].tolist() for name in FIRST_VALUES}}, width=120)


if __name__ == "__main__":
    main()
