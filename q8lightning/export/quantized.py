"""Write the quantized weights of a QAT checkpoint, as plain floats or as codes.

Reading a file of codes needs nothing but torch::

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
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.file.read import read_checkpoint
from q8lightning.checkpoint.file.write import write_checkpoint
from q8lightning.checkpoint.format import check_version
from q8lightning.checkpoint.loading import keep_encoded
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.qat_codes import Codes, read_codes
from q8lightning.checkpoint.sections import CODES_KEY, FOR_TRAINING, STATE_DICT, SUMMARY_KEY, summary_in
from q8lightning.checkpoint.sharded.open_folder import OpenFolder, is_folder
from q8lightning.checkpoint.sharded.read_codes import codes_in
from q8lightning.checkpoint.sharded.unread import UnreadTensor
from q8lightning.quantization.spec.packed_bits import pack_bits
from q8lightning.system.ambient import neutral


@neutral()
def export_quantized(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: Literal["float", "codes"] = "float",
    weights_only: bool = True,
) -> None:
    """Write the quantized weights of a checkpoint that was saved during QAT, without what only training needs.

    Args:
        checkpoint: The checkpoint, a file or the folder of a sharded one. Of a folder, every weight is read and written
            whole.
        path: The file to write.
        format: ``"float"`` writes a Lightning checkpoint with the very weights that the forward pass used, which
            ``load_from_checkpoint`` and ``torch.load`` read without this package. ``"codes"`` writes packed codes,
            scales and levels of the quantized weights, and all other tensors as they are. The end of ``docs/qat.md``
            and the head of :mod:`q8lightning.export.quantized` show a reader.
        weights_only: As for ``torch.load``. Pass False for a checkpoint of your own that holds other objects.

    Raises:
        ValueError: If the format is unknown, a weight is not finite, or the checkpoint does not hold quantized weights,
            since it was not saved during QAT, or its last step was before ``start_step`` or after ``end_step``.
        CorruptCheckpointError: If the checkpoint is damaged.
        NewerFormatError: If the checkpoint was written in a later format than this version reads.
    """
    if format not in ("float", "codes"):
        raise ValueError(f'format is "float" or "codes", got {format!r}')
    folder = OpenFolder(checkpoint, trust=not weights_only) if is_folder(checkpoint) else None
    if folder is not None:
        loaded = folder.content()
    else:
        with explained(checkpoint), keep_encoded():
            loaded = read_checkpoint(checkpoint, partial(torch.load, map_location="cpu", weights_only=weights_only))
    check_version(loaded.get(SUMMARY_KEY))
    entries = summary_in(loaded).get(CODES_KEY)
    if not entries:
        raise ValueError(
            f"{os.fspath(checkpoint)} says nothing of quantized weights; export a checkpoint that a Trainer with"
            " QuantizationCallback(qat=...) saved, as the Trainer wrote it, after a step from start_step to end_step"
        )
    with explained(checkpoint) if folder is None else nullcontext():  # which knows its files
        state = _exported_state(loaded[STATE_DICT], entries, format, folder)
    if format == "codes":
        write_checkpoint({"format": "q8lightning codes", "version": 1, "state_dict": state}, Path(path))
        return
    plain = {key: value for key, value in loaded.items() if key not in (*FOR_TRAINING, SUMMARY_KEY)}
    write_checkpoint(plain | {STATE_DICT: state}, Path(path))


def _exported_state(
    loaded: Mapping[str, Any], entries: Mapping[str, Any], format: str, folder: OpenFolder | None
) -> dict[str, Any]:
    tied: dict[Any, Any] = {}
    state: dict[str, Any] = {}
    for name, value in loaded.items():
        identity = _identity(value)
        if identity not in tied:
            tied[identity] = _exported(name, value, entries.get(name), format, folder)
        state[name] = tied[identity]
    return state


def _identity(value: Any) -> Any:
    """Return a key that is equal for tied tensors only, which are objects of their own over the same memory."""
    if isinstance(value, Tensor) and value.layout is torch.strided and value.numel():
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    return id(value)


def _exported(name: str, value: Any, entry: Mapping[str, Any] | None, format: str, folder: OpenFolder | None) -> Any:
    if isinstance(value, QuantizedTensor):
        value.verify()  # decoding would do so, but codes are read without it
    if entry is None and isinstance(value, UnreadTensor):
        return value.read()
    if entry is None:
        return value.decode() if isinstance(value, QuantizedTensor) else value
    codes = read_codes(value, entry) if folder is None else codes_in(folder, name)
    if not bool(codes[2].isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity, which has no codes; export a checkpoint from before it did")
    return _plain_codes(codes) if format == "codes" else _values(codes)


def _values(weight: Codes) -> Tensor:
    codec, codes, scales, like = weight
    return codec.decode(codes, scales, like)


def _plain_codes(weight: Codes) -> dict[str, Any]:
    """Return codes, scales and levels as primitives and tensors, for readers without this package."""
    codec, codes, scales, like = weight
    if codec.axis is None:
        strides = like.stride()
        order = sorted(range(like.ndim), key=lambda dimension: -strides[dimension])
    else:
        order = [codec.axis, *(dimension for dimension in range(like.ndim) if dimension != codec.axis)]
    return {
        "codes": pack_bits(codes, codec.bits),
        "scales": scales.clone(),
        "levels": codec.book.tensor().clone(),
        "bits": codec.bits,
        "rows": codes.shape[0],
        "row": codes.shape[1],
        "block_size": codec.block_size,
        "dtype": like.dtype,
        "shape": [like.shape[dimension] for dimension in order],
        "order": [order.index(dimension) for dimension in range(like.ndim)],
    }
