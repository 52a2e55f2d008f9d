"""The command line: look into checkpoints, convert, verify and compare them."""
