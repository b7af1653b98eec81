"""The benchmarks of `scripts/benchmark.py`, a file each."""
