"""Read a folder of shards in one process, tensor by tensor."""
