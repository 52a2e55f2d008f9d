"""A checkpoint written anew tensor by tensor: compressed, or decompressed."""
