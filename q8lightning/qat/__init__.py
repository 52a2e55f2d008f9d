"""Training with quantized weights: rules, the selection, engage and release, and writes inside a step."""
