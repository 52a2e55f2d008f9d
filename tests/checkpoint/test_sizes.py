"""The sizes that the README promises, measured on the file that a Trainer wrote."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.models import Shrink, train_and_save
from support.promises import payloads_of
from torch import Tensor, nn

from q8lightning import CheckpointPolicy, QuantizationCallback
from q8lightning.checkpoint.encode.checkpoint import encode_checkpoint

BITS = {"resume": (8 + 3, 6, 6), "compact": (8, 5, 4), "precise": (8 + 8, 8, 8)}
"""The bits of all codes of a weight and of its moments, in each preset."""

NARROW, WIDE = (32 / 256, 16 / 128, 32 / 128), (32 / 256, 32 / 128, 64 / 128)
"""The bits an element that scales take: one for a block of 256 or 128, and two in the codec ``log``. Those of moments
have 16 bits or 32."""

SCALES = {"resume": NARROW, "compact": NARROW, "precise": WIDE}

BYTES_PER_PARAMETER = {name: (sum(bits) + sum(SCALES[name])) / 8 for name, bits in BITS.items()}
"""Bytes that a parameter trained with AdamW in float32 takes by its layout: 2.94, 2.19 and 4.11."""

BYTES_PER_WEIGHT = {name: (bits[0] + SCALES[name][0]) / 8 for name, bits in BITS.items()}
"""The same of a file with weights only: 1.39, 1.02 and 2.02."""

REST = 0.12
"""Bytes a parameter at most for small tensors, which are stored as they are, and for what is no tensor."""


class SmallTransformer(nn.Module):
    """An embedding, transformer layers with biases and norms, and a tied head."""

    def __init__(self, width: int = 256, words: int = 1024, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(64, width) / 50)
        self.body = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, batch: Tensor) -> Tensor:
        words = (batch.abs() * 100).long() % self.embedding.num_embeddings
        x = self.embedding(words) + self.positions[: words.shape[1]]
        for layer in self.body:
            x = layer(x)
        return self.head(self.norm(x))


class SmallConvNet(nn.Module):
    """Convolutions with BatchNorms."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for before, after in pairwise((3, *widths)):
            self.body.extend([nn.Conv2d(before, after, 3, bias=False), nn.BatchNorm2d(after), nn.ReLU()])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.body(batch).mean((2, 3)))


MODELS: dict[str, Callable[[], Shrink]] = {
    "1.9 M, width 256": lambda: Shrink(SmallTransformer(), 16),
    "1.0 M, width 128": lambda: Shrink(SmallTransformer(width=128, words=256, layers=5), 16),
    "1.0 M, width 160": lambda: Shrink(SmallTransformer(width=160, words=512, layers=3), 16),
    "1.0 M, 17 convolutions": lambda: Shrink(SmallConvNet(*[32] * 2, *[64] * 8, *[96] * 4, *[128] * 3), 3, 40, 40),
}
"""The smaller a model and the more of its tensors are small, the more the rest of the file weighs."""


def test_the_sizes_are_those_that_the_presets_promise() -> None:
    assert [round(size, 2) for size in BYTES_PER_PARAMETER.values()] == [2.94, 2.19, 4.11]
    assert [round(size, 2) for size in BYTES_PER_WEIGHT.values()] == [1.39, 1.02, 2.02]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("checkpoint", [*BITS, None], ids=str)
def test_a_checkpoint_takes_no_more_than_promised(
    checkpoint: str | None, model: Callable[[], Shrink], tmp_path: Path
) -> None:
    module = model()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters >= 1_000_000
    callbacks = [ModelCheckpoint(tmp_path), QuantizationCallback(checkpoint)]
    trainer = train_and_save(tmp_path, module, *callbacks, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    size, of_weights = ((tmp_path / name).stat().st_size / parameters for name in ("a.ckpt", "weights.ckpt"))
    if checkpoint is None:
        assert size >= 12, "the model is not what the promise is about"
    else:
        assert BYTES_PER_PARAMETER[checkpoint] <= size <= BYTES_PER_PARAMETER[checkpoint] + REST
        assert BYTES_PER_WEIGHT[checkpoint] <= of_weights <= BYTES_PER_WEIGHT[checkpoint] + REST / 2
    assert bool(payloads_of(tmp_path / "a.ckpt")) == (checkpoint is not None)


def test_what_was_refused_is_not_saved_along_with_the_rest() -> None:
    good, bad = torch.randn(5000), torch.full((1_000_000,), torch.nan)
    with pytest.warns(UserWarning, match="state_dict.bad"):
        encoded = encode_checkpoint({"state_dict": {"good": good, "bad": bad}}, CheckpointPolicy.of("compact"))
    payload = encoded["state_dict"]["good"]
    assert encoded["state_dict"]["bad"] is bad
    assert payload.data.untyped_storage().nbytes() == payload.nbytes  # torch.save writes whole storages
