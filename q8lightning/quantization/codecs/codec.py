"""The interface of codecs for checkpoints.

A kind of codec is one file beside this one and one row in ``table.py``. No other code distinguishes codecs: it asks
them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from q8lightning.quantization.spec.codebook import name_with_bits
from q8lightning.quantization.spec.layout import KernelCodec, Layout, check_block_size
from q8lightning.quantization.spec.reference import measure
from q8lightning.quantization.spec.scale_dtype import ScaleDtype, stored_dtype


@dataclass(frozen=True)
class Codec(ABC):
    """A codec for checkpoints. Encoding what it decoded gives the same parts again.

    A new kind implements ``encode`` and ``decode``, and overrides what differs from a codec with codes and a scale for
    each block.

    Args:
        name: Its name in rules and files.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        bits: The bits of a code.
        scale_dtype: The dtype in which scales are stored, to which the codec rounds them.

    Raises:
        ValueError: If the block size is not such a power.
    """

    name: str
    block_size: int = 256
    bits: int = 8
    scale_dtype: ScaleDtype = field(default="float32", kw_only=True)

    marks_negative: ClassVar[bool] = False
    """Whether a negative value makes the scales of its block non-finite."""

    keeps_nonzero: ClassVar[bool] = False
    """Whether a nonzero value never decodes to zero, however small it is beside its block."""

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    # Encode and decode

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode a float tensor of any shape.

        Returns:
            The parts. First codes, ``[*x.shape]`` uint8; then scales, float32 in the units of ``x``, ``[blocks]``, or
            ``[blocks, n]`` if a block has several, which are values of ``scale_dtype``; then the codes of later stages.
            The scales of a block that cannot be encoded (NaN, infinity) are not finite.
        """

    @abstractmethod
    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return the values of the parts that :meth:`encode` returned, ``[*codes.shape]`` of ``dtype``."""

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Encode, and measure what is lost.

        Returns:
            What :meth:`encode` returns, and the fields of
            :class:`q8lightning.quantization.spec.reference.ErrorStatistics` in their order, ``[5]`` float64 on the
            device of ``x``.
        """
        parts = self.encode(x)
        return parts, measure(x, self.decode(parts, x.dtype))

    def failed(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Tell from the parts whether a block could not be encoded, 0-dimensional bool."""
        return ~parts[1].isfinite().all()

    def relative_error_bound(self, values: Tensor, parts: tuple[Tensor, ...]) -> float:
        """Return an upper bound of the relative error of a flat tensor, infinity if none is known.

        The bound protects from an error that a sample missed.
        """
        return torch.inf

    def decode_stretches(
        self, data: Tensor, numel: int, which: slice | Tensor, length: int, dtype: torch.dtype
    ) -> Tensor:
        """Decode some stretches of a flat tensor.

        Args:
            data: ``[encoded_bytes(numel)]`` uint8, the bytes of the whole tensor.
            numel: Its elements.
            which: A range of stretches, or their numbers.
            length: Elements of a stretch, a multiple of the block size.
            dtype: The dtype of the result.

        Returns:
            The values of these stretches, one after the other.
        """
        parts = self.layout.take(self.layout.views(data, numel), which, length)
        if isinstance(which, slice):
            elements = min(which.stop * length, numel) - which.start * length
        else:
            elements = len(which) * length
        return self.decode(self.layout.unpack(parts, elements), dtype)

    # The bytes of a payload

    @cached_property
    def layout(self) -> Layout:
        """The order of the bytes."""
        return Layout(self.block_size, bits=(self.bits,), scale_dtype=stored_dtype(self.scale_dtype))

    def scale_bytes(self, numel: int) -> int:
        """Return the bytes before the codes of ``numel`` elements, whose start gets aligned."""
        return self.layout.scale_bytes(numel)

    def encoded_bytes(self, numel: int) -> int:
        """Return the bytes of all parts of ``numel`` elements."""
        return self.layout.encoded_bytes(numel)

    def split(self, data: Tensor, numel: int) -> tuple[Tensor, ...]:
        """Return the parts of ``numel`` elements from their bytes, ``[encoded_bytes(numel)]`` uint8.

        Scales of float32 and codes of 8 bits are views of the bytes.
        """
        return self.layout.split(data, numel)

    def join(self, parts: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the parts of a flat tensor to ``out``, ``[encoded_bytes(numel)]`` uint8."""
        self.layout.join(parts, out)

    def decodes_joined(self, numel: int) -> bool:
        """Tell whether the parts of a tensor of ``numel`` elements may be joined with those of others for decoding."""
        return numel % self.block_size == 0

    # Properties by which other modules decide

    @property
    def entry(self) -> dict[str, str | int]:
        """The entries of a file that describe the codec, in their order."""
        entry: dict[str, str | int] = {"name": self.name, "bits": self.bits, "block_size": self.block_size}
        return entry if self.scale_dtype == "float32" else {**entry, "scale_dtype": self.scale_dtype}

    @property
    def residual_bits(self) -> int:
        """The bits of the code of what the first stage lost; 0 if there is no second stage."""
        return 0

    @property
    def label(self) -> str:
        """The name for messages."""
        return name_with_bits(self.name, self.bits)

    @property
    def unsigned(self) -> bool:
        """Whether only values that are not negative can be encoded."""
        return False

    @property
    def codebook(self) -> str | None:
        """The codebook of the first two parts, codes and scales; None if they belong to no codebook."""
        return None

    @property
    def kernel(self) -> KernelCodec | None:
        """The codec as the kernels for many tensors know it; None if they do not."""
        return None

    @property
    def finer(self) -> "Codec | None":
        """A codec of the same blocks that loses less, for tensors that need it; None if there is none."""
        return None

    def is_stable_in(self, dtype: torch.dtype) -> bool:
        """Tell whether values decoded to ``dtype`` always give the same parts again, although they are rounded."""
        return dtype in (torch.float32, torch.float64)
