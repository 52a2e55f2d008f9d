"""On a GPU, too, training with the callback is bit for bit training with autograd's straight-through function."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import quiet_trainer
from straight_through import Call, Trained, as_it_is, straight_through
from torch import nn

from q8lightning import QATConfig, QuantizationCallback, WeightRule, export_quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 64))


@pytest.mark.parametrize("codebook", ["linear", "int4", "normal_float4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"precision": "bf16-true"},
        {"precision": "16-mixed"},
        {"accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_a_gpu_trains_as_with_autograd(options: dict[str, Any], codebook: str, tmp_path: Path) -> None:
    def train(*callbacks: Any, call: Call = as_it_is) -> tuple[Trained, Any]:
        model = Trained(net(), call=call)
        trainer = quiet_trainer(tmp_path, max_steps=4, accelerator="gpu", callbacks=list(callbacks), **options)
        trainer.fit(model)
        return model, trainer

    expected, _ = train(call=straight_through(codebook, 64))
    got, trainer = train(QuantizationCallback(qat=QATConfig([WeightRule(codebook=codebook, block_size=64)])))
    assert got.losses == expected.losses
    assert all(map(torch.equal, got.net.parameters(), expected.net.parameters()))
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", format="codes")
