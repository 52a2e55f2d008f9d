"""Quantized values shown in the place of weights, and the masters put back."""
