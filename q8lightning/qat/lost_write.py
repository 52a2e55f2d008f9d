"""What stops a training before a write to a quantized weight is lost."""

from collections.abc import Sequence

REMEDIES = (
    "write in a hook that sees the masters, such as on_train_batch_end or on_before_zero_grad, or inside"
    " `with q8lightning.masters(module):`, or leave the parameter as it is with QATConfig(exclude=[...])"
)

AFTERWARDS = (
    "it was found only afterwards, as no step is followed beside compiled code, nor after the first ones if they"
    " write nothing"
)
"""Why a write is lost that nobody followed."""

BESIDE_COMPILED = "compiled code runs in the same steps, and nobody can follow what it reads and computes"


class LostWriteError(RuntimeError):
    """Somebody wrote to a weight inside a step, and the write cannot reach the master, the weight in full precision.

    What helps: write in a hook such as ``on_train_batch_end``, write inside ``with q8lightning.masters(module):``, or
    leave the weight as it is (``QATConfig(exclude=[...])``). ``docs/qat.md`` says which writes arrive.

    Args:
        names: The weights' names.
        why: What is special about the write.
    """

    def __init__(self, names: Sequence[str], why: str = AFTERWARDS) -> None:
        several = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        super().__init__(
            f"a step wrote to {several} while it held quantized values, and the write would not reach the master as it"
            f" should: {why}; {REMEDIES}"
        )
        self.names = list(names)
        self.why = why

    def __reduce__(self) -> tuple[type["LostWriteError"], tuple[list[str], str]]:
        return LostWriteError, (self.names, self.why)
