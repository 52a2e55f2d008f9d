"""Many tensors in one launch: the same bits as one by one, whatever their sizes, dtypes and addresses.

Interpreted on the CPU (``TRITON_INTERPRET=1``) and compiled on a GPU, as in ``test_kernels.py``.
"""

from typing import Any

import pytest
import torch
from support.devices import NOT_COMPILED, NOT_INTERPRETED
from support.oracle import same_bits
from torch import Tensor

from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.block_choice import chosen_blocks
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

pytest.importorskip("triton", reason="Triton is not installed")
from q8lightning.quantization.backends.kernels import launch, many, work_list

CODECS = [
    get_codec("softsign", 128),
    get_codec("linear", 256, residual_bits=8),
    get_codec("log", 128),
    get_codec("dynamic", 64),
    get_codec("fp8_e4m3", 2048),
    get_codec("softsign", 128, 6),
    get_codec("softsign", 32, 5),
    get_codec("linear", 256, residual_bits=3),
    get_codec("log", 128, 5),
    get_codec("linear", 32, 7, 3),
    get_codec("softsign", 128, 6, scale_dtype="bfloat16"),
    get_codec("int8", 64, scale_dtype="bfloat16"),
    get_codec("log", 128, 6, scale_dtype="bfloat16"),
    get_codec("log", 128, 4, scale_dtype="bfloat16"),
]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
SIZES = (5000, 1, 0, 4096, 16, 8208, 0, 33)


def _tensors(device: str, codec: Codec, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """Tensors of all sizes in turn of all dtypes, and some that do not begin at multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for i, size in enumerate(SIZES):
        x = torch.randn(size, generator=generator) * 10.0 ** (i % 5 - 2)
        tensors.append((x.abs() if codec.unsigned else x).to(dtypes[i % len(dtypes)]).to(device))
    shifted = torch.randn(2048 + 3, generator=generator).abs().to(device)
    return [*tensors, shifted[3:], shifted[1:2001]]


def _buffer(device: str, tensors: list[Tensor], sizes: list[tuple[int, int]]) -> tuple[Tensor, tuple[int, ...]]:
    """A buffer full of 77 and, for each tensor's head and whole, where it begins: some codes aligned, some not."""
    starts, end = [], 16
    for i, (head, whole) in enumerate(sizes):
        start = end + (-(end + head) % 16 if i % 3 else -end % 4)
        starts.append(start)
        end = start + whole + 8
    return torch.full((end + 16,), 77, dtype=torch.uint8, device=device), tuple(starts)


def _assert_untouched(buffer: Tensor, starts: tuple[int, ...], sizes: list[int]) -> None:
    outside = torch.ones(buffer.numel(), dtype=torch.bool)
    for start, size in zip(starts, sizes, strict=True):
        outside[start : start + size] = False
    assert (buffer.cpu()[outside] == 77).all(), "something was written beside the results"


@each_codec
@pytest.mark.parametrize("measure", [False, True])
def test_a_group_is_encoded_and_decoded_as_its_tensors_one_by_one(device: str, codec: Codec, measure: bool) -> None:
    # The interpreter truncates to bfloat16 where it should round, so it may not write that.
    tensors = _tensors(device, codec, (torch.float32, torch.float16) if device == "cpu" else _dtypes())
    sizes = [(codec.scale_bytes(x.numel()), codec.encoded_bytes(x.numel())) for x in tensors]
    buffer, starts = _buffer(device, tensors, sizes)
    failed = torch.zeros(len(tensors), dtype=torch.int32, device=device)
    statistics = torch.zeros(len(tensors), 5, dtype=torch.float64, device=device) if measure else None
    many.encode(tensors, buffer, starts, codec.kernel, failed, statistics)

    assert not failed.any()
    _assert_untouched(buffer, starts, [whole for _, whole in sizes])
    values = [torch.full_like(x, 7.0) for x in tensors]
    many.decode(buffer, starts, values, codec.kernel)
    for i, (x, start, (_, whole)) in enumerate(zip(tensors, starts, sizes, strict=True)):
        parts, data = codec.encode(x.cpu()), torch.empty(whole, dtype=torch.uint8)
        codec.join(parts, out=data)
        assert torch.equal(buffer[start : start + whole].cpu(), data)
        decoded = codec.decode(parts, x.dtype)
        assert torch.equal(values[i].cpu(), decoded)
        if statistics is not None:
            expected = reference.measure(x.cpu(), decoded)
            torch.testing.assert_close(statistics[i].cpu(), expected, rtol=2e-6, atol=0.0)


def _dtypes() -> tuple[torch.dtype, ...]:
    return torch.float32, torch.bfloat16, torch.float16


@each_codec
def test_tensors_that_cannot_be_encoded_are_told_from_the_others(device: str, codec: Codec) -> None:
    tensors = [torch.ones(9000, device=device) for _ in range(4)]
    tensors[1][8999] = torch.nan
    tensors[3][0] = torch.inf
    sizes = [(codec.scale_bytes(9000), codec.encoded_bytes(9000))] * 4
    buffer, starts = _buffer(device, tensors, sizes)
    failed = torch.zeros(4, dtype=torch.int32, device=device)
    many.encode(tensors, buffer, starts, codec.kernel, failed)
    assert failed.tolist() == [0, 1, 0, 1]


MINE = Codebook("mine", (-1.0, -0.3, 0.0, 0.4, 0.9))
SIGNED = [*(book for book in BUILTIN.values() if book.signed), MINE]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Every codebook with two of the block sizes, so that each block size meets several codebooks, measured or not.
CASES = [
    (book, BLOCK_SIZES[(i + j) % 8], share, bool((i + j) % 2))
    for i, book in enumerate(SIGNED)
    for j, share in ((0, 1.0), (3, 0.3))
]
# Interpreted, a case takes a second: each kind of search with and without choosing and measuring. test_kernels.py has
# every codebook, and levels are data to the kernels.
KINDS = ("linear", "int4", "normal_float4", "dynamic", "mine")
INTERPRETED = [case for case in CASES if case[0].name in KINDS]


def fake_quantized(x: Tensor, book: Codebook, block_size: int, share: float, seed: int, number: int) -> Tensor:
    """Return what the reference makes of a flat tensor, some of its blocks left as they are."""
    parts = reference.quantize(x, book, block_size, book.one_sided)
    values = reference.dequantize(*parts, book, block_size, x.dtype)
    if share == 1.0:
        return values
    chosen = chosen_blocks(number, -(-x.numel() // block_size), share, seed)
    return torch.where(chosen.repeat_interleave(block_size)[: x.numel()], values, x)


@pytest.mark.parametrize(
    ("device", "book", "block_size", "share", "measure"),
    [
        *(pytest.param("cpu", *case, marks=NOT_INTERPRETED) for case in INTERPRETED),
        *(pytest.param("cuda", *case, marks=[pytest.mark.gpu, NOT_COMPILED]) for case in CASES),
    ],
    indirect=["device"],
    ids=lambda value: value.name if isinstance(value, Codebook) else str(value),
)
def test_a_group_is_fake_quantized_as_the_reference_does(
    device: str, book: Codebook, block_size: int, share: float, measure: bool
) -> None:
    dtypes = (torch.float32, torch.float16) if device == "cpu" else _dtypes()
    tensors = [x if i % 3 else -x for i, x in enumerate(_tensors(device, get_codec("linear"), dtypes))]
    if device == "cpu":  # where each tensor costs 16 programs, of a tenth of a second
        tensors = [tensors[i] for i in (0, 2, 5, 7, 8)]
    originals = [x.cpu().clone() for x in tensors]
    buffer, starts = _buffer(device, tensors, [(0, x.nbytes) for x in tensors])
    numbers = tuple(range(5, 5 + 2 * len(tensors), 2))
    statistics = torch.full((numbers[-1] + 2, 5), 7.0, dtype=torch.float64, device=device) if measure else None
    seed = 2**31 + 12345
    many.fake_quantize(tensors, buffer, starts, book, block_size, numbers, share, seed, statistics)

    _assert_untouched(buffer, starts, [x.nbytes for x in tensors])
    for number, x, original, start in zip(numbers, tensors, originals, starts, strict=True):
        assert same_bits(x.cpu(), original), "what is read was written to"
        values = buffer[start : start + x.nbytes].view(x.dtype).cpu()
        expected = fake_quantized(original, book, block_size, share, seed, number)
        assert same_bits(values, expected)
        if statistics is not None and x.numel():
            measured = reference.measure(original, expected)
            torch.testing.assert_close(statistics[number].cpu(), measured, rtol=2e-6, atol=0.0)
    if statistics is not None:
        others = [i for i in range(len(statistics)) if i not in numbers or not tensors[numbers.index(i)].numel()]
        assert bool((statistics[others] == 7.0).all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, for infinity - infinity
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_blocks_that_are_not_finite_show_it_and_zeros_stay(device: str, share: float) -> None:
    x = torch.randn(4096).view(64, 64)
    x[1, 3], x[2, 5], x[3], x[4] = torch.nan, -torch.inf, 0.0, 2.0**-130
    tensors = [x.view(-1).to(device)]
    buffer, starts = _buffer(device, tensors, [(0, x.nbytes)])
    statistics = torch.zeros(1, 5, dtype=torch.float64, device=device)
    many.fake_quantize(tensors, buffer, starts, BUILTIN["int4"], 64, None, share, 1, statistics)
    values = buffer[starts[0] : starts[0] + x.nbytes].view(torch.float32).cpu()
    expected = fake_quantized(x.view(-1), BUILTIN["int4"], 64, share, 1, 0)
    assert same_bits(values, expected)
    assert same_bits(statistics[0].cpu()[3:], reference.measure(x.view(-1), expected)[3:])


@pytest.mark.parametrize(
    ("share", "seed"),
    [(0.0, 7), (2.0**-32, 0), (0.25, 1), (0.5, 2**31), (0.5, 2**32 - 1), (0.75, 16), (1 - 2.0**-53, 0)],
)
def test_the_kernels_choose_the_blocks_of_the_hash(device: str, share: float, seed: int) -> None:
    tensors = [torch.full((size,), 0.3, device=device) for size in (32 * 700, 32 * 40)]
    for x in tensors:
        x[::32] = 1.0
    buffer, starts = _buffer(device, tensors, [(0, x.nbytes) for x in tensors])
    many.fake_quantize(tensors, buffer, starts, BUILTIN["int2"], 32, (3, 2**16), share, seed)
    for number, x, start in zip((3, 2**16), tensors, starts, strict=True):
        values = buffer[start : start + x.nbytes].view(torch.float32)
        changed = (values != x).view(-1, 32).any(dim=1).cpu()
        assert torch.equal(changed, chosen_blocks(number, x.numel() // 32, share, seed))


def test_statistics_of_a_group_survive_squares_outside_float32(device: str) -> None:
    tensors = [torch.randn(9000, device=device) * scale for scale in (1e-30, 1.0, 1e30)]
    originals = [x.cpu().clone() for x in tensors]
    buffer, starts = _buffer(device, tensors, [(0, x.nbytes) for x in tensors])
    statistics = torch.zeros(3, 5, dtype=torch.float64, device=device)
    many.fake_quantize(tensors, buffer, starts, BUILTIN["linear"], 64, statistics=statistics)
    for row, original, start in zip(statistics.cpu(), originals, starts, strict=True):
        values = buffer[start : start + original.nbytes].view(torch.float32).cpu()
        torch.testing.assert_close(row, reference.measure(original, values), rtol=2e-6, atol=0.0)


def test_empty_and_single_elements_may_fill_a_group(device: str) -> None:
    tensors = [torch.full((i % 2,), float(i), device=device) for i in range(64)]
    codec = get_codec("linear", 64)
    sizes = [(codec.scale_bytes(x.numel()), codec.encoded_bytes(x.numel())) for x in tensors]
    buffer, starts = _buffer(device, tensors, sizes)
    failed = torch.zeros(64, dtype=torch.int32, device=device)
    many.encode(tensors, buffer, starts, codec.kernel, failed)
    values = [torch.full_like(x, 77.0) for x in tensors]
    many.decode(buffer, starts, values, codec.kernel)
    assert all(torch.equal(one, other) for one, other in zip(values, tensors, strict=True))
    empty = [x for x in tensors if not x.numel()]
    many.encode(empty, buffer, starts[: len(empty)], codec.kernel, failed[: len(empty)])  # nothing to launch


def test_a_group_takes_one_launch_for_each_dtype_and_its_work_list_is_kept(device: str, launched: list[Any]) -> None:
    codec = get_codec("softsign", 128)
    tensors = [torch.randn(4096 * n, device=device).to(d) for n in (1, 2, 3) for d in (torch.float32, torch.float16)]
    sizes = [(codec.scale_bytes(x.numel()), codec.encoded_bytes(x.numel())) for x in tensors]
    starts, end = [], 0
    for _, whole in sizes:
        starts.append(end)
        end += whole
    buffer = torch.empty(end, dtype=torch.uint8, device=device)
    failed = torch.zeros(len(tensors), dtype=torch.int32, device=device)
    work_list.launches.cache_clear()
    for _ in range(3):
        many.encode(tensors, buffer, tuple(starts), codec.kernel, failed)
    assert len(launched) == 3 * 2
    assert work_list.launches.cache_info().misses == 1


def test_long_rows_get_more_warps_not_more_values_a_thread() -> None:
    for name, both in launch.SETTINGS.items():
        for itemsize, (tile, warps, *_) in zip((4, 2), both, strict=True):
            for row in (64, tile, 4096):
                rows, chosen = launch.rows_of(name, row, itemsize)
                assert rows * row >= min(tile, row)
                assert warps <= chosen <= 8
                assert rows * row / chosen <= max(tile / warps, 4096 / 8 if "measured" in name else 2048)
