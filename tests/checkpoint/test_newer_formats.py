"""A file of a later version says so; it is never read as if it were one of this version."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Autoencoder, quiet_trainer

from q8lightning import NewerFormatError, QuantizationCallback, QuantizedCheckpointIO, QuantizedTensor
from q8lightning.checkpoint import payload
from q8lightning.checkpoint.payload import rebuild_v1
from q8lightning.quantization.codecs.table import get_codec

SAYS = r"format version 2, .*reads up to 1; upgrade q8lightning"


class LaterPayload:
    """Pickles as a payload of this version does, except for the header and the function it names."""

    def __init__(self, function: Any = rebuild_v1, **header: Any) -> None:
        encoded = QuantizedTensor.encode(torch.randn(64, 64), get_codec("softsign"), "state_dict.weight")
        _, (known, *parts) = encoded.__reduce__()
        self.function, self.arguments = function, ({**known, **header}, *parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def save(folder: Path, weight: Any, **more: Any) -> Path:
    torch.save({"state_dict": {"weight": weight}, **more}, folder / "later.ckpt")
    return folder / "later.ckpt"


@pytest.fixture
def renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that names ``rebuild_v2``, which exists only while the file is written."""

    def rebuild_v2(header: dict[str, Any], *parts: torch.Tensor) -> None: ...

    rebuild_v2.__module__, rebuild_v2.__qualname__ = payload.__name__, "rebuild_v2"
    with monkeypatch.context() as patch:
        patch.setitem(vars(payload), "rebuild_v2", rebuild_v2)
        return save(tmp_path, LaterPayload(rebuild_v2, format_version=2))


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_payload_of_a_later_format_is_refused_by_torch_load(weights_only: bool, tmp_path: Path) -> None:
    path = save(tmp_path, LaterPayload(format_version=2))
    with pytest.raises(NewerFormatError, match=SAYS):
        torch.load(path, weights_only=weights_only)


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_a_payload_of_a_later_format_is_refused_by_the_io(weights_only: bool | None, tmp_path: Path) -> None:
    path = save(tmp_path, LaterPayload(format_version=2))
    with pytest.raises(NewerFormatError, match=SAYS):
        QuantizedCheckpointIO().load_checkpoint(path, weights_only=weights_only)


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_a_file_that_names_a_later_function_is_refused_by_the_io(weights_only: bool | None, renamed: Path) -> None:
    with pytest.raises(NewerFormatError, match="upgrade q8lightning"):
        QuantizedCheckpointIO().load_checkpoint(renamed, weights_only=weights_only)


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_file_that_names_a_later_function_is_refused_by_torch_load(weights_only: bool, renamed: Path) -> None:
    with pytest.raises(NewerFormatError, match=r"format version 2, .* upgrade q8lightning"):
        torch.load(renamed, weights_only=weights_only)


def test_a_summary_of_a_later_format_is_refused_by_the_io(tmp_path: Path) -> None:
    path = save(tmp_path, torch.randn(64, 64), q8lightning={"format_version": 2})
    with pytest.raises(NewerFormatError, match=r"format version 2, .* upgrade q8lightning"):
        QuantizedCheckpointIO().load_checkpoint(path)


def test_a_trainer_says_so_too(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[QuantizationCallback()])
    trainer.fit(Autoencoder())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["q8lightning"]["format_version"] = 2
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(NewerFormatError, match="upgrade q8lightning"):
        trainer.validate(ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_what_an_older_writer_left_out_or_a_later_one_added_within_the_format_is_read(tmp_path: Path) -> None:
    path = save(
        tmp_path, LaterPayload(written_by="a later release of format 1"), q8lightning={"format_version": 1, "x": 2}
    )
    assert QuantizedCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].shape == (64, 64)


def test_other_broken_files_are_not_called_newer(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(Exception) as error:  # noqa: PT011 (torch's choice)
        QuantizedCheckpointIO().load_checkpoint(tmp_path / "broken.ckpt")
    assert not isinstance(error.value, NewerFormatError)


def test_an_unknown_name_of_the_module_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = payload.no_such_name
