"""Search: which blocks to remove from each stage."""
