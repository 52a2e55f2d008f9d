"""Draw the tensors of a checkpoint as a tree of the keys that lead to them."""

from collections.abc import Iterator, Sequence

from q8lightning.tools.entries import Size, TensorEntry
from q8lightning.tools.text import Branch, decibels


def tree_of(name: str, tensors: Sequence[TensorEntry], depth: int | None = None) -> Branch:
    """Return the tree of a checkpoint's tensors.

    Args:
        name: What stands at its root.
        tensors: The tensors.
        depth: How many levels are drawn; None for all. What is below is summed up.
    """
    return Branch([(name, "")], list(_grown([(entry.path.split("."), entry) for entry in tensors], depth)))


def ratio_of(size: Size | TensorEntry) -> str:
    """Return how many times smaller something became; empty for what takes no bytes."""
    return f"{size.decoded_bytes / size.bytes:.2f}x" if size.bytes else ""


def _grown(entries: Sequence[tuple[list[str], TensorEntry]], depth: int | None) -> Iterator[Branch]:
    branches: dict[str, list[tuple[list[str], TensorEntry]]] = {}
    for (key, *keys), entry in entries:
        if keys:
            branches.setdefault(key, []).append((keys, entry))
        else:
            yield _leaf(key, entry)
    for key, below in branches.items():
        named = [(key, ""), (_parameter(key, below), "dim")]
        if depth == 1:
            size = Size(len(below), *(sum(getattr(e, name) for _, e in below) for name in ("bytes", "decoded_bytes")))
            many = "s" if size.tensors > 1 else ""
            summed = f"{size.tensors:,} tensor{many}, {size.bytes:,} bytes {ratio_of(size)}".rstrip()
            yield Branch([*named, (f"  {summed}", "dim")])
        else:
            yield Branch(named, list(_grown(below, None if depth is None else depth - 1)))


def _parameter(key: str, below: Sequence[tuple[list[str], TensorEntry]]) -> str:
    """Return the name of the parameter whose states a branch holds, to show beside its number; empty if none."""
    names = {entry.name.removesuffix(f": {keys[-1]}") for keys, entry in below if len(keys) == 1 and _is_named(entry)}
    return f" {names.pop()}" if len(names) == 1 and key.isdecimal() else ""


def _is_named(entry: TensorEntry) -> bool:
    return entry.name != entry.path


def _leaf(key: str, entry: TensorEntry) -> Branch:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    if entry.tied_to is not None:
        return Branch([(f"{key}  {shape} {entry.dtype}  ", ""), (f"tied to {entry.tied_to}", "dim")])
    lost = "" if entry.sqnr_db is None else f"  {decibels(entry.sqnr_db)} dB"
    stored = f"{key}  {shape} {entry.dtype}  {entry.bytes:,} bytes"
    if entry.codec is None:
        return Branch([(stored + lost, "")])
    return Branch([(f"{stored}  ", ""), (entry.codec, "cyan"), (f"  {ratio_of(entry)}{lost}", "")])
