"""What a run writes, one file a kind: folder, shards, arrays, and files packed into arrays."""
