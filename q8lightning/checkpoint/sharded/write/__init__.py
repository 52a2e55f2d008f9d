"""A folder of shards, written by all processes together."""
