"""The content of a file: payloads, small tensors and the pickle, as records of a zip."""
