"""A picture of a plan in text: which block runs where, and what travels."""

from __future__ import annotations

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdtrim.kv.codecs import Raw
from pdtrim.kv.frame import Layout
from pdtrim.plan import STAGES, PrunePlan

PARTS = ("KV heads", "neurons")
ATTENTION = {"full": ("A", "green"), "kv": ("k", "yellow"), "off": ("·", "bright_black")}


def picture(plan: PrunePlan, *, prompt_tokens: int = 512) -> RenderableType:
    """The plan as a rich renderable; bytes are for a prompt of ``prompt_tokens`` in bf16."""
    narrow = [] if plan.widths is None else [_widths(plan)]
    return Group(_head(plan), _blocks(plan), _legend(), *narrow, _handover(plan, prompt_tokens))


def _head(plan: PrunePlan) -> Text:
    p = plan.provenance
    lines = [
        f"plan {plan.digest[:12]}  model {plan.model.name} ({plan.model.family},"
        f" {plan.model.num_layers} blocks, fingerprint {plan.model.fingerprint[:12]})",
        f"made by {p.method} in mode {p.mode}, seed {p.seed}, calibration {p.calibration},"
        f" {p.search_block_tokens:,} block-tokens, {p.wall_s:.0f} s",
        *_scores(plan),
        "",
    ]
    return Text("\n".join(lines))


def _scores(plan: PrunePlan) -> list[str]:
    """What was lost, on the search's text before repairs and on the re-rank text behind them."""
    p = plan.provenance
    found = [("searched", p.search_kl, p.search_recall)]
    if p.held_out is not None:
        found.append(("finished, on the re-rank text", p.held_out.kl, p.held_out.recall))
    lines = []
    for what, kl, recall in found:
        if kl is not None:
            lost = "" if recall is None else f", recall {recall:+.3f} nats an answer"
            lines.append(f"{what}: KL {kl:.4f} nats a token{lost}")
    return lines


def _blocks(plan: PrunePlan) -> Table:
    gates = plan.gates
    table = Table(box=None, pad_edge=False, padding=(0, 0), show_header=False)
    table.add_column(justify="left")
    tens = "".join(str(i // 10) if i % 10 == 0 else " " for i in range(gates.num_layers))
    table.add_row(Text("layer    " + tens))
    table.add_row(Text("         " + "".join(str(i % 10) for i in range(gates.num_layers))))
    for stage in STAGES:
        attention, mlp = gates.of(stage)
        row = Text(f"{stage:<9}")
        for gate in attention:
            state = gate if isinstance(gate, str) else ("full" if gate else "off")
            row.append(*ATTENTION[state])
        row.append(f"  attention, {plan.whole_blocks(stage)} whole blocks of {gates.num_layers}")
        table.add_row(row)
        row = Text(" " * 9)
        for on in mlp:
            row.append("M" if on else "·", "green" if on else "bright_black")
        row.append("  MLP")
        table.add_row(row)
        if stage == "prefill":
            table.add_row(_travels(plan))
    return table


def _travels(plan: PrunePlan) -> Text:
    row = Text("  KV     ")
    for layer, rule in enumerate(plan.kv):
        if layer not in plan.sent_layers:
            row.append("·", "bright_black")
        elif rule.selector.name == "full":
            row.append("↓", "green")
        else:
            row.append("⇣", "yellow")
    row.append("  prompt KV that travels")
    return row


def _legend() -> Text:
    return Text(
        "\nA attention runs   k only its keys and values   M MLP runs   · nothing"
        "\n↓ every prompt token travels   ⇣ a selection\n"
    )


def _widths(plan: PrunePlan) -> Table:
    """What each stage keeps of its narrower layers; of a layer that it does not run, a dot."""
    table = Table(box=None, pad_edge=False, title="kept of narrower blocks", title_justify="left")
    for name in ("layer", *(f"{stage} {part}" for stage in STAGES for part in PARTS)):
        table.add_column(name, justify="right")
    for layer in range(plan.model.num_layers):
        if not any(plan.width(stage, layer) for stage in STAGES):
            continue
        row = [str(layer)]
        for stage in STAGES:
            width, runs = plan.width(stage, layer), layer in plan.gates.layers(stage)
            neurons = str(len(width.kept_neurons)) if width else "all"
            heads = f"{len(plan.kv_heads(stage, layer))} of {plan.model.num_kv_heads}"
            row += [heads, neurons] if runs else ["·", "·"]
        table.add_row(*row)
    return table


def _handover(plan: PrunePlan, prompt_tokens: int) -> Text:
    layout = Layout.of(plan, torch.bfloat16, prompt_tokens - 1)
    dense = plan.model.num_layers * Raw().nbytes(
        plan.model.num_kv_heads, layout.tokens, plan.model.head_dim, layout.dtype
    )
    rules: dict[str, list[int]] = {}
    for layer in plan.sent_layers:
        rules.setdefault(plan.kv[layer].text, []).append(layer)
    lines = [f"{len(plan.sent_layers)} of {plan.model.num_layers} layers travel:"]
    lines += [f"  {len(layers)} x {rule}" for rule, layers in rules.items()]
    bound = "" if layout.exact else "at most "
    lines.append(
        f"by the layout, a prompt of {prompt_tokens} tokens sends {bound}{layout.frame_bytes:,}"
        f" bytes of {dense:,} in bf16 ({dense / layout.frame_bytes:.2f}x)"
    )
    return Text("\n".join(lines))
