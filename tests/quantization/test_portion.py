"""A part of a tensor is told to consist of whole blocks exactly where its elements say so."""

from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.quantization.spec.block_choice import are_chosen, chosen_blocks
from q8lightning.quantization.spec.portion import Portion, pieces

SHAPES = [(8, 64), (7, 64), (33, 32), (5, 100), (64,), (96,), (3, 4, 32), (4, 2, 64), (1, 128), (2, 33, 1)]
DIVISIONS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 2)]
"""Into how many parts the first dimension and the last one are divided."""


def numbers_of_blocks(shape: tuple[int, ...], codec: WeightCodec) -> Tensor:
    """Return for each element of a tensor the number of its block."""
    rows = codec.to_rows(torch.empty(shape))
    a_row = -(-rows.shape[1] // codec.block_size)
    numbers = torch.arange(rows.shape[0])[:, None] * a_row + torch.arange(rows.shape[1]) // codec.block_size
    return codec.from_rows(numbers.contiguous(), torch.empty(shape)).contiguous()


def parts_of(shape: tuple[int, ...], division: tuple[int, int]) -> list[Portion]:
    counts = [1] * len(shape)
    counts[0] *= division[0]
    counts[-1] *= division[1]
    divided = [pieces(length, [count]) for length, count in zip(shape, counts, strict=True)]
    borders = tuple(
        tuple(start for start, _ in each if 0 < start < length) for each, length in zip(divided, shape, strict=True)
    )
    return [
        Portion(shape, tuple(start for start, _ in part), tuple(size for _, size in part), borders)
        for part in product(*divided)
    ]


def box(portion: Portion) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(portion.starts, portion.sizes, strict=True))


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_refused_exactly_if_a_block_lies_in_two(shape: tuple[int, ...], division: tuple[int, int]) -> None:
    found = []
    for axis, block_size in product((None, 0), (32, 64)):
        codec = WeightCodec("int4", block_size, axis).fitted(shape)
        whole, parts = numbers_of_blocks(shape, codec), parts_of(shape, division)
        exact = True
        for portion in parts:
            inside = whole[box(portion)]
            here = numbers_of_blocks(portion.sizes, codec)
            pairs = torch.stack([here.reshape(-1), inside.reshape(-1)]).unique(dim=1)
            sizes = torch.bincount(inside.reshape(-1), minlength=int(whole.max()) + 1)
            complete = torch.bincount(whole.reshape(-1))[sizes > 0] == sizes[sizes > 0]
            exact &= bool(complete.all()) and pairs.shape[1] == pairs[0].unique().numel() == pairs[1].unique().numel()
        cuts = {portion.cut(codec.block_size, codec.axis) for portion in parts}
        assert len(cuts) == 1  # all processes decide alike
        assert (cuts == {None}) == exact, (axis, block_size)
        if exact:
            for portion in parts:
                numbers = portion.block_numbers(codec.block_size, codec.axis)
                here = numbers_of_blocks(portion.sizes, codec)
                assert torch.equal(numbers[here], whole[box(portion)])
        found.append(exact)
    assert len(found) == 4


def test_every_element_is_in_one_part_and_parts_are_those_of_chunk() -> None:
    for length, counts in product((0, 1, 5, 8, 33), ([1], [2], [3], [4], [7], [2, 2], [2, 3])):
        found = pieces(length, counts)
        assert len(found) == prod(counts)
        assert sorted(i for start, size in found for i in range(start, start + size)) == list(range(length))
        if len(counts) == 1 and length:
            expected = torch.arange(length).chunk(counts[0])
            assert [(int(each[0]), len(each)) for each in expected] == found[: len(expected)]
            assert all(size == 0 for _, size in found[len(expected) :])


def test_the_blocks_of_a_part_are_chosen_as_those_of_the_whole() -> None:
    chosen = chosen_blocks(3, 100, 0.4, 7)
    numbers = torch.tensor([5, 99, 0, 42])
    assert torch.equal(are_chosen(3, numbers, 0.4, 7), chosen[numbers])
