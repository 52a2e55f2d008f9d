"""The same promises where the tensors live on a GPU: encoded there by the kernels, decoded there or on the host."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from models import Shrink
from torch import Tensor, nn

from q8lightning import QuantizationCallback
from q8lightning.quantization.codec import Codec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODECS = {"weight": Codec("linear", 256, True), "exp_avg": Codec("softsign", 128), "exp_avg_sq": Codec("log", 128)}


class SaveWhileTraining(pl.Callback):
    """Saves after every batch, while the state is on the GPU, and keeps what it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.live: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
        moments = trainer.optimizers[0].state_dict()["state"][0]
        assert pl_module.net.weight.is_cuda
        self.live = {"weight": pl_module.net.weight.detach(), **moments}
        self.live = {name: self.live[name].cpu().clone() for name in CODECS}


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_state_on_the_gpu_comes_back_as_the_host_encodes_and_decodes_it(place: str, tmp_path: Path) -> None:
    saver = SaveWhileTraining(tmp_path / "a.ckpt")
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[saver, QuantizationCallback()],
    )
    trainer.fit(Shrink(nn.Linear(300, 300), 300))
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True, map_location=place)
    loaded = {"weight": checkpoint["state_dict"]["net.weight"], **checkpoint["optimizer_states"][0]["state"][0]}
    for name, codec in CODECS.items():
        assert loaded[name].device.type == place
        expected = codec.decode(codec.encode(saver.live[name].view(-1)), torch.float32).view(300, 300)
        assert torch.equal(loaded[name].cpu(), expected), name
