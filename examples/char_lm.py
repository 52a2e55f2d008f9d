"""A small GPT over characters and the text it reads: the documentation that every Python installation carries."""

import math
import pydoc_data.topics

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Block(nn.Module):
    """One transformer block: causal self-attention, then a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map activations ``[batch, time, width]`` to activations of the same shape."""
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer that shares its embedding with its output layer."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[batch, time]`` int64 to logits ``[batch, time, vocabulary]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.position(positions))))


class CharLM(pl.LightningModule):
    """Next-character prediction with AdamW and a cosine schedule.

    Args:
        vocabulary: Number of characters.
        context: Length of the windows, in characters.
        width: Width of the activations.
        depth: Number of blocks.
        heads: Attention heads of each block.
        learning_rate: Peak of the schedule.
        decay_steps: Steps until the learning rate has fallen to a tenth of its peak.
    """

    def __init__(
        self,
        vocabulary: int = 128,
        context: int = 96,
        width: int = 160,
        depth: int = 4,
        heads: int = 4,
        learning_rate: float = 2e-3,
        decay_steps: int = 1000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT(vocabulary, context, width, depth, heads)

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.1)

        def factor(step: int) -> float:
            progress = min(step / self.hparams.decay_steps, 1.0)
            return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Windows(Dataset):
    """Windows of ``length`` characters at random places of a text, the same ones every time."""

    def __init__(self, text: Tensor, length: int, count: int, seed: int) -> None:
        self.text, self.length = text, length
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - length, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + self.length].long()


class PythonDocs(pl.LightningDataModule):
    """The topics of Python's own help, as ASCII; the last tenth is for validation.

    Args:
        context: Characters that the model sees at once.
        batch_size: Windows in a batch.
        windows: Windows in an epoch.
    """

    def __init__(self, context: int = 96, batch_size: int = 24, windows: int = 24_000) -> None:
        super().__init__()
        text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", errors="replace")
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = len(data) * 9 // 10
        self.batch_size = batch_size
        self.train = Windows(data[:cut], context + 1, windows, seed=1)
        self.validation = Windows(data[cut:], context + 1, 20 * batch_size, seed=2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size)
