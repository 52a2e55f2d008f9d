"""Say in one line at the start of a fit what the callback will do."""

from collections.abc import Mapping
from typing import NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, STATE_DICT
from q8lightning.checkpoint.memory import has_memory
from q8lightning.checkpoint.policy import PRESETS, CheckpointPolicy
from q8lightning.quantization.codecs.weight import WeightCodec
from q8lightning.trainer.lightning_api.model import in_state_dict
from q8lightning.trainer.lightning_api.strategies import encoding_device
from q8lightning.trainer.prepare.miniatures import parameters_of, states_to_come


class Expected(NamedTuple):
    """What checkpoints of a fit will take, of parameters and the moments that their optimizers will keep.

    Attributes:
        elements: Elements of all parameters.
        plain: Bytes without a policy.
        stored: Bytes with it.
    """

    elements: int
    plain: int
    stored: int


def tell_what_comes(
    trainer: pl.Trainer, policy: CheckpointPolicy | None, quantized: Mapping[str, WeightCodec], in_background: bool
) -> None:
    """Log the line.

    Args:
        trainer: The Trainer, with its model and optimizers.
        policy: What is quantized in checkpoints; None for nothing.
        quantized: How weights are trained quantized, by name.
        in_background: Whether saves go on while training does.
    """
    parts = []
    if policy is not None:
        parts.append(_of_checkpoints(trainer, policy, in_background))
    if quantized:
        parts.append(_of_weights(trainer, quantized))
    if parts:
        rank_zero_info(f"QuantizationCallback: {'; '.join(parts)}")


def expected_bytes(trainer: pl.Trainer, policy: CheckpointPolicy) -> Expected:
    """Return what checkpoints will take, before optimizers have any state."""
    owners = {
        id(parameter): (i, index, optimizer)
        for i, optimizer in enumerate(trainer.optimizers)
        for index, parameter in enumerate(parameters_of(optimizer))
    }
    elements = plain = stored = 0
    for name, parameter in trainer.lightning_module.named_parameters():
        if not has_memory(parameter) and not hasattr(parameter, "to_local"):
            continue  # of a lazy layer that has no shape yet
        named = in_state_dict(name)
        kept = [(f"{STATE_DICT}.{named}", parameter.dtype)]
        if id(parameter) in owners:
            i, index, optimizer = owners[id(parameter)]
            state = f"{OPTIMIZER_STATES}.{i}.state.{index}"
            kept += [(f"{state}.{key}", form.dtype) for key, form in states_to_come(optimizer, parameter)]
        numel = parameter.numel()
        elements += numel
        for path, dtype in kept:
            nbytes = numel * dtype.itemsize
            codec = policy.codec_for(path, named) if numel >= policy.min_numel else None
            plain += nbytes
            stored += nbytes if codec is None else min(nbytes, codec.encoded_bytes(numel))
    return Expected(elements, plain, stored)


def _of_checkpoints(trainer: pl.Trainer, policy: CheckpointPolicy, in_background: bool) -> str:
    preset = next((name for name, known in PRESETS.items() if known == policy), None)
    by = f"the preset {preset}" if preset else f"a policy of {len(policy.rules)} rules"
    expected = expected_bytes(trainer, policy)
    sizes = ""
    if expected.elements:
        stored, plain = expected.stored / expected.elements, expected.plain / expected.elements
        sizes = f", about {stored:.2f} bytes a parameter instead of {plain:.2f}"
    device = encoding_device(trainer.strategy)
    where = f"by kernels on {device}" if device is not None and device.type == "cuda" else "on the CPU"
    return f"checkpoints by {by}{sizes}, encoded {where}{', written in the background' if in_background else ''}"


def _of_weights(trainer: pl.Trainer, quantized: Mapping[str, WeightCodec]) -> str:
    sizes = {name: parameter.numel() for name, parameter in trainer.lightning_module.named_parameters()}
    kinds: dict[str, list[str]] = {}
    for name, codec in quantized.items():
        kinds.setdefault(f"{codec.codebook} in blocks of {codec.block_size}", []).append(name)
    told = (
        f"{len(names)} weights as {kind} ({sum(sizes.get(name, 0) for name in names):,} elements)"
        for kind, names in kinds.items()
    )
    return f"QAT trains {', '.join(told)}"
