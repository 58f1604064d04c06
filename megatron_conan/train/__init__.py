"""The training loop: stages, steps, checkpoints, metrics."""
