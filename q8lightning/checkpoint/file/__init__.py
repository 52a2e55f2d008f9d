"""The file format: writing a file durably, and reading it with every byte verified."""
