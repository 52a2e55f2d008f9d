"""Without ``qat``, no code of QAT runs in the callback."""

import pickle
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytest
from support.models import Autoencoder, quiet_trainer

import q8lightning
from q8lightning import QATConfig, QuantizationCallback, WeightRule

PACKAGE = Path(q8lightning.__file__).parent
PARTS = (str(PACKAGE / "qat"), str(PACKAGE / "trainer" / "qat_training.py"), str(PACKAGE / "trainer" / "engage.py"))
QAT = QATConfig([WeightRule(codebook="int4", block_size=64)])


def functions_of_qat(callback: QuantizationCallback, folder: Path) -> set[str]:
    """Train, validate and save with a callback; return which functions of the QAT part ran."""
    ran: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PARTS):
            ran.add(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    trainer = quiet_trainer(folder, max_steps=2, limit_val_batches=1, val_check_interval=1, callbacks=[callback])
    sys.setprofile(note)
    try:
        trainer.fit(Autoencoder())
        trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
        trainer.validate(ckpt_path=str(folder / "weights.ckpt"), weights_only=False)
    finally:
        sys.setprofile(None)
    return ran


@pytest.mark.parametrize("checkpoint", ["resume", None])
def test_without_qat_none_of_its_code_runs(checkpoint: Any, tmp_path: Path) -> None:
    assert functions_of_qat(QuantizationCallback(checkpoint), tmp_path / "without") == set()
    ran = functions_of_qat(QuantizationCallback(checkpoint, qat=QAT), tmp_path / "with")
    assert len(ran) > 30  # what was looked for is there


def test_the_callback_has_the_part_only_if_it_was_asked_for() -> None:
    assert QuantizationCallback.__bases__ == (pl.Callback,)
    plain, qat = QuantizationCallback(), QuantizationCallback(qat=QAT)
    assert plain.qat is plain.qat_training is None
    assert plain.statistics == plain.codecs(pl.Trainer(logger=False, barebones=True)) == {}
    assert qat.qat == QAT
    assert pickle.loads(pickle.dumps(qat)).qat == QAT
