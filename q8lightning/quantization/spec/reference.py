"""The specification of every codec, in plain torch, slow and obvious.

The other implementations (``cpu.py``, ``kernels/``) are tested to return the same codes and values, bit for bit.

A tensor is read as one flat row-major sequence, in blocks of ``block_size`` elements; the last one may be short. All
arithmetic is IEEE float32 and rounds once an operation, so nothing is fused. Inputs of other dtypes are converted to
float32 first, and outputs from float32 last.

A block that holds NaN or infinity has a scale that is not finite, and decodes to values that are not finite.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.spec.codebook import BUILTIN, Codebook, name_with_bits
from q8lightning.quantization.spec.logarithm import exp2_pattern, log2_correction, log_grid
from q8lightning.quantization.spec.scale_dtype import round_bounds

SMALLEST_NORMAL = 2.0**-126
"""A block of smaller magnitudes is stored as zeros, since the reciprocal of its scale would overflow."""

ROUNDING = 2.0**23
"""Adding this to a float32 in [0, 2**23] leaves the nearest integer, ties to even, in the low bits of the pattern."""


class ErrorStatistics(NamedTuple):
    """What a reconstruction lost, as five 0-dimensional float64 tensors.

    Attributes:
        squared_error: Sum of squared differences, in squared units of the input.
        squares: Sum of squares of the original.
        max_error: Largest absolute difference, in units of the input.
        zeros: Number of original elements that are zero.
        zeroed: Number of nonzero elements that became zero.
    """

    squared_error: Tensor
    squares: Tensor
    max_error: Tensor
    zeros: Tensor
    zeroed: Tensor


def to_blocks(x: Tensor, block_size: int) -> Tensor:
    """Return ``x`` as ``[ceil(numel / block_size), block_size]`` float32, the last block filled up with zeros."""
    flat = x.detach().reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def from_blocks(blocks: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`to_blocks`: drop the filling, take the shape of ``like`` and convert to ``dtype``."""
    return blocks.reshape(-1)[: like.numel()].view(like.shape).to(dtype)


def block_scale(blocks: Tensor, end: int = 0) -> Tensor:
    """Return the largest magnitude of each block, ``[blocks]`` float32, with a sign if ``end`` is given.

    Args:
        blocks: ``[blocks, block_size]`` float32.
        end: 0 for a plain absmax. With 1 or -1, the scale has the sign that makes the block's largest element over the
            scale this end of the codebook. If a block holds both ``+a`` and ``-a``, then ``+a`` is its largest element.

    Returns:
        The scales. 0 if all magnitudes of a block are below the smallest normal float32. NaN or infinity for a block
        that holds NaN or infinity.
    """
    absmax = blocks.abs().amax(dim=1)
    scale = torch.where(absmax < SMALLEST_NORMAL, 0.0, absmax)
    if end == 0:
        return scale
    return torch.where(blocks.amax(dim=1) == absmax, end * scale, -end * scale) + 0.0  # no negative zero


def reciprocal(scale: Tensor) -> Tensor:
    """Return 1 / scale in float32, and 0 where the scale is 0 or not finite."""
    return torch.where((scale == 0) | ~scale.isfinite(), 0.0, 1.0 / scale)


def divide(x: Tensor, divisor: float) -> Tensor:
    """Return ``x / divisor`` correctly rounded. For a plain number, torch multiplies by its reciprocal on CUDA."""
    return x / torch.full_like(x, divisor)


def _search(y: Tensor, codebook: Codebook, scale: Tensor) -> Tensor:
    """Return the number of thresholds below each normalised value; the code of 0 in blocks that are not finite."""
    code = torch.searchsorted(codebook.thresholds.to(y.device), y.contiguous()).to(torch.uint8)
    return torch.where(scale.isfinite()[:, None], code, codebook.zero_code)


def quantize(
    x: Tensor, codebook: Codebook, block_size: int, signed_scale: bool = False, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode each element as the nearest level of the codebook, relative to the largest magnitude of its block.

    Args:
        x: ``[*shape]`` of any float dtype.
        codebook: The levels.
        block_size: Elements that share a scale.
        signed_scale: Give the scale a sign, so that the block's largest element becomes :attr:`Codebook.end`.
        statistics: ``[5]`` float64, to be written with :func:`measure` of ``x`` and its decoded form, or None. The
            functions below take the same.

    Returns:
        codes ``[*shape]`` uint8, and scale ``[ceil(numel / block_size)]`` float32 in the units of ``x``, rounded as the
        codebook says; 0 for an all-zero block, non-finite for a block with NaN or infinity.
    """
    blocks = to_blocks(x, block_size)
    scale = codebook.round_scale(block_scale(blocks, codebook.end if signed_scale else 0))
    normalised = blocks * reciprocal(scale)[:, None]
    if codebook.scale_dtype != "float32":
        normalised = normalised.clamp(-1.0, 1.0)  # a scale may have become smaller than the largest element
    codes = from_blocks(_search(normalised, codebook, scale), x, torch.uint8)
    if statistics is not None:
        statistics.copy_(measure(x, dequantize(codes, scale, codebook, block_size, x.dtype)))
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return ``level * scale`` for each code, ``[*codes.shape]`` of ``dtype``; NaN or infinity where the scale is."""
    levels = torch.zeros(256, dtype=torch.float32, device=codes.device)
    levels[: len(codebook.levels)] = codebook.tensor(codes.device)
    indices = torch.nn.functional.pad(codes.reshape(-1), (0, -codes.numel() % block_size)).long()
    values = levels[indices].view(-1, block_size) * scale[:, None]
    values = torch.where(scale.isfinite()[:, None], values, torch.nan)
    return from_blocks(values, codes, dtype)


def fake_quantize(x: Tensor, codebook: Codebook, block_size: int, statistics: Tensor | None = None) -> Tensor:
    """Return ``dequantize(quantize(x))`` in the dtype of ``x``."""
    codes, scale = quantize(x, codebook, block_size, statistics=statistics)
    return dequantize(codes, scale, codebook, block_size, x.dtype)


def fake_quantize_rows(x: Tensor, codebook: Codebook, row: int) -> Tensor:
    """As :func:`fake_quantize`, with blocks of ``row`` elements, any number of them."""
    return fake_quantize(x, codebook, row)


def residual_steps(bits: int, residual_bits: int) -> int:
    """Return the steps of the residual in a block's scale.

    A step of the linear codebook is divided into ``2**residual_bits - 1`` equal steps, an odd number. The largest code
    reaches almost half a step of the first stage, and no decoded value lies on a threshold of that stage.
    """
    return ((1 << (bits - 1)) - 1) * ((1 << residual_bits) - 1)


def quantize_residual(
    x: Tensor, block_size: int, bits: int, residual_bits: int, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode with the linear codebook, then encode the rest in equal steps of :func:`residual_steps`.

    The sum of both stages never reaches a threshold of the first one, so encoding it again gives the same codes.

    Args:
        x: As for :func:`quantize`.
        block_size: Elements that share a scale.
        bits: The bits of the first codes, 2 to 8.
        residual_bits: The bits of the residual codes, 2 to 8.
        statistics: As for :func:`quantize`.

    Returns:
        codes and residual codes, ``[*shape]`` uint8 each, and scale ``[ceil(numel / block_size)]`` float32. The
        residual code of zero is ``2**(residual_bits - 1) - 1``.
    """
    linear = BUILTIN[name_with_bits("linear", bits)]
    codes, scale = quantize(x, linear, block_size)
    left = to_blocks(x, block_size) - to_blocks(dequantize(codes, scale, linear, block_size, torch.float32), block_size)
    zero = 2 ** (residual_bits - 1) - 1
    steps = left * reciprocal(scale)[:, None] * residual_steps(bits, residual_bits)
    residual = round_to_code(torch.where(scale.isfinite()[:, None], steps, 0.0).clamp(-zero, zero), zero)
    residual = from_blocks(residual, x, torch.uint8)
    if statistics is not None:
        decoded = dequantize_residual(codes, residual, scale, block_size, bits, residual_bits, x.dtype)
        statistics.copy_(measure(x, decoded))
    return codes, residual, scale


def dequantize_residual(
    codes: Tensor,
    residual: Tensor,
    scale: Tensor,
    block_size: int,
    bits: int,
    residual_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the sum of both stages, ``[*codes.shape]`` of ``dtype``."""
    linear = BUILTIN[name_with_bits("linear", bits)]
    first = dequantize(codes, scale, linear, block_size, torch.float32)
    step = divide(scale, residual_steps(bits, residual_bits))
    second = (to_blocks(residual, block_size) - (2 ** (residual_bits - 1) - 1)) * step[:, None]
    return (first + from_blocks(second, codes, torch.float32)).to(dtype)


def round_to_code(x: Tensor, zero: int) -> Tensor:
    """Return ``x + zero``, in [0, 2**22], rounded once to an integer, ties to even, as float32."""
    return (x + (ROUNDING + zero)) - ROUNDING


def quantize_log(
    x: Tensor, block_size: int, bits: int, scale_dtype: str = "float32", statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode values that are never negative, such as second moments, at equal steps of their logarithm.

    Code 0 is exactly zero. The codes from 1 on are equal steps of log2, from the smallest positive to the largest value
    of the block: ``2**bits - 2`` steps, or fewer if they would be finer than 1/64 octave. Both ends decode exactly, and
    no nonzero value decodes to zero, unless it is a float64 that is zero in float32.

    The logarithm adds a polynomial of the mantissa to the bit pattern, so that all processors agree on every bit. Below
    the smallest normal number, where patterns are linear, the steps are linear, too.

    Args:
        x: As for :func:`quantize`.
        block_size: Elements that share their bounds.
        bits: The bits of a code, 2 to 8.
        scale_dtype: To what bounds are rounded, ``"float32"`` or ``"bfloat16"``, as
            :func:`~q8lightning.quantization.spec.scale_dtype.round_bounds` says. Values beyond a bound become it.
        statistics: As for :func:`quantize`.

    Returns:
        codes ``[*shape]`` uint8, and bounds ``[ceil(numel / block_size), 2]`` float32, the smallest positive and the
        largest value of each block in the units of ``x``, rounded: 0 and 0 for an all-zero block, NaN for a block that
        holds NaN, infinity or a negative value.
    """
    blocks = to_blocks(x, block_size)
    positive = blocks > 0
    low = torch.where(positive, blocks, torch.inf).amin(dim=1)
    bounds = torch.stack([torch.where(positive.any(dim=1), low, 0.0), blocks.amax(dim=1).clamp(min=0.0) + 0.0], dim=1)
    wrong = (~blocks.isfinite() | (blocks < 0)).any(dim=1)
    bounds = torch.where(wrong[:, None], torch.nan, round_bounds(bounds, scale_dtype))

    grid = log_grid(bounds, bits)
    pattern = torch.where(positive, blocks, 0.0).view(torch.int32)
    if scale_dtype != "float32":
        low, high = bounds.view(torch.int32)[:, :, None].unbind(dim=1)
        pattern = torch.minimum(torch.maximum(pattern, low), high)
    distance = (pattern - bounds.view(torch.int32)[:, :1]).float() + log2_correction(pattern)
    code = round_to_code((distance + grid.offset[:, None]) * grid.codes_per_pattern[:, None], zero=1)
    codes = from_blocks(torch.where(wrong[:, None], 1.0, torch.where(positive, code, 0.0)), x, torch.uint8)
    if statistics is not None:
        statistics.copy_(measure(x, dequantize_log(codes, bounds, block_size, bits, x.dtype)))
    return codes, bounds


def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the values of :func:`quantize_log`, ``[*codes.shape]`` of ``dtype``; NaN where the bounds are."""
    code = to_blocks(codes, block_size).to(torch.int32)
    grid = log_grid(bounds, bits)
    pattern = exp2_pattern(code * grid.step[:, None] + grid.origin[:, None])
    low, high = bounds.contiguous().view(torch.int32)[:, :, None].unbind(dim=1)  # patterns order as the floats do
    values = torch.minimum(torch.maximum(pattern, low), high) * code.clamp(max=1)
    return from_blocks(values.view(torch.float32), codes, dtype)


def quantize_affine(
    x: Tensor, block_size: int, bits: int = 8, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode with ``2**bits`` equally spaced levels from the smallest to the largest value of each block.

    Zero is always among them. This is the standard asymmetric integer quantization,
    ``x = (code - zero_point) * scale``. It suits values on one side of zero, such as activations. Checkpoints do not
    use it, because encoding again moves the scale.

    Returns:
        codes ``[*shape]`` uint8, scale ``[ceil(numel / block_size)]`` float32 in the units of ``x`` (0 for an all-zero
        block, NaN for one with NaN or infinity), and zero_point ``[ceil(numel / block_size)]`` uint8, the code of 0.
    """
    blocks, last = to_blocks(x, block_size), 2.0**bits - 1
    low, high = blocks.amin(dim=1).clamp(max=0.0), blocks.amax(dim=1).clamp(min=0.0)
    scale = divide(high, last) - divide(low, last)
    scale = torch.where(scale < SMALLEST_NORMAL, 0.0, scale)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    per_unit = reciprocal(scale)
    zero_point = (0.5 - torch.where(scale.isfinite(), low, 0.0) * per_unit).floor().clamp(0, last)
    code = (blocks * per_unit[:, None] + (zero_point + 0.5)[:, None]).floor().clamp(0, last)
    codes = from_blocks(torch.where(scale.isfinite()[:, None], code, 0.0), x, torch.uint8)
    zero_point = zero_point.to(torch.uint8)
    if statistics is not None:
        statistics.copy_(measure(x, dequantize_affine(codes, scale, zero_point, block_size, x.dtype)))
    return codes, scale, zero_point


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return ``(code - zero_point) * scale``, ``[*codes.shape]`` of ``dtype``; NaN where the scale is."""
    values = (to_blocks(codes, block_size) - zero_point.float()[:, None]) * scale[:, None]
    values = torch.where(scale.isfinite()[:, None], values, torch.nan)
    return from_blocks(values, codes, dtype)


def error_statistics(x: Tensor, reconstruction: Tensor) -> ErrorStatistics:
    """Measure in float64 what ``reconstruction`` lost of ``x``, of the same shape; zeros for empty tensors."""
    original, decoded = x.detach().double(), reconstruction.detach().double()
    error = (decoded - original).abs()
    return ErrorStatistics(
        squared_error=error.square().sum(),
        squares=original.square().sum(),
        max_error=error.max() if error.numel() else error.new_zeros(()),
        zeros=(original == 0).sum().double(),
        zeroed=((original != 0) & (decoded == 0)).sum().double(),
    )


def measure(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return :func:`error_statistics` as one tensor, ``[5]`` float64."""
    return torch.stack(error_statistics(x, reconstruction))
