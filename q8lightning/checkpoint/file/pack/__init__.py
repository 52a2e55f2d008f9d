"""Pack the content of a file: payloads, small tensors and the pickle become records of a zip."""
