"""Results as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from torch import Tensor

from pdtrim.evaluate.result import Result


def table(result: Result) -> Table:
    """Rows of a result, the numbers people compare first."""
    p = result.provenance
    view = Table(
        title=f"{p.model}: {p.sequences} sequences of {p.text},\n"
        f"prompt {p.prompt_tokens} + continuation {p.continuation_tokens} tokens, {p.dtype}",
        caption="KL to dense in nats a token (standard error); P and D: share of the dense\n"
        "operations that prefill and decode still do, and whole blocks they run",
    )
    view.add_column("")
    for name in ("KL", "PPL", "KV MB", "KV", "P ops", "D ops", "blocks"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        view.add_row(
            row.name,
            f"{row.kl:.3f} ({row.kl_error:.3f})",
            f"{row.ppl:.1f}",
            f"{row.kv_bytes / 1e6:.2f}",
            f"{row.kv_compression:.2f}x",
            f"{row.prefill_flops_ratio:.2f}",
            f"{row.decode_flops_ratio:.2f}",
            f"{row.prefill_blocks}/{row.decode_blocks}",
        )
    return view


def sensitivity_table(kl_WL: Tensor, ways: Sequence[str]) -> str:
    """Markdown: a row a block, a column a way to lose it."""
    lines = ["| block | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for layer, kl_W in enumerate(kl_WL.T.tolist()):
        lines.append(f"| {layer} | " + " | ".join(f"{kl:.4f}" for kl in kl_W) + " |")
    return "\n".join(lines) + "\n"
