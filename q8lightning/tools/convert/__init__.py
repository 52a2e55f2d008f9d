"""Write a checkpoint anew, compressed or decompressed, with one tensor in memory at a time."""
