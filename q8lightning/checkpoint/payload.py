"""The payload: an encoded tensor inside a checkpoint, which unpickles as an ordinary tensor.

A :class:`QuantizedTensor` pickles as a call of :func:`rebuild_v1` with primitives and tensors, so every way of loading
the file returns the decoded tensor. ``torch.load(weights_only=True)`` accepts the call because the function is
registered as safe: by ``q8lightning_autoload`` when torch is imported, and by importing this module. Every file that
was ever written names the function by its import path; docs/format.md promises the path and its arguments.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from q8lightning.checkpoint.call_arguments import (
    check_count,
    check_header,
    check_item,
    check_raw,
    check_stretch,
    check_together,
    damaged,
    damaged_header,
)
from q8lightning.checkpoint.format import (
    FORMAT_VERSION,
    NewerFormatError,
    read_codec,
    read_dtype,
    read_header,
    write_header,
)
from q8lightning.checkpoint.integrity import bytes_of, check_save, checksum, verify
from q8lightning.checkpoint.lazy_tensors import read
from q8lightning.checkpoint.loading import kept_encoded, watcher
from q8lightning.checkpoint.memory import check_dense, in_memory_order
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.decode import EncodedItem, decode_alone
from q8lightning.quantization.many.encode import encode_many


class QuantizedTensor:
    """A tensor as codes and scales; unpickles as the decoded tensor.

    It is a plain object, neither a tensor nor a dataclass, so that code which maps functions over the tensors of a
    checkpoint leaves it alone.

    Attributes:
        codec: The codec that encoded it.
        data: ``[nbytes]`` uint8: the scales' bytes, then the codes of the elements in the order of memory, then the
            residual's codes if the codec has that stage. A view of the memory of all tensors that were encoded
            together, because each storage costs a file some hundred bytes.
        shape: Shape of the decoded tensor.
        stride: Its strides in elements; dense, in any order of dimensions.
        dtype: Its dtype.
        name: Its path in the checkpoint, for messages.
        checksum: The checksum of header and data that its file has; None if it was not loaded. It is kept when a loaded
            payload is saved again, so that damage in between is noticed.
        requires_grad: Whether the decoded tensor requires grad.
        is_parameter: Whether the decoded tensor is an ``nn.Parameter``.
    """

    __slots__ = (
        "__weakref__",
        "_header",
        "checksum",
        "codec",
        "data",
        "dtype",
        "is_parameter",
        "name",
        "requires_grad",
        "shape",
        "stride",
    )

    def __init__(
        self,
        codec: Codec,
        data: Tensor,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        name: str,
        checksum: int | None = None,
        requires_grad: bool = False,
        is_parameter: bool = False,
        header: str | None = None,
    ) -> None:
        self.codec = codec
        self.data = data
        self.shape = shape
        self.stride = stride
        self.dtype = dtype
        self.name = name
        self.checksum = checksum
        self.requires_grad = requires_grad
        self.is_parameter = is_parameter
        self._header = header

    @classmethod
    def encode(cls, tensor: Tensor, codec: Codec, name: str) -> "QuantizedTensor":
        """Encode a dense float tensor; the tensor stays as it is.

        Raises:
            ValueError: If its elements overlap or leave gaps in memory.
        """
        check_dense(tensor, name)
        data = encode_many([in_memory_order(tensor)], [codec]).data[0]
        return cls(codec, data, tuple(tensor.shape), tensor.stride(), tensor.dtype, name)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Codes, scales and the residual's codes, if any, as ``Codec.encode`` returns them."""
        return self.codec.split(self.data, math.prod(self.shape))

    def decode(self) -> Tensor:
        """Return the decoded tensor, with shape, strides, dtype and device of the original.

        Raises:
            CorruptCheckpointError: If the payload was loaded and differs from what was saved.
        """
        self.verify()
        return self.as_decoded(decode_alone(self.item))

    @property
    def item(self) -> EncodedItem:
        """The payload as the functions know it that decode several at once."""
        return EncodedItem(self.data, self.codec, math.prod(self.shape), self.dtype)

    def as_decoded(self, values: Tensor) -> Tensor:
        """Return decoded values, ``[numel]`` in the order of memory, as the tensor that was encoded."""
        tensor = values.as_strided(self.shape, self.stride)
        if self.is_parameter:
            return nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_() if self.requires_grad else tensor

    def verify(self) -> None:
        """Compare the payload with the checksum of its file; do nothing if it was not loaded.

        Raises:
            CorruptCheckpointError: If they differ.
        """
        verify(self.name, self.header, self.data, self.checksum)

    def replace_data(self, data: Tensor) -> "QuantizedTensor":
        """Return the same payload with its bytes in another memory."""
        return QuantizedTensor(
            *(self.codec, data, self.shape, self.stride, self.dtype, self.name, self.checksum),
            requires_grad=self.requires_grad,
            is_parameter=self.is_parameter,
            header=self._header,
        )

    def of_save(self, save: str) -> "QuantizedTensor":
        """Return the same payload as one of a checkpoint in shards, whose parts all name their save."""
        header = write_header(self.codec, self.shape, self.stride, self.dtype, self.name, save=save)
        return QuantizedTensor(self.codec, self.data, self.shape, self.stride, self.dtype, self.name, header=header)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes

    @property
    def header(self) -> str:
        """Everything about the payload except its bytes and their checksum, as JSON.

        For a loaded payload it is the file's own text, because the checksum also covers what a later writer added.
        """
        if self._header is not None:
            return self._header
        flags = self.requires_grad, self.is_parameter
        return write_header(self.codec, self.shape, self.stride, self.dtype, self.name, *flags)

    def __reduce__(self) -> tuple[Any, ...]:
        header = self.header
        # Only now are the bytes on the host, and training does not wait.
        found = checksum(header, bytes_of(self.data)) if self.checksum is None else self.checksum
        return rebuild_v1, (TENSOR, header, found, self.data, 0, len(self.data))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedTensor":
        """Copy the payload; the default would call ``__reduce__`` and decode it."""
        return self.replace_data(self.data.clone())

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.name!r}, {tuple(self.shape)}, {self.dtype}, {self.codec}, {self.nbytes} bytes)"


TENSOR, TENSORS, ITEM, RAW = "tensor", "tensors", "item", "raw"
"""What :func:`rebuild_v1` can return; the first argument of its calls."""


def rebuild_v1(what: str, *arguments: Any) -> Any:
    """Return what a part of a file stands for: the only function that files of format version 1 call.

    Each version of the format has a function of its own, so that a reader knows a later file by the function's name.

    Args:
        what: One of ``tensor``, ``tensors``, ``item`` and ``raw``.
        arguments: The arguments of :func:`_tensor`, :func:`_tensors`, :func:`_item` or :func:`_raw`.

    Raises:
        NewerFormatError: If this version does not know what is asked for.
        CorruptCheckpointError: If an argument is nothing that was ever saved, or a payload differs from what was saved.
            Payloads that stay encoded are verified when they are decoded, so that opening a memory-mapped file does not
            read all of it.
    """
    parts: dict[str, tuple[Callable[..., Any], int]] = {
        TENSOR: (_tensor, 5), TENSORS: (_tensors, 3), ITEM: (_item, 2), RAW: (_raw, 4)
    }  # fmt: skip
    if not isinstance(what, str) or what not in parts:
        raise NewerFormatError(f"content of the kind {what!r}")
    part, count = parts[what]
    check_count(what, arguments, count)
    return part(*map(read, arguments))


def _tensor(text: str, checksum: int, buffer: Tensor, start: int, nbytes: int) -> Tensor | QuantizedTensor:
    """Return the tensor that a payload stands for, encoded inside :func:`keep_encoded`.

    Args:
        text: The header as JSON: ``codec``, ``shape``, ``stride``, ``dtype`` (without ``torch.``) and ``name``.
            ``requires_grad`` and ``parameter`` are there only if they are true. Further keys are ignored, because
            all that changes the values is an option of the codec.
        checksum: The checksum of the header, the scales and the codes.
        buffer: ``[bytes]`` uint8, in which several payloads may lie.
        start: Where scales and codes begin in the buffer.
        nbytes: How many bytes they take.
    """
    try:
        header = read_header(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged_header(text, error) from None
    check_header(header, text)
    name = header["name"]
    check_stretch(f"the tensor {name}", buffer, start, nbytes)
    data = buffer[start : start + nbytes]
    check_save(name, header.get("save"))
    if type(checksum) is not int:
        raise NewerFormatError(f"checksum {checksum!r} for the tensor {name}")
    try:
        codec, dtype = read_codec(header["codec"], name), read_dtype(header)
    except NewerFormatError:
        verify(name, text, data, checksum)  # the header may be damaged instead
        raise
    if len(data) != codec.encoded_bytes(math.prod(header["shape"])):  # a kernel would read beyond its memory
        raise damaged(f"the tensor {name}", "with fewer or more codes than its shape has elements")
    payload = QuantizedTensor(
        *(codec, data, tuple(header["shape"]), tuple(header["stride"]), dtype, name, checksum),
        requires_grad=header.get("requires_grad", False),
        is_parameter=header.get("parameter", False),
        header=text,
    )
    kept = kept_encoded()
    if kept is None:
        return payload.decode()
    kept.append(payload)
    return payload


def _tensors(
    data: Tensor, shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...] | None]
) -> tuple[Tensor, ...]:
    """Return tensors that were stored together, each in memory of its own; files refer to them by number.

    Args:
        data: ``[numel]``, the elements of all tensors, each tensor's in the order of memory.
        shapes: Their shapes.
        strides: Their strides in elements; None for a contiguous tensor.
    """
    check_together(data, shapes, strides)
    watch = watcher()
    result = []
    parts = torch.split(data, [math.prod(shape) for shape in shapes])
    for part, shape, stride in zip(parts, shapes, strides, strict=True):
        tensor = part.clone()
        if watch is not None:
            watch(part, tensor)
        result.append(tensor.view(shape) if stride is None else tensor.as_strided(shape, stride))
    return tuple(result)


def _raw(name: str, save: str, checksum: int, tensor: Tensor) -> Tensor:
    """Return a tensor that is stored as it is in a checkpoint in shards.

    Args:
        name: Its path in the checkpoint.
        save: Which save the checkpoint is of.
        checksum: Of name, save and elements.
        tensor: The tensor.
    """
    check_raw(name, save, checksum, tensor)
    check_save(name, save)
    if type(tensor) is Tensor and tensor.device.type == "cpu":
        verify(name, header_of_raw(name, save), elements_of(tensor), checksum)
    return tensor


def header_of_raw(name: str, save: str) -> str:
    """Return what is summed beside the elements of a tensor that is stored as it is."""
    return f"{save} {name}"


def elements_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's elements in the order of its indices, ``[nbytes]`` uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _item(tensors: tuple[Tensor, ...], number: int) -> Tensor:
    """Return one of several tensors that were stored together."""
    check_item(tensors, number)
    return tensors[number]


_NAME = "rebuild_v"
"""The name of the function that files call, without the number of their version."""

LATER = tuple(f"{_NAME}{version}" for version in range(FORMAT_VERSION + 1, 10))
"""The functions that files of later versions will call. In this version they raise :class:`NewerFormatError`."""


def register_functions() -> None:
    """Let ``torch.load(weights_only=True)`` call the functions that files name.

    Functions that ``q8lightning_autoload`` registered stay. A load in progress may have met one of them, and torch
    would refuse it if another function took its name now.
    """
    known = {each[1] for each in torch.serialization.get_safe_globals() if isinstance(each, tuple)}
    functions = {rebuild_v1.__name__: rebuild_v1} | {name: _refusing(name) for name in LATER}
    named = [(function, f"{__name__}.{name}") for name, function in functions.items()]
    torch.serialization.add_safe_globals([each for each in named if each[1] not in known])


def _refusing(name: str) -> Callable[..., Any]:
    return lambda *_: __getattr__(name)


def __getattr__(name: str) -> Any:
    """Raise NewerFormatError for the function of a later version of the format."""
    if name.startswith(_NAME):
        raise NewerFormatError.of_version(name.removeprefix(_NAME))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_functions()
