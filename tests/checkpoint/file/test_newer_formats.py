"""What a later version wrote is refused by what this one does not know of it; it is never read as something else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import edit_pickle
from support.models import Autoencoder, train_and_save
from support.promises import load, same_bits
from torch import Tensor

from q8lightning import (
    CorruptCheckpointError,
    NewerFormatError,
    QuantizationCallback,
    QuantizedCheckpointIO,
    QuantizedTensor,
    export_quantized,
    keep_encoded,
)
from q8lightning.checkpoint import payload
from q8lightning.checkpoint.file.write import write_checkpoint
from q8lightning.checkpoint.format import FORMAT_VERSION
from q8lightning.checkpoint.integrity import bytes_of, checksum
from q8lightning.checkpoint.payload import rebuild_v1
from q8lightning.quantization.codecs.table import get_codec

GOLDEN = Path(__file__).parents[2] / "golden"
NAME = "state_dict.weight"
SAYS = r"format version 2, which this installation \(format version 1\) does not know; upgrade q8lightning"

DOORS: dict[str, Callable[[Path], Any]] = {
    "torch.load": lambda path: torch.load(path, weights_only=True),
    "torch.load, everything": lambda path: torch.load(path, weights_only=False),
    "torch.load, mapped": lambda path: torch.load(path, weights_only=True, mmap=True),
    "the IO": lambda path: QuantizedCheckpointIO().load_checkpoint(path),
    "the IO, weights": lambda path: QuantizedCheckpointIO().load_checkpoint(path, weights_only=True),
    "the IO, everything": lambda path: QuantizedCheckpointIO().load_checkpoint(path, weights_only=False),
}
door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


class Call:
    """Pickles as a call of this function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def later(codec: dict[str, Any] | None = None, right: bool = True, **entries: Any) -> Call:
    """Return a payload of this version with other entries of the codec or the header, and a checksum of all that."""
    encoded = QuantizedTensor.encode(torch.linspace(-1, 1, 4096).view(64, 64), get_codec("softsign"), NAME)
    header = json.loads(encoded.header)
    return described({**header, "codec": {**header["codec"], **(codec or {})}, **entries}, encoded.data, right)


def described(header: dict[str, Any], data: Tensor, right: bool = True) -> Call:
    """Return a payload with this header and a checksum of it."""
    text = json.dumps(header)
    return Call(rebuild_v1, "tensor", text, checksum(text, bytes_of(data)) ^ (not right), data, 0, len(data))


def save(folder: Path, weight: Any, **more: Any) -> Path:
    torch.save({"state_dict": {"weight": weight}, **more}, folder / "later.ckpt")
    return folder / "later.ckpt"


# The version


@door
@pytest.mark.parametrize("version", [2, 9])
def test_a_file_that_calls_the_function_of_a_later_version_is_refused(
    door: Callable[[Path], Any], version: int, tmp_path: Path
) -> None:
    """Whatever it calls it for comes later in the file: that no reader of this version gets to."""
    path = save(tmp_path, Call(rebuild_v1, "anything", {"of": "a later version"}))
    edit_pickle(path, b"payload\nrebuild_v1\n", b"payload\nrebuild_v%d\n" % version)
    with pytest.raises(NewerFormatError, match=SAYS.replace("2", str(version), 1)):
        door(path)


@pytest.mark.parametrize("weights_only", [True, False])
def test_our_doors_know_the_names_of_all_versions(weights_only: bool, tmp_path: Path) -> None:
    path = save(tmp_path, Call(rebuild_v1, "anything"))
    edit_pickle(path, b"payload\nrebuild_v1\n", b"payload\nrebuild_v12\n")
    with pytest.raises(NewerFormatError, match=SAYS.replace("2", "12", 1)):
        QuantizedCheckpointIO().load_checkpoint(path, weights_only=weights_only)


def test_a_summary_of_a_later_version_is_refused_by_the_io(tmp_path: Path) -> None:
    path = save(tmp_path, torch.randn(64, 64), q8lightning={"format_version": 2})
    with pytest.raises(NewerFormatError, match=SAYS):
        QuantizedCheckpointIO().load_checkpoint(path)


def test_a_trainer_says_so_too(tmp_path: Path) -> None:
    trainer = train_and_save(tmp_path, Autoencoder(), QuantizationCallback(), max_steps=1)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["q8lightning"]["format_version"] = 2
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(NewerFormatError, match="upgrade q8lightning"):
        trainer.validate(ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_there_is_one_number() -> None:
    """The function that files call has the number that their summary says."""
    assert rebuild_v1.__name__ == f"rebuild_v{FORMAT_VERSION}"
    assert f"rebuild_v{FORMAT_VERSION + 1}" in payload.LATER


def test_an_unknown_name_of_the_module_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = payload.no_such_name


@pytest.mark.parametrize(("version", "entry"), [(2, {}), (1, {"scale_dtype": "float16"})], ids=str)
def test_codes_that_would_be_exported_as_something_else_are_refused(
    version: int, entry: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = load(GOLDEN / "codecs_v1.ckpt")
    export_quantized(GOLDEN / "codecs_v1.ckpt", tmp_path / "codes.pt", format="codes")
    checkpoint["q8lightning"]["format_version"] = version
    checkpoint["q8lightning"]["qat"]["rows.weight"] |= entry
    torch.save(checkpoint, tmp_path / "later.ckpt")
    says = "format version 2" if version == 2 else r"weights that were trained quantized with \['scale_dtype'\]"
    with pytest.raises(NewerFormatError, match=f"{says}.*upgrade q8lightning"):
        export_quantized(tmp_path / "later.ckpt", tmp_path / "codes.pt", format="codes")


# Within the version


@door
@pytest.mark.parametrize(
    ("codec", "entries", "says"),
    [
        ({"name": "row_and_column"}, {}, r"codec .*'name': 'row_and_column'.* for the tensor state_dict\.weight"),
        ({"bits": 9}, {}, r"codec .*'bits': 9"),
        ({"bits": 1}, {}, r"codec .*'bits': 1"),
        ({"residual_bits": 4}, {}, r"codec .*'residual_bits': 4"),
        ({"scale_dtype": "float8_e8m0fnu"}, {}, r"codec .*'scale_dtype': 'float8_e8m0fnu'"),
        ({"scale_dtype": "float32"}, {}, r"codec .*'scale_dtype': 'float32'"),
        ({"block_size": 48}, {}, r"codec .*'block_size': 48"),
        ({"rows": 64}, {}, r"codec .*'rows': 64"),
        ({}, {"dtype": "float8_e4m3fn"}, r"dtype float8_e4m3fn for the tensor state_dict\.weight"),
        ({}, {"dtype": "load"}, "dtype load"),
    ],
    ids=str,
)
def test_a_payload_that_would_be_read_as_something_else_is_refused(
    door: Callable[[Path], Any], codec: dict[str, Any], entries: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = save(tmp_path, later(codec, **entries))
    with pytest.raises(NewerFormatError, match=f"{says}.*upgrade q8lightning"):
        door(path)
    with keep_encoded(), pytest.raises(NewerFormatError, match=says):
        load(path)


def test_a_codec_that_lacks_what_this_version_must_know_is_refused() -> None:
    _, (_, text, _, data, *_) = later().__reduce__()
    header = json.loads(text)
    codec = {key: value for key, value in header["codec"].items() if key != "block_size"}
    function, arguments = described({**header, "codec": codec}, data).__reduce__()
    with pytest.raises(NewerFormatError, match="codec"):
        function(*arguments)


def test_a_payload_with_another_checksum_is_refused() -> None:
    function, (what, header, _, *place) = later().__reduce__()
    with pytest.raises(NewerFormatError, match=r"checksum \('blake3', 7\) for the tensor state_dict\.weight"):
        function(what, header, ("blake3", 7), *place)


@door
def test_other_content_is_refused(door: Callable[[Path], Any], tmp_path: Path) -> None:
    path = save(tmp_path, Call(rebuild_v1, "sparse", torch.zeros(3)))
    with pytest.raises(NewerFormatError, match=r"content of the kind 'sparse'.*upgrade q8lightning"):
        door(path)


@door
def test_what_was_damaged_is_not_called_newer(door: Callable[[Path], Any], tmp_path: Path) -> None:
    path = save(tmp_path, later({"name": "softsigm"}, right=False))
    with pytest.raises(CorruptCheckpointError, match=r"the tensor state_dict\.weight"):
        door(path)


def test_other_broken_files_are_not_called_newer(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(Exception) as error:  # noqa: PT011 (torch's choice)
        QuantizedCheckpointIO().load_checkpoint(tmp_path / "broken.ckpt")
    assert not isinstance(error.value, NewerFormatError)


def test_what_a_later_writer_added_without_a_change_of_meaning_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, later(written_by="a later release"), q8lightning={"format_version": 1, "x": 2})
    found = QuantizedCheckpointIO().load_checkpoint(path)["state_dict"]["weight"]
    function, arguments = later().__reduce__()
    assert same_bits(found, function(*arguments))


def test_what_a_later_writer_added_stays_when_the_payload_is_saved_again(tmp_path: Path) -> None:
    """The checksum covers it, and is kept."""
    path = save(tmp_path, later(written_by="a later release"))
    with keep_encoded():
        encoded = load(path)["state_dict"]["weight"]
    write_checkpoint({"state_dict": {"weight": encoded}}, tmp_path / "again.ckpt")
    assert same_bits(load(tmp_path / "again.ckpt")["state_dict"]["weight"], encoded.decode())
    with keep_encoded():
        assert '"written_by": "a later release"' in load(tmp_path / "again.ckpt")["state_dict"]["weight"].header
