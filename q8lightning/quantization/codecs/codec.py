"""What every codec for checkpoints is: data, and the few things that the rest of the package asks of it.

A kind of codec is one file beside this one and one row in ``table.py``. Whoever stores, lays out, measures or judges
encoded tensors asks the codec, and never which one it is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from q8lightning.quantization.spec.layout import KernelCodec, Layout, check_block_size
from q8lightning.quantization.spec.reference import measure


@dataclass(frozen=True)
class Codec(ABC):
    """A codec for checkpoints: encoding what it decoded gives the same parts again.

    A new kind says how to encode and decode, and what of the rest is not so for it. What it does not override holds for
    codes and float32 scales of blocks, as :class:`~q8lightning.quantization.spec.layout.Layout` has them.

    Args:
        name: What rules and files call it.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.

    Raises:
        ValueError: If the block size is none.
    """

    name: str
    block_size: int = 256

    residual: ClassVar[bool] = False
    """Whether rules add ``residual`` to the name."""

    marks_negative: ClassVar[bool] = False
    """Whether the scales of a block with a negative value are not finite."""

    keeps_nonzero: ClassVar[bool] = False
    """Whether no nonzero value decodes to zero, however small it is beside its block."""

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    # What it does

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode a float tensor of any shape.

        Returns:
            The parts, codes and scales first: codes ``[*x.shape]`` uint8; scales float32 in the units of ``x``,
            ``[blocks]``, or ``[blocks, n]`` if a block has several; then the codes of later stages. The scales of a
            block that cannot be encoded (NaN, infinity) are not finite.
        """

    @abstractmethod
    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return the values of what :meth:`encode` returned, ``[*codes.shape]`` of ``dtype``."""

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """As :meth:`encode`, and return what is lost: ``[5]`` float64 on the device of ``x``.

        Its items are the fields of :class:`q8lightning.quantization.spec.reference.ErrorStatistics`, in their order.
        """
        parts = self.encode(x)
        return parts, measure(x, self.decode(parts, x.dtype))

    def failed(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return whether a block could not be encoded, 0-dimensional bool, from what :meth:`encode` returned."""
        return ~parts[1].isfinite().all()

    def relative_error_bound(self, values: Tensor, parts: tuple[Tensor, ...]) -> float:
        """Return what the relative error of a flat tensor cannot exceed, from its parts alone; infinity if not known.

        What is measured in a sample is judged by it.
        """
        return torch.inf

    def decode_stretches(
        self, parts: tuple[Tensor, ...], which: slice | Tensor, length: int, dtype: torch.dtype
    ) -> Tensor:
        """Decode some stretches of a flat tensor.

        Args:
            parts: What :meth:`encode` returned for the whole of it.
            which: A range of stretches, or their numbers.
            length: Elements of a stretch, a multiple of the block size.
            dtype: Of the result.

        Returns:
            The values of these stretches, one after the other.
        """
        return self.decode(self.layout.take(parts, which, length), dtype)

    # How its parts lie in the bytes of a payload

    @cached_property
    def layout(self) -> Layout:
        """How the bytes lie."""
        return Layout(self.block_size)

    def scale_bytes(self, numel: int) -> int:
        """Return how many bytes stand before the codes of ``numel`` elements; the codes are what gets aligned."""
        return self.layout.scale_bytes(numel)

    def encoded_bytes(self, numel: int) -> int:
        """Return how many bytes all parts of ``numel`` elements take."""
        return self.layout.encoded_bytes(numel)

    def split(self, data: Tensor, numel: int) -> tuple[Tensor, ...]:
        """Return the parts of ``numel`` elements as views of their bytes, ``[encoded_bytes(numel)]`` uint8."""
        return self.layout.split(data, numel)

    def join(self, parts: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the parts of a flat tensor to ``out``, ``[encoded_bytes(numel)]`` uint8."""
        self.layout.join(parts, out)

    def decodes_joined(self, numel: int) -> bool:
        """Whether a tensor of ``numel`` elements may be decoded with others behind it, part by part."""
        return numel % self.block_size == 0

    # What others decide by

    @property
    def entry(self) -> dict[str, str | int]:
        """What files say of the codec, in their order."""
        return {"name": self.name, "bits": 8, "block_size": self.block_size}

    @property
    def label(self) -> str:
        """The name for messages."""
        return self.name

    @property
    def unsigned(self) -> bool:
        """Whether only values that are not negative can be encoded."""
        return False

    @property
    def codebook(self) -> str | None:
        """The codebook whose codes and scales are the first two parts; None if they are those of none."""
        return None

    @property
    def kernel(self) -> KernelCodec | None:
        """What the kernels for many tensors are told; None if they do not know the codec."""
        return None

    @property
    def finer(self) -> "Codec | None":
        """The codec with the same blocks for a tensor of which this one would lose too much; None if there is none."""
        return None

    def is_stable_in(self, dtype: torch.dtype) -> bool:
        """Whether values that were decoded to ``dtype``, rounded, always give the same parts again."""
        return dtype in (torch.float32, torch.float64)
