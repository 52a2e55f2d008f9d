"""Check what the calls in a file say of tensors, before memory is read or made for them.

A sum that fits does not make a file whole: whoever changes a file can change its sums. What is checked here is what
our writers cannot have written, so all of it is damage. A value that a later version may have written is none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.integrity import CorruptCheckpointError, file_being_loaded

_TOO_LARGE = 2**63
"""One more than the largest size or stride of a tensor."""


def damaged(what: str, how: str) -> CorruptCheckpointError:
    """Return the error that says what is damaged, and how that shows."""
    return CorruptCheckpointError(f"{what} ({how})", file_being_loaded())


def damaged_header(text: Any, how: object) -> CorruptCheckpointError:
    """Return the error about a header that does not even say which tensor it is of."""
    shown = repr(text)
    return damaged("a tensor", f"with the header {shown[:200]}{'...' if len(shown) > 200 else ''}: {how}")


def check_count(kind: str, arguments: Sequence[Any], count: int) -> None:
    """Refuse a call with more or fewer arguments than its kind has."""
    if len(arguments) != count:
        raise damaged(f"the call for {kind!r}", f"with {len(arguments)} arguments instead of {count}")


def check_header(header: Mapping[str, Any], text: str) -> None:
    """Refuse a header whose entries have other types than they are written with, or that describes no dense tensor.

    Args:
        header: What :func:`~q8lightning.checkpoint.format.read_header` returned.
        text: What it read.

    Raises:
        CorruptCheckpointError: It names the tensor and the entry.
    """
    name = header["name"]
    if not isinstance(name, str):
        raise damaged_header(text, "its name is no text")
    what = f"the tensor {name}"
    codec = header["codec"]
    if not isinstance(codec, dict) or not isinstance(codec.get("name"), str):
        raise damaged(what, f"whose codec is {codec!r:.200}")
    for key, kind in (("dtype", str), ("save", str), ("requires_grad", bool), ("parameter", bool)):
        if key in header and not isinstance(header[key], kind):
            raise damaged(what, f"whose {key} is {header[key]!r:.200}")
    check_layout(what, header["shape"], header["stride"])


def check_layout(what: str, shape: Any, stride: Any) -> None:
    """Refuse sizes and strides that are not those of a tensor which fills its memory, each element once."""
    for entry, values in (("shape", shape), ("stride", stride)):
        if not _are_sizes(values):
            raise damaged(what, f"whose {entry} is {values!r:.200}")
    if len(shape) != len(stride):
        raise damaged(what, f"with {len(shape)} dimensions and {len(stride)} strides")
    if not _is_dense(shape, stride):
        raise damaged(what, f"whose strides {list(stride)} leave gaps or overlap for the shape {list(shape)}")


def check_stretch(what: str, buffer: Any, start: Any, nbytes: Any) -> None:
    """Refuse a payload that is not a stretch of bytes in memory, one after the other.

    Args:
        what: The tensor, for the message.
        buffer: Where it lies.
        start: Where in the buffer it begins.
        nbytes: How many bytes it takes.
    """
    if not isinstance(buffer, Tensor) or buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
        raise damaged(what, f"whose bytes are {described(buffer)}")
    if not _are_sizes([start, nbytes]) or start + nbytes > len(buffer):
        raise damaged(what, f"which has {nbytes!r:.40} bytes from {start!r:.40} on, of {len(buffer)}")


def check_together(data: Any, shapes: Any, strides: Any) -> None:
    """Refuse tensors that were stored together and have not just the elements that are there.

    Args:
        data: Their elements.
        shapes: A shape for each.
        strides: The strides of each, None for a contiguous one.
    """
    what = "the small tensors"
    if not isinstance(data, Tensor) or data.ndim != 1 or not data.is_contiguous():
        raise damaged(what, f"whose elements are {described(data)}")
    if not isinstance(shapes, list | tuple) or not isinstance(strides, list | tuple) or len(shapes) != len(strides):
        raise damaged(what, "whose shapes and strides are not as many")
    for shape, stride in zip(shapes, strides, strict=True):
        check_layout(what, shape, _contiguous(shape) if stride is None and _are_sizes(shape) else stride)
    if sum(math.prod(shape) for shape in shapes) != len(data):
        raise damaged(what, f"whose shapes have more or fewer elements than the {len(data)} that are there")


def check_item(tensors: Any, number: Any) -> None:
    """Refuse a number that is not one of the tensors stored together."""
    if not isinstance(tensors, tuple) or not _are_sizes([number]) or number >= len(tensors):
        raise damaged("a small tensor", f"which has the number {number!r:.40}")


def check_raw(name: Any, save: Any, checksum: Any, tensor: Any) -> None:
    """Refuse a tensor as it is whose description is none, or that takes more room in memory than in the file."""
    if not isinstance(name, str) or not isinstance(save, str) or type(checksum) is not int:
        raise damaged("a tensor", f"with the name {name!r:.200}, the save {save!r:.40} and the sum {checksum!r:.40}")
    if not isinstance(tensor, Tensor):
        raise damaged(f"the tensor {name}", f"which is {described(tensor)}")
    if type(tensor) is Tensor and tensor.layout == torch.strided:
        there = tensor.untyped_storage().nbytes()
        if tensor.nbytes > there:
            raise damaged(f"the tensor {name}", f"which has {tensor.nbytes} bytes in memory and {there} in the file")


def _are_sizes(values: Any) -> bool:
    """Whether these are integers, each of which can be a size."""
    return isinstance(values, list | tuple) and all(type(each) is int and 0 <= each < _TOO_LARGE for each in values)


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements fill one stretch of memory, each element once, in any order of dimensions."""
    if 0 in shape:
        return math.prod(max(size, 1) for size in shape) < _TOO_LARGE
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return expected < _TOO_LARGE


def _contiguous(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    return [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]


def described(value: Any) -> str:
    """Return what something is, for a message."""
    if not isinstance(value, Tensor):
        return f"of the type {type(value).__name__}"
    return f"a tensor of {value.dtype} with the shape {list(value.shape)} and the strides {list(value.stride())}"
