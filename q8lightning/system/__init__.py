"""Threads, the queue of saves, paths and warnings; nothing here knows what a tensor means."""
