"""What a model with sharded weights needs beside its weights: gathered copies dropped in time, other writes noticed."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from q8lightning.qat.select.structure import Structure
from q8lightning.system.shards import gathering_modules, reads_from_the_host


class ShardedModel:
    """What the modules of a model have gathered of sharded weights, as FSDP2 does for the time that they run.

    Some keep it for longer: until backward, or until the next forward pass. While they do, ordinary parameters stand in
    for the sharded ones.

    What a step writes to a parameter that is not quantized may have been computed from quantized values. Beside sharded
    weights steps are not followed, so such writes are noticed.

    Args:
        module: The model. If none of its weights is sharded, all methods do nothing.

    Attributes:
        parts: The quantized weights of which this process holds a part.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts: Sequence[Tensor] = ()
        self._gathering = gathering_modules(module)
        self._others: list[tuple[str, nn.Parameter]] = []
        self._versions: list[int] = []

    def select(self, module: nn.Module, parts: Sequence[Tensor], selected: Collection[int]) -> None:
        """Note what is quantized of the model.

        Args:
            module: The model.
            parts: The weights of which this process holds a part.
            selected: The identities of all weights that are quantized.
        """
        self.parts = parts
        if parts:
            embeddings = (each for each in module.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag))
            renormalized = {id(each.weight) for each in embeddings if each.max_norm is not None}
            named = module.named_parameters()
            self._others = [(n, p) for n, p in named if id(p) not in selected and id(p) not in renormalized]

    def drop_gathered(self) -> None:
        """Put the sharded parameters in place, without communication; who needs the others gathers them again."""
        with torch.no_grad():
            for each in self._gathering:
                each.reshard()

    def hides_nothing_but(self, structure: Structure) -> bool:
        """Tell whether a model is the one that ``structure`` describes, be some of its parameters gathered."""
        if structure.unchanged():
            return True
        if not self._gathering:
            return False
        stand_ins = structure.now()
        self.drop_gathered()
        if not structure.unchanged():
            return False
        structure.allow(stand_ins)  # they are the same ones whenever the module gathers
        return True

    def before_change(self) -> None:
        """Drop what was gathered, and let the host wait until no device reads parts in its memory (CPU offload)."""
        if self.parts:
            self.drop_gathered()
            if any(map(reads_from_the_host, self.parts)):
                torch.accelerator.synchronize()

    def wait_for_writes(self, devices: Collection[torch.device]) -> None:
        """Let the host wait until the weights are written, if what gathers them next would not.

        Args:
            devices: Where the weights are.
        """
        for device in devices if self.parts and self._gathering else ():
            if device.type != "cpu":
                torch.accelerator.current_stream(device).synchronize()

    def note_others(self) -> None:
        """Note what the parameters that are not quantized are now."""
        self._versions = [_version(each) for _, each in self._others]

    def written_others(self) -> list[str]:
        """Return the names of those that were written to since, and forget the note; none if nothing was noted."""
        versions, self._versions = self._versions, []
        return [name for (name, each), before in zip(self._others, versions, strict=False) if _version(each) != before]


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
