"""Write a checkpoint as the callback would have saved it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from q8lightning.checkpoint.file.pack.small_tensors import SMALL, SmallTensors
from q8lightning.checkpoint.file.pack.zip_writer import SharedMemory
from q8lightning.checkpoint.layout.sections import path_of
from q8lightning.checkpoint.policy import PRESETS, CheckpointPolicy, Preset, Rule
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.checkpoint.tree import leaves, rebuild
from q8lightning.system.arguments import check_keys, check_patterns
from q8lightning.tools.convert.conversion import Conversion, check_target
from q8lightning.tools.convert.encode_parts import PartEncoder
from q8lightning.tools.open_checkpoint import OpenCheckpoint, Progress, ToolError, open_checkpoint, silent
from q8lightning.tools.tensors import tensors_in

PRESET_NAMES = tuple(PRESETS)
"""The names of policies."""


def compress(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    policy: Preset | CheckpointPolicy | Mapping[str, Any] = "resume",
    *,
    keep: Sequence[str] = (),
    overwrite: bool = False,
    trust: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Write ``source`` as the callback would have saved it; one tensor at a time is in memory.

    Entries of the state dict count as parameters, because a checkpoint does not distinguish buffers from them. Tensors
    that are encoded already stay as they are, unless the policy makes them smaller. A folder becomes one file; of it,
    all states of one parameter are in memory at a time.

    Args:
        source: The file or folder to read.
        target: The file to write.
        policy: ``"resume"``, ``"compact"``, ``"precise"``, a :class:`~q8lightning.CheckpointPolicy` or a mapping of its
            arguments.
        keep: Patterns of paths, such as ``state_dict.*.table``. Tensors that match are stored as they are.
        overwrite: Overwrite the target if it exists.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.
        progress: Called with the bytes of values encoded so far, and of all.

    Raises:
        ValueError: If the policy is not valid.
        ToolError: If nothing of a file becomes smaller, a pattern of ``keep`` matches nothing, the source cannot be
            read, or the target must not be written.
        CorruptCheckpointError: If the source is damaged; nothing is written then.
        NewerFormatError: If the source was written in a later format than this version reads.
        OSError: If the target cannot be written.

    Example:
        >>> from q8lightning.tools import compress
        >>> done = compress("plain.ckpt", "small.ckpt", "compact")  # doctest: +SKIP
        >>> done.ratio, done.metrics["weights/sqnr_db"]  # doctest: +SKIP
    """
    chosen, keep = policy_of(policy), check_patterns("keep", keep)
    chosen = replace(chosen, rules=[*(Rule(pattern) for pattern in keep), *chosen.rules])
    path = check_target(source, target, overwrite)
    opened = _with_small_tensors(open_checkpoint(source, trust))
    if not isinstance(opened.content, Mapping):
        raise ToolError(f"{opened.path} holds {type(opened.content).__name__}, not the dict that a checkpoint is")
    _check_kept(keep, opened)
    found = [leaf for _, leaf in leaves(opened.content)]
    small = SmallTensors(found, chosen.min_numel, lambda storage: opened.locations.get(storage._cdata, "cpu"))
    try:
        return _compress(opened, path, chosen, progress, small)
    except SharedMemory:
        return _compress(opened, path, chosen, progress, SmallTensors(()))


def _compress(
    opened: OpenCheckpoint, path: Path, policy: CheckpointPolicy, progress: Progress, small: SmallTensors
) -> Conversion:
    encoder = PartEncoder(opened, policy, progress)

    def check() -> None:
        if not encoder.converted and not (opened.in_shards and encoder.kept):
            raise ToolError(_why_nothing(encoder))

    return encoder.write(path, check, small)


def _with_small_tensors(opened: OpenCheckpoint) -> OpenCheckpoint:
    """Read the small tensors of a folder, which are stored together."""

    def read(value: Any) -> Any:
        return value.read() if isinstance(value, UnreadTensor) and value.decoded_bytes <= SMALL else value

    return replace(opened, content=rebuild(opened.content, read)) if opened.in_shards else opened


def policy_of(policy: str | CheckpointPolicy | Mapping[str, Any]) -> CheckpointPolicy:
    """Return the policy for a name, for arguments, or the policy itself.

    Raises:
        ValueError: If there is no such preset, or the arguments make no policy.
    """
    if not isinstance(policy, Mapping):
        return CheckpointPolicy.of(policy)
    check_keys("the policy", CheckpointPolicy, policy)
    return CheckpointPolicy(**policy)


def _check_kept(patterns: Sequence[str], opened: OpenCheckpoint) -> None:
    """Raise ToolError for a pattern that matches no tensor."""
    paths = [path_of(keys) for keys, _ in tensors_in(opened.content)]
    for pattern in patterns:
        if not any(Rule(pattern).matches(path, None) for path in paths):
            raise ToolError(
                f"{pattern!r}, to be kept as it is, matches no tensor of {opened.path}; patterns match whole paths,"
                f" such as {paths[0] if paths else 'state_dict.weight'!r}"
            )


def _why_nothing(encoder: PartEncoder) -> str:
    path = encoder.opened.path
    if encoder.kept:
        return (
            f"nothing to compress: the {encoder.kept} quantized tensors of {path} are as small as the policy makes"
            " them, and it selects no others; use the file as it is"
        )
    if encoder.warnings:
        return f"nothing to compress: every tensor that the policy selects stays as it is; {encoder.warnings[0]}"
    return (
        f"nothing to compress: the policy selects no tensor of {path} that is large enough and finite (its sections:"
        f" {', '.join(map(str, list(encoder.opened.content)[:8]))}); `q8lightning inspect` shows its paths, a policy of"
        " your own takes rules for them"
    )
