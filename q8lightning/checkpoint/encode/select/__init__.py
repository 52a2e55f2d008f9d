"""Which tensors of a checkpoint are encoded, with which codec, and which belong together."""
