"""Which parameters and modules of a model are trained quantized."""
