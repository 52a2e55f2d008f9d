"""Small models under FSDP2, HSDP and tensor parallelism, and Trainers for them on CPUs."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

WIDTH, HEAD = 128, 67


class Block(nn.Module):
    """A residual block whose second matrix has rows of 96, in which blocks of 32 fit."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 96)
        self.down = nn.Linear(96, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks, an uneven head with a long vector, and a frozen matrix."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, HEAD)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, HEAD * 64))
        self.one = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        """Fill what no module of its own has, when it was made without memory."""
        with torch.no_grad():
            self.scale.uniform_(0.5, 1.5)
            self.one.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale.view(HEAD, 64).mean(dim=1) * self.one


class ShardedModel(pl.LightningModule):
    """A network sharded block by block, with a parameter outside; losses are in ``losses``.

    All processes see the same samples, so that losses do not depend on how many there are but for rounding.
    """

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.net = Net(blocks)
        self.outside = nn.Parameter(torch.linspace(-1, 1, HEAD * 64).view(HEAD, 64))
        self.register_buffer("seen", torch.zeros(5000))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if not any(isinstance(each, DTensor) for each in self.parameters()):
            self.shard(self.device_mesh["data_parallel"])

    def shard(self, mesh: Any) -> None:
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen += 1
        predicted = self.net(batch) + self.outside.mean(dim=1)
        loss = (predicted - batch[:, :HEAD]).square().mean()
        self.losses.append(float(loss))
        return loss

    validation_step = test_step = lambda self, batch, index: self.training_step(batch, index)

    def configure_optimizers(self) -> Any:
        # Not foreach: torch refuses lists of sharded and other parameters, which is its default on GPUs.
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, foreach=False)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"},
        }


class HybridModel(ShardedModel):
    """The same, sharded over pairs of processes that hold the same."""

    def configure_model(self) -> None:
        self.shard(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


class TensorParallelModel(ShardedModel):
    """The same, with the matrices of each block cut in one or the other dimension, and the rest by rows."""

    def configure_model(self) -> None:
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        for block in self.net.blocks:
            parallelize_module(block, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if data.size() > 1:
            self.shard(data)


class CompiledModel(ShardedModel):
    """The same with compiled blocks, whose parameters have longer names than in the states."""

    def configure_model(self) -> None:
        for index, block in enumerate(self.net.blocks):
            self.net.blocks[index] = torch.compile(block, backend="eager")
        super().configure_model()


class MetaModel(ShardedModel):
    """The same, made without memory."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = Net(2)
        super().configure_model()

    def reset_parameters(self) -> None:
        """Fill what Lightning empties although it had memory."""
        with torch.no_grad():
            self.outside.copy_(torch.linspace(-1, 1, HEAD * 64).view(HEAD, 64))
            self.seen.zero_()


class ClippedModel(ShardedModel):
    """The same with nothing to train outside: torch has no norm of DTensors and plain tensors together."""

    def __init__(self) -> None:
        super().__init__()
        self.outside.requires_grad_(False)


class OldModel(ShardedModel):
    """The same for FSDPStrategy, which wraps the whole of it."""

    def configure_model(self) -> None:
        pass


class OldStrategy(FSDPStrategy):
    """FSDPStrategy on CPUs; Lightning refuses the class itself there, and no subclass."""

    def __init__(self) -> None:
        super().__init__(state_dict_type="sharded")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the model as the class does, on the CPU, which it takes for no device."""
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy
        )


def samples(count: int = 64) -> DataLoader[Tensor]:
    """Return a loader with the same samples every time, eight a batch."""
    data = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(data, batch_size=8)  # type: ignore[arg-type]


def trainer_of(folder: Path, strategy: Any = None, **options: Any) -> pl.Trainer:
    """Return a quiet Trainer on as many processes as the launch has."""
    size = int(os.environ.setdefault("PROCESSES", os.environ.get("WORLD_SIZE", "1")))
    os.environ["WORLD_SIZE"] = str(size)  # Lightning takes it away at the end of each run
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": size,
        "strategy": strategy or ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1),
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(defaults | options))
