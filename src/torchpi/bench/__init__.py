"""Benchmarks of `torchpi bench`: measured times compared with the machine's floor."""
