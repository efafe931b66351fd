"""A tiny pair, the commands that serve it, and their flags."""

import itertools
import json

from helpers import export, make_plan, tiny_model
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.vllm.launch import processes
from pdtrim.plan import Gates


def export_tiny(folder, *, family="llama", gates=None, kv=None, block_size=1):
    model = tiny_model(family)
    plan = make_plan(model, gates or Gates.removing(4, prefill={1}), kv, block_size)
    return export(plan, model, folder)


def commands(pair, **options):
    return processes(ServeConfig(pair=pair, **options), free_port=itertools.count(20000).__next__)


def flags(command):
    """``{flag: its values}`` of the arguments behind the program; JSON is parsed."""
    found = {}
    for word in command:
        if word.startswith("--"):
            found.setdefault(word, [])
            values = found[word]
        elif found:
            values.append(json.loads(word) if word.startswith("{") else word)
    return found
