"""Checkpoints in shards: one folder that several processes write, on torch.distributed.checkpoint."""
