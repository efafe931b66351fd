"""Train decode's blocks: two neighbours merged into one, and the kept ones on the dense logits.

The prompt's KV comes from prefill's weights, which never change; only decode's checkpoint does.
"""
