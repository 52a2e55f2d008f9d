"""Small language models of transformers with random weights, trained with QAT and saved, and what they answer then."""

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from q8lightning import QATConfig, QuantizationCallback
from support.models import quiet_trainer

VOCABULARY, WIDTH = 96, 64
TOKENS = torch.arange(64).view(4, 16) * 7 % VOCABULARY

CONV1D = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")
"""The matrices that GPT-2 keeps transposed."""


def tiny_llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, **options))


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **dropout))


NO_LINEAR = {tiny_llama: ["*embed_tokens*", "*lm_head*"], tiny_gpt2: ["*.wte.*", "*.wpe.*"]}
"""The matrices that are of no linear layer, or stay in float, as libraries leave the head."""


class Language(pl.LightningModule):
    """Trains a language model of transformers, and keeps the logits of its last validation."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.logits = torch.empty(0)
        self.weights: dict[str, Tensor] = {}

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def validation_step(self, tokens: Tensor, index: int) -> None:
        self.logits = self.model(input_ids=tokens).logits
        self.weights = {name: each.detach().clone() for name, each in self.model.named_parameters()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), 1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(TOKENS.repeat(4, 1), batch_size=4)

    val_dataloader = train_dataloader


class Answered(NamedTuple):
    """A checkpoint, the model's configuration, its logits, and the weights of the forward pass by their names."""

    path: Path
    config: Any
    logits: Tensor
    weights: dict[str, Tensor]


def trained(folder: Path, model: Any, qat: QATConfig, checkpoint: Any = "resume") -> Answered:
    """Train, save and validate; the masters are stored as they are, or exactly enough that the codes are the same."""
    module = Language(model)
    trainer = quiet_trainer(
        folder, max_steps=4, limit_val_batches=0, callbacks=[QuantizationCallback(checkpoint, qat=qat)]
    )
    trainer.fit(module)
    trainer.save_checkpoint(folder / "qat.ckpt")
    trainer.limit_val_batches = 1
    trainer.validate(module, verbose=False)
    return Answered(folder / "qat.ckpt", model.config, module.logits, module.weights)


def distance(model: Any, expected: Tensor) -> float:
    """Return how far a model's logits are from others, relative to those."""
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits.float()
    return float((logits - expected).norm() / expected.norm())
