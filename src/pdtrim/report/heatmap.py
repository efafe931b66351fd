"""A picture of what each block is worth to each stage.

Shapes: L layers, W ways to lose a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pdtrim.report.figure import new_figure, save_figure

FLOOR = 1e-4
"""The least KL that is told apart: the colours are on a log scale, and less is noise."""


def plot_sensitivity(
    kl_WL: Tensor,
    ways: Sequence[str],
    path: Path,
    *,
    title: str,
    unit: str = "KL, nats a token",
) -> Path:
    """Write a PNG: a row a way, a column a block, dark where losing it costs much.

    What is below the floor, as recall may be that gets better, has the lightest colour.

    Raises:
        PdtrimError: matplotlib is missing.
    """
    shown = kl_WL.clamp_min(FLOOR)
    W, L = shown.shape
    figure = new_figure(max(6.0, 0.42 * L + 2.5), 0.55 * W + 1.5)
    from matplotlib.colors import LogNorm

    axes = figure.add_subplot()
    top = max(float(shown.max()), 10 * FLOOR)
    image = axes.imshow(
        shown.numpy(), aspect="auto", cmap="viridis_r", norm=LogNorm(vmin=FLOOR, vmax=top)
    )
    axes.set_yticks(range(W), ways)
    axes.set_xticks(range(L), [str(layer) for layer in range(L)], fontsize=8)
    axes.set_xlabel("block")
    axes.set_title(title, fontsize=10)
    for way in range(W):
        for layer in range(L):
            value = float(kl_WL[way, layer])
            dark = value > (FLOOR * top) ** 0.5
            text = "0" if value < FLOOR else f"{value:.1g}".replace("0.", ".").replace("e-0", "e-")
            colour = "white" if dark else "black"
            axes.text(layer, way, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)
    return save_figure(figure, path)
