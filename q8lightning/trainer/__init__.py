"""What knows Lightning: the callback and its parts, the CheckpointIO, and what is recorded of both."""
