"""Encoders and classifiers: one dict, one build_model."""
