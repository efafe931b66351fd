"""Evaluation: what pruning costs in quality, and the schema of result files."""
