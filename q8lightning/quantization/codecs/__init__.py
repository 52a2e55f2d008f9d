"""Codecs for checkpoints, one file for each kind, and the codec of weights that are trained quantized."""
