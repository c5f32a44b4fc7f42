"""What keeps a model from learning its training set by heart."""
