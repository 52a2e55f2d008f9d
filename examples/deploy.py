"""Train a small language model of transformers for each target, export it there, load it, and compare.

    pip install "q8lightning[export]" transformers accelerate
    python examples/deploy.py                        # every target whose library is installed
    python examples/deploy.py gguf-q4_0 torchao-int8

For each target: a Llama with random weights learns to continue sequences of numbers, with the rules of
``QATConfig.for_target``. Its checkpoint is exported, and what the target's library reads is compared with the weights
and logits of the last validation. The table shows bytes, the largest deviation of a quantized weight relative to the
largest weight, and the relative distance of the logits.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from q8lightning import QATConfig, QuantizationCallback, export_quantized

Weights = dict[str, Tensor]

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


class Counting(pl.LightningModule):
    """Continues sequences that count upwards in steps of their own; keeps what its last validation used."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(CONFIG)
        self.weights: Weights = {}
        self.logits = torch.empty(0)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def validation_step(self, tokens: Tensor, index: int) -> None:
        self.weights = {name: each.detach().clone() for name, each in self.model.named_parameters()}
        self.logits = self.model(input_ids=tokens).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(sequences(512), batch_size=16)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(sequences(8), batch_size=8)


def sequences(count: int) -> Any:
    """Return sequences of tokens, ``[count, 32]``."""
    generator = torch.Generator().manual_seed(count)
    first, step = torch.randint(CONFIG.vocab_size, (2, count, 1), generator=generator)
    return (first + step * torch.arange(32)) % CONFIG.vocab_size


def with_floats(weights: Weights) -> Any:
    """Return a model with these weights."""
    model = LlamaForCausalLM(CONFIG)
    model.load_state_dict(weights, strict=False)
    return model


def load_gguf(path: Path) -> tuple[Weights, Any]:
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    values = {each.name: torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy()) for each in tensors}
    weights = {each.name: values[each.name].view(*each.shape.tolist()[::-1]) for each in tensors}
    return weights, with_floats(weights)


def load_safetensors(path: Path) -> tuple[Weights, Any]:
    from safetensors.torch import load_file

    weights = load_file(path)
    return weights, with_floats(weights)


def load_torchao(path: Path) -> tuple[Weights, Any]:
    state = torch.load(path, weights_only=False)
    model = LlamaForCausalLM(CONFIG)
    model.load_state_dict(state, assign=True)
    return {name: each.dequantize() if hasattr(each, "dequantize") else each for name, each in state.items()}, model


def load_bitsandbytes(path: Path) -> tuple[Weights, Any]:
    decoded = AutoModelForCausalLM.from_pretrained(path).dequantize()
    return dict(decoded.named_parameters()), AutoModelForCausalLM.from_pretrained(path)


def load_compressed_tensors(path: Path) -> tuple[Weights, Any]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    state = load_file(path / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((path / "config.json").read_text())["quantization_config"])
    weights = dict(state)
    for scheme in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for module in scheme.targets:
            own = {
                name.removeprefix(f"{module}."): each for name, each in state.items() if name.startswith(f"{module}.")
            }
            weights[f"{module}.weight"] = compressor.decompress(own, scheme)["weight"]
    return weights, AutoModelForCausalLM.from_pretrained(path)


class Target(NamedTuple):
    """A format, the rules that are trained for it, and what loads it."""

    format: str
    rules: str
    load: Callable[[Path], tuple[Weights, Any]]


TARGETS = {
    "safetensors": Target("safetensors", "gguf-q4_0", load_safetensors),
    "gguf-q4_0": Target("gguf", "gguf-q4_0", load_gguf),
    "gguf-q8_0": Target("gguf", "gguf-q8_0", load_gguf),
    "bitsandbytes-nf4": Target("bitsandbytes", "bitsandbytes-nf4", load_bitsandbytes),
    "bitsandbytes-int8": Target("bitsandbytes", "bitsandbytes-int8", load_bitsandbytes),
    "compressed-tensors-int4": Target("compressed-tensors", "compressed-tensors-int4", load_compressed_tensors),
    "compressed-tensors-int8": Target("compressed-tensors", "compressed-tensors-int8", load_compressed_tensors),
    "torchao-int4": Target("torchao", "torchao-int4", load_torchao),
    "torchao-int8": Target("torchao", "torchao-int8", load_torchao),
}


def train(rules: Any, folder: Path, steps: int) -> tuple[Counting, Path]:
    """Return a model that was trained with quantized linear layers, and its checkpoint."""
    pl.seed_everything(0, verbose=False)
    qat = QATConfig.for_target(rules, exclude=["*embed_tokens*", "*lm_head*"])
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[QuantizationCallback(None, qat=qat)], default_root_dir=folder, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    model = Counting()
    trainer.fit(model)
    trainer.save_checkpoint(folder / "qat.ckpt")
    trainer.limit_val_batches = 1
    trainer.validate(model, verbose=False)
    return model, folder / "qat.ckpt"


def compare(name: str, folder: Path, steps: int) -> str:
    """Train for a target, export, load, and return a row of the table."""
    target = TARGETS[name]
    model, checkpoint = train(target.rules, folder, steps)
    out = folder / "exported"
    export_quantized(checkpoint, out, target.format, prefix="model.", config=CONFIG)  # type: ignore[arg-type]
    weights, loaded = target.load(out)
    quantized = [each for each in model.weights if each.endswith("_proj.weight")]
    deviation = max(
        float((weights[each].float() - model.weights[each]).abs().max() / model.weights[each].abs().max())
        for each in quantized
    )
    with torch.no_grad():
        logits = loaded(input_ids=sequences(8)).logits.float()
    distance = float((logits - model.logits).norm() / model.logits.norm())
    files = [out] if out.is_file() else list(out.iterdir())
    size = sum(each.stat().st_size for each in files)
    return f"| {name} | {checkpoint.stat().st_size:,} | {size:,} | {deviation:.1e} | {distance:.1e} |"


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what libraries say of their own affairs."""
    import logging

    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a model that was trained with QAT to each target.")
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all if not given")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print("| target | checkpoint, bytes | exported, bytes | weights deviate by | logits by |\n|---|---|---|---|---|")
    for name in options.targets or TARGETS:
        with tempfile.TemporaryDirectory() as folder, quiet():
            try:
                row = compare(name, Path(folder), options.steps)
            except ImportError as error:
                row = f"| {name} | not installed: {error} |"
            except ValueError as error:  # the exporter says what is missing
                row = f"| {name} | {error} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
