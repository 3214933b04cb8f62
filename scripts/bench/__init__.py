"""The benchmarks behind `scripts/benchmark.py`, a module for each subject."""
