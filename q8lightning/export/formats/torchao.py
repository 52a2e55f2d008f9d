"""``torchao``: a state dict whose quantized weights are torchao's weight-only tensors, for ``torch.load``.

Codes of 8 bits become ``Int8Tensor``, and fewer ``IntxUnpackedToInt8Tensor``, which has a byte for a code and runs on
every device. A value is its code times the scale of its group of a row. For integers, our scale over a power of two is
that scale, to the bit. ::

    import torchao  # defines the tensors
    model.load_state_dict(torch.load("torchao.pt", weights_only=False), assign=True)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q8lightning.export.errors import library
from q8lightning.export.formats.floats import later, values_of, write_state
from q8lightning.export.holds import check_all, why_not_in_groups
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight
from q8lightning.tools.convert.write_tensor_by_tensor import Store

_REMEDY = 'WeightRule(..., "int4", block_size=128, axis=0, scale_dtype="bfloat16"), or "int8" and block_size="row"'


def write(source: Source, path: Path, options: Options) -> None:
    """Write the state dict alone."""
    quantization = library("torchao.quantization", "torchao")
    check_all(source, "torchao", _reason, _REMEDY)

    def entry(weight: Weight) -> Any:
        if weight.codec is None:
            return values_of(source, weight)
        return later(lambda store: _stored(_quantized(weight, quantization), store))

    write_state(source, path, None, entry)


def _reason(weight: Weight) -> str | None:
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it holds float32, float16 and bfloat16, not {str(weight.dtype).removeprefix('torch.')}"
    return why_not_in_groups(weight)


def _quantized(weight: Weight, quantization: Any) -> Tensor:
    assert weight.codec is not None
    assert weight.group is not None
    unit, (codes, scales) = weight.codec.book.scale_unit, weight.rows()
    signed = (codes.to(torch.int16) - int(unit)).to(torch.int8)
    scale, block = scales / unit, [1, weight.group]
    made: Tensor
    if weight.codec.bits == 8:
        made = quantization.Int8Tensor(signed, scale, block, weight.dtype)
    else:
        made = quantization.IntxUnpackedToInt8Tensor(
            signed, scale, torch.zeros_like(scale, dtype=torch.int8), getattr(torch, f"int{weight.codec.bits}"),
            tuple(block), weight.dtype, None,
        )  # fmt: skip
    return made


def _stored(made: Tensor, store: Store) -> Any:
    """Return what pickles as a tensor of torchao, whose parts are in the file already and take no memory."""
    reduced: Any = made.__reduce_ex__(2)  # type: ignore[no-untyped-call]
    function, arguments, *state = reduced
    return _Pickled(function, _replaced(arguments, store), *(_replaced(each, store) for each in state))


class _Pickled:
    def __init__(self, *reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return self._reduced


def _replaced(value: Any, store: Store) -> Any:
    if isinstance(value, Tensor):
        return store(value, "cpu")
    if type(value) in (tuple, list):
        return type(value)(_replaced(each, store) for each in value)
    if type(value) is dict:
        return {key: _replaced(each, store) for key, each in value.items()}
    return value
