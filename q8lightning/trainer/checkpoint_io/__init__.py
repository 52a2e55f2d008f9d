"""The CheckpointIO that encodes, what it wraps and what it reads."""
