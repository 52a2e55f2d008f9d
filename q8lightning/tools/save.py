"""Save modules, optimizers and anything else quantized, without a Trainer."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from q8lightning.checkpoint.encode.checkpoint import encode_and_report
from q8lightning.checkpoint.encode.select.model_names import ModelNames, as_states, describe_state, names_in
from q8lightning.checkpoint.encode.warn import warn_of
from q8lightning.checkpoint.file.write import write_checkpoint
from q8lightning.checkpoint.layout.places import BUFFERS, STATE_DICT, VERSION_KEY
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset, Rule
from q8lightning.system.arguments import check_patterns
from q8lightning.tools.convert.compress import policy_of


@dataclass(frozen=True)
class Saved:
    """What a save wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        tensors: How many tensors are quantized in it; tied ones count once.
        original_bytes: Bytes of all tensors in memory.
        stored_bytes: Bytes of all tensors in the file.
        metrics: What was lost, such as ``{"weights/sqnr_db": 95.3, "update_direction_error": 0.011}``; empty if nothing
            was quantized.
    """

    path: Path
    bytes: int
    tensors: int
    original_bytes: int
    stored_bytes: int
    metrics: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times smaller the tensors are than in memory; 1 if there are none."""
        return self.original_bytes / self.stored_bytes if self.stored_bytes else 1.0


def save(
    state: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    policy: Preset | CheckpointPolicy | Mapping[str, Any] = "resume",
    *,
    keep: Sequence[str] = (),
) -> Saved:
    """Save a state quantized; ``torch.load`` and ``q8lightning.load`` return ordinary tensors.

    Modules and optimizers in the state are saved as their state dicts, and a module by itself as its own, so that
    ``load_state_dict`` takes what is loaded. Buffers stay as they are. State dicts count as what they are of, but do
    not say which entries are buffers. What is there at ``path`` is replaced when all is written.

    Args:
        state: A module, a state dict, or anything by keys of your own: ``{"model": model, "optimizer": optimizer,
            "step": 100}``.
        path: The file.
        policy: ``"resume"``, ``"compact"``, a :class:`~q8lightning.CheckpointPolicy` or a mapping of its arguments.
        keep: Patterns of paths, such as ``model.head.*``. Tensors that match are stored as they are.

    Raises:
        ValueError: If the policy is not valid.
        OSError: If the file cannot be written.

    Example:
        >>> import q8lightning
        >>> model = nn.Linear(128, 128)
        >>> saved = q8lightning.save({"model": model, "step": 1}, "last.ckpt", "compact")  # doctest: +SKIP
        >>> f"{saved.ratio:.1f} times smaller"  # doctest: +SKIP
        '3.9 times smaller'
        >>> model.load_state_dict(q8lightning.load("last.ckpt")["model"])  # doctest: +SKIP
    """
    chosen = policy_of(policy)
    if keep := check_patterns("keep", keep):
        chosen = replace(chosen, rules=[*(Rule(pattern) for pattern in keep), *chosen.rules])
    content, names = _content(state)
    encoded, report = encode_and_report(content, chosen, names)
    write_checkpoint(encoded, path)
    warn_of(report)
    if not report.tensors and not report.refused and not report.passed_over:
        warnings.warn(
            f"{os.fspath(path)} is saved, and nothing in it is quantized: no tensor of at least {chosen.min_numel}"
            " elements has a rule and becomes smaller; lower the policy's min_numel, or use torch.save",
            stacklevel=2,
        )
    return Saved(
        path=Path(path),
        bytes=Path(path).stat().st_size,
        tensors=len(report.tensors),
        original_bytes=report.original_bytes,
        stored_bytes=report.stored_bytes,
        metrics=report.metrics if report.tensors else {},
    )


def _content(state: nn.Module | Mapping[str, Any]) -> tuple[Mapping[str, Any], ModelNames]:
    """Return what is saved, and what is known of it."""
    if isinstance(state, nn.Module):
        buffers = {(name,): (BUFFERS, name) for name, _ in state.named_buffers(remove_duplicate=False)}
        return state.state_dict(), ModelNames(places={(): (STATE_DICT,), **buffers})
    if not isinstance(state, Mapping):
        raise ValueError(
            f"a state is a module or a mapping, got {type(state).__name__}; save it as"
            ' {"model": model, "optimizer": optimizer}'
        )
    known = names_in(state)
    if VERSION_KEY in state or () in known.places:
        return state, known
    return as_states(state), describe_state(state)
