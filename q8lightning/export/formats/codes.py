"""``codes``: packed codes, scales and levels as primitives and tensors, for readers that have only torch."""

from pathlib import Path
from typing import Any

from q8lightning.export.formats.floats import later, values_of, write_state
from q8lightning.export.options import Options
from q8lightning.export.weights import Source, Weight
from q8lightning.quantization.spec.packed_bits import pack_bits
from q8lightning.tools.convert.write_tensor_by_tensor import Store


def write(source: Source, path: Path, options: Options) -> None:
    """Write the codes of the weights that were trained quantized, and all other tensors as they are."""

    def entry(weight: Weight) -> Any:
        if weight.codec is None:
            return values_of(source, weight)
        return later(lambda store: _codes(weight, store, source.opened.location(weight.value)))

    write_state(source, path, {"format": "q8lightning codes", "version": 1}, entry)


def _codes(weight: Weight, store: Store, location: str) -> dict[str, Any]:
    codec, codes, scales, like = weight.codes()
    if codec.axis is None:
        strides = like.stride()
        order = sorted(range(like.ndim), key=lambda dimension: -strides[dimension])
    else:
        order = [codec.axis, *(dimension for dimension in range(like.ndim) if dimension != codec.axis)]
    back = [order.index(dimension) for dimension in range(like.ndim)]
    return {
        "codes": store(pack_bits(codes, codec.bits), location),
        "scales": store(scales.clone(), location),
        "levels": store(codec.book.tensor().clone(), location),
        "bits": codec.bits,
        "rows": codes.shape[0],
        "row": codes.shape[1],
        "block_size": codec.block_size,
        "dtype": like.dtype,
        "shape": [like.shape[dimension] for dimension in order],
        "order": back[::-1] if weight.is_transposed else back,
    }
