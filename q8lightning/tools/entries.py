"""What the inspection of a checkpoint consists of: its tensors, and how large those of a kind are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint.

    Attributes:
        path: Keys and indices that lead to it, joined by dots; policies match it.
        name: Its name for people: ``layer.weight: exp_avg`` for an optimizer's state whose parameter is known, or else
            the path.
        kind: ``weights``, a moment's key such as ``exp_avg``, or ``other``.
        shape: The shape of its values.
        dtype: The dtype of its values, without ``torch.``.
        codec: Codec, residual stage and block size, such as ``linear8+4/256``; None if it is not encoded.
        bytes: Bytes in the file; 0 if it is tied to an earlier tensor.
        decoded_bytes: Bytes of its values in memory; 0 if it is tied to an earlier tensor.
        tied_to: The name of the earlier tensor that it is tied to; None if there is none.
        sqnr_db: What its save lost, as a signal-to-noise ratio in dB, infinite for nothing; None if the summary does
            not have it.
    """

    path: str
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    codec: str | None
    bytes: int
    decoded_bytes: int
    tied_to: str | None
    sqnr_db: float | None


@dataclass(frozen=True)
class Size:
    """The size of all tensors of a kind.

    Attributes:
        tensors: How many there are; tied ones count as often as they occur.
        bytes: Bytes in the file.
        decoded_bytes: Bytes of their values in memory.
    """

    tensors: int
    bytes: int
    decoded_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller they are in the file; 1 for tensors without elements."""
        return self.decoded_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class StoredOtherwise:
    """A tensor that is not stored as its rule says, or states of an optimizer that no rule says anything of.

    Attributes:
        name: Its name for people; see :class:`TensorEntry`. Of several states with one key, the first, and how many.
        reason: What its rule's codec would have lost, why it cannot hold the tensor, or that no rule names it.
        remedy: ``"residual"`` if it is stored in 16 bits instead, with a residual, ``"raw"`` if it is stored as it is.
    """

    name: str
    reason: str
    remedy: str
