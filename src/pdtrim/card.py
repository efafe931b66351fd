"""The model card of an exported pair: what it is of, what each stage lost, how to run it.

Hugging Face's format: YAML between two lines ``---``, then Markdown
(https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
from pathlib import Path

from pdtrim.plan import STAGES, PrunePlan, Stage
from pdtrim.reading.json_text import read_bytes

NAME = "README.md"
MARK = "<!-- written by pdtrim export -->"
"""A card with this line is replaced by the next export; another file of that name stays."""
MAX_BYTES = 2**20
LICENCE_KEYS = ("license", "license_name", "license_link")


def card_of(plan: PrunePlan, licence: dict[str, str]) -> str:
    """The card's text.

    Args:
        licence: as :func:`licence_of` reads it from the dense model's folder.
    """
    about = {"base_model": plan.model.name, **licence, "library_name": "pdtrim"}
    head = [f"{key}: {json.dumps(value)}" for key, value in about.items()]
    origin = plan.provenance
    kl = "not measured" if origin.search_kl is None else f"{origin.search_kl:.3f} nats a token"
    lines = [
        *("---", *head, "tags: [pdtrim, prefill-decode]", "---", MARK, ""),
        f"# {plan.model.name}, pruned for prefill and for decode",
        "",
        "Two checkpoints of one plan, made by `pdtrim export`. They serve together only.",
        "",
        "| stage | whole blocks | skips | narrower |",
        "|---|---|---|---|",
        *(_row(plan, stage) for stage in STAGES),
        "",
        *("The prompt's KV cache that travels between them:", ""),
        *_rules(plan),
        "",
        f"- plan digest: `{plan.digest}`",
        f"- method: {origin.method}, mode {origin.mode}, seed {origin.seed}",
        f"- repair: {origin.repair}; training: {origin.distillation}",
        f"- KL to the dense model on the search's own text, before repair: {kl}",
        "- quality on held-out text: not measured by the export; `pdtrim eval . --text FILE` does",
        *("", "```", "pdtrim generate . --prompt TEXT", "pdtrim serve . --port 8000", "```", ""),
    ]
    return "\n".join(lines)


def is_card(path: Path) -> bool:
    """Whether a file is a card that an export wrote."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return False
    return MARK in path.read_text(encoding="utf-8", errors="replace").splitlines()


def licence_of(folder: Path) -> dict[str, str]:
    """What a model folder's own card says of its licence; nothing if it has none or says nothing.

    The card's front matter is read line by line, values of one line only.
    """
    path = folder / NAME
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return {}
    lines = read_bytes(path, limit=MAX_BYTES).decode("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        key, colon, value = line.partition(":")
        if colon and key in LICENCE_KEYS and value.strip():
            found[key] = value.strip().strip("'\"")
    return {}


def _row(plan: PrunePlan, stage: Stage) -> str:
    attention, mlp = plan.gates.of(stage)
    gone = [
        f"{layer}{'' if not (a or m) else ' (attention)' if m else ' (MLP)'}"
        for layer, (a, m) in enumerate(
            zip((gate in ("full", True) for gate in attention), mlp, strict=True)
        )
        if not (a and m)
    ]
    narrow = sum(plan.width(stage, layer) is not None for layer in plan.gates.layers(stage))
    whole = f"{plan.whole_blocks(stage)} of {plan.model.num_layers}"
    return f"| {stage} | {whole} | {', '.join(gone) or 'none'} | {narrow or 'none'} |"


def _rules(plan: PrunePlan) -> list[str]:
    rules: dict[str, int] = {}
    for layer in plan.sent_layers:
        rules[plan.kv[layer].text] = rules.get(plan.kv[layer].text, 0) + 1
    return [f"- {count} layers: {text}" for text, count in rules.items()] or ["- nothing travels"]
