"""How fast the whole state of a model is encoded in grouped launches, beside one launch a tensor, on one GPU.

    python benchmarks/grouped.py [--blocks 20] [--width 2048] [--out results.md] [--bits [--only log]]

The state is that of AdamW for a stack of transformer blocks, float32, every tensor in memory of its own. Bytes count
each input and output once; fractions are of a device-to-device copy's bytes per second in the same run. What was
encoded is compared with the reference for some tensors of each kind. The weights alone are engaged and released, as
QAT does it, in blocks of 64. With ``--bits``, the weights alone are encoded and decoded in codes of 2 to 8 bits.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from kernels import environment, median_ms
from torch import Tensor

from q8lightning.checkpoint.policy import PRESETS
from q8lightning.quantization.backends.kernels import many
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.many.fake_quantize import FakeQuantizeGroup
from q8lightning.quantization.spec.codebook import BUILTIN

PATHS = ("state_dict.w", "optimizer_states.0.state.0.exp_avg", "optimizer_states.0.state.0.exp_avg_sq")
"""A path of each kind of tensor."""

OF_BITS = [
    *(get_codec(name, 128, bits) for name in ("linear", "softsign", "log") for bits in range(2, 9)),
    *(get_codec("linear", 256, residual_bits=bits) for bits in range(2, 9)),
]


def shapes(blocks: int, width: int) -> Iterator[tuple[int, ...]]:
    for _ in range(blocks):
        yield from ((3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
        yield from ((width,),) * 4


def state(blocks: int, width: int) -> tuple[list[Tensor], list[int]]:
    """Return the flat tensors of the weights and both moments, and for each its kind: 0, 1, 2."""
    weights = [torch.randn(shape, device="cuda").mul_(0.02).view(-1) for shape in shapes(blocks, width)]
    first = [torch.randn_like(weight).mul_(1e-3) for weight in weights]
    second = [torch.randn_like(weight).square_().mul_(1e-6) for weight in weights]
    return [*weights, *first, *second], [kind for kind in range(3) for _ in weights]


def check(tensors: list[Tensor], codecs: list[Codec], data: list[Tensor]) -> None:
    for index in range(0, len(tensors), max(len(tensors) // 9, 1)):
        codec, numel = codecs[index], tensors[index].numel()
        expected = torch.empty(codec.encoded_bytes(numel), dtype=torch.uint8, device="cuda")
        codec.join(codec.encode(tensors[index]), out=expected)  # which tests compare with the reference
        if not torch.equal(data[index], expected):
            raise AssertionError(f"tensor {index} is encoded otherwise in a group")


def copy_speed() -> float:
    """Return bytes a millisecond, read and written."""
    source, target = (torch.empty(2**28, device="cuda") for _ in range(2))
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))


def host_ms(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def rows_of_codec(codec: Codec, tensors: list[Tensor], row: Callable[..., None]) -> None:
    """Time one codec: encode, encode and measure, decode."""
    codecs = [codec] * len(tensors)
    encoded = encode_many(tensors, codecs)
    check(tensors, codecs, encoded.data)
    moved = sum(tensor.nbytes for tensor in tensors) + sum(data.nbytes for data in encoded.data)
    starts = tuple(data.storage_offset() for data in encoded.data)
    values = [torch.empty_like(tensor) for tensor in tensors]
    what = f"{codec.label}/{codec.block_size}"
    row(f"encode {what}", 1, moved, lambda: encode_many(tensors, codecs))
    row(f"encode {what} + statistics", 1, moved, lambda: encode_many(tensors, codecs, measure=True))
    row(f"decode {what}", 1, moved, lambda: many.decode(encoded.buffer, starts, values, codec.kernel))
    for tensor, decoded in list(zip(tensors, values, strict=True))[:: max(len(tensors) // 5, 1)]:
        if not torch.equal(decoded, codec.decode(codec.encode(tensor), torch.float32)):
            raise AssertionError(f"{what} is decoded otherwise in a group")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("--only", nargs="*", default=[""], help="with --bits, codecs whose label contains one of these")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tensors, kinds = state(arguments.blocks, arguments.width)
    parameters = sum(tensor.numel() for tensor, kind in zip(tensors, kinds, strict=True) if kind == 0)
    bytes_per_ms = copy_speed()

    lines = [f"{environment()}; {parameters:,} parameters, {len(tensors)} tensors", ""]
    lines += ["| what | launches | ms | floor | fraction | host ms |", "|---|---|---|---|---|---|"]

    def row(what: str, launches: int | str, moved: float, run: Callable[[], object]) -> None:
        milliseconds, host = median_ms(run, 7), sorted(host_ms(run) for _ in range(5))[2]
        floor = moved / bytes_per_ms
        fraction = f"{floor / milliseconds:.2f}"
        lines.append(f"| {what} | {launches} | {milliseconds:.2f} | {floor:.2f} | {fraction} | {host:.2f} |")
        print(lines[-1], flush=True)

    if arguments.bits:
        weights, squares = ([t for t, kind in zip(tensors, kinds, strict=True) if kind == which] for which in (0, 2))
        for codec in OF_BITS:
            if not any(part in codec.label for part in arguments.only):
                continue
            rows_of_codec(codec, squares if codec.unsigned else weights, row)
        if arguments.out is not None:
            arguments.out.write_text("\n".join(lines) + "\n")
        return
    read = sum(tensor.nbytes for tensor in tensors)
    for preset, policy in PRESETS.items():
        codecs = [policy.codec_for(PATHS[kind]) for kind in kinds]
        packed = encode_many(tensors, codecs)
        check(tensors, codecs, packed.data)
        moved = read + sum(data.nbytes for data in packed.data)
        del packed
        row(f"encode `{preset}`", 3, moved, lambda codecs=codecs: encode_many(tensors, codecs))
        row(
            f"encode `{preset}` + statistics",
            3,
            moved,
            lambda codecs=codecs: encode_many(tensors, codecs, measure=True),
        )

        def one_by_one(codecs: list[Codec] = codecs) -> None:
            for tensor, codec in zip(tensors, codecs, strict=True):
                codec.encode(tensor)

        row(f"encode `{preset}`, tensor by tensor", len(tensors), moved, one_by_one)
    weights = [torch.nn.Parameter(tensor) for tensor, kind in zip(tensors, kinds, strict=True) if kind == 0]
    for dtype in (torch.float32, torch.bfloat16):
        live = [torch.nn.Parameter(weight.to(dtype)) for weight in weights]
        read = sum(weight.nbytes for weight in live)
        for name in ("linear", "int4", "dynamic"):
            group = FakeQuantizeGroup(live, BUILTIN[name], 64)
            for title, measured in (("", False), (" + statistics", True)):
                row(
                    f"engage and release `{name}`, {str(dtype)[6:]}{title}",
                    1,
                    2 * read,
                    lambda group=group, measured=measured: (group.engage(measure=measured), group.release()),
                )
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
