"""Know about operators of torch: which read, write or look at memory, and what their arguments hold."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

LAYERS = frozenset([
    "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "convolution", "embedding", "embedding_bag", "multi_head_attention_forward", "scaled_dot_product_attention",
    "layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "prelu",
])  # fmt: skip
"""Functions of layers. One whose arguments are not all computed from weights is part of a forward pass."""

NUMBERS = frozenset([
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__",
    "__contains__", "is_nonzero", "equal", "allclose",
])  # fmt: skip
"""What turns a tensor into a Python value, a NumPy array or a decision."""

ACCESSORS = ("__get__", "__set__")
"""What reads and writes an attribute."""

ALIASES = frozenset(["data", "T", "mT", "H", "mH", "real", "imag"])
"""Attributes of a tensor that are tensors over its memory."""

PLAIN = frozenset([
    "requires_grad_", "detach_", "retain_grad", "share_memory_", "register_hook", "backward", "data_ptr",
    "untyped_storage", "storage", "_typed_storage", "__reduce_ex__", "__repr__", "__format__", "__hash__", "__dir__",
])  # fmt: skip
"""What is run as it is: it neither reads nor writes values, or cannot be followed."""

LAZY = frozenset(["__get__", "detach", "view", "view_as"])
"""What returns a view without reading values, so that a weight that was written to needs no quantizing yet."""

IN_PLACE = frozenset(
    ["__setitem__", "__set__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__ipow__"]
)
"""What writes to its first argument, though its name does not end with a single underscore."""

RESHAPING = frozenset([
    "t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "as_strided_",
    "set_", "rename_",
])  # fmt: skip
"""What changes a tensor's shape, strides or storage in place, not only its values."""


def name_of(func: Any) -> str:
    """Return the name of an operator, without overload: ``"mul_"``, ``"linear"``, ``"__get__"``."""
    return str(getattr(func, "__name__", "")).split(".")[0]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments, or results, with every tensor replaced by what ``change`` returns for it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [mapped(each, change) for each in value]
    if type(value) is tuple:  # named tuples are results of operators, not arguments
        return tuple(mapped(each, change) for each in value)
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    return value


def targets_of(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operator writes to, by its name."""
    targets = list(tensors_in(kwargs.get("out")))
    if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        targets += tensors_in(next(iter((*args, *kwargs.values())), None))
    return targets


def version_of(tensor: Tensor) -> int:
    """Return how often autograd saw a tensor written to; 0 for a tensor of inference mode, which has no counter."""
    try:
        return tensor._version
    except RuntimeError:  # is_inference() may be False here: setting the data changes it, and adds no counter
        return 0


def storage_of(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, or a wrapper of torch.func (NotImplementedError is one)
        return 0


def same_numbers(one: Any, other: Any) -> bool:
    """Tell whether numbers, lists of numbers or arrays are equal to the bit; NaN equals NaN."""
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == other.tobytes())
    return repr(one) == repr(other)


def random_states(tensors: Iterable[Tensor], generators: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return the states of random number generators, each with the function that sets it.

    Args:
        tensors: The generators of the CPU and of these tensors' devices are among them.
        generators: Arguments of an operator. Those that are a ``torch.Generator`` are among them.
    """
    states: list[tuple[Any, Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    states += [(each.set_state, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    for device in {each.device for each in tensors} - {torch.device("cpu")}:
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state"):
            states.append((partial(module.set_rng_state, device=device), module.get_rng_state(device)))
    return states


def set_random_states(states: list[tuple[Any, Any]]) -> None:
    """Restore what :func:`random_states` returned."""
    for put, state in states:
        put(state)
