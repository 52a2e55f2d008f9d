"""Write the golden files of format version 1: checkpoints of real Trainers, and the values that they stand for.

    python tests/golden/make.py [--force]

Run once for each format version and never again: the files hold what users have on their disks, and later versions of
q8lightning must read them. ``--force`` replaces them, which is right only as long as version 1 has not been released.

The values in ``expected_v1.json`` come from the reference, not from loading what was written: of each tensor the dtype,
the shape, the SHA-256 of its bytes in row-major order, and the first three numbers for people.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from support.models import batches, quiet_trainer  # noqa: E402
from support.promises import promised, stored, tensors  # noqa: E402

from q8lightning import CheckpointPolicy, QATConfig, QuantizationCallback, Rule, WeightRule  # noqa: E402
from q8lightning.quantization.codecs.weight import WeightCodec  # noqa: E402
from q8lightning.quantization.spec.packed_bits import pack_bits  # noqa: E402

BUFFERS = frozenset({"table"})

NARROW: dict[str, Any] = {"scale_dtype": "bfloat16"}
"""Scales of two bytes."""

CODECS: dict[str, Rule] = {
    "linear": Rule("state_dict.every.linear", "linear", 32),
    "residual": Rule("state_dict.every.residual", "linear", 64, residual_bits=8),
    "residual_of_4": Rule("state_dict.every.residual_of_4", "linear", 64, residual_bits=4),
    "residual_of_7": Rule("state_dict.every.residual_of_7", "linear", 32, bits=5, residual_bits=7),
    "linear_of_3": Rule("state_dict.every.linear_of_3", "linear", 64, bits=3),
    "softsign": Rule("state_dict.every.softsign", "softsign", 32),
    "softsign_of_6": Rule("state_dict.every.softsign_of_6", "softsign", 32, bits=6),
    "softsign_of_5": Rule("state_dict.every.softsign_of_5", "softsign", 64, bits=5),
    "log": Rule("state_dict.every.log", "log", 32),
    "log_of_5": Rule("state_dict.every.log_of_5", "log", 64, bits=5),
    "log_of_4": Rule("state_dict.every.log_of_4", "log", 32, bits=4),
    "softsign_of_6_narrow": Rule("state_dict.every.softsign_of_6_narrow", "softsign", 32, bits=6, **NARROW),
    "linear_narrow": Rule("state_dict.every.linear_narrow", "linear", 64, **NARROW),
    "log_of_5_narrow": Rule("state_dict.every.log_of_5_narrow", "log", 64, bits=5, **NARROW),
    "int4_narrow": Rule("state_dict.every.int4_narrow", "int4", 32, **NARROW),
    "dynamic": Rule("state_dict.every.dynamic", "dynamic", 32),
    "dynamic_unsigned": Rule("state_dict.every.dynamic_unsigned", "dynamic_unsigned", 32),
    "normal_float4": Rule("state_dict.every.normal_float4", "normal_float4", 32),
    "int2": Rule("state_dict.every.int2", "int2", 32),
    "int8": Rule("state_dict.every.int8", "int8", 32),
    "fp8_e4m3": Rule("state_dict.every.fp8_e4m3", "fp8_e4m3", 32),
    "fp8_e5m2": Rule("state_dict.every.fp8_e5m2", "fp8_e5m2", 32),
    "own": Rule("state_dict.every.own", [-1.0, -0.25, 0.0, 0.3, 1.0], 32),
    "in_bfloat16": Rule("state_dict.every.in_bfloat16", "softsign", 256),
    "in_float16": Rule("state_dict.every.in_float16", "linear", 32),
    "in_float64": Rule("state_dict.every.in_float64", "linear", 32, residual_bits=8),
    "columns": Rule("state_dict.every.columns", "softsign", 32),
}
"""The rule for each parameter of :class:`EveryCodec`, whose name says what it is there for."""

DTYPES = {"in_bfloat16": torch.bfloat16, "in_float16": torch.float16, "in_float64": torch.float64}
UNSIGNED = ("log", "log_of_5", "log_of_4", "log_of_5_narrow", "dynamic_unsigned")
RULES = [
    *CODECS.values(),
    Rule("state_dict.rows.weight", "softsign", 32),
    Rule("state_dict.flat.weight", "linear", 64, residual_bits=8),
    Rule("parameter", "linear", 32),
    Rule("wants_grad", "softsign", 32),
]
POLICY = CheckpointPolicy(RULES, min_numel=64, min_sqnr_db=None, max_update_direction_error=None)
QAT = QATConfig([WeightRule("rows.weight", "int4", 32, axis=0), WeightRule("flat.weight", "linear", 64)])


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


class EveryCodec(pl.LightningModule):
    """A frozen parameter for each codec, with a short last block and a block of zeros, and two layers that are trained.

    One layer is quantized along its rows, so that the file has the codes of it; the other's codes are those of its
    payload.
    """

    def __init__(self) -> None:
        super().__init__()
        self.every = nn.ParameterDict()
        for name in CODECS:
            values = torch.randn(20, 13) * 10 ** torch.linspace(-3, 3, 20)[:, None]
            values = (values.abs() if name in UNSIGNED else values).to(DTYPES.get(name, torch.float32))
            values.view(-1)[64:128] = 0
            values = values.t() if name == "columns" else values
            self.every[name] = nn.Parameter(values, requires_grad=False)
        self.rows = nn.Linear(10, 12, bias=False)
        self.flat = nn.Linear(12, 10, bias=False)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.flat(self.rows(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.rows.parameters(), *self.flat.parameters()], lr=1e-2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["parameter"] = nn.Parameter(torch.linspace(-2, 3, 100))
        checkpoint["wants_grad"] = torch.linspace(-2, 3, 100).requires_grad_()

    def train_dataloader(self) -> Any:
        return batches(2, 10)


def save(file: Path, model: pl.LightningModule, callback: QuantizationCallback) -> dict[str, Any]:
    """Train for two steps, write the file, and return what a plain checkpoint would have held."""
    trainer = quiet_trainer(HERE, max_steps=2, callbacks=[callback])
    trainer.fit(model)
    live = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    trainer.save_checkpoint(file)
    return live


def values_of_preset(live: dict[str, Any], preset: str) -> dict[str, Tensor]:
    """Return what a preset promises, by path."""
    return {".".join(map(str, path)): promised(path, each, preset, BUFFERS) for path, each in tensors(live)}


def values_of_codecs(live: dict[str, Any]) -> dict[str, Tensor]:
    """Return what :data:`RULES` promise, by path, and the codes of the layer that is quantized by rows."""
    rules = {rule.pattern: rule for rule in RULES}
    values = {}
    for path, tensor in tensors(live):
        name = ".".join(map(str, path))
        rule = rules.get(name)
        if rule is not None:
            assert isinstance(rule.codec, str)
            assert rule.bits is not None
            if rule.residual_bits:
                tensor = stored(tensor, "residual", rule.block_size, (rule.bits, rule.residual_bits))
            else:
                name_of_codec = f"{rule.codec} with {rule.scale_dtype} scales"
                bits = (rule.bits,) if rule.codec in ("linear", "softsign", "log") else (8,)
                tensor = stored(tensor, name_of_codec, rule.block_size, bits)
        values[name] = tensor
    codec = WeightCodec("int4", 32, 0).fitted((12, 10))
    codes, scales = codec.encode(live["state_dict"]["rows.weight"])
    return values | {
        "q8lightning.qat.rows.weight.codes": pack_bits(codes, 4),
        "q8lightning.qat.rows.weight.scales": scales,
    }


def described(tensor: Tensor) -> dict[str, Any]:
    """Return what the test compares."""
    flat = tensor.detach().contiguous().reshape(-1)
    content = flat.view(torch.uint8) if flat.numel() else flat
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(content.numpy().tobytes()).hexdigest(),
        "first": flat[:3].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    files = {name: HERE / f"{name}_v1.ckpt" for name in ("resume", "compact", "precise", "codecs")}
    existing = [file.name for file in files.values() if file.exists()]
    if existing and not parser.parse_args().force:
        parser.error(f"{', '.join(existing)} exist and are a promise; pass --force if their format was never released")
    expected = {}
    for name, file in files.items():
        torch.manual_seed(8)
        if name == "codecs":
            values = values_of_codecs(save(file, EveryCodec(), QuantizationCallback(POLICY, qat=QAT)))
        else:
            values = values_of_preset(save(file, Golden(), QuantizationCallback(name)), name)
        expected[name] = {path: described(tensor) for path, tensor in values.items()}
        print(f"{file.stat().st_size:8} bytes  {file.name}")
    lines = [
        f' "{name}": {{\n' + ",\n".join(f'  "{path}": {json.dumps(each)}' for path, each in values.items()) + "\n }"
        for name, values in expected.items()
    ]
    (HERE / "expected_v1.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
