"""A folder of shards, opened by one process."""
