"""Show quantized values in the place of weights, and put the masters back."""
