"""The private names of torch, Lightning and torchmetrics that the package relies on.

Here is the whole list: what each is for, and what happens where a version does not have it. What is used of Lightning
stands in ``trainer/lightning_api/internals.py`` besides. ``tests/test_private_names.py`` compares the list with the
versions that are installed, and with the package: all were there in torch 2.13, Lightning 2.6.6 in both packages, and
torchmetrics 1.9. Nothing here imports Lightning: who has not imported it has no objects of it.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from q8lightning.system.advice import advise
from q8lightning.system.find_names import find, has, parameters_of

STANDALONE = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
"""The packages of ``lightning``, and what each is called by itself."""

Part = Literal["saving", "sharded", "background", "logging", "qat", "tools"]
"""What a user asks for: who does not, needs none of its names."""


@dataclass(frozen=True)
class PrivateName:
    """A name that no documentation promises, or a public one that the package replaces or reads in an unusual way.

    Attributes:
        owner: Where it is: a module, or a class or function in one.
        name: The attribute, method, parameter or text.
        part: Which part of the package uses it.
        use: What it is for.
        without: What happens where it does not exist; None if that part cannot work then.
        parameters: Of a function that is called in the place of its own caller: all that it takes, in their order.
            Where it takes others, it is not the function that the package knows, and does not exist.
    """

    owner: str
    name: str
    part: Part
    use: str
    without: str | None = None
    parameters: tuple[str, ...] | None = None

    def __str__(self) -> str:
        taking = "" if self.parameters is None else f"({', '.join(self.parameters)})"
        return f"{self.owner}.{self.name}{taking} ({self.use}; without it, {self.without or _CANNOT_WORK[self.part]})"


class MissingNameError(RuntimeError):
    """An installed version of torch or Lightning does not have what the package cannot work without."""


_CANNOT_WORK: Mapping[Part, str] = {
    "saving": "no checkpoint can be saved quantized",
    "sharded": "no checkpoint can be saved in shards and quantized",
    "background": "nothing can be saved in the background",
    "logging": "nothing can be logged",
    "qat": "no weights can be trained quantized",
    "tools": "q8lightning.tools and the command line fail where they meet it",
}
_SLOW = "torch.save writes the files, more slowly and larger"
_SHARDED = "sharded checkpoints are not quantized"
_FUSED = "an optimizer that steps inside backward is refused in its first step, not when the fit starts"
_COMPILED = "writes to weights in compiled code may be lost"
_MESSAGE = "where a file's name begins by which Lightning hands weights to itself"
_AROUND = "wrapped on the Trainer's plugin: weights are quantized around it"
_READER = "this callback of Lightning's reads or writes weights between steps"
_READ = "the hooks of that callback may see quantized weights"
_FAST = "whether attention may take its fast path"

# fmt: off
PRIVATE_NAMES: tuple[PrivateName, ...] = (
    # What a save passes
    PrivateName("lightning.pytorch.plugins.io.wrapper", "_WrappingCheckpointIO", "saving",
                "what a CheckpointIO is that wraps another one"),
    PrivateName("lightning.pytorch.plugins.io.wrapper._WrappingCheckpointIO", "_checkpoint_io", "saving",
                "puts a durable writer inside a wrapper",
                "files inside a wrapper, such as AsyncCheckpointIO, get their name before they are on the disk"),
    PrivateName("lightning.pytorch.strategies.Strategy", "save_checkpoint", "saving",
                "replaced on the Trainer's strategy: every save passes it"),
    PrivateName("lightning.pytorch.strategies.FSDPStrategy", "_state_dict_type", "saving",
                "whether FSDP writes sharded checkpoints", _SHARDED),
    PrivateName("lightning.pytorch.strategies.ModelParallelStrategy", "_save_distributed_checkpoint", "saving",
                "whether ModelParallel writes sharded checkpoints", _SHARDED),
    PrivateName("lightning.fabric.strategies.strategy.Strategy", "save_checkpoint", "saving",
                "replaced on Fabric's strategy while q8lightning.fabric.save calls fabric.save",
                "q8lightning.fabric.save fails"),
    PrivateName("lightning.fabric.strategies.fsdp.FSDPStrategy", "_state_dict_type", "saving",
                "whether FSDP of Fabric writes sharded checkpoints",
                "q8lightning.fabric.save gathers them into one file"),
    PrivateName("lightning.fabric.strategies.model_parallel.ModelParallelStrategy", "_save_distributed_checkpoint",
                "saving", "whether ModelParallel of Fabric writes sharded checkpoints",
                "q8lightning.fabric.save gathers them into one file"),
    PrivateName("lightning.fabric.utilities.load._NotYetLoadedTensor", "_load_tensor", "saving",
                "reads a tensor that FSDP has not read", 'FSDPStrategy(state_dict_type="full") cannot resume'),
    PrivateName("lightning.pytorch.tuner.lr_finder._lr_find", ".lr_find_", "saving",
                _MESSAGE, "the learning rate finder goes on with weights that were quantized"),
    PrivateName("lightning.pytorch.tuner.batch_size_scaling._scale_batch_size", ".scale_batch_size_", "saving",
                _MESSAGE, "the batch size finder goes on with weights that were quantized"),
    PrivateName("lightning.pytorch.strategies.launchers.multiprocessing._MultiProcessingLauncher", ".temp.ckpt",
                "saving", _MESSAGE, "the process that started others gets weights that were quantized"),
    PrivateName("lightning.pytorch.trainer.connectors.checkpoint_connector._CheckpointConnector", "hpc_ckpt_",
                "background",
                "where the name of a file begins that is saved when SLURM is about to end the process",
                "such a save is not waited for"),
    PrivateName("lightning.pytorch.callbacks.ModelCheckpoint", "file_exists", "background",
                "replaced on callbacks: whether a name is taken",
                "a name looks free while its file is being written, and another callback may take it"),
    PrivateName("lightning.pytorch.callbacks.ModelCheckpoint", "_link_checkpoint", "background",
                "replaced on callbacks: links behind the saves that are pending",
                "last.ckpt, if it is a link, may lead nowhere when the process is killed during a save"),
    PrivateName("lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop", "_batches_that_stepped", "logging",
                "the step at which Lightning logs",
                "values are logged at trainer.global_step, which counts every optimizer"),
    PrivateName("torchmetrics.Metric", "_wrap_update", "logging", "counts what is not called update() as an update"),
    PrivateName("torchmetrics.Metric", "_plot", "logging", "plots as every metric does", "plot() of metrics fails"),
    # What tensors and files are made of
    PrivateName("torch", "_foreach_copy_", "saving", "copies many small tensors in one launch"),
    PrivateName("torch.UntypedStorage", "_cdata", "saving", "which tensors share memory"),
    PrivateName("torch.nn.Module", "_parameters", "saving", "whether the model has other parameters than before"),
    PrivateName("torch.nn.Module.state_dict", "_metadata", "saving",
                "tells the state of a module from other dicts of tensors",
                "under a user's own key it is known by the names in it alone"),
    PrivateName("torch.nn.Module", "_modules", "saving", "whether the model has other layers than before"),
    PrivateName("torch.serialization", "_save", "saving", "pickles, and hands each storage to a writer", _SLOW,
                ("obj", "zip_file", "pickle_module", "pickle_protocol", "_disable_byteorder_record")),
    PrivateName("torch.serialization", "_get_storage_alignment", "saving", "where records begin", _SLOW),
    PrivateName("torch.serialization", "_serialization_tls", "saving", "whether storages are left out", _SLOW),
    # What checkpoints in shards pass
    PrivateName("lightning.pytorch.strategies.Strategy", "load_checkpoint", "sharded",
                "replaced on the Trainer's strategy: every load passes it"),
    PrivateName("lightning.pytorch.strategies.ModelParallelStrategy", "lightning_module_state_dict", "sharded",
                "replaced on the Trainer's strategy, so that shards are encoded where they are"),
    PrivateName("lightning.pytorch.strategies.ModelParallelStrategy", "optimizer_state", "sharded",
                "replaced on the Trainer's strategy, so that shards are encoded where they are"),
    PrivateName("torch.distributed.checkpoint.filesystem", "_StorageInfo", "sharded",
                "where in which file DCP finds a chunk"),
    PrivateName("torch.serialization", "_get_layout", "tools", "how a folder's .metadata names the layout of tensors"),
    # When weights are quantized in a training step, and who sees them
    PrivateName("lightning.pytorch.plugins.precision.Precision", "train_step_context", "qat", _AROUND),
    PrivateName("lightning.pytorch.plugins.precision.Precision", "val_step_context", "qat", _AROUND),
    PrivateName("lightning.pytorch.plugins.precision.Precision", "test_step_context", "qat", _AROUND),
    PrivateName("lightning.pytorch.plugins.precision.Precision", "predict_step_context", "qat", _AROUND),
    PrivateName("lightning.pytorch.plugins.precision.Precision", "pre_backward", "qat", _AROUND),
    PrivateName("lightning.pytorch.plugins.precision.Precision", "backward", "qat", _AROUND),
    PrivateName("lightning.pytorch.plugins.precision.Precision", "post_backward", "qat", _AROUND),
    PrivateName("lightning.pytorch.plugins.precision.Precision", "optimizer_step", "qat", _AROUND),
    PrivateName("lightning.pytorch.callbacks", "weight_averaging", "qat", _READER, _READ),
    PrivateName("lightning.pytorch.callbacks", "stochastic_weight_avg", "qat", _READER, _READ),
    PrivateName("lightning.pytorch.callbacks", "lambda_function", "qat", _READER, _READ),
    PrivateName("lightning.pytorch.callbacks", "pruning", "qat", _READER, _READ),
    PrivateName("lightning.pytorch.callbacks", "finetuning", "qat", _READER, _READ),
    PrivateName("torch.Tensor", "_post_accumulate_grad_hooks", "qat", "whether an optimizer may step there", _FUSED),
    PrivateName("torch.nn.parallel.DistributedDataParallel", "_in_backward_optimizers", "qat",
                "whether torch.distributed.optim gave a parameter an optimizer", _FUSED),
    # Who writes to them in a step
    PrivateName("torch.Tensor", "data", "qat", "replaced on nn.Parameter: who asks for a weight's memory"),
    PrivateName("torch.Tensor", "_version", "qat", "whether a weight was written to"),
    PrivateName("torch.Tensor", "_base", "qat", "whether a tensor is a view of a parameter"),
    PrivateName("torch.Tensor", "_typed_storage", "qat", "reads no values, and is not followed", "it is followed"),
    PrivateName("torch.nn.Module", "_forward_hooks", "qat", _FAST),
    PrivateName("torch.nn.Module", "_forward_pre_hooks", "qat", _FAST),
    PrivateName("torch.overrides", "_get_current_function_mode_stack", "qat", _FAST),
    PrivateName("torch.utils._python_dispatch", "_disable_current_modes", "qat",
                "computes inside a step without being counted as a part of it"),
    PrivateName("torch.nn.Module", "_compiled_call_impl", "qat", "whether Module.compile compiled it", _COMPILED),
    PrivateName("lightning.pytorch.LightningModule", "_compiler_ctx", "qat",
                "whether torch.compile compiled it before Lightning unwrapped it", _COMPILED),
    PrivateName("torch._dynamo.eval_frame.OptimizedModule", "_orig_mod", "qat", "the module that it runs", _COMPILED),
    PrivateName("torch", "_dynamo", "qat", "whether anything has been compiled",
                "modules that were compiled before the fit do not quantize their inputs"),
    # What reads and rewrites checkpoints without a Trainer
    PrivateName("pickle", "_Pickler", "tools", "lets an object be replaced by one that was pickled before"),
    PrivateName("torch.storage.TypedStorage", "_untyped_storage", "tools", "its memory"),
    PrivateName("torch.storage.TypedStorage", "_pickle_storage_type", "tools", "what files call it"),
    PrivateName("torch.storage.TypedStorage", "_size", "tools", "its elements"),
    PrivateName("torch.Tensor", "_indices", "tools", "the bytes of a sparse tensor"),
    PrivateName("torch.Tensor", "_values", "tools", "the bytes of a sparse tensor"),
    PrivateName("sys", "_getframe", "tools", "which file torch.load is reading"),
)
# fmt: on

ZIP_NAMES = tuple(each for each in PRIVATE_NAMES if each.owner == "torch.serialization")
"""What our own writer of zip files needs of torch's."""


def check_names(parts: Collection[Part], warn: Callable[[str], None] = advise) -> None:
    """Say what the installed versions do not have of what some parts of the package rely on.

    Args:
        parts: What the user asked for.
        warn: Hears of what has gone that the package can do without, and what that costs: one message.

    Raises:
        MissingNameError: If one of the parts cannot work.
    """
    gone = [each for each in PRIVATE_NAMES if each.part in parts and not is_there(each)]
    needed = [each for each in gone if each.without is None]
    if needed:
        raise MissingNameError(
            "q8lightning relies on private names of torch, Lightning and torchmetrics that the installed versions"
            f" ({_versions()}) do not have: {_listed(needed)}. Install versions that have them, such as the newest that"
            " were released before this q8lightning, or a newer q8lightning"
        )
    if gone:
        warn(
            "q8lightning relies on private names of torch, Lightning and torchmetrics that the installed versions"
            f" ({_versions()}) do not have, and goes on without: {_listed(gone)}. A newer q8lightning may know what has"
            " replaced them"
        )


def resolve(owner: str, name: str) -> Any:
    """Return what a private name stands for, found once.

    Raises:
        MissingNameError: If it does not exist.
    """
    try:
        return _resolve(owner, name)
    except AttributeError:
        raise MissingNameError(f"{owner}.{name} does not exist in the installed versions ({_versions()})") from None


def is_there(private: PrivateName) -> bool:
    """Whether a name exists as the package knows it, in both of Lightning's packages if both are imported."""
    return all(
        owner is not None
        and has(owner, private.name)
        and private.parameters in (None, parameters_of(getattr(owner, private.name, None)))
        for owner in owners(private.owner)
    )


def _listed(names: Collection[PrivateName]) -> str:
    return "; ".join(map(str, names))


def _versions() -> str:
    packages = ("torch", "lightning", *STANDALONE.values(), "torchmetrics")
    known = ((name, getattr(sys.modules.get(name), "__version__", None)) for name in packages)
    return ", ".join(f"{name} {version}" for name, version in known if version is not None)


@cache
def _resolve(owner: str, name: str) -> Any:
    return getattr(find(owner), name)


def owners(owner: str) -> Iterator[Any]:
    """Yield what a dotted name stands for, None where it does not exist, in Lightning's packages that are imported."""
    if not owner.startswith("lightning."):
        yield find(owner)
        return
    for package, standalone in STANDALONE.items():
        if owner.startswith(package):
            for imported in (package, standalone):
                if imported in sys.modules:
                    yield find(imported + owner.removeprefix(package))
