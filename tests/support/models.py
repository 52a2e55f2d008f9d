"""Small LightningModules, an optimizer and quiet Trainers that the tests share.

Every weight matrix has at least 4096 elements, the smallest tensor that the presets quantize.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from support.optimizers import Small

WIDTH = 64


def quiet_trainer(folder: Path, **options: Any) -> pl.Trainer:
    """Return a Trainer on the CPU that prints, logs and draws nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(defaults | options))


def saving_trainer(folder: Path, saving: pl.Callback, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a quiet Trainer that does nothing but train, and save as a ModelCheckpoint says."""
    defaults = {"limit_val_batches": 0, "enable_checkpointing": True, "callbacks": [saving, *callbacks]}
    return quiet_trainer(folder, **(defaults | options))


def train_and_save(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, max_steps: int = 2, **options: Any
) -> pl.Trainer:
    """Train a module for some steps and save ``a.ckpt`` in the folder; return the Trainer."""
    defaults = {"limit_val_batches": 0, "callbacks": list(callbacks), "max_steps": max_steps}
    trainer = quiet_trainer(folder, **(defaults | options))
    trainer.fit(module)
    trainer.save_checkpoint(folder / "a.ckpt")
    return trainer


def in_two_processes() -> dict[str, Any]:
    """Return the options of a Trainer that trains in two processes, forked from this one.

    Call ``fit`` in a process of its own (``forked.run``): to fork one that has trained before can end in a deadlock.
    """
    return {"devices": 2, "strategy": pl.strategies.DDPStrategy(start_method="fork", process_group_backend="gloo")}


def trainer_with(strategy: Any, folder: Path) -> pl.Trainer:
    """Return a real Trainer on the CPU that has this strategy.

    Constructing one with it would ask for a GPU (FSDP) or for deepspeed; setup, where they are refused, comes before
    any of their machinery runs.
    """
    trainer = quiet_trainer(folder)
    trainer._accelerator_connector.strategy = strategy
    assert trainer.strategy is strategy
    return trainer


def batches(count: int = 4, *shape: int, size: int = 8) -> DataLoader[Tensor]:
    """Return a loader of ``count`` batches of ``size`` samples, the same ones every time."""
    samples = torch.randn(count * size, *(shape or (WIDTH,)), generator=torch.Generator().manual_seed(0))
    return DataLoader(samples, batch_size=size)  # type: ignore[arg-type]


class FactoredMoments(Small):
    """An optimizer in the manner of Adafactor: second moments as a row and a column, and a state of its own.

    Its ``exp_avg`` has a name that the policy knows; ``exp_avg_sq_row`` and ``exp_avg_sq_col`` are small; ``memory`` is
    as large as the parameter, and no policy has heard of it.
    """

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        rows = grad.reshape(grad.shape[0], -1)
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq_row"] = torch.zeros(rows.shape[0])
            state["exp_avg_sq_col"] = torch.zeros(rows.shape[1])
            state["memory"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg_sq_row"].lerp_(rows.square().mean(dim=1), 0.1)
        state["exp_avg_sq_col"].lerp_(rows.square().mean(dim=0), 0.1)
        state["exp_avg"].lerp_(grad, 0.1)
        state["memory"].add_(grad)
        scale = torch.outer(state["exp_avg_sq_row"], state["exp_avg_sq_col"]).view_as(grad)
        parameter.sub_(group["lr"] * state["exp_avg"] / (scale / state["exp_avg_sq_row"].mean()).sqrt().add(1e-3))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "factored": FactoredMoments,
}


class Waves(pl.LightningModule):
    """Logs a value that gets better, one that goes up and down, and one of two values in turn."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.steps = steps

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        step = self.global_step + 1
        self.log_dict({"rise": float(step), "wave": float((step * 5) % 3), "turn": float(step % 2)})
        loss: Tensor = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return batches(self.steps)


class Autoencoder(pl.LightningModule):
    """Two linear layers with a BatchNorm between, large buffers of floats and of integers, and something extra.

    The losses of all training steps are in ``losses``.
    """

    def __init__(self, optimizer: str = "adamw", width: int = WIDTH) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())
        self.decoder = nn.Linear(width, width)
        self.register_buffer("table", torch.linspace(-1, 1, 8192).view(128, 64))
        self.register_buffer("counts", torch.arange(5000))
        self.losses: list[float] = []

    def forward(self, batch: Tensor) -> Tensor:
        return self.decoder(self.encoder(batch))

    def loss(self, batch: Tensor) -> Tensor:
        return (self(batch) - batch).square().mean()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Tensor, index: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.hparams["optimizer"]](self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["something_extra"] = {"floats": torch.linspace(0, 1, 5000), "word": "kept"}

    def train_dataloader(self) -> DataLoader[Tensor]:
        return batches()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class TwoOptimizers(Autoencoder):
    """The same under manual optimization: AdamW for the encoder, SGD with momentum for the decoder."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width=width)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())
        self.log("loss", loss, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS["adamw"](self.encoder.parameters()), OPTIMIZERS["sgd"](self.decoder.parameters())


class Shrink(pl.LightningModule):
    """Trains any module, as ``net``, to return zeros for batches of the given shape; AdamW."""

    def __init__(self, net: nn.Module, *shape: int) -> None:
        super().__init__()
        self.net = net
        self.shape = shape or (WIDTH,)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        output = self.net(batch.to(next(self.net.parameters()).dtype))
        loss: Tensor = (output[0] if isinstance(output, tuple) else output).float().square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS["adamw"](self.parameters())

    def train_dataloader(self) -> DataLoader[Tensor]:
        return batches(4, *self.shape)


class Diary(pl.Callback):
    """A callback with a state of floats, large enough that a careless walk would quantize it."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"exp_avg": torch.linspace(-1, 1, 5000), "batches": 0}

    def on_train_batch_end(self, *args: Any) -> None:
        self.state["exp_avg"] = self.state["exp_avg"].roll(1)
        self.state["batches"] += 1

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = dict(state_dict)
