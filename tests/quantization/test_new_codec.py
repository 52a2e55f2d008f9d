"""A new codec is one class and one row of the table, and everything else works with it.

The codec here has other side data than the scales of blocks, no kernel, and no part that could be decoded alone.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

import q8lightning
from q8lightning import CheckpointPolicy, QuantizedCheckpointIO, Rule, keep_encoded
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.quantization.codecs import table
from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.decode import EncodedItem, batches, decode_on, decode_together
from q8lightning.quantization.many.encode import encode_many
from q8lightning.quantization.many.update_directions import MomentLaunch, Moments, StoredMoment, update_direction_sums
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.layout import take_stretches
from q8lightning.tools.tensors import codec_of


@dataclass(frozen=True)
class RowsAndColumns(Codec):
    """A matrix, each element relative to the smaller of the largest magnitudes of its row and its column.

    ``block_size`` is the length of a row.
    """

    name: str = field(default="rows_and_columns", init=False)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        matrix = x.detach().reshape(-1, self.block_size).float()
        rows, columns = matrix.abs().amax(dim=1), matrix.abs().amax(dim=0)
        steps = matrix / torch.minimum(rows[:, None], columns).clamp(min=1e-30) * 127
        codes = torch.where(steps.isfinite(), steps, 0.0).round().add(127).to(torch.uint8)
        return codes.view(x.shape), torch.cat([rows, columns])

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        rows, columns = scales[: -self.block_size, None], scales[-self.block_size :]
        matrix = (codes.view(-1, self.block_size).float() - 127) / 127 * torch.minimum(rows, columns)
        return matrix.view(codes.shape).to(dtype)

    def decode_stretches(
        self, data: Tensor, numel: int, which: slice | Tensor, length: int, dtype: torch.dtype
    ) -> Tensor:
        return take_stretches(self.decode(self.split(data, numel), dtype), which, length)

    def scale_bytes(self, numel: int) -> int:
        return 4 * (numel // self.block_size + self.block_size)

    def encoded_bytes(self, numel: int) -> int:
        return self.scale_bytes(numel) + numel

    def split(self, data: Tensor, numel: int) -> tuple[Tensor, ...]:
        head = self.scale_bytes(numel)
        return data[head:], data[:head].view(torch.float32)

    def decodes_joined(self, numel: int) -> bool:
        return False  # the others have columns of their own


NEW = RowsAndColumns(64)


def _moment(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows * 64, generator=generator) * 0.1).to(dtype)


def _stored(x: Tensor, codec: Codec) -> StoredMoment:
    return StoredMoment(x, codec, encode_many([x], [codec]).data[0])


def test_it_lies_in_one_buffer_with_others() -> None:
    tensors = [_moment(100), _moment(70, torch.float64), _moment(40)]
    codecs = [NEW, get_codec("softsign", 128), NEW]
    packed = encode_many(tensors, codecs, measure=True)
    assert not packed.failed.any()
    for x, codec, data, statistics in zip(tensors, codecs, packed.data, packed.statistics, strict=True):
        values = codec.decode(codec.split(data, x.numel()), x.dtype)
        assert data.nbytes == codec.encoded_bytes(x.numel())
        assert torch.equal(values, codec.decode(codec.encode(x), x.dtype))
        torch.testing.assert_close(statistics, reference.measure(x, values), rtol=2e-6, atol=0.0)


def test_what_it_cannot_hold_is_told() -> None:
    wrong = _moment(10)
    wrong[77] = torch.nan
    assert encode_many([_moment(10), wrong], [NEW, NEW]).failed.tolist() == [0, 1]


def test_it_is_decoded_alone_where_others_are_decoded_joined() -> None:
    softsign = get_codec("softsign", 64)
    items = [
        EncodedItem(encode_many([_moment(8)], [codec]).data[0], codec, 512, torch.float32)
        for codec in [NEW, softsign] * 20
    ]
    found = list(batches(items, threads=1))
    assert [each for each in found if len(each) > 1]
    assert all(len(each) == 1 for each in found if items[each[0]].codec == NEW)
    for each in found:
        for index, values in zip(each, decode_together([items[i] for i in each]), strict=True):
            assert torch.equal(values, items[index].codec.decode(items[index].parts, torch.float32))


def test_it_is_decoded_on_a_device_beside_those_that_kernels_know() -> None:
    """On the CPU the kernels are interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    items = [
        EncodedItem(encode_many([_moment(9)], [codec]).data[0], codec, 576, torch.float32)
        for codec in (NEW, get_codec("linear", 64, residual_bits=8), NEW)
    ]
    for item, values in zip(items, decode_on(torch.device("cpu"), items), strict=True):
        assert torch.equal(values, item.codec.decode(item.parts, torch.float32))


@pytest.mark.parametrize("rows", [200, 40_000], ids=["in whole", "some stretches"])
def test_update_directions_see_what_it_loses(rows: int) -> None:
    first, second = _moment(rows), _moment(rows + 1)[64:].square()
    codecs = NEW, get_codec("log", 64)
    stored = [_stored(x, codec) for x, codec in zip((first, second), codecs, strict=True)]
    decoded = [codec.decode(codec.encode(x), x.dtype) for x, codec in zip((first, second), codecs, strict=True)]
    sums = update_direction_sums([Moments(*stored)])
    if rows == 200:
        direction = first / (second.sqrt() + 1e-8)
        error = decoded[0] / (decoded[1].sqrt() + 1e-8) - direction
        expected = torch.stack([error.double().square().sum(), direction.double().square().sum()])
        torch.testing.assert_close(sums[0], expected, rtol=1e-5, atol=0.0)

    # A plan that has it says the same, with the data anywhere in a buffer.
    packed = encode_many([second, first], [codecs[1], NEW])
    data = {id(x): start for x, start in zip((second, first), (p.storage_offset() for p in packed.data), strict=True)}
    planned = torch.zeros(1, 2, dtype=torch.float64)
    launch = MomentLaunch((0,), codecs, ((data[id(first)],), (data[id(second)],)), 1e-8)
    launch.measure([first], [second], packed.buffer, planned)
    torch.testing.assert_close(planned, sums, rtol=0.0, atol=0.0)


def test_a_rule_names_it_and_a_file_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"rows_and_columns": lambda block_size, bits, scale_dtype: RowsAndColumns(block_size)}
    monkeypatch.setattr(table, "MAKERS", MappingProxyType({**table.MAKERS, **row}))
    policy = CheckpointPolicy([Rule("state_dict.*", "rows_and_columns", block_size=64)])
    io, weight = QuantizedCheckpointIO(checkpoint=policy), _moment(128).view(128, 64)
    io.save_checkpoint({"state_dict": {"w": weight}}, tmp_path / "first.ckpt")

    loaded = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]["w"]
    assert torch.equal(loaded, NEW.decode(NEW.encode(weight), torch.float32))

    io.save_checkpoint({"state_dict": {"w": loaded}}, tmp_path / "again.ckpt")
    with keep_encoded():
        first, again = (torch.load(tmp_path / f"{name}.ckpt")["state_dict"]["w"] for name in ("first", "again"))
    assert isinstance(again, QuantizedTensor)
    assert codec_of(again) == "rows_and_columns/64"
    assert torch.equal(first.data, again.data)


# Nobody else tells codecs apart

TELLS = ("quantization/codecs/", "quantization/backends/kernels/codecs/")


def test_nobody_tells_codecs_apart_but_their_own_files_and_the_kernels_one_switch() -> None:
    root = Path(q8lightning.__file__).parent
    guilty = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if name.startswith(TELLS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            constants = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            compared = isinstance(node, ast.Compare) and {"log", "residual"} & {*map(str, constants)}
            asked = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
            if compared or (asked and "Codec" in ast.unparse(node.args[1])):
                guilty.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not guilty
