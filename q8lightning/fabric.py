"""Save and load quantized checkpoints with Fabric, also in shards: ``q8lightning.fabric.save(fabric, path, state)``."""

from q8lightning.trainer.fabric.load import load
from q8lightning.trainer.fabric.save import save

__all__ = ["load", "save"]
