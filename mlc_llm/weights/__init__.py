"""Checkpoints on disk, read tensor by tensor, and their conversion into an artifact's shards."""
