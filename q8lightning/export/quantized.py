"""Export the quantized weights of a QAT checkpoint to the formats that people deploy.

A file of ``codes`` needs nothing but torch to be read::

    def load_codes(path):
        state, tensors = torch.load(path, weights_only=True)["state_dict"], {}
        for name, q in state.items():
            if isinstance(q, dict):
                bits = (q["codes"][:, None] >> torch.arange(8)) & 1
                bits = bits.flatten()[: q["rows"] * q["row"] * q["bits"]].view(q["rows"], q["row"], q["bits"])
                levels = q["levels"][(bits << torch.arange(q["bits"])).sum(-1)]
                scales = q["scales"].repeat_interleave(q["block_size"], 1)[:, : q["row"]]
                tensor = (levels * scales).to(q["dtype"]).view(q["shape"]).permute(q["order"])
                state[name] = tensors.setdefault(id(q), tensor)  # tied weights share an entry
        return state
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.format import NewerFormatError
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.export.errors import ExportError
from q8lightning.export.formats import bitsandbytes, codes, compressed_tensors, floats, gguf, safetensors, torchao
from q8lightning.export.options import Naming, Options, Rename, as_mapping
from q8lightning.export.weights import Source
from q8lightning.system.ambient import neutral
from q8lightning.system.arguments import check_bool, did_you_mean
from q8lightning.tools.open_checkpoint import OpenCheckpoint, ToolError, open_checkpoint

Format = Literal["float", "codes", "safetensors", "gguf", "bitsandbytes", "compressed-tensors", "torchao"]
"""The formats, by their names."""

FORMATS: tuple[str, ...] = get_args(Format)

_WRITERS: dict[str, Callable[[Source, Path, Options], None]] = {
    "float": floats.write,
    "codes": codes.write,
    "safetensors": safetensors.write,
    "gguf": gguf.write,
    "bitsandbytes": bitsandbytes.write,
    "compressed-tensors": compressed_tensors.write,
    "torchao": torchao.write,
}
"""What writes a format. It refuses what the format cannot hold before it writes anything."""


@neutral()
def export_quantized(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: Format = "float",
    weights_only: bool = True,
    *,
    prefix: str = "",
    rename: Rename | None = None,
    transpose: Sequence[str] = (),
    as_floats: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    config: Any = None,
    metadata: Mapping[str, Any] | None = None,
    round_scales: bool = False,
) -> None:
    """Write the quantized weights of a checkpoint that was saved during QAT, without what only training needs.

    One tensor at a time is in memory. Tied weights stay tied. docs/deploy.md says what to train for which format, and
    how to load it there.

    Args:
        checkpoint: The checkpoint, a file or the folder of a sharded one.
        path: The file to write; a folder for ``"bitsandbytes"`` and ``"compressed-tensors"``.
        format: One of these.

            - ``"float"``: a Lightning checkpoint with the very weights that the forward pass used, which
              ``load_from_checkpoint`` and ``torch.load`` read without this package.
            - ``"codes"``: packed codes, scales and levels of the quantized weights, and all other tensors as they are.
              The end of ``docs/qat.md`` and the head of :mod:`q8lightning.export.quantized` show a reader.
            - ``"safetensors"``: the same floats for every library that reads safetensors, such as transformers.
            - ``"gguf"``: codes as Q4_0 and Q8_0, and floats, for llama.cpp.
            - ``"bitsandbytes"``: a folder whose linear layers transformers loads as NF4 or LLM.int8().
            - ``"compressed-tensors"``: a folder for vLLM and transformers, with codes of 2 to 8 bits in groups.
            - ``"torchao"``: a state dict with torchao's weight-only tensors of 2 to 8 bits.
        weights_only: As for ``torch.load``. Pass False for a checkpoint of your own that holds other objects.
        prefix: Export only the tensors whose name begins with it, without it. A LightningModule that keeps its model
            as ``self.net`` has the prefix ``"net."``.
        rename: Regular expressions and what replaces their matches in what is left of a name, in order; or a function
            from name to name.
        transpose: Patterns of names in the checkpoint of matrices that the target holds transposed, such as those of
            transformers' ``Conv1D``.
        as_floats: Patterns of names in the checkpoint of weights that are written as the floats that the forward pass
            used, not as codes: those of modules that the target does not quantize, such as embeddings.
        dtype: What floats become that were not trained quantized, such as ``torch.bfloat16`` or ``"bfloat16"``; None to
            leave them as they are.
        config: For formats that are folders: the model's configuration, a mapping, the path of a JSON file, or an
            object with ``to_dict()`` as transformers has it. ``quantization_config`` is added.
        metadata: For formats that have a place: keys and values of your own.
        round_scales: Write weights whose scales a format cannot hold exactly with the nearest ones that it can. What
            is exported then differs a little from what was trained.

    Raises:
        ExportError: If the format is unknown or cannot hold the weights, its library is not installed, a weight is not
            finite, or the checkpoint does not hold quantized weights, since it was not saved during QAT, or its last
            step was before ``start_step`` or after ``end_step``. It is a ``ValueError``. Nothing was written.
        ToolError: If the checkpoint is no checkpoint, or holds objects that ``weights_only`` refuses.
        OSError: If the checkpoint cannot be opened, or the target cannot be written.
        CorruptCheckpointError: If the checkpoint is damaged.
        NewerFormatError: If the checkpoint was written in a later format than this version reads.
    """
    check_bool("weights_only", weights_only)
    check_bool("round_scales", round_scales)
    if format not in FORMATS:
        raise ExportError(f"format is one of {', '.join(FORMATS)}, got {format!r}{did_you_mean(str(format), FORMATS)}")
    opened = _open(checkpoint, trust=not weights_only)
    source = Source(opened, Naming(prefix, rename, _listed(transpose), _listed(as_floats)), _float_dtype(dtype))
    if source.inputs and not _holds_inputs(source, format):
        some = ", ".join(list(source.inputs)[:3]) + (", ..." if len(source.inputs) > 3 else "")
        warnings.warn(
            f"the inputs of {some} were trained quantized, and {format!r} has no place for that: what loads it computes"
            ' with other inputs. "compressed-tensors" has a place',
            stacklevel=3,
        )
    _WRITERS[format](source, Path(path), Options(as_mapping(config), dict(metadata or {}), round_scales))


def _holds_inputs(source: Source, format: str) -> bool:
    """Whether a format says, or always does, what was done with inputs; LLM.int8() quantizes those of each token."""
    if format == "bitsandbytes":
        rules = {(each["codebook"], each["per"]) for each in source.inputs.values()}
        return rules == {("linear", "token")} and all(
            weight.codec is not None and weight.codec.book.name == "linear" for weight in source.quantized
        )
    return format == "compressed-tensors"


def _float_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ExportError(f"dtype is a float dtype such as torch.bfloat16, got {dtype}; leave it out to keep them")
    return found


def _listed(patterns: Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _open(checkpoint: str | os.PathLike[str], trust: bool) -> OpenCheckpoint:
    """Open a checkpoint; errors of a damaged one are those of every other door."""
    try:
        return open_checkpoint(checkpoint, trust)
    except ToolError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            raise cause from None
        if isinstance(cause, Exception):
            try:
                with explained(checkpoint):
                    raise cause
            except (CorruptCheckpointError, NewerFormatError):
                raise
            except Exception:  # the cause itself, of which the tool says more
                pass
        raise
