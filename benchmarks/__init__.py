"""The benchmarks that benchmark.py runs, one per file."""
