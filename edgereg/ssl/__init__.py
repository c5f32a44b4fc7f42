"""Self-supervised pre-training: views, heads and losses."""
