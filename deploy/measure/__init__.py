"""Judging a deployed model: the comparator, verification against golden data, and timing."""
