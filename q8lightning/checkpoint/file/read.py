"""Read a whole checkpoint fast: each byte once, and reading, summing and decoding in parallel."""

import gc
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import IO, Any, cast

import torch
from torch import Tensor

from q8lightning.checkpoint.file.open_file import OpenFile
from q8lightning.checkpoint.file.payloads import TensorsWantedError, decode_payloads, payloads_in, replace_payloads
from q8lightning.checkpoint.file.verify.archive import verified
from q8lightning.checkpoint.file.verify.summed_file import SummedFile
from q8lightning.checkpoint.integrity import CorruptCheckpointError, is_verifying, without_verification
from q8lightning.checkpoint.layout.parameter_names import names_of_states
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES
from q8lightning.checkpoint.loading import collect_encoded, stays_encoded
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.system.workers import MOST, Workers, count_workers


def read_checkpoint(
    path: str | os.PathLike[str],
    load: Callable[[IO[bytes]], Any],
    verify: bool = True,
    optimizer_device: torch.device | None = None,
) -> Any:
    """Load a checkpoint and decode its payloads; the result is what ``load`` alone would return.

    Args:
        path: A file of this machine.
        load: Loads from an open file; ``torch.load`` with its options.
        verify: Compare checksums of payloads, and sums of everything else; not inside :func:`without_verification`.
        optimizer_device: A GPU on which optimizer states are decoded and stay; None for the host.

    Raises:
        CorruptCheckpointError: If the content is not what was saved.
        OSError: If there is no such file or it cannot be read.
    """
    verify = verify and is_verifying()
    with ExitStack() as stack:
        if not verify:
            stack.enter_context(without_verification())
        workers = stack.enter_context(Workers(count_workers(MOST)))
        file = stack.enter_context(OpenFile(path))
        through = stack.enter_context(SummedFile(file, workers, sums=verify))
        if verify:
            stack.enter_context(verified(file, through, payloads=stays_encoded()))
        opened = cast("IO[bytes]", through)
        if stays_encoded():
            return load(opened)
        loaded = _load_and_decode(load, opened, optimizer_device)
        if loaded is not None:
            return loaded[0]
        through.seek(0)
        return load(opened)


def read_elsewhere(path: str | os.PathLike[str], load: Callable[[], Any]) -> Any:
    """Let other code load a checkpoint by its name, and verify the file meanwhile.

    If another file takes the name meanwhile, it is not known which of the two was loaded. The checkpoint is then loaded
    again. If that happens five times, only payloads are verified, by their own checksums, and a warning says so.
    Inside :func:`without_verification`, the checkpoint is loaded once, and not verified.

    Raises:
        CorruptCheckpointError: If the content is not what was saved.
    """
    if not is_verifying():
        return load()
    for _ in range(_ATTEMPTS):
        with OpenFile(path) as file:
            try:
                with verified(file, payloads=stays_encoded()):
                    content = load()
            except Exception:
                if file.has_its_name():
                    raise
            else:
                if file.has_its_name():
                    return content
    warnings.warn(
        f"{os.fspath(path)} was replaced each of the {_ATTEMPTS} times that it was loaded: of this load, only quantized"
        " tensors are compared with their checksums; to have everything compared, load a file that nothing replaces",
        stacklevel=2,
    )
    return load()


_ATTEMPTS = 5


def _load_and_decode(
    load: Callable[[IO[bytes]], Any], file: IO[bytes], optimizer_device: torch.device | None
) -> tuple[Any] | None:
    """Load, then decode all payloads together; None if an object needs its tensors while it is unpickled."""
    with collect_encoded() as payloads:
        try:
            content = load(file)
        except Exception:
            if payloads:
                return None  # perhaps because of a payload: loading the other way will tell
            raise
    try:
        content = replace_payloads(content, _decode(content, payloads, optimizer_device))
    except TensorsWantedError:
        return None
    except CorruptCheckpointError as error:
        raise _named(error, content) from error
    # A payload that is left belongs to an object that is no container.
    return (content,) if _are_gone(payloads) else None


def _named(error: CorruptCheckpointError, content: Any) -> CorruptCheckpointError:
    """Return the error with an optimizer's state named by its parameter, where that is known."""
    path = error.what.removeprefix(_THE_TENSOR)
    name = names_of_states(content).get(path, path)
    return CorruptCheckpointError(_THE_TENSOR + name if error.what.startswith(_THE_TENSOR) else error.what, error.file)


_THE_TENSOR = "the tensor "


def _are_gone(payloads: list[QuantizedTensor]) -> bool:
    """Empty the list; return whether no other reference to any of them is left."""
    references = [weakref.ref(payload) for payload in payloads]
    payloads.clear()
    if any(reference() is not None for reference in references):
        gc.collect()  # perhaps only a cycle refers to them
    return all(reference() is None for reference in references)


def _decode(
    content: Any, payloads: list[QuantizedTensor], optimizer_device: torch.device | None
) -> Mapping[int, Tensor]:
    if optimizer_device is None or not isinstance(content, dict):
        return decode_payloads(payloads)
    there = {id(payload) for payload in payloads_in(content.get(OPTIMIZER_STATES))}
    here = {id(each) for key, section in content.items() if key != OPTIMIZER_STATES for each in payloads_in(section)}
    there -= here
    return {
        **decode_payloads([each for each in payloads if id(each) in there], optimizer_device),
        **decode_payloads([each for each in payloads if id(each) not in there]),
    }
