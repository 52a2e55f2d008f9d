"""Threads, the ordered queue of saves, paths and warnings: nothing that knows what a tensor means."""
