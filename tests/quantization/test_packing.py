"""Tensors packed into one buffer decode as if each had been encoded alone."""

import pytest
import torch
from support.devices import each_device
from support.schemes import DTYPES

from q8lightning.quantization.codecs.codec import Codec
from q8lightning.quantization.codecs.table import get_codec
from q8lightning.quantization.many.decode import EncodedItem, bytes_to_decode_on, decode_on
from q8lightning.quantization.many.encode import encode_many, is_sampled, measure
from q8lightning.quantization.spec import reference

CODECS = [
    get_codec("linear", 256, None, 8),
    get_codec("softsign", 128),
    get_codec("log", 128),
    get_codec("int4", 64),
    get_codec("linear", 256, None, 4),
    get_codec("softsign", 128, 6),
    get_codec("log", 128, 5),
    get_codec("linear", 32, 3, 7),
    get_codec("softsign", 128, 6, scale_dtype="bfloat16"),
    get_codec("log", 128, 5, scale_dtype="bfloat16"),
]


def _state(device: str) -> tuple[list[torch.Tensor], list[Codec]]:
    generator = torch.Generator().manual_seed(0)
    tensors, codecs = [], []
    for i, numel in enumerate((4096, 5001, 0, 1, 70_000, 8192, 4099, 33)):
        for codec in CODECS:
            x = torch.randn(numel, generator=generator)
            tensors.append((x.abs() if codec.unsigned else x).to(DTYPES[i % 4]).to(device))
            codecs.append(codec)
    return tensors, codecs


@each_device
def test_packed_tensors_are_those_encoded_one_by_one(device: str) -> None:
    tensors, codecs = _state(device)
    packed = encode_many(tensors, codecs, measure=True)
    assert not packed.failed.any()
    for tensor, codec, data, statistics in zip(tensors, codecs, packed.data, packed.statistics, strict=True):
        parts = codec.encode(tensor.cpu())
        expected = torch.empty(codec.encoded_bytes(tensor.numel()), dtype=torch.uint8)
        codec.join(parts, out=expected)
        assert torch.equal(data.cpu(), expected)
        decoded = codec.decode(parts, tensor.dtype)
        expected = reference.measure(tensor.cpu(), decoded)
        found = measure(tensor, codec, data) if is_sampled(tensor, codec) else statistics.cpu()
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0.0)


@each_device
def test_the_buffer_holds_nothing_but_what_was_packed(device: str) -> None:
    tensors, codecs = _state(device)
    packed = encode_many(tensors, codecs)
    (storage,) = {data.untyped_storage().data_ptr() for data in packed.data}
    buffer = torch.empty(0, dtype=torch.uint8, device=device).set_(packed.data[0].untyped_storage())
    assert buffer.data_ptr() == storage
    rest = buffer.clone()
    for data in packed.data:
        rest[data.storage_offset() : data.storage_offset() + data.numel()] = 0
    assert not rest.any()
    assert buffer.numel() <= sum(data.numel() for data in packed.data) + 15 * len(tensors)


@each_device
def test_tensors_that_a_codec_cannot_hold_are_told(device: str) -> None:
    tensors, codecs = _state(device)
    tensors[0][7] = torch.nan
    tensors[2][7] = -1.0  # under log
    failed = encode_many(tensors, codecs).failed.tolist()
    assert [i for i, value in enumerate(failed) if value] == [0, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packing_on_a_gpu_does_not_wait_for_it() -> None:
    tensors, codecs = _state("cuda")
    tensors, codecs = zip(
        *((x, c) for x, c in zip(tensors, codecs, strict=True) if x.dtype != torch.float64), strict=True
    )
    encode_many(tensors, codecs, measure=True)  # makes the work lists
    torch.cuda.set_sync_debug_mode("error")
    try:
        encode_many(tensors, codecs, measure=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_device
def test_they_are_unpacked_together_as_they_are_one_by_one(device: str) -> None:
    """On the CPU the kernels are interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    tensors, codecs = _state("cpu")
    data = encode_many(tensors, codecs).data
    # The interpreter truncates to bfloat16 where it should round.
    without = (torch.float64, torch.bfloat16) if device == "cpu" else (torch.float64,)
    chosen = [i for i, x in enumerate(tensors) if x.dtype not in without and (x.numel() <= 8192 or device == "cuda")]
    items = [EncodedItem(data[i], codecs[i], tensors[i].numel(), tensors[i].dtype) for i in chosen]
    values = decode_on(torch.device(device), items)
    for i, item, found in zip(chosen, items, values, strict=True):
        codes, scales, *residual = codecs[i].encode(tensors[i])
        expected = codecs[i].decode((codes, scales, *residual), item.dtype)
        assert found.device.type == device
        assert found.dtype == item.dtype
        assert torch.equal(found.cpu(), expected)
    decoded = sum(value.nbytes for value in values)
    assert decoded < bytes_to_decode_on(items) <= decoded + sum(item.data.nbytes for item in items) + 16 * len(items)
