"""Inspect, compress, decompress, verify and compare checkpoints: what the command line calls."""
