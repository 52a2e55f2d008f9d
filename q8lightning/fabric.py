"""Save and load quantized checkpoints with Fabric, also in shards: ``q8lightning.fabric.save(fabric, path, state)``."""

from q8lightning.trainer.fabric.save import load, save

__all__ = ["load", "save"]
