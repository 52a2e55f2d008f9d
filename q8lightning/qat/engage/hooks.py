"""Hooks that modules carry during QAT: quantized inputs, and state dicts that hold the masters.

A copy of a module, and a pickled one, carries a copy of its hooks. Such a copy does nothing.
"""

import weakref
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from q8lightning.quantization.functional import fake_quantize_rows
from q8lightning.system.shards import is_distributed, local_of

Blocks = tuple[float, int]
"""Which blocks are quantized: their share, and the seed that chooses them if it is below 1."""


class MasterKeeper(Protocol):
    """What the hooks call of a fake quantizer."""

    @property
    def engaged(self) -> bool:
        """Whether the weights hold quantized values."""

    def master(self, parameter: Tensor) -> Tensor | None:
        """Return the master of an engaged weight, None for any other tensor."""

    def interrupt(self) -> Blocks | None:
        """Put the masters back, and return what :meth:`resume` needs."""

    def resume(self, blocks: Blocks) -> None:
        """Quantize the masters again."""


class QuantizeInputs:
    """A forward pre-hook that quantizes the float tensors among a module's positional arguments.

    Args:
        codebook: Its name or levels.
        per_tensor: One scale for a whole tensor, not for each vector along its last axis.
    """

    def __init__(self, codebook: Any, per_tensor: bool) -> None:
        self.codebook = codebook
        self.per_tensor = per_tensor
        self.enabled = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.enabled:
            return args
        return tuple(self._quantized(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)

    def _quantized(self, x: Tensor) -> Tensor:
        if is_distributed(x):
            raise ValueError(
                f"an activation rule quantizes what a module receives, but {type(x).__name__} of placements"
                f" {getattr(x, 'placements', None)} is divided among processes, as under tensor parallelism, and its"
                " scales would depend on their number; give such modules the codebook None"
            )
        return fake_quantize_rows(x, self.codebook, self.per_tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizeInputs, (self.codebook, self.per_tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizeInputs":
        return QuantizeInputs(self.codebook, self.per_tensor)


class StateDictHooks:
    """Hooks of a module that owns selected weights: its state dict shows masters, and loading one changes masters.

    Args:
        quantizer: What has the masters. The hooks do not keep it alive. None for a copy.
    """

    def __init__(self, quantizer: MasterKeeper | None = None) -> None:
        self._quantizer = (lambda: None) if quantizer is None else weakref.ref(quantizer)
        self._interrupted: Blocks | None = None

    def attach(self, owner: nn.Module) -> list[RemovableHandle]:
        """Register all hooks."""
        return [
            owner.register_state_dict_post_hook(self),  # type: ignore[no-untyped-call]
            owner.register_load_state_dict_pre_hook(self.before_load),  # type: ignore[no-untyped-call]
            owner.register_load_state_dict_post_hook(self.after_load),  # type: ignore[no-untyped-call]
        ]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Replace quantized values in a state dict by the masters, except live parameters (``keep_vars=True``)."""
        quantizer = self._quantizer()
        if quantizer is None or not quantizer.engaged:
            return
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            value = state_dict.get(prefix + name)
            if value is parameter or not isinstance(value, Tensor):
                continue
            if local_of(value).data_ptr() != local_of(parameter).data_ptr():
                continue
            master = quantizer.master(parameter)
            if master is not None:
                state_dict[prefix + name] = master

    def before_load(self, *_: Any) -> None:
        """Put the masters back, so that the values that are loaded become masters."""
        quantizer = self._quantizer()
        if quantizer is not None and quantizer.engaged:
            self._interrupted = quantizer.interrupt()

    def after_load(self, *_: Any) -> None:
        """Quantize what was loaded, if the weights were quantized before."""
        quantizer, interrupted, self._interrupted = self._quantizer(), self._interrupted, None
        if quantizer is not None and interrupted is not None:
            quantizer.resume(interrupted)

    def __reduce__(self) -> tuple[Any, ...]:
        return StateDictHooks, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateDictHooks":
        return StateDictHooks()
