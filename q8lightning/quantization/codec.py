"""Codecs: how a tensor becomes codes and back, chosen by name, block size and residual stage."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from q8lightning.quantization import measured_ops, ops
from q8lightning.quantization.spec.codebook import get_codebook
from q8lightning.quantization.spec.coding import Coding

LOG: Final = "log"
"""The name of the codec for values that are never negative; every other codec is named after its codebook."""


@dataclass(frozen=True)
class Codec:
    """A codec for checkpoints: encoding what it decoded gives the same codes and scales again.

    Args:
        name: ``"log"``, or a codebook's name or :attr:`~q8lightning.quantization.spec.codebook.Codebook.spec`; an alias
            becomes the name.
        block_size: Elements of the flattened tensor that share a scale; a power of two between 32 and 4096.
        residual: Also encode what the first stage lost; ``linear`` only.

    Raises:
        ValueError: If the name or the block size is unknown, a residual is asked for elsewhere, or the codebook reaches
            neither -1 nor 1, so that its scales would shrink at every save.
    """

    name: str
    block_size: int = 256
    residual: bool = False

    def __post_init__(self) -> None:
        ops.check_block_size(self.block_size)
        if self.residual and self.name != "linear":
            raise ValueError(f"a residual stage needs the codec linear, got {self.name!r}; drop residual or use linear")
        if self.name == LOG:
            return
        try:
            codebook = get_codebook(self.name)
        except ValueError as error:
            raise ValueError(f"unknown codec: for second moments there is {LOG!r}; otherwise {error}") from None
        object.__setattr__(self, "name", codebook.spec)
        if codebook.end == 0:
            raise ValueError(
                f"a codebook for checkpoints holds 1 or -1, got levels from {codebook.levels[0]:g} to"
                f" {codebook.levels[-1]:g}; divide them by the largest magnitude"
            )

    @property
    def label(self) -> str:
        """The name for messages: a codebook of the user's own is not spelled out."""
        return self.name if self.name == LOG else get_codebook(self.name).name

    @property
    def unsigned(self) -> bool:
        """Whether only values that are not negative can be encoded."""
        return self.name == LOG or not get_codebook(self.name).signed

    @cached_property
    def coding(self) -> Coding:
        """The codec in the terms of the backends."""
        if self.name == LOG:
            return Coding(None, self.block_size)
        codebook = get_codebook(self.name)
        return Coding(codebook, self.block_size, self.residual, codebook.one_sided)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode a float tensor of any shape.

        Returns:
            ``(codes, scales)`` or, with a residual, ``(codes, scales, residual)``: codes and residual ``[*x.shape]``
            uint8; scales float32 in the units of ``x``, ``[blocks]``, or ``[blocks, 2]`` for ``log``. The scales of a
            block that cannot be encoded (NaN, infinity; a negative value under ``log``) are not finite.
        """
        x = x.detach()
        if self.name == LOG:
            codes, scales = ops.quantize_log(x, self.block_size)
        elif self.residual:
            codes, residual, scales = ops.quantize_residual(x, self.block_size)
            return codes, scales, residual
        else:
            codebook = get_codebook(self.name)
            codes, scales = ops.quantize(x, codebook.spec, self.block_size, codebook.one_sided)
        return codes, scales

    def encode_and_measure(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """As :meth:`encode`, and return what is lost: ``[5]`` float64 on the device of ``x``.

        Its items are the fields of :class:`q8lightning.quantization.spec.reference.ErrorStatistics`, in their order.
        """
        x = x.detach()
        if self.name == LOG:
            codes, scales, lost = measured_ops.quantize_log(x, self.block_size)
            return (codes, scales), lost
        if self.residual:
            codes, residual, scales, lost = measured_ops.quantize_residual(x, self.block_size)
            return (codes, scales, residual), lost
        codebook = get_codebook(self.name)
        codes, scales, lost = measured_ops.quantize(x, codebook.spec, self.block_size, codebook.one_sided)
        return (codes, scales), lost

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return the values of what :meth:`encode` returned, ``[*codes.shape]`` of ``dtype``."""
        codes, scales, *residual = parts
        values: Tensor
        if self.name == LOG:
            values = ops.dequantize_log(codes, scales, self.block_size, dtype)
        elif residual:
            values = ops.dequantize_residual(codes, residual[0], scales, self.block_size, dtype)
        else:
            values = ops.dequantize(codes, scales, get_codebook(self.name).spec, self.block_size, dtype)
        return values

    def encoded_bytes(self, numel: int) -> int:
        """Return how many bytes the codes and scales of ``numel`` elements take."""
        return self.coding.encoded_bytes(numel)

    def scale_bytes(self, numel: int) -> int:
        """Return how many bytes of these are scales."""
        return self.coding.scale_bytes(numel)
