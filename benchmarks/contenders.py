"""Other implementations that ``kernels.py`` times beside ours; no command of its own."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import get_codebook


@dataclass
class Row:
    """One measured function: what it is, whose, on what, and how many bytes it must move."""

    kernel: str
    whose: str
    dtype: torch.dtype
    block: int
    bytes: float
    run: Callable[[], object]
    milliseconds: float = 0.0
    floor: float = 0.0


def rows(x: Tensor, block: int) -> Iterator[Row]:
    """Yield all of them that run here."""
    yield from compiled(x, block)
    yield from torch_per_channel(x, block)
    yield from binary_search(x, block)
    yield from bitsandbytes(x, block)


def compiled(x: Tensor, block: int) -> Iterator[Row]:
    """``torch.compile`` of the plain expression for the linear codec."""
    n, size, blocks = x.numel(), x.element_size(), x.numel() / block

    @torch.compile
    def quantize(t: Tensor) -> tuple[Tensor, Tensor]:
        rows = t.view(-1, block).float()
        scale = rows.abs().amax(dim=1)
        return ((rows / scale[:, None]) * 127).round().to(torch.int8), scale

    def fake(t: Tensor) -> Tensor:
        rows = t.view(-1, block).float()
        scale = rows.abs().amax(dim=1, keepdim=True)
        return (((rows / scale) * 127).round() * (scale / 127)).to(t.dtype).view(-1)

    @torch.compile
    def fake_quantize(t: Tensor) -> Tensor:
        return fake(t)

    @torch.compile
    def measured(t: Tensor) -> tuple[Tensor, ...]:
        values = fake(t)
        original, error = t.float(), values.float() - t.float()
        zeroed = ((values == 0) & (t != 0)).sum()
        return values, error.square().sum(), original.square().sum(), error.abs().amax(), (t == 0).sum(), zeroed

    moved = n * (size + 1) + 4 * blocks
    yield Row("quantize linear", "torch.compile", x.dtype, block, moved, partial(quantize, x))
    yield Row("fake-quantize linear", "torch.compile", x.dtype, block, 2 * n * size, partial(fake_quantize, x))
    name = "fake-quantize linear + statistics"
    yield Row(name, "torch.compile", x.dtype, block, 2 * n * size, partial(measured, x))


def torch_per_channel(x: Tensor, block: int) -> Iterator[Row]:
    """Torch's own operators, one block a channel; they need the scales, which are computed first."""
    n, size, rows = x.numel(), x.element_size(), x.view(-1, block)
    zero = torch.zeros(len(rows), dtype=torch.int32, device=x.device)

    def quantize() -> Tensor:
        return torch.quantize_per_channel(rows, rows.abs().amax(dim=1).double() / 127, zero.long(), 0, torch.qint8)

    def fake_quantize() -> Tensor:
        scale = rows.abs().amax(dim=1).float() / 127
        return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, -127, 127)

    contenders = {
        "quantize linear": (quantize, n * (size + 1) + 4 * n / block),
        "fake-quantize linear": (fake_quantize, 2 * n * size),
    }
    for kernel, (run, moved) in contenders.items():
        try:
            run()
        except (RuntimeError, NotImplementedError) as error:
            print(f"torch's {kernel} per channel does not run with {x.dtype}: {str(error).splitlines()[0]}")
        else:
            yield Row(kernel, "torch per channel", x.dtype, block, moved, run)


@triton.jit
def _textbook_kernel(x, codes, scale, thresholds, BLOCK: tl.constexpr):
    """One block a program and a binary search of eight steps, as one writes it first."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at).to(tl.float32)
    absmax = tl.max(tl.abs(value), axis=0)
    y = value * tl.div_rn(1.0, absmax)
    code = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(8):
        half = 1 << (7 - bit)
        code += tl.where(y > tl.load(thresholds + code + half - 1), half, 0)
    tl.store(codes + at, code.to(tl.uint8))
    tl.store(scale + block, absmax)


def binary_search(x: Tensor, block: int) -> Iterator[Row]:
    """A textbook kernel for the dynamic map."""
    book = get_codebook("dynamic")
    thresholds = torch.cat([book.thresholds, torch.tensor([torch.inf])]).to(x.device)

    def quantize(t: Tensor = x) -> tuple[Tensor, Tensor]:
        codes = torch.empty(t.shape, dtype=torch.uint8, device=t.device)
        scale = torch.empty(t.numel() // block, device=t.device)
        _textbook_kernel[(t.numel() // block,)](t, codes, scale, thresholds, BLOCK=block, num_warps=4)
        return codes, scale

    sample = x[: 2**20]
    if not torch.equal(quantize(sample)[0], reference.quantize(sample, book, block)[0]):
        raise AssertionError("the textbook search finds other codes than the reference")
    moved = x.numel() * (x.element_size() + 1) + 4 * x.numel() / block
    yield Row("quantize dynamic", "binary search", x.dtype, block, moved, quantize)


def bitsandbytes(x: Tensor, block: int) -> Iterator[Row]:
    """The library's CUDA kernels for its dynamic map."""
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError:
        return
    moved = x.numel() * (x.element_size() + 1) + 4 * x.numel() / block
    quantize = partial(functional.quantize_blockwise, x, blocksize=block)
    yield Row("quantize dynamic", "bitsandbytes", x.dtype, block, moved, quantize)
    codes, state = quantize()
    dequantize = partial(functional.dequantize_blockwise, codes, state)
    yield Row("dequantize dynamic", "bitsandbytes", x.dtype, block, moved, dequantize)
