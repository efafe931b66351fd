"""Closed-form repairs of what a removed run of blocks leaves behind, folded into kept blocks."""
