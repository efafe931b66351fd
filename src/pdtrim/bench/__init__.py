"""Benchmarks: each prints a ratio against a reference taken in the same run."""
