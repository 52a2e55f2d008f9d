"""The rules that targets can hold to the bit, by the targets' names."""

from typing import Any, Literal, get_args

from q8lightning.qat.rules import WeightRule
from q8lightning.system.arguments import did_you_mean

Target = Literal[
    "bitsandbytes-nf4", "bitsandbytes-int8", "compressed-tensors-int4", "compressed-tensors-int8",
    "gguf-q4_0", "gguf-q8_0", "torchao-int4", "torchao-int8",
]  # fmt: skip
"""The formats of ``export_quantized`` with the kinds of codes that they hold."""

_INT4: dict[str, Any] = {"codebook": "int4", "block_size": 128, "axis": 0, "scale_dtype": "bfloat16"}
_INT8: dict[str, Any] = {"codebook": "int8", "block_size": "row", "axis": 0, "scale_dtype": "bfloat16"}

_RULES: dict[str, dict[str, Any]] = {
    "bitsandbytes-nf4": {"codebook": "normal_float4", "block_size": 64},
    "bitsandbytes-int8": {"codebook": "linear", "block_size": "row", "axis": 0},
    "compressed-tensors-int4": _INT4,  # groups of 128, which vLLM's fast kernels take
    "compressed-tensors-int8": _INT8,
    "gguf-q4_0": {"codebook": "int4", "block_size": 32, "axis": 0, "scale_dtype": "float16"},
    "gguf-q8_0": {"codebook": "int8", "block_size": 32, "axis": 0, "scale_dtype": "float16"},
    "torchao-int4": _INT4,
    "torchao-int8": _INT8,
}


def rule_for(target: str, pattern: str = "*", transposed: bool = False) -> WeightRule:
    """Return the rule for parameters that match a pattern.

    Args:
        target: One of :data:`Target`.
        pattern: See :class:`WeightRule`.
        transposed: Whether the target holds the transpose, so that channels are columns.

    Raises:
        ValueError: If the target is unknown.
    """
    if target not in _RULES:
        hint = did_you_mean(str(target), get_args(Target))
        raise ValueError(f"target is one of {', '.join(get_args(Target))}, got {target!r}{hint}")
    return WeightRule(pattern, **_RULES[target] | ({"axis": 1} if transposed else {}))
