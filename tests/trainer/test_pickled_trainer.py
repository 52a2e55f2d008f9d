"""A Trainer with the callback is copied and pickled whenever one without it can be, and the copy quantizes as well.

Covered: ``pickle``, ``torch.save`` and ``copy.deepcopy``, of the Trainer, its strategy, its loops and its callbacks,
before a fit, during one after a save, and after it; saves in the background, saves not in the background, and training
with quantized weights.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.models import Autoencoder, quiet_trainer

from q8lightning import QATConfig, QuantizationCallback, QuantizedCheckpointIO, WeightRule

QAT = QATConfig([WeightRule(codebook="int4", block_size=64)])


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def by_torch(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [by_pickle, by_torch, copy.deepcopy]


class Copies(pl.Callback):
    """Copies the Trainer and its parts in the middle of a fit, after a save in the same hook."""

    copied: Any = None
    make: Callable[[Any], Any] = staticmethod(copy.copy)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "during.ckpt")
            make, self.make = self.make, copy.copy
            for part in (trainer.callbacks, trainer.fit_loop, trainer.strategy):  # type: ignore[attr-defined]
                make(part)
            copied, self.copied = make(trainer), None
            self.copied = copied


def trainer_for(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    saves = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    return quiet_trainer(
        folder,
        max_steps=2,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[QuantizationCallback("compact", **options), *callbacks, saves],
    )


def check(trainer: pl.Trainer, folder: Path) -> None:
    """Save with a Trainer that was copied, let it run again, and look at what it saves then."""
    found = trainer.strategy.checkpoint_io
    folder.mkdir()
    if trainer.lightning_module is None:
        trainer.strategy.connect(Autoencoder())
    trainer.save_checkpoint(folder / "saved.ckpt")
    trainer.strategy.checkpoint_io.teardown()
    saved = torch.load(folder / "saved.ckpt", weights_only=True)
    assert saved["q8lightning"]["tensors"].keys() >= {"state_dict.encoder.0.weight", "state_dict.decoder.weight"}
    torch.testing.assert_close(
        saved["state_dict"]["decoder.weight"], trainer.lightning_module.decoder.weight.detach(), atol=0.01, rtol=0
    )
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(trainer.lightning_module)
    trainer.save_checkpoint(folder / "fitted.ckpt")
    fitted = torch.load(folder / "fitted.ckpt", weights_only=True)
    assert fitted["global_step"] == 4
    assert fitted["q8lightning"]["metrics"].keys() >= saved["q8lightning"]["metrics"].keys()
    io = trainer.strategy.checkpoint_io
    assert type(io) is QuantizedCheckpointIO
    assert isinstance(found, QuantizedCheckpointIO) == (found is io)
    assert io.describe_model is not None
    assert io.describe_model.trainer is trainer  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, {"async_save": True}, {"qat": QAT}], ids=["sync", "async", "qat"])
@pytest.mark.parametrize("make", COPIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_copied_trainer_saves_quantized_and_runs_again(
    when: str, make: Callable[[Any], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copies = Copies()
        trainer = trainer_for(tmp_path, copies, **options)
        copied = make(trainer) if when == "before" else None
        copies.make = make if when == "during" else copy.copy  # type: ignore[method-assign]
        trainer.fit(Autoencoder())
        copied = {"before": copied, "during": copies.copied, "after": None}[when] or make(trainer)
        before = dict(trainer.callback_metrics)
        assert copied.strategy is not trainer.strategy
        check(copied, tmp_path / "copy")
        assert dict(trainer.callback_metrics) == before  # what the copy saved it recorded for itself
        check(trainer, tmp_path / "original")


@pytest.mark.parametrize("make", COPIES, ids=lambda make: make.__name__)
def test_a_trainer_that_has_trained_quantized_weights_is_copied_with_what_it_knows(
    make: Callable[[Any], Any], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(tmp_path, qat=QAT)
        trainer.fit(Autoencoder())
        copied = make(trainer)
        copied.save_checkpoint(tmp_path / "copied.ckpt")
        trainer.save_checkpoint(tmp_path / "original.ckpt")
        entries = [
            torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["q8lightning"]["qat"]
            for name in ("copied", "original")
        ]
        assert entries[0].keys() == entries[1].keys() >= {"decoder.weight"}
        check(copied, tmp_path / "copy")
