"""Saving what was loaded from a checkpoint gives the same codes and scales again, however often."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Autoencoder, TwoOptimizers, quiet_trainer
from support.promises import load, payloads_of, same_parts
from torch import Tensor

from q8lightning import CheckpointPolicy, QuantizationCallback, QuantizedCheckpointIO, QuantizedTensor, Rule
from q8lightning.checkpoint.policy import PRESETS
from q8lightning.quantization.spec.codebook import BUILTIN

FINE = [*(-1 + k / 4096 for k in range(120)), 0.0, *(1 - k / 4096 for k in reversed(range(120)))]
CODECS: dict[str, dict[str, Any]] = {
    **{name: {"codec": name} for name in BUILTIN},
    **{f"log{bits}": {"codec": "log", "bits": bits} for bits in (2, 4, 5, 8)},
    **{
        f"linear{bits}+{residual}": {"codec": "linear", "bits": bits, "residual_bits": residual}
        for bits, residual in ((8, 8), (8, 3), (5, 7), (2, 2))
    },
    "softsign6, narrow": {"codec": "softsign", "bits": 6, "scale_dtype": "bfloat16"},
    "linear, narrow": {"codec": "linear", "scale_dtype": "bfloat16"},
    "int8, narrow": {"codec": "int8", "scale_dtype": "bfloat16"},
    "log6, narrow": {"codec": "log", "bits": 6, "scale_dtype": "bfloat16"},
    "custom": {"codec": [-1.0, -0.3, -0.01, 0.0, 0.02, 0.7, 0.9]},
    "custom, positive": {"codec": [0.0, 0.1, 0.5, 1.0]},
    "custom, fine": {"codec": FINE},
}
NEVER_NEGATIVE = ("log2", "log4", "log5", "log8", "log6, narrow", "dynamic_unsigned", "custom, positive")


def hard_tensors(dtype: torch.dtype, negative: bool) -> dict[str, Tensor]:
    """Return weights and moments of many shapes: heavy tails, zeros, blocks of very different scale, short blocks."""
    normal = torch.randn(96, 64)
    scales = torch.exp2(torch.randint(-30, 30, (96, 1)).float())
    biased = torch.randn(5000) - 3 * torch.rand(5000)  # the largest magnitudes are negative
    zeros = torch.where(torch.rand(64, 129) < 0.5, 0.0, torch.randn(64, 129))
    both = torch.cat([torch.tensor([2.5, -2.5]), torch.rand(4999) - 0.5])
    tensors = {
        "normal": normal,
        "heavy tails": normal.pow(5),
        "rows of different scale": normal * scales,
        "negative": biased,
        "half zeros": zeros,
        "some blocks of zeros": torch.cat([torch.zeros(4096), torch.randn(4096)]),
        "one element in a sea of zeros": torch.zeros(4096).index_fill(0, torch.tensor([7]), -3.0),
        "both ends": both,
        "constant": torch.full((4096,), -0.1),
        "short last block": torch.randn(4097),
    }
    return {name: (tensor if negative else tensor.abs()).to(dtype) for name, tensor in tensors.items()}


def assert_stable(
    io: QuantizedCheckpointIO, checkpoint: dict[str, Any], folder: Path, generations: int = 2
) -> dict[str, QuantizedTensor]:
    """Save, load, save what was loaded and so on; return the payloads, which are the same every time.

    When the second file has the payloads of the first, a third is made of the same values as the second.
    """
    path = folder / "generation.ckpt"
    io.save_checkpoint(checkpoint, path)
    first = payloads_of(path)
    for generation in range(1, generations + 1):
        io.save_checkpoint(load(path), path)
        again = payloads_of(path)
        assert list(again) == list(first)
        changed = [name for name in first if not same_parts(first[name], again[name])]
        assert not changed, f"generation {generation}"
    return first


# Every codec in one of these, and the presets' in all. That codecs are idempotent by themselves, in every
# dtype and over ten generations, is shown in test_reference.py; here files, views and whole checkpoints come in.
DTYPES = [(torch.float32, 256), (torch.float32, 32), (torch.bfloat16, 128), (torch.float16, 128), (torch.float64, 4096)]
OF_PRESETS = ("softsign", "softsign6, narrow", "softsign5", "log8", "log6, narrow", "log4", "linear8+8", "linear8+3")
CASES = [
    pytest.param(codec, *case, id=f"{codec}-{case[0]}-{case[1]}")
    for i, codec in enumerate(CODECS)
    for case in (DTYPES if codec in OF_PRESETS else [DTYPES[i % 5]])
]


@pytest.mark.filterwarnings("ignore:stored as they are")  # half precision is too coarse for the fine levels
@pytest.mark.parametrize(("codec", "dtype", "block_size"), CASES)
def test_every_codec_finds_the_same_codes_again(
    codec: str, dtype: torch.dtype, block_size: int, tmp_path: Path
) -> None:
    policy = CheckpointPolicy([Rule("state_dict.*", block_size=block_size, **CODECS[codec])], min_sqnr_db=None)
    state = hard_tensors(dtype, negative=codec not in NEVER_NEGATIVE)
    if dtype == torch.float16:  # keep to its range; its subnormals have a test in test_refusals
        del state["rows of different scale"], state["heavy tails"]
    encoded = assert_stable(QuantizedCheckpointIO(checkpoint=policy), {"state_dict": state}, tmp_path)
    # Sixteen bits for two bytes save nothing, and levels finer than a dtype cannot be kept in it.
    if dtype.itemsize > 2 or codec not in ("linear8+8", "custom, fine"):
        assert len(encoded) == len(state)


@pytest.mark.filterwarnings("ignore:stored as they are")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_tensors_that_fade_out_find_the_same_codes_too(codec: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Momentum of a parameter without gradients shrinks to the smallest numbers of its dtype before it is zero."""
    policy = CheckpointPolicy([Rule("state_dict.*", block_size=128, **CODECS[codec])], min_sqnr_db=None)
    fading = torch.randn(256, 64) * torch.exp2(-torch.linspace(110, 150, 256))[:, None]
    state = {"fading": (fading.abs() if codec in NEVER_NEGATIVE else fading).to(dtype)}
    assert_stable(QuantizedCheckpointIO(checkpoint=policy), {"state_dict": state}, tmp_path)


@pytest.mark.filterwarnings("ignore:stored as they are")
@pytest.mark.parametrize("codec", CODECS)
def test_the_smallest_numbers_of_bfloat16_find_the_same_codes_too(codec: str, tmp_path: Path) -> None:
    """Each block holds all numbers from zero to a largest one just above the smallest normal float32."""
    policy = CheckpointPolicy([Rule("state_dict.*", block_size=4096, **CODECS[codec])], min_sqnr_db=None)
    patterns = [torch.arange(4096).clamp(max=largest) for largest in range(128, 192)]
    smallest = torch.cat(patterns).to(torch.int16).view(torch.bfloat16)
    assert_stable(QuantizedCheckpointIO(checkpoint=policy), {"state_dict": {"smallest": smallest}}, tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_preset_finds_the_same_codes_ten_times_over(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights, squares = hard_tensors(dtype, negative=True), hard_tensors(dtype, negative=False)
    state = {
        index: {"exp_avg": weights[name].roll(1), "exp_avg_sq": squares[name], "step": torch.tensor(3.0)}
        for index, name in enumerate(weights)
    }
    checkpoint = {"state_dict": weights, "optimizer_states": [{"state": state, "param_groups": []}]}
    encoded = assert_stable(QuantizedCheckpointIO(checkpoint=preset), checkpoint, tmp_path, generations=10)
    kinds = 2 if (dtype == torch.bfloat16 and preset == "precise") else 3
    # Six bits turn the direction of heavy tails by more than the limit, and 16 save nothing over bfloat16.
    raw = 1 if (dtype == torch.bfloat16 and preset == "resume") else 0
    assert len(encoded) == kinds * len(weights) - raw


@pytest.mark.parametrize("model", [Autoencoder, lambda: Autoencoder("sgd"), TwoOptimizers], ids=["adamw", "sgd", "two"])
def test_a_chain_of_resumed_trainers_changes_nothing(model: Any, preset: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[QuantizationCallback(preset)])
    trainer.fit(model())
    trainer.save_checkpoint(tmp_path / "0.ckpt")
    first, steps = payloads_of(tmp_path / "0.ckpt"), trainer.global_step
    assert first
    for generation in range(1, 4):
        trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[QuantizationCallback(preset)])
        trainer.fit(model(), ckpt_path=tmp_path / f"{generation - 1}.ckpt")
        assert trainer.global_step == steps, "the chain is of resumes without a further step"
        trainer.save_checkpoint(tmp_path / f"{generation}.ckpt")
        again = payloads_of(tmp_path / f"{generation}.ckpt")
        assert list(again) == list(first)
        assert all(same_parts(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("coarse", "fine"), [("compact", "resume"), ("compact", "precise"), ("resume", "precise")], ids=lambda name: name
)
def test_a_finer_preset_in_between_changes_nothing(coarse: str, fine: str, tmp_path: Path) -> None:
    """A finer codec moves a value by less than half a step of the coarser one, and keeps what scales depend on."""
    weights, squares = hard_tensors(torch.float32, negative=True), hard_tensors(torch.float32, negative=False)
    state = {i: {"exp_avg": weights[name].roll(1), "exp_avg_sq": squares[name]} for i, name in enumerate(weights)}
    checkpoint: dict[str, Any] = {
        "state_dict": weights,
        "optimizer_states": [{"state": state, "param_groups": []}],
    }
    path, found = tmp_path / "a.ckpt", []
    for name in (coarse, fine, coarse):
        policy = replace(CheckpointPolicy.of(name), min_sqnr_db=None, max_update_direction_error=None)
        QuantizedCheckpointIO(checkpoint=policy).save_checkpoint(checkpoint, path)
        found.append(payloads_of(path))
        checkpoint = load(path)
    assert len(found[0]) == 3 * len(weights)
    assert not any(same_parts(found[0][key], found[1][key]) for key in found[0])
    assert [key for key in found[0] if not same_parts(found[0][key], found[2][key])] == []
