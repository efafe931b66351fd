"""The words that plans, records and the command share. No torch here, so that help is quick."""

from __future__ import annotations

from typing import Literal

Stage = Literal["prefill", "decode"]
STAGES: tuple[Stage, ...] = ("prefill", "decode")

Mode = Literal["projected", "subset", "unified"]
"""How the stages' removed blocks relate.

``projected``: each stage loses its own, and prefill still makes the keys and values that decode
reads. ``subset``: prefill's lie inside decode's. ``unified``: both lose the same.
"""

Grain = Literal["block", "part"]
"""What is removed at once: a whole block, or its attention or its MLP alone."""

Metric = Literal["blocks", "parameters", "flops", "kv_bytes", "latency"]
"""What a stage must lose: a count of blocks, or a share of the others."""

Search = Literal["one_shot", "greedy", "anneal", "evolution", "hybrid"]

Repair = Literal["none", "best"]
"""``best`` corrects kept blocks for what was cut, in closed form, where held-out text gains."""

Which = Literal["pairs", "neighbours", "all"]
"""Decode blocks that train: merged ones, those beside each cut too, or all that decode keeps."""

Reading = Literal["pairs", "redundancy", "none"]
"""Which removed blocks merge with a kept neighbour before a training."""

TrainedStage = Literal["prefill", "decode", "both"]
"""Whose weights a training changes."""

Parts = Literal["kv", "norms", "qkv", "blocks"]
"""What trains of prefill behind its first cut; each holds the one before it.

``kv``: key and value projections of skipped blocks. ``norms``: the norms of these, too. ``qkv``:
that and the queries of kept blocks. ``blocks``: all that prefill runs, from the block before the
cut on.
"""

RECALL = 0.2
"""Weight of recall, nats an answer above dense, beside KL: one lost answer in some hundred tokens
of text."""

LocalPrefill = Literal["refuse", "count"]
"""What a decode server does with a prompt that comes without its KV: refuse it, or run and count
it."""
