"""What the presets promise, written down once more, and checkpoints compared with it.

Nothing here asks the package's policy, walk or payload; values come from the reference, which specifies the codecs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from q8lightning import QuantizedTensor, keep_encoded
from q8lightning.quantization.spec import reference
from q8lightning.quantization.spec.codebook import get_codebook, name_with_bits

SUMMARY = "q8lightning"

WEIGHTS = {
    "resume": ("residual", 256, (8, 3), (11 + 32 / 256) / 8),
    "compact": ("softsign", 256, (8,), (8 + 32 / 256) / 8),
    "precise": ("residual", 256, (8, 8), (16 + 32 / 256) / 8),
}
FIRST_MOMENTS = {
    "resume": ("softsign with bfloat16 scales", 128, (6,), (6 + 16 / 128) / 8),
    "compact": ("softsign with bfloat16 scales", 128, (5,), (5 + 16 / 128) / 8),
    "precise": ("softsign", 128, (8,), (8 + 32 / 128) / 8),
}
SECOND_MOMENTS = {
    "resume": ("log with bfloat16 scales", 128, (6,), (6 + 32 / 128) / 8),
    "compact": ("log with bfloat16 scales", 128, (4,), (4 + 32 / 128) / 8),
    "precise": ("log", 128, (8,), (8 + 64 / 128) / 8),
}
"""Codec, block size, bits and the bytes that an element takes, of each preset."""

KEYS_OF_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
KEYS_OF_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf", "variance")
KEYS_OF_WEIGHTS = ("ax", "z")
"""What optimizers call these."""

Path_ = tuple[Any, ...]


def in_memory_order(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Return the elements of a dense tensor as they lie in memory, and the order of dimensions that says so."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.detach().permute(order).reshape(-1), order


def stored(tensor: Tensor, codec: str, block_size: int, bits: tuple[int, ...] = (8,)) -> Tensor:
    """Return what is left of a tensor that was saved with this codec, such as ``log with bfloat16 scales``."""
    flat, order = in_memory_order(tensor)
    codec, _, scales = codec.partition(" with ")
    scale_dtype = scales.removesuffix(" scales") or "float32"
    if codec == "log":
        parts = reference.quantize_log(flat, block_size, *bits, scale_dtype)
        values = reference.dequantize_log(*parts, block_size, *bits, tensor.dtype)
    elif codec == "residual":
        parts = reference.quantize_residual(flat, block_size, *bits)
        values = reference.dequantize_residual(*parts, block_size, *bits, tensor.dtype)
    else:
        book = get_codebook(name_with_bits(codec, *bits)).with_scales(scale_dtype)
        parts = reference.quantize(flat, book, block_size, book.one_sided)
        values = reference.dequantize(*parts, book, block_size, tensor.dtype)
    inverse = [order.index(dimension) for dimension in range(tensor.ndim)]
    return values.view([tensor.shape[dimension] for dimension in order]).permute(inverse)


def codec_of(
    path: Path_, tensor: Tensor, preset: str, raw: frozenset[str] = frozenset()
) -> tuple[str, int, tuple[int, ...]] | None:
    """Return codec, block size and bits that the preset promises for a tensor of a checkpoint, None for "as it is".

    Args:
        path: Keys and indices that lead to the tensor.
        raw: Entries of the state dict that are no parameters.
    """
    if not tensor.is_floating_point() or tensor.numel() < 4096:
        return None
    promise = None
    if path[0] in ("state_dict", "current_model_state") and path[1] not in raw:
        promise = WEIGHTS[preset]
    elif path[0] == "optimizer_states" and path[-1] in KEYS_OF_FIRST_MOMENTS:
        promise = FIRST_MOMENTS[preset]
    elif path[0] == "optimizer_states" and path[-1] in KEYS_OF_SECOND_MOMENTS:
        promise = SECOND_MOMENTS[preset]
    elif path[0] == "optimizer_states" and path[-1] in KEYS_OF_WEIGHTS:
        promise = WEIGHTS[preset]
    if promise is None or promise[3] >= tensor.element_size():
        return None
    return promise[:3]


def promised(path: Path_, tensor: Tensor, preset: str, raw: frozenset[str] = frozenset()) -> Tensor:
    """Return the values that loading must give for a tensor of a checkpoint."""
    codec = codec_of(path, tensor, preset, raw)
    return tensor if codec is None else stored(tensor, *codec)


def tensors(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Tensor]]:
    """Yield all tensors of nested mappings and sequences with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, index))


def promised_paths(checkpoint: Mapping[str, Any], preset: str, raw: frozenset[str] = frozenset()) -> set[str]:
    """Return the paths of all tensors that the preset promises to encode."""
    return {
        ".".join(map(str, path))
        for path, tensor in tensors(checkpoint)
        if codec_of(path, tensor, preset, raw) is not None
    }


def payloads(value: Any, path: Path_ = ()) -> dict[str, QuantizedTensor]:
    """Return all payloads in nested mappings and sequences, by path."""
    if isinstance(value, QuantizedTensor):
        return {".".join(map(str, path)): value}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return {name: found for key, item in items for name, found in payloads(item, (*path, key)).items()}


def load(path: str | Path, **options: Any) -> dict[str, Any]:
    """Load a file as a stranger would: ``torch.load`` with ``weights_only=True``."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True, **options)
    return checkpoint


def payloads_of(path: str | Path) -> dict[str, QuantizedTensor]:
    """Return what a file holds encoded, by path."""
    with keep_encoded():
        return payloads(load(path))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree: the signs of zeros and the payloads of NaNs too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    one, two = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(one, two)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share their storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def same_parts(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two payloads hold the same codes and scales, under the same codec."""
    return (
        a.codec == b.codec
        and len(a.parts) == len(b.parts)
        and all(same_bits(x, y) for x, y in zip(a.parts, b.parts, strict=True))
    )


def assert_same(after: Any, before: Any, path: Path_ = ()) -> None:
    """Check that two checkpoints agree in types, keys and their order, attributes, and every bit of every tensor."""
    assert type(after) is type(before), path
    if isinstance(before, Tensor):
        assert after.dtype == before.dtype, path
        assert after.shape == before.shape, path
        assert after.stride() == before.stride(), path
        assert after.requires_grad == before.requires_grad, path
        assert same_bits(after, before), path
    elif isinstance(before, dict):
        assert list(after) == list(before), path
        assert getattr(after, "_metadata", None) == getattr(before, "_metadata", None), path
        for key in before:
            assert_same(after[key], before[key], (*path, key))
    elif isinstance(before, list | tuple):
        assert len(after) == len(before), path
        for index, (one, two) in enumerate(zip(after, before, strict=True)):
            assert_same(one, two, (*path, index))
    else:
        assert after == before, path


def assert_kept(after: dict[str, Any], before: dict[str, Any], preset: str, raw: frozenset[str] = frozenset()) -> None:
    """Check that ``after`` is ``before`` as the preset stores it, with nothing else changed but the summary at the end.

    Args:
        after: A checkpoint that was saved quantized and loaded.
        before: The same state, saved and loaded without q8lightning.
        raw: Entries of the state dict that are no parameters.
    """
    assert list(after) == [*before, SUMMARY]
    assert after[SUMMARY]["format_version"] == 1
    assert_same(without_summary(after), promise_for(before, preset, raw))


def promise_for(value: Any, preset: str, raw: frozenset[str] = frozenset(), path: Path_ = ()) -> Any:
    """Return (part of) a checkpoint with every tensor as the preset stores it; strides and attributes are kept."""
    if isinstance(value, Tensor):
        kept = promised(path, value, preset, raw)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(kept)
    if isinstance(value, dict):
        result = type(value)((key, promise_for(item, preset, raw, (*path, key))) for key, item in value.items())
        if hasattr(value, "_metadata"):
            result._metadata = value._metadata
        return result
    if isinstance(value, list | tuple):
        return type(value)(promise_for(item, preset, raw, (*path, index)) for index, item in enumerate(value))
    return value


def without_summary(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != "q8lightning"}


def assert_same_content(after: Path, before: Path) -> None:
    """Check that two files hold the same, and say the same about how they were encoded, to the rounding of floats."""
    after, before = load(after), load(before)
    assert_same(without_summary(after), without_summary(before))
    assert_same_summary(after["q8lightning"], before["q8lightning"])


def assert_same_summary(found: Any, expected: Any, path: str = "summary") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same_summary(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=0, nan_ok=True), path
    else:
        assert found == expected, path
