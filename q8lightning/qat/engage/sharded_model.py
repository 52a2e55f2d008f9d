"""What a model with sharded weights needs beside its weights: gathered copies dropped in time, other writes noticed."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from q8lightning.qat.select.structure import Structure
from q8lightning.system.shards import gathering_modules, reads_from_the_host


class Gathered:
    """What the modules of a model have gathered of sharded weights, as FSDP2 does for the time that they run.

    Some keep it for longer: until backward, or until the next forward pass. While they do, ordinary parameters stand in
    for the sharded ones.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = gathering_modules(module)

    def __bool__(self) -> bool:
        return bool(self._modules)

    def drop(self) -> None:
        """Put the sharded parameters in place, without communication; who needs the others gathers them again."""
        with torch.no_grad():
            for each in self._modules:
                each.reshard()

    def hides_nothing_but(self, structure: Structure) -> bool:
        """Tell whether a model is the one that ``structure`` describes, be some of its parameters gathered."""
        if structure.unchanged():
            return True
        if not self._modules:
            return False
        stand_ins = structure.now()
        self.drop()
        if not structure.unchanged():
            return False
        structure.allow(stand_ins)  # they are the same ones whenever the module gathers
        return True


class OtherParameters:
    """The parameters that are not quantized, of a model with sharded weights, where writes in steps are not followed.

    What a step writes to them may have been computed from quantized values.

    Args:
        module: The model.
        selected: The identities of the parameters that are quantized.
    """

    def __init__(self, module: nn.Module, selected: Collection[int]) -> None:
        embeddings = (each for each in module.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag))
        renormalized = {id(each.weight) for each in embeddings if each.max_norm is not None}
        named = module.named_parameters()
        self._named = [(n, p) for n, p in named if id(p) not in selected and id(p) not in renormalized]
        self._versions: list[int] = []

    def note(self) -> None:
        """Note what they are now."""
        self._versions = [_version(each) for _, each in self._named]

    def written(self) -> list[str]:
        """Return the names of those that were written to since; none if nothing was noted."""
        versions, self._versions = self._versions, []
        return [name for (name, each), before in zip(self._named, versions, strict=False) if _version(each) != before]


def wait_for_readers(weights: Collection[Tensor]) -> None:
    """Let the host wait until no device reads weights any more that lie in its memory (CPU offload)."""
    if any(map(reads_from_the_host, weights)):
        torch.accelerator.synchronize()


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
