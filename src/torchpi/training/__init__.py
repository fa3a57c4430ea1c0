"""Training: recipes, data, the training loop, checkpoints and reports."""
