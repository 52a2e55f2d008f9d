"""The same promises where the tensors live on a GPU: encoded there by the kernels, decoded there or on the host."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from models import Shrink
from torch import nn

from q8lightning import QuantizationCallback
from q8lightning.quantization.codec import Codec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_state_on_the_gpu_comes_back_as_the_reference_decodes_it(tmp_path: Path) -> None:
    module = Shrink(nn.Linear(300, 300))
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path, callbacks=[QuantizationCallback()], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = trainer.optimizers[0].state_dict()["state"][0]
    live = {"weight": module.net.weight.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    codecs = {"weight": Codec("linear", 256, True), "exp_avg": Codec("softsign", 128), "exp_avg_sq": Codec("log", 128)}
    for place in ("cpu", "cuda"):
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True, map_location=place)
        loaded = {"weight": checkpoint["state_dict"]["net.weight"], **checkpoint["optimizer_states"][0]["state"][0]}
        for name, codec in codecs.items():
            assert loaded[name].device.type == place
            original = live[name].cpu().reshape(-1)
            expected = codec.decode(codec.encode(original), torch.float32).view(300, 300)
            assert torch.equal(loaded[name].cpu(), expected), (name, place)
