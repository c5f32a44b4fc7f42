"""A traced graph of ATen operators: made from a model, read, and rewritten."""
