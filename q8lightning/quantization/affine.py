"""The public functions of the affine codec, which has a zero point."""

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.checks import check_buffer, check_codes, check_float, result_dtype
from q8lightning.quantization.spec.layout import check_bits, check_block_size


def quantize_affine_blockwise(
    A: Tensor,
    blocksize: int,
    bits: int = 8,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    out: Tensor | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode each element as one of ``2**bits`` equal steps from the smallest to the largest value of its block.

    This is the standard asymmetric integer quantization, ``A = (code - zero_point) * scale``, for values that lie on
    one side of zero. The range of a block is widened to 0, so that 0 is exact. A value halfway between two codes takes
    the upper one. No error exceeds half a step, but for the rounding of float32.

    Args:
        A: ``[*shape]`` float32, float16, bfloat16 or float64; read as one flat row-major sequence.
        blocksize: Elements that share a scale and a zero point; a power of two between 32 and 4096.
        bits: The bits of a code, 2 to 8. Each code takes a byte, whatever its bits.
        scale: ``[ceil(numel / blocksize)]`` float32, written to and returned if given.
        zero_point: ``[ceil(numel / blocksize)]`` uint8, written to and returned if given.
        out: ``[*shape]`` uint8, written to and returned if given.
        statistics: ``[5]`` float64, written to if given: what is lost, as the fields of
            :class:`q8lightning.quantization.spec.reference.ErrorStatistics` in their order.

    Returns:
        ``(out, scale, zero_point)``: the codes, the step of each block in the units of ``A``, and the code of 0. The
        scale is 0 for an all-zero block, and for one whose step is below the smallest normal float32. It is NaN for a
        block with NaN or infinity, whose codes and zero point are 0.

    Raises:
        ValueError: If the dtype, the block size, the bits or a buffer does not fit. Nothing is written then.

    Example:
        >>> codes, scale, zero_point = quantize_affine_blockwise(torch.tensor([-1.0, 0.0, 1.0, 2.0]), 32, bits=2)
        >>> codes.tolist(), scale.tolist(), zero_point.tolist()
        ([0, 1, 2, 3], [1.0], [1])
    """
    check_float(A, "A")
    blocks = -(-A.numel() // check_block_size(blocksize))
    check_bits("bits", bits)
    if out is not None:
        check_buffer(out, "out", A.shape, torch.uint8, A.device)
    if scale is not None:
        check_buffer(scale, "scale", [blocks], torch.float32, A.device)
    if zero_point is not None:
        check_buffer(zero_point, "zero_point", [blocks], torch.uint8, A.device)
    if statistics is not None:
        check_buffer(statistics, "statistics", [5], torch.float64, A.device)
    *parts, lost = ops.quantize_affine(A.detach(), blocksize, bits, measure=statistics is not None)
    if statistics is not None:
        statistics.copy_(lost)
    codes, scales, zero_points = (
        part if given is None else given.copy_(part)
        for part, given in zip(parts, (out, scale, zero_point), strict=True)
    )
    return codes, scales, zero_points


def dequantize_affine_blockwise(
    a: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    blocksize: int = 64,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``(code - zero_point) * scale`` for each code, whatever its bits.

    Args:
        a: ``[*shape]`` uint8 codes of :func:`quantize_affine_blockwise`.
        scale: ``[ceil(numel / blocksize)]`` float32.
        zero_point: ``[ceil(numel / blocksize)]`` uint8.
        blocksize: The block size that the codes were made with.
        dtype: The dtype of the result; the dtype of ``out`` if missing.
        out: ``[*shape]`` of ``dtype``, written to and returned if given.

    Returns:
        ``[*shape]`` values, exact zeros where the code is the zero point or the scale is 0, NaN where the scale is not
        finite. A value within half a step of the largest of ``dtype`` may become infinite.

    Raises:
        ValueError: If both ``dtype`` and ``out`` are missing, or an argument does not fit. Nothing is written then.

    Example:
        >>> codes, zero_point = torch.tensor([0, 1, 3], dtype=torch.uint8), torch.tensor([1], dtype=torch.uint8)
        >>> dequantize_affine_blockwise(codes, torch.tensor([0.5]), zero_point, 32, dtype=torch.float32)
        tensor([-0.5000,  0.0000,  1.0000])
    """
    dtype = result_dtype(dtype, out, "dequantize_affine_blockwise")
    check_codes(a, "quantize_affine_blockwise")
    blocks = -(-a.numel() // check_block_size(blocksize))
    check_buffer(scale, "scale", [blocks], torch.float32, a.device)
    check_buffer(zero_point, "zero_point", [blocks], torch.uint8, a.device)
    if out is not None:
        check_buffer(out, "out", a.shape, dtype, a.device)
    values: Tensor = ops.dequantize_affine(a, scale, zero_point, blocksize, dtype)
    return values if out is None else out.copy_(values)
