"""Training with quantized weights: which ones and when, engage and release, export."""
