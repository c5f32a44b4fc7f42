"""Augmentation in batches on the training device, with randomness per sample."""
