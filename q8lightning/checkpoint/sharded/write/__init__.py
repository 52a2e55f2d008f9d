"""Write a folder of shards, all processes together."""
