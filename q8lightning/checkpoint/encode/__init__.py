"""Encode checkpoints: what is encoded, how, and what that loses."""
