"""Codebooks as kernels need them: levels, thresholds and a lookup table, built once for each codebook and device."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from q8lightning.quantization.spec.codebook import BUILTIN, Codebook
from q8lightning.system.ambient import lasting


class Tables(NamedTuple):
    """A codebook on a device.

    Attributes:
        search: Which search finds a code: the name of a closed form, ``"cells"`` or ``"thresholds"``.
        table: int32. For ``"cells"``: for every pattern of a float's leading bits, the one threshold that a float which
            begins so can meet (float32, its low 8 bits zero; infinity where there is none) and in these 8 bits the code
            below it. It has an entry for every float, NaN and infinity included, so that nothing has to be clamped;
            the few kilobytes of it that are ever read stay in the cache. For ``"thresholds"``: the
            patterns of ``2**bits - 1`` thresholds, filled up with infinity.
        shift: How many trailing bits of a pattern the cells ignore.
        bits: Steps of the search in thresholds.
        levels: ``[256]`` float32, 0 for codes that the codebook lacks.
    """

    search: str
    table: Tensor
    shift: int
    bits: int
    levels: Tensor


_CLOSED_FORMS = {BUILTIN[name].closed_form: name for name in ("linear", "softsign")}
"""The closed forms that ``codec.nearest_code`` knows."""


def tables_of(codebook: Codebook | None, device: torch.device) -> Tables:
    """Return the tables of ``codebook`` on ``device``, kept there after the first call.

    Kernels that need none, but take some, get those of ``linear``, which is a closed form.
    """
    if codebook is None:
        codebook = BUILTIN["linear"]
    # Codebooks compare equal whatever their closed form, so the cache needs it as a key of its own.
    return _make(codebook, codebook.closed_form, device)


@lru_cache(maxsize=256)
@lasting()
def _make(codebook: Codebook, closed_form: Callable[[Tensor], Tensor] | None, device: torch.device) -> Tables:
    thresholds, levels = codebook.thresholds, codebook.tensor()
    levels = pad(levels, (0, 256 - levels.numel())).to(device)
    if closed_form in _CLOSED_FORMS:
        return Tables(_CLOSED_FORMS[closed_form], torch.empty(0, dtype=torch.int32, device=device), 0, 0, levels)
    for shift in (17, 16):  # 6 mantissa bits, or 7: one threshold a cell
        cells = _cells(thresholds, shift)
        if cells is not None:
            return Tables("cells", cells.to(device), shift, 0, levels)
    bits = thresholds.numel().bit_length()
    padded = pad(thresholds, (0, 2**bits - 1 - thresholds.numel()), value=torch.inf)
    return Tables("thresholds", padded.view(torch.int32).to(device), 0, bits, levels)


def _cells(thresholds: Tensor, shift: int) -> Tensor | None:
    """Return the table; None if a cell would need two thresholds. Cells of NaN and infinity have the code of 0."""
    if bool((thresholds.view(torch.int32) & 0xFF).any()):
        return None
    first_pattern = torch.arange(2 ** (31 - shift), dtype=torch.int32, device="cpu") << shift
    near, far = first_pattern.view(torch.float32), (first_pattern + (2**shift - 1)).view(torch.float32)
    finite = far.isfinite()
    near, far = near.where(finite, 0.0), far.where(finite, 0.0)
    low, high = torch.cat([near, -far]), torch.cat([far, -near])
    below, met = torch.searchsorted(thresholds, low), torch.searchsorted(thresholds, high)
    if bool((met - below > 1).any()):
        return None
    threshold = torch.where(met > below, thresholds[below.clamp(max=thresholds.numel() - 1)], torch.inf)
    return threshold.view(torch.int32) | below.int()
