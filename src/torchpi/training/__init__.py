"""Training: the recipe, the loop, and what it needs."""
