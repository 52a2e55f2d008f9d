"""The error that stops a training before a write to a quantized weight is lost."""

from collections.abc import Sequence

REMEDIES = (
    "write in a hook that sees the masters, such as on_train_batch_end or on_before_zero_grad, or inside"
    " `with q8lightning.masters(module):`, or leave the parameter as it is with QATConfig(exclude=[...])"
)

NOT_FOLLOWED = (
    "it was found only after the step; steps are not followed beside compiled code, nor after the first ones if those"
    " wrote nothing"
)
"""Why a write is lost in a step that was not followed."""

BESIDE_COMPILED = "compiled code runs in the same steps, and what it reads and computes cannot be followed"
"""Why a write is lost in a step that runs compiled code."""

SHARDED = "the weight is sharded, where steps are not followed"
"""Why a write to a distributed weight is lost."""

BESIDE_SHARDED = "other weights are sharded and quantized, where steps are not followed"
"""Why what a step writes to a parameter may have been computed from quantized values."""


class LostWriteError(RuntimeError):
    """A step wrote to a weight in a way that cannot reach the master, the weight in full precision.

    What helps: write in a hook such as ``on_train_batch_end``, write inside ``with q8lightning.masters(module):``, or
    leave the weight as it is (``QATConfig(exclude=[...])``). ``docs/qat.md`` says which writes reach the master.

    Args:
        names: The weights' names.
        why: Why the write cannot reach the master.
    """

    def __init__(self, names: Sequence[str], why: str = NOT_FOLLOWED) -> None:
        several = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lost = "while it held quantized values, and the write would not reach the master as it should"
        if why == BESIDE_SHARDED:
            lost = "and what it wrote may have been computed from quantized values, not from masters"
        super().__init__(f"a step wrote to {several} {lost}: {why}; {REMEDIES}")
        self.names = list(names)
        self.why = why

    def __reduce__(self) -> tuple[type["LostWriteError"], tuple[list[str], str]]:
        return LostWriteError, (self.names, self.why)
