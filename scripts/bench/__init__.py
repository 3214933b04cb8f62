"""The benchmarks of `scripts/benchmark.py`, a module for each subject."""
