"""The weights of a checkpoint as a target sees them: by its names, as it lies them out, read one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.layout.sections import CODES_KEY, INPUTS_KEY, STATE_DICT
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.qat_codes import Codes, read_codes
from q8lightning.checkpoint.sharded.read.open_folder import OpenFolder
from q8lightning.checkpoint.sharded.read.read_codes import codes_in
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.export.errors import ExportError
from q8lightning.export.options import Naming
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.tools.open_checkpoint import OpenCheckpoint
from q8lightning.tools.tensors import Value


@dataclass(frozen=True)
class Weight:
    """A tensor of the state dict.

    Attributes:
        name: What the target calls it.
        original: What the checkpoint calls it.
        tied: What the target calls it besides.
        shape: Its shape in the target.
        dtype: Of its values in the checkpoint.
        codec: How it was trained quantized, and is written; None if it was not, or is written as floats.
        trained: How it was trained quantized; None if it was not.
        is_transposed: Whether the target holds the transpose of the checkpoint's matrix.
        is_contiguous: Whether its elements lie in row-major order in the checkpoint.
        value: What the checkpoint holds.
        source: The checkpoint.
    """

    name: str
    original: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: WeightCodec | None
    trained: WeightCodec | None
    is_transposed: bool
    is_contiguous: bool
    value: Value
    source: "Source"

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return torch.Size(self.shape).numel()

    @property
    def row(self) -> int:
        """The elements of a row: the size of the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def group(self) -> int | None:
        """The elements of a row that share a scale, the last ones perhaps fewer; None if blocks run otherwise.

        It is the whole row if a block is at least as long.
        """
        codec = self.codec
        if codec is None or not self.shape:
            return None
        if codec.axis is None:
            along_rows = self.is_contiguous and not self.is_transposed and self.row % codec.block_size == 0
            return codec.block_size if along_rows else None
        channels = 1 if self.is_transposed else 0
        if codec.axis != channels or len(self.shape) < 2:
            return None
        if len(self.shape) == 2:
            return min(codec.block_size, self.row)
        return codec.block_size if self.row % codec.block_size == 0 else None

    @property
    def flat_block(self) -> int | None:
        """The elements that share a scale, counted through the target's rows; None if blocks run otherwise."""
        codec = self.codec
        if codec is None:
            return None
        if codec.axis is None:
            return codec.block_size if self.is_contiguous and not self.is_transposed else None
        return self.group if self.group and self.row % self.group == 0 else None

    @property
    def rule(self) -> str:
        """The rule that it was trained with, for messages."""
        if self.codec is None:
            return "not quantized"
        book, size = self.codec.book, self.codec.block_size
        axis = "" if self.codec.axis is None else f", axis={self.codec.axis}"
        scales = "" if book.scale_dtype == "float32" else f', scale_dtype="{book.scale_dtype}"'
        return f"{book.name}, block_size={size}{axis}{scales}"

    def values(self) -> Tensor:
        """Return its values, of its shape and dtype: for a weight that was trained quantized, those on its grid.

        Raises:
            ExportError: If a weight that was trained quantized is not finite.
            CorruptCheckpointError: If the checkpoint is damaged.
        """
        if self.trained is None:
            found = self.source.opened.values(self.value)
        else:
            codec, codes, scales, like = self.codes()
            found = codec.decode(codes, scales, like)
        return found.t() if self.is_transposed else found

    def codes(self) -> Codes:
        """Return its codes as the checkpoint has them, never transposed; errors are those of :meth:`values`."""
        value, opened = self.value, self.source.opened
        if isinstance(value, UnreadTensor):
            assert isinstance(opened.source, OpenFolder)
            found = codes_in(opened.source, self.original)
        else:
            with explained(opened.path):
                if isinstance(value, QuantizedTensor):
                    value.verify()  # decoding would do so, but codes are read without it
                found = read_codes(value, self.source.codes[self.original])
        if not bool(found[2].isfinite().all()):
            raise ExportError(
                f"{self.original} holds NaN or infinity, which has no codes; export a checkpoint from before it did"
            )
        return found

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return codes ``[*shape]`` uint8 and scales ``[*shape[:-1], blocks of a row]`` float32 of a grouped weight."""
        _, codes, scales, _ = self.codes()
        return codes.reshape(self.shape), scales.reshape(*self.shape[:-1], -1)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return codes ``[numel]`` uint8 and scales ``[blocks]`` float32 of a weight with flat blocks."""
        _, codes, scales, _ = self.codes()
        return codes.reshape(-1), scales.reshape(-1)


class Source:
    """The weights of an open checkpoint that was saved during QAT.

    Args:
        opened: The checkpoint.
        naming: What the target calls them.
        dtype: What floats become that were not trained quantized; None to leave them as they are.

    Attributes:
        opened: The checkpoint.
        codes: The descriptions of the weights that were trained quantized, by their names in the checkpoint.
        inputs: How inputs of modules were trained quantized, by the modules' names in the checkpoint.
        weights: The weights, each once, in the order of the state dict.
        others: Names in the target of entries that are no tensors, by their names in the checkpoint.
        order: All names in the target, in the order of the state dict.

    Raises:
        ExportError: If the checkpoint says nothing of quantized weights, or a name or pattern does not fit.
    """

    def __init__(self, opened: OpenCheckpoint, naming: Naming, dtype: torch.dtype | None = None) -> None:
        self.opened = opened
        self.dtype = dtype
        self.codes: Mapping[str, Mapping[str, Any]] = opened.summary.get(CODES_KEY) or {}
        self.inputs: Mapping[str, Mapping[str, Any]] = opened.summary.get(INPUTS_KEY) or {}
        if not self.codes:
            raise ExportError(
                f"{opened.path} says nothing of quantized weights; export a checkpoint that a Trainer with"
                " QuantizationCallback(qat=...) saved, as the Trainer wrote it, after a step from start_step to"
                " end_step"
            )
        state = opened.content[STATE_DICT]
        names = naming.names(state)
        self.others = {name: new for name, new in names.items() if not isinstance(state[name], Value)}
        self.order = tuple(names.values())
        together: dict[Any, list[str]] = {}
        for name in names:
            if isinstance(state[name], Value):
                together.setdefault(identity(state[name]), []).append(name)
        self.weights = tuple(self._weight(tied, names, naming, state) for tied in together.values())

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.weights)

    @property
    def quantized(self) -> list[Weight]:
        """The weights that are written as codes."""
        return [weight for weight in self.weights if weight.codec is not None]

    @property
    def ties(self) -> dict[str, str]:
        """Further names of tied weights in the target, each with the name that the weight is written under."""
        return {name: weight.name for weight in self.weights for name in weight.tied}

    def inputs_of(self, weight: Weight) -> Mapping[str, Any] | None:
        """Return how the inputs of a weight's module were trained quantized; None if they were not."""
        module = weight.original.rpartition(".")[0]
        found: Mapping[str, Any] | None = self.inputs.get(module)
        return found

    def kept_dtype(self, weight: Weight) -> torch.dtype:
        """Return the dtype of a weight's values in an export that does not hold its codes."""
        if weight.trained is None and self.dtype is not None and weight.dtype.is_floating_point:
            return self.dtype
        return weight.dtype

    def kept(self, weight: Weight) -> Tensor:
        """Return the values of a weight in that dtype, in row-major order."""
        return weight.values().detach().to(self.kept_dtype(weight)).contiguous()

    def _weight(self, tied: list[str], names: Mapping[str, str], naming: Naming, state: Mapping[str, Value]) -> Weight:
        original = tied[0]
        value, entry = state[original], self.codes.get(original)
        shape = tuple(value.shape)
        trained = None if entry is None else WeightCodec(entry["codebook"], entry["block_size"], entry["axis"])
        transposed = naming.is_transposed(original)
        if transposed and len(shape) != 2:
            raise ExportError(f"transpose matches {original} of shape {shape}; only matrices have a transpose")
        strides = value.stride if isinstance(value, QuantizedTensor) else None
        if isinstance(value, Tensor) and value.layout is torch.strided:
            strides = value.stride()
        return Weight(
            name=names[original],
            original=original,
            tied=tuple(names[each] for each in tied[1:]),
            shape=shape[::-1] if transposed else shape,
            dtype=value.dtype,
            codec=None if naming.is_float(original) else trained,
            trained=trained,
            is_transposed=transposed,
            is_contiguous=strides is None or _is_contiguous(shape, tuple(strides)),
            value=value,
            source=self,
        )


def identity(value: Any) -> Any:
    """Return a key that is equal for tied tensors only, which are objects of their own over the same memory."""
    if isinstance(value, Tensor) and value.layout is torch.strided and value.numel():
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    return id(value)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return torch.empty_strided(shape, strides, dtype=torch.float32, device="meta").is_contiguous()
