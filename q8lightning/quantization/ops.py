"""The operators: each codec as a ``torch.library`` op with a fake implementation, and the public functions over them.

An op picks the backend by the device of its input (``backend.py``) and does nothing else. Codebooks travel as their
:attr:`Codebook.spec`, so that ops take only tensors and primitives. Those that also measure what is lost are in
``measured_ops.py``.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.library import custom_op

from q8lightning.quantization import measured_ops, reference
from q8lightning.quantization.backend import backend_of
from q8lightning.quantization.codebook import BUILTIN, Codebook, get_codebook
from q8lightning.quantization.measured_ops import empty_codes, empty_scale

Code = str | Codebook | Tensor | Sequence[float]
"""What names or lists a codebook; see :func:`q8lightning.quantization.codebook.get_codebook`."""


@custom_op("q8lightning::quantize", mutates_args=())
def quantize(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    return backend_of(x).quantize(x, get_codebook(codebook), block_size, signed_scale)


@quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size)


@custom_op("q8lightning::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, codebook: str, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize(codes, scale, get_codebook(codebook), block_size, dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, codebook: str, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@custom_op("q8lightning::fake_quantize", mutates_args=())
def _fake_quantize(x: Tensor, codebook: str, block_size: int) -> Tensor:
    return backend_of(x).fake_quantize(x, get_codebook(codebook), block_size)


@_fake_quantize.register_fake
def _(x: Tensor, codebook: str, block_size: int) -> Tensor:
    return x.new_empty(x.shape)


def _straight_through(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


_fake_quantize.register_autograd(_straight_through)


@custom_op("q8lightning::fake_quantize_rows", mutates_args=())
def _fake_quantize_rows(x: Tensor, codebook: str, row: int) -> Tensor:
    rows, width = x.reshape(-1, row), max(32, 1 << (row - 1).bit_length())
    if width > 4096 or x.numel() == 0:  # more than the kernels hold at once
        return reference.fake_quantize_rows(x, get_codebook(codebook), row)
    padded = torch.nn.functional.pad(rows, (0, width - row))  # zeros change no scale
    values = backend_of(x).fake_quantize(padded, get_codebook(codebook), width)
    return values[:, :row].contiguous().view(x.shape)


@_fake_quantize_rows.register_fake
def _(x: Tensor, codebook: str, row: int) -> Tensor:
    return x.new_empty(x.shape)


_fake_quantize_rows.register_autograd(_straight_through)


@custom_op("q8lightning::quantize_residual", mutates_args=())
def quantize_residual(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return backend_of(x).quantize_residual(x, block_size)


@quantize_residual.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_codes(x), empty_scale(x, block_size)


@custom_op("q8lightning::dequantize_residual", mutates_args=())
def dequantize_residual(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_residual(codes, residual, scale, block_size, dtype)


@dequantize_residual.register_fake
def _(codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@custom_op("q8lightning::quantize_log", mutates_args=())
def quantize_log(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return backend_of(x).quantize_log(x, block_size)


@quantize_log.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size, 2)


@custom_op("q8lightning::dequantize_log", mutates_args=())
def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_log(codes, bounds, block_size, dtype)


@dequantize_log.register_fake
def _(codes: Tensor, bounds: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@custom_op("q8lightning::quantize_affine", mutates_args=())
def quantize_affine(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return backend_of(x).quantize_affine(x, block_size)


@quantize_affine.register_fake
def _(x: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_codes(x), empty_scale(x, block_size), empty_scale(x, block_size, dtype=torch.uint8)


@custom_op("q8lightning::dequantize_affine", mutates_args=())
def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return backend_of(codes).dequantize_affine(codes, scale, zero_point, block_size, dtype)


@dequantize_affine.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def check_block_size(block_size: int) -> int:
    """Return ``block_size`` if it is a power of two between 32 and 4096, else raise ValueError."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise ValueError(f"block_size must be an integer, got {block_size!r}; try 256")
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        nearest = min((2**i for i in range(5, 13)), key=lambda size: abs(size - block_size))
        raise ValueError(f"block_size must be a power of two between 32 and 4096, got {block_size}; try {nearest}")
    return block_size


def _spec(code: Code) -> str:
    return code if isinstance(code, str) and code in BUILTIN else get_codebook(code).spec


def _check_float(x: Tensor, name: str) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}; convert it first")


def _check_buffer(buffer: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(buffer.shape) != tuple(shape) or buffer.dtype != dtype or buffer.device != device:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)} on {device},"
            f" got {buffer.dtype} of shape {list(buffer.shape)} on {buffer.device}"
        )


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
        absmax: Written to and returned if given: ``[ceil(numel / blocksize)]`` float32.
        out: Written to and returned if given: ``[*shape]`` uint8.
        statistics: Written to if given: ``[5]`` float64, what the quantization loses; the fields of
            :class:`q8lightning.quantization.reference.ErrorStatistics`, in their order.

    Returns:
        ``(out, absmax)``: the codes, and the largest magnitudes in the units of ``A``, 0 for an all-zero block. A block
        with NaN or infinity has a scale that is not finite.

    Raises:
        ValueError: If the dtype, the block size, the codebook or a buffer does not fit; nothing is written then.

    Example:
        >>> codes, absmax = quantize_blockwise(torch.tensor([-2.0, 0.0, 1.0]), "int2", 32)
        >>> codes.tolist(), absmax.tolist()
        ([0, 2, 3], [2.0])
    """
    _check_float(A, "A")
    spec = _spec(code)
    blocks = -(-A.numel() // check_block_size(blocksize))
    if out is not None:
        _check_buffer(out, "out", A.shape, torch.uint8, A.device)
    if absmax is not None:
        _check_buffer(absmax, "absmax", [blocks], torch.float32, A.device)
    if statistics is not None:
        _check_buffer(statistics, "statistics", [5], torch.float64, A.device)
    if statistics is None:
        codes, scale = quantize(A.detach(), spec, blocksize)
    else:
        codes, scale, lost = measured_ops.quantize(A.detach(), spec, blocksize)
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
        dtype: The dtype of the result; that of ``out`` if missing.
        out: Written to and returned if given: ``[*shape]`` of ``dtype``.

    Returns:
        ``[*shape]`` values, exact zeros where ``absmax`` is 0, NaN where it is not finite. A code that the codebook
        lacks decodes to 0.

    Raises:
        ValueError: If both ``dtype`` and ``out`` are missing, or an argument does not fit; nothing is written then.

    Example:
        >>> codes, absmax = torch.tensor([0, 2, 3], dtype=torch.uint8), torch.tensor([2.0])
        >>> dequantize_blockwise(codes, absmax, "int2", 32, dtype=torch.float32)
        tensor([-2.,  0.,  1.])
    """
    if out is None and dtype is None:
        raise ValueError("dequantize_blockwise needs a dtype or an out tensor, got neither; pass dtype=torch.float32")
    if a.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {a.dtype}; pass what quantize_blockwise returned")
    dtype = out.dtype if dtype is None and out is not None else dtype
    assert dtype is not None
    _check_float(torch.empty(0, dtype=dtype), "the result")
    spec = _spec(code)
    _check_buffer(absmax, "absmax", [-(-a.numel() // check_block_size(blocksize))], torch.float32, a.device)
    if out is not None:
        _check_buffer(out, "out", a.shape, dtype, a.device)
    values = dequantize(a, absmax, spec, blocksize, dtype)
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

    The gradient is the identity (Bengio et al., arXiv:1308.3432): with a scale that is the block's largest magnitude,
    every element is inside the range of the codebook.

    Args:
        x: ``[*shape]`` float32, float16, bfloat16 or float64.
        code: A built-in codebook's name, a codebook, or its levels.
        block_size: Elements that share a scale; a power of two between 32 and 4096.
        return_statistics: Also return ``[5]`` float64 on the device of ``x``, what the quantization loses: the fields
            of :class:`q8lightning.quantization.reference.ErrorStatistics`, in their order.

    Raises:
        ValueError: If the dtype, the block size or the codebook does not fit.

    Example:
        >>> fake_quantize(torch.tensor([-2.0, 0.3, 0.9]), "int2", 32)
        tensor([-2.,  0.,  1.])
    """
    _check_float(x, "x")
    spec = _spec(code)
    check_block_size(block_size)
    if return_statistics:
        values, statistics = measured_ops.fake_quantize(x, spec, block_size)
        return values, statistics.detach()
    result: Tensor = _fake_quantize(x, spec, block_size)
    return result


def fake_quantize_rows(x: Tensor, code: Code, per_tensor: bool = False) -> Tensor:
    """As :func:`fake_quantize`, with one scale for each vector along the last axis, of any length, or one for all.

    Args:
        x: ``[*shape]`` float32, float16, bfloat16 or float64.
        code: A built-in codebook's name, a codebook, or its levels.
        per_tensor: Let all of ``x`` share one scale.

    Raises:
        ValueError: If the dtype or the codebook does not fit.

    Example:
        >>> fake_quantize_rows(torch.tensor([[-2.0, 0.3], [0.5, 0.2]]), "int2")
        tensor([[-2.0000,  0.0000],
                [ 0.2500,  0.2500]])
    """
    _check_float(x, "x")
    row = x.numel() if per_tensor or x.ndim == 0 else x.shape[-1]
    result: Tensor = _fake_quantize_rows(x, _spec(code), max(row, 1))
    return result
