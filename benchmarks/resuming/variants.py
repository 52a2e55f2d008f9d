"""The ways to store a state that are compared, and what a file of each would bring back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.encode.checkpoint import encode_and_report
from q8lightning.checkpoint.encode.judge.encode_tensors import encode_tensors
from q8lightning.checkpoint.file.payloads import decode_payloads, payloads_in
from q8lightning.checkpoint.layout.sections import path_of
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.policy import PRESETS, CheckpointPolicy, Rule
from q8lightning.checkpoint.tree import rebuild, tensors
from resuming.training import Checkpoint

Options = Mapping[str, Any]
"""Arguments of a rule, without its pattern."""

OPTIMIZERS = "optimizer_states"
WEIGHTS, FIRST, SECOND = "state_dict.*", f"{OPTIMIZERS}.*.exp_avg", f"{OPTIMIZERS}.*.exp_avg_sq"


@dataclass(frozen=True)
class Variant:
    """A way to store a state.

    Attributes:
        name: Its name in records and tables.
        group: ``floor`` for a plain copy, ``preset``, ``frontier`` for a whole state under another policy, ``part`` if
            only a part of the state is encoded, ``warning`` for what nobody should do.
        policy: What is encoded, and how; None for a plain copy.
        guarded: Whether it is saved as the callback saves, with the guard that stores better what would lose too much.
            Otherwise the codecs of the policy are used whatever they lose.
        weights: The dtype that weights are rounded to; None if they are not.
        moved: Whether each weight is the float next to it, as if it had been rounded once more.
    """

    name: str
    group: str
    policy: CheckpointPolicy | None = None
    guarded: bool = True
    weights: torch.dtype | None = None
    moved: bool = False


@dataclass(frozen=True)
class Stored:
    """A checkpoint as a file has it.

    Attributes:
        content: The checkpoint; encoded tensors are payloads.
        metrics: What was lost, as the callback logs it; empty if that was not measured.
        guarded: How many tensors the guard stored better than the policy says.
    """

    content: Checkpoint
    metrics: Mapping[str, float]
    guarded: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and tensors; tied ones count once."""
        seen: dict[Any, int] = {}

        def count(leaf: Any) -> Any:
            if isinstance(leaf, QuantizedTensor):
                seen[id(leaf)] = leaf.nbytes
            elif isinstance(leaf, Tensor):
                seen[leaf.data_ptr(), leaf.dtype] = leaf.nbytes
            return leaf

        rebuild(self.content, count)
        return sum(seen.values())

    def load(self) -> Checkpoint:
        """Return the checkpoint as loading it returns it. It shares with the original what is not encoded."""
        payloads = payloads_in(self.content)
        device = payloads[0].data.device if payloads else None
        decoded = decode_payloads(payloads, device if device is not None and device.type == "cuda" else None)
        loaded: Checkpoint = rebuild(self.content, lambda leaf: decoded.get(id(leaf), leaf))
        return loaded


def store(checkpoint: Checkpoint, variant: Variant) -> Stored:
    """Store a checkpoint, which stays as it is, through the code that saves run."""
    if variant.moved:
        checkpoint = {**checkpoint, "state_dict": _moved(checkpoint["state_dict"])}
    if variant.weights is not None:
        once: dict[int, Tensor] = {}  # tied weights stay tied
        rounded = {
            name: once.setdefault(tensor.data_ptr(), tensor.to(variant.weights))
            for name, tensor in checkpoint["state_dict"].items()
        }
        checkpoint = {**checkpoint, "state_dict": rounded}
    if variant.policy is None:
        return Stored(checkpoint, {}, 0)
    if variant.guarded:
        content, report = encode_and_report(checkpoint, variant.policy)
        return Stored(content, report.metrics, len(report.guarded) + len(report.refused))
    return Stored(_encode_all(checkpoint, variant.policy), {}, 0)


def _moved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that are each a float further from zero; tied ones stay tied."""
    once: dict[int, Tensor] = {}
    return {name: once.setdefault(tensor.data_ptr(), tensor.nextafter(2 * tensor)) for name, tensor in weights.items()}


def _encode_all(checkpoint: Checkpoint, policy: CheckpointPolicy) -> Checkpoint:
    """Encode what the policy names, whatever that loses; tied tensors become one payload."""
    items = {
        tensor.data_ptr(): (tensor, codec, path_of(keys))
        for keys, tensor in tensors(checkpoint)
        if tensor.numel() >= policy.min_numel and (codec := policy.codec_for(path_of(keys)))
    }
    payloads = dict(zip(items, encode_tensors(list(items.values())).payloads, strict=True))

    def change(leaf: Any) -> Any:
        return payloads.get(leaf.data_ptr(), leaf) if isinstance(leaf, Tensor) else leaf

    encoded: Checkpoint = rebuild(checkpoint, change)
    return encoded


def rules(weights: Options | None = None, first: Options | None = None, second: Options | None = None) -> list[Rule]:
    """Return a rule for each part of a state that has options."""
    parts = {WEIGHTS: weights, FIRST: first, SECOND: second}
    return [Rule(pattern, **options) for pattern, options in parts.items() if options]


def policy(
    weights: Options | None = None, first: Options | None = None, second: Options | None = None
) -> CheckpointPolicy:
    """Return a policy without limits, to see what a codec does."""
    return CheckpointPolicy(rules(weights, first, second), min_sqnr_db=None, max_update_direction_error=None)


def _weights(bits: int, residual_bits: int = 0) -> Options:
    codec = "linear" if residual_bits else "softsign"
    return {"codec": codec, "block_size": 256, "bits": bits, "residual_bits": residual_bits}


def _first(bits: int, block_size: int = 128) -> Options:
    return {"codec": "softsign", "block_size": block_size, "bits": bits}


def _second(bits: int, block_size: int = 128) -> Options:
    return {"codec": "log", "block_size": block_size, "bits": bits}


def whole(bits: int, residual_bits: int, first: int, second: int, block_size: int = 128) -> Variant:
    """Return a variant for a whole state, named by the bits of weights and their residual, first and second moments.

    It has the limits that a policy has by default, as the presets have. The block size is that of the moments.
    """
    name = f"{bits}+{residual_bits}" if residual_bits else str(bits)
    name = f"{name} / {first} / {second}" + ("" if block_size == 128 else f", blocks of {block_size}")
    moments = _first(first, block_size), _second(second, block_size)
    return Variant(name, "frontier", CheckpointPolicy(rules(_weights(bits, residual_bits), *moments)))


_LINEAR = {"codec": "linear", "block_size": 128}
_MAP, _UNSIGNED_MAP = {"codec": "dynamic", "block_size": 256}, {"codec": "dynamic_unsigned", "block_size": 256}

PLAIN = Variant("plain", "floor")

MOVED = Variant("plain, weights one rounding off", "floor", moved=True)
"""The least that can be different. Where training is deterministic, this is the floor."""

FIRST_OF_ALL: tuple[Variant, ...] = (
    Variant("plain again", "floor"),
    MOVED,
    *(Variant(name, "preset", preset) for name, preset in PRESETS.items()),
    whole(8, 4, 6, 6),
    whole(8, 4, 6, 5),
    whole(8, 3, 5, 4),
    whole(8, 0, 4, 4),
    whole(8, 0, 8, 8),
    Variant("linear uint8 second moments", "warning", policy(second=_LINEAR), guarded=False),
    Variant("bitsandbytes' maps", "warning", policy(_MAP, _MAP, _UNSIGNED_MAP), guarded=False),
    Variant("weights: bfloat16", "part", weights=torch.bfloat16),
)
"""What is compared with the plain resume, the most important first. Today's presets are 8+3 / 6 / 6, 8 / 5 / 4 and
8+8 / 8 / 8, the first two with scales of moments in bfloat16; other policies have float32 scales."""

LATER: tuple[Variant, ...] = (
    *(Variant(f"weights: linear 8+{bits}", "part", policy(_weights(8, bits))) for bits in (4, 3, 2)),
    Variant("weights: softsign 8", "part", policy(_weights(8))),
    *(Variant(f"exp_avg: softsign {bits}", "part", policy(first=_first(bits))) for bits in (6, 4, 8, 5)),
    *(Variant(f"exp_avg_sq: log {bits}", "part", policy(second=_second(bits))) for bits in (5, 4, 8, 6)),
    Variant("plain once more", "floor"),
    whole(8, 3, 6, 6),
    whole(8, 0, 5, 5),
    whole(8, 4, 6, 5),
    whole(8, 4, 5, 6),
    whole(8, 3, 5, 5),
    whole(8, 0, 4, 5),
    whole(8, 6, 7, 6),
    whole(8, 3, 7, 6),
    whole(8, 3, 6, 5),
    whole(8, 4, 5, 5),
    whole(8, 5, 6, 6),
    *(whole(8, *bits, block_size=256) for bits in ((4, 6, 5), (3, 6, 6), (4, 6, 6), (3, 7, 6))),
    Variant("moments: bitsandbytes' maps", "part", policy(first=_MAP, second=_UNSIGNED_MAP), guarded=False),
)
"""What is compared if there is time, after the restores of :data:`RESTORED_OFTEN`."""

VARIANTS = (*FIRST_OF_ALL, *LATER)

RESTORED_OFTEN = (MOVED, *(each for each in VARIANTS if each.group == "preset" or each.name == "8 / 8 / 8"))
"""What is restored ten and a hundred times."""


def is_wanted(variant: Variant, only: str | None) -> bool:
    """Whether the name of a variant contains one of some texts, separated by commas; any does for None."""
    return only is None or any(text.strip() in variant.name for text in only.split(","))
