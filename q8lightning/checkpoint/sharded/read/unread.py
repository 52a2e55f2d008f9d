"""A tensor of a folder that has not been read: what is known of it, and how to read it."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from q8lightning.quantization.codecs.codec import Codec


class StoredAs(NamedTuple):
    """How a tensor is stored.

    Attributes:
        nbytes: Bytes of all its shards, encoded or not.
        codecs: The codecs of its shards in their order, each once; None for a shard that is stored as it is.
    """

    nbytes: int
    codecs: tuple[Codec | None, ...]


class UnreadTensor:
    """A tensor whose shards are on the disk.

    It is a plain object, so that code which maps functions over tensors leaves it alone.

    Attributes:
        shape: Shape of the whole tensor.
        dtype: Its dtype.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[], Tensor],
        look: Callable[[], StoredAs] | None = None,
    ) -> None:
        """Make it.

        Args:
            shape: See the class.
            dtype: See the class.
            read: Reads and decodes the whole tensor.
            look: Finds out how it is stored, without reading it; None if it is stored as it is.
        """
        self.shape = shape
        self.dtype = dtype
        self._read = read
        self._look = look

    def read(self) -> Tensor:
        """Return the whole tensor on the host, decoded; it is read anew each time.

        Raises:
            CorruptCheckpointError: If a shard is not what was saved.
        """
        return self._read()

    @cached_property
    def stored(self) -> StoredAs:
        """How it is stored."""
        return StoredAs(self.decoded_bytes, (None,)) if self._look is None else self._look()

    @property
    def is_encoded(self) -> bool:
        """Whether any of its shards is."""
        return self.stored.codecs != (None,)

    @property
    def nbytes(self) -> int:
        """Bytes of its shards."""
        return self.stored.nbytes

    @property
    def decoded_bytes(self) -> int:
        """Bytes of its values in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize
