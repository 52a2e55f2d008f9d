"""Build the tables with which kernels search a codebook, once for each codebook and device."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from q8lightning.quantization.spec.closed_form import ClosedForm
from q8lightning.quantization.spec.codebook import BUILTIN, Codebook
from q8lightning.system.ambient import lasting


class Tables(NamedTuple):
    """A codebook on a device.

    Attributes:
        search: The search that finds a code: ``"linear"`` or ``"softsign"``, which are closed forms, ``"cells"``, one
            look into a table, or ``"thresholds"``, a binary search.
        table: int32. For ``"thresholds"``, the patterns of ``2**bits - 1`` thresholds, filled up with infinity. For
            ``"cells"``, an entry for each cell, the floats with the same leading bits. No cell holds two thresholds.
            The entry is its threshold (float32, infinity if it has none) with the code below it in the low 8 bits,
            which are zero in such a threshold. Cells exist for all floats, so that nothing has to be clamped; the few
            kilobytes that are read stay in the cache.
        shift: How many trailing bits of a pattern a cell leaves open.
        bits: The bits of a code, and the steps of the binary search.
        levels: ``[256]`` float32, 0 for codes that the codebook lacks.
    """

    search: str
    table: Tensor
    shift: int
    bits: int
    levels: Tensor

    @property
    def closed_form(self) -> bool:
        """Whether codes are computed without a table."""
        return self.search in ("linear", "softsign")

    @property
    def level_search(self) -> str:
        """How kernels find the level of a code: ``"linear"`` computes it, ``"table"`` loads it."""
        return "linear" if self.search == "linear" else "table"


def tables_of(codebook: Codebook | None, device: torch.device) -> Tables:
    """Return the tables of ``codebook`` on ``device``, where they stay after the first call.

    None returns those of ``linear``, for kernels that take tables and use none.
    """
    if codebook is None:
        codebook = BUILTIN["linear"]
    # Codebooks with different closed forms compare equal, so the closed form is a key of its own.
    return _make(codebook, codebook.closed_form, device)


@lru_cache(maxsize=256)
@lasting()
def _make(codebook: Codebook, closed_form: ClosedForm | None, device: torch.device) -> Tables:
    thresholds, levels = codebook.thresholds, codebook.tensor()
    levels = pad(levels, (0, 256 - levels.numel())).to(device)
    bits = codebook.bits
    if closed_form is not None:
        return Tables(closed_form.kind, torch.empty(0, dtype=torch.int32, device=device), 0, bits, levels)
    for shift in (17, 16):  # 6 mantissa bits, or 7: one threshold a cell
        cells = _cells(thresholds, shift)
        if cells is not None:
            return Tables("cells", cells.to(device), shift, bits, levels)
    padded = pad(thresholds, (0, 2**bits - 1 - thresholds.numel()), value=torch.inf)
    return Tables("thresholds", padded.view(torch.int32).to(device), 0, bits, levels)


def _cells(thresholds: Tensor, shift: int) -> Tensor | None:
    """Return the table of cells, None if a cell holds two thresholds. Cells of NaN and infinity have the code of 0."""
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
