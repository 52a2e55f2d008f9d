"""How one chunk of a CPU tensor is encoded and decoded, codec by codec: few passes, all in memory that is used again.

A chunk is ``[rows, width]`` float32, whole blocks. What stands for it are its parts: codes ``[rows * width]`` uint8,
scales ``[rows]`` or ``[rows, 2]`` float32 and, for the residual codec, later codes. Results are those of
``reference.py``, bit for bit.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from q8lightning.quantization.spec import logarithm, reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

Parts = tuple[Tensor, ...]

_TO_CODE = reference.ROUNDING + 127
"""Added to a float32 in [-127, 127], it leaves the nearest integer plus 127 in the low byte of the pattern."""


class ChunkCodec(Protocol):
    """Encodes and decodes chunks; not for several threads at once.

    Attributes:
        spares: How many rows of scratch, each ``[elements]`` float32, its methods write to.
    """

    spares: int

    def encode(self, blocks: Tensor, parts: Parts, spares: Tensor) -> bool:
        """Write the parts of finite blocks; return False, and leave the work undone, where there is another one."""

    def decode(self, parts: Parts, width: int, out: Tensor, spares: Tensor) -> None:
        """Write the values of parts with finite scales to ``out``, ``[rows * width]`` float32.

        It may be a spare, but not the first or the second.
        """

    def encode_slowly(self, blocks: Tensor) -> Parts:
        """Return the parts of any blocks, from the reference."""

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        """Return the values of any parts, from the reference."""


class Levels:
    """Codes of the levels of a codebook."""

    spares = 2

    def __init__(self, codebook: Codebook, signed_scale: bool = False) -> None:
        self.codebook = codebook
        self.signed_scale = signed_scale
        self._name = codebook.name if codebook.spec in ("linear", "softsign") else None
        # Codes that the codebook lacks decode to 0, as in the reference.
        self._table = torch.nn.functional.pad(codebook.tensor(), (0, 256 - len(codebook.levels)))

    def encode(self, blocks: Tensor, parts: Parts, spares: Tensor) -> bool:
        codes, scale = parts
        spare = spares[0].view(blocks.shape)
        per_unit = _write_scale(blocks, self.codebook.end if self.signed_scale else 0, scale, spare)
        if per_unit is not None:
            self._write_codes(blocks, per_unit, codes, spare)
        return per_unit is not None

    def _write_codes(self, blocks: Tensor, per_unit: Tensor, codes: Tensor, spare: Tensor) -> None:
        """Write the codes; ``spare`` holds the magnitudes of the blocks and is overwritten."""
        if self._name == "softsign" and not self.signed_scale:
            share = spare.mul_(per_unit).add_(1.0).reciprocal_()
            torch.sub(1.0, share, out=share).copysign_(blocks).mul_(254.0).add_(_TO_CODE)
        elif self._name == "linear":
            torch.mul(blocks, per_unit, out=spare).mul_(127.0).add_(_TO_CODE)
        else:
            codes.copy_(_search(torch.mul(blocks, per_unit, out=spare), self.codebook).view(-1))
            return
        _copy_low_bytes(spare, codes)

    def decode(self, parts: Parts, width: int, out: Tensor, spares: Tensor) -> None:
        codes, scale = parts
        self.look_up(codes, spares[0], out)
        out.view(-1, width).mul_(scale[:, None])

    def look_up(self, codes: Tensor, spare: Tensor, out: Tensor) -> None:
        """Write the level of each code to ``out``: computed where it is a quotient of integers, else looked up."""
        if self._name is None or bool(codes.max() == 255):
            torch.index_select(self._table, 0, spare.view(torch.int32).copy_(codes), out=out)
            return
        # Bytes as long as possible: a pass over them takes a quarter of the time.
        numerator = torch.sub(codes, 127).view(torch.int8)
        out.copy_(numerator)
        if self._name == "linear":
            out.div_(127.0)
        else:
            denominator = numerator.abs_().view(torch.uint8).neg_().sub_(2)  # 254 - x, modulo 256
            out.div_(spare.copy_(denominator))

    def encode_slowly(self, blocks: Tensor) -> Parts:
        return reference.quantize(blocks, self.codebook, blocks.shape[1], self.signed_scale)

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        codes, scale = parts
        return reference.dequantize(codes, scale, self.codebook, width, dtype)


class Residual:
    """Codes of the codebook ``linear``, and codes of what they lost."""

    spares = 2

    def __init__(self) -> None:
        self._levels = Levels(BUILTIN["linear"])

    def encode(self, blocks: Tensor, parts: Parts, spares: Tensor) -> bool:
        codes, scale, later = parts
        one, two = spares[:2].view(2, *blocks.shape)
        per_unit = _write_scale(blocks, 0, scale, one)
        if per_unit is None:
            return False
        torch.mul(blocks, per_unit, out=one).mul_(127.0).add_(_TO_CODE)
        _copy_low_bytes(one, codes)
        level = one.sub_(_TO_CODE).div_(127.0)
        left = torch.sub(blocks, level.mul_(scale[:, None]), out=two)
        left.mul_(per_unit).mul_(reference.RESIDUAL_DIVISOR * 127).clamp_(-126.0, 126.0).add_(_TO_CODE)
        _copy_low_bytes(left, later)
        return True

    def decode(self, parts: Parts, width: int, out: Tensor, spares: Tensor) -> None:
        codes, scale, later = parts
        spare, decoded = spares[:2]
        for stage, stage_scale, values in (
            (codes, scale, out),
            (later, reference.divide(scale, reference.RESIDUAL_DIVISOR), decoded),
        ):
            self._levels.look_up(stage, spare, values)
            values.view(-1, width).mul_(stage_scale[:, None])
        out.add_(decoded)

    def encode_slowly(self, blocks: Tensor) -> Parts:
        codes, later, scale = reference.quantize_residual(blocks, blocks.shape[1])
        return codes, scale, later

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        codes, scale, later = parts
        return reference.dequantize_residual(codes, later, scale, width, dtype)


class Log:
    """Codes at equal steps of the logarithm."""

    spares = 3

    def encode(self, blocks: Tensor, parts: Parts, spares: Tensor) -> bool:
        codes, bounds = parts
        log, spare, other = spares[:3].view(3, *blocks.shape)
        low, high = blocks.amin(dim=1), blocks.amax(dim=1)
        smallest, largest = float(low.amin()), float(high.amax())
        if not (smallest >= 0 and largest < math.inf):  # a NaN is neither
            return False
        has_zeros = smallest == 0
        if has_zeros:
            low = spare.copy_(blocks).masked_fill_(blocks <= 0, torch.inf).amin(dim=1)
            low.masked_fill_(low.isinf(), 0.0)
        torch.stack([low, high.add_(0.0)], dim=1, out=bounds)  # no negative zero
        grid = logarithm.log_grid(bounds)
        pattern, integer = blocks.view(torch.int32), spare.view(torch.int32)
        torch.bitwise_and(pattern, logarithm.OCTAVE - 1, out=integer).bitwise_or_(0x3F800000)
        mantissa = spare.sub_(1.0)
        _polynomial(mantissa, *logarithm.LOG2_POLYNOMIAL, out=log)
        log.mul_(torch.sub(1.0, mantissa, out=other).mul_(mantissa))
        log.add_(spare.copy_(torch.sub(pattern, low.view(torch.int32)[:, None], out=integer)))
        log.add_(grid.offset[:, None]).mul_(grid.codes_per_pattern[:, None]).add_(reference.ROUNDING + 1)
        if has_zeros:
            code = log.view(torch.int32).bitwise_and_(0xFF)
            code.mul_(integer.copy_(torch.sign(blocks, out=spare)))
        _copy_low_bytes(log, codes)
        return True

    def decode(self, parts: Parts, width: int, out: Tensor, spares: Tensor) -> None:
        codes, bounds = parts
        grid = logarithm.log_grid(bounds)
        low, high = bounds.contiguous().view(torch.int32).unbind(dim=1)
        code = codes.view(-1, width)
        one, two = spares[:2].view(2, -1, width)
        decoded = out.view(torch.int32).view(-1, width)
        # In place wherever it can be: to write to other memory takes longer.
        position, fraction = one.view(torch.int32), two.view(torch.int32)
        fraction.copy_(code).mul_(grid.step[:, None]).add_(grid.origin[:, None])
        position.copy_(fraction)
        fraction.bitwise_and_(logarithm.OCTAVE - 1).bitwise_or_(0x3F800000)
        # The octave of the position, with the power's mantissa in the place of the fraction's.
        octave = position.sub_(fraction)
        _polynomial(two, *logarithm.EXP2_POLYNOMIAL, out=out.view(-1, width))
        decoded.add_(octave)
        torch.maximum(decoded, low[:, None], out=decoded)
        torch.minimum(decoded, high[:, None], out=decoded)
        if bool(code.amin() == 0):
            decoded.mul_(position.copy_(code.clamp(max=1)))  # a comparison would take eight times as long

    def encode_slowly(self, blocks: Tensor) -> Parts:
        return reference.quantize_log(blocks, blocks.shape[1])

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        codes, bounds = parts
        return reference.dequantize_log(codes, bounds, width, dtype)


def _write_scale(blocks: Tensor, end: int, out: Tensor, spare: Tensor) -> Tensor | None:
    """Write ``reference.block_scale`` to ``out`` and the magnitudes to ``spare``.

    Returns:
        ``reference.reciprocal`` of the scale, ``[rows, 1]``; None if a block is not finite.
    """
    absmax = torch.amax(torch.abs(blocks, out=spare), dim=1, out=out)
    smallest, largest = (float(each) for each in torch.aminmax(absmax))
    if not largest < math.inf:  # or NaN
        return None
    if smallest < reference.SMALLEST_NORMAL:
        out.masked_fill_(absmax < reference.SMALLEST_NORMAL, 0.0)
    if end:
        torch.where(blocks.amax(dim=1) == out, end * out, -end * out, out=out).add_(0.0)
    per_unit = reference.reciprocal(out) if smallest < reference.SMALLEST_NORMAL else out.reciprocal()
    return per_unit[:, None]


def _copy_low_bytes(x: Tensor, codes: Tensor) -> None:
    codes.copy_(x.view(torch.int32).view(-1))  # integers become bytes modulo 256


def _search(y: Tensor, codebook: Codebook) -> Tensor:
    """Return the number of thresholds below each element of ``y``, int32; overwrites ``y``."""
    if codebook.closed_form is not None:
        return codebook.closed_form(y)
    cells, flat = codebook.cells, y.view(-1)
    code = cells.first.index_select(0, (flat.view(torch.int32) >> cells.shift).bitwise_and_(cells.first.numel() - 1))
    thresholds = torch.cat([codebook.thresholds, codebook.thresholds.new_full((2**cells.rounds,), torch.inf)])
    for step in (2**i for i in reversed(range(cells.rounds))):
        code.add_(flat > thresholds[step - 1 :].index_select(0, code), alpha=step)
    return code.view(y.shape)


def _polynomial(x: Tensor, constant: float, *coefficients: float, out: Tensor) -> None:
    """Write ``constant + x (c1 + x (c2 + ...))`` into ``out``, one rounding an operation."""
    *rest, last = coefficients
    torch.mul(x, last, out=out)
    for coefficient in reversed(rest):
        out.add_(coefficient).mul_(x)
    out.add_(constant)
