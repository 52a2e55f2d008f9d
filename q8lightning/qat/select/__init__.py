"""Select the parameters and modules of a model that are trained quantized."""
