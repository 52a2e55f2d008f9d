"""The callback: its hooks decide when, the wings decide what."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from q8lightning.checkpoint.background import BackgroundSaveError
from q8lightning.checkpoint.io import QuantizedCheckpointIO, check_not_async, find_quantized_io
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.state_dict import ModelNames


class QuantizationCallback(pl.Callback):
    """Saves every checkpoint of the Trainer quantized, three to four times smaller; everything loads as before.

    Args:
        checkpoint: ``"resume"`` (4.1 bytes a parameter of AdamW in float32 instead of 12), ``"compact"`` (3.1 bytes),
            a :class:`CheckpointPolicy`, or None to leave checkpoints as they are.
        async_save: Let training go on while a checkpoint is written: it is the state at the call all the same. When
            ``fit`` returns, however it ends, all checkpoints are complete. Saves after that return when they are done.
        verify: Compare files with their checksums when the Trainer loads them.

    Raises:
        ValueError: If there is no such preset; when the Trainer starts, if the policy matches nothing in the model or
            the strategy does not save through a CheckpointIO.
        BackgroundSaveError: From the Trainer, at the next save or at the end, if a save in the background failed.
        TypeError: When the Trainer starts, if it is not one of ``lightning.pytorch``.

    Example:
        >>> trainer = pl.Trainer(callbacks=[QuantizationCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        checkpoint: str | CheckpointPolicy | None = "resume",
        async_save: bool = False,
        verify: bool = True,
    ) -> None:
        self.policy = None if checkpoint is None else CheckpointPolicy.of(checkpoint)
        self.async_save = async_save
        self.verify = verify

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the quantizing CheckpointIO around the one that the Trainer has, once."""
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(
                f"q8lightning works with a Trainer of lightning.pytorch, got one of {type(trainer).__module__};"
                " replace `import pytorch_lightning` by `import lightning.pytorch`"
            )
        if self.policy is None:
            return
        _check_strategy(trainer.strategy)
        installed = find_quantized_io(trainer.strategy.checkpoint_io)
        if installed is None:
            installed = QuantizedCheckpointIO(trainer.strategy.checkpoint_io, self.policy, verify=self.verify)
            trainer.strategy.checkpoint_io = installed
        elif installed.policy != self.policy:
            raise ValueError(
                "the Trainer has a QuantizedCheckpointIO with another policy than the QuantizationCallback;"
                " give the policy to one of them and remove the other"
            )
        installed.describe_model = lambda: _names(trainer)
        if self.async_save:
            check_not_async(trainer.strategy.checkpoint_io)
            installed.async_save = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a policy that would quantize nothing, now that the model has its parameters."""
        if self.policy is not None:
            self.policy.check_matches(name for name, _ in pl_module.named_parameters())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish the pending save; an error of its own must not take the place of the one that is on its way."""
        try:
            self._finish(trainer)
        except BackgroundSaveError as error:
            rank_zero_warn(str(error))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish the pending save where the strategy does not tear its CheckpointIO down (FSDP, ModelParallel)."""
        self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        installed = None if self.policy is None else find_quantized_io(trainer.strategy.checkpoint_io)
        if installed is not None:
            if self.async_save:
                installed.async_save = False  # who saves outside of the Trainer's loops wants the file, not a promise
            installed.finish()


def _check_strategy(strategy: Strategy) -> None:
    """Raise ValueError for strategies whose saves bypass the CheckpointIO: nothing would be quantized."""
    remedy = None
    if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded":
        remedy = 'pass FSDPStrategy(state_dict_type="full")'
    elif isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        remedy = "pass ModelParallelStrategy(save_distributed_checkpoint=False)"
    elif isinstance(strategy, DeepSpeedStrategy):
        remedy = "use another strategy"
    if remedy is not None:
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints without the Trainer's CheckpointIO, so they cannot be"
            f" quantized; {remedy}, or remove the QuantizationCallback (or pass it checkpoint=None)"
        )


def _names(trainer: pl.Trainer) -> ModelNames:
    module = trainer.lightning_module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return ModelNames(
        parameters=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
        optimizer_parameters=tuple(
            tuple(names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"])
            for optimizer in trainer.optimizers
        ),
    )
