"""The records of a file, compared with their sums while it is loaded."""
