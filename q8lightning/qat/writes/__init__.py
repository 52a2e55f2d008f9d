"""Writes to engaged weights inside a step: followed to the masters, or refused with a name."""
