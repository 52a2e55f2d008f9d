"""Select the tensors to encode, each with its codec, and find those that belong together."""
