"""The payload: an encoded tensor inside a checkpoint, which unpickles as an ordinary tensor.

A :class:`QuantizedTensor` pickles as a call of :func:`rebuild_v1` with primitives and tensors. Whoever loads the file
therefore gets the decoded tensor, through whatever door, and ``torch.load(weights_only=True)`` accepts it, because
the function is registered as safe: by ``q8lightning_autoload`` when torch is imported, where the package is installed,
and by importing this module. The import path of that function and its arguments are a promise to every file ever
written; docs/format.md is the promise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from q8lightning.checkpoint.format import (
    FORMAT_VERSION,
    NewerFormatError,
    read_codec,
    read_dtype,
    read_header,
    write_header,
)
from q8lightning.checkpoint.integrity import bytes_of, check_save, checksum, verify
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.many.encode import encode_many

_ENCODED: ContextVar["list[QuantizedTensor] | None"] = ContextVar("encoded", default=None)
"""The payloads that have been loaded to stay encoded; None where they are decoded at once."""

_WATCHER: ContextVar["Callable[[Tensor, Tensor], None] | None"] = ContextVar("watcher", default=None)
"""Told of each tensor that was stored together with others."""


class QuantizedTensor:
    """A tensor as codes and scales; unpickles as the decoded tensor.

    It is a plain object, neither a tensor nor a dataclass, so that code which maps functions over the tensors of a
    checkpoint passes it by.

    Attributes:
        codec: How it was encoded.
        data: ``[nbytes]`` uint8, the scales' bytes, then the codes of the elements in the order of memory, then the
            residual's codes if the codec has that stage. One tensor, and that a view of the memory of all tensors that
            were encoded with it, because every storage costs a file some hundred bytes.
        shape: Shape of the decoded tensor.
        stride: Its strides, in elements; dense, in any order of dimensions.
        dtype: Its dtype.
        name: Its path in the checkpoint, for messages.
        checksum: Of header and data, as the file had it; None for one that was not loaded. It stays the same when a
            loaded payload is saved again, so that damage in between does not go unnoticed.
        requires_grad: Whether the decoded tensor does.
        is_parameter: Whether it is an ``nn.Parameter``.
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
        """Encode a dense float tensor, which is left as it is; see :func:`encode_tensors`."""
        return encode_tensors([(tensor, codec, name)]).payloads[0]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Codes, scales and, with a residual, its codes, as :meth:`Codec.encode` returned them; views of ``data``."""
        return self.codec.split(self.data, math.prod(self.shape))

    def decode(self) -> Tensor:
        """Return the decoded tensor, with shape, strides, dtype and device of the original.

        Raises:
            CorruptCheckpointError: If the payload was loaded and is not what was saved.
        """
        self.verify()
        return self.as_decoded(self.codec.decode(self.parts, self.dtype))

    def as_decoded(self, values: Tensor) -> Tensor:
        """Return decoded values, ``[numel]`` in the order of memory, with shape and strides of the original."""
        tensor = values.as_strided(self.shape, self.stride)
        if self.is_parameter:
            return nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_() if self.requires_grad else tensor

    def verify(self) -> None:
        """Compare the payload with the checksum that its file has; nothing to do if there is none.

        Raises:
            CorruptCheckpointError: If they do not agree.
        """
        verify(self.name, self.header, self.data, self.checksum)

    def replace_data(self, data: Tensor) -> "QuantizedTensor":
        """Return the same payload with its bytes elsewhere."""
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
        """Everything about the payload but its bytes and their checksum, as JSON.

        As the file had it, if it was loaded: what a later writer added to it is covered by the checksum, too.
        """
        if self._header is not None:
            return self._header
        flags = self.requires_grad, self.is_parameter
        return write_header(self.codec, self.shape, self.stride, self.dtype, self.name, *flags)

    def __reduce__(self) -> tuple[Any, ...]:
        header = self.header
        # Made when it is saved because then the bytes are on the host, and training does not wait.
        found = checksum(header, bytes_of(self.data)) if self.checksum is None else self.checksum
        return rebuild_v1, (TENSOR, header, found, self.data, 0, len(self.data))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedTensor":
        """Copy it encoded; the default would go through ``__reduce__`` and decode."""
        return self.replace_data(self.data.clone())

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.name!r}, {tuple(self.shape)}, {self.dtype}, {self.codec}, {self.nbytes} bytes)"


class Encoding(NamedTuple):
    """Payloads, and what is known about them where they are; to read it waits for the device.

    Attributes:
        payloads: One for each tensor.
        failed: ``[tensors]`` int32, 1 where the codec could not hold the tensor (NaN, infinity; a negative value under
            ``log``), whose payload decodes to values that are not finite.
        statistics: ``[tensors, 5]`` float64, what is lost, if it was measured; see
            :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`.
    """

    payloads: list[QuantizedTensor]
    failed: Tensor
    statistics: Tensor | None


def encode_tensors(items: Sequence[tuple[Tensor, Codec, str]], measure: bool = False) -> Encoding:
    """Encode dense float tensors of one device, which are left as they are, into one stretch of memory.

    Args:
        items: Tensors, how each is to be encoded, and its path; at least one.
        measure: Whether to measure what is lost.

    Raises:
        ValueError: If the elements of a tensor overlap or leave gaps in memory.
    """
    for tensor, _, name in items:
        if not is_dense(tensor):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense in memory;"
                " encode tensor.contiguous()"
            )
    packed = encode_many([in_memory_order(tensor) for tensor, _, _ in items], [codec for _, codec, _ in items], measure)
    payloads = [
        QuantizedTensor(codec, data, tuple(tensor.shape), tensor.stride(), tensor.dtype, name)
        for (tensor, codec, name), data in zip(items, packed.data, strict=True)
    ]
    return Encoding(payloads, packed.failed, packed.statistics)


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor as they lie in memory, a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


TENSOR, TENSORS, ITEM, RAW = "tensor", "tensors", "item", "raw"
"""What :func:`rebuild_v1` is called for."""


def rebuild_v1(what: str, *arguments: Any) -> Any:
    """Return what a part of a file stands for; the one function that files of format version 1 call.

    There is one for each version, so that a reader knows by its name how a later file will begin.

    Args:
        what: One of ``tensor``, ``tensors``, ``item`` and ``raw``.
        arguments: Those of :func:`_tensor`, :func:`_tensors`, :func:`_item` or :func:`_raw`.

    Raises:
        NewerFormatError: If this version does not know what is asked for.
        CorruptCheckpointError: If a payload is not what was saved. Payloads that stay encoded are verified when they
            are decoded, so that looking at a memory-mapped file reads no more than is looked at.
    """
    parts: dict[str, Callable[..., Any]] = {TENSOR: _tensor, TENSORS: _tensors, ITEM: _item, RAW: _raw}
    if what not in parts:
        raise NewerFormatError(f"content of the kind {what!r}")
    return parts[what](*arguments)


def _tensor(text: str, checksum: int, buffer: Tensor, start: int, nbytes: int) -> Tensor | QuantizedTensor:
    """Return the tensor that a payload stands for, encoded inside :func:`keep_encoded`.

    Args:
        text: The header, JSON: ``codec``, ``shape``, ``stride``, ``dtype`` (without ``torch.``) and ``name``;
            ``requires_grad`` and ``parameter``, which are true for what is no plain tensor, and else are not there.
            Further keys are ignored: what changes the values is an option of the codec.
        checksum: Of the header and of scales and codes.
        buffer: ``[bytes]`` uint8, what several payloads may lie in.
        start: Where in it scales and codes begin; see :class:`QuantizedTensor`.
        nbytes: How many bytes of it they are.
    """
    data = buffer[start : start + nbytes]
    try:
        header = read_header(text)
    except ValueError:
        verify(f"with the header {text!r}", text, data, checksum)
        raise
    name = header["name"]
    check_save(name, header.get("save"))
    if type(checksum) is not int:
        raise NewerFormatError(f"checksum {checksum!r} for the tensor {name}")
    try:
        codec, dtype = read_codec(header["codec"], name), read_dtype(header)
    except NewerFormatError:
        verify(name, text, data, checksum)  # or is it damaged?
        raise
    payload = QuantizedTensor(
        *(codec, data, tuple(header["shape"]), tuple(header["stride"]), dtype, name, checksum),
        requires_grad=header.get("requires_grad", False),
        is_parameter=header.get("parameter", False),
        header=text,
    )
    encoded = _ENCODED.get()
    if encoded is None:
        return payload.decode()
    encoded.append(payload)
    return payload


def _tensors(
    data: Tensor, shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...] | None]
) -> tuple[Tensor, ...]:
    """Return the tensors that were stored together, each in memory of its own; files name them by their numbers.

    Args:
        data: ``[numel]``, the elements of all, each tensor's in the order of memory.
        shapes: Their shapes.
        strides: Their strides, in elements; None for a contiguous tensor.
    """
    watcher = _WATCHER.get()
    result = []
    parts = torch.split(data, [math.prod(shape) for shape in shapes])
    for part, shape, stride in zip(parts, shapes, strides, strict=True):
        tensor = part.clone()
        if watcher is not None:
            watcher(part, tensor)
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
    """Return one of the tensors that were stored together."""
    return tensors[number]


_NAME = "rebuild_v"
"""The function that files call has this name and the number of their version."""

LATER = tuple(f"{_NAME}{version}" for version in range(FORMAT_VERSION + 1, 10))
"""What files of later versions will call: these names raise that this version is too old."""


def register_functions() -> None:
    """Let ``torch.load(weights_only=True)`` call the functions that files name, if it may not yet.

    Those that ``q8lightning_autoload`` registered stay: the load that is going on may have met one of them already, and
    torch would refuse it if another function had its name now.
    """
    known = {each[1] for each in torch.serialization.get_safe_globals() if isinstance(each, tuple)}
    functions = {rebuild_v1.__name__: rebuild_v1} | {name: _refusing(name) for name in LATER}
    named = [(function, f"{__name__}.{name}") for name, function in functions.items()]
    torch.serialization.add_safe_globals([each for each in named if each[1] not in known])


def _refusing(name: str) -> Callable[..., Any]:
    return lambda *_: __getattr__(name)


def __getattr__(name: str) -> Any:
    """Say what is wrong when a file names a later rebuild function than this version has."""
    if name.startswith(_NAME):
        raise NewerFormatError.of_version(name.removeprefix(_NAME))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_functions()


@contextmanager
def keep_encoded() -> Iterator[None]:
    """Within this context, loading a checkpoint returns :class:`QuantizedTensor` objects instead of decoding them.

    What was loaded so can be saved again by ``torch.save``, and is as small as before.

    Example:
        >>> with keep_encoded():  # doctest: +SKIP
        ...     checkpoint = torch.load("last.ckpt", weights_only=True)
        >>> checkpoint["state_dict"]["head.weight"].decode()  # doctest: +SKIP
    """
    with collect_encoded():
        yield


@contextmanager
def collect_encoded() -> Iterator[list[QuantizedTensor]]:
    """As :func:`keep_encoded`; gives the list to which every payload is added that is loaded."""
    encoded: list[QuantizedTensor] = []
    token = _ENCODED.set(encoded)
    try:
        yield encoded
    finally:
        _ENCODED.reset(token)


@contextmanager
def watch_apart(watcher: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Within this context, ``watcher`` gets what was stored together with others, as it was and as it is loaded."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def stays_encoded() -> bool:
    """Whether payloads that are loaded now stay encoded."""
    return _ENCODED.get() is not None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their stretch of memory once each, in whatever order of dimensions."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()
