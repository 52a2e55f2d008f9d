"""The public functions, which check their arguments and call the operators."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from q8lightning.quantization import ops
from q8lightning.quantization.checks import check_buffer, check_codes, check_float, result_dtype
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook, CodebookName, get_codebook
from q8lightning.quantization.spec.layout import check_block_size
from q8lightning.system.arguments import check_bool

Code = CodebookName | Codebook | Tensor | Sequence[float]
"""A codebook, its name or its levels; see :func:`q8lightning.quantization.spec.codebook.get_codebook`."""


def _spec(code: Code) -> str:
    return code if isinstance(code, str) and code in BUILTIN else get_codebook(code).spec


def quantize_blockwise(
    A: Tensor,
    code: Code,
    blocksize: int,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode each element as the nearest level of a codebook, relative to the largest magnitude of its block.

    Args:
        A: ``[*shape]`` float32, float16, bfloat16 or float64; read as one flat row-major sequence.
        code: A built-in codebook's name, a codebook, or 2 to 256 increasing levels in [-1, 1] with 0.
        blocksize: Elements that share a scale; a power of two between 32 and 4096.
        absmax: ``[ceil(numel / blocksize)]`` float32, written to and returned if given.
        out: ``[*shape]`` uint8, written to and returned if given.
        statistics: ``[5]`` float64, written to if given: what is lost, as the fields of
            :class:`q8lightning.quantization.spec.reference.ErrorStatistics` in their order.

    Returns:
        ``(out, absmax)``: the codes, and the largest magnitude of each block in the units of ``A``, 0 for an all-zero
        block. It is not finite for a block with NaN or infinity.

    Raises:
        ValueError: If the dtype, the block size, the codebook or a buffer does not fit. Nothing is written then.

    Example:
        >>> codes, absmax = quantize_blockwise(torch.tensor([-2.0, 0.0, 1.0]), "int2", 32)
        >>> codes.tolist(), absmax.tolist()
        ([0, 2, 3], [2.0])
    """
    check_float(A, "A")
    spec = _spec(code)
    blocks = -(-A.numel() // check_block_size(blocksize))
    if out is not None:
        check_buffer(out, "out", A.shape, torch.uint8, A.device)
    if absmax is not None:
        check_buffer(absmax, "absmax", [blocks], torch.float32, A.device)
    if statistics is not None:
        check_buffer(statistics, "statistics", [5], torch.float64, A.device)
    codes, scale, lost = ops.quantize(A.detach(), spec, blocksize, measure=statistics is not None)
    if statistics is not None:
        statistics.copy_(lost)
    return codes if out is None else out.copy_(codes), scale if absmax is None else absmax.copy_(scale)


def dequantize_blockwise(
    a: Tensor,
    absmax: Tensor,
    code: Code,
    blocksize: int = 64,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``level * absmax`` for each code.

    Args:
        a: ``[*shape]`` uint8 codes of :func:`quantize_blockwise`.
        absmax: ``[ceil(numel / blocksize)]`` float32.
        code: The codebook that the codes were made with.
        blocksize: The block size that the codes were made with.
        dtype: The dtype of the result; the dtype of ``out`` if missing.
        out: ``[*shape]`` of ``dtype``, written to and returned if given.

    Returns:
        ``[*shape]`` values, exact zeros where ``absmax`` is 0, NaN where it is not finite. A code that the codebook
        lacks decodes to 0.

    Raises:
        ValueError: If both ``dtype`` and ``out`` are missing, or an argument does not fit. Nothing is written then.

    Example:
        >>> codes, absmax = torch.tensor([0, 2, 3], dtype=torch.uint8), torch.tensor([2.0])
        >>> dequantize_blockwise(codes, absmax, "int2", 32, dtype=torch.float32)
        tensor([-2.,  0.,  1.])
    """
    dtype = result_dtype(dtype, out, "dequantize_blockwise")
    check_codes(a, "quantize_blockwise")
    spec = _spec(code)
    check_buffer(absmax, "absmax", [-(-a.numel() // check_block_size(blocksize))], torch.float32, a.device)
    if out is not None:
        check_buffer(out, "out", a.shape, dtype, a.device)
    values = ops.dequantize(a, absmax, spec, blocksize, dtype)
    return values if out is None else out.copy_(values)


@overload
def fake_quantize(x: Tensor, code: Code, block_size: int, return_statistics: Literal[False] = ...) -> Tensor: ...
@overload
def fake_quantize(
    x: Tensor, code: Code, block_size: int, return_statistics: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def fake_quantize(
    x: Tensor, code: Code, block_size: int, return_statistics: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``x`` as the codebook would store it, in the dtype of ``x``, with a straight-through gradient.

    The gradient is the identity (Bengio et al., arXiv:1308.3432). No element is clipped, because the scale is the
    block's largest magnitude.

    Args:
        x: ``[*shape]`` float32, float16, bfloat16 or float64.
        code: A built-in codebook's name, a codebook, or its levels.
        block_size: Elements that share a scale; a power of two between 32 and 4096.
        return_statistics: Whether to return what is lost, too: ``[5]`` float64 on the device of ``x``, the fields of
            :class:`q8lightning.quantization.spec.reference.ErrorStatistics` in their order.

    Raises:
        ValueError: If the dtype, the block size or the codebook does not fit.

    Example:
        >>> fake_quantize(torch.tensor([-2.0, 0.3, 0.9]), "int2", 32)
        tensor([-2.,  0.,  1.])
    """
    check_float(x, "x")
    check_bool("return_statistics", return_statistics)
    spec = _spec(code)
    check_block_size(block_size)
    values: Tensor
    values, lost = ops.fake_quantize(x, spec, block_size, return_statistics)
    return (values, lost.detach()) if return_statistics else values


def fake_quantize_rows(x: Tensor, code: Code, per_tensor: bool = False) -> Tensor:
    """Fake-quantize with one scale for each vector along the last axis, of any length, or with one scale for all.

    Args:
        x: ``[*shape]`` float32, float16, bfloat16 or float64.
        code: A built-in codebook's name, a codebook, or its levels.
        per_tensor: Whether all of ``x`` shares one scale.

    Raises:
        ValueError: If the dtype or the codebook does not fit.

    Example:
        >>> fake_quantize_rows(torch.tensor([[-2.0, 0.3], [0.5, 0.2]]), "int2")
        tensor([[-2.0000,  0.0000],
                [ 0.2500,  0.2500]])
    """
    check_float(x, "x")
    row = x.numel() if per_tensor or x.ndim == 0 else x.shape[-1]
    result: Tensor = ops.fake_quantize_rows(x, _spec(code), max(row, 1))
    return result
