"""How one chunk of a CPU tensor is encoded and decoded, codec by codec: few passes, in memory that is used again.

A chunk is ``[rows, width]`` float32, whole blocks. What stands for it are its parts: codes ``[rows, width]`` uint8,
scales ``[rows]`` or ``[rows, 2]`` float32 and, for the residual codec, later codes. Results are those of
``reference.py``, bit for bit. ``cpu_packing.py`` packs codes of fewer than 8 bits.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from q8lightning.quantization.backends.cpu_memory import Scratch
from q8lightning.quantization.spec import logarithm, reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook, name_with_bits
from q8lightning.quantization.spec.scale_dtype import round_bounds

Parts = tuple[Tensor, ...]


class ChunkCodec(Protocol):
    """Encodes and decodes chunks.

    Its methods overwrite the first three floats of the scratch that they are given; to encode, the last one, too.
    """

    def encode(self, blocks: Tensor, parts: Parts, scratch: Scratch) -> bool:
        """Write the parts of finite blocks; where one is not finite, return False and leave the parts to others."""

    def decode(self, parts: Parts, out: Tensor, scratch: Scratch) -> None:
        """Write the values of parts with finite scales to ``out``, ``[rows, width]`` float32."""

    def encode_slowly(self, blocks: Tensor) -> Parts:
        """Return the parts of any blocks, from the reference."""

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        """Return the values of any parts, from the reference."""


class Levels:
    """Codes of the levels of a codebook."""

    def __init__(self, codebook: Codebook, signed_scale: bool = False) -> None:
        self.codebook = codebook
        self.signed_scale = signed_scale

    def encode(self, blocks: Tensor, parts: Parts, scratch: Scratch) -> bool:
        codes, scale = parts
        spare, words = scratch.floats[0], scratch.integers[0]
        per_unit = _write_scale(blocks, self.codebook.end if self.signed_scale else 0, scale, spare)
        if per_unit is None:
            return False
        form, is_rounded = self.codebook.closed_form, self.codebook.scale_dtype != "float32"
        if is_rounded:
            per_unit = reference.reciprocal(scale.copy_(self.codebook.round_scale(scale)))[:, None]
        magnitudes = form is not None and form.kind == "softsign" and not self.signed_scale  # the spare has them
        normalised = torch.mul(spare if magnitudes else blocks, per_unit, out=spare)
        if is_rounded:
            normalised.clamp_(-1.0, 1.0)
        if form is not None and magnitudes:
            share = normalised.add_(1.0).reciprocal_()
            torch.sub(1.0, share, out=share).copysign_(blocks).mul_(2.0 * form.half).add_(form.to_code)
        elif form is not None and form.kind == "linear":
            normalised.mul_(float(form.half)).add_(form.to_code)
        else:
            words = _search(normalised, self.codebook)
        codes.view(words.shape).copy_(words)  # integers become bytes modulo 256
        return True

    def decode(self, parts: Parts, out: Tensor, scratch: Scratch) -> None:
        codes, scale = parts
        self.look_up(codes.view(out.shape), scratch, out)
        out.mul_(scale[:, None])

    def look_up(self, codes: Tensor, scratch: Scratch, out: Tensor) -> None:
        """Write the level of each code to ``out``: computed where it is a quotient of integers, else looked up."""
        spare, words = scratch.floats[0], scratch.integers[0]
        form = self.codebook.closed_form
        if form is None or bool(codes.max() > 2 * form.half):
            # Codes that the codebook lacks decode to 0, as in the reference.
            table = torch.nn.functional.pad(self.codebook.tensor(), (0, 256 - len(self.codebook.levels)))
            torch.index_select(table, 0, words.copy_(codes).view(-1), out=out.view(-1))
            return
        # Bytes as long as possible: a pass over them takes a quarter of the time.
        numerator = torch.sub(codes, form.half, out=scratch.bytes).view(torch.int8)
        out.copy_(numerator)
        if form.kind == "linear":
            out.div_(float(form.half))
        else:
            denominator = numerator.abs_().view(torch.uint8).neg_().add_(2 * form.half)  # 2 half - x, modulo 256
            out.div_(spare.copy_(denominator))

    def encode_slowly(self, blocks: Tensor) -> Parts:
        return reference.quantize(blocks, self.codebook, blocks.shape[1], self.signed_scale)

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        codes, scale = parts
        return reference.dequantize(codes, scale, self.codebook, width, dtype)


class Residual:
    """Codes of a linear codebook, and codes of what they lost."""

    def __init__(self, bits: int, residual_bits: int) -> None:
        self._bits = bits, residual_bits
        self._levels = Levels(BUILTIN[name_with_bits("linear", bits)])
        self._half, self._zero = float(2 ** (bits - 1) - 1), float(2 ** (residual_bits - 1) - 1)
        self._steps = float(reference.residual_steps(bits, residual_bits))

    def encode(self, blocks: Tensor, parts: Parts, scratch: Scratch) -> bool:
        codes, scale, later = parts
        one, two, *_ = scratch.floats
        per_unit = _write_scale(blocks, 0, scale, one)
        if per_unit is None:
            return False
        to_code, to_later = reference.ROUNDING + self._half, reference.ROUNDING + self._zero
        torch.mul(blocks, per_unit, out=one).mul_(self._half).add_(to_code)
        codes.view(one.shape).copy_(scratch.integers[0])  # integers become bytes modulo 256
        decoded = one.sub_(to_code).div_(self._half).mul_(scale[:, None])
        torch.sub(blocks, decoded, out=two).mul_(per_unit).mul_(self._steps)
        two.clamp_(-self._zero, self._zero).add_(to_later)
        later.view(two.shape).copy_(scratch.integers[1])
        return True

    def decode(self, parts: Parts, out: Tensor, scratch: Scratch) -> None:
        codes, scale, later = parts
        second = scratch.floats[1].copy_(later.view(out.shape)).sub_(self._zero)
        self._levels.decode((codes, scale), out, scratch)
        out.add_(second.mul_(reference.divide(scale, self._steps)[:, None]))

    def encode_slowly(self, blocks: Tensor) -> Parts:
        codes, later, scale = reference.quantize_residual(blocks, blocks.shape[1], *self._bits)
        return codes, scale, later

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        codes, scale, later = parts
        return reference.dequantize_residual(codes, later, scale, width, *self._bits, dtype)


class Log:
    """Codes at equal steps of the logarithm."""

    def __init__(self, bits: int, scale_dtype: str = "float32") -> None:
        self._bits = bits
        self._scale_dtype = scale_dtype

    def encode(self, blocks: Tensor, parts: Parts, scratch: Scratch) -> bool:
        codes, bounds = parts
        log, spare, other, *_ = scratch.floats
        integer = scratch.integers[1]
        low, high = blocks.amin(dim=1), blocks.amax(dim=1)
        smallest, largest = float(low.amin()), float(high.amax())
        if not (smallest >= 0 and largest < math.inf):  # a NaN is neither
            return False
        has_zeros = smallest == 0
        if has_zeros:
            low = spare.copy_(blocks).masked_fill_(blocks <= 0, torch.inf).amin(dim=1)
            low.masked_fill_(low.isinf(), 0.0)
        torch.stack([low, high.add_(0.0)], dim=1, out=bounds)  # no negative zero
        pattern = blocks.view(torch.int32)
        if self._scale_dtype != "float32":
            bounds.copy_(round_bounds(bounds, self._scale_dtype))
            least, most = bounds.view(torch.int32)[:, :, None].unbind(dim=1)
            pattern = torch.clamp(pattern, least, most, out=scratch.integers[-1])
        first, correction, span, steps = _log_steps(bounds, self._bits)
        mantissa = spare.copy_(torch.bitwise_and(pattern, logarithm.OCTAVE - 1, out=integer))  # times an octave
        _polynomial(mantissa, *_LOG2_OF_MANTISSA, out=log)
        log.mul_(torch.sub(logarithm.OCTAVE, mantissa, out=other).mul_(mantissa))
        log.add_(spare.copy_(torch.sub(pattern, first[:, None], out=integer)))
        log.sub_(correction[:, None]).mul_(steps.div_(span.clamp_(min=0.25))[:, None]).add_(reference.ROUNDING + 1)
        code = scratch.integers[0]
        if has_zeros:
            code.bitwise_and_(0xFF).mul_(integer.copy_(torch.sign(blocks, out=spare)))
        codes.view(code.shape).copy_(code)  # integers become bytes modulo 256
        return True

    def decode(self, parts: Parts, out: Tensor, scratch: Scratch) -> None:
        codes, bounds = parts
        low, correction, span, steps = _log_steps(bounds, self._bits)
        high = bounds.view(torch.int32)[:, 1]
        step = span.add_(2.0 * logarithm.LOG_MARGIN).div_(steps).round_().to(torch.int32)
        origin = correction.round().to(torch.int32).add_(low).sub_(logarithm.LOG_MARGIN).sub_(step)
        code, decoded = codes.view(out.shape), out.view(torch.int32)
        (position, fraction, *_), fraction_as_float = scratch.integers, scratch.floats[1]
        position.copy_(code).mul_(step[:, None]).add_(origin[:, None])
        torch.bitwise_and(position, logarithm.OCTAVE - 1, out=fraction).bitwise_or_(0x3F800000)
        # The octave of the position, with the power's mantissa in the place of the fraction's.
        octave = position.sub_(fraction)
        _polynomial(fraction_as_float, *logarithm.EXP2_POLYNOMIAL, out=out)
        decoded.add_(octave)
        torch.maximum(decoded, low[:, None], out=decoded)
        torch.minimum(decoded, high[:, None], out=decoded)
        if bool(code.amin() == 0):
            decoded.mul_(position.copy_(code.clamp(max=1)))  # a comparison would take eight times as long

    def encode_slowly(self, blocks: Tensor) -> Parts:
        return reference.quantize_log(blocks, blocks.shape[1], self._bits, self._scale_dtype)

    def decode_slowly(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        codes, bounds = parts
        return reference.dequantize_log(codes, bounds, width, self._bits, dtype)


def _log_steps(bounds: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``logarithm.log_grid`` begins with, ``[blocks]`` each: to make all of it takes as long as the rest.

    Returns:
        The pattern of the smallest value and its correction, how far it is to the largest, and in how many steps.
    """
    patterns = bounds.view(torch.int32)
    low, high = patterns.unbind(dim=1)
    correction, correction_high = logarithm.log2_correction(patterns).unbind(dim=1)
    span = (high - low).float().add_(correction_high - correction)
    return (
        low,
        correction,
        span,
        (span * (1.0 / logarithm.FINEST_LOG_STEP)).floor_().clamp_(1, logarithm.most_steps(bits)),
    )


_LOG2_OF_MANTISSA = [
    coefficient / logarithm.OCTAVE ** (2 + power) for power, coefficient in enumerate(logarithm.LOG2_POLYNOMIAL)
]
"""The polynomial for a mantissa that is multiplied by an octave, a power of two, which changes no rounding."""


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
