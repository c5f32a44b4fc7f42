"""Training loops, evaluation, optimizers and schedules."""
