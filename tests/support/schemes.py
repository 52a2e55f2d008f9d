"""Every way to encode, for the contract suites of backends."""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from q8lightning.quantization.spec.codebook import BUILTIN, Codebook

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
"""The dtypes that every backend takes, of 32, 16, 64 and 16 bits."""

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Scheme:
    """One way to encode, on any backend: the reference, ``cpu`` or the kernels, modules with the same functions.

    Attributes:
        name: A codebook's name, ``signed-`` before it for a signed scale, or ``residual``, ``log`` or ``affine``.
    """

    name: str

    @property
    def codebook(self) -> Codebook:
        """The codebook of the (first) stage; ``log`` and ``affine`` have none."""
        return BUILTIN["linear" if self.name == "residual" else self.name.removeprefix("signed-")]

    @property
    def signed_scale(self) -> bool:
        return self.name.startswith("signed-")

    @property
    def takes_negative(self) -> bool:
        return self.name not in ("log", "dynamic_unsigned")

    @property
    def for_checkpoints(self) -> bool:
        """Whether encoding again must find the same codes: not with a zero point, nor with a scale that shrinks."""
        return self.name in ("residual", "log") or (
            self.name != "affine" and (self.signed_scale or not self.codebook.one_sided)
        )

    def encode(self, backend: ModuleType, x: Tensor, block_size: int) -> tuple[Tensor, ...]:
        if self.name in ("residual", "log", "affine"):
            return getattr(backend, f"quantize_{self.name}")(x, block_size)
        return backend.quantize(x, self.codebook, block_size, self.signed_scale)

    def decode(self, backend: ModuleType, parts: tuple[Tensor, ...], block_size: int, dtype: torch.dtype) -> Tensor:
        if self.name in ("residual", "log", "affine"):
            return getattr(backend, f"dequantize_{self.name}")(*parts, block_size, dtype)
        return backend.dequantize(*parts, self.codebook, block_size, dtype)

    def admissible(self, x: Tensor) -> Tensor:
        """Return ``x`` without its signs, but those of zeros, where negative values cannot be encoded."""
        return x if self.takes_negative else x.abs().where(x != 0, x)


LIKE_INT8 = {f"int{bits}" for bits in range(3, 8)}  # with a plain scale, fewer levels test nothing that int8 does not
SCHEMES = [
    *(Scheme(name) for name in BUILTIN if name not in LIKE_INT8),
    *(Scheme(f"signed-{name}") for name, codebook in BUILTIN.items() if codebook.one_sided),
    Scheme("residual"),
    Scheme("log"),
    Scheme("affine"),
]
