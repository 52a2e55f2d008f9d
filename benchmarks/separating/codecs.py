"""Ways to code a matrix of second moments, in integers: each is a few lines, so that it can be checked.

All work on logarithms: integers in units of ``1 / UNIT`` octaves, as float64, NaN where the second moment is zero. A
float32 made of such an integer gives the integer back. So what is exact in integers is exact in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 2**16
"""Logarithms an octave. A rounding to float32 is less than a hundredth of one."""

SCALE_BITS = 16
"""Bits of a bound of a block, and of an entry of a profile."""


def logarithms(x: Tensor) -> Tensor:
    """Return the logarithms of a float32 tensor without negative values; NaN for 0."""
    return torch.where(x > 0, (x.double().log2() * UNIT).round(), torch.nan)


def from_logarithms(logs: Tensor) -> Tensor:
    """Return float32 of logarithms."""
    return torch.exp2(logs / UNIT).nan_to_num(0.0).float()


class Coded(NamedTuple):
    """What decoding returns, and what it costs.

    Attributes:
        logs: ``[rows, columns]``, as the argument of the codec.
        scale_bits: Bits of bounds and profiles; those of the codes come on top.
    """

    logs: Tensor
    scale_bits: int


Code = Callable[[Tensor, int, int], Coded]
"""Codes logarithms, ``[rows, columns]``, with codes of so many bits, in blocks of so many elements along rows."""


@dataclass(frozen=True)
class Codec:
    """A row of the table.

    Attributes:
        name: Its name.
        code: What it does.
        idempotent: Whether coding again what was decoded must change nothing.
    """

    name: str
    code: Code
    idempotent: bool = True


def extreme(logs: Tensor, dim: int, largest: bool = True) -> Tensor:
    """Return the largest or smallest logarithm along a dimension, which stays; 0 where all are NaN."""
    sign = 1.0 if largest else -1.0
    found = torch.where(logs.isnan(), -torch.inf, sign * logs).amax(dim, keepdim=True)
    return torch.where(found.isfinite(), sign * found, 0.0)


def average(logs: Tensor, dim: int) -> Tensor:
    """Return the mean along a dimension, which stays, as an integer; 0 where all are NaN."""
    return logs.nanmean(dim, keepdim=True).nan_to_num(0.0).round()


def in_blocks(logs: Tensor, bits: int, block_size: int) -> Coded:
    """Code blocks along rows: equal steps between the smallest and the largest of each. Both come back exactly.

    This is the codec ``log`` in exact arithmetic.
    """
    rows, columns = logs.shape
    blocks = torch.nn.functional.pad(logs, (0, -columns % block_size), value=torch.nan).view(rows, -1, block_size)
    low, high = extreme(blocks, -1, largest=False), extreme(blocks, -1)
    span = high - low
    steps = span.clamp(1, 2**bits - 2)
    codes = ((blocks - low) * steps / span.clamp(min=1)).round()
    decoded = low + (codes * span / steps).round()
    return Coded(decoded.view(rows, -1)[:, :columns], 2 * SCALE_BITS * blocks.shape[0] * blocks.shape[1])


def less(profile: Tensor) -> Code:
    """Code what remains when a profile, which is stored, is subtracted."""

    def code(logs: Tensor, bits: int, block_size: int) -> Coded:
        decoded, scale_bits = in_blocks(logs - profile, bits, block_size)
        return Coded(decoded + profile, scale_bits + SCALE_BITS * sum(profile.shape))

    return code


def less_means(logs: Tensor, bits: int, block_size: int) -> Coded:
    """Divide by the geometric means of rows and columns."""
    rows = average(logs, 1)
    return less(rows + average(logs - rows, 0))(logs, bits, block_size)


def less_smaller_maximum(logs: Tensor, bits: int, block_size: int) -> Coded:
    """Divide by the smaller one of the largest values of row and column.

    The largest value of a row is not larger than that of its column. So it becomes 1, the largest that there can be in
    any block, and comes back exactly.
    """
    return less(torch.minimum(extreme(logs, 1), extreme(logs, 0)))(logs, bits, block_size)


def less_envelope(largest: bool) -> Code:
    """Divide columns by their largest value over the largest of its row (or by the smallest over the smallest).

    With ``u`` the maxima of rows, ``p`` is the largest ``x - u`` of each column, and ``x - u - p`` is at most 0. Each
    column has a 0, and so has each row, where its maximum is. What is coded is ``x - p``: a row's maximum has ``p`` 0
    and is the largest of its row, so it is the upper bound of its block. The element that decided ``p`` is ``u`` there,
    also the largest of its row. So all of them come back exactly, and coding again finds the same ``u`` and ``p``.
    """

    def code(logs: Tensor, bits: int, block_size: int) -> Coded:
        profile = extreme(logs - extreme(logs, 1, largest), 0, largest)
        decoded, scale_bits = in_blocks(logs - profile, bits, block_size)
        return Coded(decoded + profile, scale_bits + SCALE_BITS * profile.numel())

    return code


def less_reference_rows(references: int) -> Code:
    """Code some rows; the others less the means of these, as they were decoded. No profile is stored."""

    def code(logs: Tensor, bits: int, block_size: int) -> Coded:
        decoded, scale_bits = in_blocks(logs[:references], bits, block_size)
        if len(logs) > references:
            more = _less_columns_of(decoded, logs[references:], bits, block_size)
            decoded, scale_bits = torch.cat([decoded, more.logs]), scale_bits + more.scale_bits
        return Coded(decoded, scale_bits)

    return code


def less_rows_before(logs: Tensor, bits: int, block_size: int) -> Coded:
    """Code 4 rows, then as many as there are, and so on; each less the means of all rows before, as decoded."""
    decoded, scale_bits = in_blocks(logs[:4], bits, block_size)
    while len(decoded) < len(logs):
        more = _less_columns_of(decoded, logs[len(decoded) : 2 * len(decoded)], bits, block_size)
        decoded, scale_bits = torch.cat([decoded, more.logs]), scale_bits + more.scale_bits
    return Coded(decoded, scale_bits)


def _less_columns_of(decoded: Tensor, rows: Tensor, bits: int, block_size: int) -> Coded:
    """Code rows less the column means of decoded ones, whose levels count alike. A column of zeros has the mean 0."""
    profile = average(decoded - average(decoded, 1), 0)
    coded = in_blocks(rows - profile, bits, block_size)
    return coded._replace(logs=coded.logs + profile)


def in_tiles(code: Code, rows: int = 256) -> Code:
    """Do so in tiles of ``rows`` by ``block_size``, each on its own; where plain blocks lose less, they are taken."""

    def tiled(logs: Tensor, bits: int, block_size: int) -> Coded:
        scale_bits, bands = 0, []
        for band in logs.split(rows):
            tiles = [best_of(in_blocks, code)(tile, bits, block_size) for tile in band.split(block_size, dim=1)]
            bands.append(torch.cat([tile.logs for tile in tiles], dim=1))
            scale_bits += sum(tile.scale_bits + 1 for tile in tiles)
        return Coded(torch.cat(bands), scale_bits)

    return tiled


def transposed(code: Code) -> Code:
    """Do the same with blocks along columns."""

    def turned(logs: Tensor, bits: int, block_size: int) -> Coded:
        coded = code(logs.T.contiguous(), bits, block_size)
        return coded._replace(logs=coded.logs.T.contiguous())

    return turned


def best_of(*codes: Code) -> Code:
    """Take the one with the smallest squared error of the logarithms.

    This keeps what is idempotent so: what was decoded has no error under the code that it was decoded from.
    """

    def code(logs: Tensor, bits: int, block_size: int) -> Coded:
        tried: Sequence[Coded] = [each(logs, bits, block_size) for each in codes]
        return min(tried, key=lambda coded: float((coded.logs - logs).nan_to_num(0.0).square().sum()))

    return code


def both_ways(*codes: Code) -> Code:
    """Take the best of some codes, with blocks along rows or columns."""
    return best_of(*codes, *(transposed(each) for each in codes))


UPPER, LOWER = less_envelope(largest=True), less_envelope(largest=False)

CODECS = (
    Codec("blocks, as now", in_blocks),
    Codec("row and column means", less_means, idempotent=False),
    Codec("min(row maximum, column maximum)", less_smaller_maximum),
    Codec("envelope", UPPER),
    Codec("8 reference rows of 256, in tiles", in_tiles(less_reference_rows(8))),
    Codec("blocks, along rows or columns", both_ways(in_blocks)),
    Codec("envelope or blocks, along either", both_ways(in_blocks, UPPER, LOWER)),
    Codec("8 reference rows, in tiles along either", both_ways(in_tiles(less_reference_rows(8)))),
    Codec("rows before, in tiles along either", both_ways(in_tiles(less_rows_before))),
)
"""What is compared; the first is what the others are compared with."""
