"""How a tensor is encoded, in the terms of the backends: what all tensors of one launch have in common."""

from typing import NamedTuple

from q8lightning.quantization.spec.codebook import Codebook


class Coding(NamedTuple):
    """How the tensors of a group are encoded.

    Attributes:
        codebook: Its levels; None for the log codec.
        block_size: Elements that share a scale.
        residual: Whether there is a residual stage; for the linear codebook.
        signed_scale: Whether scales have a sign; see ``reference.quantize``.
    """

    codebook: Codebook | None
    block_size: int
    residual: bool = False
    signed_scale: bool = False

    @property
    def kind(self) -> str:
        """What kernels call it."""
        if self.codebook is None:
            return "log"
        return "residual" if self.residual else "codebook"

    @property
    def scales(self) -> int:
        """How many float32 scales a block has."""
        return 2 if self.codebook is None else 1

    def scale_bytes(self, numel: int) -> int:
        """Bytes of all scales of a tensor."""
        return -(-numel // self.block_size) * 4 * self.scales

    def encoded_bytes(self, numel: int) -> int:
        """Bytes of its scales and codes."""
        return numel * (2 if self.residual else 1) + self.scale_bytes(numel)
