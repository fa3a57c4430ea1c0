"""Benchmarks of `torchpi bench`: measured times next to the floor that the machine allows in the same run."""
