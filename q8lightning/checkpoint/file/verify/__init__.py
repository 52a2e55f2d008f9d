"""Compare the records of a file with their sums while it is loaded."""
