"""Images, with or without labels: embedded, in a folder, in arrays, in tar shards; their check."""
