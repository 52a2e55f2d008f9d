"""Checkpoints: payloads, policies, checksums, and the walk over containers."""
