"""What a checkpoint holds: the payload, the policy, checksums, and the walk over its containers."""
