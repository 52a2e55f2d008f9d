"""Codebooks as kernels need them: levels, thresholds and a lookup table, built once for each codebook and device."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from q8lightning.quantization.codebook import BUILTIN, Codebook


class Tables(NamedTuple):
    """A codebook on a device.

    Attributes:
        search: Which search finds a code: the name of a closed form, ``"cells"`` or ``"thresholds"``.
        table: int32. For ``"cells"``: for every pattern of a float's leading bits, the one threshold that a float which
            begins so can meet (float32, its low 8 bits zero; infinity where there is none) and in these 8 bits the code
            below it. For ``"thresholds"``: the patterns of ``2**bits - 1`` thresholds, filled up with infinity.
        shift: How many trailing bits of a pattern the cells ignore.
        lowest: The first cell's leading bits; smaller magnitudes belong to it.
        half: How many cells there are for each sign.
        bits: Steps of the search in thresholds.
        levels: ``[256]`` float32, 0 for codes that the codebook lacks.
    """

    search: str
    table: Tensor
    shift: int
    lowest: int
    half: int
    bits: int
    levels: Tensor


_CLOSED_FORMS = {BUILTIN[name].closed_form: name for name in ("linear", "softsign")}
"""The closed forms that ``codec.nearest_code`` knows."""


def tables_of(codebook: Codebook, device: torch.device) -> Tables:
    """Return the tables of ``codebook`` on ``device``, kept there after the first call."""
    # Codebooks compare equal whatever their closed form, so the cache needs it as a key of its own.
    return _make(codebook, codebook.closed_form, device)


@lru_cache(maxsize=256)
def _make(codebook: Codebook, closed_form: Callable[[Tensor], Tensor] | None, device: torch.device) -> Tables:
    thresholds, levels = codebook.thresholds, codebook.tensor()
    levels = pad(levels, (0, 256 - levels.numel())).to(device)
    if closed_form in _CLOSED_FORMS:
        return Tables(_CLOSED_FORMS[closed_form], torch.empty(0, dtype=torch.int32, device=device), 0, 0, 0, 0, levels)
    for shift in (17, 16):  # 6 mantissa bits, or 7: one threshold a cell, in a table of a few kilobytes
        cells = _cells(thresholds, shift)
        if cells is not None:
            return Tables("cells", cells[0].to(device), shift, *cells[1:], 0, levels)
    bits = thresholds.numel().bit_length()
    padded = pad(thresholds, (0, 2**bits - 1 - thresholds.numel()), value=torch.inf)
    return Tables("thresholds", padded.view(torch.int32).to(device), 0, 0, 0, bits, levels)


def _cells(thresholds: Tensor, shift: int) -> tuple[Tensor, int, int] | None:
    """Return the table, its lowest cell and the cells of a sign; None if a cell would need two thresholds."""
    patterns = thresholds.view(torch.int32)
    if bool((patterns & 0xFF).any()):
        return None
    one = 0x3F800000 >> shift  # the cell of 1.0; rounding can move a normalised value a little beyond 1, not out of it
    lowest = min(int(thresholds.abs().min().view(torch.int32)) >> shift, one)
    cell = torch.arange(lowest, one + 1, dtype=torch.int64) << shift
    near, far = cell.int().view(torch.float32), (cell + 2**shift - 1).int().view(torch.float32)
    near[0] = 0.0
    low, high = torch.cat([near, -far]), torch.cat([far, -near])
    first, last = torch.searchsorted(thresholds, low), torch.searchsorted(thresholds, high)
    if bool((last - first > 1).any()):
        return None
    met = torch.where(last > first, thresholds[first.clamp(max=thresholds.numel() - 1)], torch.inf)
    return met.view(torch.int32) | first.int(), lowest, near.numel()
