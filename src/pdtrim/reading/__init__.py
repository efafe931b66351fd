"""Readers of what users bring: bounded before anything is allocated, and refused in one line."""
