"""Renormalize the masters of embeddings with ``max_norm``, which write to their weight in every forward pass."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from q8lightning.qat.compiled import compiled_modules
from q8lightning.qat.engage.fake_quantizer import FakeQuantizer


def renormalize_masters(quantizer: FakeQuantizer) -> list[RemovableHandle]:
    """Let every embedding with ``max_norm`` and a selected weight renormalize its master, then look up quantized rows.

    Embeddings in compiled modules are left out, since a hook would break their graph. A write there is an error.

    Returns:
        The handles of the hooks.
    """
    compiled = compiled_modules(quantizer.module)
    handles: list[RemovableHandle] = []
    for each in quantizer.module.modules():
        if not isinstance(each, nn.Embedding | nn.EmbeddingBag) or each.max_norm is None or each in compiled:
            continue
        if id(each.weight) in quantizer.places:
            hooks = _Renormalize(quantizer)
            handles.append(each.register_forward_pre_hook(hooks, with_kwargs=True))
            handles.append(each.register_forward_hook(hooks.after, always_call=True))
    return handles


class _Renormalize:
    """The hooks of one embedding. Those of a copied module do nothing.

    Args:
        quantizer: What has the masters, which the hooks do not keep alive. None for a copy.
    """

    def __init__(self, quantizer: FakeQuantizer | None = None) -> None:
        self._quantizer = (lambda: None) if quantizer is None else weakref.ref(quantizer)
        self._max_norm: float | None = None

    def __call__(self, module: nn.Embedding | nn.EmbeddingBag, args: Any, kwargs: Any) -> None:
        quantizer = self._quantizer()
        master = None if quantizer is None else quantizer.master(module.weight)
        indices = args[0] if args else kwargs.get("input")
        if quantizer is None or master is None or not isinstance(indices, Tensor) or module.max_norm is None:
            return
        with torch.no_grad():
            torch.embedding_renorm_(master, indices.reshape(-1).contiguous(), module.max_norm, module.norm_type)
        quantizer.note_write(id(module.weight))
        quantizer.requantize()
        self._max_norm, module.max_norm = module.max_norm, None  # otherwise the module renormalizes the quantized rows

    def after(self, module: nn.Embedding | nn.EmbeddingBag, *_: Any) -> None:
        """Restore the module's ``max_norm``, also if its forward raised."""
        if self._max_norm is not None:
            module.max_norm, self._max_norm = self._max_norm, None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Renormalize, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Renormalize":
        return _Renormalize()
