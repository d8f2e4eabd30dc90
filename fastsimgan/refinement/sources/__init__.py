"""What a run reads, one file a kind: folder, shards, arrays, and arrays unpacked into files."""
