"""The codecs of ``reference.py`` for CPU tensors, in cache-sized chunks: the same results, many times faster.

Each function has the signature and the meaning of its namesake in the reference; ``statistics`` (``[5]`` float64) gets
:func:`reference.measure` of the tensor and its decoded form, measured while a chunk is in the caches. Chunks hold whole
blocks, so a chunk with a block that is not finite is simply handed to the reference. Passes write into a scratch that
is allocated once a call: fresh memory for every intermediate would cost more than the arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.backends.cpu_codecs import ChunkCodec, Levels, Log, Parts, Residual
from q8lightning.quantization.backends.cpu_memory import scratch
from q8lightning.quantization.backends.cpu_packing import NarrowScales, Packed
from q8lightning.quantization.backends.cpu_statistics import Totals, add_pieces
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook
from q8lightning.quantization.spec.layout import KernelCodec, Layout, empty_scales, take_stretches
from q8lightning.quantization.spec.sampling import stretches_on_cpu

CHUNK, SHARED_CHUNK = 2**18, 2**20
"""Elements per chunk where one thread computes, and where several share each pass: they wait for each other at its end.

The passes over a megabyte of float32 and its scratch stay in a core's cache (``benchmarks/cpu.py --chunk`` compares
sizes)."""


CHUNK_CODECS: Mapping[str, Callable[[KernelCodec], ChunkCodec]] = MappingProxyType(
    {
        "codebook": lambda codec: Levels(codec.codebook or BUILTIN["linear"], codec.end != 0),
        "log": lambda codec: Log(codec.layout.bits[0], codec.layout.scale_name),
        "residual": lambda codec: Residual(*codec.layout.bits),
    }
)
"""What encodes and decodes chunks, by what kernels call its arithmetic."""


def _chunk_codec(codec: KernelCodec) -> ChunkCodec:
    chunks = CHUNK_CODECS[codec.kernel](codec)
    if codec.layout.scale_dtype != torch.float32:
        chunks = NarrowScales(chunks, codec.layout.scale_dtype)
    return chunks if codec.layout.is_bytes else Packed(chunks, codec.layout)


def knows(codec: KernelCodec | None) -> bool:
    """Whether the functions here that write into memory take a codec."""
    return codec is not None and codec.kernel in CHUNK_CODECS


def _chunks(
    block_size: int, elements: Sequence[Tensor], rows: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield what flat tensors have in each chunk; a short last block comes alone.

    Args:
        block_size: How many elements a block has.
        elements: ``[numel]`` each; yielded as ``[rows, width]``.
        rows: ``[blocks, ...]`` each.
    """
    numel = elements[0].numel()
    blocks, rest = divmod(numel, block_size)
    step = max((CHUNK if torch.get_num_threads() == 1 else SHARED_CHUNK) // block_size, 1)
    whole = [(each[:-rest] if rest else each).view(-1, block_size) for each in elements]
    whole += [each[:-1] if rest else each for each in rows]
    if 0 < blocks <= step:
        yield whole[: len(elements)], whole[len(elements) :]
    elif blocks:  # in one call for all chunks: each slice would take a microsecond
        for chunk in zip(*(torch.split(each, step) for each in whole), strict=True):
            yield list(chunk[: len(elements)]), list(chunk[len(elements) :])
    if rest:
        yield [each[-rest:].view(1, -1) for each in elements], [each[-1:] for each in rows]


def _chunks_of(layout: Layout, elements: Tensor, parts: Parts) -> Iterator[tuple[Tensor, Parts]]:
    """Yield what a flat tensor and its parts have in each chunk.

    Args:
        layout: Of the parts.
        elements: ``[numel]``; yielded as ``[rows, width]``.
        parts: As :meth:`Layout.views` returns them; codes are yielded as ``[rows, bytes of a block]``.
    """
    codes, scale, *later = parts
    stages = list(zip((codes, *later), layout.bits, strict=True))
    by_element = [part for part, bits in stages if bits == 8]
    by_block = [part.view(-1, layout.block_size * bits // 8) for part, bits in stages if bits < 8]
    for (values, *long), (factors, *short) in _chunks(layout.block_size, (elements, *by_element), (scale, *by_block)):
        first, *others = (long.pop(0) if bits == 8 else short.pop(0) for bits in layout.bits)
        yield values, (first, factors, *others)


def _encode(codec: ChunkCodec, flat: Tensor, layout: Layout, parts: Parts) -> bool:
    """Write the parts of a flat tensor; return whether all of it can be encoded."""
    finite = True
    for blocks, chunk in _chunks_of(layout, flat, parts):
        memory = scratch(*blocks.shape)
        if flat.dtype != torch.float32:
            blocks = memory.floats[3].copy_(blocks)
        if not codec.encode(blocks, chunk, memory):
            finite = False
            for part, expected in zip(chunk, codec.encode_slowly(blocks), strict=True):
                part.view(-1).copy_(expected.view(-1))
    return finite


def _decode(codec: ChunkCodec, parts: Parts, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the values of the parts of a flat tensor."""
    values = torch.empty(parts[0].numel(), dtype=dtype, device="cpu")
    _decode_into(codec, parts, layout, values)
    return values


def _decode_into(codec: ChunkCodec, parts: Parts, layout: Layout, values: Tensor) -> None:
    """Write the values of the parts of a flat tensor to ``values``, of any float dtype."""
    dtype = values.dtype
    finite = _is_finite(parts[1])
    for out, chunk in _chunks_of(layout, values, parts):
        if not finite and not _is_finite(chunk[1]):
            out.copy_(codec.decode_slowly(chunk, out.shape[1], dtype).view(out.shape))
            continue
        memory = scratch(*out.shape)
        decoded = out if dtype == torch.float32 else memory.floats[3]
        codec.decode(chunk, decoded, memory)
        if dtype != torch.float32:
            out.copy_(decoded)


def _is_finite(scale: Tensor) -> bool:
    return bool(scale.isfinite().all())


def _measure_whole(codec: ChunkCodec, flat: Tensor, layout: Layout, parts: Parts, statistics: Tensor) -> None:
    """Write to ``statistics`` what the parts of a flat tensor have lost of it."""
    totals = Totals()
    for blocks, chunk in _chunks_of(layout, flat, parts):
        _add(totals, codec, blocks, chunk)
    totals.write(statistics)


def _add(totals: Totals, codec: ChunkCodec, original: Tensor, parts: Parts) -> None:
    """Add what a chunk has lost."""
    if original.dtype == torch.float64 or not _is_finite(parts[1]):
        decoded = codec.decode_slowly(parts, original.shape[1], original.dtype)
        totals.add_slowly(original, decoded.view(original.shape))
        return
    memory = scratch(*original.shape)
    decoded = memory.floats[3]
    codec.decode(parts, decoded, memory)
    if original.dtype != torch.float32:
        decoded.copy_(decoded.to(original.dtype))
        original = memory.floats[4].copy_(original)
    totals.add(original, decoded, memory)


def encode_into(x: Tensor, codec: KernelCodec, parts: Parts) -> bool:
    """Encode a flat tensor into memory that is there.

    Args:
        x: ``[numel]`` of any float dtype.
        codec: How; one that :func:`knows`.
        parts: What is written: packed codes, scales and packed residual codes, as :meth:`Layout.views` returns them.

    Returns:
        Whether all scales are finite.
    """
    return _encode(_chunk_codec(codec), x.detach(), codec.layout, parts)


def decode_into(codec: KernelCodec, parts: Parts, values: Tensor) -> None:
    """Decode into memory that is there.

    Args:
        codec: How; one that :func:`knows`.
        parts: As for :func:`encode_into`.
        values: ``[numel]`` of any float dtype, to be written. The floats of the scratch but the fourth and the fifth
            are overwritten.
    """
    _decode_into(_chunk_codec(codec), parts, codec.layout, values)


def measure_into(x: Tensor, codec: KernelCodec, parts: Parts, statistics: Tensor) -> None:
    """Measure in whole what :func:`encode_into` has lost."""
    _measure_whole(_chunk_codec(codec), x.detach(), codec.layout, parts, statistics)


def measure_together(
    tensors: Sequence[Tensor], codec: KernelCodec, parts: Sequence[Parts], statistics: Sequence[Tensor]
) -> None:
    """Measure what :func:`encode_into` has lost of tensors that it could encode: of large ones, in an eighth.

    Args:
        tensors: ``[numel]`` each, of one dtype.
        codec: How all of them are encoded.
        parts: What each was encoded to.
        statistics: ``[5]`` float64 for what is lost of each, to be written.
    """
    chunks, block_size = _chunk_codec(codec), codec.layout.block_size
    totals = [Totals() for _ in tensors]
    pieces: list[_Piece] = []
    for piece in (each for one in zip(totals, tensors, parts, strict=True) for each in _pieces(*one, codec.layout)):
        alone = piece.blocks.dtype == torch.float64 or piece.blocks.shape[1] != block_size
        if alone:
            _add(piece.totals, chunks, piece.blocks, piece.parts)
            continue
        if pieces and sum(each.blocks.numel() for each in (*pieces, piece)) > CHUNK:
            _add_together(chunks, pieces)
            pieces.clear()
        pieces.append(piece)
    if pieces:
        _add_together(chunks, pieces)
    for x, total, each in zip(tensors, totals, statistics, strict=True):
        taken, length = stretches_on_cpu(x.numel(), block_size)
        total.write(each, 1.0 if taken is None else x.numel() / (len(taken) * length))


class _Piece(NamedTuple):
    """Some of what is measured of a tensor.

    Attributes:
        totals: Of the tensor.
        blocks: ``[rows, width]``, originals.
        parts: What they are encoded to.
    """

    totals: Totals
    blocks: Tensor
    parts: Parts


def _pieces(totals: Totals, x: Tensor, parts: Parts, layout: Layout) -> Iterator[_Piece]:
    """Yield what is measured of a tensor, at most a chunk at a time."""
    taken, length = stretches_on_cpu(x.numel(), layout.block_size)
    if taken is None:
        yield from (_Piece(totals, *chunk) for chunk in _chunks_of(layout, x.detach(), parts))
        return
    for some in torch.split(taken, max(CHUNK // length, 1)):
        blocks = take_stretches(x.detach(), some, length).view(-1, layout.block_size)
        codes, scale, *later = layout.take(parts, some, length)
        first, *others = (each.view(blocks.shape[0], -1) for each in (codes, *later))
        yield _Piece(totals, blocks, (first, scale, *others))


def _add_together(codec: ChunkCodec, pieces: Sequence[_Piece]) -> None:
    """Add what several pieces of one dtype and width have lost, in one pass over all of them."""
    rows = [len(piece.blocks) for piece in pieces]
    memory = scratch(sum(rows), pieces[0].blocks.shape[1])
    decoded, dtype = memory.floats[3], pieces[0].blocks.dtype
    codec.decode(tuple(map(torch.cat, zip(*(piece.parts for piece in pieces), strict=True))), decoded, memory)
    if dtype != torch.float32:
        decoded.copy_(decoded.to(dtype))
    original = torch.cat([piece.blocks for piece in pieces], out=memory.floats[4])
    add_pieces([piece.totals for piece in pieces], rows, original, decoded, memory)


def _quantize(codec: ChunkCodec, x: Tensor, layout: Layout, statistics: Tensor | None) -> Parts:
    """Return the parts of a tensor, with codes in its shape."""
    flat = x.detach().reshape(-1)
    blocks = -(-x.numel() // layout.block_size)
    scale = torch.empty((blocks, 2) if layout.scales == 2 else blocks, dtype=torch.float32, device="cpu")
    codes, *later = (torch.empty(x.numel(), dtype=torch.uint8, device="cpu") for _ in layout.bits)
    parts = codes, scale, *later
    _encode(codec, flat, layout, parts)
    if statistics is not None:
        _measure_whole(codec, flat, layout, parts, statistics)
    return tuple(part if index == 1 else part.view(x.shape) for index, part in enumerate(parts))


def quantize(
    x: Tensor, codebook: Codebook, block_size: int, signed_scale: bool = False, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    codes, scale = _quantize(Levels(codebook, signed_scale), x, Layout(block_size), statistics)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, codebook: Codebook, block_size: int, dtype: torch.dtype) -> Tensor:
    return _decode(Levels(codebook), (codes.reshape(-1), scale), Layout(block_size), dtype).view(codes.shape)


def fake_quantize(x: Tensor, codebook: Codebook, block_size: int, statistics: Tensor | None = None) -> Tensor:
    codes, scale = quantize(x, codebook, block_size, statistics=statistics)
    return dequantize(codes, scale, codebook, block_size, x.dtype)


_TWO_BYTES = (8, 8)
"""The bits of two codes in a byte each, whatever bits they have."""


def quantize_residual(
    x: Tensor, block_size: int, bits: int, residual_bits: int, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    layout = Layout(block_size, bits=_TWO_BYTES)
    codes, scale, later = _quantize(Residual(bits, residual_bits), x, layout, statistics)
    return codes, later, scale


def dequantize_residual(
    codes: Tensor, residual: Tensor, scale: Tensor, block_size: int, bits: int, residual_bits: int, dtype: torch.dtype
) -> Tensor:
    parts = codes.reshape(-1), scale, residual.reshape(-1)
    layout = Layout(block_size, bits=_TWO_BYTES)
    return _decode(Residual(bits, residual_bits), parts, layout, dtype).view(codes.shape)


def quantize_log(
    x: Tensor, block_size: int, bits: int, scale_dtype: str = "float32", statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    codes, bounds = _quantize(Log(bits, scale_dtype), x, Layout(block_size, scales=2), statistics)
    return codes, bounds


def dequantize_log(codes: Tensor, bounds: Tensor, block_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    return _decode(Log(bits), (codes.reshape(-1), bounds), Layout(block_size, scales=2), dtype).view(codes.shape)


def quantize_affine(
    x: Tensor, block_size: int, bits: int = 8, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    flat = x.detach().reshape(-1)
    codes, scale = torch.empty(x.numel(), dtype=torch.uint8, device="cpu"), empty_scales(flat, block_size)
    zero_point, totals = empty_scales(flat, block_size, dtype=torch.uint8), Totals()
    for (blocks, *elements), rows in _chunks(block_size, (flat, codes), (scale, zero_point)):
        chunk = reference.quantize_affine(blocks, blocks.shape[1], bits)
        for part, expected in zip((*elements, *rows), chunk, strict=True):
            part.copy_(expected)
        if statistics is not None:
            totals.add_slowly(blocks, reference.dequantize_affine(*chunk, blocks.shape[1], x.dtype))
    if statistics is not None:
        totals.write(statistics)
    return codes.view(x.shape), scale, zero_point


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(codes.numel(), dtype=dtype, device="cpu")
    for (out, first), (factors, zeros) in _chunks(block_size, (values, codes.reshape(-1)), (scale, zero_point)):
        out.copy_(reference.dequantize_affine(first, factors, zeros, out.shape[1], dtype))
    return values.view(codes.shape)
