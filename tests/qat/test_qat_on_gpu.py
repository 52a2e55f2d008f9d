"""On a GPU, too, training with the callback is bit for bit training with autograd's straight-through function.

The grouped kernels, which only run there, train as the operators do that run everywhere.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support.models import quiet_trainer
from support.straight_through import Call, Trained, as_it_is, quantized, straight_through
from torch import Tensor, nn

from q8lightning import ActivationRule, QATConfig, QuantizationCallback, WeightRule, export_quantized
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer
from q8lightning.quantization.backends.choose import launching

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
    export_quantized(tmp_path / "qat.ckpt", tmp_path / "plain.ckpt")
    shipped = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]["net.0.weight"]
    assert torch.equal(shipped, quantized(shipped, codebook, 64))  # it lies on its own grid


class Recurrent(nn.Module):
    """A recurrent layer, whose weights cuDNN keeps in one piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.LSTM(64, 64, 2), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cells(x)[0])


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ({"codebook": "int4", "block_size": 64}, {"ramp": 3}),
        ({"codebook": "dynamic", "block_size": 32}, {"ramp": 5, "start_step": 1}),
        ({"codebook": "int3", "block_size": 32, "axis": 0}, {}),
        ({"codebook": "linear", "block_size": 4096, "axis": 1}, {}),
        ({"codebook": "softsign"}, {"activations": [ActivationRule("net.*")]}),
    ],
    ids=["ramp", "ramp from a later step", "rows of whole blocks", "a scale a column", "activations"],
)
@pytest.mark.parametrize("make", [net, Recurrent])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_kernels_train_as_operators_do(
    make: Any,
    rule: dict[str, Any],
    options: dict[str, Any],
    precision: str,
    tmp_path: Path,
) -> None:
    def train() -> Trained:
        torch.manual_seed(0)
        model = Trained(make())
        callback = QuantizationCallback(qat=QATConfig([WeightRule(**rule)], **options))
        trainer = quiet_trainer(
            tmp_path, max_steps=6, accelerator="gpu", precision=precision, callbacks=[callback], val_check_interval=2
        )
        trainer.fit(model)
        return model

    with_kernels = train()
    if make is Recurrent and train().losses != with_kernels.losses:
        pytest.skip("cuDNN's recurrent layers do not repeat their results on this machine")
    with launching(False):
        with_operators = train()
    assert with_kernels.losses == with_operators.losses
    assert with_kernels.evaluated == with_operators.evaluated
    assert all(map(torch.equal, with_kernels.parameters(), with_operators.parameters()))


@pytest.mark.parametrize("activations", [False, True])
def test_a_compiled_model_sees_the_quantized_values_without_compiling_again(activations: bool) -> None:
    module = net().cuda()
    rules = [ActivationRule("0"), ActivationRule("3")] if activations else []
    quantizer = FakeQuantizer(module, QATConfig([WeightRule(codebook="int4", block_size=64)], activations=rules))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = torch.randn(8, 64, device="cuda")
    for _ in range(3):
        quantizer.engage()
        seen = compiled(x)
        seen.square().mean().backward()
        values = [parameter.detach().clone() for parameter in module.parameters()]
        quantizer.release()
        masters = [parameter.detach().clone() for parameter in module.parameters()]
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), values, strict=True):
                parameter.copy_(value)
        if not activations:  # which are quantized only while the weights are
            assert torch.equal(compiled(x), seen)
            assert counter.frame_count == 1
        with torch.no_grad():
            for parameter, master in zip(module.parameters(), masters, strict=True):
                parameter.copy_(master - 0.1 * parameter.grad)
        module.zero_grad()
    assert counter.frame_count == 1
