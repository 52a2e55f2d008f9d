"""Compress a checkpoint as the callback would have saved it, and decompress it to one that needs no q8lightning."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from q8lightning.checkpoint.encode.state_dict import SUMMARY_KEY
from q8lightning.checkpoint.file.archive import verified
from q8lightning.checkpoint.file.small_tensors import SmallTensors
from q8lightning.checkpoint.file.write import write_durably
from q8lightning.checkpoint.file.zip_writer import SharedMemory
from q8lightning.checkpoint.format import FORMAT_VERSION
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.qat_codes import CODES_KEY
from q8lightning.tools.encoder import Conversion, Encoder, Progress, Work, without_summary
from q8lightning.tools.source import CommandError, Source, leaves
from q8lightning.tools.stream import Replace, Store, Stored, write_stream


def _silent(done: int, total: int) -> None:
    """Show no progress."""


def compress(source: Source, target: Path, policy: CheckpointPolicy, progress: Progress = _silent) -> Conversion:
    """Write what the callback would have saved in the place of ``source``; one tensor at a time is in memory.

    Entries of the state dict count as parameters, because a checkpoint does not tell buffers from them. Tensors that
    are encoded already stay as they are, unless the policy makes them smaller.

    Raises:
        CommandError: If nothing becomes smaller; nothing is written then.
        CorruptCheckpointError: If ``source`` is damaged; nothing is written then.
        OSError: If the target cannot be written.
    """
    if not isinstance(source.content, Mapping):
        raise CommandError(f"{source.path} holds {type(source.content).__name__}, not the dict that a checkpoint is")
    small = SmallTensors(source.content, policy.min_numel, lambda storage: source.locations.get(storage._cdata, "cpu"))
    try:
        return _compress(source, target, policy, progress, small)
    except SharedMemory:
        return _compress(source, target, policy, progress, SmallTensors(()))


def _compress(
    source: Source, target: Path, policy: CheckpointPolicy, progress: Progress, small: SmallTensors
) -> Conversion:
    encoder = Encoder(source, policy, progress)

    def check() -> None:
        if not encoder.done.converted:
            raise CommandError(_why_nothing(source, encoder.done))

    _convert(source, target, encoder.content, encoder, check, small)
    return encoder.done


def decompress(source: Source, target: Path, progress: Progress = _silent) -> Conversion:
    """Write ``source`` with ordinary tensors, which ``torch.load`` reads without q8lightning.

    What the checkpoint says about its encoding is left out, except what stays true without it: how weights that were
    trained quantized are, and how often the run was restored from a quantized checkpoint, unless that is never.

    Raises:
        CommandError: If nothing in it is encoded.
        CorruptCheckpointError: If ``source`` is damaged; nothing is written then.
        OSError: If the target cannot be written.
    """
    if not any(isinstance(value, QuantizedTensor) for _, value in leaves(source.content)):
        raise CommandError(f"{source.path} holds no quantized tensor; it loads without q8lightning as it is")
    content = source.content
    if source.summary:
        content = without_summary(content)
        left = {key: source.summary[key] for key in ("restored", CODES_KEY) if source.summary.get(key)}
        if left:
            content[SUMMARY_KEY] = {"format_version": FORMAT_VERSION, "policy": None, "restored": 0, **left}
    decoder = _Decoder(source, progress)
    _convert(source, target, content, decoder)
    return decoder.done


def _convert(
    source: Source,
    target: Path,
    content: Any,
    replace: Replace,
    check: Callable[[], None] = lambda: None,
    small: SmallTensors | None = None,
) -> None:
    """Write ``content``; ``check`` runs before the file takes its name."""

    def write(file: IO[bytes]) -> None:
        with verified(source.file):  # or damage would get a new sum, and never be found
            write_stream(content, file, replace, lambda storage: source.locations.get(storage, "cpu"), small)
        check()

    try:
        write_durably(target, write)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error  # not every one knows the file


def _why_nothing(source: Source, done: Conversion) -> str:
    if done.kept:
        return (
            f"nothing to compress: the {done.kept} quantized tensors of {source.path} are as small as the policy makes"
            " them, and it selects no others; use the file as it is"
        )
    if done.warnings:
        return f"nothing to compress: every tensor that the policy selects stays as it is; {done.warnings[0]}"
    return (
        f"nothing to compress: the policy selects no tensor of {source.path} that is large enough and finite (its"
        f" sections: {', '.join(map(str, list(source.content)[:8]))}); `q8lightning inspect` shows its paths, --policy"
        " takes rules for them"
    )


class _Decoder(Work):
    """Replaces payloads by their values."""

    def __init__(self, source: Source, progress: Progress) -> None:
        payloads = [value for _, value in leaves(source.content) if isinstance(value, QuantizedTensor)]
        super().__init__(payloads, progress)
        self._source = source
        self._stored: dict[int, Stored] = {}

    def __call__(self, value: Any, store: Store) -> Any:
        if not isinstance(value, QuantizedTensor):
            return value
        if id(value) not in self._stored:
            self._stored[id(value)] = store(self._source.values(value), self._source.location(value))
            self.done.converted += 1
            self.advance(value)
        return self._stored[id(value)]
