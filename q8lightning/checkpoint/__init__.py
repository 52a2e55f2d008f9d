"""Quantized checkpoints: the policy, the payload, and the door they are saved through."""
