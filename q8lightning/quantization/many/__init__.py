"""Many tensors at once, in few launches: encode, fake-quantize, update directions."""
