"""What benchmark.py runs, one part a file."""
