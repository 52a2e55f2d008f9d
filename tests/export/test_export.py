"""Exports keep ties, and work from every file that a Trainer wrote under QAT.

=====================  ==========================================================================================
what is tied           quantized weights, small ones, excluded ones, weights encoded without being trained quantized
in                     both formats, files with and without encoded masters, whole and of weights only
what is not            equal weights, views of one storage that show different parts of it
=====================  ==========================================================================================
"""

import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.models import quiet_trainer
from support.straight_through import Trained, quantized
from torch import Tensor, nn

import q8lightning.export.quantized
from q8lightning import (
    ActivationRule,
    QATConfig,
    QuantizationCallback,
    QuantizedCheckpointIO,
    WeightRule,
    export_quantized,
)

INT4 = QATConfig([WeightRule("*", "int4", 64)])
SOME = QATConfig(INT4.weights, exclude=["*.plain*", "*.equal.*"])
TIES = [("weight", "again"), ("small", "small_again"), ("plain", "plain_again")]


class Ties(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.small, self.plain = (nn.Parameter(torch.randn(n, 64) / 8) for n in (64, 8, 64))
        self.again, self.small_again, self.plain_again = self.weight, self.small, self.plain
        self.equal = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
        self.equal[1].load_state_dict(self.equal[0].state_dict())
        whole = torch.randn(64, 64)
        self.register_buffer("rows", whole[:32])
        self.register_buffer("more_rows", whole[32:])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight @ self.again + x @ self.small.T @ self.small_again + x @ self.plain


def saved(folder: Path, checkpoint: Any, weights_only: bool, **options: Any) -> tuple[Trained, Path]:
    torch.manual_seed(0)
    model = Trained(Ties())
    callbacks = [QuantizationCallback(checkpoint, qat=SOME)]
    trainer = quiet_trainer(folder, max_steps=1, limit_val_batches=0, callbacks=callbacks, **options)
    trainer.fit(model)
    path = folder / "qat.ckpt"
    trainer.save_checkpoint(path, weights_only=weights_only)
    return model, path


def read_codes(path: Path) -> dict[str, Tensor]:
    namespace: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(q8lightning.export.quantized.__doc__.split("::\n\n", 1)[1]), namespace)
    state: dict[str, Tensor] = namespace["load_codes"](path)
    return state


def memory(tensor: Tensor) -> int:
    return tensor.data_ptr()


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
@pytest.mark.parametrize("checkpoint", ["resume", "compact", None])
def test_every_file_of_a_qat_run_is_exported_with_its_ties(
    checkpoint: str | None, weights_only: bool, tmp_path: Path
) -> None:
    model, path = saved(tmp_path, checkpoint, weights_only)
    export_quantized(path, tmp_path / "float.ckpt")
    export_quantized(path, tmp_path / "codes.pt", format="codes")
    exported = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    codes = torch.load(tmp_path / "codes.pt", weights_only=True)["state_dict"]
    read = read_codes(tmp_path / "codes.pt")
    assert list(exported) == list(codes) == list(read) == list(model.state_dict())
    for first, second in TIES:
        for state in (exported, read):
            assert memory(state[f"net.{first}"]) == memory(state[f"net.{second}"])
    for state in (exported, read):
        assert memory(state["net.equal.0.weight"]) != memory(state["net.equal.1.weight"])
        for name in ("weight", "small"):
            expected = quantized(getattr(model.net, name), "int4", 64)
            assert torch.equal(state[f"net.{name}"], expected)
            assert torch.equal(state[f"net.{name}_again" if name == "small" else "net.again"], expected)
        for name in ("rows", "more_rows"):
            assert torch.equal(state[f"net.{name}"], getattr(model.net, name))
    assert codes["net.weight"] is codes["net.again"]
    kilobytes = {name: (tmp_path / name).stat().st_size / 1024 for name in ("float.ckpt", "codes.pt")}
    # Of 16 kB each: the tied weight, the plain one, two equal ones and the two halves of the buffer; 2 kB small.
    assert 82 < kilobytes["float.ckpt"] < 90
    assert 66 < kilobytes["codes.pt"] < 78


def test_files_of_weights_only_by_a_model_checkpoint_are_exported(tmp_path: Path) -> None:
    model = Trained(nn.Sequential(nn.Linear(64, 64)))
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_weights_only=True)
    callbacks = [saving, QuantizationCallback(None, qat=INT4)]
    quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=True).fit(model)
    export_quantized(tmp_path / "step=2.ckpt", tmp_path / "float.ckpt")
    exported = torch.load(tmp_path / "float.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(exported["net.0.weight"], quantized(model.net[0].weight, "int4", 64))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_io_of_the_users_own_describes_every_file(weights_only: bool, tmp_path: Path) -> None:
    _, path = saved(tmp_path, None, weights_only, plugins=[QuantizedCheckpointIO()])
    assert set(torch.load(path, weights_only=True)["q8lightning"]["qat"]) >= {"net.weight", "net.again", "net.small"}


def test_what_is_described_is_added_to_a_copy_and_once_in_two_fits(tmp_path: Path) -> None:
    model = Trained(nn.Sequential(nn.Linear(64, 64)))
    seen: list[Any] = []

    class Strategy(pl.strategies.SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            seen.append((checkpoint, args, kwargs))

    callbacks = [QuantizationCallback(None, qat=INT4)]
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=callbacks, strategy=Strategy())
    trainer.fit(model)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(model)
    given = {"state_dict": model.state_dict(), "mine": 1}
    trainer.strategy.save_checkpoint(given, "path", storage_options={"a": 1})
    ((checkpoint, args, kwargs),) = seen
    assert "q8lightning" not in given
    assert (args, kwargs) == (("path",), {"storage_options": {"a": 1}})
    assert checkpoint == {**given, "q8lightning": checkpoint["q8lightning"]}
    assert list(checkpoint["q8lightning"]["qat"]) == ["net.0.weight"]
    trainer.strategy.save_checkpoint({"mine": 1}, "path")
    assert seen[-1][0] == {"mine": 1}


def test_a_file_without_a_description_is_refused_with_what_is_true(tmp_path: Path) -> None:
    model = Trained(nn.Sequential(nn.Linear(64, 64)))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"plain\.ckpt says nothing of quantized weights; export a checkpoint that a"):
        export_quantized(tmp_path / "plain.ckpt", tmp_path / "float.ckpt")


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("checkpoint", ["compact", None])
def test_a_checkpoint_whose_last_step_was_in_float_does_not_claim_to_be_quantized(
    checkpoint: Any, weights_only: bool, tmp_path: Path
) -> None:
    qat = QATConfig([WeightRule("*", "int4", 64)], start_step=1, end_step=3)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt", weights_only=weights_only)

    callbacks = [QuantizationCallback(checkpoint, qat=qat), Save()]
    trainer = quiet_trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(Trained(nn.Linear(64, 64)))
    trainer.save_checkpoint(tmp_path / "5.ckpt", weights_only=weights_only)
    for step in (1, 4, 5):
        with pytest.raises(ValueError, match="says nothing of quantized weights"):
            export_quantized(tmp_path / f"{step}.ckpt", tmp_path / "out")
    for step in (2, 3):
        export_quantized(tmp_path / f"{step}.ckpt", tmp_path / "out", "codes")
        assert isinstance(torch.load(tmp_path / "out")["state_dict"]["net.weight"], dict)


def test_what_was_not_trained_keeps_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """As of a model with LoRA, whose frozen base is not trained quantized."""
    qat = QATConfig([WeightRule("net.0.weight", "int4", 64)])
    model = Trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1024), nn.Linear(1024, 64)))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback(qat=qat)])
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "qat.ckpt", weights_only=True)
    sizes = {}
    for dtype in (None, torch.bfloat16, "float16"):
        export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", "codes", dtype=dtype)
        state = torch.load(tmp_path / "codes.pt")["state_dict"]
        assert state["net.1.weight"].dtype == {None: torch.float32, "float16": torch.float16}.get(dtype, dtype)
        assert state["net.0.weight"]["dtype"] == torch.float32
        sizes[dtype] = (tmp_path / "codes.pt").stat().st_size
    assert sizes[torch.bfloat16] < 0.52 * sizes[None]
    for wrong in ("int8", "int", torch.int32, 16):
        with pytest.raises(ValueError, match=r"dtype is a float dtype such as torch\.bfloat16"):
            export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", "codes", dtype=wrong)  # type: ignore[arg-type]


def test_inputs_that_a_format_has_no_place_for_are_said(tmp_path: Path) -> None:
    qat = QATConfig([WeightRule("*", "int4", 64)], activations=[ActivationRule("net.0")])
    for checkpoint in ("resume", None):
        trainer = quiet_trainer(
            tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback(checkpoint, qat=qat)]
        )
        trainer.fit(Trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))))
        trainer.save_checkpoint(tmp_path / "qat.ckpt")
        said = torch.load(tmp_path / "qat.ckpt", weights_only=True)["q8lightning"]["qat_inputs"]
        assert said == {"net.0": {"codebook": "linear", "per": "token"}}
        with pytest.warns(UserWarning, match=r"the inputs of net\.0 were trained quantized, and 'codes' has"):
            export_quantized(tmp_path / "qat.ckpt", tmp_path / "codes.pt", "codes")
