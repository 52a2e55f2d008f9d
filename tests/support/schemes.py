"""Every way to encode, for the contract suites of backends."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from q8lightning.quantization.spec.codebook import BUILTIN, Codebook, name_with_bits
from support import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
"""The dtypes that every backend takes, of 32, 16, 64 and 16 bits."""

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Scheme:
    """One way to encode, on any backend: the reference, ``cpu`` or the kernels, modules with the same functions.

    Attributes:
        name: A codebook's name, ``signed-`` before it for a signed scale, or ``affine``, ``log`` or ``residual`` with
            bits behind it, such as ``residual-8-4``; ``narrow-`` before all that for scales of bfloat16.
    """

    name: str

    @property
    def narrow(self) -> bool:
        """Whether scales are rounded to bfloat16."""
        return self.name.startswith("narrow-")

    @property
    def wide(self) -> str:
        """The name without ``narrow-``."""
        return self.name.removeprefix("narrow-")

    @property
    def family(self) -> str:
        """``codebook``, ``residual``, ``log`` or ``affine``."""
        first = self.wide.split("-")[0]
        return first if first in ("residual", "log", "affine") else "codebook"

    @property
    def bits(self) -> tuple[int, ...]:
        """The bits of the codes, but those of a codebook and ``affine``."""
        return () if self.family == "codebook" else tuple(map(int, self.wide.split("-")[1:]))

    @property
    def codebook(self) -> Codebook:
        """The codebook of the (first) stage; ``log`` and ``affine`` have none."""
        if self.family == "residual":
            return BUILTIN[name_with_bits("linear", self.bits[0])]
        book = BUILTIN[self.wide.removeprefix("signed-")]
        return book.with_scales("bfloat16") if self.narrow else book

    @property
    def signed_scale(self) -> bool:
        return self.wide.startswith("signed-")

    @property
    def takes_negative(self) -> bool:
        return self.family != "log" and self.wide != "dynamic_unsigned"

    @property
    def for_checkpoints(self) -> bool:
        """Whether encoding again must find the same codes: not with a zero point, nor with a scale that shrinks."""
        return self.family in ("residual", "log") or (
            self.family != "affine" and (self.signed_scale or not self.codebook.one_sided)
        )

    def encode(self, backend: ModuleType, x: Tensor, block_size: int) -> tuple[Tensor, ...]:
        if self.family != "codebook":
            scales = ("bfloat16",) if self.narrow else ()
            return getattr(backend, f"quantize_{self.family}")(x, block_size, *self.bits, *scales)
        return backend.quantize(x, self.codebook, block_size, self.signed_scale)

    def decode(self, backend: ModuleType, parts: tuple[Tensor, ...], block_size: int, dtype: torch.dtype) -> Tensor:
        if self.family != "codebook":
            return getattr(backend, f"dequantize_{self.family}")(*parts, block_size, *self.bits, dtype)
        return backend.dequantize(*parts, self.codebook, block_size, dtype)

    def kept(self, largest: Tensor) -> Tensor:
        """Return what becomes of the largest elements of blocks, or of blocks of one value, float32."""
        if not self.narrow:
            return largest
        rounding = {"rounding": np.floor} if self.family == "log" else {}
        return torch.from_numpy(oracle.to_bfloat16(largest, **rounding)).to(largest.dtype)

    def admissible(self, x: Tensor) -> Tensor:
        """Return ``x`` without its signs, but those of zeros, where negative values cannot be encoded."""
        return x if self.takes_negative else x.abs().where(x != 0, x)


LIKE_OTHERS = {f"int{bits}" for bits in range(3, 8)} | {  # with a plain scale, they test nothing that others do not
    *(f"linear{bits}" for bits in (3, 4, 6, 7)),
    *(f"softsign{bits}" for bits in (2, 4, 5, 7)),
}
RESIDUAL, LOG = Scheme("residual-8-8"), Scheme("log-8")
SCHEMES = [
    *(Scheme(name) for name in BUILTIN if name not in LIKE_OTHERS),
    *(Scheme(f"signed-{name}") for name, codebook in BUILTIN.items() if codebook.one_sided),
    RESIDUAL,
    Scheme("residual-8-4"),
    Scheme("residual-3-2"),
    LOG,
    Scheme("log-5"),
    Scheme("log-2"),
    Scheme("affine"),
    *(Scheme(f"narrow-{name}") for name in ("linear", "linear2", "softsign", "softsign5", "signed-int8", "fp8_e4m3")),
    *(Scheme(f"narrow-{name}") for name in ("log-8", "log-5", "log-2")),
]
